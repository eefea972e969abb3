//! What stands still beside a daemon takes nothing from those it has nothing to do with.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use byokd::kms::dev::{Fault, FaultKind};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::audit::keys;
use crate::backing::{HangingDisk, a_request_that_hangs};
use crate::customer::Customer;
use crate::metrics::{address, scrape, value};
use crate::mounts::{Frozen, LoopDevice, Mount, can_mount};
use crate::raw::{READ, Raw, request};
use crate::support::{Daemon, Running, have, in_memory, nbdsh, run, until};

/// A pipe that nobody reads and that takes nothing more once it is [`fill`]ed.
fn pipe(path: &Path) -> File {
    mkfifo(path, Mode::from_bits_truncate(0o600)).unwrap();
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

fn fill(pipe: &mut File) {
    for piece in [4096, 1] {
        while pipe.write(&vec![b'.'; piece]).is_ok() {}
    }
}

/// Runs byokctl, which must not hang.
fn ctl(daemon: &Daemon, args: &[&str]) -> i32 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_byokctl"));
    command.arg("--socket").arg(daemon.socket()).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let ended = Running(command.spawn().unwrap()).ends(&format!("byokctl {args:?}"));
    ended.code().unwrap()
}

/// A volume whose store hangs as soon as it is opened for reading: a pipe that nobody writes to.
fn hanging(daemon: &Daemon, name: &str) {
    let store = daemon.backing(name);
    mkfifo(&store, Mode::from_bits_truncate(0o600)).unwrap();
    let definition = daemon.dir.path().join(format!("volumes.d/{name}.toml"));
    std::fs::write(definition, format!("backing = \"{}\"\n", store.display())).unwrap();
}

#[test]
fn a_log_that_nobody_reads_holds_neither_a_fence_nor_a_stop_back() {
    if !have(&["nbdsh"]) {
        return;
    }
    let dir = in_memory();
    let mut log = pipe(&dir.path().join("log"));
    let mut daemon = Daemon::start_in(dir);
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let uri = daemon.uri("v");
    fill(&mut log);
    assert_eq!(ctl(&daemon, &["status", "v"]), 0);
    daemon.ok(&["dev", "key", "disable", &key]);
    nbdsh(
        &uri,
        "import time\n\
         began = time.monotonic()\n\
         try:\n    \
             while time.monotonic() - began < 10: h.pread(4096, 0)\n    \
             raise Exception('it is served on')\n\
         except nbd.Error as error: assert error.errno == 'EPERM', error\n\
         assert time.monotonic() - began < 4.1, time.monotonic() - began",
    );
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the volume is served again", || daemon.state("v") == "serving");
    assert!(daemon.terminate().success());
}

#[test]
fn an_audit_trail_whose_disk_hangs_holds_no_fence_back() {
    if !can_mount(&["mkfs.ext4"]) {
        return;
    }
    let customer = Customer::new();
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("disk");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    run(Command::new("/usr/sbin/mkfs.ext4").arg("-q").arg(&disk));
    let device = LoopDevice::new(&disk, &[]);
    let trail = Mount::of(device.path(), &place.path().join("trail"));
    let settings = customer.settings("", "probe_interval = \"1s\"\n");
    let audit = format!("[audit]\ndirectory = \"{}\"\n", trail.path().join("a").display());
    let daemon = Daemon::configured(&(audit + &settings));
    daemon.volume("v", "8M", customer.key.as_str());
    let mut client = Raw::connected(&daemon.dir.path().join("nbd/v.sock"), "v");
    assert_eq!(client.write(0, &[1; 4096]), 0);
    let frozen = Frozen::new(&trail);
    customer.set_enabled(false);
    let began = Instant::now();
    until("the key is gone", || client.command(0, READ, 0, 0) == 1);
    let took = began.elapsed();
    drop(frozen);
    assert!(took < Duration::from_millis(1100) + Duration::from_secs(2), "{took:?}");
    customer.set_enabled(true);
    until("it is served again", || client.command(0, READ, 0, 0) == 0);
    let dir = trail.path().join("a");
    let verify = ["audit", "verify", "--dir"];
    let report = run(Command::new(env!("CARGO_BIN_EXE_byokctl")).args(verify).arg(&dir));
    let text = std::fs::read_to_string(dir.join("audit-000000000001.jsonl")).unwrap();
    assert_eq!(text.matches("\"event\":\"key-destroyed\"").count(), 1, "{report}: {text}");
}

