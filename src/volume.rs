//! stub
use crate::key::VolumeKey;
use crate::units::Geometry;
use std::fs::File;
use std::path::Path;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct VolumeError;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    ReadOnly,
}
pub struct UnlockedVolume {
    pub f: File,
    pub g: Geometry,
}
impl UnlockedVolume {
    pub fn geometry(&self) -> Geometry {
        self.g
    }
    pub fn access(&self) -> Access {
        Access::ReadWrite
    }
    pub fn file(&self) -> &File {
        &self.f
    }
    pub fn data_offset(&self) -> u64 {
        16 << 20
    }
    pub fn backing_path(&self) -> &Path {
        Path::new("x")
    }
    pub fn verify(&self, _k: &VolumeKey) -> Result<(), VolumeError> {
        Ok(())
    }
}
