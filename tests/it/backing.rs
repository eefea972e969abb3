//! Backing stores as life brings them: devices, read-only ones, full, cut off, hanging, used twice.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::stat;
use serde_json::Value;
use tempfile::TempDir;

use crate::customer::Customer;
use crate::metrics::{address, scrape, value};
use crate::mounts::{LoopDevice, Mount, NbdFile, can_mount};
use crate::raw::{FLUSH, Raw, WRITE, request};
use crate::support::{Daemon, Running, have, nbdsh, output, python_nbd, run, until};

const FAILED: i32 = 1;
const USAGE: i32 = 2;
const WRONG_STATE: i32 = 5;

fn why(answer: &Value) -> &str {
    answer["why"].as_str().unwrap_or_default()
}

/// Makes a volume somewhere else than usual.
fn create(daemon: &Daemon, name: &str, backing: &Path, size: &str, key: &str) -> (i32, Value) {
    daemon.try_create(name, backing, size, key, "documents")
}

fn file_of(dir: &Path, bytes: u64) -> PathBuf {
    let path = dir.join("disk");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

#[test]
fn a_block_device_holds_a_volume_of_all_its_space() {
    if !can_mount(&["nbdsh", "cryptsetup"]) {
        return;
    }
    let daemon = Daemon::start_on_disk();
    let key = daemon.key();
    let device = LoopDevice::new(&file_of(daemon.dir.path(), 64 << 20), &[]);
    let path = Path::new(device.path());
    let (code, answer) = create(&daemon, "v", path, "60M", &key);
    assert_eq!(code, USAGE, "it does not fit beside the header: {answer}");
    assert!(why(&answer).contains("left beside the header"), "{answer}");
    let (code, answer) = create(&daemon, "v", path, "0", &key);
    assert_eq!((code, &answer["size"]), (0, &Value::from(48u64 << 20)), "{answer}");
    daemon.ok(&["attach", "v"]);
    nbdsh(
        &daemon.uri("v"),
        "size = h.get_size()\nassert size == 48 << 20\nh.pwrite(b'e' * 4096, size - 4096)\n\
         h.trim(1 << 20, 0)\nh.flush()\nassert h.pread(4096, size - 4096) == b'e' * 4096",
    );
    // Whoever holds a device exclusively is not formatted over, not with --force either.
    let path = device.path();
    let (code, answer) = daemon.ctl(&[
        "volume",
        "create",
        "w",
        "--backing",
        path,
        "--size",
        "0",
        "--key",
        &key,
        "--purpose",
        "zeebe",
        "--force",
    ]);
    assert_eq!(code, WRONG_STATE, "it is attached: {answer}");
    daemon.ok(&["detach", "v"]);
    run(Command::new("/usr/sbin/cryptsetup").args(["isLuks", "--type", "luks2", path]));
    daemon.ok(&["attach", "v"]);
    nbdsh(&daemon.uri("v"), "assert h.pread(4096, h.get_size() - 4096) == b'e' * 4096");
    daemon.ok(&["detach", "v"]);
}

#[test]
fn a_volume_of_small_sectors_lies_on_a_device_of_large_ones() {
    if !can_mount(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start_on_disk();
    let key = daemon.key();
    let disk = file_of(daemon.dir.path(), 64 << 20);
    let device = LoopDevice::new(&disk, &["--sector-size", "4096", "--direct-io=on"]);
    daemon.ok(&[
        "volume",
        "create",
        "v",
        "--backing",
        device.path(),
        "--size",
        "0",
        "--key",
        &key,
        "--purpose",
        "zeebe",
        "--sector-size",
        "512",
    ]);
    daemon.ok(&["attach", "v"]);
    // Beside each other in one block of the device, over many connections, odd sizes and places.
    nbdsh(
        &daemon.uri("v"),
        "import random\nrandom.seed(1)\nmirror = bytearray(1 << 20)\nh.zero(1 << 20, 0)\n\
         for i in range(300):\n\
         \x20   at = random.randrange(0, (1 << 20) - 9000)\n\
         \x20   data = random.randbytes(random.choice([1, 511, 512, 513, 1024, 4096, 8999]))\n\
         \x20   h.pwrite(data, at)\n\
         \x20   mirror[at:at + len(data)] = data\n\
         h.flush()\nassert h.pread(1 << 20, 0) == mirror",
    );
    daemon.ok(&["detach", "v"]);
}

#[test]
fn a_read_only_device_is_served_read_only_and_only_if_asked() {
    if !can_mount(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start_on_disk();
    let key = daemon.key();
    daemon.create("made", "8M", &key);
    daemon.ok(&["volume", "forget", "made"]);
    let device = LoopDevice::new(&daemon.backing("made"), &["--read-only"]);
    let path = device.path();
    let (code, answer) = create(&daemon, "w", Path::new(path), "0", &key);
    assert_eq!(code, FAILED, "{answer}");
    assert!(why(&answer).contains("Read-only"), "{answer}");
    let definition = daemon.dir.path().join("volumes.d/v.toml");
    std::fs::write(definition, format!("backing = \"{path}\"\n")).unwrap();
    let (code, answer) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, FAILED, "{answer}");
    assert!(answer["remedy"].as_str().unwrap().contains("--read-only"), "{answer}");
    let answer = daemon.ok(&["attach", "v", "--read-only"]);
    assert_eq!(answer["read_only"], true);
    nbdsh(
        &daemon.uri("v"),
        "assert h.is_read_only()\nh.pread(4096, 0)\n\
         h.set_strict_mode(0)\n\
         try:\n    h.pwrite(b'x', 0)\n    assert False\n\
         except nbd.Error as e:\n    assert e.errno == 'EPERM', e",
    );
    daemon.ok(&["detach", "v"]);
}

#[test]
fn one_store_is_served_once_whatever_its_name() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let dir = daemon.dir.path();
    let hard = dir.join("hard-link");
    std::fs::hard_link(daemon.backing("v"), &hard).unwrap();
    let soft = dir.join("symbolic-link");
    std::os::unix::fs::symlink(daemon.backing("v"), &soft).unwrap();
    let other = Daemon::start();
    for (name, backing) in [("hard", hard), ("soft", soft), ("same", daemon.backing("v"))] {
        let definition = format!("backing = \"{}\"\n", backing.display());
        for daemon in [&daemon, &other] {
            let file = daemon.dir.path().join("volumes.d").join(format!("{name}.toml"));
            std::fs::write(file, &definition).unwrap();
            let (code, answer) = daemon.ctl(&["attach", name]);
            assert_eq!(code, WRONG_STATE, "{answer}");
            assert!(why(&answer).contains("in use"), "{answer}");
        }
    }
    assert_eq!(daemon.state("v"), "serving");
}

#[test]
fn a_device_that_is_served_is_nobody_elses_but_udev_may_look_at_it() {
    if !can_mount(&["flock", "mknod"]) {
        return;
    }
    let daemon = Daemon::start_on_disk();
    let key = daemon.key();
    let device = LoopDevice::new(&file_of(daemon.dir.path(), 64 << 20), &[]);
    let path = Path::new(device.path());
    let (code, answer) = create(&daemon, "v", path, "0", &key);
    assert_eq!(code, 0, "{answer}");
    // The same device by another node, where no lock on a file is seen.
    let node = daemon.dir.path().join("node");
    let number = std::fs::metadata(path).unwrap().rdev();
    let (major, minor) = (stat::major(number).to_string(), stat::minor(number).to_string());
    run(Command::new("mknod").arg(&node).args(["b", &major, &minor]));
    let claim = || OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    let other = Daemon::start();
    let attach = |backing: &Path, how: &[&str]| {
        let definition = format!("backing = \"{}\"\n", backing.display());
        std::fs::write(other.dir.path().join("volumes.d/w.toml"), definition).unwrap();
        other.ctl(&[&["attach", "w"], how].concat())
    };
    daemon.ok(&["attach", "v"]);
    for (backing, how) in [(path, &[][..]), (path, &["--read-only"]), (&node, &[])] {
        let (code, answer) = attach(backing, how);
        assert_eq!(code, WRONG_STATE, "{backing:?} {how:?}: {answer}");
        assert!(why(&answer).contains("in use"), "{answer}");
    }
    // Whoever mounts or maps a device claims it so.
    assert_eq!(claim().unwrap_err().raw_os_error(), Some(libc::EBUSY));
    // udev puts off what it has to do with a device that it cannot lock so.
    run(Command::new("flock").args(["--shared", "--nonblock", device.path(), "true"]));
    daemon.ok(&["detach", "v"]);
    drop(claim().unwrap());
    daemon.ok(&["attach", "v", "--read-only"]);
    let (code, answer) = attach(path, &[]);
    assert_eq!(code, WRONG_STATE, "others read it: {answer}");
    let (code, answer) = attach(path, &["--read-only"]);
    assert!(code != WRONG_STATE, "the store may be shared, the key is another KMS's: {answer}");
    daemon.ok(&["detach", "v"]);
}

#[test]
fn a_full_store_fails_writes_and_nothing_else() {
    if !can_mount(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    let dir = tempfile::tempdir().unwrap();
    let small = Mount::tmpfs(dir.path(), "8m");
    let ballast = small.path().join("ballast");
    let (code, answer) = create(&daemon, "v", &small.path().join("v.img"), "64M", &key);
    assert_eq!(code, 0, "{answer}");
    daemon.ok(&["attach", "v"]);
    std::fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    let uri = daemon.uri("v");
    nbdsh(
        &uri,
        "h.pwrite(b'a' * (1 << 20), 0)\nh.flush()\n\
         try:\n\
         \x20   for i in range(1, 32): h.pwrite(b'b' * (1 << 20), i << 20)\n\
         \x20   assert False, 'it never filled up'\n\
         except nbd.Error as e:\n    assert e.errno in ('ENOSPC', 'EIO'), e\n\
         assert h.pread(1 << 20, 0) == b'a' * (1 << 20)\nh.flush()\n\
         h.pwrite(b'c' * 4096, 0)\nassert h.pread(4096, 0) == b'c' * 4096",
    );
    assert_eq!(daemon.state("v"), "serving");
    std::fs::remove_file(&ballast).unwrap();
    nbdsh(&uri, "h.pwrite(b'd' * (1 << 20), 40 << 20)\nh.flush()");
    daemon.ok(&["detach", "v"]);
}

#[test]
fn a_store_that_is_cut_off_while_it_is_served_fails_what_is_gone() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start_on_disk();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let uri = daemon.uri("v");
    nbdsh(&uri, "h.pwrite(b'a' * (1 << 20), 0)\nh.pwrite(b'z' * 4096, 6 << 20)\nh.flush()");
    let file = File::options().write(true).open(daemon.backing("v")).unwrap();
    file.set_len((16 << 20) + (4 << 20)).unwrap();
    nbdsh(
        &uri,
        "assert h.pread(1 << 20, 0) == b'a' * (1 << 20)\n\
         try:\n    h.pread(4096, 6 << 20)\n    assert False, 'read what is not there'\n\
         except nbd.Error as e:\n    assert e.errno == 'EIO', e\n\
         assert h.pread(1 << 20, 0) == b'a' * (1 << 20)",
    );
}

#[test]
fn who_can_write_to_the_store_makes_garbage_or_old_data_and_nothing_of_his_choice() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.volume("v", "8M", &daemon.key());
    let sector_at = |n: u64| (16 << 20) + n * 4096;
    let store = File::options().read(true).write(true).open(daemon.backing("v")).unwrap();
    let read = |n| {
        let mut sector = vec![0; 4096];
        store.read_exact_at(&mut sector, sector_at(n)).unwrap();
        sector
    };
    let mut client = Raw::connected(&daemon.dir.path().join("nbd/v.sock"), "v");
    for n in 0..2 {
        assert_eq!(client.write(n * 4096, &[b'o'; 4096]), 0);
    }
    let old = read(0);
    assert!(old != read(1), "equal sectors at other places are other ciphertext");
    // A bit: its block of the cipher is garbage, and only that.
    let mut changed = old.clone();
    changed[100] ^= 1;
    store.write_all_at(&changed, sector_at(0)).unwrap();
    let seen = client.read(0, 4096);
    let others = (0..4096).filter(|byte| !(96..112).contains(byte));
    assert!(others.into_iter().all(|byte| seen[byte] == b'o'));
    let garbage = seen[96..112].iter().filter(|byte| **byte != b'o').count();
    assert!(garbage > 8, "{garbage} bytes of a block changed");
    // An old version is taken for the new one.
    assert_eq!(client.write(0, &[b'n'; 4096]), 0);
    assert!(read(0) != old);
    store.write_all_at(&old, sector_at(0)).unwrap();
    assert_eq!(client.read(0, 4096), [b'o'; 4096]);
    // Whoever has two copies sees what is the same in both.
    assert_eq!(client.write(0, &[b'n'; 4096]), 0);
    assert_eq!(client.write(0, &[b'o'; 4096]), 0);
    assert_eq!(read(0), old);
}

