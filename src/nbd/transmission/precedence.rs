//! Who goes first where processors are scarce: a journal waits for each flush before it goes on, a merge
//! beside it for nothing so small. While one connection asks for flushes of little, those that move
//! much between such flushes stand back: they get two thirds of what they got of a processor that somebody
//! else wants as well (`docs/PERFORMANCE.md`). A connection that does both does not stand back.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::nbd::transmission::requests::bytes;
use crate::nbd::wire::{Command, FLAG_FUA, Request};
use crate::turns;

/// Bytes up to which a flush is one of little: a group of commits, a bulk of documents.
const LITTLE: u64 = 1 << 20;

/// A connection moves much when it has moved so many bytes, and for each flush of little
/// [`FOR_A_FLUSH`] more. The file system's own commit after a merge is such a flush.
const MUCH: u64 = 16 << 20;

/// See [`MUCH`].
const FOR_A_FLUSH: u64 = 4 << 20;

/// How long ago somebody may have asked for a flush of little.
const FRESH: Duration = Duration::from_secs(1);

/// How exactly that is noted: other connections read it, and are not to fetch it anew each time.
const GRAIN: Duration = Duration::from_millis(10);

/// When a flush of little was last asked for, in nanoseconds since the first; 0 if never.
struct Flushes(AtomicU64);

static FLUSHES: Flushes = Flushes(AtomicU64::new(0));

/// What one connection has asked for, and whether it stands back.
#[derive(Debug, Default)]
pub(super) struct Precedence {
    /// Bytes since the last flush.
    since_flush: u64,
    /// Bytes beyond those that its flushes of little allow it; twice [`MUCH`] at most.
    moved: u64,
    back: bool,
    /// The kernel does not let it; it is not asked again.
    stuck: bool,
}

impl Precedence {
    /// A request came at that time.
    #[inline]
    pub(super) fn asked(&mut self, request: &Request, came: Instant) {
        let flushes = request.command == Command::Flush || request.flags & FLAG_FUA != 0;
        // To trim moves nothing.
        let moves = if request.command == Command::Trim { 0 } else { bytes(request) };
        let back = self.stands_back(moves, flushes, came, &FLUSHES);
        if back != self.back && !self.stuck {
            self.back = back;
            let step = if back { turns::stand_back() } else { turns::come_forward() };
            if let Err(error) = step {
                debug!(%error, back, "a connection stays where it stands");
                self.stuck = true;
            }
        }
    }

    #[inline]
    fn stands_back(&mut self, bytes: u64, flushes: bool, now: Instant, all: &Flushes) -> bool {
        // Nobody has checked yet what is asked for.
        self.since_flush = self.since_flush.saturating_add(bytes);
        self.moved = self.moved.saturating_add(bytes).min(2 * MUCH);
        if flushes {
            if self.since_flush <= LITTLE {
                self.moved = self.moved.saturating_sub(FOR_A_FLUSH);
                if self.moved < MUCH {
                    all.note(now);
                }
            }
            self.since_flush = 0;
        }
        self.moved >= MUCH && all.is_fresh(now)
    }
}

impl Flushes {
    fn note(&self, now: Instant) {
        let now = since_start(now);
        let last = self.0.load(Ordering::Relaxed);
        if last == 0 || now >= last + nanos(GRAIN) {
            self.0.store(now.max(1), Ordering::Relaxed);
        }
    }

    fn is_fresh(&self, now: Instant) -> bool {
        let last = self.0.load(Ordering::Relaxed);
        last > 0 && since_start(now) < last + nanos(FRESH)
    }
}

fn since_start(now: Instant) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    nanos(now.saturating_duration_since(*START.get_or_init(|| now)))
}

/// Of 500 years at most.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: u64 = 256 << 10;

    struct Node {
        flushes: Flushes,
        now: Instant,
    }

    impl Node {
        fn new() -> Self {
            Self { flushes: Flushes(AtomicU64::new(0)), now: Instant::now() }
        }

        /// Writes that much in requests of 256 KiB, then flushes; whether it stood back at the end.
        fn writes(&self, who: &mut Precedence, much: u64) -> bool {
            for _ in 0..much / WRITE {
                who.stands_back(WRITE, false, self.now, &self.flushes);
            }
            who.stands_back(0, true, self.now, &self.flushes)
        }

        fn commits(&self, who: &mut Precedence) -> bool {
            who.stands_back(4096, false, self.now, &self.flushes);
            who.stands_back(0, true, self.now, &self.flushes)
        }
    }

    #[test]
    fn who_moves_much_stands_back_while_a_journal_commits_and_no_longer() {
        let (mut merge, mut journal) = (Precedence::default(), Precedence::default());
        let mut node = Node::new();
        assert!(!node.writes(&mut merge, 4 * MUCH), "nobody else is there");
        assert!(!node.commits(&mut journal));
        assert!(node.writes(&mut merge, MUCH));
        assert!(node.commits(&mut merge), "a commit after a merge makes no journal of it");
        node.now += FRESH + GRAIN;
        assert!(!node.writes(&mut merge, MUCH), "the journal rests");
        node.commits(&mut merge);
        assert!(!node.writes(&mut merge, MUCH), "the merge's own commits are not waited for");
        assert!(!node.commits(&mut journal));
        assert!(node.writes(&mut merge, MUCH), "the journal goes on");
    }

    #[test]
    fn who_commits_often_stays_where_it_is_whatever_it_moves() {
        let (mut kernel, mut journal) = (Precedence::default(), Precedence::default());
        let node = Node::new();
        for _ in 0..100 {
            node.commits(&mut journal);
            for _ in 0..FOR_A_FLUSH / WRITE - 1 {
                assert!(!kernel.stands_back(WRITE, false, node.now, &node.flushes));
            }
            assert!(!node.writes(&mut kernel, 0));
            assert!(!node.commits(&mut kernel));
        }
    }

    #[test]
    fn nonsense_counts_as_much() {
        let (mut client, node) = (Precedence::default(), Node::new());
        for flushes in [false, false, true, false] {
            client.stands_back(u64::MAX, flushes, node.now, &node.flushes);
        }
        node.commits(&mut Precedence::default());
        assert!(client.stands_back(0, false, node.now, &node.flushes));
    }

    #[test]
    fn who_begins_to_commit_comes_forward() {
        let (mut search, mut journal) = (Precedence::default(), Precedence::default());
        let node = Node::new();
        node.writes(&mut search, 100 * MUCH);
        assert!(!journal.stands_back(4096, true, node.now, &node.flushes), "a write through");
        assert!(search.stands_back(4096, false, node.now, &node.flushes));
        let commits = MUCH / FOR_A_FLUSH;
        let back = (0..=commits).filter(|_| node.commits(&mut search)).count();
        assert!(back as u64 <= commits, "{back} commits behind others");
        assert!(!node.commits(&mut search));
    }
}
