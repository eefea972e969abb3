//! A volume grows: first its store, then its header. A crash in between leaves a store that is
//! longer than its header says, which is as good as before.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::backing::size_of;
use super::{LockedVolume, NextHeader, UnlockedVolume, VolumeError};
use crate::luks2::Header;

impl LockedVolume {
    /// Makes the store as long as `next` says, if it is shorter, and writes that header. Blocks for
    /// as long as the store does.
    ///
    /// # Errors
    /// The store cannot grow, or the header cannot be written: the old size counts.
    pub fn grow(&self, next: &NextHeader) -> Result<(), VolumeError> {
        grow_store(&self.file, next.header(), &self.path)?;
        self.replace_header(next)
    }
}

impl UnlockedVolume {
    /// As [`LockedVolume::grow`], of a volume that may be in service.
    ///
    /// # Errors
    /// As there.
    pub fn grow(&self, next: &NextHeader) -> Result<(), VolumeError> {
        self.0.grow(next)
    }
}

fn grow_store(file: &File, header: &Header, path: &Path) -> Result<(), VolumeError> {
    let request = |why: String| VolumeError::Request { path: path.to_owned(), why };
    let needed = header.segment().offset.checked_add(header.token().capacity);
    let needed = needed.ok_or_else(|| request("that is more than a store can hold".to_owned()))?;
    let found = size_of(file, path)?;
    if found >= needed {
        return Ok(());
    }
    let metadata = file.metadata().map_err(|e| VolumeError::io("look at", path, e))?;
    if metadata.file_type().is_block_device() {
        let why =
            format!("the device has {found} bytes, {needed} are needed; make it larger first");
        return Err(request(why));
    }
    file.set_len(needed).map_err(|e| VolumeError::io("grow", path, e))?;
    // The header must not say more than is there after a crash.
    file.sync_all().map_err(|e| VolumeError::io("sync", path, e))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::volume::tests::{key, make};
    use crate::volume::{Access, VolumeErrorClass, inspect};

    #[test]
    fn a_volume_grows_with_its_store_and_a_crash_in_between_leaves_the_old_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        make(&path);
        let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
        let old = volume.header();
        let capacity = old.token().capacity * 2;
        let sealed = |byte| NextHeader::resize(Arc::clone(&old), &key(byte), capacity, &path);
        assert_eq!(sealed(2).map(drop).unwrap_err().class(), VolumeErrorClass::WrongKey);
        let next = sealed(1).unwrap();
        grow_store(&volume.file, next.header(), &path).unwrap();
        assert_eq!(inspect(&path).unwrap().0.token().capacity, old.token().capacity);
        let longer = std::fs::metadata(&path).unwrap().len();
        assert_eq!(longer, old.segment().offset + capacity);
        volume.grow(&next).unwrap();
        drop(volume);
        let volume = LockedVolume::open(&path, Access::ReadWrite).unwrap();
        let volume = volume.unlock(&key(1)).map_err(|(_, e)| e).unwrap();
        assert_eq!(volume.geometry().capacity(), capacity);
    }
}
