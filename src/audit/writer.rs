//! The thread that writes. It takes what waits, writes it at the end of the newest file and syncs
//! it; what fails is tried again at the same place, so that a half-written line is completed, never
//! doubled.
//!
//! It knows how long its file is. What something else did to it, it leaves as it is, writes after
//! it, and says so: a trail does not lose what shows that it was tampered with.

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{Context, SHA256};
use tracing::error;

use crate::audit::Shared;
use crate::audit::chain::{Hash, hex};
use crate::audit::files::{list, name, sync_directory};
use crate::audit::record::{Event, Foreign, Kind};
use crate::audit::trail::Line;
use crate::audit::verify::Anchor;

/// How long to wait before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How often time alone, and the file that nothing is written to, is looked at.
const TICK: Duration = Duration::from_secs(30);

pub(super) struct Writer {
    directory: PathBuf,
    /// The newest file, and where its next line goes.
    file: Option<Newest>,
    at: u64,
    /// What comes before that line: a newline, after a line that was cut off.
    glue: &'static str,
    waiting: VecDeque<Line>,
}

struct Newest {
    path: PathBuf,
    file: File,
}

/// What something else did to the file.
struct Change {
    what: String,
    event: Event,
}

impl Writer {
    pub(super) fn new(directory: PathBuf, at: u64, glue: &'static str) -> Self {
        Self { directory, file: None, at, glue, waiting: VecDeque::new() }
    }

    /// Writes until the trail is closed and all is written, or cannot be.
    pub(super) fn run(mut self, shared: &Shared) {
        let mut looked = Instant::now();
        loop {
            let mut trail = shared.trail();
            // Requests to KMS are news as well, and nothing to be written yet.
            while self.waiting.is_empty() && trail.is_idle() && looked.elapsed() < TICK {
                trail = match shared.news.wait_timeout(trail, TICK) {
                    Ok((trail, _)) => trail,
                    Err(poisoned) => poisoned.into_inner().0,
                };
                trail.tick();
            }
            looked = Instant::now();
            self.waiting.append(&mut trail.take());
            let closed = trail.is_closed();
            drop(trail);
            let Some(last) = self.waiting.back().map(|line| line.seq) else {
                if closed {
                    return;
                }
                if let Ok(Some(change)) = self.look(b"") {
                    tell(shared, change);
                }
                continue;
            };
            while !self.waiting.is_empty() {
                match self.write(shared) {
                    Ok((up_to, bytes)) => shared.trail().wrote(up_to, bytes),
                    Err(error) => {
                        shared.trail().could_not_write(error.to_string(), last);
                        shared.news.notify_all();
                        if closed {
                            return;
                        }
                        pause(shared);
                        break;
                    }
                }
                shared.news.notify_all();
            }
        }
    }

    /// Writes what goes into one file.
    fn write(&mut self, shared: &Shared) -> io::Result<(Anchor, usize)> {
        let begins = self.waiting.front().is_some_and(|line| line.begins);
        let next = self.waiting.front().map(|line| self.directory.join(name(line.seq)));
        let begun = self.file.as_ref().map(|newest| &newest.path) == next.as_ref();
        if begins && !begun {
            // The last time that anybody looks at the file before.
            self.look(b"")?.into_iter().for_each(|change| tell(shared, change));
            self.file = None;
            (self.at, self.glue) = (0, "");
        }
        if self.file.is_none() {
            self.file = Some(self.open(begins)?);
        }
        let rest = self.waiting.iter().skip(1).take_while(|line| !line.begins).count();
        let batch = self.waiting.iter().take(1 + rest);
        let lines: String = batch.map(|line| line.text.as_str()).collect();
        let mut text = format!("{}{lines}", self.glue);
        if let Some(change) = self.look(text.as_bytes())? {
            tell(shared, change);
            text = format!("{}{lines}", self.glue);
        }
        if let Some(change) = self.append(text.as_bytes())? {
            tell(shared, change);
        }
        let (mut bytes, mut kept_from, mut up_to) = (0, None, None);
        for line in self.waiting.drain(..=rest) {
            bytes += line.text.len();
            kept_from = line.kept_from.or(kept_from);
            up_to = Some(Anchor { seq: line.seq, hash: line.hash });
        }
        if let Some(first) = kept_from {
            self.delete_before(first);
        }
        let up_to = up_to.ok_or_else(|| io::Error::other("nothing waits"))?;
        Ok((up_to, bytes))
    }

    /// Puts the text at the end of the file, of which a try that failed may have left the
    /// beginning there.
    fn append(&mut self, text: &[u8]) -> io::Result<Option<Change>> {
        let Some(Newest { path, file }) = &mut self.file else { return Err(no_file()) };
        let there = file.metadata()?.len().saturating_sub(self.at);
        let there = text.len().min(usize::try_from(there).unwrap_or(usize::MAX));
        let (begun, rest) = text.split_at(there);
        if !begun.is_empty() {
            // A sync that failed may have dropped it: it is written again.
            File::options().write(true).open(path)?.write_all_at(begun, self.at)?;
        }
        // At the end, whatever has come there since it was looked at.
        file.write_all(rest)?;
        file.sync_data()?;
        let (began, len) = (self.at + size(begun), file.metadata()?.len());
        self.at = began + size(rest);
        self.glue = "";
        if len <= self.at {
            return Ok(None);
        }
        let mut tail = vec![0; usize::try_from(len - began).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut tail, began)?;
        match tail.windows(rest.len().max(1)).position(|window| window == rest) {
            None | Some(0) => Ok(None),
            Some(before) => {
                self.at += size(&tail[..before]);
                self.added(began, size(&tail[..before])).map(Some)
            }
        }
    }

