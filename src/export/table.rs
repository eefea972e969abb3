//! What clients can ask for, and the memory that their requests share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::export::{Export, lock};

/// Memory for requests in flight over all connections of all exports, besides the one buffer that
/// each connection may always have. Chosen for a node with 24 GiB that serves other things too.
const BUDGET: usize = 512 << 20;

/// Memory for requests in flight, shared by all connections.
#[derive(Debug)]
pub(crate) struct Budget(AtomicUsize);

impl Budget {
    /// Takes `bytes` if they are there.
    pub(crate) fn take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.0.try_update(Ordering::AcqRel, Ordering::Relaxed, take).is_ok()
    }

    pub(crate) fn give(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::AcqRel);
    }
}

/// What is served at one place: the names a client can ask for there.
#[derive(Clone)]
pub struct ExportTable {
    exports: Arc<Mutex<BTreeMap<String, Arc<Export>>>>,
    budget: Arc<Budget>,
}

impl Default for ExportTable {
    fn default() -> Self {
        Self { exports: Arc::default(), budget: Arc::new(Budget(AtomicUsize::new(BUDGET))) }
    }
}

impl ExportTable {
    /// An empty table with its own memory budget.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A table of one export that shares this one's memory budget: what a volume's own socket
    /// serves.
    #[must_use]
    pub fn only(&self, export: Arc<Export>) -> Self {
        let table = Self { exports: Arc::default(), budget: Arc::clone(&self.budget) };
        table.insert(export);
        table
    }

    /// Adds an export under its name.
    pub fn insert(&self, export: Arc<Export>) {
        lock(&self.exports).insert(export.name().to_owned(), export);
    }

    /// Takes an export out.
    pub fn remove(&self, name: &str) {
        lock(&self.exports).remove(name);
    }

    /// The export of that name; the empty name means the only one there is.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<Export>> {
        let exports = lock(&self.exports);
        match exports.get(name) {
            Some(export) => Some(Arc::clone(export)),
            None if name.is_empty() && exports.len() == 1 => exports.values().next().cloned(),
            None => None,
        }
    }

    /// Every name, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        lock(&self.exports).keys().cloned().collect()
    }

    /// Memory in use for requests in flight, and how much there may be.
    #[must_use]
    pub fn request_memory(&self) -> (usize, usize) {
        (BUDGET.saturating_sub(self.budget.0.load(Ordering::Relaxed)), BUDGET)
    }

    pub(crate) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }
}
