//! Who has a device in use: mounts in every mount namespace, swap, devices made of it, open
//! descriptors, and mappings of files on it.
//!
//! A process is told by the numbers of devices and mounts, never by paths: the same path is another
//! file system in another mount namespace.

use std::collections::BTreeSet;
use std::fs::{read_dir, read_link, read_to_string};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{FileType, Statx};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::mounts::{look, mount_id, mounts, open_path, processes};
use super::sysfs::{self, Block};
use super::{HeldBy, Holder};

/// Everybody who has the device, its partitions, or what is made of them in use.
pub(super) fn holders(disk: &str, mapped: bool) -> Vec<Holder> {
    let blocks = sysfs::stack(disk);
    let mounts = mounts(&blocks);
    let devices = mounts.iter().map(|mount| &mount.device);
    let numbers: BTreeSet<_> =
        blocks.iter().map(|block| &block.number).chain(devices).cloned().collect();
    let mut places = BTreeSet::new();
    let mut found: Vec<_> = mounts
        .iter()
        // What is mounted here is seen by every service with a namespace of its own.
        .filter(|mount| places.insert((&mount.device, &mount.point)))
        .map(|mount| Holder {
            by: HeldBy::Mount,
            what: mount.point.display().to_string(),
            pid: mount.seen_by,
            program: mount.seen_by.and_then(program),
        })
        .collect();
    let swaps = read_to_string("/proc/swaps").unwrap_or_default();
    let by = |by, what: String| Holder { by, what, pid: None, program: None };
    found.extend(blocks.iter().filter_map(|block| {
        let path = block.path();
        swaps_name(&swaps, &path).then(|| by(HeldBy::Swap, path))
    }));
    found.extend(
        blocks.iter().filter(|block| block.made).map(|block| by(HeldBy::Device, block.path())),
    );
    for pid in processes() {
        found.extend(opened(pid, &blocks));
        if mapped {
            found.extend(mappings(pid, &numbers));
        }
    }
    found
}

/// Whether `/proc/swaps` has the device.
fn swaps_name(table: &str, path: &str) -> bool {
    table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(|p| p == path)
}

