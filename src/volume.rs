//! Volumes on a backing store: made, opened, unlocked, their header updated without ever being
//! without a good copy.
//!
//! A type for each state: [`NewVolume`] is a store chosen and locked but not yet written;
//! [`LockedVolume`] has a header that was read; [`UnlockedVolume`] has one that the volume key has
//! confirmed. All hold an exclusive lock (`flock`) on the store, so that no two daemons of a machine
//! serve one volume; read-only opens share it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::libc;
use nix::sys::stat;
use thiserror::Error;
use uuid::Uuid;

use crate::key::VolumeKey;
use crate::key::wrapped::{Canary, WrappedKey};
use crate::luks2::{AREA, DATA_OFFSET, Header, HeaderError, NewHeader, Recovery, WrongKey};
use crate::units::{Geometry, SectorSize};

/// What kind of failure it was, for those who decide rather than read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeErrorClass {
    /// Nothing is there.
    NotFound,
    /// There is no volume of ours.
    NotAVolume,
    /// There is one, and it cannot be used as it is.
    Damaged,
    /// Someone else has it open.
    Busy,
    /// The store is shorter than the volume.
    TooSmall,
    /// The file system is full.
    NoSpace,
    /// The store cannot be written.
    ReadOnly,
    /// Something is there already.
    WouldOverwrite,
    /// The key is not the volume's.
    WrongKey,
    /// What was asked for makes no sense.
    Request,
    /// The system failed.
    Io,
}

/// Why something could not be done with a volume on a store.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// A system call failed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which store.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no header of ours.
    #[error("{}: {source}", path.display())]
    Header {
        /// On which store.
        path: PathBuf,
        /// What is there.
        source: HeaderError,
    },
    /// Someone has it open.
    #[error("{} is in use: another daemon, or another volume of this one, has it open", .0.display())]
    Busy(PathBuf),
    /// It is too short.
    #[error("{} has {found} bytes, but its header says that data reaches to byte {needed}; it was cut off", path.display())]
    TooSmall {
        /// Which store.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size it should have at least.
        needed: u64,
    },
    /// Something is there.
    #[error("{} holds {found}; formatting would destroy it", path.display())]
    WouldOverwrite {
        /// Which store.
        path: PathBuf,
        /// What it looks like.
        found: String,
    },
    /// The first copy of the header is gone, and something else has begun in its place.
    #[error("{} holds {found}, over what is left of a volume's header; repairing the header would destroy it", path.display())]
    Overwritten {
        /// Which store.
        path: PathBuf,
        /// What it looks like.
        found: &'static str,
    },
    /// The capacity makes no sense.
    #[error("{} cannot hold a volume: {why}", path.display())]
    Request {
        /// Which store.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The key is wrong, or the header.
    #[error("{}: {source}", path.display())]
    WrongKey {
        /// Which store.
        path: PathBuf,
        /// Which of the two.
        source: WrongKey,
    },
}

impl VolumeError {
    fn io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, path: path.to_owned(), source: source.into() }
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn class(&self) -> VolumeErrorClass {
        match self {
            Self::Io { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => VolumeErrorClass::NotFound,
                Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => VolumeErrorClass::NoSpace,
                Some(libc::EROFS | libc::EACCES | libc::EPERM) => VolumeErrorClass::ReadOnly,
                Some(libc::EBUSY) => VolumeErrorClass::Busy,
                _ => VolumeErrorClass::Io,
            },
            Self::Header { source, .. } => match source {
                HeaderError::None | HeaderError::Luks1 | HeaderError::NoToken => {
                    VolumeErrorClass::NotAVolume
                }
                HeaderError::BothDamaged { .. }
                | HeaderError::Metadata(_)
                | HeaderError::ManyTokens(_)
                | HeaderError::Token(_)
                | HeaderError::Uuid(_) => VolumeErrorClass::Damaged,
                HeaderError::Encode(_) | HeaderError::NoRandomness => VolumeErrorClass::Io,
            },
            Self::Busy(_) => VolumeErrorClass::Busy,
            Self::TooSmall { .. } => VolumeErrorClass::TooSmall,
            Self::Overwritten { .. } => VolumeErrorClass::Damaged,
            Self::WouldOverwrite { .. } => VolumeErrorClass::WouldOverwrite,
            Self::Request { .. } => VolumeErrorClass::Request,
            Self::WrongKey { .. } => VolumeErrorClass::WrongKey,
        }
    }

    /// What to do about it, one sentence.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self.class() {
            VolumeErrorClass::NotFound => "Check the path of the backing file or device.",
            VolumeErrorClass::NotAVolume => {
                "Check the path, or make a volume there with `byokctl volume create`."
            }
            VolumeErrorClass::Damaged => {
                "Restore the header from a backup with `cryptsetup luksHeaderRestore`; the data is untouched."
            }
            VolumeErrorClass::Busy => "Detach it where it is attached, then try again.",
            VolumeErrorClass::TooSmall => {
                "Restore the backing store to its full size; do not write to it before that."
            }
            VolumeErrorClass::NoSpace => {
                "Free space on the backing file system, or make a smaller volume."
            }
            VolumeErrorClass::ReadOnly => {
                "Make the backing store writable for byokd, or attach with --read-only."
            }
            VolumeErrorClass::WouldOverwrite => {
                "Choose another backing store; only if that data may be destroyed, add --force."
            }
            VolumeErrorClass::WrongKey => {
                "Restore the header from a backup with `cryptsetup luksHeaderRestore`, and find out who changed it."
            }
            VolumeErrorClass::Request => "Ask for a size that fits.",
            VolumeErrorClass::Io => "See the system's log for the backing store.",
        }
    }
}

