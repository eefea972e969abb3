//! Asking KMS, and hearing what it told volumes under the same key.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::audit::record::Kind;
use crate::clock::now;
use crate::keeper::Command;
use crate::keeper::group::Heard;
use crate::keeper::keeping::{GRACE, Keeping, TICK, random};
use crate::keeper::pace::Errand;
use crate::key::lease::{LeaseState, Moment, Step, Verdict};
use crate::kms::trouble::cause;
use crate::kms::{Evidence, KeyService, KmsError, Proof};
use crate::units::{rfc3339, word};

/// How long after a probe what a sibling heard may bring the next one.
const SIBLING_PAUSE: Duration = Duration::from_millis(500);

/// How a probe ended.
enum Asked {
    /// KMS answered, or did not in time, a question that was sent then.
    Answered(Result<Proof, KmsError>, Moment),
    /// Somebody who must not wait for it came.
    Interrupted(Command),
    /// The volume is being detached.
    Ended,
}

/// The volume is being detached: its keeper ends.
pub(super) struct Detached;

impl<K: KeyService> Keeping<K> {
    /// When the next probe is due, after one that has just ended.
    fn due(&self) -> Instant {
        let (pause, _) = self.lease.next_probe();
        // Something has to be made certain: it is not put off until the volume's turn.
        if self.lease.state().is_in_doubt() {
            return self.probed + pause;
        }
        self.seat.next(self.probed, 2.0 * random() - 1.0)
    }

    /// What volumes under the same key have heard, as far as it is true of this one too.
    async fn told(&mut self, heard: Heard) {
        if let Some((verdict, asked)) = heard.verdict {
            (self.report.heard, self.report.verdict) = (now(), verdict);
            let step = self.lease.observe_sibling(now(), verdict, asked);
            self.act(step).await;
        }
    }

    /// What volumes under the same key have heard.
    pub(super) async fn sibling(&mut self, heard: Heard) {
        let worth_asking = self.is_worth_asking(heard);
        self.told(heard).await;
        if worth_asking {
            self.ask_soon();
        }
    }

    /// Whether this volume asks for itself, for what a sibling heard.
    fn is_worth_asking(&self, heard: Heard) -> bool {
        match self.lease.state() {
            LeaseState::Held | LeaseState::Suspect | LeaseState::Unverified => heard.denied,
            // Its own turn may be hours away.
            LeaseState::Revoked(_) | LeaseState::Expired | LeaseState::Restoring(_) => {
                matches!(heard.verdict, Some((Verdict::Allowed, _)))
            }
            LeaseState::Suspended => false,
        }
    }

    /// Asks for itself, for what a sibling heard; however often a sibling's answers change, at a
    /// bounded rate.
    fn ask_soon(&mut self) {
        let (interval, _) = self.lease.next_probe();
        self.next = self.next.min(self.probed + interval.min(SIBLING_PAUSE));
        self.forced = true;
    }

    /// Volumes came or went: the regular probe may be due at another time.
    pub(super) fn replan(&mut self) {
        let shape = self.seat.shape();
        if !self.forced && shape != self.planned_for {
            self.next = self.due();
        }
        self.planned_for = shape;
    }

    /// Probes, and acts upon the answer. Gives back a command that could not wait for it.
    pub(super) async fn probe(&mut self) -> Result<Option<Command>, Detached> {
        let asked = self.ask().await;
        (self.next, self.forced) = (self.due(), false);
        let (result, sent) = match asked {
            Asked::Answered(result, sent) => (result, sent),
            Asked::Interrupted(command) => return Ok(Some(command)),
            Asked::Ended => return Err(Detached),
        };
        let verdict = match result {
            Ok(_) => Verdict::Allowed,
            Err(error) => {
                let verdict = error.verdict;
                self.heard(&error);
                self.lease.attribute(error.whose, error.came);
                verdict
            }
        };
        (self.report.heard, self.report.verdict) = (now(), verdict);
        self.counters.probes.add(&word(verdict));
        let before = self.lease.state();
        self.seat.tell(verdict, sent, before.serves());
        let step = self.lease.observe(now(), verdict, sent);
        let after = self.lease.state();
        if before.word() != after.word() && step == Step::None {
            let volume = self.export.name();
            let (from, to) = (word(before.word()), word(after.word()));
            info!(volume, from, to, verdict = word(verdict), "key lease changed");
        }
        self.act(step).await;
        (self.next, self.forced) = (self.due(), self.lease.state().is_in_doubt());
        if std::mem::take(&mut self.missed) {
            self.ask_soon();
        }
        Ok(None)
    }

