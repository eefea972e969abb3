//! Who may write which sectors now: the order that read-modify-write needs.
//!
//! A write that does not cover whole sectors reads the rest of them first. Between its read and
//! its write nobody else may write those sectors, or their acknowledged data would be undone.
//! Such writes are rare, so they pay: while one is about, every writer registers its range in a
//! table; otherwise a writer only counts itself in its connection's [`Lane`], alone on its cache
//! line.
//!
//! ```text
//!   whole sectors   count in the lane; no partial writer about?  -> go
//!                   else leave the lane, claim the range in the table (or be told Busy)
//!   part of sectors announce; wait until every lane is empty; claim the range; read, modify,
//!                   write; release and take the announcement back
//! ```
//!
//! A writer that is told [`Busy`] holds nothing while it waits: it first finishes what it has in
//! flight. So no two connections can wait for each other.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use thiserror::Error;

use crate::registers;
use crate::units::SectorRange;

/// How long one wait for other writers lasts before it is asked again whether to give up.
const RECHECK: Duration = Duration::from_millis(2);

/// The range is being written by someone else, or by this connection itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the sectors are being written")]
pub struct Busy;

/// The order of writes on one volume.
#[derive(Default)]
pub struct WriteOrder {
    partial_writers: AtomicU32,
    lanes: Mutex<Vec<Weak<Counter>>>,
    claimed: Mutex<Vec<(u64, u64)>>,
    released: Condvar,
}

/// The writes of whole sectors that one connection has in flight.
#[repr(align(128))]
#[derive(Default)]
struct Counter(AtomicU32);

/// One connection's place in the order.
pub struct Lane {
    order: Arc<WriteOrder>,
    counter: Arc<Counter>,
}

/// Permission to write a range; given back with [`Lane::end`].
#[derive(Debug)]
#[must_use = "a range never ended blocks partial writes for ever"]
pub struct Claim(Kind);

#[derive(Debug)]
enum Kind {
    /// Whole sectors, counted in the lane.
    Counted,
    /// Whole sectors, in the table.
    Whole((u64, u64)),
    /// Part of sectors: in the table, and announced.
    Partial((u64, u64)),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn overlaps(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.1 && b.0 < a.1
}

impl WriteOrder {
    /// A place for one connection.
    pub fn lane(self: &Arc<Self>) -> Lane {
        let counter = Arc::new(Counter::default());
        let mut lanes = lock(&self.lanes);
        lanes.retain(|l| l.strong_count() > 0);
        lanes.push(Arc::downgrade(&counter));
        Lane { order: Arc::clone(self), counter }
    }

    /// Waits a little for a claim to be released; tells whether to go on.
    fn wait<'a>(
        &self,
        claimed: MutexGuard<'a, Vec<(u64, u64)>>,
    ) -> MutexGuard<'a, Vec<(u64, u64)>> {
        registers::wipe();
        self.released.wait_timeout(claimed, RECHECK).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Claims `range`, waiting until it is free or `give_up` says so.
    fn claim(&self, range: (u64, u64), give_up: &mut dyn FnMut() -> bool) -> Result<(), Busy> {
        loop {
            let mut claimed = lock(&self.claimed);
            if !claimed.iter().any(|c| overlaps(*c, range)) {
                claimed.push(range);
                return Ok(());
            }
            drop(self.wait(claimed));
            // Without the lock: it may take a moment.
            if give_up() {
                return Err(Busy);
            }
        }
    }

    fn claim_now(&self, range: (u64, u64)) -> Result<(), Busy> {
        let mut claimed = lock(&self.claimed);
        if claimed.iter().any(|c| overlaps(*c, range)) {
            return Err(Busy);
        }
        claimed.push(range);
        Ok(())
    }

    fn release(&self, range: (u64, u64)) {
        let mut claimed = lock(&self.claimed);
        if let Some(index) = claimed.iter().position(|c| *c == range) {
            claimed.swap_remove(index);
        }
        drop(claimed);
        self.released.notify_all();
    }
}

impl Lane {
    /// Starts a write of whole sectors without waiting.
    ///
    /// # Errors
    /// Someone is writing there. Finish what this connection has in flight, then
    /// [`Lane::begin_waiting`].
    #[inline]
    pub fn begin(&self, at: SectorRange) -> Result<Claim, Busy> {
        self.counter.0.fetch_add(1, Ordering::SeqCst);
        if self.order.partial_writers.load(Ordering::SeqCst) == 0 {
            return Ok(Claim(Kind::Counted));
        }
        self.counter.0.fetch_sub(1, Ordering::SeqCst);
        let range = (at.offset(), at.end());
        self.order.claim_now(range).map(|()| Claim(Kind::Whole(range)))
    }

