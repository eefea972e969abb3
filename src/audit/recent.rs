//! The latest records, in memory: for whoever looks now.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::audit::record::{Kind, Record};

/// Records kept of all together.
const OVERALL: usize = 2048;

/// Records kept of each volume, however busy the others are.
const OF_EACH: usize = 128;

/// Volumes whose records are kept apart: more than a node has.
const VOLUMES: usize = 1024;

/// The latest records.
#[derive(Debug, Default)]
pub(super) struct Recent {
    all: VecDeque<Arc<Record>>,
    volumes: BTreeMap<String, VecDeque<Arc<Record>>>,
}

fn keep(queue: &mut VecDeque<Arc<Record>>, record: &Arc<Record>, most: usize) {
    if queue.len() == most {
        queue.pop_front();
    }
    queue.push_back(Arc::clone(record));
}

impl Recent {
    pub(super) fn push(&mut self, record: Record) {
        // Routine: it would push out what people look for.
        if matches!(record.event.event, Kind::KmsCalls | Kind::Checkpoint) {
            return;
        }
        let record = Arc::new(record);
        keep(&mut self.all, &record, OVERALL);
        if let Some(volume) = &record.event.volume
            && (self.volumes.contains_key(volume) || self.volumes.len() < VOLUMES)
        {
            keep(self.volumes.entry(volume.clone()).or_default(), &record, OF_EACH);
        }
    }

    /// The last `most` after number `since`, of one volume or all, oldest first.
    pub(super) fn last(&self, volume: Option<&str>, since: u64, most: usize) -> Vec<Arc<Record>> {
        let none = VecDeque::new();
        let queue = match volume {
            Some(volume) => self.volumes.get(volume).unwrap_or(&none),
            None => &self.all,
        };
        let after: Vec<_> = queue.iter().filter(|record| record.seq > since).collect();
        let skip = after.len().saturating_sub(most);
        after.into_iter().skip(skip).cloned().collect()
    }
}
