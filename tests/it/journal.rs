//! The journal that systemd would keep: a socket of the test's own in its place, at its path, in a
//! mount namespace of the daemon's.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use byokd::log;
use nix::sys::signal::Signal;
use tracing_subscriber::filter::EnvFilter;

use crate::mounts::can_mount;
use crate::support::{Daemon, JOURNALED, Running, in_memory, run, until, unwrap_token};

type Entry = BTreeMap<String, Vec<u8>>;

/// Hears entries in a thread of its own, so that the daemon never waits for the test.
fn listen(journald: UnixDatagram) -> Receiver<Entry> {
    let (hears, heard) = channel();
    std::thread::spawn(move || {
        let mut datagram = vec![0; 1 << 20];
        while let Ok(length) = journald.recv(&mut datagram) {
            if hears.send(fields(&datagram[..length])).is_err() {
                return;
            }
        }
    });
    heard
}

/// Each field: its name, a line feed, its length in eight bytes, its value, a line feed.
fn fields(mut entry: &[u8]) -> Entry {
    let mut fields = BTreeMap::new();
    while !entry.is_empty() {
        let end = entry.iter().position(|byte| *byte == b'\n').unwrap();
        let name = String::from_utf8(entry[..end].to_vec()).unwrap();
        let known = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
        assert!(name.len() <= 64 && name.chars().all(known), "journald drops a field {name}");
        let length = u64::from_le_bytes(entry[end + 1..end + 9].try_into().unwrap());
        let value = &entry[end + 9..][..usize::try_from(length).unwrap()];
        fields.insert(name, value.to_vec());
        entry = entry[end + 9 + value.len()..].strip_prefix(b"\n").unwrap();
    }
    fields
}

fn text<'a>(entry: &'a Entry, field: &str) -> &'a str {
    entry.get(field).map_or("", |value| str::from_utf8(value).unwrap())
}

#[test]
fn a_denial_is_in_the_journal_with_its_volume_key_and_request() {
    if !can_mount(&["unshare", "cryptsetup"]) {
        return;
    }
    let dir = in_memory();
    let journald = UnixDatagram::bind(dir.path().join("socket")).unwrap();
    let entries = listen(journald);
    let daemon = Daemon::journaled(dir);
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let mut token = Command::new("cryptsetup");
    let token = run(token.args(["token", "export", "--token-id", "0"]).arg(daemon.backing("v")));
    let secret = unwrap_token(&daemon, &token);
    daemon.ok(&["attach", "v"]);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");

    let denied = |entry: &&Entry| text(entry, "MESSAGE").starts_with("a probe did not succeed");
    let mut heard = Vec::new();
    until("the denial is told", || {
        heard.extend(entries.try_iter());
        heard.iter().any(|entry| denied(&entry))
    });
    let denial = heard.iter().find(denied).unwrap();
    for (field, value) in [
        ("BYOKD_VOLUME", "v"),
        ("BYOKD_KEY", &key),
        ("BYOKD_CODE", "DisabledException"),
        ("BYOKD_KMS_MESSAGE", &format!("{key} is disabled.")),
        ("PRIORITY", "4"),
        ("SYSLOG_IDENTIFIER", "byokd"),
    ] {
        assert_eq!(text(denial, field), value, "{denial:?}");
    }
    let request = text(denial, "BYOKD_REQUEST_ID");
    assert!(!request.is_empty(), "{denial:?}");
    // Who only reads the text reads it as well.
    let verbatim = format!("kms_message=\"{key} is disabled.\"");
    for part in ["volume=\"v\"", "code=\"DisabledException\"", &verbatim, request] {
        assert!(text(denial, "MESSAGE").contains(part), "{denial:?}");
    }
    let all = heard.iter().flat_map(|entry| entry.values().flatten().copied()).collect::<Vec<_>>();
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    for shape in [secret.clone(), hex.into_bytes(), format!("{secret:?}").into_bytes()] {
        assert!(memchr::memmem::find(&all, &shape).is_none(), "the volume key was said");
    }
    assert_eq!(daemon.log(), "", "nothing is said twice");
}

/// More than fits into a pipe.
const LINES: usize = 5000;

/// Has a process of its own say a lot and panic.
fn panicking(mut command: Command, args: &[&std::ffi::OsStr], stderr: Stdio) -> Running {
    let test = std::env::current_exe().unwrap();
    command.args(args).arg(test).args(["--exact", "journal::panics_if_told_to"]);
    command.env("BYOKD_TEST_PANICS", "1").env_remove("RUST_BACKTRACE");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    Running(command.spawn().unwrap())
}

/// What such a process does.
#[test]
fn panics_if_told_to() {
    if std::env::var_os("BYOKD_TEST_PANICS").is_none() {
        return;
    }
    let _log = log::start(EnvFilter::new("debug"), "byokd").unwrap();
    let hook = std::panic::take_hook();
    // As in a release: a panic ends the process, and nothing is dropped.
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        std::process::abort();
    }));
    (0..LINES).for_each(|n| tracing::debug!(n, "one of many"));
    panic!("it ends {}", "here");
}

fn aborts(process: &mut Running) {
    let ended = process.ends("the process that panics");
    assert_eq!(ended.signal(), Some(Signal::SIGABRT as i32), "{ended}");
}

#[test]
fn a_panic_and_all_that_was_said_before_it_is_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let log = std::fs::File::create(&path).unwrap();
    aborts(&mut panicking(Command::new("env"), &[], log.into()));
    let log = std::fs::read_to_string(&path).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("one of many")).count(), LINES);
    let last = log.lines().last().unwrap();
    assert!(last.contains("ERROR panicked at tests/it/journal.rs:"), "{last}");
    assert!(last.ends_with("it ends here thread=\"journal::panics_if_told_to\""), "{last}");
}

#[test]
fn a_log_that_nobody_reads_does_not_keep_a_panic_from_ending_the_process() {
    let mut process = panicking(Command::new("env"), &[], Stdio::piped());
    let _unread = process.0.stderr.take().unwrap();
    aborts(&mut process);
}

#[test]
fn a_panic_is_in_the_journal() {
    if !can_mount(&["unshare"]) {
        return;
    }
    let dir = in_memory();
    let entries = listen(UnixDatagram::bind(dir.path().join("socket")).unwrap());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-euc", JOURNALED]);
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    aborts(&mut panicking(command, &[dir.path().as_os_str()], log.into()));
    let mut heard = Vec::new();
    until("the panic is told", || {
        heard.extend(entries.try_iter());
        heard.iter().any(|entry| text(entry, "MESSAGE").contains("it ends here"))
    });
    let many = heard.iter().filter(|entry| text(entry, "MESSAGE").starts_with("one of many"));
    assert_eq!(many.count(), LINES);
    let panic = heard.last().unwrap();
    assert!(text(panic, "MESSAGE").starts_with("panicked at tests/it/journal.rs:"), "{panic:?}");
    assert_eq!(text(panic, "CODE_FILE"), "tests/it/journal.rs");
    assert_eq!(text(panic, "PRIORITY"), "3");
}
