//! Who goes first where processors are scarce: a journal waits for each flush before it goes on, a merge
//! beside it for nothing so small. While one connection asks for flushes of little, others that move
//! much stand back: they have two thirds of their weight while somebody else wants the same processor,
//! and do not look for what is to come (`docs/PERFORMANCE.md`). A connection that asks for such flushes
//! itself, often enough for what it moves, stays where it is.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use crate::nbd::transmission::requests::bytes;
use crate::nbd::wire::{Command, FLAG_FUA, Request};
use crate::turns::{self, Back};

/// Bytes written up to which a flush is one of little: what groups of commits and bulks of documents
/// come to.
const LITTLE: u64 = 1 << 20;

/// Bytes at once from which a connection moves much: a merge or a scan, and no page or two of a
/// search.
const MUCH: u64 = 16 << 20;

/// Bytes that a connection may move in a second without ever moving much: half of what a gp3 disk
/// does, and a tenth of a core.
const ANYWAY: u64 = 64 << 20;

/// Bytes more that it may move for each flush of little. A merge ends with one, as the file system
/// commits it; a database has one for much less.
const FOR_A_FLUSH: u64 = 4 << 20;

/// Milliseconds ago that somebody may have asked for a flush of little: whoever commits once a second
/// is there.
const FRESH: u64 = 1000;

/// Milliseconds to which that is noted: other connections read it, and are not to fetch it anew each
/// time.
const GRAIN: u64 = 10;

/// Who last asked for a flush of little, and when: its number in the lower 16 bits, milliseconds since
/// the first request above; 0 if nobody ever did.
struct Flushes {
    start: OnceLock<Instant>,
    last: AtomicU64,
}

static FLUSHES: Flushes = Flushes::none();

/// What one connection has asked for, and whether it stands back.
pub(super) struct Precedence {
    number: u16,
    /// Bytes written since the last flush.
    unflushed: u64,
    /// Bytes beyond those that it may move; twice [`MUCH`] at most.
    moved: u64,
    /// When that was counted last.
    at: Option<Instant>,
    stands_back: bool,
    /// It has less weight for that.
    back: Option<Back>,
    /// The kernel does not let it; it is not asked again.
    stuck: bool,
}

impl Default for Precedence {
    fn default() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // It wraps: of two with the same number, one does not stand back for the other.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            number,
            unflushed: 0,
            moved: 0,
            at: None,
            stands_back: false,
            back: None,
            stuck: false,
        }
    }
}

impl Precedence {
    /// A request that may be done came at that time.
    #[inline]
    pub(super) fn asked(&mut self, request: &Request, came: Instant) {
        let through = request.flags & FLAG_FUA != 0;
        let (read, written, flushes) = match request.command {
            Command::Read => (bytes(request), 0, false),
            Command::Write | Command::WriteZeroes => (0, bytes(request), through),
            Command::Flush => (0, 0, true),
            // They move nothing.
            Command::Trim
            | Command::Cache
            | Command::BlockStatus
            | Command::Disconnect
            | Command::Unknown(_) => (0, 0, false),
        };
        self.stands_back = self.has_to(read, written, flushes, came, &FLUSHES);
        if self.stands_back != self.back.is_some() && !self.stuck {
            self.step();
        }
    }

    /// Whether it stands back for another, as far as it can.
    pub(super) fn stands_back(&self) -> bool {
        self.stands_back
    }

    fn step(&mut self) {
        match self.back.take() {
            None if self.stands_back => match turns::stand_back() {
                Ok(back) => self.back = Some(back),
                // It has been said why.
                Err(_) => self.stuck = true,
            },
            Some(back) if !self.stands_back => {
                if let Err(error) = back.come_forward() {
                    warn!(%error, "a connection that stood back for others cannot come forward");
                    self.stuck = true;
                }
            }
            same => self.back = same,
        }
    }

    /// Whether it has to stand back, after having been asked for that.
    #[inline]
    fn has_to(
        &mut self,
        read: u64,
        written: u64,
        flushes: bool,
        now: Instant,
        all: &Flushes,
    ) -> bool {
        if self.at != Some(now) {
            let since = self.at.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
            let anyway = match since.as_secs() {
                0 => u64::from(since.subsec_nanos()) * ANYWAY / 1_000_000_000,
                _ => ANYWAY,
            };
            self.moved = self.moved.saturating_sub(anyway);
            self.at = Some(now);
        }
        self.moved = (self.moved + read).saturating_add(written).min(2 * MUCH);
        self.unflushed = self.unflushed.saturating_add(written);
        if flushes {
            if (1..=LITTLE).contains(&self.unflushed) {
                self.moved = self.moved.saturating_sub(FOR_A_FLUSH);
                if self.moved < MUCH {
                    all.note(self.number, now);
                }
            }
            self.unflushed = 0;
        }
        self.moved >= MUCH && all.are_of_another(self.number, now)
    }
}

impl Flushes {
    const fn none() -> Self {
        Self { start: OnceLock::new(), last: AtomicU64::new(0) }
    }