/// A disk that can be made to hang, and to fail: nbdkit, in memory, behind nbdfuse.
pub(crate) struct HangingDisk {
    file: Option<NbdFile>,
    nbdkit: Running,
    _dir: TempDir,
}

impl HangingDisk {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let nbdkit = Command::new("nbdkit")
            .args(["--foreground", "--unix"])
            .arg(&socket)
            .args(["--filter=error", "memory", "32M", "error=EIO", "error-rate=100%"])
            .arg(format!("error-file={}", dir.path().join("fail").display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        until("nbdkit listens", || socket.exists());
        let mut disk = Self { file: None, nbdkit: Running(nbdkit), _dir: dir };
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        disk.file = Some(NbdFile::new(&uri, &disk._dir.path().join("fuse")));
        disk
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.file.as_ref().unwrap().path()
    }

    /// Whether it fails at everything from now on.
    fn fail(&self, fail: bool) {
        let file = self._dir.path().join("fail");
        if fail {
            File::create(file).unwrap();
        } else {
            std::fs::remove_file(file).unwrap();
        }
    }

    /// Puts a volume that `daemon` makes on it, and attaches that under this name.
    pub(crate) fn attach(&self, daemon: &Daemon, name: &str, key: &str) {
        self.define(daemon, name, key);
        daemon.ok(&["attach", name]);
    }

    /// The same, to be attached later.
    pub(crate) fn define(&self, daemon: &Daemon, name: &str, key: &str) {
        daemon.create("made", "8M", key);
        self.put(&daemon.backing("made"));
        daemon.ok(&["volume", "forget", "made"]);
        let definition = daemon.dir.path().join(format!("volumes.d/{name}.toml"));
        std::fs::write(definition, format!("backing = \"{}\"\n", self.path().display())).unwrap();
    }

    /// Copies a volume there: the size of the file that nbdfuse shows cannot be changed.
    pub(crate) fn put(&self, volume: &Path) {
        run(Command::new("dd")
            .args(["conv=notrunc", "bs=1M", "status=none"])
            .arg(format!("if={}", volume.display()))
            .arg(format!("of={}", self.path().display())));
    }

    pub(crate) fn signal(&self, signal: &str) {
        send(signal, self.nbdkit.0.id());
    }

    /// The same for what shows it as a file: that cannot even be opened while it is stopped.
    pub(crate) fn signal_file(&self, signal: &str) {
        send(signal, self.file.as_ref().unwrap().pid());
    }
}

fn send(signal: &str, pid: u32) {
    run(Command::new("kill").args([signal, &pid.to_string()]));
    if signal == "-STOP" {
        // It takes effect thread by thread.
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
            stat.is_ok_and(|stat| stat.contains(") T "))
        };
        until("it has stopped", || {
            std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(stopped)
        });
    }
}

