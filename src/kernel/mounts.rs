//! Mounts of the file systems on a device, in every mount namespace, each known by the kernel's own
//! number for it: a path leads elsewhere in another namespace, under another mount, or later.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirEntry, File, OpenOptions, metadata, read_dir, read_link, read_to_string};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::fchdir;
use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};

use super::sysfs::{Block, number};

/// One mount of a file system on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// The kernel's number for it, as long as it is there; in all namespaces together there is one
    /// of that number.
    pub(super) id: u64,
    /// A process that sees it; `None` if we see it ourselves.
    pub(super) seen_by: Option<i32>,
    /// Where, in that process's eyes.
    pub(super) point: PathBuf,
    /// `major:minor` of the file system, which its mounts share.
    pub(super) device: String,
    /// The name of the block device that it lies on.
    pub(super) block: String,
}

/// Every mount of a file system on the devices, our own first: what others see is often the same
/// file system.
pub(super) fn mounts(blocks: &[Block]) -> Vec<Mount> {
    let root_of = |of: &str| read_link(format!("/proc/{of}/root")).ok();
    let space_of = |of: &str| read_link(format!("/proc/{of}/ns/mnt")).ok();
    let own = (space_of("self"), root_of("self"));
    // A process with another root sees only what lies below it.
    let mut views = BTreeMap::from([(own.clone(), None)]);
    for pid in processes() {
        let of = pid.to_string();
        // Processes may end while they are looked at.
        if let (Some(space), root) = (space_of(&of), root_of(&of)) {
            views.entry((Some(space), root)).or_insert(Some(pid));
        }
    }
    let mut views: Vec<_> = views.into_values().collect();
    views.sort_unstable();
    let mut known = BTreeSet::new();
    let mut found = Vec::new();
    for seen_by in views {
        for entry in table(seen_by).lines().filter_map(Entry::parse) {
            if let Some(block) = entry.lies_on(blocks)
                && known.insert(entry.id)
            {
                found.push(Mount {
                    id: entry.id,
                    seen_by,
                    point: unescape(entry.point).into(),
                    device: entry.device.to_owned(),
                    block: block.name.clone(),
                });
            }
        }
    }
    found
}

fn table(seen_by: Option<i32>) -> String {
    let of = seen_by.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    read_to_string(format!("/proc/{of}/mountinfo")).unwrap_or_default()
}

/// A line of a mountinfo table (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    id: u64,
    device: &'a str,
    point: &'a str,
    kind: &'a str,
    source: &'a str,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ');
        let id = mount.next()?.parse().ok()?;
        let (device, point) = (mount.nth(1)?, mount.nth(1)?);
        let mut system = system.split(' ');
        Some(Self { id, device, point, kind: system.next()?, source: system.next()? })
    }

    /// The device that the file system lies on, if it is one of these.
    fn lies_on<'b>(&self, blocks: &'b [Block]) -> Option<&'b Block> {
        if let Some(block) = blocks.iter().find(|block| block.number == self.device) {
            return Some(block);
        }
        // A file system of several devices has a number that is none of theirs. Of these alone the
        // kernel itself writes the source; elsewhere whoever mounts chooses it.
        let several = ["btrfs", "bcachefs"].contains(&self.kind);
        let sources = if several { unescape(self.source) } else { String::new() };
        let named = sources.split(':').filter(|source| source.starts_with("/dev/"));
        let numbers: Vec<_> =
            named.filter_map(|path| Some(number(metadata(path).ok()?.rdev()))).collect();
        let members = btrfs_members(Path::new("/sys/fs/btrfs"), &numbers);
        blocks.iter().find(|block| numbers.contains(&block.number) || members.contains(&block.name))
    }
}

