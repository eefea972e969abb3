//! Another try for what a store failed at, within a bound: one error is enough to make a file system
//! refuse everything until it is mounted anew, so none is told for what a moment can mend.
//!
//! What is to be tried again waits beside what is in flight, so that a store that fails at many
//! things at once makes nobody wait for all their pauses in a row.

use std::io;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::nbd::transmission::{Outcome, Part, Transmission};
use crate::store::uring::{Completion, Op};
use crate::store::{Durability, is_transient};

/// Tries after the first: 20 ms, 80 ms, 320 ms and 1.28 s apart. Some 2 s bridge a path that comes
/// back or a moment without memory, and are well under what any client waits.
const TRIES: u32 = 4;

const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// A part that goes to the store at its time.
pub(super) struct Later {
    pub(super) due: Instant,
    pub(super) part: Part,
    pub(super) op: Op,
}

/// How long after so many earlier failures.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE * 4u32.pow(failures)
}

impl Transmission {
    /// Whether to try again after `failures` earlier failures; says so.
    fn is_worth_a_try(&self, error: &io::Error, failures: u32) -> bool {
        let worth = failures < TRIES && is_transient(error) && !self.export.gives_up();
        if worth {
            warn!(volume = self.export.name(), %error, "the backing store failed; trying again");
        }
        worth
    }

    /// How a part's I/O ended; `None` if it is tried again.
    pub(super) fn unless_tried_again(
        &mut self,
        part: Part,
        ended: Completion,
        answered: bool,
    ) -> Option<(Part, Completion)> {
        let Completion { token, result: Err(error), buffer: Some(mut data) } = ended else {
            return Some((part, ended));
        };
        // A write that has to be durable is a flush as well, and none is repeated.
        let flushes = part.durability == Durability::Durable;
        if part.orphan || answered || flushes || !self.is_worth_a_try(&error, part.failures) {
            return Some((part, Completion { token, result: Err(error), buffer: Some(data) }));
        }
        let due = Instant::now() + pause(part.failures);
        let op = if part.claim.is_some() {
            Op::Write(data, part.durability)
        } else {
            data.wipe();
            Op::Read(data)
        };
        let part = Part { failures: part.failures + 1, ..part };
        self.later.push(Later { due, part, op });
        None
    }

    /// Starts what is due, as far as the ring has room.
    pub(super) fn start_due(&mut self) -> Outcome {
        let now = Instant::now();
        let mut started = Ok(());
        while self.ring.as_ref().is_none_or(|ring| ring.has_room()) {
            let Some(index) = self.later.iter().position(|later| later.due <= now) else { break };
            let Later { part, op, .. } = self.later.swap_remove(index);
            started = started.and(self.submit(part, op));
        }
        started
    }

    /// Waits before something that the caller does by itself is tried again; `false` if that is not
    /// worth it. The fence is heeded meanwhile.
    pub(super) fn waits_to_try_again(&mut self, error: &io::Error, failures: u32) -> Outcome<bool> {
        if !self.is_worth_a_try(error, failures) {
            return Ok(false);
        }
        let until = Instant::now() + pause(failures);
        while Instant::now() < until && !self.export.gives_up() {
            self.wait_until(until)?;
        }
        Ok(!self.export.gives_up())
    }
}
