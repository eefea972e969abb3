//! Clients that lie, stall, vanish and come in crowds. Beside each an honest one is served, and
//! nothing of them is left.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::raw::{
    BLOCK_STATUS, DISC, FLUSH, OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED, OPT_GO, OPT_LIST,
    OPT_SET_META, OPT_STRUCTURED, READ, REP_ACK, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_UNSUP,
    Raw, TRIM, WRITE, WRITE_ZEROES, extended, named, option, request,
};
use crate::support::{Daemon, run, until};

const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const SIZE: u64 = 80 << 20;
/// The honest client's part of the volume, at its end.
const HONEST: u64 = SIZE - (1 << 20);

/// One request of the honest client takes far less, also on two busy cores.
const PROMPT: Duration = Duration::from_secs(2);

/// A client that writes and reads back until it is told to stop.
struct Honest {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    slowest: Arc<Mutex<Duration>>,
    thread: Option<JoinHandle<()>>,
}

impl Honest {
    fn start(socket: &Path) -> Self {
        let (stop, rounds): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let slowest = Arc::new(Mutex::new(Duration::ZERO));
        let mut raw = Raw::connected(socket, "v");
        let (stopped, counted, worst) = (stop.clone(), rounds.clone(), slowest.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let round = counted.load(Ordering::Relaxed);
                let started = Instant::now();
                let data = round.to_le_bytes().repeat(600);
                let offset = HONEST + round * 1000 % 500_000;
                assert_eq!(raw.write(offset, &data), 0);
                assert!(raw.read(offset, 4800) == data, "round {round}");
                let mut worst = worst.lock().unwrap();
                *worst = worst.max(started.elapsed() / 2);
                counted.store(round + 1, Ordering::Relaxed);
            }
        });
        Self { stop, rounds, slowest, thread: Some(thread) }
    }

    /// It is served, now.
    fn goes_on(&self) {
        let from = self.rounds.load(Ordering::Relaxed);
        until("the honest client is served", || {
            self.rounds.load(Ordering::Relaxed) > from + 2 || self.has_failed()
        });
        assert!(!self.has_failed(), "the honest client failed");
    }

    fn has_failed(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    fn was_served_promptly(mut self) {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        let slowest = *self.slowest.lock().unwrap();
        assert!(slowest < PROMPT, "a request of the honest client took {slowest:?}");
    }
}

impl Drop for Honest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Only when the test has failed already.
            let _ended = thread.join();
        }
    }
}

/// The threads that serve connections, and the descriptors of the volume's socket.
fn held(daemon: &Daemon, socket: &Path) -> (usize, usize) {
    let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let tasks = std::fs::read_dir(process.join("task")).unwrap();
    // A thread may end while it is looked at.
    let names = tasks.flatten().filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
    let threads = names.filter(|name| name.trim() == "nbd").count();
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let ours = socket.to_str().unwrap();
    let inodes: Vec<_> = sockets
        .lines()
        .filter(|line| line.ends_with(ours))
        .filter_map(|line| line.split_whitespace().nth(6))
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    let open = std::fs::read_dir(process.join("fd")).unwrap();
    let links = open.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    (threads, links.filter(|link| inodes.contains(link)).count())
}

/// The most memory the daemon had in use so far, in bytes.
fn peak_memory(daemon: &Daemon) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

/// A volume with an honest client, beside whom something happens; afterwards all is as before.
fn beside_an_honest_client(happens: impl FnOnce(&Daemon, &Path, &Honest)) {
    let daemon = Daemon::start();
    daemon.volume("v", &SIZE.to_string(), &daemon.key());
    let socket: PathBuf = daemon.dir.path().join("nbd/v.sock");
    let honest = Honest::start(&socket);
    honest.goes_on();
    let before = held(&daemon, &socket);
    assert!(before.0 == 1 && before.1 > 1, "{before:?}");
    happens(&daemon, &socket, &honest);
    honest.goes_on();
    until("nothing is left of them", || held(&daemon, &socket) == before);
    honest.was_served_promptly();
}

