//! Volumes that should be attached: tried again and again, whatever is the matter, until an operator
//! takes them out of service.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{error, warn};

use crate::clock::now;
use crate::config::AttachWhen;
use crate::daemon::devices::AttachHow;
use crate::daemon::refusals::{Fault, NotAttached};
use crate::daemon::{Daemon, Service, Volume};
use crate::exit::ExitCode;
use crate::kernel::sysfs;
use crate::key::lease::{Allowance, Moment};

/// How long to wait before a volume that should be attached is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The same while requests of its device wait, though not for KMS.
const AGAIN: Duration = Duration::from_secs(1);

/// How soon a first denial of a volume with a device is confirmed.
const CONFIRM: Duration = Duration::from_millis(500);

impl Daemon {
    /// Attaches what should be attached and what has a device in the kernel. Dropping this ends the
    /// tries.
    /// `tried` is dropped when each has been tried once.
    pub(super) async fn attach_all(self: Arc<Self>, tried: mpsc::Sender<()>) {
        let mut tries = JoinSet::new();
        for (name, volume) in self.volumes().clone() {
            if is_wanted(&volume) {
                tries.spawn(Arc::clone(&self).attach_patiently(name, Some(tried.clone())));
            }
        }
        drop(tried);
        while tries.join_next().await.is_some() {}
    }

    pub(super) async fn attach_patiently(
        self: Arc<Self>,
        name: String,
        mut tried: Option<mpsc::Sender<()>>,
    ) {
        let mut waiting = Waiting::default();
        self.stays_fenced(&name, &mut waiting).await;
        loop {
            // An operator may have attached or forgotten it meanwhile, or taken its device away.
            let Some(volume) = self.volumes().get(&name).cloned() else { return };
            if !is_wanted(&volume) {
                volume.with(|now| now.awaited = false);
                return;
            }
            let mut taken_out = volume.taken_out.subscribe();
            let device = volume.with(|now| now.device.clone());
            let read_only = device.as_ref().is_some_and(|d| sysfs::is_read_only(d.device().index));
            let how = AttachHow { read_only, ..AttachHow::default() };
            let attached = self.attach(&name, how).await;
            volume.with(|now| now.awaited = false);
            let Err(NotAttached { error: e, fault }) = attached else { return };
            // Somebody else did it meanwhile.
            if !is_wanted(&volume) {
                return;
            }
            let bounds = volume.with(|now| Bounds {
                allowance: now.config.lease.policy(self.setup.policy).allowance,
                grace: Duration::from_secs(now.config.dead_timeout()),
                hold: now.config.hold().unwrap_or_default(),
            });
            let (pause, requests) = waiting.after(e.exit, fault, bounds);
            // The kernel may have made one, though not in time.
            if let (Some(device), Refuse::Now) = (volume.with(|now| now.device.clone()), requests) {
                let purge = is_about_the_key(e.exit) || self.is_suspended(&name).await;
                device.refuse(purge).await;
            }
            if waiting.is_news(&e.why) {
                if is_about_the_key(e.exit) {
                    warn!(volume = name, why = e.why, remedy = e.remedy, "not attached yet");
                } else {
                    error!(volume = name, why = e.why, remedy = e.remedy, "not attached");
                }
            }
            drop(tried.take());
            // At once, if that is so already.
            if timeout(pause, taken_out.changed()).await.is_ok() {
                return;
            }
        }
    }

    /// What KMS said to an earlier daemon holds, as it may be out of reach by now: requests of a device
    /// that was fenced are refused, and not only once KMS says it again.
    async fn stays_fenced(&self, name: &str, waiting: &mut Waiting) {
        let Some(volume) = self.volumes().get(name).cloned() else { return };
        let Some(device) = volume.with(|now| now.device.clone()) else { return };
        let Some(since) = self.fenced_since(device.device()) else { return };
        waiting.fenced = Some(since);
        let hold = volume.with(|now| now.config.hold().unwrap_or_default());
        if waiting.held(now(), hold).1 == Refuse::Now {
            device.refuse(true).await;
        }
    }
}

