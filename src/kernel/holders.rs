//! Who has a device in use: mounts in every mount namespace, swap, devices made of it, open
//! descriptors, and mappings of files on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{read_link, read_to_string};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{HeldBy, Holder, sysfs};

/// One mount of a file system on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// A process that sees it; `None` if we see it ourselves.
    pub(super) seen_by: Option<i32>,
    /// Where, in that process's eyes.
    pub(super) point: PathBuf,
    /// `major:minor` of the device.
    pub(super) device: String,
}

impl Mount {
    /// The way to it from here.
    pub(super) fn path(&self) -> PathBuf {
        let Some(pid) = self.seen_by else { return self.point.clone() };
        let point = self.point.strip_prefix("/").unwrap_or(&self.point);
        Path::new("/proc").join(pid.to_string()).join("root").join(point)
    }
}

/// Everybody who has the device, or a partition of it, in use.
pub(super) fn holders(index: u32, mapped: bool) -> Vec<Holder> {
    let parts = sysfs::parts(index);
    let numbers: BTreeSet<_> = parts.iter().map(|(_, number)| number.clone()).collect();
    let mut places = BTreeSet::new();
    let mut found: Vec<_> = mounts(index)
        .into_iter()
        // What is mounted here is seen by every service with a namespace of its own.
        .filter(|mount| places.insert((mount.device.clone(), mount.point.clone())))
        .map(|mount| Holder {
            by: HeldBy::Mount,
            what: mount.point.display().to_string(),
            pid: mount.seen_by,
            program: mount.seen_by.and_then(program),
        })
        .collect();
    let swaps = read_to_string("/proc/swaps").unwrap_or_default();
    let by = |by, what: String| Holder { by, what, pid: None, program: None };
    found.extend(parts.iter().filter_map(|(name, _)| {
        let path = format!("/dev/{name}");
        swaps_name(&swaps, &path).then(|| by(HeldBy::Swap, path))
    }));
    found
        .extend(sysfs::made_of(index).into_iter().map(|d| by(HeldBy::Device, format!("/dev/{d}"))));
    for pid in processes() {
        found.extend(opened(pid, &numbers));
        if mapped {
            found.extend(mappings(pid, &numbers));
        }
    }
    found
}

/// Every mount of a file system on the device or its partitions; one for each mount namespace and
/// place.
pub(super) fn mounts(index: u32) -> Vec<Mount> {
    let numbers: BTreeSet<_> = sysfs::parts(index).into_iter().map(|(_, number)| number).collect();
    let mut namespaces = BTreeMap::new();
    let own = read_link("/proc/self/ns/mnt").ok();
    for pid in processes() {
        // Processes may end while they are looked at.
        if let Ok(namespace) = read_link(format!("/proc/{pid}/ns/mnt")) {
            namespaces.entry(namespace).or_insert(pid);
        }
    }
    let mut found = Vec::new();
    for (namespace, pid) in namespaces {
        let table = read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let seen_by = (Some(&namespace) != own.as_ref()).then_some(pid);
        for (device, point) in mountinfo(&table) {
            if numbers.contains(device) {
                found.push(Mount { seen_by, point, device: device.to_owned() });
            }
        }
    }
    // Our own first: what others see is often the same mount.
    found.sort_by_key(|mount| mount.seen_by);
    found
}

/// `major:minor` and mount point of each line of a mountinfo table (proc(5)).
fn mountinfo(table: &str) -> impl Iterator<Item = (&str, PathBuf)> {
    table.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (device, _root, point) = (fields.next()?, fields.next()?, fields.next()?);
        Some((device, PathBuf::from(unescape(point))))
    })
}