#[test]
fn nonsense_in_the_handshake_is_refused_in_sync_or_ends_the_connection() {
    beside_an_honest_client(|_, socket, honest| {
        let mut raw = Raw::greeted(socket);
        raw.send(&u32::MAX.to_be_bytes());
        assert!(raw.is_closed(), "unknown client flags");
        let mut raw = Raw::negotiating(socket);
        raw.send(b"IHAVEOPX\0\0\0\x03\0\0\0\0");
        assert!(raw.is_closed(), "wrong magic");
        honest.goes_on();

        let mut raw = Raw::negotiating(socket);
        assert_eq!(raw.ask(0x77, &[7; 100]), REP_ERR_UNSUP);
        assert_eq!(raw.ask(OPT_LIST, b"x"), REP_ERR_INVALID);
        assert_eq!(raw.ask(OPT_GO, &[0, 0, 0, 200, b'v', 0, 0]), REP_ERR_INVALID);
        assert_eq!(raw.ask(OPT_GO, &[0, 0, 0, 1, b'v', 0, 9]), REP_ERR_INVALID);
        assert_eq!(raw.ask(OPT_GO, b""), REP_ERR_INVALID);
        assert_eq!(raw.ask(OPT_GO, &named("w")), REP_ERR_UNKNOWN);
        assert_eq!(
            raw.ask(OPT_SET_META, &named("v")),
            REP_ERR_INVALID,
            "no structured replies yet"
        );
        assert_eq!(raw.ask(OPT_STRUCTURED, b"x"), REP_ERR_INVALID);
        for _ in 0..200 {
            assert_eq!(raw.ask(0x1234, b""), REP_ERR_UNSUP);
        }
        assert_eq!(raw.ask(OPT_GO, &named("v")), REP_ACK);
        assert_eq!(raw.read(0, 16).len(), 16);
        honest.goes_on();

        let mut raw = Raw::negotiating(socket);
        let endless = (0..10_000).all(|_| raw.try_send(&option(0x1234, b"")).is_ok());
        assert!(!endless || raw.is_closed(), "nobody negotiates for ever");
        honest.goes_on();

        let mut raw = Raw::negotiating(socket);
        assert_eq!(raw.ask(OPT_ABORT, b""), REP_ACK);
        assert!(raw.is_closed(), "aborted");
        let mut raw = Raw::negotiating(socket);
        raw.send(&option(OPT_EXPORT_NAME, b"no such export"));
        assert!(raw.is_closed(), "there is no other way to refuse EXPORT_NAME");
        // An option that claims 4 GiB: the rest never comes.
        let mut raw = Raw::negotiating(socket);
        raw.send(&option(OPT_GO, b"")[..12]);
        raw.send(&u32::MAX.to_be_bytes());
        honest.goes_on();
    });
}

#[test]
fn an_old_client_that_knows_only_export_name_is_served() {
    beside_an_honest_client(|_, socket, _| {
        for (flags, padding) in [(1u32, 124), (3, 0)] {
            let mut raw = Raw::greeted(socket);
            raw.send(&flags.to_be_bytes());
            raw.send(&option(OPT_EXPORT_NAME, b"v"));
            let size = raw.take::<8>().unwrap();
            assert_eq!(u64::from_be_bytes(size), SIZE);
            raw.take::<2>().unwrap();
            assert!(raw.take_vec(padding).iter().all(|byte| *byte == 0));
            assert_eq!(raw.write(0, b"old"), 0);
            assert_eq!(raw.read(0, 3), b"old");
        }
    });
}

#[test]
fn every_wrong_request_has_its_error_and_the_next_one_is_served() {
    beside_an_honest_client(|_, socket, _| {
        let mut raw = Raw::connected(socket, "v");
        assert_eq!(raw.write(4096, &[1; 8192]), 0);
        let unknown_flag = 1 << 9;
        assert_eq!(raw.command(0, 99, 0, 0), EINVAL);
        assert_eq!(raw.command(unknown_flag, READ, 0, 4096), EINVAL);
        assert_eq!(raw.command(0, READ, SIZE, 1), EINVAL);
        assert_eq!(raw.command(0, READ, SIZE - 1, 2), EINVAL);
        assert_eq!(raw.command(0, READ, u64::MAX, u32::MAX), EINVAL);
        assert_eq!(raw.command(0, READ, 0, u32::MAX), EINVAL);
        assert_eq!(raw.command(0, READ, 0, (64 << 20) + 1), EOVERFLOW);
        assert_eq!(raw.command(0, TRIM, SIZE - 4096, 8192), EINVAL);
        assert_eq!(raw.command(0, TRIM, u64::MAX - 5, 8192), EINVAL);
        assert_eq!(raw.command(0, WRITE_ZEROES, SIZE - 4096, 8192), ENOSPC);
        assert_eq!(raw.command(0, FLUSH, 0, 0), 0);
        assert_eq!(raw.command(0, BLOCK_STATUS, 0, 4096), EINVAL, "not negotiated");
        assert_eq!(raw.write(SIZE - 2, &[2; 4]), ENOSPC);
        assert_eq!(raw.write(u64::MAX - 2, &[2; 4]), ENOSPC);
        for command in [READ, WRITE, TRIM, WRITE_ZEROES] {
            let error = raw.command(0, command, 4096, 0);
            assert!(error == 0 || error == EINVAL, "nothing of nothing: {error}");
        }
        assert_eq!(raw.read(4096, 8192), [1; 8192], "nothing was written by any of them");
        let most = raw.read(0, 64 << 20);
        assert_eq!(most[4096..12288], [1; 8192]);
        raw.send(&request(0, DISC, 0, 0, 0));
        assert!(raw.is_closed());
        let mut raw = Raw::connected(socket, "v");
        raw.send(&[0x5a; 28]);
        assert!(raw.is_closed(), "what has no magic cannot be answered");
    });
}

