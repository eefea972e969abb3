//! New volumes: a store is chosen, locked and checked before the customer's key is asked for
//! anything, and written only when the key has proved that it can be used. The header is sealed with
//! the volume key, the key goes, and only then is the store written: the key does not wait for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use uuid::Uuid;

use super::backing::{LockedFile, check_writable, size_of, what_is_there};
use super::{Access, VolumeError, write_header};
use crate::key::VolumeKey;
use crate::key::wrapped::{Canary, WrappedKey};
use crate::luks2::{DATA_OFFSET, Header, NewHeader};
use crate::units::SectorSize;

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
/// [`SealedVolume::commit`] it leaves no trace.
pub struct NewVolume {
    file: LockedFile,
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
        let existing = std::fs::metadata(&path);
        let block_device = existing.as_ref().is_ok_and(|m| m.file_type().is_block_device());
        let ours = existing.is_err();
        // Devices are known by links.
        let flags = if block_device { 0 } else { libc::O_NOFOLLOW };
        let mut open = OpenOptions::new();
        let open = open.create_new(ours).mode(0o600);
        let file = LockedFile::open(open, flags, &path, Access::ReadWrite)?;
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

    /// Seals the volume's header with its key, which goes. Nothing is written yet.
    ///
    /// # Errors
    /// The header does not fit, or the system gives no randomness.
    pub fn seal(
        self,
        key: VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
    ) -> Result<SealedVolume, VolumeError> {
        let header = Header::new(
            NewHeader {
                uuid: self.uuid,
                label: self.options.label.chars().take(40).collect(),
                capacity: self.options.capacity,
                sector_size: self.options.sector_size,
                created: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            },
            &key,
            wrapped,
            canary,
        );
        // Before what comes of it: a file that goes again may take its time.
        drop(key);
        let header = header
            .map_err(|source| VolumeError::Header { path: self.options.backing.clone(), source })?;
        Ok(SealedVolume { new: self, header })
    }
}

/// A new volume whose header is sealed with its key and not yet written.
pub struct SealedVolume {
    new: NewVolume,
    header: Header,
}

impl SealedVolume {
    /// Writes the volume: when this returns, it is on stable storage. Blocks for as long as the store
    /// does.
    ///
    /// # Errors
    /// It could not be written, for example for lack of space; a file made for it is removed.
    pub fn commit(self) -> Result<(), VolumeError> {
        let Self { mut new, header } = self;
        let path = new.options.backing.clone();
        let total = DATA_OFFSET + new.options.capacity;
        let io = |doing| {
            let path = path.clone();
            move |e: io::Error| VolumeError::io(doing, &path, e)
        };
        if !new.block_device {
            // Cut to nothing first: blocks of what was there before are given back, not kept.
            new.file.set_len(0).map_err(io("empty"))?;
            new.file.set_len(total).map_err(io("extend"))?;
            if new.options.preallocate {
                let len = i64::try_from(total).unwrap_or(i64::MAX);
                fallocate(&*new.file, FallocateFlags::empty(), 0, len)
                    .map_err(|e| VolumeError::io("allocate blocks for", &path, e))?;
            }
        }
        wipe_signatures(&new.file, total, new.block_device).map_err(io("clear"))?;
        write_header(&new.file, &header, &path)?;
        if new.ours {
            sync_directory(&path).map_err(io("sync the directory of"))?;
        }
        new.ours = false;
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
