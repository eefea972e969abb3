//! Where the ciphertext lies: the data segment of a file or block device.
//!
//! A [`Backing`] is opened on the descriptor that holds the volume's lock. What it stands on
//! decides how it is spoken to: memory-backed file systems answer at once, so plain calls are
//! fastest ([`Speed::Immediate`]); everything else goes through [`uring`], with `O_DIRECT` where
//! the file system allows, because a disk may take its time and must not hold its caller.

pub(crate) mod inflight;
pub mod uring;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use nix::unistd::{Whence, lseek64};
use tracing::debug;

use crate::buffer::{Buffer, Ciphertext, Pool};
use crate::units::SectorRange;

/// How the backing store answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// From memory: a plain call does not wait for anything.
    Immediate,
    /// From a device: through the ring.
    Queued,
}

/// Whether a store that failed so may do better in a moment: it ran out of memory or slots, or the
/// path to a disk flapped. A flush is never repeated, nor a write that is one as well: the kernel
/// forgets what it could not write, and a second flush would succeed without it.
#[must_use]
pub fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EAGAIN
                | Errno::EBUSY
                | Errno::EIO
                | Errno::ENOBUFS
                | Errno::ENOLINK
                | Errno::ENOMEM
                | Errno::ETIMEDOUT
        )
    )
}

/// Whether to bypass the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectIo {
    /// Where the file system and the sector size allow it.
    Auto,
    /// Never.
    Off,
}

/// Whether a write must be on stable storage when it is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// At the next flush.
    Cached,
    /// Now: `NBD_CMD_FLAG_FUA`.
    Durable,
}

/// A run of bytes that are all allocated or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// Whether the backing store has blocks for it.
    pub allocated: bool,
}

/// ramfs has no constant in the C library.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// File systems that take an operation without waiting for anything (`IOCB_NOWAIT`). FUSE waits for
/// room in its queue, and network file systems for their servers.
const NEVER_WAIT: [FsType; 3] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC];

/// The data segment of an open volume.
pub struct Backing {
    file: File,
    data_offset: u64,
    speed: Speed,
    direct: bool,
    read_only: bool,
    block_device: bool,
    /// The kernel may wait for it already when it is handed an operation.
    waits: bool,
}

impl Backing {
    /// The data segment that starts `data_offset` bytes into `locked`. The descriptor is opened
    /// anew for I/O; the lock stays with `locked`, which must be kept.
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn open(
        locked: &File,
        data_offset: u64,
        probe: SectorRange,
        read_only: bool,
        direct: DirectIo,
    ) -> io::Result<Self> {
        let kind = fstatfs(locked)?.filesystem_type();
        let block_device = locked.metadata()?.file_type().is_block_device();
        let in_memory = !block_device && (kind == TMPFS_MAGIC || kind == RAMFS_MAGIC);
        let path = format!("/proc/self/fd/{}", locked.as_raw_fd());
        let open =
            |flags| OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(&path);
        let mut backing = Self {
            file: open(0)?,
            data_offset,
            speed: if in_memory { Speed::Immediate } else { Speed::Queued },
            direct: false,
            read_only,
            block_device,
            waits: !block_device && !NEVER_WAIT.contains(&kind),
        };
        if direct == DirectIo::Auto
            && !in_memory
            && let Ok(file) = open(libc::O_DIRECT)
        {
            let cached = std::mem::replace(&mut backing.file, file);
            // A device with larger blocks than our sectors refuses this with EINVAL.
            if backing.reads_one(probe) {
                backing.direct = true;
            } else {
                backing.file = cached;
            }
        }
        backing.hold();
        Ok(backing)
    }

    /// The same for one client, where the kernel keeps what is written and writes it later: it tells
    /// each open file once of what it could not write, so that whoever flushes needs one of his own.
    /// `None` where writes are written at once. Whoever opens it may have to wait for the store.
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn for_one(&self) -> io::Result<Option<Self>> {
        if self.direct || self.read_only || self.speed == Speed::Immediate {
            return Ok(None);
        }
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let Self { data_offset, speed, direct, read_only, block_device, waits, .. } = *self;
        let one = Self { file, data_offset, speed, direct, read_only, block_device, waits };
        one.hold();
        Ok(Some(one))
    }

    /// Whatever is written stays known to whoever opens the volume next. Where that cannot be, the
    /// volume's lock is all there is.
    fn hold(&self) {
        if !self.read_only
            && let Err(error) = inflight::hold(&self.file)
        {
            debug!(%error, "no lock for what is in flight");
        }
    }