/// The names of all devices of the btrfs file system that one of these is part of.
fn btrfs_members(systems: &Path, numbers: &[String]) -> Vec<String> {
    let entries = |dir: &Path| read_dir(dir).into_iter().flatten().flatten();
    let is_one_of_these = |device: &DirEntry| {
        let number = read_to_string(device.path().join("dev")).unwrap_or_default();
        numbers.iter().any(|one| one == number.trim())
    };
    entries(systems)
        .map(|system| entries(&system.path().join("devices")).collect::<Vec<_>>())
        .find(|devices| devices.iter().any(is_one_of_these))
        .into_iter()
        .flatten()
        .map(|device| device.file_name().to_string_lossy().into_owned())
        .collect()
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

/// A mount that is held by a descriptor without access (`O_PATH`), so that it stays this one
/// whatever is mounted or unmounted where it was. The file system is not asked for anything.
pub(super) struct Held {
    top: File,
    seen_by: Option<i32>,
}

impl Mount {
    /// The way to it from here, if nothing lies in between.
    pub(super) fn path(&self) -> PathBuf {
        let Some(pid) = self.seen_by else { return self.point.clone() };
        let point = self.point.strip_prefix("/").unwrap_or(&self.point);
        Path::new("/proc").join(pid.to_string()).join("root").join(point)
    }

    /// Takes hold of it, and of no other.
    pub(super) fn hold(&self) -> io::Result<Held> {
        let top = open_path(&self.path())?;
        if mount_id(&format!("self/fdinfo/{}", top.as_raw_fd())) != Some(self.id) {
            let why = "left alone: it is not mounted there any more, or another mount lies over it";
            return Err(io::Error::other(why));
        }
        // Held, its number stays its own: what the table says of the number now is said of it.
        let table = table(self.seen_by);
        let entry = table.lines().filter_map(Entry::parse).find(|entry| entry.id == self.id);
        if entry.is_none_or(|entry| entry.device != self.device) {
            return Err(io::Error::other("left alone: another file system is mounted there now"));
        }
        Ok(Held { top, seen_by: self.seen_by })
    }
}

impl Held {
    /// Its top, for reading.
    pub(super) fn open(&self) -> io::Result<File> {
        let kind = look(self.link()).map(|meta| FileType::from_raw_mode(meta.stx_mode.into()));
        // Opening a device or a pipe would do something to it.
        if kind.is_some_and(|kind| ![FileType::Directory, FileType::RegularFile].contains(&kind)) {
            return Err(io::Error::other("left alone: neither a directory nor a file"));
        }
        // No data of the file system is needed to open its top.
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.link())
    }

    /// Unmounts it as soon as nobody uses it.
    pub(super) fn unmount(&self) -> io::Result<()> {
        let Some(pid) = self.seen_by else {
            return Ok(umount2(&self.link(), MntFlags::MNT_DETACH)?);
        };
        let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
        // Over there, /proc may be absent or somebody else's.
        let links = File::open("/proc/self/fd")?;
        let top = self.top.as_raw_fd().to_string();
        // A thread of its own: it does not come back from there.
        let inside = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_FS)?;
            setns(&namespace, CloneFlags::CLONE_NEWNS)?;
            fchdir(&links)?;
            umount2(top.as_str(), MntFlags::MNT_DETACH)
        });
        inside.join().unwrap_or(Err(nix::errno::Errno::EIO)).map_err(io::Error::from)
    }

    fn link(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.top.as_raw_fd()).into()
    }
}

/// Opens the way to a file alone: neither the file nor its file system is asked for anything.
pub(super) fn open_path(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

/// The mount that a descriptor lies on, by its file below `/proc`.
pub(super) fn mount_id(fdinfo: &str) -> Option<u64> {
    let table = read_to_string(format!("/proc/{fdinfo}")).ok()?;
    table.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// What is known of a file without asking the other side of a network or a FUSE file system.
pub(super) fn look(path: PathBuf) -> Option<Statx> {
    statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()
}

pub(super) fn processes() -> Vec<i32> {
    let entries = read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_a_device_are_read_from_mountinfo() {
        let table = "36 35 43:0 / /mnt/zeebe\\040data rw,noatime shared:1 - ext4 /dev/nbd0 rw\n\
                     37 35 43:32 /sub /b\\134c rw - xfs /dev/nbd1 rw\nbroken line\n";
        let found: Vec<_> = table.lines().filter_map(Entry::parse).collect();
        let points: Vec<_> = found.iter().map(|entry| unescape(entry.point)).collect();
        assert_eq!(points, ["/mnt/zeebe data", "/b\\c"]);
        let (id, device) = (36, "43:0");
        let (kind, source) = ("ext4", "/dev/nbd0");
        assert_eq!(found[0], Entry { id, device, point: "/mnt/zeebe\\040data", kind, source });
        assert_eq!((found[1].id, found[1].device), (37, "43:32"));
    }

    #[test]
    fn a_file_system_is_on_a_device_by_number_and_not_by_the_name_that_someone_gave_it() {
        let null = number(metadata("/dev/null").unwrap().rdev());
        let on = |line: &str, number: &str| {
            let (name, number) = ("nbd0".to_owned(), number.to_owned());
            let blocks = [Block { name, number, made: false, last: true }];
            Entry::parse(line).unwrap().lies_on(&blocks).is_some()
        };
        let line = "36 35 43:0 / /mnt rw shared:1 - ext4 /dev/null rw";
        assert!(on(line, "43:0"));
        assert!(!on(line, &null), "the source is not what counts");
        assert!(!on("36 35 0:43 / /mnt rw - tmpfs /dev/null rw", &null));
        assert!(on("36 35 0:43 / /mnt rw - btrfs /dev/null rw", &null));
    }

    #[test]
    fn a_mount_that_only_others_see_is_reached_by_one_of_them() {
        let (device, block) = (String::new(), String::new());
        let mount = Mount { id: 1, seen_by: Some(7), point: "/data".into(), device, block };
        assert_eq!(mount.path(), Path::new("/proc/7/root/data"));
        assert_eq!(Mount { seen_by: None, ..mount }.path(), Path::new("/data"));
    }
}
