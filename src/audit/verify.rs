//! Checks a trail: every line by itself, then its place in the chain.
//!
//! Found is every edit, deletion, insertion, duplication and reordering of lines and files, and
//! every cut but one: what is missing at the very end leaves no trace in what is left. For that,
//! and against someone who computes all hashes anew, an [`Anchor`] is held against the trail: a
//! place in the chain that was noted elsewhere, the running daemon's own, or a public key that
//! records must be signed with.

use serde::{Deserialize, Serialize};

use crate::audit::chain::{
    Hash, LineError, Link, Signed, check, is_mark, may_be_cut_off, signed_by, unhex,
};
use crate::audit::record::{Foreign, Kind};
use crate::units::word;

/// A place in the chain that is known from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// The record's number.
    pub seq: u64,
    /// Its hash.
    pub hash: Hash,
}

impl std::str::FromStr for Anchor {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(':').and_then(|(seq, hash)| Some((seq.parse().ok()?, hash)));
        let (seq, hash) = parts.ok_or_else(|| format!("`{text}` is not written as SEQ:HASH"))?;
        Ok(Self { seq, hash: hash.parse().map_err(|e| format!("`{text}`: {e}"))? })
    }
}

impl std::fmt::Display for Anchor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.seq, self.hash)
    }
}

/// What the trail is held against.
#[derive(Clone, Debug, Default)]
pub struct Expectations {
    /// Places in the chain.
    pub anchors: Vec<Anchor>,
    /// What the daemon that writes it says.
    pub running: Option<Running>,
    /// The public key that records must be signed with.
    pub public_key: Option<Vec<u8>>,
    /// Files before the first one are elsewhere.
    pub partial: bool,
}

/// How far a running daemon's trail goes: it ends with one of these, or with a record between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// The last record on stable storage before the files were read.
    pub written: Anchor,
    /// The last record after they were.
    pub head: Anchor,
}

/// What is wrong with a place in the trail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wrong {
    /// A line is not as it was written.
    Changed,
    /// Records are missing.
    Missing,
    /// A record stands there again, or in the wrong place.
    OutOfPlace,
    /// A record's own hash fits, but it does not follow the one before.
    Rewritten,
    /// A signature is missing or not of the key.
    Signature,
    /// It does not agree with what was noted elsewhere.
    Anchor,
    /// The end is missing.
    Truncated,
    /// It ends with bytes that are no whole record.
    Torn,
    /// It was added by something else than the daemon.
    Added,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The file.
    pub file: String,
    /// The line, counted from one.
    pub line: usize,
    /// What kind of thing.
    pub wrong: Wrong,
    /// What, for people.
    pub what: String,
}

/// Records that follow one another, the last one among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsigned {
    /// The first.
    pub from: u64,
    /// The last.
    pub to: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Files read.
    pub files: usize,
    /// Good records.
    pub records: u64,
    /// The first one's number.
    pub first: Option<u64>,
    /// The last one.
    pub last: Option<Anchor>,
    /// When that was recorded.
    pub last_time: Option<String>,
    /// The last record that a signature of the given key covers.
    pub signed_up_to: Option<u64>,
    /// Records with which the daemon started after a run that had not stopped in order: what that
    /// run wrote last may be missing.
    pub after_crash: Vec<u64>,
    /// Records that no signature of their own run covers, where the trail has signatures.
    pub unsigned: Vec<Unsigned>,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What is no fault, and good to know.
    pub notes: Vec<String>,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.findings.is_empty()
    }
}

/// The number of the first good record, by which files are put in order.
#[must_use]
pub fn first_seq(bytes: &[u8]) -> Option<u64> {
    bytes.split(|byte| *byte == b'\n').find_map(|line| check(line).ok()).map(|link| link.seq)
}

/// Checks files in their order.
#[derive(Debug)]
pub struct Verifier {
    expect: Expectations,
    report: Report,
    /// The record after which the next one has to come.
    tip: Option<Link>,
    /// Anchors that have been met.
    met: Vec<u64>,
    /// Numbers from which on a record says that files were deleted before it.
    kept_from: Vec<u64>,
    /// Where the trail begins, if not at its beginning.
    begins: Option<(String, usize, u64)>,
    /// What records say that something else wrote, and their numbers.
    foreign: Vec<(u64, Foreign)>,
    signer: Signer,
    /// The last finding about records that may go on with the next one.
    span: Option<Span>,
}

