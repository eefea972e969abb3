//! Volumes that should be attached: tried again and again, whatever is the matter, until an operator
//! takes them out of service.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{error, warn};

use crate::clock::now;
use crate::config::AttachWhen;
use crate::daemon::devices::AttachHow;
use crate::daemon::refusals::{Fault, NotAttached};
use crate::daemon::{Daemon, Now, Service, Tries, Volume};
use crate::exit::ExitCode;
use crate::key::lease::{Allowance, Moment};

/// How long to wait before a volume that should be attached is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The same while requests of its device wait, though not for KMS.
const AGAIN: Duration = Duration::from_secs(1);

/// How soon a first denial of a volume with a device is confirmed.
const CONFIRM: Duration = Duration::from_millis(500);

impl Daemon {
    /// Begins to try to attach what should be attached and what has a device in the kernel. `tried` is
    /// dropped when each has been tried once.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "each try has its own, and none is left here"
    )]
    pub(super) fn attach_all(self: &Arc<Self>, tried: mpsc::Sender<()>) {
        for (name, volume) in self.volumes().clone() {
            if volume.with(|now| is_wanted(now)) {
                volume.with(|now| now.awaited = true);
                self.start_tries(name, volume, Some(tried.clone()));
            }
        }
    }

    /// Tries to attach a volume, at once and again and again. Where that is done already, the next try
    /// is at once.
    pub(super) fn start_tries(
        self: &Arc<Self>,
        name: String,
        volume: Arc<Volume>,
        tried: Option<mpsc::Sender<()>>,
    ) {
        let running = volume.with(|now| {
            now.tries.wanted = true;
            std::mem::replace(&mut now.tries.running, true)
        });
        if running {
            volume.try_now.notify_one();
            return;
        }
        let mut tries = self.tries.lock().unwrap_or_else(PoisonError::into_inner);
        while tries.try_join_next().is_some() {}
        tries.spawn(Arc::clone(self).attach_patiently(name, volume, tried));
    }

    /// The same for a volume whose device waits, though it was found only now.
    pub(super) fn try_on(self: &Arc<Self>, name: &str) {
        let volume = self.volumes().get(name).cloned();
        if let Some(volume) = volume
            && volume.with(|now| now.device.is_some() && is_wanted(now))
        {
            self.start_tries(name.to_owned(), volume, None);
        }
    }

    async fn attach_patiently(
        self: Arc<Self>,
        name: String,
        volume: Arc<Volume>,
        mut tried: Option<mpsc::Sender<()>>,
    ) {
        let mut waiting = Waiting::default();
        let mut taken_out = volume.taken_out.subscribe();
        // It may have been forgotten meanwhile.
        while self.is_known(&name, &volume) && volume.with(goes_on) {
            if waiting.fenced.is_none() {
                self.stays_fenced(&volume, &mut waiting).await;
            }
            let how = AttachHow { by_itself: true, ..AttachHow::default() };
            let attached = self.attach(&name, how).await;
            volume.with(|now| now.awaited = false);
            let Err(NotAttached { error: e, fault }) = attached else {
                volume.with(|now| now.tries = Tries::default());
                return;
            };
            if !volume.with(goes_on) {
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
            tokio::select! {
                // At once, if that is so already.
                _ = taken_out.changed() => {}
                () = volume.try_now.notified() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// What KMS said to an earlier daemon holds, as it may be out of reach by now: requests of a device
    /// that was fenced are refused, and not only once KMS says it again.
    async fn stays_fenced(&self, volume: &Volume, waiting: &mut Waiting) {
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
fn is_wanted(now: &Now) -> bool {
    let wanted = now.device.is_some() || now.config.attach == AttachWhen::Auto;
    wanted && !matches!(now.service, Service::Attached(_))
}

/// Whether the daemon goes on trying. If not, that has ended with this: whoever wants it later begins
/// anew.
fn goes_on(now: &mut Now) -> bool {
    // An operator may have attached it or taken it out of service meanwhile, or taken its device away.
    let goes_on = now.tries.wanted && is_wanted(now);
    if !goes_on {
        now.tries = Tries::default();
        now.awaited = false;
    }
    goes_on
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
    use crate::audit::Audit;
    use crate::config::VolumeConfig;
    use crate::daemon::Setup;
    use crate::export::ExportTable;
    use crate::kms::aws::AwsKms;
    use tokio::time::timeout;

    /// A daemon with a volume `v` whose store is missing.
    async fn daemon() -> (Arc<Daemon>, Arc<Volume>) {
        let mut setup = Setup::dev("/nowhere".as_ref(), Duration::from_secs(1), 0);
        setup.kms.endpoint = Some("http://127.0.0.1:9".to_owned());
        let kms = Arc::new(AwsKms::connect(setup.kms.clone()).await.unwrap());
        let volumes = vec![("v".to_owned(), VolumeConfig::new("/nowhere/v.img".into()))];
        let (table, audit) = (ExportTable::new(), Audit::in_memory());
        let (daemon, _gone) = Daemon::new(setup, kms, table, audit, volumes, Vec::new());
        let volume = Arc::clone(&daemon.volumes()["v"]);
        (daemon, volume)
    }

    #[tokio::test]
    async fn a_try_that_waits_for_a_detach_to_end_does_not_undo_it() {
        let (daemon, volume) = daemon().await;
        for force in [false, true] {
            volume.with(|now| now.tries = Tries { wanted: true, running: true });
            let busy = volume.changing.lock().await;
            let mut detach = Box::pin(daemon.detach("v", force));
            assert!(timeout(Duration::ZERO, &mut detach).await.is_err(), "it waits for its turn");
            let how = AttachHow { by_itself: true, ..AttachHow::default() };
            let mut again = Box::pin(daemon.attach("v", how));
            assert!(timeout(Duration::ZERO, &mut again).await.is_err(), "it waits behind it");
            drop(busy);
            let (detached, again) = tokio::join!(detach, again);
            detached.unwrap();
            let NotAttached { error, fault } = again.err().unwrap();
            assert_eq!((error.why.as_str(), fault), ("it was detached meanwhile", Fault::Stays));
            assert!(!volume.with(goes_on));
        }
    }

    #[tokio::test]
    async fn a_volume_that_is_tried_already_is_tried_once_and_at_once() {
        let (daemon, volume) = daemon().await;
        volume.with(|now| now.config.attach = AttachWhen::Auto);
        for _ in 0..3 {
            daemon.start_tries("v".to_owned(), Arc::clone(&volume), None);
        }
        assert_eq!(daemon.tries.lock().unwrap().len(), 1);
        volume.with(|now| now.tries.wanted = false);
        volume.try_now.notify_one();
        let tries = std::mem::take(&mut *daemon.tries.lock().unwrap());
        tries.join_all().await;
        assert!(!volume.with(|now| now.tries.running), "another may begin");
    }

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