#[test]
fn requests_of_64_bits_are_bounded_as_well() {
    beside_an_honest_client(|daemon, socket, _| {
        let peak = peak_memory(daemon);
        let mut raw = Raw::negotiating(socket);
        assert_eq!(raw.ask(OPT_EXTENDED, b""), REP_ACK);
        assert_eq!(raw.ask(OPT_GO, &named("v")), REP_ACK);
        for (cookie, (command, offset, len, wanted)) in [
            (READ, 0, 5 << 30, EINVAL),
            (READ, 0, u64::MAX, EINVAL),
            (READ, u64::MAX, u64::MAX, EINVAL),
            (TRIM, 4096, 1 << 40, EINVAL),
            (WRITE_ZEROES, 4096, 1 << 40, ENOSPC),
            (BLOCK_STATUS, 0, 4096, EINVAL),
            (WRITE_ZEROES, 0, SIZE - (1 << 20), 0),
            (TRIM, 0, SIZE - (1 << 20), 0),
            (FLUSH, 0, 0, 0),
        ]
        .into_iter()
        .enumerate()
        {
            raw.send(&extended(0, command, cookie as u64, offset, len));
            assert_eq!(raw.extended_reply(cookie as u64), wanted, "{command} {offset} {len}");
        }
        // At once: what has been refused takes nothing more.
        raw.send(&[&request(0, READ, 1, 0, 4096)[..], &[0; 4]].concat());
        assert!(raw.is_closed(), "the old header is no extended one");
        assert!(peak_memory(daemon) < peak + (64 << 20));
    });
}

#[test]
fn a_write_that_is_announced_and_never_sent_takes_no_memory_and_harms_nobody() {
    beside_an_honest_client(|daemon, socket, honest| {
        let mut raw = Raw::connected(socket, "v");
        assert_eq!(raw.write(0, &[3; 16384]), 0);
        let peak = peak_memory(daemon);
        // 4 GiB less one byte, which is refused: what comes of it is thrown away.
        raw.send(&request(0, WRITE, 9, 0, u32::MAX));
        raw.send(&[4; 1 << 20]);
        // 64 MiB at a place that is not at a sector, of which some bytes come.
        let mut half = Raw::connected(socket, "v");
        half.send(&request(0, WRITE, 9, 5000, 64 << 20));
        half.send(&[4; 100]);
        let mut header = Raw::connected(socket, "v");
        header.send(&request(0, WRITE, 9, 0, 4096)[..20]);
        honest.goes_on();
        drop((raw, half, header));
        let mut raw = Raw::connected(socket, "v");
        assert_eq!(raw.read(0, 16384), [3; 16384], "what was acknowledged before is there");
        assert!(peak_memory(daemon) < peak + (32 << 20));
    });
}

#[test]
fn a_client_that_takes_no_replies_takes_little_memory_and_harms_nobody() {
    beside_an_honest_client(|daemon, socket, honest| {
        let peak = peak_memory(daemon);
        let mut greedy: Vec<_> = (0..4).map(|_| Raw::connected(socket, "v")).collect();
        for raw in &mut greedy {
            for cookie in 0..200 {
                raw.send(&request(0, READ, cookie, 0, 1 << 20));
            }
        }
        honest.goes_on();
        honest.goes_on();
        let grown = peak_memory(daemon) - peak;
        assert!(grown < 4 * (20 << 20), "{} MiB", grown >> 20);
    });
}

