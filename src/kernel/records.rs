//! Which devices the helper made, and of which volumes: its own word for whose a device is, against
//! which it holds what it is asked. A backend identifier is no proof: others use uuids as well, and
//! everybody can read them.
//!
//! A file for each device, named by its number, in a directory of root's that outlives the helper
//! and no boot: the volume's uuid, and `disconnected` once the helper was asked to take the device
//! away. Whoever still has it mounted or open keeps the kernel from letting go of it; until then it
//! is never connected again.

use std::fs::{DirBuilder, read_dir, read_to_string};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::noted::name_of;
use super::sysfs;
use super::{KernelError, KernelErrorClass};
use crate::exit::ExitCode;

/// Where they are unless a setting says otherwise.
pub const RECORDS: &str = "/run/byokd-kernel/devices";

/// What follows the uuid of a device that was to be taken away.
const DISCONNECTED: &str = "disconnected";

/// What is recorded of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) volume: Uuid,
    /// It was to be taken away.
    pub(super) disconnected: bool,
}

/// See the module's text.
pub struct Records {
    dir: PathBuf,
    /// `/sys/block`.
    block: PathBuf,
    /// Held while files are changed: else one that was just written might be taken for an old one.
    changing: Mutex<()>,
}

impl Records {
    /// Those in `dir`, of the devices in `/sys/block`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self::of(dir, sysfs::BLOCK.into())
    }

    pub(super) fn of(dir: PathBuf, block: PathBuf) -> Self {
        Self { dir, block, changing: Mutex::default() }
    }

    /// Records a device that was made.
    pub(super) fn made(&self, index: u32, volume: Uuid) -> io::Result<()> {
        let _alone = self.alone();
        self.make_dir()?;
        self.write(index, Record { volume, disconnected: false })
    }

    /// Records whether a device is to be taken away.
    pub(super) fn disconnected(&self, index: u32, record: Record) -> io::Result<()> {
        let _alone = self.alone();
        self.write(index, record)
    }

    /// What is recorded of a device, if that is `volume`'s by the record and by the kernel.
    ///
    /// # Errors
    /// It is not, or nothing has been recorded since the machine was started.
    pub(super) fn check(&self, index: u32, volume: Uuid) -> Result<Record, KernelError> {
        let _alone = self.alone();
        let backend = sysfs::backend_in(&self.block, index);
        match self.forget_gone() {
            Err(e) if e.kind() == ErrorKind::NotFound && backend != Some(volume) => {}
            forgotten => forgotten.map_err(|e| self.unreadable(&e))?,
        }
        match self.read(index) {
            Some(record) if record.volume == volume && backend == Some(volume) => Ok(record),
            None if backend == Some(volume) => {
                let why = format!("/dev/nbd{index} was not attached by byokd-kernel");
                let remedy = "If an earlier version of it did: byokd-kernel --adopt.";
                Err(KernelError::new(ExitCode::WrongState, why, remedy)
                    .of(KernelErrorClass::NotOurs))
            }
            _ => Err(not_ours(index, volume)),
        }
    }

    /// Records the devices that a version without records made: those with the uuid of a volume that
    /// byokd noted in `notes`. Says which they are, and which others have such an identifier. For root,
    /// and never done because a client asks. Where there are none, nothing is decided.
    ///
    /// # Errors
    /// They cannot be recorded.
    pub fn adopt(
        &self,
        notes: &Path,
        is_name: fn(&str) -> bool,
    ) -> io::Result<(Vec<u32>, Vec<u32>)> {
        let _alone = self.alone();
        let mut unknown = sysfs::devices_in(&self.block);
        unknown.retain(|device| self.read(device.index).is_none());
        let noted = |device: &sysfs::Device| name_of(notes, device.volume, is_name).is_ok();
        let (ours, others): (Vec<_>, Vec<_>) = unknown.into_iter().partition(noted);
        if !ours.is_empty() {
            self.make_dir()?;
        }
        for device in &ours {
            self.write(device.index, Record { volume: device.volume, disconnected: false })?;
        }
        let numbers = |devices: Vec<sysfs::Device>| devices.iter().map(|d| d.index).collect();
        Ok((numbers(ours), numbers(others)))
    }

    /// Drops what is recorded of devices that are not there any more.
    fn forget_gone(&self) -> io::Result<()> {
        for entry in read_dir(&self.dir)? {
            let index = entry?.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(index) = index else { continue };
            let backend = sysfs::backend_in(&self.block, index);
            if backend.is_none() || self.read(index).map(|record| record.volume) != backend {
                std::fs::remove_file(self.path(index))?;
            }
        }
        Ok(())
    }

    fn read(&self, index: u32) -> Option<Record> {
        let text = read_to_string(self.path(index)).ok()?;
        let (volume, how) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        Some(Record { volume: volume.parse().ok()?, disconnected: how == DISCONNECTED })
    }

    fn write(&self, index: u32, record: Record) -> io::Result<()> {
        let how = if record.disconnected { DISCONNECTED } else { "" };
        let new = self.dir.join(format!("{index}.new"));
        std::fs::write(&new, format!("{} {how}\n", record.volume))?;
        std::fs::rename(new, self.path(index))
    }

    fn make_dir(&self) -> io::Result<()> {
        if let Some(above) = self.dir.parent() {
            std::fs::create_dir_all(above)?;
        }
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let meta = std::fs::symlink_metadata(&self.dir)?;
        let ours = meta.is_dir() && meta.uid() == nix::unistd::geteuid().as_raw();
        if !ours || meta.mode() & 0o022 != 0 {
            let why =
                format!("{} is somebody else's, or others may write to it", self.dir.display());
            return Err(io::Error::new(ErrorKind::PermissionDenied, why));
        }
        Ok(())
    }

    fn path(&self, index: u32) -> PathBuf {
        self.dir.join(index.to_string())
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unreadable(&self, error: &io::Error) -> KernelError {
        let dir = self.dir.display();
        if error.kind() == ErrorKind::NotFound {
            let why = format!("nothing is recorded in {dir} of the devices that there are");
            let remedy =
                "If an earlier version of byokd-kernel attached them: byokd-kernel --adopt.";
            return KernelError::new(ExitCode::WrongState, why, remedy);
        }
        let why = format!("cannot tell whose devices there are by {dir}: {error}");
        KernelError::new(ExitCode::Failed, why, "Let it be root's own.")
    }
}