/// Whether a volume is opened for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing; nobody else may have it open.
    ReadWrite,
    /// Reading; others may read too.
    ReadOnly,
}

/// What a new volume should be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// File (made if it is not there) or block device.
    pub backing: PathBuf,
    /// Bytes a client may use; rounded up to whole sectors. 0 means all of a block device.
    pub capacity: u64,
    /// The size of a sector.
    pub sector_size: SectorSize,
    /// Words for people and `blkid`.
    pub label: String,
    /// Format over something that looks like data.
    pub force: bool,
    /// Allocate a file's blocks now.
    pub preallocate: bool,
}

/// A store chosen for a volume, locked and checked, with nothing written to it. Dropped before
/// [`NewVolume::commit`] it leaves no trace.
pub struct NewVolume {
    file: Flock<File>,
    options: CreateOptions,
    uuid: Uuid,
    block_device: bool,
    /// The file was made by us and goes if nothing comes of it.
    ours: bool,
}

impl NewVolume {
    /// Chooses a store: opens and locks it, and checks that nothing is destroyed.
    ///
    /// # Errors
    /// It cannot be had, it holds data, or the capacity makes no sense.
    pub fn prepare(mut options: CreateOptions) -> Result<Self, VolumeError> {
        let path = options.backing.clone();
        let mut flags = libc::O_CLOEXEC | libc::O_NOFOLLOW;
        let existing = std::fs::metadata(&path);
        let block_device = existing.as_ref().is_ok_and(|m| m.file_type().is_block_device());
        if block_device {
            // On a device this means: not if it is mounted or otherwise held.
            flags = libc::O_CLOEXEC | libc::O_EXCL;
        }
        let ours = existing.is_err();
        let mut open = OpenOptions::new();
        open.read(true).write(true).custom_flags(flags).mode(0o600);
        let file = if ours { open.create_new(true).open(&path) } else { open.open(&path) }
            .map_err(|e| VolumeError::io("open", &path, e))?;
        let file = lock(file, &path, Access::ReadWrite)?;
        check_writable(&file, &path)?;
        let sector = options.sector_size.bytes_u64();
        let refuse = |why: String| VolumeError::Request { path: path.clone(), why };
        let size = size_of(&file, &path)?;
        if block_device {
            let room = size.saturating_sub(DATA_OFFSET);
            if options.capacity == 0 {
                options.capacity = room - room % sector;
            }
            if options.capacity > room {
                return Err(refuse(format!(
                    "it has {size} bytes, of which {room} are left beside the header, and {} were asked for",
                    options.capacity
                )));
            }
        }
        let whole = options.capacity.checked_next_multiple_of(sector);
        options.capacity = whole
            .filter(|capacity| *capacity > 0 && *capacity <= (1 << 62))
            .ok_or_else(|| refuse("the size must be over zero and under 4 EiB".into()))?;
        let new = Self { file, options, uuid: Uuid::new_v4(), block_device, ours };
        if !new.options.force
            && let Some(found) = what_is_there(&new.file, size)
        {
            return Err(VolumeError::WouldOverwrite { path, found });
        }
        Ok(new)
    }