#[test]
fn a_client_that_ends_its_half_and_takes_no_replies_keeps_nobody_out() {
    beside_an_honest_client(|_, socket, honest| {
        let mut deaf = Raw::connected(socket, "v");
        for cookie in 0..32 {
            deaf.send(&request(0, READ, cookie, 0, 1 << 20));
        }
        deaf.sends_no_more();
        let began = Instant::now();
        let mut next = Raw::connected(socket, "v");
        assert_eq!(next.read(0, 4096).len(), 4096);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(3), "{took:?}");
        honest.goes_on();
        drop(deaf);
    });
}

#[test]
fn a_client_may_vanish_at_any_byte() {
    beside_an_honest_client(|_, socket, _| {
        let mut talk = 3u32.to_be_bytes().to_vec();
        talk.extend(option(OPT_LIST, b""));
        talk.extend(option(OPT_STRUCTURED, b""));
        talk.extend(option(OPT_GO, &named("v")));
        talk.extend(request(0, READ, 1, 0, 4096));
        talk.extend(request(0, WRITE, 2, 8192, 600));
        talk.extend([5; 600]);
        for end in 0..talk.len() {
            let mut raw = Raw::greeted(socket);
            // It may be gone already.
            let _sent = raw.try_send(&talk[..end]);
        }
    });
}

#[test]
fn a_thousand_connections_are_served_and_let_go_of() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    beside_an_honest_client(|_, socket, honest| {
        let crowd: Vec<_> = (0..1000)
            .map(|i| match i % 2 {
                0 => Raw::greeted(socket),
                _ => Raw::connected(socket, "v"),
            })
            .collect();
        honest.goes_on();
        for mut raw in crowd.into_iter().skip(1).step_by(2) {
            assert_eq!(raw.read(0, 512).len(), 512);
        }
    });
}

#[test]
fn a_crowd_that_does_not_end_its_handshake_keeps_nobody_from_other_volumes_or_from_kms() {
    let daemon = Daemon::start();
    let key = daemon.key();
    for name in ["v", "w"] {
        daemon.volume(name, "1M", &key);
    }
    // Fewer files than the crowd has heads.
    let limits = ["--nofile=700:700", "--pid", &daemon.pid().to_string()];
    run(Command::new("prlimit").args(limits));
    let socket = |name: &str| daemon.dir.path().join(format!("nbd/{name}.sock"));
    let crowd: Vec<_> =
        (0..900).map(|_| UnixStream::connect(socket("v")).expect("there is a queue")).collect();
    let (mut threads, mut since) = (0, Instant::now());
    until("it takes no more of them", || {
        let (now, _) = held(&daemon, &socket("v"));
        if std::mem::replace(&mut threads, now) != now {
            since = Instant::now();
        }
        now >= 500 && since.elapsed() > Duration::from_millis(500)
    });
    let began = Instant::now();
    let mut other = Raw::connected(&socket("w"), "w");
    assert_eq!(other.write(0, b"served"), 0);
    daemon.ok(&["key", "recheck", "w"]);
    // They are let go of after ten seconds.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    drop(crowd);
    assert_eq!(Raw::connected(&socket("v"), "v").write(0, b"served"), 0);
}

#[test]
fn clients_that_stall_do_not_delay_the_fence() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", &SIZE.to_string(), &key);
    let socket = daemon.dir.path().join("nbd/v.sock");
    let mut half = Raw::connected(&socket, "v");
    half.send(&request(0, WRITE, 9, 0, 1 << 20));
    half.send(&[4; 5000]);
    let mut deaf = Raw::connected(&socket, "v");
    for cookie in 0..100 {
        deaf.send(&request(0, READ, cookie, 0, 1 << 20));
    }
    let mut idle = Raw::connected(&socket, "v");
    assert_eq!(idle.read(0, 512).len(), 512);
    daemon.ok(&["dev", "key", "disable", &key]);
    let disabled = Instant::now();
    until("the volume is fenced", || daemon.state("v") == "fenced");
    let took = disabled.elapsed();
    assert!(took < Duration::from_millis(3300), "within the interval and 2 s: {took:?}");
    assert_eq!(idle.command(0, READ, 0, 512), 1, "EPERM on the connection that was quiet");
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the volume is served again", || daemon.state("v") == "serving");
    assert_eq!(idle.read(0, 512).len(), 512);
}
