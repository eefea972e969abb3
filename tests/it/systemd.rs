//! Under a service manager: a socket of the test's own hears what systemd would be told.

use std::io::{IoSliceMut, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use byokd::systemd::Notifier;
use nix::sys::ptrace;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, close, mkfifo};

use crate::backing::HangingDisk;
use crate::mounts::can_mount;
use crate::raw::{READ, Raw, request};
use crate::support::{Daemon, PATIENCE, Running, in_memory, run, until};

/// What systemd is to the service.
struct Manager {
    socket: UnixDatagram,
    /// As in `NOTIFY_SOCKET`.
    name: String,
    _dir: tempfile::TempDir,
}

impl Manager {
    fn at_a_path() -> Self {
        let dir = in_memory();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Self { socket, name: path.to_str().unwrap().to_owned(), _dir: dir }
    }

    fn abstractly() -> Self {
        let dir = in_memory();
        let name = dir.path().join("notify").to_str().unwrap().to_owned();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        Self { socket, name: format!("@{name}"), _dir: dir }
    }

    fn env(&self) -> (String, String) {
        ("NOTIFY_SOCKET".to_owned(), self.name.clone())
    }

    /// The next message, if one comes in time.
    fn hears(&self, within: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(within)).unwrap();
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).ok()?;
        Some(String::from_utf8(message[..length].to_vec()).unwrap())
    }

    /// The next message with that line.
    fn hears_line(&self, line: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut others = Vec::new();
        while let Some(message) = self.hears(PATIENCE) {
            if message.lines().any(|one| one.starts_with(line)) {
                return message;
            }
            others.push(message);
            assert!(Instant::now() < deadline, "never heard {line}, but {others:?}");
        }
        panic!("never heard {line}, but {others:?}");
    }

    /// The next message and the descriptors with it.
    fn hears_fds(&self) -> (String, Vec<RawFd>) {
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        receive(self.socket.as_fd())
    }
}

/// A message and the descriptors with it.
fn receive(socket: BorrowedFd<'_>) -> (String, Vec<RawFd>) {
    let (mut message, mut control) = ([0; 4096], nix::cmsg_space!([RawFd; 4]));
    let mut into = [IoSliceMut::new(&mut message)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), flags).unwrap();
    let mut fds = Vec::new();
    for part in got.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(more) = part {
            fds.extend(more);
        }
    }
    let length = got.bytes;
    (String::from_utf8(message[..length].to_vec()).unwrap(), fds)
}

fn what_it_is(fd: RawFd) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap()
}

fn ready_with_its_volumes_and_a_word_for_each_change(manager: &Manager) {
    let dir = in_memory();
    let mut daemon = Daemon::start_with(dir, vec![manager.env()]);
    let first = manager.hears_line("READY=1");
    assert!(first.contains("STATUS=0 volumes serving"), "{first}");
    let key = daemon.key();
    daemon.create("vol", "8M", &key);
    daemon.define("vol", "attach = \"auto\"");

    daemon.crash_and_restart();
    let ready = manager.hears_line("READY=1");
    assert!(ready.contains("STATUS=1 volume serving"), "its volumes were not tried: {ready}");
    // The log calls it ready then, and not before.
    daemon.says("ready: 1 volume serving");
    let log = daemon.log();
    assert!(log.find(" attached ") < log.find("ready: 1 volume serving"), "{log}");
    daemon.ok(&["dev", "key", "disable", &key]);
    manager.hears_line("STATUS=0 volumes serving, 1 fenced");
    daemon.ok(&["dev", "key", "enable", &key]);
    manager.hears_line("STATUS=1 volume serving");
    assert!(daemon.terminate().success());
    let said: Vec<_> = std::iter::from_fn(|| manager.hears(Duration::from_millis(1))).collect();
    // It asks for time as well, each time for as much as the unit gives: else systemd would end it soon.
    let unit = include_str!("../../systemd/byokd.service");
    let seconds = unit.split_once("TimeoutStopSec=").unwrap().1.split_once("s\n").unwrap().0;
    for line in ["STOPPING=1", &format!("EXTEND_TIMEOUT_USEC={seconds}000000")] {
        assert!(said.iter().any(|message| message.starts_with(line)), "{line}: {said:?}");
    }
}

#[test]
fn ready_is_said_when_volumes_were_tried_and_the_status_is_kept_current() {
    ready_with_its_volumes_and_a_word_for_each_change(&Manager::at_a_path());
}

#[test]
fn a_manager_at_an_abstract_address_is_told_as_well() {
    ready_with_its_volumes_and_a_word_for_each_change(&Manager::abstractly());
}