    fn reads_one(&self, probe: SectorRange) -> bool {
        let (one, _) = probe.split_front(1);
        let len = usize::try_from(one.len()).unwrap_or_default();
        Pool::new().take(len).is_ok_and(|buffer| self.read(one, buffer).is_ok())
    }

    /// How it answers.
    #[must_use]
    pub fn speed(&self) -> Speed {
        self.speed
    }

    /// Whether it bypasses the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether handing it an operation may wait for it: then the kernel's own threads have to.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        self.waits
    }

    /// Where `at` lies, in bytes from the start of the file or device.
    #[must_use]
    pub fn position(&self, at: SectorRange) -> u64 {
        // No overflow: the header was checked against the size of the file.
        self.data_offset + at.offset()
    }

    /// Reads the sectors of `at` into `buffer`, waiting for it.
    ///
    /// # Errors
    /// The store failed or is shorter than it should be; the buffer comes back.
    pub fn read(
        &self,
        at: SectorRange,
        mut buffer: Buffer,
    ) -> Result<Ciphertext, (io::Error, Buffer)> {
        match self.file.read_exact_at(buffer.bytes_mut(), self.position(at)) {
            Ok(()) => Ok(Ciphertext::new(buffer)),
            Err(error) => Err((error, buffer)),
        }
    }

    /// Writes `data` to the sectors of `at`, waiting for it.
    ///
    /// # Errors
    /// The store failed; some of the sectors may have been written.
    pub fn write(
        &self,
        at: SectorRange,
        data: &Ciphertext,
        durability: Durability,
    ) -> io::Result<()> {
        self.file.write_all_at(data.bytes(), self.position(at))?;
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.file.sync_data(),
        }
    }

    /// Puts everything written so far on stable storage.
    ///
    /// # Errors
    /// The store failed; what was written since the last flush may be lost.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the blocks of `at` back. What they read as afterwards is unspecified.
    ///
    /// # Errors
    /// The store failed. That it cannot give blocks back is not an error: a trim is advice.
    pub fn discard(&self, at: SectorRange) -> io::Result<()> {
        let signed = |n: u64| i64::try_from(n).map_err(|_| Errno::EFBIG);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, flags, signed(self.position(at))?, signed(at.len())?) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Which parts of `at` have blocks: at most `most` runs from its start.
    ///
    /// # Errors
    /// The store failed.
    pub fn extents(&self, at: SectorRange, most: usize) -> io::Result<Vec<Extent>> {
        let whole = vec![Extent { len: at.len(), allocated: true }];
        if self.block_device {
            return Ok(whole);
        }
        let (mut from, end) = (self.position(at), self.position(at) + at.len());
        let mut extents = Vec::new();
        while from < end && extents.len() < most {
            let data = match seek(&self.file, from, Whence::SeekData) {
                Ok(data) => data.min(end),
                Err(Errno::ENXIO) => end,
                // A file system without holes.
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(whole),
                Err(errno) => return Err(errno.into()),
            };
            if data > from {
                extents.push(Extent { len: data - from, allocated: false });
                from = data;
                continue;
            }
            let hole = seek(&self.file, from, Whence::SeekHole)?.min(end);
            extents.push(Extent { len: hole - from, allocated: true });
            from = hole;
        }
        Ok(extents)
    }
}

impl AsFd for Backing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn seek(file: &File, from: u64, whence: Whence) -> nix::Result<u64> {
    let from = i64::try_from(from).map_err(|_| Errno::EFBIG)?;
    let found = lseek64(file, from, whence)?;
    u64::try_from(found).map_err(|_| Errno::EFBIG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Geometry, SectorSize};

    #[test]
    fn holes_and_data_are_told_apart_and_a_punched_range_is_a_hole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        file.set_len((1 << 20) + 65536).unwrap();
        let geometry = Geometry::new(1 << 20, SectorSize::B4096);
        let all = geometry.sectors(0, 1 << 20).unwrap();
        let backing = Backing::open(&file, 65536, all, false, DirectIo::Auto).unwrap();
        let at = geometry.sectors(131_072, 65536).unwrap();
        let mut buffer = Pool::new().take(65536).unwrap();
        buffer.bytes_mut().fill(1);
        let data = Ciphertext::new(buffer);
        backing.write(at, &data, Durability::Durable).unwrap();
        let runs = |n| {
            let extents = backing.extents(all, n).unwrap();
            extents.iter().map(|e| (e.len, e.allocated)).collect::<Vec<_>>()
        };
        assert_eq!(runs(9), [(131_072, false), (65536, true), (851_968, false)]);
        assert_eq!(runs(1), [(131_072, false)]);
        backing.discard(at).unwrap();
        assert_eq!(runs(9), [(1 << 20, false)]);
    }
}