    /// Starts a write of whole sectors when nobody else writes there any more. The caller has
    /// nothing in flight. `give_up` is asked every few milliseconds.
    ///
    /// # Errors
    /// `give_up` said so.
    pub fn begin_waiting(
        &self,
        at: SectorRange,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Claim, Busy> {
        match self.begin(at) {
            Ok(claim) => Ok(claim),
            Err(Busy) => {
                let range = (at.offset(), at.end());
                self.order.claim(range, give_up).map(|()| Claim(Kind::Whole(range)))
            }
        }
    }

    /// Starts a read-modify-write of the sectors of `at` when nobody else writes them any more. The
    /// caller has nothing in flight. `give_up` is asked every few milliseconds.
    ///
    /// # Errors
    /// `give_up` said so.
    pub fn begin_partial(
        &self,
        at: SectorRange,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Claim, Busy> {
        let range = (at.offset(), at.end());
        self.order.partial_writers.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let claimed = self.wait_for_lanes(give_up).and_then(|()| self.order.claim(range, give_up));
        if claimed.is_err() {
            self.order.partial_writers.fetch_sub(1, Ordering::SeqCst);
        }
        claimed.map(|()| Claim(Kind::Partial(range)))
    }

    /// Ends a write.
    #[inline]
    #[expect(clippy::needless_pass_by_value, reason = "a claim ends once")]
    pub fn end(&self, claim: Claim) {
        match claim.0 {
            Kind::Counted => {
                self.counter.0.fetch_sub(1, Ordering::SeqCst);
            }
            Kind::Whole(range) => self.order.release(range),
            Kind::Partial(range) => {
                self.order.release(range);
                self.order.partial_writers.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Waits until every write that was counted before the announcement has ended. Writers that
    /// come after it claim their ranges instead, so the counts only fall.
    fn wait_for_lanes(&self, give_up: &mut dyn FnMut() -> bool) -> Result<(), Busy> {
        let lanes: Vec<_> = lock(&self.order.lanes).iter().filter_map(Weak::upgrade).collect();
        for lane in lanes {
            let mut spins = 0;
            while lane.0.load(Ordering::SeqCst) > 0 {
                spins += 1;
                if spins < 64 {
                    std::thread::yield_now();
                    continue;
                }
                if give_up() {
                    return Err(Busy);
                }
                drop(self.order.wait(lock(&self.order.claimed)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::units::{Geometry, SectorSize};

    fn sector(n: u64) -> SectorRange {
        Geometry::new(1 << 20, SectorSize::B4096).sectors(n * 4096, 4096).unwrap()
    }

    #[test]
    fn a_partial_write_waits_for_whole_writes_in_flight_and_gives_up_when_told() {
        let order = Arc::new(WriteOrder::default());
        let (a, b) = (order.lane(), order.lane());
        let claim = a.begin(sector(0)).unwrap();
        assert_eq!(b.begin_partial(sector(0), &mut || true).map(|_| ()), Err(Busy));
        a.end(claim);
        b.end(b.begin_partial(sector(0), &mut || true).unwrap());
        a.end(a.begin(sector(0)).expect("nobody is about any more"));
    }

    #[test]
    fn whole_writes_stay_out_of_a_partial_writes_range_and_only_that() {
        let order = Arc::new(WriteOrder::default());
        let (a, b) = (order.lane(), order.lane());
        let partial = a.begin_partial(sector(3), &mut || false).unwrap();
        assert_eq!(b.begin(sector(3)).map(|_| ()), Err(Busy));
        let claim = b.begin(sector(4)).expect("another sector is free");
        b.end(claim);
        a.end(partial);
        b.end(b.begin(sector(3)).unwrap());
    }

    #[test]
    fn no_update_is_lost_between_partial_and_whole_writers() {
        // One sector as two counters: a whole writer sets both, partial writers add to one. Undone
        // acknowledged data would show as a count that is too low.
        let order = Arc::new(WriteOrder::default());
        let halves = [AtomicU64::new(0), AtomicU64::new(0)];
        std::thread::scope(|scope| {
            for half in &halves {
                let lane = order.lane();
                scope.spawn(move || {
                    for _ in 0..2000 {
                        let claim = lane.begin_partial(sector(0), &mut || false).unwrap();
                        let read = half.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        half.store(read + 1, Ordering::Relaxed);
                        lane.end(claim);
                    }
                });
            }
            let lane = order.lane();
            let halves = &halves;
            scope.spawn(move || {
                for _ in 0..2000 {
                    let claim = lane.begin_waiting(sector(0), &mut || false).unwrap();
                    for half in halves {
                        half.fetch_add(1, Ordering::Relaxed);
                    }
                    lane.end(claim);
                }
            });
        });
        assert_eq!(halves.map(|h| h.into_inner()), [4000, 4000]);
    }
}