#[test]
fn the_watchdog_hears_nothing_while_a_part_stands_still() {
    let manager = Manager::abstractly();
    let dir = in_memory();
    let watchdog = ("WATCHDOG_USEC".to_owned(), "1000000".to_owned());
    let daemon = Daemon::start_with(dir, vec![manager.env(), watchdog]);
    manager.hears_line("WATCHDOG=1");
    manager.hears_line("WATCHDOG=1");

    let stopped = stop_threads(&daemon, "control");
    assert!(stopped.len() >= 2, "the runtime has two threads");
    let words = manager.hears_line("STATUS=standing still");
    assert!(words.contains("the control socket"), "{words}");
    assert_eq!(manager.hears(Duration::from_secs(2)), None, "the watchdog was told all is well");

    for thread in stopped {
        ptrace::detach(thread, None).unwrap();
    }
    manager.hears_line("WATCHDOG=1");
    daemon.ok(&["status"]);
}

/// Stops the threads of that name, and nothing else. They go on when this thread ends, at the
/// latest.
fn stop_threads(daemon: &Daemon, name: &str) -> Vec<Pid> {
    let mut stopped = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let task = entry.unwrap().path();
        let comm = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
        if comm.trim() == name {
            let id = task.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let thread = Pid::from_raw(id);
            ptrace::seize(thread, ptrace::Options::empty()).unwrap();
            ptrace::interrupt(thread).unwrap();
            waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
            stopped.push(thread);
        }
    }
    stopped
}

#[test]
fn a_descriptor_is_stored_by_name_and_its_end_is_awaited() {
    let manager = Manager::at_a_path();
    let notifier = Notifier::to(manager.name.as_ref()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(notifier.store_fd("nbd-vol", &theirs).unwrap());
    let (message, fds) = manager.hears_fds();
    assert_eq!(message, "FDSTORE=1\nFDNAME=nbd-vol\nFDPOLL=0");
    assert_eq!(fds.len(), 1);
    assert_eq!(what_it_is(fds[0]), what_it_is(theirs.as_raw_fd()));
    close(fds[0]).unwrap();
    drop(ours);

    notifier.forget_fds("nbd-vol").unwrap();
    assert_eq!(manager.hears_fds(), ("FDSTOREREMOVE=1\nFDNAME=nbd-vol".to_owned(), Vec::new()));

    let late = notifier.settle(Duration::from_millis(50)).unwrap_err();
    assert_eq!(late.kind(), std::io::ErrorKind::TimedOut);
    let (message, fds) = manager.hears_fds();
    assert_eq!((message.as_str(), fds.len()), ("BARRIER=1", 1));
    close(fds[0]).unwrap();
    std::thread::scope(|scope| {
        let settled = scope.spawn(|| notifier.settle(PATIENCE));
        let (_, fds) = manager.hears_fds();
        close(fds[0]).unwrap();
        settled.join().unwrap().unwrap();
    });
}

/// `byokd-kernel` on a machine without kernel devices: each connection of one ends here. It answers
/// nothing the first times.
fn kernel_without_devices(daemon: &Daemon, silent: usize) {
    let helper = UnixListener::bind(daemon.dir.path().join("kernel.sock")).unwrap();
    std::thread::spawn(move || {
        let mut kernel = Vec::new();
        for (at, asked) in helper.incoming().enumerate() {
            let mut asked = asked.unwrap();
            let (ask, sockets) = receive(asked.as_fd());
            if at < silent {
                continue;
            }
            let told = if ask.contains("connect") {
                kernel.extend(sockets);
                format!("{{\"told\":\"device\",\"index\":{}}}\n", 900 + kernel.len())
            } else {
                "{\"told\":\"done\"}\n".to_owned()
            };
            asked.write_all(told.as_bytes()).unwrap();
        }
    });
}

#[test]
fn ready_is_said_though_a_store_hangs() {
    let manager = Manager::abstractly();
    let dir = in_memory();
    let mut daemon = Daemon::start_with(dir, vec![manager.env()]);
    manager.hears_line("READY=1");
    let key = daemon.key();
    daemon.create("well", "8M", &key);
    daemon.define("well", "attach = \"auto\"");
    // It hangs as soon as it is opened: nobody writes to it.
    let store = daemon.backing("hangs");
    mkfifo(&store, Mode::from_bits_truncate(0o600)).unwrap();
    let definition = daemon.dir.path().join("volumes.d/hangs.toml");
    let text = format!("backing = \"{}\"\nattach = \"auto\"\nread_only = true\n", store.display());
    std::fs::write(definition, text).unwrap();
    daemon.crash_and_restart();
    let ready = manager.hears_line("READY=1");
    assert!(ready.contains("STATUS=1 volume serving, 1 "), "{ready}");
    // It goes on being tried: whoever opens the other end lets the open go on.
    daemon.ok(&["detach", "well"]);
    let other_end = std::fs::File::options().write(true).open(&store).unwrap();
    std::fs::rename(daemon.backing("well"), &store).unwrap();
    drop(other_end);
    until("it is attached", || daemon.state("hangs") == "serving");
}

#[test]
fn a_device_that_the_helper_does_not_make_at_once_is_made_later() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    daemon.define("v", "attach = \"auto\"\ndevice = \"auto\"");
    kernel_without_devices(&daemon, 1);
    daemon.crash_and_restart();
    until("the helper answers", || daemon.status("v")["device"]["path"].is_string());
    assert_eq!(daemon.state("v"), "serving");
}

