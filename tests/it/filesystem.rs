//! A real file system with a real database on an encrypted volume: in peace, and with the key taken
//! away in the middle of its work.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::mounts::{Disk, Mount, can_mount};
use crate::support::{Daemon, Running, output, run, until};

#[derive(Clone, Copy, PartialEq)]
enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    fn tools(self) -> [&'static str; 3] {
        match self {
            Self::Ext4 => ["mkfs.ext4", "e2fsck", "db_bench"],
            Self::Xfs => ["mkfs.xfs", "xfs_repair", "db_bench"],
        }
    }

    fn make(self, disk: &Disk) {
        let (program, quiet) = match self {
            Self::Ext4 => ("mkfs.ext4", "-q"),
            Self::Xfs => ("mkfs.xfs", "-q"),
        };
        run(Command::new(program).arg(quiet).arg(disk.device()));
    }

    /// What a machine does after a crash, and nothing more: the journal is replayed.
    fn recover(self, disk: &Disk, dir: &Path) {
        match self {
            Self::Ext4 => {
                let checked = output(Command::new("e2fsck").args(["-p", disk.device()]));
                let code = checked.status.code();
                assert!(matches!(code, Some(0 | 1)), "only the journal is repaired: {checked:?}");
            }
            Self::Xfs => drop(Mount::new(disk, dir)),
        }
    }

    fn is_clean(self, disk: &Disk) {
        match self {
            Self::Ext4 => run(Command::new("e2fsck").args(["-fn", disk.device()])),
            Self::Xfs => run(Command::new("xfs_repair").args(["-n", disk.device()])),
        };
    }
}

/// RocksDB's own load, with every write synced.
fn database(dir: &Path, benchmarks: &str, keys: u32) -> Command {
    let mut command = Command::new("db_bench");
    command
        .arg(format!("--db={}", dir.join("db").display()))
        .arg(format!("--benchmarks={benchmarks}"))
        .arg(format!("--num={keys}"))
        .args(["--sync=1", "--value_size=400", "--compression_type=none", "--threads=2"])
        .args(["--write_buffer_size=1048576", "--target_file_size_base=1048576"])
        .stdin(Stdio::null());
    command
}

fn all_keys_are_there(dir: &Path, keys: u32) {
    let said = run(database(dir, "readseq,readrandom", keys)
        .args(["--use_existing_db=1", "--verify_checksum=1"]));
    let found = said.lines().find(|line| line.contains(" found)")).expect("readrandom's result");
    let counts: Vec<u64> = found.split(['(', ' ']).filter_map(|word| word.parse().ok()).collect();
    let [.., found_keys, asked] = counts[..] else { panic!("{found}") };
    assert_eq!(found_keys, asked, "{found}");
}

fn a_database_lives_on(file_system: FileSystem, daemon: &Daemon) {
    const KEYS: u32 = 2000;
    let key = daemon.key();
    daemon.volume("v", "400M", &key);
    let (nbd, mnt) = (daemon.dir.path().join("nbdfuse"), daemon.dir.path().join("mnt"));
    {
        let disk = Disk::new(&daemon.uri("v"), &nbd);
        file_system.make(&disk);
        let mount = Mount::new(&disk, &mnt);
        run(database(mount.path(), "fillseq,overwrite", KEYS).arg("--disable_wal=0"));
        all_keys_are_there(mount.path(), KEYS);
    }
    daemon.ok(&["detach", "v"]);
    daemon.ok(&["attach", "v"]);
    let disk = Disk::new(&daemon.uri("v"), &nbd);
    file_system.is_clean(&disk);
    let mount = Mount::new(&disk, &mnt);
    all_keys_are_there(mount.path(), KEYS);
}

#[test]
fn rocksdb_lives_on_ext4_on_a_disk() {
    if can_mount(&FileSystem::Ext4.tools()) {
        a_database_lives_on(FileSystem::Ext4, &Daemon::start_on_disk());
    }
}

