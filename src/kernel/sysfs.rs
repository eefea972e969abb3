//! Which NBD devices there are, and whose they are: `/sys/block/nbdN`.

use std::collections::VecDeque;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use uuid::Uuid;

pub(super) const BLOCK: &str = "/sys/block";

/// The first kernel seen to read what every connection of a device answers, whatever else it is at. 6.1 was
/// seen not to: requests of all but the first connection may wait for all of their timeout.
const READS_EVERY_CONNECTION: (u32, u32) = (6, 12);

/// Disks and partitions alike.
const CLASS: &str = "/sys/class/block";

/// A device that is connected to a volume of byokd, or of somebody who uses uuids as we do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Its backend identifier.
    pub volume: Uuid,
}

/// The kernel's release, if several connections of a device may stall there.
#[must_use]
pub fn stalls_with_several() -> Option<String> {
    let release = nix::sys::utsname::uname().ok()?.release().to_str()?.to_owned();
    (version_of(&release)? < READS_EVERY_CONNECTION).then_some(release)
}

/// `6.1` of `6.1.0-49-cloud-amd64`.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Every connected device whose backend identifier is a uuid, by number.
#[must_use]
pub fn devices() -> Vec<Device> {
    devices_in(Path::new(BLOCK))
}

pub(super) fn devices_in(block: &Path) -> Vec<Device> {
    let entries = std::fs::read_dir(block).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let index = index_of(entry.file_name().to_str()?)?;
            Some(Device { index, volume: backend_in(block, index)? })
        })
        .collect();
    found.sort_by_key(|device| device.index);
    found
}

/// The volume that a device is connected to, if it is to one.
#[must_use]
pub fn backend(index: u32) -> Option<Uuid> {
    backend_in(Path::new(BLOCK), index)
}

pub(super) fn backend_in(block: &Path, index: u32) -> Option<Uuid> {
    let text = read_to_string(block.join(name(index)).join("backend")).ok()?;
    text.trim().parse().ok()
}

/// Whether a device can only be read.
#[must_use]
pub fn is_read_only(index: u32) -> bool {
    read_to_string(dir(index).join("ro")).is_ok_and(|text| text.trim() == "1")
}

/// Whether a device was made so that blocks of it can be given back. Not what is set for it now, which
/// may be less and can be raised again.
#[must_use]
pub fn takes_trim(index: u32) -> bool {
    let most = read_to_string(dir(index).join("queue/discard_max_hw_bytes"));
    // Unknown: whoever asks for it is not to see an error.
    !most.is_ok_and(|text| text.trim() == "0")
}

/// N, of `nbdN` or `/dev/nbdN`.
#[must_use]
pub fn index_of(name: &str) -> Option<u32> {
    let number = name.strip_prefix("/dev/").unwrap_or(name).strip_prefix("nbd")?;
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    let index = number.parse().ok().filter(|_| plain)?;
    (format!("{index}") == number).then_some(index)
}

/// A device's directory.
pub(super) fn dir(index: u32) -> PathBuf {
    Path::new(BLOCK).join(name(index))
}

/// A block device that the plaintext of a volume passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// The kernel's name for it.
    pub(super) name: String,
    /// `major:minor`.
    pub(super) number: String,
    /// Made of the volume's device or of a partition of it: LVM, dm-crypt, md.
    pub(super) made: bool,
    /// Nothing in turn is made of it, and it has no partitions.
    pub(super) last: bool,
}

impl Block {
    pub(super) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }
}