#[test]
fn an_attach_says_how_the_device_is_and_takes_no_connections_for_none() {
    let daemon = Daemon::start();
    kernel_without_devices(&daemon, 0);
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let (code, refused) = daemon.ctl(&["attach", "v", "--connections", "2"]);
    assert_eq!(code, 2, "{refused}");
    assert_eq!(daemon.state("v"), "detached");
    let attached = daemon.ok(&["attach", "v", "--device", "auto"]);
    assert_eq!(attached["device"]["requests"], "served", "{attached}");
}

#[test]
fn a_copy_of_a_volume_is_not_taken_for_the_one_whose_device_it_is() {
    let daemon = Daemon::start();
    kernel_without_devices(&daemon, 0);
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let copy = daemon.backing("copy");
    std::fs::copy(daemon.backing("v"), &copy).unwrap();
    let definition = daemon.dir.path().join("volumes.d/copy.toml");
    std::fs::write(definition, format!("backing = \"{}\"\n", copy.display())).unwrap();
    daemon.ok(&["attach", "v", "--device", "auto"]);
    let (code, refused) = daemon.ctl(&["attach", "copy", "--device", "auto"]);
    assert_eq!(code, 5, "{refused}");
    assert!(refused["why"].as_str().unwrap().contains("volume v has a device"), "{refused}");
    daemon.ok(&["attach", "copy"]);
}

#[test]
fn connections_of_devices_are_stored_however_long_their_volumes_take_to_end() {
    if !can_mount(&["nbdkit"]) {
        return;
    }
    let manager = Manager::abstractly();
    let dir = in_memory();
    let daemon = Daemon::start_with(dir, vec![manager.env()]);
    // It goes before the daemon, which could not end without it.
    let disk = HangingDisk::new();
    kernel_without_devices(&daemon, 0);
    let key = daemon.key();
    disk.define(&daemon, "hangs", &key);
    daemon.create("well", "8M", &key);
    daemon.ok(&["attach", "hangs", "--device", "auto"]);
    daemon.ok(&["attach", "well", "--device", "auto"]);
    disk.signal("-STOP");
    let mut client = Raw::connected(&daemon.dir.path().join("nbd/hangs.sock"), "hangs");
    client.send(&request(0, READ, 1, 0, 65536));
    let began = Instant::now();
    run(Command::new("kill").arg(daemon.pid().to_string()));
    let mut stored = Vec::new();
    while stored.len() < 2 {
        let message = manager.hears_line("FDNAME=kernel.");
        stored.extend(message.lines().filter_map(|l| l.strip_prefix("FDNAME=").map(str::to_owned)));
    }
    // The one volume is not detached yet.
    let took = began.elapsed();
    disk.signal("-CONT");
    stored.sort();
    assert_eq!(stored, ["kernel.nbd901.0", "kernel.nbd902.0"]);
    assert!(took < Duration::from_secs(5), "{took:?}: {}", daemon.log());
}

#[test]
fn a_start_that_fails_leaves_the_connections_of_devices_with_systemd() {
    let manager = Manager::abstractly();
    let dir = in_memory();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=kernel.nbd900.0; \
                  exec \"$0\" \"$@\" 3<&0 </dev/null";
    let child = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_byokd"), "--dev", "--http-port", &port])
        .arg("--state-dir")
        .arg(dir.path())
        .env("NOTIFY_SOCKET", &manager.name)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert!(!Running(child).ends("it cannot serve HTTP").success());
    while let Some(message) = manager.hears(Duration::from_millis(1)) {
        assert!(!message.contains("FDSTOREREMOVE"), "{message}");
    }
}

#[test]
fn descriptors_that_nobody_knows_are_closed_with_a_word() {
    let manager = Manager::abstractly();
    let dir = in_memory();
    let log = dir.path().join("log");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    // The shell puts them where systemd would: a socket as 3, something else as 4.
    let script = "export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=stranger:file; \
                  exec \"$0\" \"$@\" 3<&0 4</dev/null </dev/null";
    let child = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_byokd"), "--dev", "--state-dir"])
        .arg(dir.path())
        .env("NOTIFY_SOCKET", &manager.name)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let _daemon = Running(child);
    let forgotten = manager.hears_line("FDSTOREREMOVE=1");
    assert!(forgotten.contains("FDNAME=stranger"), "{forgotten}");
    manager.hears_line("READY=1");
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0, "the daemon still holds it");
    let says = |what| std::fs::read_to_string(&log).unwrap().contains(what);
    until("it says so", || says("nobody knows name=\"stranger\""));
    until("it says so", || says("nobody can use name=\"file\""));
}
