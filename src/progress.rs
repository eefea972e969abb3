//! What shows that the daemon's parts go on: each says by when it will be heard of again.
//!
//! A part is whatever must not stand still while others wait for it in vain: the control socket, a
//! volume's keeper. The watchdog (see [`crate::systemd`]) is told that all is well only while no
//! part is overdue. A backing store or a KMS that hangs makes no part late: whoever waits for one
//! does so with a time limit, and says so.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// The parts of a daemon.
#[derive(Clone, Default)]
pub struct Progress(Arc<Mutex<Vec<Weak<Due>>>>);

/// A part, held by whoever is it. Dropped, it is not expected any more.
pub struct Part(Arc<Due>);

struct Due {
    what: String,
    by: Mutex<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process (panic = "abort"); in tests the data is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Progress {
    /// A part that will be heard of within `within`. The clock is the one that stands still while
    /// the machine sleeps, as timers do.
    #[must_use]
    pub fn part(&self, what: impl Into<String>, within: Duration) -> Part {
        let due = Arc::new(Due { what: what.into(), by: Mutex::new(later(within)) });
        let mut parts = lock(&self.0);
        parts.retain(|part| part.strong_count() > 0);
        parts.push(Arc::downgrade(&due));
        Part(due)
    }

    /// The parts that should have been heard of before `now`.
    #[must_use]
    pub fn overdue(&self, now: Instant) -> Vec<String> {
        let parts: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        parts.iter().filter(|part| *lock(&part.by) < now).map(|part| part.what.clone()).collect()
    }
}

impl Part {
    /// It goes on, and will be heard of again within `within`.
    pub fn goes_on(&self, within: Duration) {
        *lock(&self.0.by) = later(within);
    }
}

fn later(within: Duration) -> Instant {
    let now = Instant::now();
    // No clock reaches further: never.
    now.checked_add(within).unwrap_or_else(|| now + Duration::from_secs(u32::MAX.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_secs(10);

    #[test]
    fn a_part_that_stands_still_is_overdue_until_it_goes_on() {
        let progress = Progress::default();
        let stuck = progress.part("keeper of a", BOUND);
        let busy = progress.part("keeper of b", BOUND);
        let start = Instant::now();
        assert!(progress.overdue(start).is_empty());
        busy.goes_on(BOUND * 3);
        assert_eq!(progress.overdue(start + BOUND * 2), ["keeper of a"]);
        assert_eq!(progress.overdue(start + BOUND * 4), ["keeper of a", "keeper of b"]);
        stuck.goes_on(BOUND * 3);
        assert!(progress.overdue(start + BOUND * 2).is_empty());
    }

    #[test]
    fn a_part_that_is_gone_is_not_waited_for() {
        let progress = Progress::default();
        let part = progress.clone().part("keeper of a", Duration::ZERO);
        let later = Instant::now() + BOUND;
        assert_eq!(progress.overdue(later).len(), 1);
        drop(part);
        assert!(progress.overdue(later).is_empty());
    }

    #[test]
    fn a_bound_beyond_the_clock_is_never_reached() {
        let progress = Progress::default();
        let _part = progress.part("keeper of a", Duration::MAX);
        assert!(progress.overdue(Instant::now() + BOUND).is_empty());
    }
}