#[test]
fn stores_that_hang_take_no_thread_from_other_volumes() {
    let daemon = Daemon::start();
    hanging(&daemon, "h");
    // More than the runtime has threads for what blocks.
    let asking: Vec<_> = (0..600)
        .map(|_| {
            let mut stream = UnixStream::connect(daemon.socket()).unwrap();
            stream.write_all(b"{\"request\":\"status\",\"name\":\"h\"}\n").unwrap();
            stream
        })
        .collect();
    assert_eq!(ctl(&daemon, &["status", "h"]), 0, "what is in memory is told");
    let key = daemon.key();
    let backing = daemon.backing("v");
    let backing = backing.to_str().unwrap();
    let made =
        ["volume", "create", "v", "--backing", backing, "--size", "8M", "--purpose", "zeebe"];
    assert_eq!(ctl(&daemon, &[&made[..], &["--key", &key]].concat()), 0);
    assert_eq!(ctl(&daemon, &["attach", "v"]), 0);
    drop(asking);
}

#[test]
fn a_store_that_hangs_at_attach_does_not_keep_the_daemon_from_stopping() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    hanging(&daemon, "h");
    let mut attach = Command::new(env!("CARGO_BIN_EXE_byokctl"));
    attach.arg("--socket").arg(daemon.socket()).args(["attach", "--read-only", "h"]);
    let attach = attach.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _attach = Running(attach);
    let address = address(&daemon);
    until("the store hangs", || {
        let sample = "byokd_volume_state{volume=\"h\",state=\"attaching\"}";
        let page = scrape(&address);
        page.contains(sample) && value(&page, sample) > 0.0
    });
    assert!(daemon.terminate().success());
}

#[test]
fn an_attach_ends_with_a_word_though_its_store_hangs_and_a_forced_detach_ends_it_sooner() {
    let daemon = Daemon::start();
    hanging(&daemon, "h");
    let address = address(&daemon);
    std::thread::scope(|scope| {
        let attach = scope.spawn(|| daemon.ctl(&["attach", "--read-only", "h"]));
        until("the store hangs", || {
            let sample = "byokd_volume_state{volume=\"h\",state=\"attaching\"}";
            let page = scrape(&address);
            page.contains(sample) && value(&page, sample) > 0.0
        });
        let began = Instant::now();
        assert_eq!(ctl(&daemon, &["detach", "--force", "h"]), 0);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}");
        let (code, refused) = attach.join().unwrap();
        assert_eq!(code, 5, "{refused}");
        assert!(refused["why"].as_str().unwrap().contains("by force"), "{refused}");
    });
    let (code, refused) = daemon.ctl(&["attach", "--read-only", "h"]);
    assert_eq!(code, 1, "{refused}");
    assert!(refused["why"].as_str().unwrap().contains("hangs"), "{refused}");
    let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let open = threads.filter(|thread| {
        let comm = thread.as_ref().unwrap().path().join("comm");
        std::fs::read_to_string(comm).is_ok_and(|comm| comm.trim() == "open")
    });
    assert_eq!(open.count(), 1, "each try holds a thread");
    // Another store is not waited for in its place.
    let key = daemon.key();
    daemon.create("well", "1M", &key);
    daemon.define("h", &format!("backing = \"{}\"", daemon.backing("well").display()));
    daemon.ok(&["attach", "h"]);
}

#[test]
fn an_operator_fences_a_volume_that_is_being_detached_though_its_store_hangs() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let daemon = Daemon::start();
    // It goes before the daemon, which could not end without it.
    let disk = HangingDisk::new();
    let key = daemon.key();
    disk.attach(&daemon, "v", &key);
    disk.signal("-STOP");
    let _client = a_request_that_hangs(&daemon);
    let address = address(&daemon);
    let metric = |sample: &str| value(&scrape(&address), sample);
    until("a request hangs in the store", || metric("byokd_io_in_flight{volume=\"v\"}") > 0.0);
    std::thread::scope(|scope| {
        let detach = scope.spawn(|| daemon.ctl(&["detach", "v"]));
        let state = "byokd_volume_state{volume=\"v\",state=\"detaching\"}";
        until("it waits for the request", || metric(state) > 0.0);
        let began = Instant::now();
        let suspended = ctl(&daemon, &["key", "suspend", "v"]);
        // The request is waited for for 10 s.
        let took = began.elapsed();
        let status = daemon.status("v");
        daemon.says("reason=\"suspended\"");
        disk.signal("-CONT");
        detach.join().unwrap();
        assert_eq!(suspended, 0);
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert_eq!(status["state"], "detaching");
        assert!(status["uuid"].is_string(), "its header is in memory: {status}");
    });
}

