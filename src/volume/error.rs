//! Why something could not be done with a volume on a store, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use nix::libc;
use thiserror::Error;

use crate::luks2::{HeaderError, WrongKey};

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
    /// Someone changed it meanwhile.
    Changed,
    /// The key is not the volume's.
    WrongKey,
    /// What was asked for makes no sense.
    Request,
    /// Too many files are open.
    Descriptors,
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
    #[error("{} is in use: another daemon or volume has it open, or it is mounted or part of another device", .0.display())]
    Busy(PathBuf),
    /// What was written to it by a daemon that has ended has not.
    #[error("{}: a write of a daemon that has ended is still under way", .0.display())]
    InFlight(PathBuf),
    /// Its header is not the one that was read.
    #[error("the header of {} was changed by somebody else meanwhile", .0.display())]
    Changed(PathBuf),
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
    pub(super) fn io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
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
                Some(libc::EMFILE | libc::ENFILE) => VolumeErrorClass::Descriptors,
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
            Self::Busy(_) | Self::InFlight(_) => VolumeErrorClass::Busy,
            Self::Changed(_) => VolumeErrorClass::Changed,
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
        if matches!(self, Self::InFlight(_)) {
            return "Look at the disk beneath it, and try again when it answers.";
        }
        match self.class() {
            VolumeErrorClass::NotFound => "Check the path of the backing file or device.",
            VolumeErrorClass::NotAVolume => {
                "Check the path, or make a volume there with `byokctl volume create`."
            }
            VolumeErrorClass::Damaged => {
                "Restore the header from a backup with `cryptsetup luksHeaderRestore`; the data is untouched."
            }
            VolumeErrorClass::Busy => "Detach it where it is attached, then try again.",
            VolumeErrorClass::Changed => "Look at the volume's status, then try again.",
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
            VolumeErrorClass::Descriptors => {
                "Raise LimitNOFILE for byokd, or attach fewer volumes."
            }
            VolumeErrorClass::Io => "See the system's log for the backing store.",
        }
    }
}
