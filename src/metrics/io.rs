//! What a connection counts of its requests.
//!
//! A counter is written by one thread alone, without a locked instruction, on cache lines that hardly
//! anybody else writes: all but one by their connection's own. Whoever scrapes reads all connections'
//! and adds them up. Clocks are read once for what was received together and once for what is sent
//! together, and around every sixteenth call of the cipher: `docs/PERFORMANCE.md` says what that costs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::metrics::counters::Durations;

/// What a client asks for, in words of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOperation {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`.
    Write,
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_WRITE_ZEROES`.
    Zero,
    /// Any other.
    Other,
}

impl IoOperation {
    /// All of them, in the order of their numbers.
    pub const ALL: [(Self, &str); 6] = [
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::Flush, "flush"),
        (Self::Trim, "trim"),
        (Self::Zero, "zero"),
        (Self::Other, "other"),
    ];
}

/// From a page cache's answer to a disk that hangs.
const BOUNDS: &[f64] = &[50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 10e-3, 50e-3, 0.25, 1.0, 5.0];

/// The same, in nanoseconds.
const BOUNDS_NANOS: [u64; BOUNDS.len()] = [
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    10_000_000,
    50_000_000,
    250_000_000,
    1_000_000_000,
    5_000_000_000,
];

/// One call of the cipher in so many is timed, and counts as many times: a clock read costs as much
/// as a tenth of a sector's encryption.
const TIMED: u64 = 16;

/// One connection's requests.
#[repr(align(128))]
#[derive(Default)]
pub struct IoCounters {
    operations: [Operation; IoOperation::ALL.len()],
    cipher_calls: AtomicU64,
    cipher_nanos: AtomicU64,
    aside_nanos: AtomicU64,
}

#[derive(Default)]
struct Operation {
    requests: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    failed_bytes: AtomicU64,
    took: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// Adds to a counter that nobody else writes.
#[inline]
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

/// For the connection's own thread alone: two that count at once would lose counts.
impl IoCounters {
    /// A request has come.
    #[inline]
    pub fn asked(&self, operation: IoOperation, bytes: u64) {
        let counters = &self.operations[operation as usize];
        bump(&counters.requests, 1);
        bump(&counters.bytes, bytes);
    }

    /// A request was answered, after this time.
    #[inline]
    pub fn answered(&self, operation: IoOperation, took: Duration) {
        let counters = &self.operations[operation as usize];
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let place = BOUNDS_NANOS.iter().position(|bound| nanos <= *bound);
        bump(&counters.took[place.unwrap_or(BOUNDS.len())], 1);
        bump(&counters.nanos, nanos);
    }

    /// A request about so many bytes was answered with an error by a fence or the backing store.
    pub fn failed(&self, operation: IoOperation, bytes: u64) {
        let counters = &self.operations[operation as usize];
        bump(&counters.failed, 1);
        bump(&counters.failed_bytes, bytes);
    }

    /// The cipher is called: the time, if this call is one of those that are timed.
    #[inline]
    pub fn cipher_begins(&self) -> Option<Instant> {
        let calls = self.cipher_calls.load(Ordering::Relaxed);
        self.cipher_calls.store(calls.wrapping_add(1), Ordering::Relaxed);
        calls.is_multiple_of(TIMED).then(Instant::now)
    }

    /// It has returned.
    #[inline]
    pub fn cipher_ended(&self, began: Option<Instant>) {
        if let Some(began) = began {
            let nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            bump(&self.cipher_nanos, nanos.saturating_mul(TIMED));
        }
    }
}

/// For the thread beside a connection's own, alone.
impl IoCounters {
    /// A large piece was in the cipher for so long.
    pub fn cipher_aside(&self, took: Duration) {
        bump(&self.aside_nanos, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// What connections have counted, together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoTotals {
    operations: [OperationTotals; IoOperation::ALL.len()],
    cipher: Duration,
}

/// Of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationTotals {
    /// Requests that have come.
    pub requests: u64,
    /// Bytes that they were about.
    pub bytes: u64,
    /// Those that a fence or the backing store has failed.
    pub failed: u64,
    /// Bytes that those were about.
    pub failed_bytes: u64,
    took: [u64; BOUNDS.len() + 1],
    nanos: u64,
}

impl OperationTotals {
    /// Requests that were answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.took.iter().sum()
    }

    /// How long they took.
    #[must_use]
    pub fn took(&self) -> Durations {
        Durations {
            bounds: BOUNDS,
            counts: self.took.to_vec(),
            sum: Duration::from_nanos(self.nanos),
        }
    }
}

impl IoTotals {
    /// Adds what a connection has counted.
    pub fn add(&mut self, counters: &IoCounters) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        for (total, counted) in self.operations.iter_mut().zip(&counters.operations) {
            // Answers first: what comes in between is in flight, not answered before it came.
            for (total, count) in total.took.iter_mut().zip(&counted.took) {
                *total += read(count);
            }
            total.nanos += read(&counted.nanos);
            total.failed += read(&counted.failed);
            total.failed_bytes += read(&counted.failed_bytes);
            total.bytes += read(&counted.bytes);
            total.requests += read(&counted.requests);
        }
        self.cipher += Duration::from_nanos(read(&counters.cipher_nanos));
        self.cipher += Duration::from_nanos(read(&counters.aside_nanos));
    }

    /// Each operation with its name.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &OperationTotals)> {
        IoOperation::ALL.iter().map(|(_, name)| *name).zip(&self.operations)
    }

    /// Requests of any kind.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.operations.iter().map(|operation| operation.requests).sum()
    }

    /// Requests that were not answered, if all connections that were added are still there.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let answered = self.operations.iter().map(OperationTotals::answered).sum();
        self.requests().saturating_sub(answered)
    }

    /// Time in the cipher, estimated.
    #[must_use]
    pub fn cipher(&self) -> Duration {
        self.cipher
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_the_same_in_both_units() {
        for (seconds, nanos) in BOUNDS.iter().zip(BOUNDS_NANOS) {
            assert_eq!(Duration::from_secs_f64(*seconds), Duration::from_nanos(nanos));
        }
    }

    #[test]
    fn operations_stand_at_their_numbers() {
        for (place, (operation, _)) in IoOperation::ALL.iter().enumerate() {
            assert_eq!(*operation as usize, place);
        }
    }

    #[test]
    fn connections_are_added_up_and_what_is_not_answered_is_in_flight() {
        let connections = [IoCounters::default(), IoCounters::default()];
        for connection in &connections {
            connection.asked(IoOperation::Read, 4096);
            connection.asked(IoOperation::Write, 512);
            connection.answered(IoOperation::Read, Duration::from_micros(60));
            connection.failed(IoOperation::Write, 512);
        }
        connections[0].answered(IoOperation::Write, Duration::from_secs(6));
        let mut totals = IoTotals::default();
        connections.iter().for_each(|connection| totals.add(connection));
        assert_eq!((totals.requests(), totals.in_flight()), (4, 1));
        let (name, reads) = totals.each().next().unwrap();
        assert_eq!((name, reads.requests, reads.bytes, reads.failed), ("read", 2, 8192, 0));
        assert_eq!(reads.took().counts[..3], [0, 2, 0]);
        assert_eq!(reads.took().sum, Duration::from_micros(120));
        let (_, writes) = totals.each().nth(1).unwrap();
        assert_eq!((writes.failed, writes.failed_bytes), (2, 1024));
        assert_eq!(writes.took().counts[BOUNDS.len()], 1);
    }

    #[test]
    fn one_call_of_the_cipher_in_sixteen_is_timed_and_counts_for_all() {
        let connection = IoCounters::default();
        let timed: Vec<_> = (0..33).map(|_| connection.cipher_begins().is_some()).collect();
        let places: Vec<_> =
            timed.iter().enumerate().filter(|(_, t)| **t).map(|(at, _)| at).collect();
        assert_eq!(places, [0, 16, 32]);
        connection.cipher_ended(Some(Instant::now() - Duration::from_micros(10)));
        let mut totals = IoTotals::default();
        totals.add(&connection);
        assert!(totals.cipher() >= Duration::from_micros(160));
    }
}