    /// The identity the volume will have.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Writes the volume: when this returns, it is on stable storage.
    ///
    /// # Errors
    /// It could not be written, for example for lack of space; a file made for it is removed.
    pub fn commit(
        mut self,
        key: &VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
    ) -> Result<(), VolumeError> {
        let path = self.options.backing.clone();
        let header = Header::new(
            NewHeader {
                uuid: self.uuid,
                label: self.options.label.chars().take(40).collect(),
                capacity: self.options.capacity,
                sector_size: self.options.sector_size,
                created: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            },
            key,
            wrapped,
            canary,
        )
        .map_err(|source| VolumeError::Header { path: path.clone(), source })?;
        let total = DATA_OFFSET + self.options.capacity;
        let io = |doing| {
            let path = path.clone();
            move |e: io::Error| VolumeError::io(doing, &path, e)
        };
        if !self.block_device {
            // Cut to nothing first: blocks of what was there before are given back, not kept.
            self.file.set_len(0).map_err(io("empty"))?;
            self.file.set_len(total).map_err(io("extend"))?;
            if self.options.preallocate {
                let len = i64::try_from(total).unwrap_or(i64::MAX);
                fallocate(&*self.file, FallocateFlags::empty(), 0, len)
                    .map_err(|e| VolumeError::io("allocate blocks for", &path, e))?;
            }
        }
        wipe_signatures(&self.file, total, self.block_device).map_err(io("clear"))?;
        write_header(&self.file, &header, &path)?;
        if self.ours {
            sync_directory(&path).map_err(io("sync the directory of"))?;
        }
        self.ours = false;
        Ok(())
    }
}

impl Drop for NewVolume {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = std::fs::remove_file(&self.options.backing)
        {
            tracing::warn!(path = %self.options.backing.display(), %error, "an unfinished volume could not be removed");
        }
    }
}

/// A volume whose header was read; its key is not here.
pub struct LockedVolume {
    file: Flock<File>,
    path: PathBuf,
    access: Access,
    header: Header,
    recovery: Option<String>,
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
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(|e| VolumeError::io("open", path, e))?;
        let file = lock(file, path, access)?;
        if access == Access::ReadWrite {
            check_writable(&file, path)?;
        }
        let (header, recovery) = read_header(&file, path)?;
        check_size(&file, path, &header)?;
        let recovery = match recovery {
            Recovery::NotNeeded => None,
            Recovery::Needed(note) => {
                let start =
                    read_up_to(&file, AREA, 0).map_err(|e| VolumeError::io("read", path, e))?;
                // No place of a signature is one that a header uses.
                if let Some(found) = signature(&start, &FOREIGN_SIGNATURES) {
                    return Err(VolumeError::Overwritten { path: path.to_owned(), found });
                }
                Some(note)
            }
        };
        Ok(Self { file, path: path.to_owned(), access, header, recovery })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What was wrong with the header, if anything.
    #[must_use]
    pub fn recovery(&self) -> Option<&str> {
        self.recovery.as_deref()
    }

    /// Unlocks it: checks `key` against the digest and the header's MAC. Then a damaged copy of
    /// the header is repaired from the good one, if it is open for writing: not earlier, for a copy
    /// that only passes its checksum may be forged, and must not take the place of a good one.
    ///
    /// # Errors
    /// The key is not this volume's, the header was changed, or its repair failed; the volume comes
    /// back locked.
    pub fn unlock(mut self, key: &VolumeKey) -> Result<UnlockedVolume, (Box<Self>, VolumeError)> {
        let verified = self
            .header
            .verify(key)
            .map_err(|source| VolumeError::WrongKey { path: self.path.clone(), source });
        match verified.and_then(|()| self.repair()) {
            Ok(()) => Ok(UnlockedVolume(self)),
            Err(error) => Err((Box::new(self), error)),
        }
    }

    fn repair(&mut self) -> Result<(), VolumeError> {
        let Some(note) = &self.recovery else { return Ok(()) };
        let done = if self.access == Access::ReadOnly {
            "not repaired, because it is open read-only"
        } else {
            write_header(&self.file, &self.header, &self.path)?;
            tracing::warn!(path = %self.path.display(), note, "header repaired from its good copy");
            "repaired from the good copy"
        };
        self.recovery = Some(format!("{note}; {done}"));
        Ok(())
    }
}

/// A volume whose key and header have been checked against each other.
#[derive(Debug)]
pub struct UnlockedVolume(LockedVolume);