/// Blanks, tabs, newlines and backslashes are octal there.
fn unescape(text: &str) -> String {
    let mut plain = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) if byte == b'\\' => {
                plain.push(code);
                rest = &after[3..];
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// Whether `/proc/swaps` has the device.
fn swaps_name(table: &str, path: &str) -> bool {
    table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(|p| p == path)
}

pub(super) fn processes() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

pub(super) fn program(pid: i32) -> Option<String> {
    Some(read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

/// Descriptors of a process that are the device itself.
fn opened(pid: i32, numbers: &BTreeSet<String>) -> Vec<Holder> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut found = BTreeSet::new();
    for entry in entries {
        let Ok(target) = read_link(entry.path()) else { continue };
        // Asking what lies behind other links could wait for a dead network.
        if !target.starts_with("/dev") {
            continue;
        }
        if let Ok(meta) = std::fs::metadata(entry.path())
            && meta.file_type().is_block_device()
            && numbers.contains(&number(meta.rdev()))
        {
            found.insert(target.display().to_string());
        }
    }
    let holder = |what| Holder { by: HeldBy::Process, what, pid: Some(pid), program: program(pid) };
    found.into_iter().map(holder).collect()
}

/// `major:minor`.
fn number(device: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

/// Files on the device that a process has mapped.
fn mappings(pid: i32, numbers: &BTreeSet<String>) -> Vec<Holder> {
    let table = read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let files: BTreeSet<_> = mapped_files(&table, numbers).collect();
    let holder = |what: &str| Holder {
        by: HeldBy::Mapping,
        what: what.to_owned(),
        pid: Some(pid),
        program: program(pid),
    };
    files.into_iter().map(holder).collect()
}

/// Files of a maps table (proc(5)) that lie on one of the devices. Their numbers are hexadecimal
/// there.
fn mapped_files<'a>(
    table: &'a str,
    numbers: &'a BTreeSet<String>,
) -> impl Iterator<Item = &'a str> {
    table.lines().filter_map(|line| {
        let mut fields = line.splitn(6, ' ');
        let (major, minor) = fields.nth(3)?.split_once(':')?;
        let decimal = |hex| u32::from_str_radix(hex, 16).ok();
        let device = format!("{}:{}", decimal(major)?, decimal(minor)?);
        let _inode = fields.next()?;
        numbers.contains(&device).then(|| fields.next().unwrap_or_default().trim_start())
    })
}

/// Processes that hold a file system on the device: a file of it open or mapped, or standing in it;
/// or the device itself.
pub(super) fn users(index: u32) -> BTreeSet<i32> {
    let numbers: BTreeSet<_> = sysfs::parts(index).into_iter().map(|(_, number)| number).collect();
    let places: Vec<_> = mounts(index).into_iter().map(|mount| mount.point).collect();
    let own = std::process::id();
    let uses = |pid: &i32| {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let links = ["cwd", "root"].map(|name| proc.join(name));
        let fds = std::fs::read_dir(proc.join("fd")).into_iter().flatten().flatten();
        let stands = links.into_iter().chain(fds.map(|entry| entry.path())).any(|link| {
            // The file system may be shut down: its names are compared, its files are not asked.
            read_link(link).is_ok_and(|target| places.iter().any(|place| target.starts_with(place)))
        });
        stands || !opened(*pid, &numbers).is_empty() || !mappings(*pid, &numbers).is_empty()
    };
    processes()
        .into_iter()
        // Not the first process, nor ourselves.
        .filter(|pid| *pid != 1 && u32::try_from(*pid) != Ok(own))
        .filter(uses)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_a_device_are_read_from_mountinfo() {
        let table = "36 35 43:0 / /mnt/zeebe\\040data rw,noatime shared:1 - ext4 /dev/nbd0 rw\n\
                     37 35 43:32 /sub /b\\134c rw - xfs /dev/nbd1 rw\nbroken line\n";
        let found: Vec<_> = mountinfo(table).collect();
        assert_eq!(found, [("43:0", "/mnt/zeebe data".into()), ("43:32", "/b\\c".into())]);
    }

    #[test]
    fn mapped_files_are_those_on_the_device() {
        let table = "7f1-7f2 r--s 00000000 2b:20 131   /mnt/a file\n\
                     7f2-7f3 rw-p 00000000 2b:00 132   /other\n\
                     7f3-7f4 rw-p 00000000 00:00 0 \n\
                     7f4-7f5 r--s 00001000 2b:20 131   /mnt/gone (deleted)\n";
        let numbers = ["43:32".to_owned()].into();
        let found: Vec<_> = mapped_files(table, &numbers).collect();
        assert_eq!(found, ["/mnt/a file", "/mnt/gone (deleted)"]);
    }

    #[test]
    fn swap_space_is_told_by_its_whole_name() {
        let table = "Filename\tType\n/dev/nbd10  partition 1 0 -2\n";
        assert!(swaps_name(table, "/dev/nbd10"));
        assert!(!swaps_name(table, "/dev/nbd1"));
    }

    #[test]
    fn a_mount_that_only_others_see_is_reached_by_one_of_them() {
        let mount = Mount { seen_by: Some(7), point: "/data".into(), device: String::new() };
        assert_eq!(mount.path(), Path::new("/proc/7/root/data"));
        assert_eq!(Mount { seen_by: None, ..mount }.path(), Path::new("/data"));
    }
}