    fn note(&self, number: u16, now: Instant) {
        let now = self.millis(now);
        let last = self.last.load(Ordering::Relaxed) >> 16;
        if now >= last + GRAIN {
            self.last.store(now << 16 | u64::from(number), Ordering::Relaxed);
        }
    }

    fn are_of_another(&self, number: u16, now: Instant) -> bool {
        let last = self.last.load(Ordering::Relaxed);
        last > 0
            && last & u64::from(u16::MAX) != u64::from(number)
            && self.millis(now) < (last >> 16) + FRESH
    }

    /// Above 0 by so much that the first is noted.
    fn millis(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(*self.start.get_or_init(|| now));
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX >> 17) + GRAIN
    }
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
            Self { flushes: Flushes::none(), now: Instant::now() }
        }

        /// Asks for that much in requests of 256 KiB, all at once; whether it stood back at the end.
        fn moves(&self, who: &mut Precedence, read: u64, written: u64) -> bool {
            let mut back = false;
            for _ in 0..read / WRITE {
                back = who.has_to(WRITE, 0, false, self.now, &self.flushes);
            }
            for _ in 0..written / WRITE {
                back = who.has_to(0, WRITE, false, self.now, &self.flushes);
            }
            back
        }

        fn flushes(&self, who: &mut Precedence) -> bool {
            who.has_to(0, 0, true, self.now, &self.flushes)
        }

        fn commits(&self, who: &mut Precedence) -> bool {
            who.has_to(0, 4096, false, self.now, &self.flushes);
            self.flushes(who)
        }
    }

    #[test]
    fn who_may_not_have_less_weight_stands_back_all_the_same() {
        let now = Instant::now();
        let ask = |who: &mut Precedence, command, len| {
            who.asked(&Request { flags: 0, command, cookie: 0, offset: 0, len }, now);
        };
        let mut journal = Precedence::default();
        ask(&mut journal, Command::Write, 4096);
        ask(&mut journal, Command::Flush, 0);
        let mut scan = Precedence { stuck: true, ..Precedence::default() };
        ask(&mut scan, Command::Read, MUCH);
        assert!(scan.stands_back());
    }

    #[test]
    fn who_moves_much_stands_back_while_another_commits_and_no_longer() {
        let (mut merge, mut journal) = (Precedence::default(), Precedence::default());
        let mut node = Node::new();
        assert!(!node.moves(&mut merge, 0, 4 * MUCH), "nobody else is there");
        assert!(!node.commits(&mut journal));
        assert!(node.moves(&mut merge, 0, MUCH));
        assert!(node.flushes(&mut merge), "of much");
        assert!(node.commits(&mut merge), "a commit after a merge makes no journal of it");
        node.now += Duration::from_millis(FRESH);
        assert!(!node.moves(&mut merge, 0, 4 * MUCH), "the journal rests");
        assert!(!node.commits(&mut journal));
        assert!(node.moves(&mut merge, MUCH, 0), "the journal goes on");
    }

    #[test]
    fn nobody_stands_back_for_flushes_of_his_own() {
        let (mut only, node) = (Precedence::default(), Node::new());
        assert!(!node.commits(&mut only));
        assert!(!node.moves(&mut only, 0, 4 * MUCH));
    }

    #[test]
    fn who_commits_often_for_what_it_moves_stays_where_it_is() {
        let (mut database, mut journal) = (Precedence::default(), Precedence::default());
        let node = Node::new();
        for _ in 0..100 {
            node.commits(&mut journal);
            assert!(!node.moves(&mut database, FOR_A_FLUSH - LITTLE, LITTLE));
            assert!(!node.flushes(&mut database));
        }
    }

    #[test]
    fn who_moves_little_a_second_stays_where_it_is_however_long_it_goes_on() {
        let (mut search, mut journal) = (Precedence::default(), Precedence::default());
        let mut node = Node::new();
        for _ in 0..1000 {
            node.commits(&mut journal);
            assert!(!node.moves(&mut search, ANYWAY / 10, 0));
            node.now += Duration::from_millis(100);
        }
    }

    #[test]
    fn who_begins_to_commit_comes_forward() {
        let (mut scan, mut journal) = (Precedence::default(), Precedence::default());
        let node = Node::new();
        node.moves(&mut scan, 100 * MUCH, 0);
        assert!(!journal.has_to(0, 4096, true, node.now, &node.flushes), "a write through");
        assert!(scan.has_to(4096, 0, false, node.now, &node.flushes));
        let commits = MUCH / FOR_A_FLUSH;
        let back = (0..=commits).filter(|_| node.commits(&mut scan)).count();
        assert!(back as u64 <= commits, "{back} commits behind others");
        assert!(!node.commits(&mut scan));
    }

    #[test]
    fn a_flush_of_nothing_is_nobodys_commit() {
        let (mut scan, mut idle) = (Precedence::default(), Precedence::default());
        let node = Node::new();
        node.flushes(&mut idle);
        assert!(!node.moves(&mut scan, 4 * MUCH, 0));
    }
}
