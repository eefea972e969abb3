//! The files of a trail: `audit-NUMBER.jsonl`, by the number of their first record.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::audit::chain::{Hash, Link, Signed, check, signed_by};
use crate::audit::record::{Kind, Record, Torn};
use crate::audit::verify::{Anchor, is_cut_off};
use crate::units::word;

/// The name of the file that begins with this record.
#[must_use]
pub fn name(first: u64) -> String {
    format!("audit-{first:012}.jsonl")
}

/// The files in a directory, in order.
///
/// # Errors
/// The directory cannot be read.
pub fn list(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let stem = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = stem.strip_prefix("audit-").and_then(|rest| rest.strip_suffix(".jsonl"));
        if let Some(first) = number.and_then(|number| number.parse().ok()) {
            found.push((first, path));
        }
    }
    found.sort();
    Ok(found)
}

/// What a daemon finds when it starts.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// First records of all files.
    pub(super) firsts: Vec<u64>,
    /// The last good record.
    pub(super) tip: Option<Anchor>,
    /// That is the end of a run that stopped in order.
    pub(super) stopped: bool,
    /// The records before the tip and with it that do not bear the given key's signature begin at
    /// the latest here; none do if it is none.
    pub(super) unsigned_from: Option<u64>,
    /// Records of the last file.
    pub(super) records: Vec<Record>,
    /// Bytes of the last file.
    pub(super) len: u64,
    /// What comes before the next line in the same file.
    pub(super) glue: &'static str,
    /// What a crash cut off at its end.
    pub(super) torn: Option<Torn>,
    /// Its end is neither good nor cut off by a crash: the line.
    pub(super) damaged: Option<usize>,
}

impl Found {
    fn good(&mut self, link: &Link, key: Option<&[u8]>) {
        self.tip = Some(Anchor { seq: link.seq, hash: link.hash });
        self.stopped = link.event == word(Kind::DaemonStop);
        if key.is_some_and(|key| signed_by(link, key) == Signed::Whole) {
            self.unsigned_from = None;
        } else {
            self.unsigned_from.get_or_insert(link.seq);
        }
    }
}

/// Reads the end of a trail whose records are signed with this key.
pub(super) fn find(directory: &Path, key: Option<&[u8]>) -> io::Result<Found> {
    let files = list(directory)?;
    let mut found =
        Found { firsts: files.iter().map(|(first, _)| *first).collect(), ..Found::default() };
    for (age, (_, path)) in files.iter().rev().enumerate() {
        let bytes = std::fs::read(path)?;
        if age == 0 {
            read_end(&bytes, key, &mut found);
        } else if let Some(link) = last_record(&bytes) {
            // The newest file has no good record: a crash while it was begun.
            found.good(&link, key);
        }
        if found.tip.is_some() {
            break;
        }
    }
    Ok(found)
}

fn last_record(bytes: &[u8]) -> Option<Link> {
    bytes.rsplit(|byte| *byte == b'\n').find_map(|line| check(line).ok())
}

fn read_end(bytes: &[u8], key: Option<&[u8]>, found: &mut Found) {
    found.len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let (mut at, mut number) = (0, 0);
    let mut bad: Option<(usize, usize)> = None;
    while at < bytes.len() {
        number += 1;
        let end = bytes[at..].iter().position(|byte| *byte == b'\n').map(|n| at + n);
        let line = &bytes[at..end.unwrap_or(bytes.len())];
        match check(line) {
            Ok(link) => {
                bad = None;
                found.good(&link, key);
                // A later version's kinds are no reason to stop.
                found.records.extend(serde_json::from_slice::<Record>(line).ok());
                found.glue = if end.is_none() { "\n" } else { "" };
            }
            Err(_) => {
                bad.get_or_insert((at, number));
            }
        }
        at = end.map_or(bytes.len(), |end| end + 1);
    }
    let Some((from, line)) = bad else { return };
    let rest = &bytes[from..];
    if is_cut_off(rest) {
        let bytes = u64::try_from(rest.len()).unwrap_or(u64::MAX);
        found.torn = Some(Torn { bytes, sha256: Hash::of(rest) });
    } else {
        found.damaged = Some(line);
    }
    found.glue = if rest.ends_with(b"\n") && found.torn.is_none() { "" } else { "\n" };
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
