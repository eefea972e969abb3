//! The audit trail: every key event on a line of its own, chained by hashes, on stable storage.
//!
//! [`Audit::record`] takes an event and waits for nothing: the record gets its number, its hash
//! and its place in the chain under a lock, and one thread writes. [`Audit::durable`] waits, for a
//! bounded time, until it is on stable storage: for what must be recorded before it happens, an
//! attach. A fence never waits.
//!
//! | file | what it is |
//! |---|---|
//! | `record.rs` | events and records |
//! | `chain.rs` | lines and hashes: what a line proves by itself |
//! | `trail.rs` | the chain in memory: numbers, checkpoints, rotation, the queue |
//! | `writer.rs` | the thread that writes |
//! | `files.rs` | the files, and what a daemon finds in them when it starts |
//! | `signer.rs` | the key that records are signed with |
//! | `calls.rs` | requests to KMS, gathered |
//! | `recent.rs` | the latest records, in memory |
//! | `verify.rs` | checking a trail |
//! | `reconcile.rs` | holding it against the customer's CloudTrail |

mod calls;
pub mod chain;
pub mod files;
mod recent;
pub mod reconcile;
pub mod record;
mod signer;
mod trail;
pub mod verify;
mod words;
mod writer;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::audit::files::Found;
use crate::audit::record::{Event, Kind, Record};
use crate::audit::signer::Signer;
use crate::audit::trail::Trail;
use crate::audit::verify::Anchor;
use crate::kms::Call;

pub use signer::{KeyFileError, public_key};

/// How a trail is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditSettings {
    /// Where its files lie.
    pub directory: PathBuf,
    /// Bytes of a file, after which the next one is begun.
    pub file_size: u64,
    /// Files that are kept; 0: all.
    pub keep: usize,
    /// Records between two checkpoints.
    pub checkpoint_every: u64,
    /// The key that records are signed with.
    pub signing_key: Option<PathBuf>,
    /// What happens if it cannot be written.
    pub on_failure: OnFailure,
}

/// What happens if the trail cannot be written. What is served goes on being served either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// No volume is attached or made.
    #[default]
    RefuseAttach,
    /// Everything goes on, with an alarm.
    Continue,
}

/// A trail that cannot be opened.
#[derive(Debug, Error)]
pub enum AuditOpenError {
    /// A file or directory.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another daemon writes there.
    #[error("another byokd writes the audit trail in {}", .0.display())]
    InUse(PathBuf),
    /// The key that records are signed with.
    #[error(transparent)]
    Key(#[from] KeyFileError),
}

/// A record that is not on stable storage.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the audit trail cannot be written: {why}")]
pub struct NotDurable {
    why: String,
}

/// How a trail is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditStatus {
    /// Where its files lie.
    pub directory: PathBuf,
    /// This run of the daemon.
    pub instance: Uuid,
    /// The last record.
    pub head: Anchor,
    /// The last record on stable storage.
    pub written: Anchor,
    /// Why it cannot be written, while it cannot.
    pub failing: Option<Failing>,
    /// Failed tries to write since the daemon started.
    pub failures: u64,
    /// Events of this run that could not be recorded.
    pub lost: u64,
    /// What happens while it cannot be written.
    pub on_failure: OnFailure,
    /// What else changed its files while this run wrote to them, the last time that was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<Failing>,
    /// The public key of its records, in hex.
    pub public_key: Option<String>,
}

/// Why a trail cannot be written, or what was done to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// Since when, RFC 3339.
    pub since: String,
    /// Why.
    pub why: String,
}

/// The trail of a daemon.
#[derive(Debug)]
pub struct Audit {
    settings: AuditSettings,
    shared: Arc<Shared>,
    before: Before,
    /// Nobody else writes to the directory while this lives.
    alone: Option<Flock<File>>,
}

/// What a trail was when it was opened.
#[derive(Debug, Default)]
struct Before {
    /// Its last record.
    tip: Option<Anchor>,
    /// That ends a run which stopped in order.
    stopped: bool,
    /// Records that bear no signature of this run's key.
    unsigned: Option<String>,
}

impl Before {
    fn of(found: &Found, signs: bool) -> Self {
        let unsigned = found.tip.zip(found.unsigned_from).map(|(tip, from)| {
            let from = if signs { from } else { found.firsts.first().map_or(1, |first| *first) };
            format!("{from} to {}", tip.seq)
        });
        Self { tip: found.tip, stopped: found.stopped, unsigned }
    }

    /// Says it in the log, if there is something to be said.
    fn announce(&self, signs: bool) {
        let Some(tip) = self.tip else { return };
        if self.stopped {
            return;
        }
        match self.unsigned.as_deref().filter(|_| signs) {
            Some(records) => error!(
                records,
                "the run before did not stop in order, and at the end of its audit trail are \
                 records without a signature of this key: check it with `byokctl audit verify`"
            ),
            None => warn!(
                seq = tip.seq,
                hash = %tip.hash,
                "the run before did not stop in order: the audit trail goes on after this record"
            ),
        }
    }
}

