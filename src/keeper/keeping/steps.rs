//! What a lease asks for: a fence, and what ends it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use tracing::{error, info, warn};

use crate::audit::Owed;
use crate::audit::record::{Event as Record, Kind};
use crate::clock::now;
use crate::exit::ExitCode;
use crate::export::{ExportError, ORPHANS};
use crate::keeper::keeping::{GRACE, Keeping, TICK};
use crate::keeper::threads::apart;
use crate::keeper::{Command, plan, settle};
use crate::key::VolumeKey;
use crate::key::lease::{FenceReason, Moment, Step};
use crate::kms::{KeyService, Proof, ServiceError};
use crate::units::{millis, word};

/// How often it is looked whether the store has ended what was given up.
const LOOK: Duration = Duration::from_millis(20);

impl<K: KeyService> Keeping<K> {
    pub(super) async fn act(&mut self, step: Step) {
        match step {
            Step::None => {}
            Step::Fence(reason) => self.fence(reason).await,
            Step::Restore => self.restore().await,
        }
    }

    /// Closes the fence here and now: no thread has to be free for it.
    pub(super) async fn fence(&mut self, reason: FenceReason) {
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

    /// A key that came for a restore is gone again without having been used.
    fn wiped(&self) -> Record {
        let event = self.event(Kind::KeyDestroyed);
        match self.export.gatekeeper().check() {
            Err(fenced) => event.reason(fenced.0),
            Ok(()) => event,
        }
    }
}

/// Why there is no key for a restore.
enum NotUnwrapped {
    /// The store has not ended what was given up.
    Stalled(ExportError),
    /// KMS gave none.
    Refused(ServiceError),
}