impl UnlockedVolume {
    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.0.header
    }

    /// What was wrong with the header, if anything.
    #[must_use]
    pub fn recovery(&self) -> Option<&str> {
        self.0.recovery()
    }

    /// Checks a key that was unwrapped anew.
    ///
    /// # Errors
    /// It is not this volume's.
    pub fn verify(&self, key: &VolumeKey) -> Result<(), VolumeError> {
        let path = || self.0.path.clone();
        self.0.header.verify(key).map_err(|source| VolumeError::WrongKey { path: path(), source })
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

    /// Replaces the wrapped key and the canary, crash-safe.
    ///
    /// # Errors
    /// The header could not be written; the old or the new one is good.
    pub fn rewrap(
        &mut self,
        key: &VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
    ) -> Result<(), VolumeError> {
        let path = self.0.path.clone();
        let next = self
            .0
            .header
            .rewrapped(key, wrapped, canary)
            .map_err(|source| VolumeError::Header { path: path.clone(), source })?;
        write_header(&self.0.file, &next, &path)?;
        self.0.header = next;
        Ok(())
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

fn lock(file: File, path: &Path, access: Access) -> Result<Flock<File>, VolumeError> {
    let how = match access {
        Access::ReadWrite => FlockArg::LockExclusiveNonblock,
        Access::ReadOnly => FlockArg::LockSharedNonblock,
    };
    Flock::lock(file, how).map_err(|(_, errno)| {
        if errno == Errno::EWOULDBLOCK {
            VolumeError::Busy(path.to_owned())
        } else {
            VolumeError::io("lock", path, errno)
        }
    })
}

/// Refuses a block device that the kernel does not write to: it lets one be opened for writing all
/// the same, and fails every write.
fn check_writable(file: &File, path: &Path) -> Result<(), VolumeError> {
    let metadata = file.metadata().map_err(|e| VolumeError::io("look at", path, e))?;
    if !metadata.file_type().is_block_device() {
        return Ok(());
    }
    let (major, minor) = (stat::major(metadata.rdev()), stat::minor(metadata.rdev()));
    let flag = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"));
    if flag.is_ok_and(|flag| flag.trim() == "1") {
        return Err(VolumeError::io("write to", path, Errno::EROFS));
    }
    Ok(())
}

/// The size of a file or block device: where its end is.
fn size_of(file: &File, path: &Path) -> Result<u64, VolumeError> {
    use std::io::Seek;
    let mut file = file;
    file.seek(io::SeekFrom::End(0)).map_err(|e| VolumeError::io("measure", path, e))
}

fn read_up_to(file: &File, most: usize, at: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; most];
    let mut got = 0;
    while got < most {
        match file.read_at(&mut bytes[got..], at + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(got);
    Ok(bytes)
}

fn read_header(file: &File, path: &Path) -> Result<(Header, Recovery), VolumeError> {
    let area = read_up_to(file, AREA, 0).map_err(|e| VolumeError::io("read", path, e))?;
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

/// Clears what other programs would take for their own data: everything before the data segment,
/// its start, and on a device its end.
fn wipe_signatures(file: &File, total: u64, block_device: bool) -> io::Result<()> {
    if !block_device {
        return Ok(());
    }
    let zeroes = vec![0; 1 << 20];
    for at in (0..DATA_OFFSET).step_by(1 << 20) {
        file.write_all_at(&zeroes, at)?;
    }
    let end = total.saturating_sub(1 << 20).max(DATA_OFFSET);
    let len = usize::try_from(total - end).unwrap_or_default().min(zeroes.len());
    file.write_all_at(&zeroes[..len], end)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Where a signature lies, what it is, and the name of what it stands for.
type Signature = (usize, &'static [u8], &'static str);

const LUKS_SIGNATURE: [Signature; 1] = [(0, b"LUKS\xba\xbe", "a LUKS volume")];

/// What else people keep on disks.
const FOREIGN_SIGNATURES: [Signature; 8] = [
    (0, b"XFSB", "an xfs file system"),
    (1080, b"\x53\xef", "an ext2/3/4 file system"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    (512, b"EFI PART", "a GPT partition table"),
    (510, b"\x55\xaa", "a partition table or boot sector"),
    (4086, b"SWAPSPACE2", "swap"),
    (536, b"LVM2 001", "an LVM physical volume"),
    (0, b"QFI\xfb", "a qcow2 image"),
];

fn signature(start: &[u8], known: &[Signature]) -> Option<&'static str> {
    let is_there =
        |(at, magic, _): &&Signature| start.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    known.iter().find(is_there).map(|(_, _, name)| *name)
}

/// What a store holds, if anything: known signatures, or any byte that is not zero in its first
/// 16 MiB or its last MiB.
fn what_is_there(file: &File, size: u64) -> Option<String> {
    let head = usize::try_from(DATA_OFFSET).unwrap_or_default();
    let start = match read_up_to(file, head, 0) {
        Ok(start) => start,
        Err(error) => return Some(format!("something that cannot be read ({error})")),
    };
    let found = signature(&start, &LUKS_SIGNATURE);
    if let Some(name) = found.or_else(|| signature(&start, &FOREIGN_SIGNATURES)) {
        return Some(name.to_owned());
    }
    let end = read_up_to(file, 1 << 20, size.saturating_sub(1 << 20)).unwrap_or_default();
    let blank = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
    (!blank(&start) || !blank(&end)).then(|| "data (bytes that are not zero)".to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::key::secret::SecretMemoryError;
    use crate::key::wrapped::{EncryptionContext, Purpose};

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

    fn make(path: &Path) -> Uuid {
        let new = NewVolume::prepare(options(path.to_owned())).unwrap();
        let uuid = new.uuid();
        let (wrapped, canary) = wrapped(uuid, 7);
        new.commit(&key(1), wrapped, canary).unwrap();
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

    #[test]
    fn a_volume_abandoned_before_its_commit_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
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
