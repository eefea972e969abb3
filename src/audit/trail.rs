//! The chain in memory: each event gets its number, its hash and its place here, under one lock;
//! what is written is decided here as well, so that the writer only writes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::audit::calls::Calls;
use crate::audit::chain::{Hash, seal};
use crate::audit::files::{Found, name};
use crate::audit::recent::Recent;
use crate::audit::record::{Event, Kind, Record, Torn};
use crate::audit::signer::Signer;
use crate::audit::verify::Anchor;
use crate::audit::{AuditSettings, Failing, alarm, announce, now};
use crate::kms::Call;

/// Bytes that may wait to be written: hours of a busy node. Beyond, events are counted, not kept.
const WAITING: usize = 8 << 20;

/// A checkpoint is made at the latest so long after the one before, if there is anything new.
const CHECKPOINT_AFTER: Duration = Duration::from_secs(3600);

/// A line to be written.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) seq: u64,
    pub(super) text: String,
    pub(super) hash: Hash,
    /// It is the first of a file.
    pub(super) begins: bool,
    /// Files that begin before this record are deleted once it is written.
    pub(super) kept_from: Option<u64>,
}

/// The chain, and what waits.
#[derive(Debug)]
pub(super) struct Trail {
    settings: AuditSettings,
    signer: Option<Signer>,
    instance: Uuid,
    head: Anchor,
    written: Anchor,
    /// First records of the files.
    firsts: VecDeque<u64>,
    /// Bytes of the newest file, with what waits for it.
    file_len: u64,
    torn: Option<Torn>,
    damaged: Option<usize>,
    queue: VecDeque<Line>,
    waiting: usize,
    since_checkpoint: u64,
    checkpointed: Instant,
    failing: Option<Failing>,
    /// What the last failed try would have written last.
    failed_up_to: u64,
    failures: u64,
    /// Events that could not be recorded since the last one that could.
    unsaid: u64,
    lost: u64,
    /// What else changed the files, the last time.
    changed: Option<Failing>,
    calls: Calls,
    recent: Recent,
    closed: bool,
    /// Nothing is written: what is recorded is as good as written.
    in_memory: bool,
}

impl Trail {
    pub(super) fn new(settings: &AuditSettings, signer: Option<Signer>, found: Found) -> Self {
        let tip = found.tip.unwrap_or(Anchor { seq: 0, hash: Hash::default() });
        let mut recent = Recent::default();
        found.records.into_iter().for_each(|record| recent.push(record));
        Self {
            settings: settings.clone(),
            signer,
            instance: Uuid::new_v4(),
            head: tip,
            written: tip,
            firsts: found.firsts.into(),
            file_len: found.len,
            torn: found.torn,
            damaged: found.damaged,
            queue: VecDeque::new(),
            waiting: 0,
            since_checkpoint: 0,
            checkpointed: Instant::now(),
            failing: None,
            failed_up_to: 0,
            failures: 0,
            unsaid: 0,
            lost: 0,
            changed: None,
            calls: Calls::default(),
            recent,
            closed: false,
            in_memory: false,
        }
    }

    /// One whose lines go nowhere.
    pub(super) fn in_memory(settings: &AuditSettings) -> Self {
        Self { in_memory: true, ..Self::new(settings, None, Found::default()) }
    }

    /// Says first what was found of an earlier run.
    pub(super) fn begin(&mut self) {
        if let Some(torn) = self.torn.take() {
            let mut event = Event::new(Kind::Torn);
            event.torn = Some(torn);
            self.push(event);
        }
        if let Some(line) = self.damaged.take() {
            self.push(Event::new(Kind::Damaged).detail("line", &line.to_string()));
        }
    }

    /// Takes an event into the chain.
    pub(super) fn event(&mut self, event: Event) -> Option<u64> {
        let calls = event.uuid.map(|uuid| self.calls.of(uuid)).unwrap_or_default();
        for call in calls {
            self.push(call);
        }
        self.push(event)
    }

    pub(super) fn call(&mut self, call: &Call) {
        for event in self.calls.add(call) {
            self.push(event);
        }
    }

    /// What has waited long enough becomes a record.
    pub(super) fn tick(&mut self) {
        for event in self.calls.due() {
            self.push(event);
        }
        if self.since_checkpoint > 0 && self.checkpointed.elapsed() >= CHECKPOINT_AFTER {
            self.checkpoint();
        }
    }

    /// Everything that is gathered becomes a record.
    pub(super) fn settle(&mut self) {
        for event in self.calls.all() {
            self.push(event);
        }
    }