/// Whether a volume should be in service and is not.
pub(super) fn is_wanted(volume: &Volume) -> bool {
    volume.with(|now| {
        let wanted = now.device.is_some() || now.config.attach == AttachWhen::Auto;
        wanted && !matches!(now.service, Service::Attached(_))
    })
}

/// Whether a volume is not attached because its key may not be had.
fn is_about_the_key(exit: ExitCode) -> bool {
    matches!(exit, ExitCode::KeyDenied | ExitCode::KmsUnavailable)
}

/// What becomes of the requests of a device whose volume cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refuse {
    Now,
    NotYet,
}

/// How long requests of a device wait for its volume.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// While KMS gives no verdict.
    allowance: Allowance,
    /// While something else is the matter that may pass.
    grace: Duration,
    /// When the key is denied or the allowance is over.
    hold: Duration,
}

/// What the tries to attach a volume have come to.
#[derive(Default)]
struct Waiting {
    /// When it failed first.
    since: Option<Moment>,
    /// Since when it fails for another reason than KMS.
    faulty: Option<Moment>,
    denied: bool,
    /// Since when the key may not be had.
    fenced: Option<Moment>,
    said: Option<String>,
}

impl Waiting {
    /// When to try again, and whether requests still wait, after a try that ended so.
    fn after(&mut self, exit: ExitCode, fault: Fault, bounds: Bounds) -> (Duration, Refuse) {
        let now = now();
        let since = *self.since.get_or_insert(now);
        if is_about_the_key(exit) {
            self.faulty = None;
        }
        match exit {
            // Once it may not be had, no trouble of KMS is a reason to wait for it.
            ExitCode::KmsUnavailable | ExitCode::KeyDenied if self.fenced.is_some() => {
                self.held(now, bounds.hold)
            }
            ExitCode::KmsUnavailable => match bounds.allowance {
                Allowance::For(limit) if now.since(since) >= limit => self.held(now, bounds.hold),
                Allowance::For(limit) => {
                    let left = limit.saturating_sub(now.since(since));
                    (RETRY.min(left), Refuse::NotYet)
                }
                Allowance::Never => (RETRY, Refuse::NotYet),
            },
            // As for a volume that is served: one denial is confirmed.
            ExitCode::KeyDenied if !std::mem::replace(&mut self.denied, true) => {
                (CONFIRM, Refuse::NotYet)
            }
            ExitCode::KeyDenied => self.held(now, bounds.hold),
            ExitCode::Ok
            | ExitCode::Failed
            | ExitCode::Usage
            | ExitCode::WrongState
            | ExitCode::Discrepancy => {
                let left = bounds.grace.saturating_sub(now.since(*self.faulty.get_or_insert(now)));
                if fault == Fault::Stays || left.is_zero() {
                    (RETRY, Refuse::Now)
                } else {
                    (AGAIN.min(left), Refuse::NotYet)
                }
            }
        }
    }

    /// When the key may not be had: requests are held for a while, if they are to be.
    fn held(&mut self, now: Moment, hold: Duration) -> (Duration, Refuse) {
        let left = hold.saturating_sub(now.since(*self.fenced.get_or_insert(now)));
        if left.is_zero() { (RETRY, Refuse::Now) } else { (RETRY.min(left), Refuse::NotYet) }
    }

