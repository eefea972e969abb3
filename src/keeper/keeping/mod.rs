//! The task of a keeper: what it waits for, whom it asks, and what it tells.

mod steps;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::audit::Audit;
use crate::audit::record::{Event as Record, Kind};
use crate::clock::now;
use crate::export::Export;
use crate::keeper::group::{Heard, Seat};
pub(crate) use crate::keeper::keeping::steps::settle;
use crate::keeper::pace::Errand;
use crate::keeper::plan::PlanStep;
use crate::keeper::{Command, KeyReport, Terms};
use crate::key::lease::{KeyLease, LeaseState, LeaseWord, Moment, Step, Verdict};
use crate::kms::trouble::{Trouble, cause, trouble};
use crate::kms::{Evidence, KeyService, KmsError, Proof};
use crate::luks2::Header;
use crate::metrics::counters::VolumeCounters;
use crate::progress::Part;
use crate::units::{rfc3339, word};

/// How often time alone is looked at, if nothing else is due: after the machine slept, the key that
/// may not be used any more is destroyed within this time.
const TICK: Duration = Duration::from_secs(5);

/// How late a keeper may be before it counts as standing still: on a machine so busy, starting anew
/// would not help sooner.
const GRACE: Duration = Duration::from_secs(10);

/// The least step of time that is waited for.
const MOMENT: Duration = Duration::from_millis(5);

/// How long after a probe what a sibling heard may bring the next one.
const SIBLING_PAUSE: Duration = Duration::from_millis(500);

/// A lease, and what is needed to keep it.
pub(super) struct Keeping<K> {
    export: Arc<Export>,
    /// What is probed and unwrapped, and goes with `seat`.
    header: Arc<Header>,
    kms: Arc<K>,
    lease: KeyLease,
    report: KeyReport,
    tell: watch::Sender<KeyReport>,
    inbox: mpsc::Receiver<Command>,
    seat: Seat,
    /// When the last probe began.
    probed: Instant,
    /// When the next one is due.
    next: Instant,
    /// It is not a regular one.
    forced: bool,
    /// A sibling heard something that is worth asking for, after the probe under way was sent.
    missed: bool,
    /// How many volumes the group had when that was decided, and how many took turns.
    planned_for: (usize, usize),
    /// Who waits for the answer to a question that is not sent yet.
    asking: Vec<oneshot::Sender<()>>,
    /// Who is told when what happened has been acted upon and published.
    waiting: Vec<oneshot::Sender<()>>,
    /// What to do after a fence.
    on_fence: Vec<PlanStep>,
    /// It, being done; ends with this.
    plan: JoinSet<()>,
    /// Hears that this goes on.
    part: Part,
    audit: Arc<Audit>,
    /// Where the lease stood when that was recorded last.
    recorded: LeaseWord,
    counters: Arc<VolumeCounters>,
    /// When a report was last made.
    published: Moment,
}

/// What a keeper wakes for.
enum Event {
    /// A command; none will come any more if the volume is being detached.
    Told(Option<Command>),
    /// What a sibling heard.
    Heard(Heard),
    /// Time has passed.
    Time,
}

/// How a probe ended.
enum Asked {
    /// KMS answered, or did not in time, a question that was sent then.
    Answered(Result<Proof, KmsError>, Moment),
    /// Somebody who must not wait for it came.
    Interrupted(Command),
    /// The volume is being detached.
    Ended,
}

impl<K: KeyService> Keeping<K> {
    /// For the key of `export`, which has just been unwrapped; what is known of it is told.
    pub(super) fn new(
        export: Arc<Export>,
        kms: Arc<K>,
        terms: Terms,
        seat: Seat,
        inbox: mpsc::Receiver<Command>,
        part: Part,
        counters: Arc<VolumeCounters>,
    ) -> (Self, watch::Receiver<KeyReport>) {
        let Terms { policy, asked, on_fence, audit } = terms;
        let lease = KeyLease::new(policy, asked);
        let told = Timestamp::now();
        let report = KeyReport {
            state: LeaseWord::Held,
            serves: true,
            since: told,
            last_success: told,
            verified: asked,
            serves_until: lease.serves_until(),
            heard: now(),
            interval: policy.interval,
            hears_within: seat.hears_within(),
            allowance_until: None,
            verdict: Verdict::Allowed,
            fenced_for: None,
            fenced_after: None,
            evidence: None,
        };
        let (tell, reports) = watch::channel(report.clone());
        // Volumes that are attached together spread over the first interval.
        let ago = policy.interval.mul_f64(0.5 * random());
        let probed = Instant::now().checked_sub(ago).unwrap_or_else(Instant::now);
        let (next, planned_for) = (seat.next(probed, 0.0), seat.shape());
        let mut keeping = Self {
            header: export.volume().header(),
            export,
            kms,
            lease,
            report,
            tell,
            inbox,
            seat,
            probed,
            next,
            forced: false,
            missed: false,
            planned_for,
            asking: Vec::new(),
            waiting: Vec::new(),
            on_fence,
            plan: JoinSet::new(),
            part,
            audit,
            recorded: LeaseWord::Held,
            counters,
            published: now(),
        };
        keeping.publish();
        (keeping, reports)
    }

