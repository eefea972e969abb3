//! Volumes that should be attached: tried again and again while KMS gives no verdict or says no.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{error, warn};

use crate::clock::now;
use crate::config::AttachWhen;
use crate::daemon::devices::AttachHow;
use crate::daemon::{Daemon, Service, Volume};
use crate::exit::ExitCode;
use crate::kernel::sysfs;
use crate::key::lease::{Allowance, Moment};

/// How long to wait before a volume that should be attached is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How soon a first denial of a volume with a device is confirmed.
const CONFIRM: Duration = Duration::from_millis(500);

impl Daemon {
    /// Attaches what should be attached and what has a device in the kernel, again and again while
    /// KMS gives no verdict or says no. Dropping this ends the tries.
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
        loop {
            // An operator may have attached or forgotten it meanwhile, or taken its device away.
            let Some(volume) = self.volumes().get(&name).cloned() else { return };
            if !is_wanted(&volume) {
                volume.with(|now| now.awaited = false);
                return;
            }
            let device = volume.with(|now| now.device.clone());
            let read_only = device.as_ref().is_some_and(|d| sysfs::is_read_only(d.device().index));
            let how = AttachHow { read_only, ..AttachHow::default() };
            let attached = self.attach(&name, how).await;
            volume.with(|now| now.awaited = false);
            let Err(e) = attached else { return };
            // Somebody else did it meanwhile.
            if !is_wanted(&volume) {
                return;
            }
            let lease = volume.with(|now| now.config.lease.policy(self.setup.policy));
            let (pause, requests) = waiting.after(e.exit, lease.allowance);
            match (device, requests) {
                (Some(device), Refuse::Now) => device.refuse(is_about_the_key(e.exit)).await,
                (Some(_), Refuse::NotYet) => {}
                (None, _) => {
                    if e.exit != ExitCode::KmsUnavailable && e.exit != ExitCode::KeyDenied {
                        error!(volume = name, why = e.why, remedy = e.remedy, "not attached");
                        return;
                    }
                }
            }
            if waiting.is_news(&e.why) {
                warn!(volume = name, why = e.why, remedy = e.remedy, "not attached yet");
            }
            drop(tried.take());
            tokio::time::sleep(pause).await;
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

/// What the tries to attach a volume have come to.
#[derive(Default)]
struct Waiting {
    since: Option<Moment>,
    denied: bool,
    said: Option<String>,
}

impl Waiting {
    /// When to try again, and whether requests still wait, after a try that ended so.
    fn after(&mut self, exit: ExitCode, allowance: Allowance) -> (Duration, Refuse) {
        let now = now();
        let since = *self.since.get_or_insert(now);
        match exit {
            ExitCode::KmsUnavailable => match allowance {
                Allowance::For(limit) if now.since(since) >= limit => (RETRY, Refuse::Now),
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
            ExitCode::KeyDenied
            | ExitCode::Ok
            | ExitCode::Failed
            | ExitCode::Usage
            | ExitCode::WrongState
            | ExitCode::Discrepancy => (RETRY, Refuse::Now),
        }
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
        let hour = Allowance::For(Duration::from_secs(3600));
        let mut waiting = Waiting::default();
        assert_eq!(waiting.after(ExitCode::KmsUnavailable, hour), (RETRY, Refuse::NotYet));
        assert_eq!(waiting.after(ExitCode::KeyDenied, hour), (CONFIRM, Refuse::NotYet));
        assert_eq!(waiting.after(ExitCode::KeyDenied, hour), (RETRY, Refuse::Now));
        let over = Allowance::For(Duration::ZERO);
        assert_eq!(waiting.after(ExitCode::KmsUnavailable, over), (RETRY, Refuse::Now));
        let never = Allowance::Never;
        assert_eq!(waiting.after(ExitCode::KmsUnavailable, never), (RETRY, Refuse::NotYet));
        assert_eq!(waiting.after(ExitCode::Failed, hour), (RETRY, Refuse::Now));
        let short = Allowance::For(Duration::from_secs(3));
        let (pause, refuse) = Waiting::default().after(ExitCode::KmsUnavailable, short);
        assert!(pause <= Duration::from_secs(3) && refuse == Refuse::NotYet);
    }
}