#[derive(Debug)]
struct Shared {
    trail: Mutex<Trail>,
    /// Something is to be written, or was, or could not be.
    news: Condvar,
}

impl Shared {
    fn trail(&self) -> MutexGuard<'_, Trail> {
        self.trail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long an attach waits for its record before the trail counts as failing.
const PATIENCE: Duration = Duration::from_secs(5);

impl Audit {
    /// Opens the trail in a directory, and goes on with what is there.
    ///
    /// # Errors
    /// The directory cannot be made or read, another daemon writes there, or the key that records
    /// are signed with cannot be used.
    pub fn open(settings: AuditSettings) -> Result<Arc<Self>, AuditOpenError> {
        let directory = settings.directory.clone();
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| AuditOpenError::Io { doing, path, source }
        };
        make_directory(&directory).map_err(io("make the audit directory", &directory))?;
        let path = directory.join(".lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(io("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| AuditOpenError::InUse(directory.clone()))?;
        let signer = settings.signing_key.as_deref().map(Signer::read).transpose()?;
        let signs = signer.is_some();
        let key = signer.as_ref().and_then(|signer| chain::unhex(signer.public()));
        let found = files::find(&directory, key.as_deref()).map_err(io("read", &directory))?;
        let before = Before::of(&found, signs);
        before.announce(signs);
        if let Some(line) = found.damaged {
            error!(
                directory = %directory.display(),
                line,
                "the end of the audit trail was changed by something else than a crash: check it \
                 with `byokctl audit verify`"
            );
        }
        let (len, glue) = (found.len, found.glue);
        let trail = Trail::new(&settings, signer, found);
        let shared = Arc::new(Shared { trail: Mutex::new(trail), news: Condvar::new() });
        let writer = writer::Writer::new(directory.clone(), len, glue);
        let thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&thread))
            .map_err(io("start the thread that writes", &directory))?;
        let audit = Arc::new(Self { settings, shared, before, alone: Some(lock) });
        audit.shared.trail().begin();
        audit.shared.news.notify_all();
        Ok(audit)
    }

    /// A trail that is kept in memory only, for who has turned it off, and for tests.
    #[must_use]
    pub fn in_memory() -> Arc<Self> {
        let settings = AuditSettings {
            directory: PathBuf::new(),
            file_size: u64::MAX,
            keep: 0,
            checkpoint_every: u64::MAX,
            signing_key: None,
            on_failure: OnFailure::Continue,
        };
        let trail = Mutex::new(Trail::in_memory(&settings));
        let shared = Arc::new(Shared { trail, news: Condvar::new() });
        Arc::new(Self { settings, shared, before: Before::default(), alone: None })
    }

    /// Adds to the record of a start what was there before it, and whether anything vouches for
    /// that: the daemon that starts cannot.
    #[must_use]
    pub fn after(&self, mut start: Event) -> Event {
        let Before { tip: Some(tip), stopped, unsigned } = &self.before else { return start };
        let ended = if *stopped { "in order" } else { "not in order" };
        start = start.detail("after", &tip.to_string()).detail("run-before-stopped", ended);
        match unsigned {
            Some(records) => start.detail("unsigned", records),
            None => start,
        }
    }

    /// Whether it is written to files.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.alone.is_some()
    }

    /// Records an event; waits for nothing. Gives its number; none if it could not be recorded
    /// because the trail has not been writable for long.
    pub fn record(&self, event: Event) -> Option<u64> {
        let seq = self.shared.trail().event(event);
        self.shared.news.notify_all();
        seq
    }

    /// Records an event and waits until it is on stable storage, for a bounded time. It blocks.
    ///
    /// # Errors
    /// It is not on stable storage; it may still get there. As the settings say, that is a reason
    /// not to go on, or has been said in the log.
    pub fn durable(&self, event: Event) -> Result<(), NotDurable> {
        let written = self.wait_for(self.record(event));
        match (&written, self.settings.on_failure) {
            (Err(NotDurable { why }), OnFailure::Continue) => {
                error!(why, "the audit trail cannot be written; going on, as configured");
                Ok(())
            }
            _ => written,
        }
    }

    fn wait_for(&self, seq: Option<u64>) -> Result<(), NotDurable> {
        let fail = |why: &str| Err(NotDurable { why: why.to_owned() });
        let deadline = Instant::now() + PATIENCE;
        let mut trail = self.shared.trail();
        let Some(seq) = seq else {
            return fail(trail.failing().map_or("too much waits to be written", |f| &f.why));
        };
        loop {
            if trail.written().seq >= seq {
                return Ok(());
            }
            // A failure that began before this record was queued is no verdict on it.
            if let Some(failing) = trail.failed_for(seq) {
                return fail(&failing.why);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return fail("the disk does not answer");
            }
            trail = match self.shared.news.wait_timeout(trail, left) {
                Ok((trail, _)) => trail,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Notes a request to KMS; waits for nothing.
    pub fn called(&self, call: &Call) {
        self.shared.trail().call(call);
        self.shared.news.notify_all();
    }

    /// The last `most` records after number `since`, of one volume or all, oldest first. Routine
    /// calls of KMS are left out.
    #[must_use]
    pub fn recent(&self, volume: Option<&str>, since: u64, most: usize) -> Vec<Arc<Record>> {
        self.shared.trail().recent(volume, since, most)
    }

    /// How it is.
    #[must_use]
    pub fn status(&self) -> AuditStatus {
        let trail = self.shared.trail();
        AuditStatus {
            directory: self.settings.directory.clone(),
            instance: trail.instance(),
            head: trail.head(),
            written: trail.written(),
            failing: trail.failing().cloned(),
            failures: trail.failures(),
            lost: trail.lost(),
            changed: trail.changed().cloned(),
            on_failure: self.settings.on_failure,
            public_key: trail.public_key().map(str::to_owned),
        }
    }

    /// Records that the daemon stops, and waits for a bounded time until all is on stable storage.
    pub fn stop(&self, why: &str) {
        let seq = {
            let mut trail = self.shared.trail();
            trail.settle();
            trail.event(Event::new(Kind::DaemonStop).detail("by", why))
        };
        self.shared.news.notify_all();
        match self.wait_for(seq) {
            Ok(()) if !self.is_kept() => {}
            Ok(()) => {
                let head = self.status().head;
                info!(seq = head.seq, hash = %head.hash, "the audit trail ends here");
            }
            Err(error) => error!(%error, "the end of the audit trail is lost"),
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.shared.trail().close();
        self.shared.news.notify_all();
    }
}

/// A record that is owed: written when this is dropped, unless it is forgiven.
pub(crate) struct Owed {
    audit: Arc<Audit>,
    event: Option<Event>,
}

impl Owed {
    pub(crate) fn new(audit: &Arc<Audit>, event: Event) -> Self {
        Self { audit: Arc::clone(audit), event: Some(event) }
    }

    /// It is not to be written.
    pub(crate) fn forgive(&mut self) {
        self.event = None;
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            self.audit.record(event);
        }
    }
}

fn make_directory(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if directory.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn now() -> String {
    crate::units::rfc3339(Timestamp::now())
}

/// Says where the chain is, for logs that are kept elsewhere: whoever has this can tell that the
/// trail before it was not cut off or written anew.
fn announce(head: Anchor) {
    info!(seq = head.seq, hash = %head.hash, "audit checkpoint");
}

/// Says that the trail cannot be written, or can be again.
fn alarm(failing: Option<&Failing>, waiting: usize) {
    match failing {
        Some(Failing { why, .. }) => error!(
            why,
            waiting,
            alert = "AuditTrailFailing",
            "the audit trail cannot be written: make room or mend the disk"
        ),
        None => warn!("the audit trail is written again"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    use base64::Engine as _;
    use base64::prelude::BASE64_STANDARD;
    use proptest::prelude::*;

    use super::chain::{Hash, check, hex, is_mark, seal};
    use super::verify::{Expectations, Report, Running, Verifier, Wrong, first_seq};
    use super::*;

    fn settings(directory: &Path) -> AuditSettings {
        AuditSettings {
            directory: directory.to_owned(),
            file_size: 4000,
            keep: 0,
            checkpoint_every: 8,
            signing_key: None,
            on_failure: OnFailure::RefuseAttach,
        }
    }

    fn event(n: usize) -> Event {
        Event::new(Kind::Denial).volume(&format!("v{}", n % 3)).detail("n", &n.to_string())
    }

    fn read(directory: &Path) -> Files {
        let files = files::list(directory).unwrap().into_iter();
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        files.map(|(_, path)| (name(&path), std::fs::read(&path).unwrap())).collect()
    }

    type Files = Vec<(String, Vec<u8>)>;

    fn verify_with(files: &Files, expect: Expectations) -> Report {
        let mut order: Vec<_> = files.iter().collect();
        order.sort_by_key(|(_, bytes)| first_seq(bytes).unwrap_or(u64::MAX));
        let mut verifier = Verifier::new(expect);
        order.iter().for_each(|(_, bytes)| verifier.look_for_foreign(bytes));
        for (index, (name, bytes)) in order.iter().enumerate() {
            verifier.file(name, bytes, index + 1 == order.len());
        }
        verifier.finish("the last file", 1)
    }

    fn verify(files: &Files) -> Report {
        verify_with(files, Expectations::default())
    }

    fn anchored(files: &Files, anchor: Anchor) -> Report {
        verify_with(files, Expectations { anchors: vec![anchor], ..Expectations::default() })
    }

    /// A trail of several files that a daemon wrote, and its head.
    fn real() -> &'static (Files, Anchor) {
        static REAL: OnceLock<(Files, Anchor)> = OnceLock::new();
        REAL.get_or_init(|| {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let audit = Audit::open(settings(dir.path())).unwrap();
            (0..40).for_each(|n| assert!(audit.record(event(n)).is_some()));
            audit.stop("the test");
            let files = read(dir.path());
            assert!(files.len() > 3, "it has several files");
            let report = verify(&files);
            assert!(report.is_intact(), "{report:#?}");
            (files, audit.status().head)
        })
    }

    /// The place of a byte of the whole trail: its file and its offset there.
    fn place(files: &Files, at: usize) -> (usize, usize) {
        let mut at = at % files.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
        for (index, (_, bytes)) in files.iter().enumerate() {
            if at < bytes.len() {
                return (index, at);
            }
            at -= bytes.len();
        }
        unreachable!("it lies in one of them")
    }

    fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
        bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn any_byte_that_is_changed_is_found_at_its_line(at: usize, xor in 1u8..) {
            let (mut files, _) = real().clone();
            let (file, at) = place(&files, at);
            let line = files[file].1[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
            files[file].1[at] ^= xor;
            let report = verify(&files);
            prop_assert!(!report.is_intact());
            let found = &report.findings[0];
            prop_assert_eq!((&found.file, found.line), (&files[file].0, line), "{:#?}", report);
        }

        #[test]
        fn any_byte_that_is_removed_or_added_is_found(at: usize, new: u8, remove: bool) {
            let (mut files, _) = real().clone();
            let (file, at) = place(&files, at);
            if remove {
                files[file].1.remove(at);
            } else {
                files[file].1.insert(at, new);
            }
            prop_assert!(!verify(&files).is_intact());
        }

        #[test]
        fn lines_that_are_removed_repeated_or_moved_are_found(from: usize, to: usize, what in 0..4) {
            let (mut files, head) = real().clone();
            let (a, at) = place(&files, from);
            let (b, other) = place(&files, to);
            let line_at = |file: usize, at: usize| {
                files[file].1[..at].iter().filter(|byte| **byte == b'\n').count()
            };
            let (x, y) = (line_at(a, at), line_at(b, other));
            let (mut first, mut second) = (lines(&files[a].1), lines(&files[b].1));
            match what {
                0 => drop(first.remove(x)),
                1 => second.insert(y, first[x].clone()),
                2 => {
                    prop_assume!((a, x) != (b, y));
                    let line = std::mem::replace(&mut first[x], second[y].clone());
                    if a == b { first[y] = line } else { second[y] = line }
                }
                _ => {
                    let junk = b"{\"seq\":7,\"event\":\"nothing\"}\n".to_vec();
                    second.insert(y, junk);
                }
            }
            if a != b || what == 1 || what == 3 {
                files[b].1 = second.concat();
            }
            if what == 0 || what == 2 {
                files[a].1 = first.concat();
            }
            prop_assert!(!anchored(&files, head).is_intact());
            // Only what is cut from the very end needs something from elsewhere.
            let end = what == 0 && a + 1 == files.len() && x == lines(&files[a].1).len();
            prop_assert!(end || !verify(&files).is_intact());
        }

        #[test]
        fn what_is_cut_off_is_found_in_the_middle_by_itself_and_at_the_end_by_an_anchor(at: usize) {
            let (mut files, head) = real().clone();
            let (file, at) = place(&files, at);
            files[file].1.truncate(at);
            let last = files.len() - 1;
            if file < last {
                prop_assert!(!verify(&files).is_intact());
            }
            let whole_lines = files[file].1.last().is_none_or(|last| *last == b'\n');
            prop_assert!(whole_lines || !verify(&files).is_intact());
            prop_assert!(!anchored(&files, head).is_intact());
        }

        #[test]
        fn a_crash_at_any_byte_is_marked_and_not_taken_for_a_change(at: usize) {
            let (mut files, _) = real().clone();
            let at = at % (files.last().unwrap().1.len() + 1);
            files.last_mut().unwrap().1.truncate(at);
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            for (name, bytes) in &files {
                std::fs::write(dir.path().join(name), bytes).unwrap();
            }
            let rest = files.last().unwrap().1.rsplit(|byte| *byte == b'\n').next().unwrap();
            let whole = rest.is_empty() || check(rest).is_ok();
            let audit = Audit::open(settings(dir.path())).unwrap();
            audit.durable(event(0)).unwrap();
            let after = read(dir.path());
            let report = verify(&after);
            prop_assert!(report.is_intact(), "{report:#?}");
            let kept = &after[files.len() - 1].1[..at];
            prop_assert_eq!(kept, &files.last().unwrap().1[..], "nothing is taken away");
            let said = audit.recent(None, 0, 99).iter().any(|r| r.event.event == Kind::Torn);
            prop_assert_eq!(said, !whole);
            // And what was marked cannot be changed afterwards.
            if said {
                let mut changed = after;
                changed[files.len() - 1].1[at - 1] ^= 1;
                prop_assert!(!verify(&changed).is_intact());
            }
        }
    }

    #[test]
    fn a_changed_end_is_not_taken_for_a_crash() {
        let (files, _) = real().clone();
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for (name, bytes) in &files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let (name, mut bytes) = files.last().unwrap().clone();
        let at = bytes.len() - 200;
        bytes[at] ^= 1;
        std::fs::write(dir.path().join(name), bytes).unwrap();
        let audit = Audit::open(settings(dir.path())).unwrap();
        audit.durable(event(0)).unwrap();
        let report = verify(&read(dir.path()));
        assert_eq!(report.findings[0].wrong, Wrong::Changed, "{report:#?}");
        assert!(audit.recent(None, 0, 99).iter().any(|r| r.event.event == Kind::Damaged));
    }

    #[test]
    fn files_that_are_missing_or_there_twice_are_found() {
        let (files, head) = real();
        for index in 0..files.len() {
            let mut fewer = files.clone();
            fewer.remove(index);
            assert!(!anchored(&fewer, *head).is_intact(), "without file {index}");
            assert_eq!(verify(&fewer).is_intact(), index + 1 == files.len());
            let mut twice = files.clone();
            twice.push(("copy".to_owned(), files[index].1.clone()));
            assert!(!verify(&twice).is_intact(), "file {index} twice");
        }
        let partial = Expectations { partial: true, ..Expectations::default() };
        assert!(verify_with(&files[1..].to_vec(), partial).is_intact());
    }

    /// What someone does who can compute hashes: changes a record and all after it.
    fn written_anew(files: &Files) -> Files {
        rechained(files, |record| {
            if record.event.event == Kind::Denial {
                record.event.volume = Some("another".to_owned());
            }
        })
    }

    #[test]
    fn a_trail_that_was_written_anew_is_found_by_an_anchor_or_a_signature() {
        let (files, head) = real();
        let anew = written_anew(files);
        assert!(verify(&anew).is_intact(), "nothing in it says so");
        assert_eq!(anchored(&anew, *head).findings[0].wrong, Wrong::Anchor);

        let signing = Signing::new();
        let audit = signing.open();
        (0..20).for_each(|n| assert!(audit.record(event(n)).is_some()));
        audit.stop("the test");
        let files = signing.files();
        let report = signing.verify(&files);
        assert!(report.is_intact(), "{report:#?}");
        assert_eq!(report.signed_up_to, Some(report.last.unwrap().seq));
        assert_eq!(signing.verify(&written_anew(&files)).findings[0].wrong, Wrong::Signature);
        let report = signing.verify(real_files());
        assert_eq!(report.findings[0].wrong, Wrong::Signature, "none at all: {report:#?}");
    }

    /// A trail whose records are signed.
    struct Signing {
        dir: tempfile::TempDir,
        key: Ed25519KeyPair,
    }

    impl Signing {
        fn new() -> Self {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let key = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new()).unwrap();
            let body = BASE64_STANDARD.encode(key.as_ref());
            let text = format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n");
            std::fs::write(dir.path().join("key.pem"), text).unwrap();
            Self { dir, key: Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap() }
        }

        fn open(&self) -> Arc<Audit> {
            let signing_key = Some(self.dir.path().join("key.pem"));
            let trail = self.dir.path().join("audit");
            let audit = Audit::open(AuditSettings { signing_key, ..settings(&trail) }).unwrap();
            audit.durable(audit.after(Event::new(Kind::DaemonStart))).unwrap();
            audit
        }

        fn files(&self) -> Files {
            read(&self.dir.path().join("audit"))
        }

        fn write(&self, files: &Files) {
            for (name, bytes) in files {
                std::fs::write(self.dir.path().join("audit").join(name), bytes).unwrap();
            }
        }

        fn verify(&self, files: &Files) -> Report {
            let public_key = Some(self.key.public_key().as_ref().to_vec());
            verify_with(files, Expectations { public_key, ..Expectations::default() })
        }
    }

    /// Every record of a trail, changed or not, with hashes and places that fit.
    fn rechained(files: &Files, mut change: impl FnMut(&mut Record)) -> Files {
        let mut prev = Hash::default();
        let anew = files.iter().map(|(name, bytes)| {
            let mut out = String::new();
            for line in lines(bytes) {
                let mut record: Record = serde_json::from_slice(&line).unwrap();
                record.prev = prev;
                change(&mut record);
                out.push_str(&seal(&mut record));
                out.push('\n');
                prev = record.hash;
            }
            (name.clone(), out.into_bytes())
        });
        anew.collect()
    }

    /// A line that follows the last one, its hash right: what anybody can make who can write.
    fn forged(files: &Files) -> Vec<u8> {
        let last = lines(&files.last().unwrap().1).pop().unwrap();
        let mut record: Record = serde_json::from_slice(&last).unwrap();
        (record.seq, record.prev) = (record.seq + 1, record.hash);
        record.event = Event::new(Kind::Restore).volume("forged");
        (seal(&mut record) + "\n").into_bytes()
    }

    #[test]
    fn what_is_added_after_a_crash_is_found_by_the_key_and_told_at_the_start() {
        let signing = Signing::new();
        let audit = signing.open();
        (0..3).for_each(|n| audit.durable(event(n)).unwrap());
        let crashed = audit.status().head.seq;
        drop(audit);
        let mut files = signing.files();
        let added = forged(&files);
        files.last_mut().unwrap().1.extend(added);
        signing.write(&files);
        until_free(&signing.dir.path().join("audit"));
        let audit = signing.open();
        // Enough for checkpoints that cover it.
        (0..30).for_each(|n| audit.durable(event(n)).unwrap());
        audit.stop("the test");
        let files = signing.files();
        let report = signing.verify(&files);
        assert_eq!(report.findings.len(), 1, "{report:#?}");
        let found = &report.findings[0];
        assert_eq!(found.wrong, Wrong::Signature);
        assert!(found.what.starts_with(&format!("record {}:", crashed + 1)), "{found:?}");
        assert_eq!(report.after_crash, [crashed + 2]);
        assert!(!verify(&files).is_intact(), "its own run signed all others");
        let mut records = files.iter().flat_map(|(_, bytes)| lines(bytes));
        let start = records.find_map(|line| {
            let record: Record = serde_json::from_slice(&line).unwrap();
            (record.seq == crashed + 2).then_some(record.event)
        });
        let detail = start.unwrap().detail;
        assert_eq!(detail["run-before-stopped"], "not in order");
        assert_eq!(detail["unsigned"], format!("{0} to {0}", crashed + 1));
    }

    #[test]
    fn a_run_that_stops_in_order_ends_with_that_whatever_is_due() {
        for records in 0..9 {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let audit = Audit::open(settings(dir.path())).unwrap();
            (0..records).for_each(|n| audit.durable(event(n)).unwrap());
            audit.stop("the test");
            let last = lines(&read(dir.path()).pop().unwrap().1).pop().unwrap();
            let last: Record = serde_json::from_slice(&last).unwrap();
            assert_eq!(last.event.event, Kind::DaemonStop, "after {records}");
        }
    }

    #[test]
    fn a_start_says_what_no_signature_covers() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let audit = Audit::open(settings(dir.path())).unwrap();
        audit.durable(event(0)).unwrap();
        audit.stop("the test");
        let head = audit.status().head;
        drop(audit);
        until_free(dir.path());
        let audit = Audit::open(settings(dir.path())).unwrap();
        let detail = audit.after(Event::new(Kind::DaemonStart)).detail;
        assert_eq!(detail["run-before-stopped"], "in order");
        assert_eq!(detail["after"], head.to_string());
        assert_eq!(detail["unsigned"], format!("1 to {}", head.seq));
    }

    /// The writer of a trail that was dropped has ended, or does not write any more: all it had is
    /// written, and the lock is free.
    fn until_free(directory: &Path) {
        drop(Flock::lock(File::open(directory.join(".lock")).unwrap(), FlockArg::LockExclusive));
    }

    #[test]
    fn records_that_no_checkpoint_follows_are_found_by_the_key() {
        let signing = Signing::new();
        let audit = signing.open();
        (0..30).for_each(|n| audit.durable(event(n)).unwrap());
        audit.stop("the test");
        // From the tenth on, all is changed, and nothing is a checkpoint any more.
        let files = rechained(&signing.files(), |record| {
            if record.seq >= 10 {
                record.event.volume = Some("another".to_owned());
                (record.event.signature, record.event.signer) = (None, None);
                if matches!(record.event.event, Kind::Checkpoint | Kind::DaemonStop) {
                    record.event.event = Kind::Detach;
                }
            }
        });
        let last =
            serde_json::from_slice::<Record>(&lines(&files.last().unwrap().1).pop().unwrap());
        let report = signing.verify(&files);
        assert_eq!(report.findings.len(), 1, "{report:#?}");
        let found = format!("records 10 to {}: not signed", last.unwrap().seq);
        assert!(report.findings[0].what.starts_with(&found), "{report:#?}");
        assert_eq!(report.signed_up_to, Some(9));
        // Each one alone as well, with the signature that it had.
        for at in [2, 5, 9] {
            let files = rechained(&signing.files(), |record| {
                if record.seq == at {
                    record.event.volume = Some("another".to_owned());
                }
            });
            assert_eq!(signing.verify(&files).findings[0].wrong, Wrong::Signature, "{at}");
        }
    }

    #[test]
    fn a_checkpoint_cannot_be_made_a_stop_nor_the_other_way_round() {
        let signing = Signing::new();
        let audit = signing.open();
        (0..10).for_each(|n| audit.durable(event(n)).unwrap());
        audit.stop("the test");
        for (from, to) in
            [(Kind::Checkpoint, Kind::DaemonStop), (Kind::DaemonStop, Kind::Checkpoint)]
        {
            let files = rechained(&signing.files(), |record| {
                if record.event.event == from {
                    record.event.event = to;
                }
            });
            assert_eq!(signing.verify(&files).findings[0].wrong, Wrong::Signature);
        }
    }

    #[test]
    fn a_trail_of_an_earlier_version_which_signed_checkpoints_alone_fits_and_goes_on() {
        let signing = Signing::new();
        let audit = signing.open();
        (0..20).for_each(|n| audit.durable(event(n)).unwrap());
        audit.stop("the test");
        drop(audit);
        until_free(&signing.dir.path().join("audit"));
        let public = hex(signing.key.public_key().as_ref());
        let earlier = rechained(&signing.files(), |record| {
            (record.event.signature, record.event.signer) = (None, None);
            if is_mark(&crate::units::word(record.event.event)) {
                let text = format!("byokd audit checkpoint 1\n{}\n{}\n", record.seq, record.prev);
                record.event.signature = Some(hex(signing.key.sign(text.as_bytes()).as_ref()));
                record.event.signer = Some(public.clone());
            }
        });
        let report = signing.verify(&earlier);
        assert!(report.is_intact() && report.unsigned.is_empty(), "{report:#?}");
        assert_eq!(report.signed_up_to, report.last.map(|last| last.seq - 1));
        // What is behind its last checkpoint is told.
        let mut cut = earlier.clone();
        let end = lines(&cut.last().unwrap().1);
        cut.last_mut().unwrap().1 = end[..end.len() - 1].concat();
        let report = signing.verify(&cut);
        let unsigned = report.unsigned.first().map(|range| range.to);
        assert_eq!(unsigned, report.last.map(|last| last.seq), "{report:#?}");
        assert!(
            report.is_intact() && report.notes.iter().any(|note| note.contains("hashes alone"))
        );
        assert_eq!(signing.verify(&written_anew(&earlier)).findings[0].wrong, Wrong::Signature);
        signing.write(&earlier);
        let audit = signing.open();
        audit.stop("the test");
        let report = signing.verify(&signing.files());
        assert!(report.is_intact(), "{report:#?}");
        assert_eq!(report.signed_up_to, report.last.map(|last| last.seq));
    }

    /// The newest file of a trail, and what is in it.
    fn newest(dir: &Path) -> (PathBuf, Vec<u8>) {
        let path = files::list(dir).unwrap().pop().unwrap().1;
        let bytes = std::fs::read(&path).unwrap();
        (path, bytes)
    }

    fn wrongs(report: &Report) -> Vec<Wrong> {
        report.findings.iter().map(|finding| finding.wrong).collect()
    }

    #[test]
    fn what_something_else_adds_to_the_file_stays_and_is_told() {
        for junk in [None, Some(&b"no line"[..]), Some(b"\0\0\0"), Some(b"one\ntwo\n\n")] {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let audit = Audit::open(settings(dir.path())).unwrap();
            (0..2).for_each(|n| audit.durable(event(n)).unwrap());
            let (path, mut bytes) = newest(dir.path());
            let line = lines(&bytes).len() + 1;
            let added = junk.map_or_else(|| forged(&read(dir.path())), <[u8]>::to_vec);
            bytes.extend(&added);
            std::fs::write(&path, &bytes).unwrap();
            (2..20).for_each(|n| audit.durable(event(n)).unwrap());
            audit.stop("the test");
            let after = std::fs::read(&path).unwrap();
            assert_eq!(after[..bytes.len()], bytes, "nothing is written over it");
            let report = verify(&read(dir.path()));
            assert_eq!(wrongs(&report), [Wrong::Added], "{report:#?}");
            assert_eq!(report.findings[0].line, line, "{report:#?}");
            assert_eq!(report.last, Some(audit.status().head), "all that is real is there");
            assert_eq!(report.records, audit.status().head.seq);
            let told = audit.recent(None, 0, 99);
            let told: Vec<_> =
                told.iter().filter(|r| r.event.event == Kind::ForeignChange).collect();
            assert_eq!(told.len(), 1);
            assert_eq!(told[0].event.foreign.as_ref().unwrap().sha256, Hash::of(&added));
            assert!(audit.status().changed.unwrap().why.contains("added"));
        }
    }

    #[test]
    fn a_file_that_is_cut_removed_or_replaced_while_it_is_written_to_is_told() {
        let cut = |path: &Path, bytes: &[u8]| {
            std::fs::write(path, &bytes[..bytes.len() - 10]).unwrap();
        };
        let removed = |path: &Path, _: &[u8]| std::fs::remove_file(path).unwrap();
        let replaced = |path: &Path, bytes: &[u8]| {
            let copy = path.with_extension("copy");
            std::fs::write(&copy, bytes).unwrap();
            std::fs::rename(&copy, path).unwrap();
        };
        type Harm<'a> = &'a dyn Fn(&Path, &[u8]);
        let harms: [(Harm<'_>, bool); 3] = [(&cut, false), (&removed, false), (&replaced, true)];
        for (harm, whole) in harms {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let audit = Audit::open(settings(dir.path())).unwrap();
            (0..2).for_each(|n| audit.durable(event(n)).unwrap());
            let (path, bytes) = newest(dir.path());
            harm(&path, &bytes);
            (2..20).for_each(|n| audit.durable(event(n)).unwrap());
            audit.stop("the test");
            let report = verify(&read(dir.path()));
            assert_eq!(report.is_intact(), whole, "{report:#?}");
            assert_eq!(report.last, Some(audit.status().head), "what comes later is there");
            assert!(report.notes.iter().any(|note| note.contains("something else")), "{report:#?}");
            let changed = audit.status().changed.unwrap().why;
            assert!(["cut", "removed", "place"].iter().any(|word| changed.contains(word)));
        }
    }

    #[test]
    fn a_running_daemon_knows_where_its_trail_ends() {
        let (files, head) = real();
        let against = |files: &Files, written: Anchor, head: Anchor| {
            let running = Some(Running { written, head });
            verify_with(files, Expectations { running, ..Expectations::default() })
        };
        assert!(against(files, *head, *head).is_intact());
        let mut more = files.clone();
        more.last_mut().unwrap().1.extend(forged(files));
        let report = against(&more, *head, *head);
        assert_eq!(wrongs(&report), [Wrong::Added], "{report:#?}");
        assert_eq!(report.last, Some(*head), "what was forged is no head");
        for end in [&b"{\"seq\":"[..], b"\0\0", b"junk"] {
            let mut more = files.clone();
            more.last_mut().unwrap().1.extend(end);
            assert!(!against(&more, *head, *head).is_intact());
            assert!(!verify(&more).is_intact(), "nor without a daemon");
        }
        // What it writes just now is no fault.
        let mut less = files.clone();
        less.last_mut().unwrap().1.pop();
        let tip = lines(&less.last().unwrap().1);
        let before = check(tip[tip.len() - 2].strip_suffix(b"\n").unwrap()).unwrap();
        let before = Anchor { seq: before.seq, hash: before.hash };
        let report = against(&less, before, *head);
        assert!(report.is_intact(), "{report:#?}");
        assert_eq!(wrongs(&against(&less, *head, *head)), [Wrong::Torn]);
        let other = Anchor { hash: Hash::of(b"another"), ..*head };
        assert_eq!(wrongs(&against(files, before, other)), [Wrong::Anchor]);
    }

    fn real_files() -> &'static Files {
        &real().0
    }

    #[test]
    fn concurrent_events_keep_their_order_and_none_is_lost() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let audit = Audit::open(settings(dir.path())).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let audit = &audit;
                scope.spawn(move || {
                    for n in 0..50 {
                        let event = Event::new(Kind::Denial).volume(&format!("t{thread}"));
                        audit.record(event.detail("n", &n.to_string())).unwrap();
                    }
                });
            }
        });
        audit.stop("the test");
        let files = read(dir.path());
        assert!(verify(&files).is_intact());
        let mut next = [0; 8];
        for line in files.iter().flat_map(|(_, bytes)| lines(bytes)) {
            let record: Record = serde_json::from_slice(&line).unwrap();
            if let Some(thread) = record.event.volume.and_then(|v| v[1..].parse::<usize>().ok()) {
                assert_eq!(record.event.detail["n"], next[thread].to_string());
                next[thread] += 1;
            }
        }
        assert_eq!(next, [50; 8]);
    }

    #[test]
    fn old_files_go_as_the_settings_say_and_the_trail_says_so() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let audit = Audit::open(AuditSettings { keep: 2, ..settings(dir.path()) }).unwrap();
        (0..60).for_each(|n| assert!(audit.record(event(n)).is_some()));
        audit.stop("the test");
        let files = read(dir.path());
        assert_eq!(files.len(), 2);
        let report = verify(&files);
        assert!(report.is_intact(), "{report:#?}");
        assert!(report.first.unwrap() > 1);
        // The same without that record is a trail whose beginning is missing.
        assert!(!verify(&files[1..].to_vec()).is_intact());
    }

    #[test]
    fn a_second_daemon_on_the_same_trail_is_refused() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let _first = Audit::open(settings(dir.path())).unwrap();
        assert!(matches!(Audit::open(settings(dir.path())), Err(AuditOpenError::InUse(_))));
    }

    #[test]
    fn a_line_can_be_checked_with_sed_and_sha256sum_alone() {
        let line = &lines(&real_files()[0].1)[1];
        let link = check(line.strip_suffix(b"\n").unwrap()).unwrap();
        let text = std::str::from_utf8(line).unwrap();
        let covered = text.split(",\"hash\":\"").next().unwrap();
        assert_eq!(Hash::of(covered.as_bytes()), link.hash);
    }
}