pub(super) fn not_ours(index: u32, volume: Uuid) -> KernelError {
    let why = format!("/dev/nbd{index} is not connected to volume {volume} any more");
    KernelError::new(ExitCode::WrongState, why, "Attach the volume again.")
        .of(KernelErrorClass::NotOurs)
}

/// That it was disconnected, and who has it open keeps the kernel from letting go of it.
pub(super) fn still_held(index: u32) -> KernelError {
    let why = format!("/dev/nbd{index} was disconnected and is still held");
    let remedy = "Unmount it and end what uses it; then attach the volume again.";
    KernelError::new(ExitCode::WrongState, why, remedy).of(KernelErrorClass::Disconnected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::is_volume_name;

    struct Node {
        dir: tempfile::TempDir,
        records: Records,
    }

    impl Node {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let records = Records::of(dir.path().join("run/devices"), dir.path().join("block"));
            Self { dir, records }
        }

        fn connect(&self, index: u32, volume: Uuid) {
            let device = self.dir.path().join(format!("block/nbd{index}"));
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("backend"), format!("{volume}\n")).unwrap();
        }

        fn let_go(&self, index: u32) {
            std::fs::remove_dir_all(self.dir.path().join(format!("block/nbd{index}"))).unwrap();
        }

        fn class(&self, index: u32, volume: Uuid) -> KernelErrorClass {
            self.records.check(index, volume).unwrap_err().class
        }
    }

    const OURS: Uuid = Uuid::from_u128(1);
    const THEIRS: Uuid = Uuid::from_u128(2);

    #[test]
    fn a_device_is_a_volumes_by_the_record_and_by_the_kernel() {
        let node = Node::new();
        node.connect(3, OURS);
        node.connect(4, THEIRS);
        node.records.made(3, OURS).unwrap();
        let record = node.records.check(3, OURS).unwrap();
        assert_eq!(record, Record { volume: OURS, disconnected: false });
        assert_eq!(node.class(3, THEIRS), KernelErrorClass::NotOurs);
        assert_eq!(node.class(4, THEIRS), KernelErrorClass::NotOurs, "its uuid is no secret");
        let mode = std::fs::metadata(node.dir.path().join("run/devices")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_record_goes_with_its_device() {
        let node = Node::new();
        node.connect(3, OURS);
        node.records.made(3, OURS).unwrap();
        node.let_go(3);
        assert_eq!(node.class(3, OURS), KernelErrorClass::NotOurs);
        // The same number again, by somebody who uses the same uuid.
        node.connect(3, OURS);
        assert_eq!(node.class(3, OURS), KernelErrorClass::NotOurs);
        // Or by one who uses another, before anybody looked.
        node.records.made(3, OURS).unwrap();
        node.connect(3, THEIRS);
        assert_eq!(node.class(3, THEIRS), KernelErrorClass::NotOurs);
        node.connect(3, OURS);
        assert_eq!(node.class(3, OURS), KernelErrorClass::NotOurs);
    }

    #[test]
    fn a_device_that_was_to_go_is_known_as_such_by_the_next_helper() {
        let node = Node::new();
        node.connect(3, OURS);
        node.records.made(3, OURS).unwrap();
        let record = node.records.check(3, OURS).unwrap();
        node.records.disconnected(3, Record { disconnected: true, ..record }).unwrap();
        let next = Records::of(node.records.dir.clone(), node.records.block.clone());
        assert!(next.check(3, OURS).unwrap().disconnected);
    }

    #[test]
    fn what_a_version_without_records_attached_is_adopted_by_root_alone() {
        let node = Node::new();
        let notes = node.dir.path().join("notes");
        std::fs::create_dir(&notes).unwrap();
        std::fs::write(notes.join(OURS.to_string()), "BYOKD_VOLUME=v\n").unwrap();
        node.connect(3, OURS);
        node.connect(4, THEIRS);
        // Not for ever: whoever repairs the device's connections asks again.
        assert_eq!(node.class(3, OURS), KernelErrorClass::Other);
        assert!(!node.dir.path().join("run/devices").exists(), "a client has it made");
        // Before byokd has noted it, nothing is decided.
        let nowhere = node.dir.path().join("nowhere");
        assert_eq!(node.records.adopt(&nowhere, is_volume_name).unwrap(), (vec![], vec![3, 4]));
        assert_eq!(node.class(3, OURS), KernelErrorClass::Other);
        assert_eq!(node.records.adopt(&notes, is_volume_name).unwrap(), (vec![3], vec![4]));
        node.records.check(3, OURS).unwrap();
        assert_eq!(node.class(4, THEIRS), KernelErrorClass::NotOurs);
        assert_eq!(node.records.adopt(&notes, is_volume_name).unwrap(), (vec![], vec![4]));
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_not_used() {
        let node = Node::new();
        let dir = node.dir.path().join("run/devices");
        std::fs::create_dir_all(&dir).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&dir, open).unwrap();
        let error = node.records.made(3, OURS).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    }
}