/// What is known of signatures so far.
#[derive(Debug, Default)]
struct Signer {
    /// The trail has signatures.
    seen: bool,
    /// The last run that signed its records, each of them.
    run: Option<String>,
    /// The first record since then that no signature covers.
    unsigned: Option<u64>,
}

/// One finding about records that follow one another.
#[derive(Debug)]
struct Span {
    finding: usize,
    from: u64,
    to: u64,
    what: &'static str,
}

/// Lines that are no records, until it is known why.
struct Bad<'a> {
    line: usize,
    count: usize,
    from: usize,
    why: LineError,
    bytes: &'a [u8],
}

impl Verifier {
    /// Nothing checked yet.
    #[must_use]
    pub fn new(mut expect: Expectations) -> Self {
        let written = expect.running.map(|running| running.written);
        expect.anchors.extend(written.filter(|written| written.seq > 0));
        Self {
            expect,
            report: Report::default(),
            tip: None,
            met: Vec::new(),
            kept_from: Vec::new(),
            begins: None,
            foreign: Vec::new(),
            signer: Signer::default(),
            span: None,
        }
    }

    /// Looks through a file for what its records say that something else wrote. Each file, before
    /// any is checked: what was written is told after it.
    pub fn look_for_foreign(&mut self, bytes: &[u8]) {
        let marker = format!("\"event\":\"{}\"", word(Kind::ForeignChange));
        let marked = |line: &&[u8]| line.windows(marker.len()).any(|w| w == marker.as_bytes());
        let links = bytes.split(|byte| *byte == b'\n').filter(marked);
        let links = links.filter_map(|line| check(line).ok());
        self.foreign.extend(links.filter_map(|link| Some((link.seq, link.foreign?))));
    }

    /// Checks the next file; `last` says that no other follows.
    pub fn file(&mut self, name: &str, bytes: &[u8], last: bool) {
        self.report.files += 1;
        let mut bad: Option<Bad<'_>> = None;
        let (mut at, mut number) = (0, 0);
        while at < bytes.len() {
            number += 1;
            if let Some((len, lines)) = self.skip_foreign(name, number, at, bytes) {
                if let Some(bad) = bad.take() {
                    self.changed(name, &bad, None);
                }
                at += len;
                number += lines - 1;
                continue;
            }
            let end = bytes[at..].iter().position(|byte| *byte == b'\n').map(|n| at + n);
            let line = &bytes[at..end.unwrap_or(bytes.len())];
            match check(line) {
                Ok(link) => {
                    let gap = bad.take().map(|mut bad| {
                        // Without the newline that was added after it.
                        bad.bytes = &bytes[bad.from..at - 1];
                        bad
                    });
                    self.record(name, number, link, gap.as_ref());
                    if end.is_none() && last {
                        self.torn(name, number, "the newline of the last line is missing");
                    } else if end.is_none() {
                        self.wrong(name, number, Wrong::Changed, "its newline is missing");
                    }
                }
                Err(why) => {
                    let bad = bad.get_or_insert(Bad {
                        line: number,
                        count: 0,
                        from: at,
                        why,
                        bytes: &bytes[at..],
                    });
                    bad.count += 1;
                }
            }
            at = end.map_or(bytes.len(), |end| end + 1);
        }
        if let Some(bad) = bad {
            if last && is_cut_off(bad.bytes) {
                let len = bad.bytes.len();
                let what = format!("it ends with {} that are no whole record", bytes_of(len));
                self.torn(name, bad.line, &what);
            } else {
                self.changed(name, &bad, None);
            }
        }
        if number == 0 {
            self.report.notes.push(format!("{name}: empty"));
        }
    }

    /// Whether something else wrote what stands here, as a record says: its bytes and lines.
    fn skip_foreign(
        &mut self,
        file: &str,
        line: usize,
        at: usize,
        bytes: &[u8],
    ) -> Option<(usize, usize)> {
        let found = self.foreign.iter().find_map(|(seq, foreign)| {
            if foreign.bytes == 0 || usize::try_from(foreign.at) != Ok(at) {
                return None;
            }
            let end = at.checked_add(usize::try_from(foreign.bytes).ok()?)?;
            let there = bytes.get(at..end)?;
            (Hash::of(there) == foreign.sha256).then_some((*seq, there))
        });
        let (seq, there) = found?;
        let (len, mut lines) = (there.len(), there.iter().filter(|b| **b == b'\n').count());
        // The daemon ends a line that the other one did not.
        let glue = !there.ends_with(b"\n") && bytes.get(at + len) == Some(&b'\n');
        lines += usize::from(glue);
        let what = format!(
            "{} were added here by something else than the daemon, which says so in record {seq}",
            bytes_of(len)
        );
        self.wrong(file, line, Wrong::Added, &what);
        Some((len + usize::from(glue), lines.max(1)))
    }