    /// Keeps the lease until the volume is detached.
    pub(super) async fn run(mut self) {
        let mut interrupted = None;
        loop {
            let event = match interrupted.take() {
                Some(command) => Event::Told(Some(command)),
                None => self.wait().await,
            };
            match event {
                Event::Told(None) => return,
                Event::Told(Some(Command::Suspend(heard))) => self.suspend(heard).await,
                Event::Told(Some(Command::Resume(heard))) => {
                    self.lease.resume(now());
                    self.asking.push(heard);
                }
                Event::Told(Some(Command::Recheck(heard))) => self.asking.push(heard),
                Event::Told(Some(Command::Rewrapped(seat, heard))) => self.rewrapped(seat, heard),
                Event::Heard(heard) => self.sibling(heard).await,
                Event::Time => {
                    self.replan();
                    let step = self.lease.tick(now());
                    self.act(step).await;
                }
            }
            if !self.waiting.is_empty() {
                // Whoever fences by hand does not wait for KMS.
                self.answer();
            }
            if !self.asking.is_empty() || Instant::now() >= self.next {
                match self.probe().await {
                    Ok(command) => interrupted = command,
                    Err(Detached) => return,
                }
            }
            self.answer();
        }
    }

    /// Publishes what has been acted upon, and tells those who wait for that.
    fn answer(&mut self) {
        self.publish();
        for done in self.waiting.drain(..) {
            // Who asked may have gone.
            let _heard = done.send(());
        }
    }

    async fn suspend(&mut self, heard: oneshot::Sender<()>) {
        if let Step::Fence(reason) = self.lease.suspend(now()) {
            self.fence(reason).await;
        }
        self.waiting.push(heard);
    }

    fn rewrapped(&mut self, seat: Seat, heard: oneshot::Sender<()>) {
        self.lease.rewrapped(now());
        self.header = self.export.volume().header();
        self.planned_for = seat.shape();
        self.seat = seat;
        self.asking.push(heard);
    }

    async fn wait(&mut self) -> Event {
        let next = if self.asking.is_empty() { self.next } else { Instant::now() };
        let wake = next.min(self.over());
        self.part.goes_on(TICK + GRACE);
        tokio::select! {
            biased;
            command = self.inbox.recv() => Event::Told(command),
            heard = self.seat.news() => Event::Heard(heard),
            () = sleep_until(wake) => Event::Time,
        }
    }

    /// When time alone ends something: the lease, or the wait of requests.
    fn over(&self) -> Instant {
        // A moment later, so that it is over then.
        let lease = self.lease.serves_until().map(|end| end.since(now()) + MOMENT);
        let hold = self.export.held_for().map(|left| left + MOMENT);
        Instant::now() + lease.into_iter().chain(hold).fold(TICK, Duration::min)
    }

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
    async fn sibling(&mut self, heard: Heard) {
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
    fn replan(&mut self) {
        let shape = self.seat.shape();
        if !self.forced && shape != self.planned_for {
            self.next = self.due();
        }
        self.planned_for = shape;
    }

    /// Probes, and acts upon the answer. Gives back a command that could not wait for it.
    async fn probe(&mut self) -> Result<Option<Command>, Detached> {
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

    fn event(&self, kind: Kind) -> Record {
        Record::new(kind).volume(self.export.name()).wrapped(&self.header.token().wrapped)
    }

    /// What is wrong with the key, if anything is.
    fn trouble(&self) -> Option<Trouble> {
        let state = self.lease.state().word();
        trouble(self.export.name(), state, self.report.evidence.as_ref())
    }

    /// Keeps what KMS said, and logs and records it when it is news.
    fn heard(&mut self, error: &KmsError) {
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

    fn publish(&mut self) {
        self.export.end_hold();
        self.export.gatekeeper().serve_until(self.lease.serves_until());
        // The time since the last report was spent in the state that it told.
        if matches!(self.report.state, LeaseWord::Unverified | LeaseWord::Expired) {
            self.counters.add_outage(now().since(self.published));
        }
        self.published = now();
        let at = |moment: Moment| {
            let ago = now().since(moment);
            Timestamp::now().checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH)
        };
        let state = self.lease.state();
        if self.recorded != state.word() {
            let event = self.event(Kind::Lease).states(self.recorded, state.word());
            self.audit.record(event);
            self.recorded = state.word();
        }
        if self.report.state != state.word() {
            self.report.since = at(self.lease.since());
        }
        self.report.state = state.word();
        self.report.serves = state.serves() && self.export.is_serving();
        self.seat.serves(state.serves());
        self.report.last_success = at(self.lease.last_success());
        self.report.verified = self.lease.last_success();
        self.report.serves_until = self.lease.serves_until();
        self.report.hears_within = self.seat.hears_within();
        self.report.allowance_until = self.lease.allowance_until();
        self.tell.send_replace(self.report.clone());
    }
}

/// The volume is being detached: its keeper ends.
struct Detached;

/// Random, from 0 to 1.
fn random() -> f64 {
    let mut random = [0; 4];
    // Without randomness volumes are only not spread.
    let _filled = aws_lc_rs::rand::fill(&mut random);
    f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX)
}
