//! Which NBD devices there are, and whose they are: `/sys/block/nbdN`.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use uuid::Uuid;

const BLOCK: &str = "/sys/block";

/// A device that is connected to a volume of byokd, or of somebody who uses uuids as we do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Its backend identifier.
    pub volume: Uuid,
}

/// Every connected device whose backend identifier is a uuid, by number.
#[must_use]
pub fn devices() -> Vec<Device> {
    devices_in(Path::new(BLOCK))
}

fn devices_in(block: &Path) -> Vec<Device> {
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

fn backend_in(block: &Path, index: u32) -> Option<Uuid> {
    let text = read_to_string(block.join(format!("nbd{index}/backend"))).ok()?;
    text.trim().parse().ok()
}

/// Whether a device can only be read.
#[must_use]
pub fn is_read_only(index: u32) -> bool {
    read_to_string(dir(index).join("ro")).is_ok_and(|text| text.trim() == "1")
}

/// Whether a device is connected at all.
pub(super) fn is_connected(index: u32) -> bool {
    dir(index).join("pid").exists()
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
    Path::new(BLOCK).join(format!("nbd{index}"))
}

/// The device and its partitions: name, and `major:minor`.
pub(super) fn parts(index: u32) -> Vec<(String, String)> {
    let (dir, name) = (dir(index), format!("nbd{index}"));
    let number = |dir: &Path| {
        read_to_string(dir.join("dev")).map(|text| text.trim().to_owned()).unwrap_or_default()
    };
    let mut parts = vec![(name.clone(), number(&dir))];
    for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
        let part = entry.file_name().to_string_lossy().into_owned();
        if part.starts_with(&format!("{name}p")) && entry.path().join("dev").exists() {
            parts.push((part, number(&entry.path())));
        }
    }
    parts
}

/// Block devices that are made of this one or of its partitions.
pub(super) fn made_of(index: u32) -> Vec<String> {
    let dir = dir(index);
    let mut found = Vec::new();
    for (part, _) in parts(index) {
        let part = if part == format!("nbd{index}") { dir.clone() } else { dir.join(part) };
        let holders = std::fs::read_dir(part.join("holders")).into_iter().flatten().flatten();
        found.extend(holders.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    }
    found
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
    fn names_of_devices_are_read_and_nothing_else() {
        assert_eq!(index_of("/dev/nbd12"), Some(12));
        assert_eq!(index_of("nbd0"), Some(0));
        for wrong in ["/dev/nbd", "nbd0p1", "nbd01", "nbd+1", "/dev/sda", "/dev/../nbd1", "nbd-1"] {
            assert_eq!(index_of(wrong), None, "{wrong}");
        }
    }
}