    /// The trail ends within a line. Only a daemon that writes just now has such a trail.
    fn torn(&mut self, file: &str, line: usize, what: &str) {
        if self.expect.running.is_some_and(|running| running.head.seq > running.written.seq) {
            self.report.notes.push(format!("{file}:{line}: {what}: it is being written"));
            return;
        }
        let why = if self.expect.running.is_some() {
            "the running daemon wrote whole lines"
        } else {
            "a crash while it was written, a cut, or an addition; if it was a crash, the daemon \
             marks it when it starts, and then it is none of these"
        };
        self.wrong(file, line, Wrong::Torn, &format!("{what}: {why}"));
    }

    /// A finding about a record that may go on with the next one.
    fn wrong_from(&mut self, file: &str, line: usize, seq: u64, wrong: Wrong, what: &'static str) {
        let goes_on = self.span.take_if(|span| span.what == what && span.to + 1 >= seq);
        let span = goes_on.map(|span| Span { to: seq, ..span }).unwrap_or_else(|| {
            self.wrong(file, line, wrong, "");
            Span { finding: self.report.findings.len() - 1, from: seq, to: seq, what }
        });
        if let Some(finding) = self.report.findings.get_mut(span.finding) {
            finding.what = format!("{}: {what}", records(span.from, span.to));
        }
        self.span = Some(span);
    }

    fn wrong(&mut self, file: &str, line: usize, wrong: Wrong, what: &str) {
        let (file, what) = (file.to_owned(), what.to_owned());
        self.report.findings.push(Finding { file, line, wrong, what });
    }

    /// Lines that are no records, and no remains of a crash.
    fn changed(&mut self, file: &str, bad: &Bad<'_>, next: Option<&Link>) {
        let lines = if bad.count == 1 {
            "the line was changed".to_owned()
        } else {
            format!("{} lines from here on were changed", bad.count)
        };
        let inserted = match (&self.tip, next) {
            (Some(tip), Some(next)) => next.prev == tip.hash,
            _ => false,
        };
        let lines = if inserted { "something was inserted here".to_owned() } else { lines };
        self.wrong(file, bad.line, Wrong::Changed, &format!("{lines}: {}", bad.why));
    }

    /// A record whose own hash fits.
    fn record(&mut self, file: &str, line: usize, link: Link, bad: Option<&Bad<'_>>) {
        let mut explained = 0;
        if let Some(bad) = bad {
            let marked = link.torn.as_ref().is_some_and(|torn| {
                let bytes = u64::try_from(bad.bytes.len()).unwrap_or(u64::MAX);
                torn.bytes == bytes && torn.sha256 == Hash::of(bad.bytes) && is_cut_off(bad.bytes)
            });
            if marked {
                self.report.notes.push(format!(
                    "{file}:{}: {} bytes that a crash cut off; the next record says so",
                    bad.line,
                    bad.bytes.len()
                ));
            } else {
                self.changed(file, bad, Some(&link));
                explained = u64::try_from(bad.count).unwrap_or(u64::MAX);
            }
        } else if link.torn.is_some() {
            let what = "it marks what a crash cut off before it, and that is gone";
            self.wrong(file, line, Wrong::Missing, what);
        }
        if self.expect.running.is_some_and(|running| link.seq > running.head.seq) {
            let what = "after the last record of the running daemon, so something else wrote it";
            self.wrong_from(file, line, link.seq, Wrong::Added, what);
            return;
        }
        if !self.follows(file, line, &link, explained) {
            return;
        }
        self.start(&link);
        self.report.records += 1;
        self.report.first.get_or_insert(link.seq);
        self.signature(file, line, &link);
        self.anchors(file, line, &link);
        if let Some(lost) = link.lost {
            self.report.notes.push(format!(
                "{file}:{line}: the daemon says that {lost} events before this one could not be \
                 recorded"
            ));
        }
        if link.event == word(Kind::ForeignChange) {
            self.report.notes.push(format!(
                "{file}:{line}: the daemon says that its file was changed by something else while \
                 it ran"
            ));
        }
        self.kept_from.extend(link.kept_from);
        self.tip = Some(link);
    }

