//! Another header for a volume, as for another wrapping of its key: the next header is sealed with
//! the key, the key goes, and only then is the header written. So the key does not wait for a disk.

use std::path::Path;
use std::sync::Arc;

use super::{Access, LockedVolume, UnlockedVolume, VolumeError, lock_mutex, write_header};
use crate::key::VolumeKey;
use crate::key::wrapped::{Canary, WrappedKey};
use crate::luks2::Header;

/// The next version of a volume's header, sealed with its key and not yet written.
pub struct NextHeader {
    replaces: Arc<Header>,
    header: Arc<Header>,
}

impl NextHeader {
    /// `header` with another wrapped key and canary, after checking that `key`, which the new
    /// wrapping gave, is the volume's. `path` is where the volume lies, for the error.
    ///
    /// # Errors
    /// The key is not the volume's, or the header was changed by someone without it.
    pub fn seal(
        header: Arc<Header>,
        key: &VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
        path: &Path,
    ) -> Result<Self, VolumeError> {
        header
            .verify(key)
            .map_err(|source| VolumeError::WrongKey { path: path.to_owned(), source })?;
        let next = header
            .rewrapped(key, wrapped, canary)
            .map_err(|source| VolumeError::Header { path: path.to_owned(), source })?;
        Ok(Self { replaces: header, header: Arc::new(next) })
    }

    /// `header` with another capacity, after checking that `key` is the volume's.
    ///
    /// # Errors
    /// The key is not the volume's, the header was changed by someone without it, or it gives the
    /// data a fixed size, past which others would not read.
    pub fn resize(
        header: Arc<Header>,
        key: &VolumeKey,
        capacity: u64,
        path: &Path,
    ) -> Result<Self, VolumeError> {
        header
            .verify(key)
            .map_err(|source| VolumeError::WrongKey { path: path.to_owned(), source })?;
        if let Some(fixed) = header.segment().size.filter(|fixed| *fixed < capacity) {
            let why = format!("its header fixes the size of its data to {fixed} bytes");
            return Err(VolumeError::Request { path: path.to_owned(), why });
        }
        let next = header
            .resized(key, capacity)
            .map_err(|source| VolumeError::Header { path: path.to_owned(), source })?;
        Ok(Self { replaces: header, header: Arc::new(next) })
    }

    /// The new header.
    #[must_use]
    pub fn header(&self) -> &Arc<Header> {
        &self.header
    }
}

impl LockedVolume {
    /// Writes the next header, crash-safe. Blocks for as long as the store does.
    ///
    /// # Errors
    /// The header was changed since, or could not be written: then the old or the new one is good.
    pub fn replace_header(&self, next: &NextHeader) -> Result<(), VolumeError> {
        let _one_at_a_time = lock_mutex(&self.writing);
        let now = self.header();
        if now.seqid() != next.replaces.seqid() || now.token() != next.replaces.token() {
            return Err(VolumeError::Changed(self.path.clone()));
        }
        if self.access == Access::ReadOnly {
            let read_only = std::io::Error::from_raw_os_error(nix::libc::EROFS);
            return Err(VolumeError::io("write the header of", &self.path, read_only));
        }
        write_header(&self.file, &next.header, &self.path)?;
        *lock_mutex(&self.header) = Arc::clone(&next.header);
        Ok(())
    }
}

impl UnlockedVolume {
    /// As [`LockedVolume::replace_header`], of a volume that may be in service.
    ///
    /// # Errors
    /// As there.
    pub fn replace_header(&self, next: &NextHeader) -> Result<(), VolumeError> {
        self.0.replace_header(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::tests::{key, make, wrapped};
    use crate::volume::{VolumeErrorClass, inspect};

    #[test]
    fn a_rewrapped_volume_opens_with_the_same_key_and_only_the_header_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let uuid = make(&path);
        let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
        let old = volume.header();
        let new_wrapping = || wrapped(uuid, 8);
        let seal = |byte| {
            let (wrapped, canary) = new_wrapping();
            NextHeader::seal(volume.header(), &key(byte), wrapped, canary, &path)
        };
        let wrong = seal(2).map(|_| ()).unwrap_err();
        assert_eq!(wrong.class(), VolumeErrorClass::WrongKey);
        let (next, stale) = (seal(1).unwrap(), seal(1).unwrap());
        volume.replace_header(&next).unwrap();
        assert_eq!(volume.header().seqid(), old.seqid() + 1);
        let refused = volume.replace_header(&stale).unwrap_err();
        assert_eq!(refused.class(), VolumeErrorClass::Changed);
        drop(volume);
        let (header, note) = inspect(&path).unwrap();
        assert_eq!((header.token(), note), (next.header().token(), None));
        assert_eq!(header.token().wrapped, new_wrapping().0);
        header.verify(&key(1)).unwrap();
        let volume = LockedVolume::open(&path, Access::ReadOnly).unwrap();
        let (wrapped, canary) = wrapped(uuid, 9);
        let next = NextHeader::seal(volume.header(), &key(1), wrapped, canary, &path).unwrap();
        let refused = volume.replace_header(&next).unwrap_err();
        assert_eq!(refused.class(), VolumeErrorClass::ReadOnly);
    }
}
