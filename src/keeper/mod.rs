//! Keeps the lease on one attached volume's key: probes, tells the lease, does its steps.
//!
//! One task per attached volume. It owns the lease; others see [`KeyReport`]s and send
//! `Command`s. A probe has its own time limit and never more than one is under way; fencing does
//! not wait for KMS, and no I/O waits for either. Volumes under one key tell each other what they
//! hear (see [`group`]).

pub mod group;
mod keeping;
pub mod pace;
pub mod plan;
pub(crate) mod threads;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::error;

use crate::audit::Audit;
use crate::export::{Export, QUIESCE};
use crate::keeper::group::{HearsWithin, Seat};
use crate::keeper::plan::PlanStep;
use crate::keeper::threads::apart;
use crate::key::lease::{FenceReason, LeasePolicy, LeaseWord, Moment, Verdict};
use crate::kms::Evidence;

/// The least step of time that is waited for.
const MOMENT: Duration = Duration::from_millis(5);

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