    /// Notes a run that begins after one that had not ended in order.
    fn start(&mut self, link: &Link) {
        let Some(tip) = &self.tip else { return };
        if link.instance != tip.instance && tip.event != word(Kind::DaemonStop) {
            let last = tip.seq;
            self.report.after_crash.push(link.seq);
            // What signs from now on knows nothing of them.
            self.end_unsigned(last);
        }
    }

    /// Whether the record comes next, or at least later than the one before.
    fn follows(&mut self, file: &str, line: usize, link: &Link, explained: u64) -> bool {
        let Some(tip) = self.tip.clone() else {
            if link.seq != 1 {
                self.begins = Some((file.to_owned(), line, link.seq));
            } else if link.prev != Hash::default() {
                let what = "the first record names one before it";
                self.wrong(file, line, Wrong::Rewritten, what);
            }
            return true;
        };
        let next = tip.seq + 1;
        if link.seq == next && link.prev == tip.hash {
            return true;
        }
        if link.seq <= tip.seq {
            let same = if link.hash == tip.hash { "again, right after itself" } else { "again" };
            let what = format!(
                "record {} stands here {same}: after record {}, inserted, repeated or moved",
                link.seq, tip.seq
            );
            self.wrong(file, line, Wrong::OutOfPlace, &what);
            return false;
        }
        let missing = link.seq - next;
        if missing == 0 {
            let what = format!(
                "record {} does not follow record {}: its `prev` is {}, that record's hash is {}; \
                 one of them was written anew",
                link.seq, tip.seq, link.prev, tip.hash
            );
            self.wrong(file, line, Wrong::Rewritten, &what);
        } else if missing != explained {
            let are = if missing == 1 { "is" } else { "are" };
            let what = format!("{} {are} missing before this line", records(next, link.seq - 1));
            self.wrong(file, line, Wrong::Missing, &what);
        }
        true
    }

    fn signature(&mut self, file: &str, line: usize, link: &Link) {
        let given = self.expect.public_key.clone();
        self.signer.seen |= link.signature.is_some();
        let named = || link.signer.as_deref().and_then(unhex);
        let signed = match given.clone().or_else(named) {
            Some(key) => signed_by(link, &key),
            None if link.signature.is_some() => Signed::Wrongly,
            None => Signed::Not,
        };
        // A run signs each of its records or none; earlier versions signed marks alone.
        let run = self.signer.run.is_some() && (given.is_some() || self.is_same_run(link));
        let fault = match signed {
            Signed::Whole => {
                self.end_unsigned(link.seq - 1);
                self.signer.run = Some(link.instance.clone());
                self.report.signed_up_to = given.is_some().then_some(link.seq);
                return;
            }
            Signed::Before if self.signer.run.is_none() || given.is_none() && !run => {
                self.signer.unsigned = None;
                self.report.signed_up_to = given.is_some().then(|| link.seq - 1);
                return;
            }
            Signed::Wrongly if given.is_none() => {
                "the signature does not fit the key that it names"
            }
            Signed::Not if given.is_none() && run => "not signed, and the same run signed others",
            Signed::Not if given.is_some() && (run || is_mark(&link.event)) => UNSIGNED,
            Signed::Before | Signed::Wrongly => UNSIGNED,
            Signed::Not => {
                if given.is_some() || self.signer.run.is_some() {
                    self.signer.unsigned.get_or_insert(link.seq);
                }
                return;
            }
        };
        self.wrong_from(file, line, link.seq, Wrong::Signature, fault);
    }

    /// Records up to this one are not covered by a signature of their run.
    fn end_unsigned(&mut self, to: u64) {
        if let Some(from) = self.signer.unsigned.take() {
            self.report.unsigned.push(Unsigned { from, to });
        }
    }

    fn is_same_run(&self, link: &Link) -> bool {
        self.signer.run.as_deref() == Some(&link.instance)
    }

    fn anchors(&mut self, file: &str, line: usize, link: &Link) {
        let head = self.expect.running.map(|running| running.head);
        if head.is_some_and(|head| head.seq == link.seq && head.hash != link.hash) {
            let what = "the running daemon has another record of this number";
            self.wrong_from(file, line, link.seq, Wrong::Anchor, what);
        }
        for anchor in self.expect.anchors.clone() {
            if anchor.seq == link.seq {
                self.met.push(anchor.seq);
                if anchor.hash != link.hash {
                    let what = format!(
                        "record {} has the hash {}, and {} was expected: the trail was written anew",
                        link.seq, link.hash, anchor.hash
                    );
                    self.wrong(file, line, Wrong::Anchor, &what);
                }
            }
        }
    }