/// A client of the volume `v` whose request the store does not answer.
pub(crate) fn a_request_that_hangs(daemon: &Daemon) -> Running {
    let client = Command::new("/usr/bin/python3")
        .args(["-u", "-m", "nbd", "-u", &daemon.uri("v"), "-c"])
        .arg("h.aio_pread(nbd.Buffer(65536), 0)\nwhile True: h.poll(-1)")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Running(client)
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        // So that the rest ends: the file, then nbdkit.
        self.signal("-CONT");
        self.signal_file("-CONT");
    }
}

#[test]
fn a_store_that_hangs_holds_neither_the_key_nor_a_client_back() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let daemon = Daemon::start();
    // It goes before the daemon, which could not end without it.
    let disk = HangingDisk::new();
    let key = daemon.key();
    disk.attach(&daemon, "v", &key);
    let uri = daemon.uri("v");
    nbdsh(&uri, "h.pwrite(b'k' * 65536, 0)\nh.flush()");
    disk.signal("-STOP");
    // One request hangs in the store; the client says when, how it ended, and how the next ones did.
    let log = daemon.dir.path().join("client");
    let client = Command::new("/usr/bin/python3")
        .args(["-u", "-m", "nbd", "-u", &uri, "-c"])
        .arg(
            "buffer = nbd.Buffer.from_bytearray(b'n' * 65536)\n\
             cookie = h.aio_pwrite(buffer, 1 << 20)\n\
             print('sent', flush=True)\n\
             try:\n    \
                 while not h.aio_command_completed(cookie): h.poll(-1)\n\
             except nbd.Error as error: print('first', error.errno, flush=True)\n\
             for _ in range(3):\n    \
                 try: h.pread(4096, 0)\n    \
                 except nbd.Error as error: print('then', error.errno, flush=True)",
        )
        .stdin(Stdio::null())
        .stdout(File::create(&log).unwrap())
        .stderr(File::options().append(true).create(true).open(&log).unwrap())
        .spawn()
        .unwrap();
    let mut client = Running(client);
    let said = || std::fs::read_to_string(&log).unwrap();
    until("the client has sent its request", || said().contains("sent"));
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    until("the key is destroyed", || daemon.log().contains("the key is destroyed"));
    until("the client has its answers", || client.0.try_wait().unwrap().is_some());
    let answers = said();
    assert!(answers.contains("first EPERM"), "{answers}");
    assert_eq!(answers.matches("then EPERM").count(), 3, "the store still hangs: {answers}");
    disk.signal("-CONT");
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the volume is served again", || daemon.state("v") == "serving");
    nbdsh(&uri, "assert h.pread(65536, 0) == b'k' * 65536\nh.flush()");
    daemon.ok(&["detach", "v"]);
}

