//! The task of a keeper: its start, what it waits for, whom it asks, and what it tells.

mod probing;
mod steps;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::audit::Audit;
use crate::audit::record::{Event as Record, Kind};
use crate::clock::now;
use crate::export::Export;
use crate::keeper::group::{Groups, Heard, Seat};
use crate::keeper::keeping::probing::Detached;
use crate::keeper::plan::PlanStep;
use crate::keeper::{Command, Keeper, KeyReport, MOMENT, Terms};
use crate::key::lease::{KeyLease, LeaseWord, Moment, Step, Verdict};
use crate::key::wrapped::Role;
use crate::kms::KeyService;
use crate::kms::trouble::{Trouble, trouble};
use crate::luks2::Header;
use crate::metrics::counters::VolumeCounters;
use crate::progress::Part;

/// How often time alone is looked at, if nothing else is due: after the machine slept, the key that
/// may not be used any more is destroyed within this time.
const TICK: Duration = Duration::from_secs(5);

/// How late a keeper may be before it counts as standing still: on a machine so busy, starting anew
/// would not help sooner.
const GRACE: Duration = Duration::from_secs(10);

/// A lease, and what is needed to keep it.
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
        let (commands, inbox) = mpsc::channel(8);
        let (tell, reports) = watch::channel(report.clone());
        // Volumes that are attached together spread over the first interval.
        let ago = policy.interval.mul_f64(0.5 * random());
        let probed = Instant::now().checked_sub(ago).unwrap_or_else(Instant::now);
        let (next, planned_for) = (seat.next(probed, 0.0), seat.shape());
        let mut keeping = Keeping {
            export,
            header,
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
        Self { commands, reports, task: tokio::spawn(keeping.run()) }
    }
}

impl<K: KeyService> Keeping<K> {
    /// Keeps the lease until the volume is detached.
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

    fn event(&self, kind: Kind) -> Record {
        Record::new(kind).volume(self.export.name()).wrapped(&self.header.token().wrapped)
    }

    /// What is wrong with the key, if anything is.
    fn trouble(&self) -> Option<Trouble> {
        let state = self.lease.state().word();
        trouble(self.export.name(), state, self.report.evidence.as_ref())
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

/// Random, from 0 to 1.
fn random() -> f64 {
    let mut random = [0; 4];
    // Without randomness volumes are only not spread.
    let _filled = aws_lc_rs::rand::fill(&mut random);
    f64::from(u32::from_le_bytes(random)) / f64::from(u32::MAX)
}
