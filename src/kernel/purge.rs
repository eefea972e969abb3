//! What is done about plaintext that the node caches, one step at a time.
//!
//! A step tries everything it has to do, whatever fails, and says what became of each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions, read_to_string};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use rustix::process::{Signal, pidfd_send_signal};

use super::holders::{program, users};
use super::mounts::{Mount, mounts};
use super::sysfs::{Block, stack};
use super::{PurgeStep, Told, ioctl};

/// Does one step for a disk and what is made of it.
pub(super) fn purge(disk: &str, step: PurgeStep) -> Told {
    let mut outcome = Outcome::default();
    if stack(disk).is_empty() {
        outcome.failed.push(format!("/dev/{disk}: there is no such device"));
    }
    match step {
        PurgeStep::ShutDown => shut_down(disk, &mut outcome),
        PurgeStep::EndProcesses => end_processes(disk, &mut outcome),
        PurgeStep::EndGroups => end_groups(disk, &mut outcome),
        PurgeStep::Unmount => unmount(disk, &mut outcome),
        PurgeStep::FlushDevice => flush_device(disk, &mut outcome),
        PurgeStep::DropCaches => {
            let dropped = std::fs::write("/proc/sys/vm/drop_caches", "1");
            outcome.add("clean pages of the node".to_owned(), dropped);
        }
    }
    Told::Purged { what: outcome.done, failed: outcome.failed }
}

/// Which mounted file systems of a disk work, and which do not: one that was shut down, or that
/// gave up after an error, refuses to sync its top directory. Of one that another mount lies over,
/// nothing is said.
pub(super) fn damaged(disk: &str) -> Told {
    let (mut what, mut failed) = (Vec::new(), Vec::new());
    for mount in mounts(&stack(disk)) {
        let Ok(held) = mount.hold() else { continue };
        let synced = held.open().and_then(|top| top.sync_all());
        let found = if synced.is_ok() { &mut what } else { &mut failed };
        found.push(format!("{} {}", mount.block, mount.point.display()));
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

/// Each file system once: its mounts share it, and any of them will do.
fn shut_down(disk: &str, outcome: &mut Outcome) {
    let blocks = stack(disk);
    let mounts = mounts(&blocks);
    let mut systems: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for mount in &mounts {
        systems.entry(&mount.device).or_default().push(mount);
    }
    for mounts in systems.values() {
        let mut refused = Outcome::default();
        for mount in mounts {
            let what = format!("file system on {}", mount.path().display());
            let result = mount.hold().and_then(|held| held.open());
            match result.and_then(|top| ioctl::shut_down_file_system(&top)) {
                Ok(()) => {
                    outcome.done.push(what);
                    refused.failed.clear();
                    break;
                }
                Err(error) => refused.add(what, Err(error)),
            }
        }
        outcome.failed.append(&mut refused.failed);
    }
    outcome.failed.extend(out_of_reach(disk, &blocks, &mounts, is_claimed));
}

/// Devices whose plaintext may be cached by what no mount leads to.
fn out_of_reach(
    disk: &str,
    blocks: &[Block],
    mounts: &[Mount],
    is_claimed: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mounted = |block: &Block| mounts.iter().any(|mount| mount.block == block.name);
    let unmounted = blocks.iter().filter(|block| block.last && !mounted(block));
    let why = |block: &Block| {
        let path = block.path();
        if block.made {
            Some(format!("{path}, which is made of /dev/{disk}: no file system of it is mounted"))
        } else {
            is_claimed(&path)
                .then(|| format!("{path} is in use, but no file system of it is mounted"))
        }
    };
    unmounted.filter_map(why).collect()
}

/// Whether a file system, swap or somebody else has a block device for himself alone.
fn is_claimed(path: &str) -> bool {
    // Without O_CREAT, O_EXCL of a block device asks just that.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

fn end_processes(disk: &str, outcome: &mut Outcome) {
    for user in users(disk) {
        let what = format!("{} (pid {})", program(user.pid).unwrap_or_default(), user.pid);
        let ended = pidfd_send_signal(&user.process, Signal::KILL).map_err(io::Error::from);
        outcome.add(what, ended);
    }
}

fn end_groups(disk: &str, outcome: &mut Outcome) {
    // Ending a group ends those below it. The first process and ourselves run in no pod.
    let spared = ["1", "self"].map(group_of);
    let groups: BTreeSet<_> = users(disk)
        .into_iter()
        .filter_map(|user| group_of(&user.pid.to_string()).filter(|_| user.lives()))
        .collect();
    for group in groups {
        let what = format!("control group {}", group.display());
        if spared.iter().flatten().any(|spared| spared.starts_with(&group)) {
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

/// The newest first, which lie over others; again as long as that uncovers one.
fn unmount(disk: &str, outcome: &mut Outcome) {
    let blocks = stack(disk);
    for _ in 0..MOST_ROUNDS {
        let mut refused = Outcome::default();
        let before = outcome.done.len();
        for mount in mounts(&blocks).iter().rev() {
            let what = format!("mount on {}", mount.path().display());
            match mount.hold().and_then(|held| held.unmount()) {
                Ok(()) => outcome.done.push(what),
                Err(error) => refused.add(what, Err(error)),
            }
        }
        // Unmounting one may have taken others with it: only a round that did nothing says what
        // cannot be done.
        if outcome.done.len() == before {
            outcome.failed.append(&mut refused.failed);
            return;
        }
    }
}

/// More than mounts of one device are stacked on a node.
const MOST_ROUNDS: usize = 1024;

/// What is made of the disk first: dropping that may write to the disk.
fn flush_device(disk: &str, outcome: &mut Outcome) {
    for path in stack(disk).iter().rev().map(Block::path) {
        let opened = File::open(&path);
        let result = opened.and_then(|device| {
            ioctl::flush_buffers(&device)?;
            posix_fadvise(&device, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .map_err(io::Error::from)
        });
        outcome.add(format!("cache of {path}"), result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_made_of_the_volume_without_a_file_system_to_shut_down_is_a_failure() {
        let block = |name: &str, made, last| {
            let (name, number) = (name.to_owned(), String::new());
            Block { name, number, made, last }
        };
        let blocks = [
            block("nbd0", false, false),
            block("nbd0p1", false, true),
            block("nbd0p2", false, false),
            block("dm-0", true, true),
            block("dm-1", true, true),
        ];
        let (id, seen_by, device) = (1, None, String::new());
        let mount = Mount { id, seen_by, point: "/data".into(), device, block: "dm-1".into() };
        let told = out_of_reach("nbd0", &blocks, &[mount], |_| false);
        assert!(told.len() == 1 && told[0].starts_with("/dev/dm-0,"), "{told:?}");
        let told = out_of_reach("nbd0", &blocks[..2], &[], |path| path == "/dev/nbd0p1");
        assert!(told.len() == 1 && told[0].starts_with("/dev/nbd0p1 is in use"), "{told:?}");
    }
}
