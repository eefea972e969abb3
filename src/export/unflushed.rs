//! What the kernel's client has to be told of a flush that failed when it could not hear it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::lock;

/// That the last flush before a stop failed: what the kernel's client had written until then may be lost,
/// and nobody has told it. Its next flush fails, whatever the store says of it: the store has said it to
/// the daemon that stopped, and says it once.
#[derive(Default)]
pub struct Unflushed {
    so: AtomicBool,
    told: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Unflushed {
    pub(super) fn set(&self) {
        self.so.store(true, Ordering::Relaxed);
    }

    /// It was so when an earlier daemon stopped; `told` is called when the kernel is told.
    pub fn since_before(&self, told: impl FnOnce() + Send + 'static) {
        *lock(&self.told) = Some(Box::new(told));
        self.set();
    }

    /// Whether the kernel is still to be told.
    #[must_use]
    pub fn is_so(&self) -> bool {
        self.so.load(Ordering::Relaxed)
    }

    /// The same, once: whoever calls this tells it.
    pub(crate) fn is_told(&self) -> bool {
        if !(self.is_so() && self.so.swap(false, Ordering::Relaxed)) {
            return false;
        }
        if let Some(told) = lock(&self.told).take() {
            told();
        }
        true
    }
}
