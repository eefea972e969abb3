//! What is counted between two scrapes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often durations fell between bounds, and their sum.
pub struct Distribution {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>,
    nanos: AtomicU64,
}

impl Distribution {
    /// An empty one over these bounds, in seconds, ascending.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = std::iter::repeat_with(AtomicU64::default).take(bounds.len() + 1).collect();
        Self { bounds, counts, nanos: AtomicU64::new(0) }
    }

    /// Adds one duration.
    pub fn add(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let at = self.bounds.iter().position(|bound| seconds <= *bound);
        if let Some(count) = self.counts.get(at.unwrap_or(self.bounds.len())) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.nanos.fetch_add(nanos(took), Ordering::Relaxed);
    }

    /// As it is now.
    #[must_use]
    pub fn read(&self) -> Durations {
        Durations {
            bounds: self.bounds,
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: Duration::from_nanos(self.nanos.load(Ordering::Relaxed)),
        }
    }
}

/// How often durations fell between bounds, at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Durations {
    /// In seconds, ascending.
    pub bounds: &'static [f64],
    /// How many lie up to each bound and above the one before; those above all last.
    pub counts: Vec<u64>,
    /// All of them together.
    pub sum: Duration,
}

fn nanos(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

/// From a denied answer to the key's destruction: 2 s is the promise, 0.5 s what it takes.
pub const FENCE_BOUNDS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 15.0, 30.0];

/// Answers of KMS: tens of milliseconds within a region; 2.5 s is the limit of an attempt.
const KMS_BOUNDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 8.0];

/// Counts of things that have one of a few names.
pub struct ByName<const N: usize> {
    names: [&'static str; N],
    counts: [AtomicU64; N],
}

impl<const N: usize> ByName<N> {
    const fn new(names: [&'static str; N]) -> Self {
        Self { names, counts: [const { AtomicU64::new(0) }; N] }
    }

    /// Counts one; a name that is not among them counts as the last.
    pub fn add(&self, name: &str) {
        self.add_many(name, 1);
    }

    /// Counts several.
    pub fn add_many(&self, name: &str, count: u64) {
        let at = self.names.iter().position(|known| *known == name).unwrap_or(N - 1);
        self.counts[at].fetch_add(count, Ordering::Relaxed);
    }

    /// Each name with its count.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        self.names.into_iter().zip(counts)
    }
}

/// What an answer of KMS meant.
const OUTCOMES: [&str; 5] = ["allowed", "denied", "unavailable", "credentials", "mismatch"];

/// What happened to one volume since the daemon knows it.
pub struct VolumeCounters {
    /// Attempts to attach it, by the word of the exit code.
    pub attaches: ByName<7>,
    /// Fences by reason.
    pub fences: ByName<4>,
    /// Times its key came back, and times that failed.
    pub restores: ByName<2>,
    /// Answers to its probes, by verdict.
    pub probes: ByName<5>,
    /// From the first denied answer to the key's destruction.
    pub denial_to_fence: Distribution,
    late_fences: AtomicU64,
    outage_nanos: AtomicU64,
}

impl Default for VolumeCounters {
    fn default() -> Self {
        Self {
            attaches: ByName::new([
                "ok",
                "key_denied",
                "kms_unavailable",
                "wrong_state",
                "usage",
                "discrepancy",
                "failed",
            ]),
            fences: ByName::new(["denied", "expired", "mismatch", "suspended"]),
            restores: ByName::new(["ok", "failed"]),
            probes: ByName::new(OUTCOMES),
            denial_to_fence: Distribution::new(FENCE_BOUNDS),
            late_fences: AtomicU64::new(0),
            outage_nanos: AtomicU64::new(0),
        }
    }
}

impl VolumeCounters {
    /// A fence after a denial, and whether that was later than promised.
    pub fn add_late_fence(&self, late: bool) {
        self.late_fences.fetch_add(u64::from(late), Ordering::Relaxed);
    }

    /// Those that were.
    #[must_use]
    pub fn late_fences(&self) -> u64 {
        self.late_fences.load(Ordering::Relaxed)
    }

    /// Time during which KMS gave no verdict.
    pub fn add_outage(&self, took: Duration) {
        self.outage_nanos.fetch_add(nanos(took), Ordering::Relaxed);
    }

    /// All of it.
    #[must_use]
    pub fn outage(&self) -> Duration {
        Duration::from_nanos(self.outage_nanos.load(Ordering::Relaxed))
    }
}

/// The operations of KMS that are used.
const OPERATIONS: [&str; 4] = ["DescribeKey", "GenerateDataKey", "Decrypt", "ReEncrypt"];

/// Requests to KMS, of the whole node.
pub struct KmsCalls(Vec<(&'static str, ByName<5>, Distribution)>);

impl Default for KmsCalls {
    fn default() -> Self {
        let one = |operation| (operation, ByName::new(OUTCOMES), Distribution::new(KMS_BOUNDS));
        Self(OPERATIONS.map(one).into())
    }
}

impl KmsCalls {
    /// Counts a request that has ended.
    pub fn add(&self, operation: &str, outcome: &str, took: Duration) {
        if let Some((_, outcomes, times)) = self.0.iter().find(|(name, _, _)| *name == operation) {
            outcomes.add(outcome);
            times.add(took);
        }
    }

    /// Each operation with its outcomes and times.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &ByName<5>, &Distribution)> {
        self.0.iter().map(|(name, outcomes, times)| (*name, outcomes, times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_up_to_its_bound() {
        let times = Distribution::new(FENCE_BOUNDS);
        for millis in [100, 101, 40_000] {
            times.add(Duration::from_millis(millis));
        }
        let Durations { counts, sum, .. } = times.read();
        assert_eq!((counts[0], counts[1], counts[FENCE_BOUNDS.len()]), (1, 1, 1));
        assert_eq!(sum, Duration::from_millis(40_201));
    }

    #[test]
    fn an_unknown_name_counts_as_the_last() {
        let counts = VolumeCounters::default();
        counts.attaches.add("ok");
        counts.attaches.add("?");
        let read: Vec<_> = counts.attaches.read().filter(|(_, count)| *count > 0).collect();
        assert_eq!(read, [("ok", 1), ("failed", 1)]);
    }
}