    /// What was found; `file` names the last file, where an end would be missing.
    #[must_use]
    pub fn finish(mut self, file: &str, lines: usize) -> Report {
        if let Some((file, line, first)) = self.begins.take() {
            if self.expect.partial || self.kept_from.contains(&first) {
                let note = format!(
                    "{file}:{line}: it begins with record {first}; what was before is elsewhere or was deleted as the settings say"
                );
                self.report.notes.push(note);
            } else {
                let what = format!(
                    "{} missing before this line (with --partial they may lie elsewhere)",
                    if first == 2 {
                        "record 1 is".to_owned()
                    } else {
                        format!("{} are", records(1, first - 1))
                    }
                );
                self.wrong(&file, line, Wrong::Missing, &what);
            }
        }
        let last = self.tip.as_ref().map_or(0, |tip| tip.seq);
        for anchor in self.expect.anchors.clone() {
            if anchor.seq > last {
                let what = format!(
                    "the trail ends with record {last}, and was at least at record {}: its end is \
                     missing",
                    anchor.seq
                );
                self.wrong(file, lines, Wrong::Truncated, &what);
            } else if !self.met.contains(&anchor.seq) {
                let what = format!("record {}, which was expected, is not there", anchor.seq);
                self.wrong(file, lines, Wrong::Anchor, &what);
            }
        }
        self.last_words(file, lines, last);
        self.report
    }

    fn last_words(&mut self, file: &str, lines: usize, last: u64) {
        if let Some(tip) = &self.tip {
            self.report.last = Some(Anchor { seq: tip.seq, hash: tip.hash });
            self.report.last_time = Some(tip.time.clone());
            let known = !self.expect.anchors.is_empty() || self.expect.running.is_some();
            if tip.event != word(Kind::DaemonStop) && !known {
                self.report.notes.push(
                    "it does not end with daemon-stop: the daemon runs, or it crashed, or the end \
                     was cut off; only what was noted elsewhere can tell (--expect)"
                        .to_owned(),
                );
            }
        }
        self.crashes();
        self.signatures(file, lines, last);
    }

    fn crashes(&mut self) {
        let crashes = &self.report.after_crash;
        let Some(first) = crashes.first() else { return };
        let more = match crashes.len() - 1 {
            0 => String::new(),
            1 => " and one other".to_owned(),
            n => format!(" and {n} others"),
        };
        self.report.notes.push(format!(
            "the run before record {first}{more} did not stop in order: a crash, and what it wrote \
             last may have been cut off, and without signatures something may have been added, \
             before the daemon started again; only what was noted elsewhere before that can tell \
             (--expect)"
        ));
    }

    fn signatures(&mut self, file: &str, lines: usize, last: u64) {
        self.end_unsigned(last);
        if let Some(first) = self.report.unsigned.first() {
            let more = match self.report.unsigned.len() - 1 {
                0 => String::new(),
                n => format!(" and of {n} more ranges"),
            };
            self.report.notes.push(format!(
                "no signature of their run covers {}{more}: it signed none or checkpoints alone; \
                 they have hashes alone",
                records(first.from, first.to)
            ));
        }
        let notes = &mut self.report.notes;
        if self.expect.public_key.is_some() {
            let covered = self.report.signed_up_to.unwrap_or(0);
            let found = self.report.findings.iter().any(|f| f.wrong == Wrong::Signature);
            if covered == 0 && last > 0 && !found {
                let what = "nothing in it is signed with the key that was given";
                self.wrong(file, lines, Wrong::Signature, what);
            }
        } else if self.signer.seen {
            notes.push(
                "its signatures fit the keys that the trail itself names; give --public-key to know \
                 whose they are"
                    .to_owned(),
            );
        } else if self.expect.anchors.is_empty() {
            notes.push(
                "nothing from elsewhere was held against it: whoever can write all of it can \
                 compute all of it anew (--expect, --public-key)"
                    .to_owned(),
            );
        }
    }
}

/// What stands without the signature that it should have.
const UNSIGNED: &str = "not signed with the key that was given";

fn records(from: u64, to: u64) -> String {
    if from == to { format!("record {from}") } else { format!("records {from} to {to}") }
}

fn bytes_of(len: usize) -> String {
    if len == 1 { "1 byte".to_owned() } else { format!("{len} bytes") }
}

/// Whether a crash may have left these bytes at the end: the beginning of one line, or nothing but
/// zeroes where it should be.
#[must_use]
pub fn is_cut_off(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0) || !bytes.contains(&b'\n') && may_be_cut_off(bytes)
}
