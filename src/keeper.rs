//! Keeps the lease on one attached volume's key: probes, tells the lease, does its steps.
//!
//! One task per attached volume. It owns the lease; others see [`KeyReport`]s and send
//! `Command`s. A probe has its own time limit and never more than one is under way; fencing does
//! not wait for KMS, and no I/O waits for either.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use crate::export::Export;
use crate::key::lease::{
    FenceReason, KeyLease, LeasePolicy, LeaseState, LeaseWord, Moment, Step, Verdict,
};
use crate::kms::{Evidence, KeyService, KmsError, ServiceError};
use crate::units::rfc3339;

/// How often time alone is looked at: what bounds service after the machine slept.
const TICK: Duration = Duration::from_secs(1);

/// Probes are spread by this share of the interval, in thousandths, both ways.
const JITTER: u64 = 100;

/// What others see of a lease.
#[derive(Clone, Debug)]
pub struct KeyReport {
    /// Where it stands.
    pub state: LeaseWord,
    /// Whether the volume is served.
    pub serves: bool,
    /// Since when.
    pub since: Timestamp,
    /// When KMS last allowed the key.
    pub last_success: Timestamp,
    /// Time left of the outage allowance, while it runs.
    pub allowance_left: Option<Duration>,
    /// From the first denied answer to the key's destruction, of the last fence.
    pub fenced_after: Option<Duration>,
    /// What KMS said last that was not a success.
    pub evidence: Option<Evidence>,
}

/// What a keeper can be told.
enum Command {
    Suspend(oneshot::Sender<()>),
    Resume(oneshot::Sender<()>),
    Recheck(oneshot::Sender<()>),
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

impl Keeper {
    /// Starts keeping the lease on `export`'s key, which has just been unwrapped.
    pub fn start<K: KeyService>(export: Arc<Export>, kms: Arc<K>, policy: LeasePolicy) -> Self {
        let lease = KeyLease::new(policy, now());
        let told = Timestamp::now();
        let first = KeyReport {
            state: LeaseWord::Held,
            serves: true,
            since: told,
            last_success: told,
            allowance_left: None,
            fenced_after: None,
            evidence: None,
        };
        let (commands, inbox) = mpsc::channel(8);
        let (tell, reports) = watch::channel(first.clone());
        let keeping = Keeping { export, kms, lease, report: first, tell };
        Self { commands, reports, task: tokio::spawn(keeping.run(inbox)) }
    }

    /// What is known now.
    #[must_use]
    pub fn report(&self) -> KeyReport {
        self.reports.borrow().clone()
    }

    /// Fences the volume until [`Keeper::resume`]; done when this returns.
    pub async fn suspend(&self) {
        self.ask(Command::Suspend).await;
    }

    /// Takes a suspension back: the volume is served again when KMS allows it.
    pub async fn resume(&self) {
        self.ask(Command::Resume).await;
    }

    /// Probes now; the answer has been acted upon when this returns.
    pub async fn recheck(&self) {
        self.ask(Command::Recheck).await;
    }

    async fn ask(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) {
        let (done, wait) = oneshot::channel();
        if self.commands.send(command(done)).await.is_ok() {
            // It ends without an answer only when the volume is being detached.
            let _answered = wait.await;
        }
    }
}

struct Keeping<K> {
    export: Arc<Export>,
    kms: Arc<K>,
    lease: KeyLease,
    report: KeyReport,
    tell: watch::Sender<KeyReport>,
}

impl<K: KeyService> Keeping<K> {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut next = Instant::now() + self.pause();
        loop {
            let wake = next.min(Instant::now() + TICK);
            tokio::select! {
                () = sleep_until(wake) => {
                    let step = self.lease.tick(now());
                    self.act(step).await;
                    if Instant::now() >= next {
                        self.probe().await;
                        next = Instant::now() + self.pause();
                    }
                }
                command = inbox.recv() => match command {
                    Some(Command::Suspend(done)) => {
                        let step = self.lease.suspend(now());
                        self.act(step).await;
                        let _heard = done.send(());
                    }
                    Some(Command::Resume(done)) => {
                        self.lease.resume(now());
                        self.probe().await;
                        next = Instant::now() + self.pause();
                        let _heard = done.send(());
                    }
                    Some(Command::Recheck(done)) => {
                        self.probe().await;
                        next = Instant::now() + self.pause();
                        let _heard = done.send(());
                    }
                    None => return,
                },
            }
            self.publish();
        }
    }

