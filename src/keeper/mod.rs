//! Keeps the lease on one attached volume's key: probes, tells the lease, does its steps.
//!
//! One task per attached volume. It owns the lease; others see [`KeyReport`]s and send
//! `Command`s. A probe has its own time limit and never more than one is under way; fencing does
//! not wait for KMS, and no I/O waits for either. Volumes under one key tell each other what they
//! hear (see [`group`]).

pub mod group;
pub mod pace;
pub mod plan;
pub(crate) mod threads;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{error, info, warn};

use crate::audit::record::{Event as Record, Kind};
use crate::audit::{Audit, Owed};
use crate::clock::now;
use crate::exit::ExitCode;
use crate::export::{Export, ExportError, ORPHANS, QUIESCE};
use crate::keeper::group::{Groups, Heard, HearsWithin, Seat};
use crate::keeper::pace::Errand;
use crate::keeper::plan::PlanStep;
use crate::keeper::threads::apart;
use crate::key::VolumeKey;
use crate::key::lease::{
    FenceReason, KeyLease, LeasePolicy, LeaseState, LeaseWord, Moment, Step, Verdict,
};
use crate::key::wrapped::Role;
use crate::kms::trouble::{Trouble, cause, trouble};
use crate::kms::{Evidence, KeyService, KmsError, Proof, ServiceError};
use crate::luks2::Header;
use crate::metrics::counters::VolumeCounters;
use crate::progress::Part;
use crate::units::{millis, rfc3339, word};

/// How often time alone is looked at, if nothing else is due: after the machine slept, the key that
/// may not be used any more is destroyed within this time.
const TICK: Duration = Duration::from_secs(5);

/// How late a keeper may be before it counts as standing still: on a machine so busy, starting anew
/// would not help sooner.
const GRACE: Duration = Duration::from_secs(10);

/// The least step of time that is waited for.
const MOMENT: Duration = Duration::from_millis(5);

/// How often it is looked whether the store has ended what was given up.
const LOOK: Duration = Duration::from_millis(20);

/// How long after a probe what a sibling heard may bring the next one.
const SIBLING_PAUSE: Duration = Duration::from_millis(500);

/// What others see of a lease.
#[derive(Clone, Debug)]
pub struct KeyReport {
    /// Where it stands.
    pub state: LeaseWord,
    /// Whether the volume is served.
    pub serves: bool,
    /// Since when.
    pub since: Timestamp,
    /// When KMS was asked last of those times that it allowed the key.
    pub last_success: Timestamp,
    /// The same on the clock that leases are kept by.
    pub verified: Moment,
    /// When service is over if nothing more is heard, if ever.
    pub serves_until: Option<Moment>,
    /// When the last probe of this volume, or of one under the same key, was answered.
    pub heard: Moment,
    /// The interval of its probes.
    pub interval: Duration,
    /// Within what time a denial is first heard.
    pub hears_within: HearsWithin,
    /// When the outage allowance is over, while it runs.
    pub allowance_until: Option<Moment>,
    /// What the last answer meant, to a probe of this volume or of one under the same key.
    pub verdict: Verdict,
    /// Why it was fenced last.
    pub fenced_for: Option<FenceReason>,
    /// From the first denied answer to the key's destruction, of the last fence, if a denial led to
    /// it.
    pub fenced_after: Option<Duration>,
    /// What KMS said last that was not a success.
    pub evidence: Option<Evidence>,
}

impl KeyReport {
    /// How long the volume is served yet if nothing more is heard: not at all while it is fenced;
    /// `None` if that has no end.
    #[must_use]
    pub fn remaining(&self, now: Moment) -> Option<Duration> {
        match self.serves_until {
            Some(until) => Some(until.since(now)),
            None => (!self.serves).then_some(Duration::ZERO),
        }
    }

    /// What is left of the outage allowance, while it runs.
    #[must_use]
    pub fn allowance_left(&self, now: Moment) -> Option<Duration> {
        self.allowance_until.map(|until| until.since(now))
    }
}