pub(super) fn program(pid: i32) -> Option<String> {
    Some(read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

/// Descriptors of a process that are one of the devices itself.
fn opened(pid: i32, blocks: &[Block]) -> Vec<Holder> {
    let mut found = BTreeSet::new();
    for fd in descriptors(pid) {
        let link = PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
        let number = look(link.clone()).and_then(|meta| block_number(&meta));
        if number.is_some_and(|number| blocks.iter().any(|block| block.number == number)) {
            found.insert(read_link(link).unwrap_or_default().display().to_string());
        }
    }
    let holder = |what| Holder { by: HeldBy::Process, what, pid: Some(pid), program: program(pid) };
    found.into_iter().map(holder).collect()
}

fn descriptors(pid: i32) -> impl Iterator<Item = String> {
    let entries = read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// The number of a block device, if it is one.
fn block_number(meta: &Statx) -> Option<String> {
    (FileType::from_raw_mode(meta.stx_mode.into()) == FileType::BlockDevice)
        .then(|| format!("{}:{}", meta.stx_rdev_major, meta.stx_rdev_minor))
}

/// Files on the devices that a process has mapped.
fn mappings(pid: i32, numbers: &BTreeSet<String>) -> Vec<Holder> {
    let table = read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let on_them = mapped_files(&table).filter(|(number, _)| numbers.contains(number));
    let files: BTreeSet<_> = on_them.map(|(_, file)| file).collect();
    let holder = |what: &str| Holder {
        by: HeldBy::Mapping,
        what: what.to_owned(),
        pid: Some(pid),
        program: program(pid),
    };
    files.into_iter().map(holder).collect()
}

/// Files of a maps table (proc(5)), each with the number of its file system. Their numbers are
/// hexadecimal there.
fn mapped_files(table: &str) -> impl Iterator<Item = (String, &str)> {
    table.lines().filter_map(|line| {
        let mut fields = line.splitn(6, ' ');
        let (major, minor) = fields.nth(3)?.split_once(':')?;
        let decimal = |hex| u32::from_str_radix(hex, 16).ok();
        let device = format!("{}:{}", decimal(major)?, decimal(minor)?);
        let _inode = fields.next()?;
        Some((device, fields.next().unwrap_or_default().trim_start()))
    })
}

/// A process that uses a file system or a device, and stays the one that is meant.
pub(super) struct User {
    pub(super) pid: i32,
    /// Ends with the process: another of the same number is not meant.
    pub(super) process: OwnedFd,
}

impl User {
    /// What was read of `/proc/PID` before this says yes was read of this process.
    pub(super) fn lives(&self) -> bool {
        let mut ended = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        poll(&mut ended, PollTimeout::ZERO) == Ok(0)
    }
}

/// Processes that hold a file system on the device: a file of it open or mapped, or standing in it;
/// or the device itself. Never the first process, ourselves, or a thread of the kernel.
pub(super) fn users(disk: &str) -> Vec<User> {
    let blocks = sysfs::stack(disk);
    let own = std::process::id();
    let others = processes().into_iter().filter(|pid| *pid != 1 && u32::try_from(*pid) != Ok(own));
    let before = marks(&blocks);
    let using: Vec<_> = others
        .filter(|pid| {
            read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !is_kernel_thread(&stat))
        })
        .filter_map(|pid| {
            let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
            let touched: BTreeSet<_> = touched(pid).intersection(&before).cloned().collect();
            (!touched.is_empty()).then_some((User { pid, process }, touched))
        })
        .collect();
    // The kernel gives numbers of mounts again: what counts is what was one both times.
    let after = marks(&blocks);
    let still = |(user, touched): (User, BTreeSet<Mark>)| {
        (!touched.is_disjoint(&after) && user.lives()).then_some(user)
    };
    using.into_iter().filter_map(still).collect()
}

/// Tells a file system, a mount of it, or a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    /// `major:minor`.
    Device(String),
    /// The kernel's number.
    Mount(u64),
}

/// What is on the devices.
fn marks(blocks: &[Block]) -> BTreeSet<Mark> {
    let mounts = mounts(blocks);
    let numbers = blocks.iter().map(|block| &block.number);
    let numbers = numbers.chain(mounts.iter().map(|mount| &mount.device));
    let numbers: BTreeSet<_> = numbers.cloned().map(Mark::Device).collect();
    numbers.into_iter().chain(mounts.iter().map(|mount| Mark::Mount(mount.id))).collect()
}

/// What a process has open or mapped, and where it stands. A file system that is shut down may
/// refuse to say its device; the number of the mount the kernel always knows.
fn touched(pid: i32) -> BTreeSet<Mark> {
    let mut found = BTreeSet::new();
    let mut add = |link: &Path, fdinfo: &str| {
        found.extend(mount_id(fdinfo).map(Mark::Mount));
        if let Some(meta) = look(link.to_owned()) {
            found.extend(block_number(&meta).map(Mark::Device));
            found.insert(Mark::Device(format!("{}:{}", meta.stx_dev_major, meta.stx_dev_minor)));
        }
    };
    for fd in descriptors(pid) {
        add(Path::new(&format!("/proc/{pid}/fd/{fd}")), &format!("{pid}/fdinfo/{fd}"));
    }
    for place in ["cwd", "root"] {
        let link = PathBuf::from(format!("/proc/{pid}/{place}"));
        if let Ok(held) = open_path(&link) {
            let fdinfo = format!("self/fdinfo/{}", held.as_raw_fd());
            add(Path::new(&format!("/proc/self/fd/{}", held.as_raw_fd())), &fdinfo);
        }
    }
    let maps = read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    found.extend(mapped_files(&maps).map(|(number, _)| Mark::Device(number)));
    found
}

/// By the flags of its `stat` (proc(5)); its name may have any character.
fn is_kernel_thread(stat: &str) -> bool {
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6));
    let flags = flags.and_then(|flags| flags.parse::<u64>().ok());
    flags.is_none_or(|flags| flags & KERNEL_THREAD != 0)
}

/// `PF_KTHREAD` of the kernel's `sched.h`.
const KERNEL_THREAD: u64 = 0x0020_0000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_files_are_told_with_the_device_they_are_on() {
        let table = "7f1-7f2 r--s 00000000 2b:20 131   /mnt/a file\n\
                     7f2-7f3 rw-p 00000000 2b:00 132   /other\n\
                     7f3-7f4 rw-p 00000000 00:00 0 \n\
                     7f4-7f5 r--s 00001000 2b:20 131   /mnt/gone (deleted)\n";
        let on = |device: &str| {
            let of = mapped_files(table).filter(|(number, _)| number == device);
            of.map(|(_, file)| file).collect::<Vec<_>>()
        };
        assert_eq!(on("43:32"), ["/mnt/a file", "/mnt/gone (deleted)"]);
        assert_eq!(on("43:0"), ["/other"]);
    }

    #[test]
    fn swap_space_is_told_by_its_whole_name() {
        let table = "Filename\tType\n/dev/nbd10  partition 1 0 -2\n";
        assert!(swaps_name(table, "/dev/nbd10"));
        assert!(!swaps_name(table, "/dev/nbd1"));
    }

    #[test]
    fn threads_of_the_kernel_are_told_from_processes() {
        assert!(is_kernel_thread("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"));
        assert!(!is_kernel_thread("7 (a) b) (c) S 1 7 7 0 -1 4194560 0 0"));
        assert!(is_kernel_thread("7 (cut"), "what cannot be told is not ended");
    }
}
