//! Checks a trail: every line by itself, then its place in the chain.
//!
//! Found is every edit, deletion, insertion, duplication and reordering of lines and files, and
//! every cut but one: what is missing at the very end leaves no trace in what is left. For that,
//! and against someone who computes all hashes anew, an [`Anchor`] is held against the trail: a
//! place in the chain that was noted elsewhere, or that the running daemon gives; or a public key
//! that checkpoints must be signed with.

use serde::{Deserialize, Serialize};

use crate::audit::chain::{Hash, LineError, Link, check, is_signed_by, may_be_cut_off, unhex};

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
    /// The public key that checkpoints must be signed with.
    pub public_key: Option<Vec<u8>>,
    /// Files before the first one are elsewhere.
    pub partial: bool,
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
    signed: bool,
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
    pub fn new(expect: Expectations) -> Self {
        Self {
            expect,
            report: Report::default(),
            tip: None,
            met: Vec::new(),
            kept_from: Vec::new(),
            begins: None,
            signed: false,
        }
    }

    /// Checks the next file; `last` says that no other follows.
    pub fn file(&mut self, name: &str, bytes: &[u8], last: bool) {
        self.report.files += 1;
        let mut bad: Option<Bad<'_>> = None;
        let (mut at, mut number) = (0, 0);
        while at < bytes.len() {
            number += 1;
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
                    if end.is_none() && !last {
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
            let cut_off = last && is_cut_off(bad.bytes);
            if cut_off {
                self.report.notes.push(format!(
                    "{name}:{}: {} bytes of a line that was cut off: a crash while it was written, \
                     or a cut; the daemon marks it when it starts",
                    bad.line,
                    bad.bytes.len()
                ));
            } else {
                self.changed(name, &bad, None);
            }
        }
        if number == 0 {
            self.report.notes.push(format!("{name}: empty"));
        }
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
        if !self.follows(file, line, &link, explained) {
            return;
        }
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
        self.kept_from.extend(link.kept_from);
        self.tip = Some(link);
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
            let what = if missing == 1 {
                format!("record {next} is missing before this line")
            } else {
                format!("records {next} to {} are missing before this line", link.seq - 1)
            };
            self.wrong(file, line, Wrong::Missing, &what);
        }
        true
    }

    fn signature(&mut self, file: &str, line: usize, link: &Link) {
        let signed = matches!(link.event.as_str(), "checkpoint" | "daemon-stop");
        match (&self.expect.public_key, &link.signer) {
            (Some(key), _) if signed => {
                if is_signed_by(link, key) {
                    self.report.signed_up_to = Some(link.seq - 1);
                } else {
                    let what = "this checkpoint is not signed with the key that was given";
                    self.wrong(file, line, Wrong::Signature, what);
                }
            }
            (None, Some(signer)) => {
                self.signed = true;
                if !unhex(signer).is_some_and(|key| is_signed_by(link, &key)) {
                    let what = "the signature does not fit the key that it names";
                    self.wrong(file, line, Wrong::Signature, what);
                }
            }
            (_, None) if link.signature.is_some() => {
                self.wrong(file, line, Wrong::Signature, "a signature without its key");
            }
            _ => {}
        }
    }

    fn anchors(&mut self, file: &str, line: usize, link: &Link) {
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
                    "records 1 to {} are missing before this line (with --partial they may lie \
                     elsewhere)",
                    first - 1
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
        self.last_words(last);
        self.report
    }

    fn last_words(&mut self, last: u64) {
        let notes = &mut self.report.notes;
        if let Some(tip) = &self.tip {
            self.report.last = Some(Anchor { seq: tip.seq, hash: tip.hash });
            self.report.last_time = Some(tip.time.clone());
            if tip.event != "daemon-stop" && self.expect.anchors.is_empty() {
                notes.push(
                    "it does not end with daemon-stop: the daemon runs, or it crashed, or the end \
                     was cut off; only what was noted elsewhere can tell (--expect)"
                        .to_owned(),
                );
            }
        }
        if self.expect.public_key.is_some() {
            let covered = self.report.signed_up_to.unwrap_or(0);
            if covered < last.saturating_sub(1) {
                notes.push(format!(
                    "signatures cover the records up to {covered}; those after it have hashes alone"
                ));
            }
        } else if self.signed {
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

/// Whether a crash may have left these bytes at the end: the beginning of one line, or nothing but
/// zeroes where it should be.
#[must_use]
pub fn is_cut_off(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0) || !bytes.contains(&b'\n') && may_be_cut_off(bytes)
}
