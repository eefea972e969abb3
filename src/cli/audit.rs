//! `byokctl audit`: the trail as it lies on disk, and as the daemon has it in memory.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::read::MultiGzDecoder;

use crate::audit::chain::check;
use crate::audit::reconcile::{CloudEvent, Writing, compare, read_export};
use crate::audit::record::Record;
use crate::audit::verify::{Expectations, Report, Running, Verifier, Wrong, first_seq};
use crate::audit::{AuditStatus, files, public_key};
use crate::cli::args::{AuditCommand, Place, TrailArgs};
use crate::cli::audit_words::{compared, verified};
use crate::cli::output::Output;
use crate::control::client::Client;
use crate::control::{Answer, ControlError, Request};
use crate::exit::ExitCode;

/// How often a daemon is asked for new records.
const POLL: Duration = Duration::from_millis(500);

/// How often a trail is read that a daemon writes to just then.
const TRIES: usize = 20;

/// How long what it writes may take.
const SETTLE: Duration = Duration::from_millis(50);

fn failed(exit: ExitCode, what: &str, why: String, remedy: &str) -> ControlError {
    ControlError { exit, what: what.to_owned(), why, remedy: remedy.to_owned() }
}

/// Does what was asked for.
///
/// # Errors
/// Why it could not be done.
pub fn run(command: AuditCommand, socket: &Path, out: &Output) -> Result<ExitCode, ControlError> {
    match command {
        AuditCommand::Verify { files, expect, public_key: key, partial } => {
            let mut expect = Expectations { anchors: expect, partial, ..Expectations::default() };
            if let Some(key) = key {
                let key = public_key(&key).map_err(|e| {
                    let what = "read the public key";
                    failed(ExitCode::Usage, what, e.to_string(), "Give it in hex, or as PEM.")
                })?;
                expect.public_key = Some(key);
            }
            let report = Trail::find(&files, socket, &expect)?.verify(&expect)?;
            verified(&report, out);
            Ok(if report.is_intact() { ExitCode::Ok } else { ExitCode::Discrepancy })
        }
        AuditCommand::Tail { follow, volume, last } => {
            tail(socket, follow, volume.as_deref(), last, out)
        }
        AuditCommand::Export { files, from, to, volume } => {
            let trail = Trail::find(&files, socket, &Expectations::default())?;
            trail.export(from, to, volume.as_deref(), out)
        }
        AuditCommand::Reconcile { exports, dir, principal } => {
            let mut events = Vec::new();
            for path in &exports {
                events.extend(export(path)?);
            }
            let files = TrailArgs { files: Vec::new(), dir };
            let expect = Expectations::default();
            let trail = Trail::find(&files, socket, &expect)?;
            let writing = if trail.daemon.is_some() { Writing::GoesOn } else { Writing::Unknown };
            let found = compare(&trail.records()?, &events, &principal, writing);
            compared(&found, out);
            // What was taken out of the trail is not told by what is left in it.
            let intact = trail.verify(&expect)?.is_intact();
            if !intact {
                out.aside("the trail itself is not as it was written; see `byokctl audit verify`");
            }
            Ok(if intact && found.agrees() { ExitCode::Ok } else { ExitCode::Discrepancy })
        }
        AuditCommand::Head => {
            out.answer(&Answer::AuditHead(Box::new(status(socket)?)));
            Ok(ExitCode::Ok)
        }
    }
}

const READ_TRAIL: &str = "read the audit trail";

fn another_answer() -> ControlError {
    let why = "the daemon gave an answer to something else".to_owned();
    failed(ExitCode::Failed, READ_TRAIL, why, "Use a byokctl of the daemon's version.")
}

fn tail(
    socket: &Path,
    follow: bool,
    volume: Option<&str>,
    mut last: usize,
    out: &Output,
) -> Result<ExitCode, ControlError> {
    let mut client = Client::connect(socket)?;
    let mut since = 0;
    loop {
        let volume = volume.map(str::to_owned);
        let request = Request::AuditRecords { volume, since, last };
        let Answer::AuditRecords { records } = client.ask(&request)? else {
            return Err(another_answer());
        };
        out.records(&records);
        if !follow {
            return Ok(ExitCode::Ok);
        }
        since = records.last().map_or(since, |record| record.seq);
        last = usize::MAX;
        std::thread::park_timeout(POLL);
    }
}