    /// Compares the file with what was written to it; `next` is what comes next, and may be there
    /// in part.
    fn look(&mut self, next: &[u8]) -> io::Result<Option<Change>> {
        let Some(Newest { path, file }) = &self.file else { return Ok(None) };
        let (ours, there) = (file.metadata()?, std::fs::metadata(path));
        let same = |other: &Metadata| (other.dev(), other.ino()) == (ours.dev(), ours.ino());
        let change = match there {
            Ok(there) if same(&there) => None,
            Ok(_) => Some("another file was put in its place"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Some("it was removed, and there is a new one")
            }
            Err(error) => return Err(error),
        };
        if change.is_some() {
            let path = path.clone();
            self.file = Some(open(path, true)?);
            sync_directory(&self.directory)?;
        }
        let Some(Newest { file, .. }) = &self.file else { return Ok(None) };
        let (len, at) = (file.metadata()?.len(), self.at);
        if change.is_none() && len == at {
            return Ok(None);
        }
        let more = usize::try_from(len.saturating_sub(at)).unwrap_or(usize::MAX);
        if change.is_none() && len > at && more <= next.len() {
            let mut begun = vec![0; more];
            file.read_exact_at(&mut begun, at)?;
            if next.starts_with(&begun) {
                return Ok(None);
            }
        }
        self.at = len;
        self.glue = if ends_a_line(file, len)? { "" } else { "\n" };
        if change.is_none() && len > at {
            return self.added(at, len - at).map(Some);
        }
        Ok(Some(self.changed(&match change {
            Some(what) => format!("{what}, which is {len} bytes long; {at} were written"),
            None => format!("{} bytes were cut off its end", at - len),
        })))
    }

    fn file_name(&self) -> String {
        let path = self.file.as_ref().and_then(|newest| newest.path.file_name());
        path.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn changed(&self, what: &str) -> Change {
        let event = Event::new(Kind::ForeignChange).detail("file", &self.file_name());
        Change { what: format!("{}: {what}", self.file_name()), event }
    }

    fn added(&self, at: u64, bytes: u64) -> io::Result<Change> {
        let Some(Newest { file, .. }) = &self.file else { return Err(no_file()) };
        let sha256 = hash_of(file, at, bytes)?;
        let mut change = self.changed(&format!("{bytes} bytes were added after byte {at}"));
        change.event.foreign = Some(Foreign { file: self.file_name(), at, bytes, sha256 });
        Ok(change)
    }

    /// The file that the next line goes to: the newest one, or a new one.
    fn open(&self, begins: bool) -> io::Result<Newest> {
        let newest = match (begins, self.waiting.front()) {
            (true, Some(line)) => self.directory.join(name(line.seq)),
            _ => match list(&self.directory)?.pop() {
                Some((_, path)) => path,
                None => return Err(io::Error::other("the newest file is gone")),
            },
        };
        let file = open(newest, begins)?;
        if begins {
            sync_directory(&self.directory)?;
        }
        Ok(file)
    }

    /// Deletes files whose records all come before this one. What cannot be deleted stays.
    fn delete_before(&self, first: u64) {
        for (number, path) in list(&self.directory).unwrap_or_default() {
            if number < first
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "an old audit file could not be deleted");
            }
        }
    }
}

fn open(path: PathBuf, create: bool) -> io::Result<Newest> {
    let mut options = File::options();
    options.read(true).append(true).create(create).mode(0o600);
    Ok(Newest { file: options.open(&path)?, path })
}

fn no_file() -> io::Error {
    io::Error::other("no file is open")
}

fn size(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

fn ends_a_line(file: &File, len: u64) -> io::Result<bool> {
    let Some(last) = len.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte == *b"\n")
}

/// Of a part of a file, which may be large: it is not ours.
fn hash_of(file: &File, mut at: u64, mut bytes: u64) -> io::Result<Hash> {
    let (mut sum, mut buffer) = (Context::new(&SHA256), vec![0; 64 << 10]);
    while bytes > 0 {
        let most = buffer.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        let part = &mut buffer[..most];
        file.read_exact_at(part, at)?;
        sum.update(part);
        (at, bytes) = (at + size(part), bytes - size(part));
    }
    hex(sum.finish().as_ref()).parse().map_err(io::Error::other)
}

/// Says what something else did, in the log and in the trail.
fn tell(shared: &Shared, Change { what, event }: Change) {
    error!(
        what,
        alert = "AuditTrailChanged",
        "something else changed the audit trail: what is there stays, and the trail goes on after it"
    );
    shared.trail().foreign_change(what, event);
}

/// Waits before what failed is tried again, or until the trail is closed.
fn pause(shared: &Shared) {
    let over = Instant::now() + RETRY;
    let mut trail = shared.trail();
    while !trail.is_closed() && Instant::now() < over {
        let left = over.saturating_duration_since(Instant::now());
        trail = match shared.news.wait_timeout(trail, left) {
            Ok((trail, _)) => trail,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}