    /// Time to the next probe, jittered so that many volumes do not ask in step.
    fn pause(&self) -> Duration {
        let (pause, _) = self.lease.next_probe();
        let mut random = [0; 8];
        // Without randomness there is only no jitter.
        let _filled = aws_lc_rs::rand::fill(&mut random);
        let share = 1000 - JITTER + u64::from_le_bytes(random) % (2 * JITTER + 1);
        pause.mul_f64(share as f64 / 1000.0)
    }

    async fn probe(&mut self) {
        let (_, connection) = self.lease.next_probe();
        let canary = &self.export.volume().header().token().canary;
        let verdict = match self.kms.probe(canary, connection).await {
            Ok(_) => Verdict::Allowed,
            Err(error) => {
                let verdict = error.verdict;
                self.heard(&error);
                verdict
            }
        };
        let before = self.lease.state();
        let step = self.lease.observe(now(), verdict);
        let after = self.lease.state();
        if before.word() != after.word() && step == Step::None {
            let volume = self.export.name();
            info!(volume, from = ?before.word(), to = ?after.word(), ?verdict, "key lease changed");
        }
        self.act(step).await;
    }

    /// Keeps what KMS said, and logs it when it is news.
    fn heard(&mut self, error: &KmsError) {
        let news = self.report.evidence.as_ref().is_none_or(|e| e.code != error.code);
        if news || self.lease.state() == LeaseState::Held {
            warn!(
                volume = self.export.name(),
                key = %error.key,
                code = error.code,
                message = error.message,
                request_id = error.request_id,
                verdict = ?error.verdict,
                remedy = error.remedy,
                "KMS did not allow a probe"
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

    async fn fence(&mut self, reason: FenceReason) {
        let started = now();
        let export = Arc::clone(&self.export);
        let fenced = spawn_blocking(move || export.fence(reason)).await;
        let from = self.lease.first_denial().unwrap_or(started);
        let took = now().since(from);
        match fenced {
            Ok(_key_destroyed) => {
                self.report.fenced_after = Some(took);
                warn!(
                    volume = self.export.name(),
                    ?reason,
                    millis = took.as_millis(),
                    "fenced: the key is destroyed, requests are answered with EPERM"
                );
            }
            // The thread that fences can only end by a panic, which ends the process.
            Err(error) => error!(volume = self.export.name(), %error, "fencing was cut off"),
        }
        self.publish();
    }

    async fn restore(&mut self) {
        let wrapped = &self.export.volume().header().token().wrapped;
        let key = match self.kms.unwrap_key(wrapped).await {
            Ok((key, _)) => key,
            Err(error) => {
                if let ServiceError::Kms(error) = &error {
                    self.heard(error);
                }
                warn!(volume = self.export.name(), %error, "KMS allows probes again, but the key could not be unwrapped");
                self.lease.restore_failed(now());
                return;
            }
        };
        let export = Arc::clone(&self.export);
        match spawn_blocking(move || export.restore(key)).await {
            Ok(Ok(())) => {
                self.lease.restored(now());
                info!(volume = self.export.name(), "KMS allows the key again: serving");
            }
            Ok(Err(error)) => {
                error!(volume = self.export.name(), %error, "KMS allows the key again, but the volume cannot be served");
                self.lease.restore_failed(now());
            }
            Err(error) => error!(volume = self.export.name(), %error, "restoring was cut off"),
        }
        self.publish();
    }

    fn publish(&mut self) {
        let at = |moment: Moment| {
            let ago = now().since(moment);
            Timestamp::now().checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH)
        };
        let state = self.lease.state();
        if self.report.state != state.word() {
            self.report.since = at(self.lease.since());
        }
        self.report.state = state.word();
        self.report.serves = state.serves() && self.export.is_serving();
        self.report.last_success = at(self.lease.last_success());
        self.report.allowance_left = self.lease.allowance_left(now());
        self.tell.send_replace(self.report.clone());
    }
}

/// Now, on the clock that goes on while the machine sleeps.
fn now() -> Moment {
    let clock = nix::time::ClockId::CLOCK_BOOTTIME;
    let time = clock.now().expect("the kernel has a boot clock since 2.6.39");
    Moment(Duration::from(time))
}