#[test]
fn a_key_that_is_denied_during_a_detach_is_destroyed_in_time_though_the_store_hangs() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let disk = HangingDisk::new();
    let daemon = Daemon::start();
    let key = daemon.key();
    disk.attach(&daemon, "v", &key);
    disk.signal("-STOP");
    let _client = a_request_that_hangs(&daemon);
    let address = address(&daemon);
    // Whoever asks for the status of what is detached reads its header, from a store that hangs.
    let metric = |sample: &str| value(&scrape(&address), sample);
    until("a request hangs in the store", || metric("byokd_io_in_flight{volume=\"v\"}") > 0.0);
    std::thread::scope(|scope| {
        let detach = scope.spawn(|| daemon.ctl(&["detach", "v"]));
        let state = "byokd_volume_state{volume=\"v\",state=\"detaching\"}";
        until("it waits for the request", || metric(state) > 0.0);
        daemon.ok(&["dev", "key", "disable", &key]);
        let denied = Instant::now();
        until("the key is destroyed", || daemon.log().contains("fenced: the key is destroyed"));
        // The probe interval, a tenth, and 2 s; the request is waited for for 10 s.
        assert!(denied.elapsed() < Duration::from_millis(3300), "{:?}", denied.elapsed());
        disk.signal("-CONT");
        detach.join().unwrap();
    });
    assert_eq!(daemon.state("v"), "detached");
}