#[test]
fn an_operator_fences_a_volume_whose_attach_waits_for_a_store_that_hangs() {
    if !can_mount(&["nbdkit"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    // It goes before the daemon, which could not end without it.
    let disk = HangingDisk::new();
    disk.define(&daemon, "v", customer.key.as_str());
    // One copy of its header is damaged, and will be repaired when the key is here.
    let store = OpenOptions::new().write(true).open(disk.path()).unwrap();
    store.write_all_at(&[0xff; 900], 4096).unwrap();
    drop(store);
    // KMS answers the second attempt, seconds after the first.
    customer.kms.inject(Fault::new(FaultKind::Timeout).on(&["Decrypt"]).times(1));
    let asked = customer.kms.requests().len();
    std::thread::scope(|scope| {
        let attach = scope.spawn(|| daemon.ctl(&["attach", "v"]));
        until("KMS is asked for the key", || customer.kms.requests().len() > asked);
        disk.signal("-STOP");
        until("the key is here", || daemon.status("v")["uuid"].is_string());
        let suspended = ctl(&daemon, &["key", "suspend", "v"]);
        let state = daemon.state("v");
        disk.signal("-CONT");
        attach.join().unwrap();
        assert_eq!((suspended, state.as_str()), (0, "attaching"));
        daemon.says("fenced: the key is destroyed");
    });
    assert_ne!(daemon.state("v"), "serving");
}

/// systemd ends it 30 s after it told it to stop, and forgets what it was not given by then.
#[test]
fn a_stop_destroys_every_key_in_time_whatever_hangs() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let customer = Customer::new();
    // No probe meets the fault that is meant for an attach.
    let daemon = customer.daemon_with("", "probe_interval = \"60s\"\n");
    // They go before the daemon, which could not end without them.
    let (served, attaching) = (HangingDisk::new(), HangingDisk::new());
    served.attach(&daemon, "served", customer.key.as_str());
    std::fs::remove_file(daemon.backing("made")).unwrap();
    attaching.define(&daemon, "attaching", customer.key.as_str());
    // One copy of its header is damaged, and will be repaired when the key is here.
    let store = OpenOptions::new().write(true).open(attaching.path()).unwrap();
    store.write_all_at(&[0xff; 900], 4096).unwrap();
    drop(store);
    served.signal("-STOP");
    let mut client = Raw::connected(&daemon.dir.path().join("nbd/served.sock"), "served");
    client.send(&request(0, READ, 1, 0, 65536));
    // KMS answers the second attempt, seconds after the first.
    customer.kms.inject(Fault::new(FaultKind::Timeout).on(&["Decrypt"]).times(1));
    let asked = customer.kms.requests().len();
    std::thread::scope(|scope| {
        let attach = scope.spawn(|| daemon.ctl(&["attach", "attaching"]));
        until("KMS is asked for the key", || customer.kms.requests().len() > asked);
        attaching.signal("-STOP");
        until("the key is here", || daemon.status("attaching")["uuid"].is_string());
        let began = Instant::now();
        run(Command::new("kill").arg(daemon.pid().to_string()));
        until("it has stopped", || daemon.log().contains("INFO stopped"));
        let (took, log) = (began.elapsed(), daemon.log());
        let keys = ["served", "attaching"].map(|volume| keys(&daemon, volume));
        served.signal("-CONT");
        attaching.signal("-CONT");
        attach.join().unwrap();
        assert_eq!(keys, [(1, 1); 2], "{log}");
        assert!(took < Duration::from_secs(25), "{took:?}: {log}");
        assert!(log.contains("not waited for"), "{log}");
    });
}
