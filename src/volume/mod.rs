//! Volumes on a backing store: made, opened, unlocked, their header updated without ever being
//! without a good copy.
//!
//! A type for each state: [`NewVolume`] is a store chosen and locked but not yet written, nor is
//! [`SealedVolume`], whose header the volume key has sealed; [`LockedVolume`] has a header that was
//! read; [`UnlockedVolume`] has one that the volume key has confirmed. All hold an exclusive lock
//! on the store, so that no two daemons of a machine serve one volume; read-only opens share it.
//!
//! | file | what it is |
//! |---|---|
//! | `create.rs` | new volumes |
//! | `backing.rs` | the store as a file: lock, size, what others keep on it |
//! | `rewrap.rs` | another header for a volume: the next one, sealed with its key |
//! | `resize.rs` | a volume grows |
//! | `error.rs` | why something could not be done |

mod backing;
mod create;
mod error;
mod resize;
mod rewrap;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::key::VolumeKey;
use crate::luks2::{AREA, Header, Recovery};
use crate::store::{Backing, DirectIo};
use crate::units::Geometry;
use backing::{FOREIGN_SIGNATURES, LockedFile, check_writable, read_up_to, signature, size_of};

pub use create::{CreateOptions, NewVolume, SealedVolume};
pub use error::{VolumeError, VolumeErrorClass};
pub use rewrap::NextHeader;

/// Both copies of a header as byokd and `cryptsetup` make it.
const USUAL_AREA: usize = 32 << 10;

/// Whether a volume is opened for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing; nobody else may have it open.
    ReadWrite,
    /// Reading; others may read too.
    ReadOnly,
}

/// A volume whose header was read; its key is not here.
pub struct LockedVolume {
    file: LockedFile,
    path: PathBuf,
    access: Access,
    /// Held for no longer than it takes to look at it, or to put another in its place.
    header: Mutex<Arc<Header>>,
    /// Held while a header is written.
    writing: Mutex<()>,
    /// What was wrong with the header when it was opened, and what became of that.
    recovery: Mutex<Option<Damage>>,
    /// Opened for I/O, until it is served.
    store: Mutex<Option<Backing>>,
}

/// A damaged copy of a header, and whether it is one yet.
#[derive(Clone, Debug)]
struct Damage {
    note: String,
    mended: Option<&'static str>,
}

impl std::fmt::Debug for LockedVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LockedVolume").field("path", &self.path).finish_non_exhaustive()
    }
}

