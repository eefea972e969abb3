//! What byokd notes of its devices, for the next daemon and for udev, for which root reads it: nothing
//! but a name comes of it, whatever the daemon's user has put there.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// The key may not be had: its requests are refused.
    Fenced,
    /// What it has written may be lost, and the kernel has not been told.
    Unflushed,
}

impl Mark {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Abandoned, Self::Fenced, Self::Unflushed];

    fn path(self, dir: &Path, uuid: Uuid) -> PathBuf {
        let word = match self {
            Self::Abandoned => "abandoned",
            Self::Fenced => "fenced",
            Self::Unflushed => "unflushed",
        };
        dir.join(format!("{uuid}.{word}"))
    }

    /// Since when it is so, from the machine's start, if it is; for ever if that cannot be read.
    #[must_use]
    pub fn since(self, dir: &Path, uuid: Uuid) -> Option<Duration> {
        match std::fs::read_to_string(self.path(dir, uuid)) {
            Ok(text) => Some(Duration::from_millis(text.trim().parse().unwrap_or_default())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => Some(Duration::ZERO),
        }
    }

    /// Notes that it is so since then, unless it has been before.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set(self, dir: &Path, uuid: Uuid, since: Duration) -> io::Result<()> {
        if self.since(dir, uuid).is_some() {
            return Ok(());
        }
        std::fs::create_dir_all(dir)?;
        std::fs::write(self.path(dir, uuid), format!("{}\n", since.as_millis()))
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
    fn a_mark_keeps_since_when_it_is_so_until_it_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let notes = dir.path().join("devices");
        let uuid = Uuid::from_u128(7);
        assert_eq!(Mark::Fenced.since(&notes, uuid), None);
        Mark::Fenced.set(&notes, uuid, Duration::from_millis(1500)).unwrap();
        Mark::Fenced.set(&notes, uuid, Duration::from_secs(9)).unwrap();
        assert_eq!(Mark::Fenced.since(&notes, uuid), Some(Duration::from_millis(1500)));
        assert_eq!(Mark::Abandoned.since(&notes, uuid), None);
        Mark::Fenced.clear(&notes, uuid);
        assert_eq!(Mark::Fenced.since(&notes, uuid), None);
        // Cut off as it was written: nothing is forgotten for that.
        std::fs::write(notes.join(format!("{uuid}.fenced")), "").unwrap();
        assert_eq!(Mark::Fenced.since(&notes, uuid), Some(Duration::ZERO));
    }

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