    /// Asks KMS, at the node's pace. Only rechecks wait for the answer: that of this probe if its
    /// question was not sent when they came. Any other command ends the probe.
    async fn ask(&mut self) -> Asked {
        let (_, connection) = self.lease.next_probe();
        let (kms, header) = (Arc::clone(&self.kms), Arc::clone(&self.header));
        let errand = match self.lease.state() {
            LeaseState::Suspect => Errand::Confirm,
            LeaseState::Held
            | LeaseState::Unverified
            | LeaseState::Revoked(_)
            | LeaseState::Expired
            | LeaseState::Restoring(_)
            | LeaseState::Suspended => Errand::Other,
        };
        let turn = self.seat.turn(errand);
        let began = OnceLock::new();
        let probe = async {
            turn.await;
            let (_, sent) = *began.get_or_init(|| (Instant::now(), now()));
            (kms.probe(&header.token().canary, connection).await, sent)
        };
        tokio::pin!(probe);
        let mut too_late = Vec::new();
        let asked = loop {
            let over = self.over();
            self.part.goes_on(TICK + GRACE);
            tokio::select! {
                biased;
                command = self.inbox.recv() => match command {
                    Some(Command::Recheck(done)) if began.get().is_some() => too_late.push(done),
                    Some(Command::Recheck(done)) => self.asking.push(done),
                    Some(command) => break Asked::Interrupted(command),
                    None => break Asked::Ended,
                },
                (result, sent) = &mut probe => {
                    self.waiting.append(&mut self.asking);
                    break Asked::Answered(result, sent);
                }
                heard = self.seat.news() => {
                    // What was heard before the question is sent needs no other one.
                    self.missed |= began.get().is_some() && self.is_worth_asking(heard);
                    self.told(heard).await;
                }
                () = sleep_until(over) => {
                    let step = self.lease.tick(now());
                    self.act(step).await;
                    self.publish();
                }
            }
        };
        self.asking.append(&mut too_late);
        if let Some((began, _)) = began.get() {
            self.probed = *began;
        }
        asked
    }

    /// Keeps what KMS said, and logs and records it when it is news.
    pub(super) fn heard(&mut self, error: &KmsError) {
        let denied = error.verdict == Verdict::Denied;
        let last = self.report.evidence.as_ref();
        let news = last.is_none_or(|e| (&e.code, e.verdict) != (&error.code, error.verdict));
        let state = self.lease.state();
        // What a sibling heard may have come between.
        let first = denied && state.serves() && self.lease.first_denial().is_none();
        if news || first || state == LeaseState::Held {
            let kind = if denied { Kind::Denial } else { Kind::KmsError };
            self.audit.record(self.event(kind).error(error));
            warn!(
                volume = self.export.name(),
                key = %error.key,
                code = error.code,
                kms_message = error.message,
                request_id = error.request_id,
                verdict = word(error.verdict),
                // A fence names its own: one answer that denies or does not fit is only suspected.
                alert = error.verdict.alert().filter(|_| !error.verdict.is_made_certain()),
                cause = cause(error.verdict),
                remedy = error.remedy,
                "a probe did not succeed"
            );
        }
        self.report.evidence = Some(Evidence {
            at: rfc3339(Timestamp::now()),
            code: error.code.clone(),
            message: error.message.clone(),
            request_id: error.request_id.clone(),
            verdict: error.verdict,
            remedy: error.remedy.clone(),
        });
    }
}