    fn is_news(&mut self, why: &str) -> bool {
        let news = self.said.as_deref() != Some(why);
        self.said = Some(why.to_owned());
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_a_device_wait_for_kms_until_the_allowance_and_a_denial_is_confirmed() {
        let bounds =
            |allowance| Bounds { allowance, grace: Duration::from_secs(90), hold: Duration::ZERO };
        let after = |waiting: &mut Waiting, exit, allowance| {
            waiting.after(exit, Fault::MayPass, bounds(allowance))
        };
        let hour = Allowance::For(Duration::from_secs(3600));
        let mut waiting = Waiting::default();
        assert_eq!(after(&mut waiting, ExitCode::KmsUnavailable, hour), (RETRY, Refuse::NotYet));
        assert_eq!(after(&mut waiting, ExitCode::KeyDenied, hour), (CONFIRM, Refuse::NotYet));
        assert_eq!(after(&mut waiting, ExitCode::KeyDenied, hour), (RETRY, Refuse::Now));
        let over = Allowance::For(Duration::ZERO);
        assert_eq!(after(&mut waiting, ExitCode::KmsUnavailable, over), (RETRY, Refuse::Now));
        // Denied once, it stays so until KMS allows it.
        assert_eq!(after(&mut waiting, ExitCode::KmsUnavailable, hour), (RETRY, Refuse::Now));
        let never = Allowance::Never;
        let mut waiting = Waiting::default();
        assert_eq!(after(&mut waiting, ExitCode::KmsUnavailable, never), (RETRY, Refuse::NotYet));
        let short = Allowance::For(Duration::from_secs(3));
        let (pause, refuse) = after(&mut Waiting::default(), ExitCode::KmsUnavailable, short);
        assert!(pause <= Duration::from_secs(3) && refuse == Refuse::NotYet);
    }

    #[test]
    fn requests_of_a_device_whose_key_was_denied_to_an_earlier_daemon_do_not_wait_for_kms() {
        let bounds = |hold| Bounds {
            allowance: Allowance::For(Duration::from_secs(3600)),
            grace: Duration::from_secs(90),
            hold: Duration::from_secs(hold),
        };
        for exit in [ExitCode::KmsUnavailable, ExitCode::KeyDenied] {
            let denied = || Waiting { fenced: Some(now()), ..Waiting::default() };
            let after = |hold| denied().after(exit, Fault::MayPass, bounds(hold));
            assert_eq!(after(0), (RETRY, Refuse::Now));
            assert_eq!(after(60), (RETRY, Refuse::NotYet), "held, as long as it is to be");
        }
    }

    #[test]
    fn requests_of_a_device_wait_for_what_may_pass_as_long_as_the_kernel_would() {
        let grace = |seconds| Bounds {
            allowance: Allowance::For(Duration::ZERO),
            grace: Duration::from_secs(seconds),
            hold: Duration::ZERO,
        };
        let mut waiting = Waiting::default();
        for exit in [ExitCode::Failed, ExitCode::WrongState, ExitCode::Usage] {
            assert_eq!(waiting.after(exit, Fault::MayPass, grace(90)), (AGAIN, Refuse::NotYet));
            assert_eq!(waiting.after(exit, Fault::MayPass, grace(0)), (RETRY, Refuse::Now));
            assert_eq!(waiting.after(exit, Fault::Stays, grace(90)), (RETRY, Refuse::Now));
        }
        assert_eq!(
            waiting.after(ExitCode::KmsUnavailable, Fault::MayPass, grace(90)).1,
            Refuse::Now
        );
        // It has its own time, not what an outage of KMS has left of it.
        assert!(waiting.faulty.is_none());
        assert_eq!(waiting.after(ExitCode::Failed, Fault::MayPass, grace(90)).1, Refuse::NotYet);
    }

    #[test]
    fn requests_of_a_device_are_held_when_the_key_is_denied_if_they_are_to_be() {
        let hold = Duration::from_secs(60);
        let (allowance, grace) = (Allowance::For(Duration::ZERO), Duration::ZERO);
        let mut waiting = Waiting::default();
        let mut after =
            |exit, hold| waiting.after(exit, Fault::MayPass, Bounds { allowance, grace, hold });
        assert_eq!(after(ExitCode::KeyDenied, hold), (CONFIRM, Refuse::NotYet));
        assert_eq!(after(ExitCode::KeyDenied, hold), (RETRY, Refuse::NotYet));
        assert_eq!(after(ExitCode::KmsUnavailable, hold), (RETRY, Refuse::NotYet));
        assert_eq!(after(ExitCode::KeyDenied, Duration::ZERO), (RETRY, Refuse::Now));
    }
}