#[test]
fn rocksdb_lives_on_xfs() {
    if can_mount(&FileSystem::Xfs.tools()) {
        a_database_lives_on(FileSystem::Xfs, &Daemon::start());
    }
}

const RECORD: usize = 4096;

/// A record that says which it is in every word.
fn record(number: u64) -> Vec<u8> {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(RECORD / 8)
}

/// Appends records, each synced before the next, until that fails; how many were acknowledged.
fn append_until_it_fails(file: &Path, acknowledged: &AtomicU64) -> std::io::Error {
    let mut file = match File::create(file) {
        Ok(file) => file,
        Err(error) => return error,
    };
    loop {
        let next = acknowledged.load(Ordering::Relaxed);
        if let Err(error) = file.write_all(&record(next)).and_then(|()| file.sync_data()) {
            return error;
        }
        acknowledged.store(next + 1, Ordering::Relaxed);
    }
}

fn the_key_is_denied_in_the_middle(file_system: FileSystem, daemon: &Daemon, words: [&str; 2]) {
    let key = daemon.key();
    daemon.volume("v", "400M", &key);
    let (nbd, mnt) = (daemon.dir.path().join("nbdfuse"), daemon.dir.path().join("mnt"));
    let acknowledged = AtomicU64::new(0);
    {
        let disk = Disk::new(&daemon.uri("v"), &nbd);
        file_system.make(&disk);
        let mount = Mount::new(&disk, &mnt);
        let log = File::create(daemon.dir.path().join("db_bench.log")).unwrap();
        let load = database(mount.path(), "fillrandom", 10_000_000)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let mut load = Running(load.unwrap());
        let failed = std::thread::scope(|scope| {
            let records = mount.path().join("records");
            let writer = scope.spawn(|| append_until_it_fails(&{ records }, &acknowledged));
            until("records are acknowledged", || {
                assert!(!writer.is_finished(), "the writer goes on");
                acknowledged.load(Ordering::Relaxed) >= 200
            });
            daemon.ok(&["dev", "key", words[0], &key]);
            let denied = Instant::now();
            until("the volume is fenced", || daemon.state("v") == "fenced");
            let took = denied.elapsed();
            assert!(took < Duration::from_millis(3300), "within the interval and 2 s: {took:?}");
            until("the writer is told", || writer.is_finished());
            writer.join().unwrap()
        });
        assert!(failed.raw_os_error().is_some(), "an error of the system: {failed}");
        let ended = load.ends("the database gives up");
        assert!(!ended.success(), "{ended}");
        // The file system, the disk and nbdfuse go without help: nothing hangs in them.
    }
    daemon.ok(&["dev", "key", words[1], &key]);
    until("the volume is served again", || daemon.state("v") == "serving");
    let disk = Disk::new(&daemon.uri("v"), &nbd);
    file_system.recover(&disk, &mnt);
    file_system.is_clean(&disk);
    let mount = Mount::new(&disk, &mnt);
    let count = acknowledged.load(Ordering::Relaxed);
    let mut records = File::open(mount.path().join("records")).unwrap();
    let mut found = vec![0; RECORD];
    for number in 0..count {
        records.read_exact(&mut found).unwrap();
        assert!(found == record(number), "acknowledged record {number} of {count} is intact");
    }
    let reads = database(mount.path(), "readseq", 1000);
    run({ reads }.args(["--use_existing_db=1", "--verify_checksum=1"]));
}

#[test]
fn what_ext4_acknowledged_survives_a_denial_in_the_middle_of_a_load() {
    if can_mount(&FileSystem::Ext4.tools()) {
        let daemon = Daemon::start();
        the_key_is_denied_in_the_middle(FileSystem::Ext4, &daemon, ["deny", "allow"]);
    }
}

#[test]
fn what_xfs_acknowledged_survives_a_disabled_key_in_the_middle_of_a_load() {
    if can_mount(&FileSystem::Xfs.tools()) {
        let daemon = Daemon::start_on_disk();
        the_key_is_denied_in_the_middle(FileSystem::Xfs, &daemon, ["disable", "enable"]);
    }
}