/// A disk in `$dir/image` that hangs where data lies as long as there is a file `$dir/hang`.
const HANGS_AT_DATA: &str = r#"
dir=$(dirname "$0")
case "$1" in
    get_size) stat -c %s "$dir/image" ;;
    can_write) exit 0 ;;
    pread)
        if [ "$4" -ge 16777216 ] && [ -e "$dir/hang" ]; then
            : >"$dir/hangs"
            while [ -e "$dir/hang" ]; do sleep 0.05; done
        fi
        dd "if=$dir/image" iflag=skip_bytes,count_bytes "skip=$4" "count=$3" status=none ;;
    pwrite) dd "of=$dir/image" oflag=seek_bytes "seek=$4" conv=notrunc status=none ;;
    *) exit 2 ;;
esac
"#;

#[test]
fn a_store_that_hangs_at_attach_does_so_before_kms_is_asked_for_the_key() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.create("v", "8M", customer.key.as_str());
    let dir = tempfile::tempdir().unwrap();
    std::fs::rename(daemon.backing("v"), dir.path().join("image"))
        .or_else(|_| std::fs::copy(daemon.backing("v"), dir.path().join("image")).map(drop))
        .unwrap();
    let (script, socket) = (dir.path().join("disk.sh"), dir.path().join("socket"));
    std::fs::write(&script, HANGS_AT_DATA).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["--foreground", "--unix"]).arg(&socket).arg("sh").arg(&script);
    let _nbdkit = Running(nbdkit.stdin(Stdio::null()).spawn().unwrap());
    until("nbdkit listens", || socket.exists());
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let file = NbdFile::new(&uri, &dir.path().join("fuse"));
    let definition = daemon.dir.path().join("volumes.d/v.toml");
    std::fs::write(definition, format!("backing = \"{}\"\n", file.path().display())).unwrap();
    let hang = tempfile::Builder::new().prefix("hang").rand_bytes(0).tempfile_in(dir.path());
    let hang = hang.unwrap();
    let asked = || customer.kms.requests().len();
    let before = asked();
    std::thread::scope(|scope| {
        // It goes with the scope, so that nothing hangs for ever.
        let hang = hang;
        let attach = scope.spawn(|| daemon.ctl(&["attach", "v"]));
        until("the store hangs", || dir.path().join("hangs").exists());
        let meanwhile = asked();
        hang.close().unwrap();
        let (code, answer) = attach.join().unwrap();
        assert_eq!(code, 0, "{answer}");
        assert_eq!(meanwhile, before, "KMS was asked for a key that a store that hangs would keep");
    });
    assert!(asked() > before);
    daemon.ok(&["detach", "v"]);
}

