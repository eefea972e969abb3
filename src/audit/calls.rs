//! Requests to KMS, gathered: a probe every ten seconds is no line of its own, but the customer's
//! CloudTrail has it, so its id is in the trail. A line holds what was asked of one key in one
//! context; it is written before any other event of that volume, and at the latest after a while.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::audit::record::{CallNote, Event, Kind};
use crate::key::wrapped::KeyArn;
use crate::kms::Call;
use uuid::Uuid;

/// Calls in one line: ten minutes of probes.
const IN_A_LINE: usize = 64;

/// How long a call may wait for its line.
const AT_MOST: Duration = Duration::from_secs(600);

/// Keys and contexts that are gathered at a time; `key check` uses a new one each time.
const GATHERED: usize = 2048;

/// Calls that are in no line yet.
#[derive(Debug, Default)]
pub(super) struct Calls(BTreeMap<(KeyArn, BTreeMap<String, String>), Gathered>);

#[derive(Debug)]
struct Gathered {
    since: Instant,
    event: Event,
}

impl Calls {
    /// Adds a call; gives what has to be written now.
    pub(super) fn add(&mut self, call: &Call) -> Vec<Event> {
        let pairs = call.context.as_ref().map(|c| c.pairs().clone()).unwrap_or_default();
        let mut full = if self.0.len() >= GATHERED { self.take(|_| true) } else { Vec::new() };
        let place = (call.key.clone(), pairs);
        let gathered = self.0.entry(place.clone()).or_insert_with(|| {
            let mut event = Event::new(Kind::KmsCalls);
            event.uuid = call.context.as_ref().and_then(|context| context.volume());
            event.key = Some(call.key.clone());
            event.context.clone_from(&call.context);
            Gathered { since: Instant::now(), event }
        });
        gathered.event.calls.push(CallNote::of(call, Timestamp::now()));
        if gathered.event.calls.len() >= IN_A_LINE {
            full.extend(self.0.remove(&place).map(|gathered| gathered.event));
        }
        full
    }

    /// What was asked for a volume.
    pub(super) fn of(&mut self, uuid: Uuid) -> Vec<Event> {
        self.take(|gathered| gathered.event.uuid == Some(uuid))
    }

    /// What has waited long enough.
    pub(super) fn due(&mut self) -> Vec<Event> {
        self.take(|gathered| gathered.since.elapsed() >= AT_MOST)
    }

    /// Everything.
    pub(super) fn all(&mut self) -> Vec<Event> {
        self.take(|_| true)
    }

    fn take(&mut self, wanted: impl Fn(&Gathered) -> bool) -> Vec<Event> {
        let taken = self.0.extract_if(.., |_, gathered| wanted(gathered));
        taken.map(|(_, gathered)| gathered.event).collect()
    }
}