impl LockedVolume {
    /// Opens and locks the volume at `path`. Nothing is written to it.
    ///
    /// # Errors
    /// There is none, it is in use, damaged, or cut off.
    pub fn open(path: &Path, access: Access) -> Result<Self, VolumeError> {
        let file = LockedFile::open(&mut OpenOptions::new(), 0, path, access)?;
        if access == Access::ReadWrite {
            check_writable(&file, path)?;
        }
        let (header, recovery) = read_header(&file, path)?;
        check_size(&file, path, &header)?;
        let damage = match recovery {
            Recovery::NotNeeded => None,
            Recovery::Needed(note) => {
                let start =
                    read_up_to(&file, AREA, 0).map_err(|e| VolumeError::io("read", path, e))?;
                // No place of a signature is one that a header uses.
                if let Some(found) = signature(&start, &FOREIGN_SIGNATURES) {
                    return Err(VolumeError::Overwritten { path: path.to_owned(), found });
                }
                Some(Damage { note, mended: None })
            }
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            access,
            header: Mutex::new(Arc::new(header)),
            writing: Mutex::default(),
            recovery: Mutex::new(damage),
            store: Mutex::default(),
        })
    }

    /// Opens the store for I/O, for whoever serves the volume, and reads where the data begins. A
    /// store that hangs does so here, before anybody has asked for the key.
    ///
    /// # Errors
    /// The store cannot be used for I/O.
    pub fn open_store(&self, direct: DirectIo) -> Result<(), VolumeError> {
        let header = self.header();
        let (capacity, segment) = (header.token().capacity, header.segment());
        let geometry = Geometry::new(capacity, segment.sector_size);
        let Ok(start) = geometry.sectors(0, capacity.min(4096)) else { return Ok(()) };
        let read_only = self.access == Access::ReadOnly;
        let store = Backing::open(&self.file, segment.offset, start, read_only, direct)
            .map_err(|e| VolumeError::io("open for I/O", &self.path, e))?;
        *lock_mutex(&self.store) = Some(store);
        Ok(())
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> Arc<Header> {
        Arc::clone(&lock_mutex(&self.header))
    }

    /// What was wrong with the header, if anything.
    #[must_use]
    pub fn recovery(&self) -> Option<String> {
        lock_mutex(&self.recovery).as_ref().map(|damage| match damage.mended {
            Some(how) => format!("{}; {how}", damage.note),
            None => damage.note.clone(),
        })
    }

    /// Unlocks it: checks `key` against the digest and the header's MAC. No store is waited for.
    ///
    /// # Errors
    /// The key is not this volume's, or the header was changed; the volume comes back locked.
    pub fn unlock(self, key: &VolumeKey) -> Result<UnlockedVolume, (Box<Self>, VolumeError)> {
        let verified = self
            .header()
            .verify(key)
            .map_err(|source| VolumeError::WrongKey { path: self.path.clone(), source });
        match verified {
            Ok(()) => Ok(UnlockedVolume(self)),
            Err(error) => Err((Box::new(self), error)),
        }
    }

    fn repair(&self) -> Result<(), VolumeError> {
        let _one_at_a_time = lock_mutex(&self.writing);
        let damaged = lock_mutex(&self.recovery).clone();
        let Some(Damage { note, mended: None }) = damaged else { return Ok(()) };
        let how = if self.access == Access::ReadOnly {
            "not repaired, because it is open read-only"
        } else {
            write_header(&self.file, &self.header(), &self.path)?;
            tracing::warn!(path = %self.path.display(), note, "header repaired from its good copy");
            "repaired from the good copy"
        };
        *lock_mutex(&self.recovery) = Some(Damage { note, mended: Some(how) });
        Ok(())
    }
}

/// A volume whose key and header have been checked against each other.
#[derive(Debug)]
pub struct UnlockedVolume(LockedVolume);

impl UnlockedVolume {
    /// The header as it is now: a rewrap puts another in its place.
    #[must_use]
    pub fn header(&self) -> Arc<Header> {
        self.0.header()
    }

    /// What was wrong with the header, if anything.
    #[must_use]
    pub fn recovery(&self) -> Option<String> {
        self.0.recovery()
    }

    /// The store that was opened for I/O before the volume was unlocked, once.
    pub(crate) fn take_store(&self) -> Option<Backing> {
        lock_mutex(&self.0.store).take()
    }

    /// Repairs a damaged copy of the header from the good one, if the volume is open for writing:
    /// not before it is unlocked, for a copy that only passes its checksum may be forged, and must
    /// not take the place of a good one.
    ///
    /// # Errors
    /// The header cannot be written.
    pub fn repair(&self) -> Result<(), VolumeError> {
        self.0.repair()
    }

    /// Checks a key that was unwrapped anew.
    ///
    /// # Errors
    /// It is not this volume's.
    pub fn verify(&self, key: &VolumeKey) -> Result<(), VolumeError> {
        let path = || self.0.path.clone();
        self.header().verify(key).map_err(|source| VolumeError::WrongKey { path: path(), source })
    }

    /// The size of the volume and its sectors.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.header().token().capacity, self.header().segment().sector_size)
    }

    /// Where the data starts on the store, in bytes.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        self.header().segment().offset
    }

    /// How it was opened.
    #[must_use]
    pub fn access(&self) -> Access {
        self.0.access
    }

    /// Where its store is.
    #[must_use]
    pub fn backing_path(&self) -> &Path {
        &self.0.path
    }

    /// The descriptor that holds the lock.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0.file
    }
}

/// Reads the header at `path` without locking or repairing anything: for looking at a volume that
/// may be in service.
///
/// # Errors
/// There is none.
pub fn inspect(path: &Path) -> Result<(Header, Option<String>), VolumeError> {
    let file = File::open(path).map_err(|e| VolumeError::io("open", path, e))?;
    let (header, recovery) = read_header(&file, path)?;
    let note = match recovery {
        Recovery::NotNeeded => None,
        Recovery::Needed(note) => Some(note),
    };
    Ok((header, note))
}