#[test]
fn a_write_that_a_client_left_hanging_does_not_undo_what_comes_after_it() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let daemon = Daemon::start();
    let disk = HangingDisk::new();
    disk.attach(&daemon, "v", &daemon.key());
    let socket = daemon.dir.path().join("nbd/v.sock");
    let mut gone = Raw::connected(&socket, "v");
    assert_eq!(gone.write(0, &[b'o'; 4096]), 0);
    disk.signal("-STOP");
    gone.send(&[request(0, WRITE, 1, 0, 4096), vec![b'a'; 4096]].concat());
    let taken = |n: u64| daemon.status("v")["connections"] == n;
    until("the client is there", || taken(1));
    drop(gone);
    let mut died = Raw::connected(&socket, "v");
    died.send(&[request(0, WRITE, 3, 0, 4096), vec![b'c'; 4096]].concat());
    daemon.says("an earlier connection left in the store");
    assert!(taken(2), "it counts while it waits");
    let mut next = Raw::connected(&socket, "v");
    next.send(&[request(0, WRITE, 2, 0, 4096), vec![b'b'; 4096]].concat());
    until("all wait", || taken(3));
    drop(died);
    disk.signal("-CONT");
    assert_eq!(next.simple_reply(2), 0);
    until("the others have gone", || taken(1));
    assert!(next.read(0, 4096) == [b'b'; 4096]);
}

