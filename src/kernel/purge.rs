//! What is done about plaintext that the node caches, one step at a time.
//!
//! A step tries everything it has to do, whatever fails, and says what became of each.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, read_to_string};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::holders::{Mount, mounts, program, users};
use super::{PurgeStep, Told, ioctl, sysfs};

/// Does one step.
pub(super) fn purge(index: u32, step: PurgeStep) -> Told {
    let mut outcome = Outcome::default();
    match step {
        PurgeStep::ShutDown => shut_down(index, &mut outcome),
        PurgeStep::EndProcesses => end_processes(index, &mut outcome),
        PurgeStep::EndGroups => end_groups(index, &mut outcome),
        PurgeStep::Unmount => unmount(index, &mut outcome),
        PurgeStep::FlushDevice => flush_device(index, &mut outcome),
        PurgeStep::DropCaches => {
            let dropped = std::fs::write("/proc/sys/vm/drop_caches", "1");
            outcome.add("clean pages of the node".to_owned(), dropped);
        }
    }
    Told::Purged { what: outcome.done, failed: outcome.failed }
}

/// Which mounted file systems of a device work, and which do not: one that was shut down, or that
/// gave up after an error, refuses to sync its top directory.
pub(super) fn damaged(index: u32) -> Told {
    let (mut what, mut failed) = (Vec::new(), Vec::new());
    let parts = sysfs::parts(index);
    for mount in mounts(index) {
        let synced = File::open(mount.path()).and_then(|top| top.sync_all());
        let found = if synced.is_ok() { &mut what } else { &mut failed };
        let part = parts.iter().find(|(_, number)| *number == mount.device);
        let part = part.map(|(name, _)| name.as_str()).unwrap_or_default();
        found.push(format!("{part} {}", mount.point.display()));
    }
    failed.sort();
    failed.dedup();
    Told::Purged { what, failed }
}

#[derive(Default)]
struct Outcome {
    done: Vec<String>,
    failed: Vec<String>,
}

impl Outcome {
    fn add(&mut self, what: String, result: io::Result<()>) {
        match result {
            Ok(()) => self.done.push(what),
            Err(error) => self.failed.push(format!("{what}: {error}")),
        }
    }
}

/// Each file system once: its mounts share it.
fn shut_down(index: u32, outcome: &mut Outcome) {
    let mut done = BTreeSet::new();
    for mount in mounts(index) {
        if done.contains(&mount.device) {
            continue;
        }
        let path = mount.path();
        // No data of the file system is needed to open its top.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let result = opened.and_then(|file| ioctl::shut_down_file_system(&file));
        if result.is_ok() {
            done.insert(mount.device.clone());
        }
        outcome.add(format!("file system on {}", path.display()), result);
    }
}

fn end_processes(index: u32, outcome: &mut Outcome) {
    for pid in users(index) {
        let what = format!("{} (pid {pid})", program(pid).unwrap_or_default());
        let ended = kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(io::Error::from);
        outcome.add(what, ended);
    }
}

fn end_groups(index: u32, outcome: &mut Outcome) {
    let own = group_of("self");
    let groups: BTreeSet<_> =
        users(index).into_iter().filter_map(|pid| group_of(&pid.to_string())).collect();
    for group in groups {
        let what = format!("control group {}", group.display());
        // Whoever runs in the root group or in ours is no pod.
        if group == Path::new("/") || Some(&group) == own.as_ref() {
            outcome.add(what, Err(io::Error::other("not one to be ended")));
            continue;
        }
        let inside = group.strip_prefix("/").unwrap_or(&group);
        let path = Path::new("/sys/fs/cgroup").join(inside).join("cgroup.kill");
        outcome.add(what, std::fs::write(path, "1"));
    }
}

/// The control group (of the unified hierarchy) of a process.
fn group_of(pid: &str) -> Option<PathBuf> {
    let table = read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    table.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from)
}

fn unmount(index: u32, outcome: &mut Outcome) {
    // Unmounting one may take others with it.
    for _ in 0..MOST_ROUNDS {
        let left = mounts(index);
        let Some(first) = left.first() else { return };
        let result = unmount_one(first);
        let failed = result.is_err();
        outcome.add(format!("mount on {}", first.path().display()), result);
        if failed {
            return;
        }
    }
}

/// More mounts of one device than a node has.
const MOST_ROUNDS: usize = 1024;

fn unmount_one(mount: &Mount) -> io::Result<()> {
    let lazily = |point: &Path| umount2(point, MntFlags::MNT_DETACH).map_err(io::Error::from);
    let Some(pid) = mount.seen_by else { return lazily(&mount.point) };
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    let point = mount.point.clone();
    // A thread of its own: it does not come back from there.
    let inside = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS)?;
        setns(&namespace, CloneFlags::CLONE_NEWNS)?;
        umount2(&point, MntFlags::MNT_DETACH)
    });
    inside.join().unwrap_or(Err(nix::errno::Errno::EIO)).map_err(io::Error::from)
}

fn flush_device(index: u32, outcome: &mut Outcome) {
    for (name, _) in sysfs::parts(index) {
        let path = format!("/dev/{name}");
        let opened = File::open(&path);
        let result = opened.and_then(|device| {
            ioctl::flush_buffers(&device)?;
            posix_fadvise(&device, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .map_err(io::Error::from)
        });
        outcome.add(format!("cache of {path}"), result);
    }
}