fn lock_mutex<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_header(file: &File, path: &Path) -> Result<(Header, Recovery), VolumeError> {
    let read = |most| read_up_to(file, most, 0).map_err(|e| VolumeError::io("read", path, e));
    // Only what is damaged or not ours has to be looked for further on: a node reads many headers,
    // and would keep the memory of the largest.
    if let Ok((header, Recovery::NotNeeded)) = Header::parse(&read(USUAL_AREA)?) {
        return Ok((header, Recovery::NotNeeded));
    }
    let area = read(AREA)?;
    Header::parse(&area).map_err(|source| VolumeError::Header { path: path.to_owned(), source })
}

fn check_size(file: &File, path: &Path, header: &Header) -> Result<(), VolumeError> {
    let segment = header.segment();
    let len = header.token().capacity.max(segment.size.unwrap_or_default());
    let needed = segment.offset.saturating_add(len);
    let found = size_of(file, path)?;
    if found < needed {
        return Err(VolumeError::TooSmall { path: path.to_owned(), found, needed });
    }
    Ok(())
}

/// Writes both copies, one at a time, synced in between: a crash leaves one that still passes its
/// checksum.
fn write_header(file: &File, header: &Header, path: &Path) -> Result<(), VolumeError> {
    let copies =
        header.copies().map_err(|source| VolumeError::Header { path: path.to_owned(), source })?;
    for (at, bytes) in copies {
        file.write_all_at(&bytes, at)
            .map_err(|e| VolumeError::io("write the header of", path, e))?;
        file.sync_all().map_err(|e| VolumeError::io("sync", path, e))?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::key::secret::SecretMemoryError;
    use crate::key::wrapped::{Canary, EncryptionContext, Purpose, WrappedKey};
    use crate::luks2::WrongKey;
    use crate::units::SectorSize;

    pub(crate) fn key(byte: u8) -> VolumeKey {
        VolumeKey::init_with(|k| {
            k.iter_mut().zip(byte..).for_each(|(b, value)| *b = value);
            Ok::<_, SecretMemoryError>(())
        })
        .unwrap()
    }

    pub(crate) fn wrapped(uuid: Uuid, blob: u8) -> (WrappedKey, Canary) {
        let wrapped = WrappedKey {
            key_arn: "arn:aws:kms:eu-central-1:111122223333:key/k".parse().unwrap(),
            blob: vec![blob; 100],
            context: EncryptionContext::for_volume(uuid, Purpose::Zeebe, []).unwrap(),
        };
        let canary = Canary {
            wrapped: WrappedKey { blob: vec![9; 90], ..wrapped.clone() },
            sha256: [3; 32],
        };
        (wrapped, canary)
    }

    fn options(backing: PathBuf) -> CreateOptions {
        CreateOptions {
            backing,
            capacity: 1 << 20,
            sector_size: SectorSize::B4096,
            label: "test".into(),
            force: false,
            preallocate: false,
        }
    }

    pub(crate) fn make(path: &Path) -> Uuid {
        let new = NewVolume::prepare(options(path.to_owned())).unwrap();
        let uuid = new.uuid();
        let (wrapped, canary) = wrapped(uuid, 7);
        new.seal(key(1), wrapped, canary).unwrap().commit().unwrap();
        uuid
    }

    fn class<T>(result: Result<T, VolumeError>) -> VolumeErrorClass {
        result.map(|_| ()).unwrap_err().class()
    }

    #[test]
    fn what_was_made_opens_with_its_key_only_and_has_the_capacity_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let uuid = make(&path);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), (16 << 20) + (1 << 20));
        let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
        assert_eq!(volume.header().uuid(), uuid);
        assert_eq!(volume.recovery(), None);
        let (volume, error) = volume.unlock(&key(2)).unwrap_err();
        assert_eq!(error.class(), VolumeErrorClass::WrongKey);
        assert_eq!(class(LockedVolume::open(&path, Access::ReadWrite)), VolumeErrorClass::Busy);
        let volume = volume.unlock(&key(1)).unwrap();
        assert_eq!(volume.geometry().capacity(), 1 << 20);
    }

    /// As the kernel holds it for a process that was killed while it wrote.
    #[test]
    fn a_store_that_is_still_written_to_is_not_opened_although_its_lock_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        make(&path);
        let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
        volume.open_store(DirectIo::Auto).unwrap();
        let written_by = lock_mutex(&volume.store).take();
        let another = written_by.as_ref().unwrap().for_one().unwrap();
        drop(volume);
        let error = LockedVolume::open(&path, Access::ReadWrite).unwrap_err();
        assert!(matches!(error, VolumeError::InFlight(_)), "{error}");
        drop((written_by, another));
        LockedVolume::open(&path, Access::ReadWrite).unwrap();
    }

    #[test]
    fn a_volume_abandoned_before_its_commit_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let new = NewVolume::prepare(options(path.clone())).unwrap();
        let (wrapped, canary) = wrapped(new.uuid(), 7);
        drop(new.seal(key(1), wrapped, canary).unwrap());
        assert!(!path.exists());
        drop(NewVolume::prepare(options(path.clone())).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, [0; 4096]).unwrap();
        drop(NewVolume::prepare(options(path.clone())).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
    }

    #[test]
    fn data_is_not_formatted_over_without_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        make(&path);
        let again = NewVolume::prepare(options(path.clone()));
        assert_eq!(class(again), VolumeErrorClass::WouldOverwrite);
        NewVolume::prepare(CreateOptions { force: true, ..options(path) }).unwrap();
    }

    #[test]
    fn a_volume_that_was_cut_off_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        make(&path);
        File::options().write(true).open(&path).unwrap().set_len((16 << 20) + 4096).unwrap();
        assert_eq!(class(LockedVolume::open(&path, Access::ReadOnly)), VolumeErrorClass::TooSmall);
    }

    #[test]
    fn either_copy_of_the_header_is_enough_and_the_other_is_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        make(&path);
        for at in [0, 5000, 16384, 16384 + 5000] {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            file.write_all_at(b"garbage", at).unwrap();
            let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
            let volume = volume.unlock(&key(1)).unwrap();
            assert!(volume.recovery().is_some(), "damage at {at} is reported");
            volume.repair().unwrap();
            assert!(volume.recovery().unwrap().ends_with("repaired from the good copy"));
            drop(volume);
            let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
            assert_eq!(volume.recovery(), None, "damage at {at} is repaired");
        }
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"garbage", 0).unwrap();
        file.write_all_at(b"garbage", 20000).unwrap();
        assert_eq!(class(LockedVolume::open(&path, Access::ReadOnly)), VolumeErrorClass::Damaged);
    }

    #[test]
    fn an_update_cut_off_at_any_byte_leaves_the_old_or_the_new_header() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let uuid = make(&path);
        let before = read_up_to(&File::open(&path).unwrap(), AREA, 0).unwrap();
        let (old, _) = Header::parse(&before).unwrap();
        let (wrapped, canary) = wrapped(uuid, 8);
        let new = old.rewrapped(&key(1), wrapped, canary).unwrap();
        let mut area = before;
        for (at, bytes) in new.copies().unwrap() {
            let at = usize::try_from(at).unwrap();
            // Every byte up to the end of what is not padding, then some of the padding.
            for cut in (0..3000).chain((3000..bytes.len()).step_by(997)) {
                let mut torn = area.clone();
                torn[at..at + cut].copy_from_slice(&bytes[..cut]);
                let (header, _) = Header::parse(&torn).unwrap();
                assert!([old.seqid(), new.seqid()].contains(&header.seqid()), "cut at {cut}");
                header.verify(&key(1)).unwrap();
            }
            area[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        let (header, recovery) = Header::parse(&area).unwrap();
        assert_eq!((header.seqid(), recovery), (new.seqid(), Recovery::NotNeeded));
    }

    #[test]
    fn a_header_changed_by_someone_without_the_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let uuid = make(&path);
        let area = read_up_to(&File::open(&path).unwrap(), AREA, 0).unwrap();
        let (header, _) = Header::parse(&area).unwrap();
        // The same, sealed with another key: what a forger can make.
        let (wrapped, canary) = wrapped(uuid, 8);
        let forged = header.rewrapped(&key(9), wrapped, canary).unwrap();
        assert_eq!(forged.verify(&key(1)), Err(WrongKey::Mac));
    }
}
