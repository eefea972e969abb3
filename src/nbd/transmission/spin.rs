//! Whether to look for what a client sends next a little while before sleeping: a request, or the rest
//! of a payload.
//!
//! A client with one request at a time sends the next one some 20 µs after its reply, and a payload
//! right after its head; putting this thread to sleep and waking it on an idle core takes longer. So
//! a connection looks for a while, as long as that pays: each time nothing comes it sleeps at once
//! for twice as many times as before. Cores are shared, so only a few connections of the process look
//! at a time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::yield_now;
use std::time::{Duration, Instant};

use crate::turns;

/// How long to look: over twice what a client needs to be woken and to send its next request
/// (`docs/PERFORMANCE.md`).
const LOOK: Duration = Duration::from_micros(50);

/// At most 2 to this power times in a row it sleeps at once after misses.
const MOST_MISSES: u32 = 8;

/// Connections of this process that look now.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// What one connection has learnt about its client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spin {
    /// In a row.
    misses: u32,
    /// How often it sleeps at once.
    skip: u32,
    /// Connections that may look at a time.
    most: usize,
}

impl Default for Spin {
    fn default() -> Self {
        let cores = turns::processors();
        // A client needs a core as well, and so does what it works for. On one core looking would
        // keep the client from sending.
        let most = if cores > 1 { (cores / 4).max(1) } else { 0 };
        Self { misses: 0, skip: 0, most }
    }
}

impl Spin {
    /// Looks again and again until `look` finds something, for as long as that is worth it; says
    /// whether it did.
    pub(super) fn until<E>(
        &mut self,
        mut look: impl FnMut() -> Result<bool, E>,
    ) -> Result<bool, E> {
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(false);
        }
        let Some(_turn) = Turn::take(self.most) else { return Ok(false) };
        let started = Instant::now();
        while started.elapsed() < LOOK {
            if look()? {
                self.misses = 0;
                return Ok(true);
            }
            // Whoever else wants this core has it first; alone on it, this returns at once.
            yield_now();
        }
        self.misses = (self.misses + 1).min(MOST_MISSES);
        self.skip = (1 << self.misses) - 1;
        Ok(false)
    }
}

/// One of the few that may look now.
struct Turn;

impl Turn {
    fn take(most: usize) -> Option<Self> {
        if LOOKING.load(Ordering::Relaxed) >= most {
            return None;
        }
        let turn = Self;
        (LOOKING.fetch_add(1, Ordering::Relaxed) < most).then_some(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_is_slow_is_looked_for_less_and_less() {
        let mut spin = Spin { misses: 0, skip: 0, most: usize::MAX };
        let mut looked = 0;
        for _ in 0..1000 {
            let mut once = false;
            let found = spin.until(|| {
                once = true;
                Ok::<_, ()>(false)
            });
            assert_eq!(found, Ok(false));
            looked += usize::from(once);
        }
        assert!(looked < 16, "{looked} looks of 50 µs for 1000 requests");
        spin.skip = 0;
        assert_eq!(spin.until(|| Ok::<_, ()>(true)), Ok(true));
        assert_eq!(spin.misses, 0, "one that is quick again is looked for again");
    }
}
