//! Large pieces of data, many at a time over one connection: those that a thread beside the connection's
//! own deals with.

use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use tempfile::TempDir;

use crate::hold::{export, serve_in, while_the_key_goes_and_comes};
use crate::raw::{READ, Raw, WRITE, request};
use crate::support::{Daemon, in_memory, on_disk, until};

/// Of the volume.
const SIZE: usize = 3 << 20;
/// Requests at a time.
const DEPTH: usize = 6;

const PIECE: usize = SIZE / DEPTH;

/// All of the volume: places and lengths.
const ALL: [(usize, usize); DEPTH] = [
    (0, PIECE),
    (PIECE, PIECE),
    (2 * PIECE, PIECE),
    (3 * PIECE, PIECE),
    (4 * PIECE, PIECE),
    (5 * PIECE, PIECE),
];

const EPERM: u32 = 1;

/// A client with much under way, and what the volume has to hold.
struct Stream {
    raw: Raw,
    held: Vec<u8>,
    rounds: usize,
    /// Requests that were refused.
    refused: usize,
}

impl Stream {
    fn new(socket: &Path) -> Self {
        let held = vec![0; SIZE];
        let mut stream = Self { raw: Raw::connected(socket, "v"), held, rounds: 0, refused: 0 };
        // What was never written reads as anything.
        while stream.batch(WRITE, &ALL) > 0 {}
        stream
    }

    /// Writes some of it, and reads all of it.
    fn round(&mut self) {
        self.rounds += 1;
        let pieces = self.pieces();
        for (n, (at, len)) in pieces.iter().enumerate() {
            let seed = self.rounds * 31 + n * 7;
            for (i, byte) in self.held[*at..at + len].iter_mut().enumerate() {
                *byte = (seed + i / 500).to_le_bytes()[0];
            }
        }
        // What was refused may be there or not; a file system writes it again as well.
        while self.batch(WRITE, &pieces) > 0 {}
        self.batch(READ, &ALL);
    }

    /// Places and lengths: most of them large, some not whole sectors, none over another.
    fn pieces(&self) -> Vec<(usize, usize)> {
        let piece = |(n, (at, len))| match (self.rounds + n) % 5 {
            0 => (at + 777, 300_000),
            1 => (at, 128 << 10),
            2 => (at + 8192, 4096),
            _ => (at, len),
        };
        ALL.into_iter().enumerate().map(piece).collect()
    }

    /// Asks for all of them before it takes an answer, and holds what is read against what there has
    /// to be; how many were refused.
    fn batch(&mut self, command: u16, pieces: &[(usize, usize)]) -> usize {
        for (n, (at, len)) in pieces.iter().enumerate() {
            let short = u32::try_from(*len).unwrap();
            self.raw.send(&request(0, command, n as u64, *at as u64, short));
            if command == WRITE {
                self.raw.send(&self.held[*at..at + len]);
            }
        }
        let mut answered = [false; DEPTH];
        let mut refused = 0;
        for _ in pieces {
            let (cookie, error) = self.raw.any_reply();
            let n = usize::try_from(cookie).unwrap();
            assert!(!std::mem::replace(&mut answered[n], true), "each is answered once");
            assert!([0, EPERM].contains(&error), "error {error}");
            let (at, len) = pieces[n];
            if error == EPERM {
                refused += 1;
            } else if command == READ {
                let read = self.raw.take_vec(len);
                assert!(read == self.held[at..at + len], "round {}, at {at}", self.rounds);
            }
        }
        self.refused += refused;
        refused
    }
}

/// Whether a connection of the daemon has a thread beside its own.
fn has_one_beside(daemon: &Daemon) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let names =
        threads.filter_map(|thread| std::fs::read(thread.unwrap().path().join("comm")).ok());
    names.into_iter().any(|name| name == b"nbd-aside\n")
}

#[test]
fn what_a_thread_beside_the_connection_moves_is_right_and_it_ends_when_there_is_nothing_to_move() {
    for daemon in [Daemon::start(), Daemon::start_on_disk()] {
        streams_and_rests(&daemon);
    }
}

fn streams_and_rests(daemon: &Daemon) {
    daemon.volume("v", "3M", &daemon.key());
    assert!(!has_one_beside(daemon), "nothing has come yet");
    let mut stream = Stream::new(&daemon.dir.path().join("nbd/v.sock"));
    for _ in 0..200 {
        stream.round();
    }
    let cores = available_parallelism().unwrap().get();
    assert_eq!(has_one_beside(daemon), cores > 1, "on {cores} processors");
    assert_eq!(stream.refused, 0);
    until("the thread ends", || !has_one_beside(daemon));
    stream.round();
    daemon.ok(&["detach", "v"]);
    daemon.ok(&["attach", "v"]);
    stream.raw = Raw::connected(&daemon.dir.path().join("nbd/v.sock"), "v");
    let all = stream.raw.read(0, u32::try_from(SIZE).unwrap());
    assert!(all == stream.held, "and so it is after detaching and attaching");
}

/// Streams while the fence closes and opens; how many requests were refused.
fn streams_through_a_fence(dir: &TempDir, hold: Option<Duration>) -> usize {
    let export = export(dir.path(), hold);
    let socket = serve_in(dir.path(), &export);
    let mut stream = Stream::new(&socket);
    let waited = while_the_key_goes_and_comes(&export, hold.is_some(), 7, 300, || stream.round());
    assert!(waited < Duration::from_millis(250), "{waited:?} until requests went on");
    stream.refused
}

#[test]
fn large_pieces_wait_for_the_key_and_none_is_lost() {
    for dir in [in_memory(), on_disk()] {
        assert_eq!(streams_through_a_fence(&dir, Some(Duration::from_secs(600))), 0);
    }
}

#[test]
fn large_pieces_are_refused_while_the_fence_is_closed_and_what_was_acknowledged_is_there() {
    for dir in [in_memory(), on_disk()] {
        assert!(streams_through_a_fence(&dir, None) > 0, "the fence was closed");
    }
}

/// A write to memory that is done holds nobody up, though the client of its connection takes no replies.
#[test]
fn others_write_parts_of_sectors_while_a_client_of_large_pieces_takes_no_replies() {
    let daemon = Daemon::start();
    daemon.volume("v", "3M", &daemon.key());
    let socket = daemon.dir.path().join("nbd/v.sock");
    let mut other = Raw::connected(&socket, "v");
    for _ in 0..20 {
        let mut lazy = Raw::connected(&socket, "v");
        for n in 0..6 {
            let (command, at) = (if n < 3 { WRITE } else { READ }, (n % 3) << 20);
            lazy.send(&request(0, command, n, at, 1 << 20));
            if command == WRITE {
                lazy.send(&vec![1; 1 << 20]);
            }
        }
        assert_eq!(other.write(777, &[2; 1000]), 0);
        for _ in 0..6 {
            let (n, error) = lazy.any_reply();
            assert_eq!(error, 0);
            if n >= 3 {
                lazy.take_vec(1 << 20);
            }
        }
    }
}