/// How long the end of a keeper is waited for.
const END: Duration = Duration::from_secs(1);

/// What a keeper can be told.
enum Command {
    Suspend(oneshot::Sender<()>),
    Resume(oneshot::Sender<()>),
    Recheck(oneshot::Sender<()>),
    Rewrapped(Seat, oneshot::Sender<()>),
}

/// The handle of a volume's keeper. Dropping it ends the task.
pub struct Keeper {
    commands: mpsc::Sender<Command>,
    reports: watch::Receiver<KeyReport>,
    task: JoinHandle<()>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How a lease is kept, as configured.
#[derive(Clone, Debug)]
pub struct Terms {
    /// When to probe, and what follows.
    pub policy: LeasePolicy,
    /// When KMS was asked for the key that the volume is served with.
    pub asked: Moment,
    /// What to do after a fence.
    pub on_fence: Vec<PlanStep>,
    /// Where it is recorded.
    pub audit: Arc<Audit>,
}

impl Keeper {
    /// Starts keeping the lease on `export`'s key, which has just been unwrapped: probes go to
    /// `kms`, as `role`, in step with the other volumes of `groups`. `part` says that it goes on.
    pub fn start<K: KeyService>(
        export: Arc<Export>,
        kms: Arc<K>,
        terms: Terms,
        groups: &Groups,
        role: Option<&Role>,
        part: Part,
        counters: Arc<VolumeCounters>,
    ) -> Self {
        let Terms { policy, asked, on_fence, audit } = terms;
        let lease = KeyLease::new(policy, asked);
        let header = export.volume().header();
        let key = &header.token().canary.wrapped.key_arn;
        let seat = groups.join(key, role, policy.interval);
        let told = Timestamp::now();
        let first = KeyReport {
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
        let (commands, inbox) = mpsc::channel(8);
        let (tell, reports) = watch::channel(first.clone());
        // Volumes that are attached together spread over the first interval.
        let ago = policy.interval.mul_f64(0.5 * random());
        let probed = Instant::now().checked_sub(ago).unwrap_or_else(Instant::now);
        let (next, planned_for) = (seat.next(probed, 0.0), seat.shape());
        let mut keeping = Keeping {
            export,
            header,
            kms,
            lease,
            report: first,
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
        Self { commands, reports, task: tokio::spawn(keeping.run()) }
    }

    /// What is known now.
    #[must_use]
    pub fn report(&self) -> KeyReport {
        self.reports.borrow().clone()
    }

    /// What is known, as it changes.
    #[must_use]
    pub fn reports(&self) -> watch::Receiver<KeyReport> {
        self.reports.clone()
    }

    /// Ends the task, and waits until it has let go of the volume: not for long, as whatever it does
    /// then may hang.
    pub async fn end(mut self) {
        self.task.abort();
        // Cut off, which is what is wanted.
        let _ended = timeout(END, &mut self.task).await;
    }

    /// A way to tell it things.
    #[must_use]
    pub fn teller(&self) -> Teller {
        Teller(self.commands.clone())
    }
}

/// A way to tell a keeper things, for tasks that must not hold the keeper itself.
#[derive(Clone)]
pub struct Teller(mpsc::Sender<Command>);

impl Teller {
    /// Fences the volume until [`Teller::resume`]; done when this returns.
    pub async fn suspend(&self) {
        self.ask(Command::Suspend).await;
    }

    /// Takes a suspension back: the volume is served again when KMS allows it. KMS has been asked
    /// once when this returns.
    pub async fn resume(&self) {
        self.ask(Command::Resume).await;
    }

    /// Probes now; the answer has been acted upon when this returns. It is one to a question that
    /// was sent after this was called.
    pub async fn recheck(&self) {
        self.ask(Command::Recheck).await;
    }

    /// The volume's key has another wrapping, which is written: from now on that is probed and
    /// unwrapped, among the volumes of `seat`. KMS has been asked once when this returns.
    pub async fn rewrapped(&self, seat: Seat) {
        self.ask(|done| Command::Rewrapped(seat, done)).await;
    }

    async fn ask(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) {
        let (done, wait) = oneshot::channel();
        if self.0.send(command(done)).await.is_ok() {
            // It ends without an answer only when the volume is being detached.
            let _answered = wait.await;
        }
    }
}

struct Keeping<K> {
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
    async fn run(mut self) {
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

    /// A key that came for a restore is gone again without having been used.
    fn wiped(&self) -> Record {
        let event = self.event(Kind::KeyDestroyed);
        match self.export.gatekeeper().check() {
            Err(fenced) => event.reason(fenced.0),
            Ok(()) => event,
        }
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

    async fn act(&mut self, step: Step) {
        match step {
            Step::None => {}
            Step::Fence(reason) => self.fence(reason).await,
            Step::Restore => self.restore().await,
        }
    }

    /// Closes the fence here and now: no thread has to be free for it.
    async fn fence(&mut self, reason: FenceReason) {
        self.part.goes_on(GRACE);
        let started = now();
        let trouble = match reason {
            FenceReason::Denied
            | FenceReason::Expired
            | FenceReason::Mismatch
            | FenceReason::Suspended => self.trouble(),
            // Nothing is wrong where somebody detaches it.
            FenceReason::Detached | FenceReason::Stopping => None,
        };
        let trouble = trouble.as_ref();
        // It takes a place in the trail and waits for no disk.
        let mut event = self.event(Kind::Fence).reason(reason).trouble(trouble);
        // An operator's suspension follows from no answer.
        let said = self.report.evidence.as_ref();
        let said = said.filter(|_| trouble.is_some() && reason != FenceReason::Suspended);
        if let Some(said) = said {
            event = event.evidence(said);
        }
        self.audit.record(event);
        let destroyed = self.export.close(reason);
        let from = self.lease.first_denial().unwrap_or(started);
        let took = now().since(from);
        self.report.fenced_for = Some(reason);
        self.report.fenced_after = self.lease.first_denial().map(|_| took);
        // Fenced for another reason already, it had none.
        if destroyed.is_first() {
            let event = self.event(Kind::KeyDestroyed).reason(reason);
            self.audit.record(event.millis(millis(took)));
        }
        self.counters.fences.add(&word(reason));
        if self.lease.first_denial().is_some() {
            self.counters.denial_to_fence.add(took);
            self.counters.add_late_fence(took > self.lease.fenced_within());
        }
        warn!(
            volume = self.export.name(),
            reason = word(reason),
            millis = self.report.fenced_after.map(millis),
            alert = reason.alert(),
            cause = trouble.map(|t| t.cause.as_str()),
            evidence = trouble.map(|t| t.evidence.as_str()),
            effect = trouble.map(|t| t.effect.as_str()),
            remedy = trouble.map(|t| t.remedy.as_str()),
            "fenced: the key is destroyed, requests are answered with EPERM"
        );
        settle(&self.export).await;
        if !self.on_fence.is_empty() {
            // Once for each fence, also when its reason changes.
            self.plan.abort_all();
            while self.plan.try_join_next().is_some() {}
            let facts = plan::facts(&self.export, reason);
            let (audit, event) = (Arc::clone(&self.audit), self.event(Kind::OnFence));
            self.plan.spawn(plan::carry_out(self.on_fence.clone(), facts, audit, event));
        }
        self.publish();
    }

    async fn restore(&mut self) {
        if self.export.is_stopping() {
            // Its key would be asked for in vain.
            self.lease.restore_failed(now());
            return;
        }
        let unwrapping = self.unwrapping();
        tokio::pin!(unwrapping);
        let unwrapped = loop {
            let over = self.over();
            self.part.goes_on(TICK + GRACE);
            tokio::select! {
                biased;
                command = self.inbox.recv() => match command {
                    // Without opening it.
                    Some(Command::Suspend(heard)) => return self.suspend(heard).await,
                    Some(Command::Resume(heard) | Command::Recheck(heard)) => self.asking.push(heard),
                    Some(Command::Rewrapped(seat, heard)) => {
                        self.rewrapped(seat, heard);
                        unwrapping.set(self.unwrapping());
                    }
                    // It is being detached, which whoever waits next hears again.
                    None => return,
                },
                unwrapped = &mut unwrapping => break unwrapped,
                // Requests do not wait for longer than they were to.
                () = sleep_until(over) => self.publish(),
            }
        };
        let (key, proof, asked) = match unwrapped {
            Ok(unwrapped) => unwrapped,
            Err(NotUnwrapped::Stalled(error)) => return self.not_served(&error),
            Err(NotUnwrapped::Refused(error)) => {
                if let ServiceError::Kms(error) = &error {
                    self.heard(error);
                }
                warn!(volume = self.export.name(), %error, "KMS allows probes again, but the key could not be unwrapped");
                return self.not_restored(&error);
            }
        };
        let event = self.event(Kind::Unwrap).request_id(proof.request_id.as_deref());
        self.audit.record(event);
        self.part.goes_on(GRACE);
        let export = Arc::clone(&self.export);
        let mut wiped = Owed::new(&self.audit, self.wiped());
        let restored = apart("restore", move || {
            let restored = export.restore(key);
            if restored.is_ok() {
                wiped.forgive();
            }
            restored
        });
        match restored.await {
            Ok(Ok(())) => {
                self.lease.restored(now(), asked);
                self.counters.restores.add("ok");
                self.plan.abort_all();
                self.audit.record(self.event(Kind::Restore));
                let (volume, request_id) = (self.export.name(), proof.request_id);
                info!(volume, request_id, "KMS allows the key again: serving");
            }
            Ok(Err(error)) => self.not_served(&error),
            Err(error) => self.not_served(&error),
        }
        self.publish();
    }

    /// The key for a restore, asked for when the store has ended what was given up: no key waits for
    /// a store that hangs. Dropped, it is as if nothing had been asked, and a key that came is wiped.
    fn unwrapping(
        &self,
    ) -> impl Future<Output = Result<(VolumeKey, Proof, Moment), NotUnwrapped>> + use<K> {
        let (export, kms) = (Arc::clone(&self.export), Arc::clone(&self.kms));
        let header = Arc::clone(&self.header);
        async move {
            let deadline = Instant::now() + ORPHANS;
            loop {
                match export.stalled() {
                    0 => break,
                    left if Instant::now() >= deadline || export.is_stopping() => {
                        return Err(NotUnwrapped::Stalled(ExportError::Stalled(left)));
                    }
                    _ => sleep(LOOK).await,
                }
            }
            let asked = now();
            let unwrapped = kms.unwrap_key(&header.token().wrapped).await;
            let (key, proof) = unwrapped.map_err(NotUnwrapped::Refused)?;
            Ok((key, proof, asked))
        }
    }

    fn not_served(&mut self, error: &dyn std::error::Error) {
        error!(volume = self.export.name(), %error, "KMS allows the key again, but the volume cannot be served");
        self.not_restored(error);
        self.publish();
    }

    fn not_restored(&mut self, error: &dyn std::error::Error) {
        let event = self.event(Kind::RestoreFailed);
        self.audit.record(event.failed(ExitCode::Failed, &error.to_string()));
        self.counters.restores.add("failed");
        self.lease.restore_failed(now());
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

/// Why there is no key for a restore.
enum NotUnwrapped {
    /// The store has not ended what was given up.
    Stalled(ExportError),
    /// KMS gave none.
    Refused(ServiceError),
}

/// What [`Export::settle`] does, on a thread of its own.
pub(crate) async fn settle(export: &Arc<Export>) {
    let settling = Arc::clone(export);
    if let Err(error) = apart("fence", move || settling.settle()).await {
        error!(volume = export.name(), %error, "no thread for a fence: its keeper sees to it itself");
        let deadline = Instant::now() + QUIESCE;
        while !export.is_settled() {
            if Instant::now() >= deadline {
                export.cut_off();
                break;
            }
            sleep_until(Instant::now() + MOMENT).await;
        }
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