/// A client that has gone may not even have begun what it sent when the next one comes.
#[test]
fn nothing_of_a_client_that_has_gone_is_begun_after_what_a_later_one_wrote() {
    if !can_mount(&["nbdkit"]) {
        return;
    }
    let daemon = Daemon::start();
    let disk = HangingDisk::new();
    disk.define(&daemon, "v", &daemon.key());
    let definition = format!("backing = \"{}\"\ndirect = \"off\"\n", disk.path().display());
    std::fs::write(daemon.dir.path().join("volumes.d/v.toml"), definition).unwrap();
    daemon.ok(&["attach", "v"]);
    let socket = daemon.dir.path().join("nbd/v.sock");
    // The page cache lies between: the store is opened again for each client, which waits for that.
    disk.signal_file("-STOP");
    let write = |byte| [request(0, WRITE, 1, 0, 4096), vec![byte; 4096]].concat();
    let mut gone = Raw::connected(&socket, "v");
    gone.send(&write(b'a'));
    let connected = |n: u64| daemon.status("v")["connections"] == n;
    until("the client is there", || connected(1));
    drop(gone);
    let mut later = Raw::connected(&socket, "v");
    later.send(&write(b'b'));
    daemon.says("an earlier connection left in the store");
    disk.signal_file("-CONT");
    assert_eq!(later.simple_reply(1), 0);
    assert!(connected(1), "what was before it has ended");
    assert!(later.read(0, 4096) == [b'b'; 4096]);
}

#[test]
fn tcp_serves_this_machine_alone_if_it_is_asked_to() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let customer = Daemon::start();
    let endpoint = std::fs::read_to_string(customer.dir.path().join("kms-endpoint")).unwrap();
    let daemon = Daemon::configured(&format!(
        "tcp_listen = \"{free}\"\n[kms]\nregion = \"eu-central-1\"\nendpoint = \"{}\"\n",
        endpoint.trim()
    ));
    let key = customer.key();
    daemon.volume("v", "8M", &key);
    daemon.volume("w", "8M", &key);
    let listed =
        run(Command::new("nbdinfo").args(["--list", "--json"]).arg(format!("nbd://{free}")));
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let names: Vec<_> =
        listed["exports"].as_array().unwrap().iter().map(|e| e["export-name"].clone()).collect();
    assert_eq!(names, ["v", "w"]);
    nbdsh(&format!("nbd://{free}/w"), "h.pwrite(b'w', 0)\nassert h.pread(1, 0) == b'w'");
    daemon.ok(&["detach", "w"]);
    assert!(
        !output(python_nbd().args(["-u", &format!("nbd://{free}/w"), "-c", "pass"]))
            .status
            .success()
    );
}

#[test]
fn a_socket_serves_only_whom_its_definition_names() {
    if !have(&["nbdsh", "setpriv"]) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "becoming another user needs root");
        println!("skipped: becoming another user needs root");
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    std::fs::set_permissions(daemon.dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    daemon.create("v", "8M", &key);
    let uri = daemon.uri("v");
    let socket = daemon.dir.path().join("nbd/v.sock");
    let as_nobody = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]);
        command.args(["/usr/bin/python3", "-m", "nbd", "-u", &uri, "-c", "h.pread(512, 0)"]);
        output(&mut command)
    };
    let mode = || std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    daemon.ok(&["attach", "v"]);
    assert_eq!(mode(), 0o660);
    let refused = as_nobody();
    assert!(!refused.status.success(), "a stranger is refused");
    // Also when the socket was opened to everybody: the peer's credentials decide.
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    assert!(!as_nobody().status.success(), "a stranger is refused by the daemon");
    daemon.says("refused");
    daemon.ok(&["detach", "v"]);
    let definition = daemon.dir.path().join("volumes.d/v.toml");
    let mut text = std::fs::read_to_string(&definition).unwrap();
    text.push_str("group = \"nogroup\"\n");
    std::fs::write(&definition, text).unwrap();
    daemon.ok(&["attach", "v"]);
    let served = as_nobody();
    assert!(served.status.success(), "{}", String::from_utf8_lossy(&served.stderr));
}