/// `major:minor` of a device's number.
pub(super) fn number(device: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

/// The kernel's name of a device.
pub(super) fn name(index: u32) -> String {
    format!("nbd{index}")
}

/// A disk, its partitions, and every block device that is made of them.
pub(super) fn stack(disk: &str) -> Vec<Block> {
    stack_in(Path::new(CLASS), disk)
}

fn stack_in(class: &Path, disk: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut next = VecDeque::from([(disk.to_owned(), false)]);
    while let Some((name, made)) = next.pop_front() {
        if found.iter().any(|block| block.name == name) {
            continue;
        }
        let dir = class.join(&name);
        // It may go while it is looked at.
        let Ok(number) = read_to_string(dir.join("dev")) else { continue };
        let partitions = names(&dir).filter(|part| dir.join(part).join("partition").exists());
        let on_it: Vec<_> = partitions
            .map(|part| (part, made))
            .chain(names(&dir.join("holders")).map(|holder| (holder, true)))
            .collect();
        let (number, last) = (number.trim().to_owned(), on_it.is_empty());
        found.push(Block { name, number, made, last });
        next.extend(on_it);
    }
    found
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connected_devices_with_a_uuid_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Uuid::from_u128(7);
        for (name, backend) in [
            ("nbd10", Some(volume.to_string())),
            ("nbd2", Some(format!("{volume}\n"))),
            ("nbd3", Some("vm-7-disk".to_owned())),
            ("nbd4", None),
            ("sda", Some(volume.to_string())),
        ] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            if let Some(backend) = backend {
                std::fs::write(dir.path().join(name).join("backend"), backend).unwrap();
            }
        }
        let expected = [Device { index: 2, volume }, Device { index: 10, volume }];
        assert_eq!(devices_in(dir.path()), expected);
        assert!(devices_in(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn a_release_begins_with_its_version() {
        assert_eq!(version_of("6.1.0-49-cloud-amd64"), Some((6, 1)));
        assert_eq!(version_of("6.12+deb13"), Some((6, 12)));
        assert_eq!(version_of("7.0-rc1"), Some((7, 0)));
        assert_eq!(version_of("next"), None);
    }

    #[test]
    fn names_of_devices_are_read_and_nothing_else() {
        assert_eq!(index_of("/dev/nbd12"), Some(12));
        assert_eq!(index_of("nbd0"), Some(0));
        for wrong in ["/dev/nbd", "nbd0p1", "nbd01", "nbd+1", "/dev/sda", "/dev/../nbd1", "nbd-1"] {
            assert_eq!(index_of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_made_of_a_device_is_found_through_partitions_and_layers() {
        let class = tempfile::tempdir().unwrap();
        let at = |path: &str| class.path().join(path);
        for (name, number) in [
            ("nbd1", "43:32"),
            ("nbd1p1", "43:33"),
            ("nbd1p2", "43:34"),
            ("dm-0", "253:0"),
            ("dm-1", "253:1"),
            ("md0", "9:0"),
            ("dm-7", "253:7"),
        ] {
            std::fs::create_dir_all(at(name).join("holders")).unwrap();
            std::fs::write(at(name).join("dev"), format!("{number}\n")).unwrap();
        }
        for part in ["nbd1p1", "nbd1p2"] {
            std::fs::create_dir_all(at("nbd1").join(part)).unwrap();
            std::fs::write(at("nbd1").join(part).join("partition"), "1\n").unwrap();
        }
        for (below, above) in
            [("nbd1p1", "dm-0"), ("nbd1p2", "md0"), ("dm-0", "dm-1"), ("md0", "dm-1")]
        {
            std::fs::create_dir(at(below).join("holders").join(above)).unwrap();
        }
        let found = stack_in(class.path(), "nbd1");
        let mut found: Vec<_> =
            found.iter().map(|b| (b.name.as_str(), b.number.as_str(), b.made, b.last)).collect();
        found.sort_unstable();
        let expected = [
            ("dm-0", "253:0", true, false),
            ("dm-1", "253:1", true, true),
            ("md0", "9:0", true, false),
            ("nbd1", "43:32", false, false),
            ("nbd1p1", "43:33", false, false),
            ("nbd1p2", "43:34", false, false),
        ];
        assert_eq!(found, expected);
        assert!(stack_in(class.path(), "nbd2").is_empty());
    }
}
