//! What byokd notes of its devices, for the next daemon and for udev, for which root reads it: nothing
//! but a name comes of it, whatever the daemon's user has put there.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use uuid::Uuid;

/// What is before the name.
const KEY: &str = "BYOKD_VOLUME=";

/// More than any note has.
const MOST: u64 = 128;

/// What is noted of a device besides its name, if it is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It was to be taken away, and nobody was there who could.
    Abandoned,
}

impl Mark {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::Abandoned];

    fn path(self, dir: &Path, uuid: Uuid) -> PathBuf {
        let word = match self {
            Self::Abandoned => "abandoned",
        };
        dir.join(format!("{uuid}.{word}"))
    }

    /// Whether it is so.
    #[must_use]
    pub fn is_set(self, dir: &Path, uuid: Uuid) -> bool {
        self.path(dir, uuid).exists()
    }

    /// Notes it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set(self, dir: &Path, uuid: Uuid) -> io::Result<()> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(self.path(dir, uuid), "")
    }

    /// It is not so any more.
    pub fn clear(self, dir: &Path, uuid: Uuid) {
        // It need not be there.
        let _gone = std::fs::remove_file(self.path(dir, uuid));
    }
}

/// What is noted of a device of the volume `name`.
#[must_use]
pub fn note_of(name: &str) -> String {
    format!("{KEY}{name}\n")
}

/// The name of the volume `uuid`, as it is noted in `dir`, if it is one.
///
/// # Errors
/// There is no note, or it is no file with a name in it.
pub fn name_of(dir: &Path, uuid: Uuid, is_name: fn(&str) -> bool) -> io::Result<String> {
    let mut note = String::new();
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file =
        OpenOptions::new().read(true).custom_flags(flags).open(dir.join(uuid.to_string()))?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("the note is no file"));
    }
    file.take(MOST).read_to_string(&mut note)?;
    let name = note.strip_prefix(KEY).and_then(|rest| rest.strip_suffix('\n'));
    match name {
        Some(name) if is_name(name) => Ok(name.to_owned()),
        _ => Err(io::Error::other("the note is not the name of a volume")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::is_volume_name;

    #[test]
    fn a_note_gives_a_name_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = Uuid::from_u128(7);
        let note = dir.path().join(uuid.to_string());
        let read = |text: &str| {
            std::fs::write(&note, text).unwrap();
            name_of(dir.path(), uuid, is_volume_name)
        };
        assert_eq!(read("BYOKD_VOLUME=zeebe-1.data\n").unwrap(), "zeebe-1.data");
        assert_eq!(read(&note_of("v")).unwrap(), "v");
        let long = format!("BYOKD_VOLUME={}\n", "a".repeat(200));
        let more = "BYOKD_VOLUME=v\nSYSTEMD_WANTS=debug-shell.service\n";
        for wrong in [
            "",
            "v\n",
            "BYOKD_VOLUME=../sda\n",
            "BYOKD_VOLUME=v w\n",
            "BYOKD_VOLUME=.v\n",
            more,
            &long,
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
        std::fs::remove_file(&note).unwrap();
        name_of(dir.path(), uuid, is_volume_name).unwrap_err();
        std::fs::write(dir.path().join("elsewhere"), "BYOKD_VOLUME=v\n").unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &note).unwrap();
        assert!(name_of(dir.path(), uuid, is_volume_name).is_err(), "a link is not followed");
    }
}
