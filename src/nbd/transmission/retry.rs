//! Another try for what a store failed at, within a bound: one error is enough to make a file system
//! refuse everything until it is mounted anew, so none is told for what a moment can mend.

use std::io;
use std::time::{Duration, Instant};

use nix::poll::{PollTimeout, poll};
use tracing::warn;

use crate::nbd::transmission::Transmission;
use crate::store::is_transient;

/// Tries after the first: 20 ms, 80 ms, 320 ms and 1.28 s apart. Some 2 s bridge a path that comes
/// back or a moment without memory, and are well under what any client waits.
const TRIES: u32 = 4;

const FIRST_PAUSE: Duration = Duration::from_millis(20);

const STEP_MILLIS: u8 = 10;

impl Transmission {
    /// Whether to try again after `failures` earlier failures; waits before it says so, unless the
    /// fence closes meanwhile.
    pub(super) fn try_again(&mut self, error: &io::Error, failures: u32) -> bool {
        if failures >= TRIES || !is_transient(error) || self.export.gives_up() {
            return false;
        }
        warn!(volume = self.export.name(), %error, "the backing store failed; trying again");
        let until = Instant::now() + FIRST_PAUSE * 4u32.pow(failures);
        while Instant::now() < until && !self.export.gives_up() {
            // In short steps: a fence that closes is not kept waiting.
            let _nothing = poll(&mut [], PollTimeout::from(STEP_MILLIS));
        }
        !self.export.gives_up()
    }
}
