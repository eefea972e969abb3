//! The thread that writes. It takes what waits, writes it at its place and syncs it; what fails is
//! tried again at the same place, so that a half-written line is completed, never doubled.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::audit::Shared;
use crate::audit::files::{list, name, sync_directory};
use crate::audit::trail::Line;
use crate::audit::verify::Anchor;

/// How long to wait before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How often time alone is looked at.
const TICK: Duration = Duration::from_secs(30);

pub(super) struct Writer {
    directory: PathBuf,
    /// The newest file and where its next line goes.
    file: Option<File>,
    at: u64,
    /// What comes before that line: a newline, after a line that was cut off.
    glue: &'static str,
    waiting: VecDeque<Line>,
}

impl Writer {
    pub(super) fn new(directory: PathBuf, at: u64, glue: &'static str) -> Self {
        Self { directory, file: None, at, glue, waiting: VecDeque::new() }
    }

    /// Writes until the trail is closed and all is written, or cannot be.
    pub(super) fn run(mut self, shared: &Shared) {
        loop {
            let mut trail = shared.trail();
            while self.waiting.is_empty() && trail.is_idle() {
                trail = match shared.news.wait_timeout(trail, TICK) {
                    Ok((trail, _)) => trail,
                    Err(poisoned) => poisoned.into_inner().0,
                };
                trail.tick();
            }
            self.waiting.append(&mut trail.take());
            let closed = trail.is_closed();
            drop(trail);
            let Some(last) = self.waiting.back().map(|line| line.seq) else { return };
            while !self.waiting.is_empty() {
                match self.write() {
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
    fn write(&mut self) -> io::Result<(Anchor, usize)> {
        let begins = self.waiting.front().is_some_and(|line| line.begins);
        if begins {
            self.file = None;
            (self.at, self.glue) = (0, "");
        }
        if self.file.is_none() {
            self.file = Some(self.open(begins)?);
        }
        let Some(file) = &self.file else { return Err(io::Error::other("no file is open")) };
        let rest = self.waiting.iter().skip(1).take_while(|line| !line.begins).count();
        let batch = self.waiting.iter().take(1 + rest);
        let text: String =
            std::iter::once(self.glue).chain(batch.map(|line| line.text.as_str())).collect();
        file.write_all_at(text.as_bytes(), self.at)?;
        file.sync_data()?;
        self.at += u64::try_from(text.len()).unwrap_or(u64::MAX);
        self.glue = "";
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

    /// The file that the next line goes to: the newest one, or a new one.
    fn open(&self, begins: bool) -> io::Result<File> {
        let newest = match (begins, self.waiting.front()) {
            (true, Some(line)) => self.directory.join(name(line.seq)),
            _ => match list(&self.directory)?.pop() {
                Some((_, path)) => path,
                None => return Err(io::Error::other("the newest file is gone")),
            },
        };
        let mut options = File::options();
        options.write(true).create(begins).truncate(false).mode(0o600);
        let file = options.open(newest)?;
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