#[test]
fn a_store_that_fails_for_a_moment_is_tried_again_and_one_that_goes_on_is_an_error() {
    if !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let daemon = Daemon::start();
    // It goes before the daemon, which could not end without it.
    let disk = HangingDisk::new();
    let key = daemon.key();
    disk.attach(&daemon, "v", &key);
    let uri = daemon.uri("v");
    // Beyond what the page cache could hold of it.
    let work = "h.pwrite(b'r' * 65536, {0})\nassert h.pread(65536, {0}) == b'r' * 65536\n\
                h.pwrite(b's' * 100, {0} + 70000)\nassert h.pread(100, {0} + 70000) == b's' * 100";
    nbdsh(&uri, &work.replace("{0}", "0"));
    disk.fail(true);
    std::thread::scope(|scope| {
        let (uri, work) = (&uri, work.replace("{0}", "(1 << 20)"));
        let client = scope.spawn(move || nbdsh(uri, &work));
        until("the store has failed", || daemon.log().contains("trying again"));
        disk.fail(false);
        client.join().unwrap();
    });
    assert_eq!(daemon.status("v")["failed_requests"], 0);
    disk.fail(true);
    nbdsh(
        &uri,
        "import time\nbegan = time.monotonic()\n\
         try:\n    h.pread(4096, 3 << 20)\n    assert False, 'it cannot be read'\n\
         except nbd.Error as error:\n    assert error.errno == 'EIO', error\n\
         assert 1 < time.monotonic() - began < 5",
    );
    // Many at once wait side by side.
    nbdsh(
        &uri,
        "import time\nbegan = time.monotonic()\n\
         ended = []\n\
         for i in range(32):\n    \
             h.aio_pread(nbd.Buffer(4096), (4 << 20) + i * 65536, lambda e: ended.append(e.value) or 1)\n\
         while len(ended) < 32: h.poll(-1)\n\
         assert set(ended) == {5}, ended\n\
         assert 1 < time.monotonic() - began < 5, time.monotonic() - began",
    );
    disk.fail(false);
    nbdsh(&uri, "h.pread(4096, 3 << 20)");
    daemon.ok(&["detach", "v"]);
}

#[test]
fn each_client_is_told_that_what_it_wrote_is_not_on_the_store() {
    if !can_mount(&["nbdkit"]) {
        return;
    }
    let daemon = Daemon::start();
    let disk = HangingDisk::new();
    disk.define(&daemon, "v", &daemon.key());
    let device = LoopDevice::new(&disk.path(), &[]);
    // The kernel keeps what is written, and writes it when it is flushed.
    daemon.define("v", &format!("backing = \"{}\"\ndirect = \"off\"", device.path()));
    daemon.ok(&["attach", "v"]);
    let socket = daemon.dir.path().join("nbd/v.sock");
    let mut clients = [0, 1 << 20].map(|at| (at, Raw::connected(&socket, "v")));
    let write = |(at, client): &mut (u64, Raw)| client.write(*at, &[b'w'; 65536]);
    let flush = |(_, client): &mut (u64, Raw)| client.command(0, FLUSH, 0, 0);
    assert_eq!(clients.each_mut().map(write), [0, 0]);
    assert_eq!(clients.each_mut().map(flush), [0, 0]);
    disk.fail(true);
    assert_eq!(clients.each_mut().map(write), [0, 0], "it is kept");
    assert_eq!(clients.each_mut().map(flush), [5, 5], "EIO, to whoever wrote");
    disk.fail(false);
    assert_eq!(clients.each_mut().map(write), [0, 0]);
    assert_eq!(clients.each_mut().map(flush), [0, 0]);
    drop(clients);
    // How the last flush ends is not this test's.
    let _detached = daemon.ctl(&["detach", "v"]);
    until("it is detached", || daemon.state("v") == "detached");
}