/// How the running daemon's trail is.
fn status(socket: &Path) -> Result<AuditStatus, ControlError> {
    let answer = Client::connect(socket)?.ask(&Request::AuditHead)?;
    let Answer::AuditHead(status) = answer else { return Err(another_answer()) };
    Ok(*status)
}

/// The files of a trail, in order.
struct Trail<'a> {
    paths: Vec<PathBuf>,
    /// The socket of the daemon that writes it, and what it said.
    daemon: Option<(&'a Path, AuditStatus)>,
}

impl<'a> Trail<'a> {
    /// The files that are named, or those of a directory. The running daemon says which directory
    /// is its own.
    fn find(
        args: &TrailArgs,
        socket: &'a Path,
        expect: &Expectations,
    ) -> Result<Self, ControlError> {
        if !args.files.is_empty() {
            return Ok(Self { paths: in_order(args.files.iter().cloned())?, daemon: None });
        }
        let daemon = match &args.dir {
            Some(_) => None,
            None => Some((socket, status(socket)?)),
        };
        let own = daemon.as_ref().map(|(_, status)| status.directory.clone());
        let directory = args.dir.clone().or(own).unwrap_or_default();
        let paths = in_directory(&directory)?;
        let ends = daemon.as_ref().is_some_and(|(_, status)| status.written.seq > 0);
        if paths.is_empty() && expect.anchors.is_empty() && !ends {
            let why = format!("there is none in {}", directory.display());
            let remedy = "Name its directory with --dir, or its files.";
            return Err(failed(ExitCode::WrongState, READ_TRAIL, why, remedy));
        }
        Ok(Self { paths, daemon })
    }

    /// Checks it. A daemon that runs is asked before and after its newest file is read, until it
    /// has written nothing in between: then the trail has to end where it says.
    fn verify(&self, expect: &Expectations) -> Result<Report, ControlError> {
        let Some((socket, first)) = &self.daemon else {
            return verify_unchanging(&self.paths, expect);
        };
        let mut before = first.clone();
        for tried in 1.. {
            let paths = in_directory(&before.directory)?;
            let newest = paths.last().map(|path| read(path)).transpose()?;
            let after = status(socket)?;
            let settled = before.written == after.head
                && in_directory(&before.directory)?.len() == paths.len();
            if settled || tried == TRIES {
                let running = Some(Running { written: before.written, head: after.head });
                return verify(&paths, newest, Expectations { running, ..expect.clone() });
            }
            std::thread::park_timeout(SETTLE);
            before = status(socket)?;
        }
        Err(another_answer())
    }

    /// Every good record; whether they are all good, `verify` says.
    fn records(&self) -> Result<Vec<Record>, ControlError> {
        let mut records = Vec::new();
        for path in &self.paths {
            let bytes = read(path)?;
            let good = bytes.split(|byte| *byte == b'\n').filter(|line| check(line).is_ok());
            records.extend(good.filter_map(|line| serde_json::from_slice::<Record>(line).ok()));
        }
        Ok(records)
    }

    /// Prints the records of a range as they stand there, so that their hashes still fit.
    fn export(
        &self,
        from: Option<Place>,
        to: Option<Place>,
        volume: Option<&str>,
        out: &Output,
    ) -> Result<ExitCode, ControlError> {
        let mut exit = ExitCode::Ok;
        for path in &self.paths {
            let bytes = read(path)?;
            for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
                if line.is_empty() {
                    continue;
                }
                if check(line).is_err() {
                    let place = format!("{}:{}", path.display(), number + 1);
                    out.aside(&format!("{place}: no record, left out; see `byokctl audit verify`"));
                    exit = ExitCode::Discrepancy;
                    continue;
                }
                let Ok(record) = serde_json::from_slice::<Record>(line) else { continue };
                let wanted = from.is_none_or(|from| !is_before(&record, from))
                    && to.is_none_or(|to| !is_after(&record, to))
                    && volume.is_none_or(|name| record.event.volume.as_deref() == Some(name));
                if wanted {
                    out.verbatim(&String::from_utf8_lossy(line));
                }
            }
        }
        Ok(exit)
    }
}