    fn push(&mut self, event: Event) -> Option<u64> {
        if self.waiting > WAITING {
            self.unsaid += 1;
            self.lost += 1;
            return None;
        }
        if self.firsts.is_empty() || self.file_len >= self.settings.file_size {
            self.begin_file();
        }
        let ends = event.event == Kind::DaemonStop;
        let seq = self.line(event, false, None);
        self.since_checkpoint += 1;
        // It is the last record of a run: whether a run stopped in order is told by that.
        if !ends && self.since_checkpoint >= self.settings.checkpoint_every {
            self.checkpoint();
        }
        Some(seq)
    }

    fn checkpoint(&mut self) {
        self.line(Event::new(Kind::Checkpoint), false, None);
        self.since_checkpoint = 0;
        self.checkpointed = Instant::now();
        if !self.in_memory {
            announce(self.head);
        }
    }

    /// The chain goes on in a new file.
    fn begin_file(&mut self) {
        if self.since_checkpoint > 0 {
            self.checkpoint();
        }
        let mut event = Event::new(Kind::FileStart);
        event.after = self.firsts.back().map(|first| name(*first));
        self.firsts.push_back(self.head.seq + 1);
        self.file_len = 0;
        self.line(event, true, None);
        let keep = self.settings.keep;
        if keep > 0 && self.firsts.len() > keep {
            self.firsts.drain(..self.firsts.len() - keep);
            let first = self.firsts.front().copied();
            let mut event = Event::new(Kind::FilesDropped);
            event.kept_from = first;
            self.line(event, false, first);
        }
    }

    fn line(&mut self, mut event: Event, begins: bool, kept_from: Option<u64>) -> u64 {
        if self.unsaid > 0 {
            event.lost = Some(std::mem::take(&mut self.unsaid));
        }
        let seq = self.head.seq + 1;
        let prev = self.head.hash;
        let mut record = Record {
            seq,
            time: now(),
            instance: self.instance,
            event,
            prev,
            hash: Hash::default(),
        };
        if let Some(signer) = &self.signer {
            signer.sign(&mut record);
        }
        let mut text = seal(&mut record);
        text.push('\n');
        self.head = Anchor { seq, hash: record.hash };
        self.recent.push(record);
        if self.in_memory {
            self.written = self.head;
            return seq;
        }
        self.waiting += text.len();
        self.file_len += u64::try_from(text.len()).unwrap_or(u64::MAX);
        self.queue.push_back(Line { seq, text, hash: self.head.hash, begins, kept_from });
        seq
    }

    /// All that waits, for the writer; none if it is to end and nothing waits.
    pub(super) fn take(&mut self) -> VecDeque<Line> {
        std::mem::take(&mut self.queue)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.closed
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// The writer has this much on stable storage.
    pub(super) fn wrote(&mut self, up_to: Anchor, bytes: usize) {
        self.written = up_to;
        self.waiting -= bytes;
        if self.failing.take().is_some() {
            alarm(None, 0);
        }
    }

    /// The writer could not write what ends with this record.
    pub(super) fn could_not_write(&mut self, why: String, up_to: u64) {
        self.failures += 1;
        self.failed_up_to = up_to;
        let since = self.failing.take().map_or_else(now, |failing| failing.since);
        let said = self.failures == 1 || self.failures.is_power_of_two();
        let failing = Failing { since, why };
        if said {
            alarm(Some(&failing), self.waiting);
        }
        self.failing = Some(failing);
    }

    /// Something else changed the files.
    pub(super) fn foreign_change(&mut self, why: String, mut event: Event) {
        event.why = Some(why.clone());
        self.changed = Some(Failing { since: now(), why });
        self.push(event);
    }

    pub(super) fn changed(&self) -> Option<&Failing> {
        self.changed.as_ref()
    }

    /// Why a record could not be written, if that was tried.
    pub(super) fn failed_for(&self, seq: u64) -> Option<&Failing> {
        self.failing.as_ref().filter(|_| self.failed_up_to >= seq)
    }

    pub(super) fn recent(&self, volume: Option<&str>, since: u64, most: usize) -> Vec<Arc<Record>> {
        self.recent.last(volume, since, most)
    }

    pub(super) fn instance(&self) -> Uuid {
        self.instance
    }

    pub(super) fn head(&self) -> Anchor {
        self.head
    }

    pub(super) fn written(&self) -> Anchor {
        self.written
    }

    pub(super) fn failing(&self) -> Option<&Failing> {
        self.failing.as_ref()
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    pub(super) fn public_key(&self) -> Option<&str> {
        self.signer.as_ref().map(Signer::public)
    }
}
