//! A backing store as a file: locked, measured, and looked at for what others keep on it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use nix::sys::stat;

use super::{Access, VolumeError};
use crate::luks2::DATA_OFFSET;
use crate::store::inflight;

/// How long what was in flight may take to end when its process has. Looking for it goes on until then.
const TO_END: Duration = Duration::from_secs(2);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// A store that no other byokd of this machine writes to, until it is dropped. Nor does one that has
/// ended: what the kernel still writes for it holds a lock of its own
/// ([`inflight`]).
///
/// A block device is claimed as well (`O_EXCL`), so that nobody mounts or maps it meanwhile. Its lock
/// is one of its open file description: `flock` would be read as a word to udev, which puts off whatever
/// it has to do with a device that is locked so, and keeps `udevadm settle` waiting for minutes.
pub(super) enum LockedFile {
    File(Flock<File>),
    Device(File),
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Self::File(file) => file,
            Self::Device(file) => file,
        }
    }
}

impl LockedFile {
    /// Opens what is there as `options` say, and locks it.
    pub(super) fn open(
        options: &mut OpenOptions,
        flags: libc::c_int,
        path: &Path,
        access: Access,
    ) -> Result<Self, VolumeError> {
        let on_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        let claim = if on_device && access == Access::ReadWrite { libc::O_EXCL } else { 0 };
        let mut file = options
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(libc::O_CLOEXEC | flags | claim)
            .open(path)
            .map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => VolumeError::Busy(path.to_owned()),
                _ => VolumeError::io("open", path, e),
            })?;
        let busy = |errno| {
            if [Errno::EAGAIN, Errno::EACCES].contains(&errno) {
                VolumeError::Busy(path.to_owned())
            } else {
                VolumeError::io("lock", path, errno)
            }
        };
        let until = Instant::now() + TO_END;
        loop {
            // First: where a server has all locks, ours would look like another's. And whoever has
            // none has nobody who could leave one.
            let in_flight = inflight::is_held(&file).unwrap_or(false);
            let locked = if on_device {
                Self::lock_device(file, access)
            } else {
                Self::lock_file(file, access)
            };
            let locked = locked.map_err(busy)?;
            if !in_flight {
                return Ok(locked);
            }
            file = locked.unlocked().map_err(busy)?;
            if Instant::now() > until {
                return Err(VolumeError::InFlight(path.to_owned()));
            }
            pause();
        }
    }

    fn unlocked(self) -> Result<File, Errno> {
        match self {
            Self::File(file) => file.unlock().map_err(|(_, errno)| errno),
            Self::Device(file) => {
                let lock = inflight::request(libc::F_UNLCK, 0, inflight::BYTE)?;
                fcntl(&file, FcntlArg::F_OFD_SETLK(&lock))?;
                Ok(file)
            }
        }
    }

    fn lock_file(file: File, access: Access) -> Result<Self, Errno> {
        let how = match access {
            Access::ReadWrite => FlockArg::LockExclusiveNonblock,
            Access::ReadOnly => FlockArg::LockSharedNonblock,
        };
        Flock::lock(file, how).map(Self::File).map_err(|(_, errno)| errno)
    }

    fn lock_device(file: File, access: Access) -> Result<Self, Errno> {
        let how = match access {
            Access::ReadWrite => libc::F_WRLCK,
            Access::ReadOnly => libc::F_RDLCK,
        };
        let lock = inflight::request(how, 0, inflight::BYTE)?;
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock))?;
        Ok(Self::Device(file))
    }
}

#[expect(clippy::disallowed_methods, reason = "nobody is told when a lock of a dead process goes")]
fn pause() {
    std::thread::sleep(PAUSE);
}

/// Refuses a block device that the kernel does not write to: it lets one be opened for writing all
/// the same, and fails every write.
pub(super) fn check_writable(file: &File, path: &Path) -> Result<(), VolumeError> {
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
pub(super) fn size_of(file: &File, path: &Path) -> Result<u64, VolumeError> {
    use std::io::Seek;
    let mut file = file;
    file.seek(io::SeekFrom::End(0)).map_err(|e| VolumeError::io("measure", path, e))
}

pub(super) fn read_up_to(file: &File, most: usize, at: u64) -> io::Result<Vec<u8>> {
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

/// Where a signature lies, what it is, and the name of what it stands for.
pub(super) type Signature = (usize, &'static [u8], &'static str);

const LUKS_SIGNATURE: [Signature; 1] = [(0, b"LUKS\xba\xbe", "a LUKS volume")];

/// What else people keep on disks.
pub(super) const FOREIGN_SIGNATURES: [Signature; 8] = [
    (0, b"XFSB", "an xfs file system"),
    (1080, b"\x53\xef", "an ext2/3/4 file system"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    (512, b"EFI PART", "a GPT partition table"),
    (510, b"\x55\xaa", "a partition table or boot sector"),
    (4086, b"SWAPSPACE2", "swap"),
    (536, b"LVM2 001", "an LVM physical volume"),
    (0, b"QFI\xfb", "a qcow2 image"),
];

pub(super) fn signature(start: &[u8], known: &[Signature]) -> Option<&'static str> {
    let is_there =
        |(at, magic, _): &&Signature| start.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    known.iter().find(is_there).map(|(_, _, name)| *name)
}

/// What a store holds, if anything: known signatures, or any byte that is not zero in its first
/// 16 MiB or its last MiB.
pub(super) fn what_is_there(file: &File, size: u64) -> Option<String> {
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