/// The files in a directory, in order.
fn in_directory(directory: &Path) -> Result<Vec<PathBuf>, ControlError> {
    let found = files::list(directory).map_err(|e| {
        let why = format!("{}: {e}", directory.display());
        failed(ExitCode::WrongState, READ_TRAIL, why, "Run it as root, or name --dir.")
    })?;
    in_order(found.into_iter().map(|(_, path)| path))
}

/// By what is in them: a file may have been renamed.
fn in_order(paths: impl Iterator<Item = PathBuf>) -> Result<Vec<PathBuf>, ControlError> {
    let mut order = Vec::new();
    for path in paths {
        order.push((first_seq(&read(&path)?).unwrap_or(u64::MAX), path));
    }
    order.sort();
    Ok(order.into_iter().map(|(_, path)| path).collect())
}

/// Checks files; one that ends within a line again if it has grown meanwhile: a daemon may write
/// it.
fn verify_unchanging(paths: &[PathBuf], expect: &Expectations) -> Result<Report, ControlError> {
    let mut tries = 1..=TRIES;
    loop {
        let newest = paths.last().map(|path| read(path)).transpose()?;
        let len = newest.as_ref().map(Vec::len);
        let report = verify(paths, newest, expect.clone())?;
        let torn = report.findings.iter().any(|finding| finding.wrong == Wrong::Torn);
        let now = paths.last().map(|path| read(path)).transpose()?;
        if !torn || now.as_ref().map(Vec::len) == len || tries.next().is_none() {
            return Ok(report);
        }
    }
}

/// Checks files, of which the last one has been read.
fn verify(
    paths: &[PathBuf],
    newest: Option<Vec<u8>>,
    expect: Expectations,
) -> Result<Report, ControlError> {
    let mut verifier = Verifier::new(expect);
    let newest = newest.unwrap_or_default();
    let each = |index: usize, path: &Path| {
        if index + 1 == paths.len() { Ok(newest.clone()) } else { read(path) }
    };
    for (index, path) in paths.iter().enumerate() {
        verifier.look_for_foreign(&each(index, path)?);
    }
    let (mut name, mut lines) = (String::new(), 1);
    for (index, path) in paths.iter().enumerate() {
        let bytes = each(index, path)?;
        name = path.display().to_string();
        lines = bytes.iter().filter(|byte| **byte == b'\n').count().max(1);
        verifier.file(&name, &bytes, index + 1 == paths.len());
    }
    Ok(verifier.finish(&name, lines))
}

/// The events of one file of an export.
fn export(path: &Path) -> Result<Vec<CloudEvent>, ControlError> {
    let wrong = |why: String| {
        let why = format!("{}: {why}", path.display());
        let remedy = "Name files of CloudTrail, or what `aws cloudtrail lookup-events` printed.";
        failed(ExitCode::Usage, "read the CloudTrail export", why, remedy)
    };
    let mut bytes = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        let unpacked = MultiGzDecoder::new(&bytes[..]).take(LARGEST_EXPORT).read_to_end(&mut plain);
        unpacked.map_err(|e| wrong(e.to_string()))?;
        bytes = plain;
    }
    read_export(&bytes).map_err(wrong)
}

/// What a file of CloudTrail may unpack to; they have some tens of megabytes.
const LARGEST_EXPORT: u64 = 4 << 30;

fn is_before(record: &Record, place: Place) -> bool {
    match place {
        Place::Seq(seq) => record.seq < seq,
        Place::Time(time) => record.time.parse().is_ok_and(|at: jiff::Timestamp| at < time),
    }
}

fn is_after(record: &Record, place: Place) -> bool {
    match place {
        Place::Seq(seq) => record.seq > seq,
        Place::Time(time) => record.time.parse().is_ok_and(|at: jiff::Timestamp| at > time),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ControlError> {
    std::fs::read(path).map_err(|e| {
        let why = format!("{}: {e}", path.display());
        failed(ExitCode::WrongState, READ_TRAIL, why, "Check the path and your rights.")
    })
}
