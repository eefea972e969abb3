//! The end of a volume's service: at a detach, and of all volumes when the daemon stops.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{error, info};

use crate::audit::Audit;
use crate::audit::record::{Event, Kind};
use crate::daemon::devices::{store, stored};
use crate::daemon::refusals::{Answered, refused};
use crate::daemon::{Attached, Daemon, Keyed, Service, Volume};
use crate::exit::ExitCode;
use crate::export::Export;
use crate::fence::KeyDestroyed;
use crate::keeper::threads::{apart, close};
use crate::key::lease::FenceReason;
use crate::systemd::Notifier;

/// How long requests in flight may take when a volume is detached or the daemon stops.
pub(super) const DRAIN: Duration = Duration::from_secs(10);

/// How long ending the service of all volumes may take when the daemon stops, whatever hangs: all
/// that is waited for in it ends by then. systemd ends the daemon 30 s after it told it to stop;
/// what is left is for systemd to keep connections, for the audit trail and for the log.
const STOP: Duration = Duration::from_secs(18);

/// How long a stop waits for what is being done to a volume where there is no service to end: it may
/// wait for a store that hangs.
const BEING_TRIED: Duration = Duration::from_secs(2);

/// How long a device's connections may take to a place between two requests, at most.
const HAND_OVER: Duration = Duration::from_secs(8);

/// The same where the volume is given up.
const GIVING_UP: Duration = Duration::from_secs(2);

/// What ending the service of a volume takes beyond the time that it is given: what was cut off has
/// to notice, and the store to flush and to be closed.
const CUT_OFF: Duration = Duration::from_millis(2500);

impl Daemon {
    /// Ends the service of a volume, if it is in service; says whether it was. Requests in flight have
    /// `within` the time to end.
    pub(super) async fn end(
        &self,
        name: &str,
        volume: &Arc<Volume>,
        reason: FenceReason,
        within: Duration,
    ) -> io::Result<bool> {
        let taken =
            volume.with(|now| match std::mem::replace(&mut now.service, Service::Detached) {
                Service::Attached(attached) => {
                    now.service = Service::Detaching(attached.keyed());
                    Some(attached)
                }
                other @ (Service::Detached | Service::Attaching(_) | Service::Detaching(_)) => {
                    now.service = other;
                    None
                }
            });
        let Some(attached) = taken else { return Ok(false) };
        self.table.remove(name);
        let (audit, volume) = (Arc::clone(&self.audit), Arc::clone(volume));
        let ending = end_service(audit, name.to_owned(), volume, attached, reason, within);
        // Whoever does not wait for it any more does not end it.
        tokio::spawn(ending).await.map_err(io::Error::other)?.map(|()| true)
    }

    /// Refuses what would put a volume into service while the daemon stops.
    pub(super) fn goes_into_service(&self, what: &str) -> Answered<()> {
        if self.stopping.load(Ordering::SeqCst) {
            let remedy = "Attach it when byokd runs again.";
            return Err(refused(ExitCode::WrongState, what, "the daemon is stopping", remedy));
        }
        Ok(())
    }

    /// Nothing that is still under way, of its keeper for example, brings the key back.
    fn destroy(&self, name: &str, export: &Export, reason: FenceReason) {
        if export.close_for_good(reason).is_first() {
            let header = export.volume().header();
            let event = Event::new(Kind::KeyDestroyed).volume(name);
            self.audit.record(event.wrapped(&header.token().wrapped).reason(reason));
        }
    }

    /// A key that is still here is destroyed, whatever is being done to its volume.
    pub(super) fn give_up(&self, name: &str, volume: &Volume, reason: FenceReason) {
        if let Some(Keyed { export, .. }) = volume.with(|now| now.service.keyed()) {
            self.destroy(name, &export, reason);
        }
    }

    /// Ends service of every volume, all at the same time and in bounded time. Devices in the kernel
    /// stay: the connections of each are for the next daemon, once its volume is flushed and the key
    /// destroyed.
    pub(super) async fn stop(self: &Arc<Self>, notifier: &Notifier) {
        let deadline = Instant::now() + STOP;
        self.stopping.store(true, Ordering::SeqCst);
        let (give, mut given) = mpsc::unbounded_channel();
        let mut ends = JoinSet::new();
        for (name, volume) in self.volumes().clone() {
            ends.spawn(Arc::clone(self).stop_one(name, volume, deadline, give.clone()));
        }
        drop(give);
        // As soon as they are between two requests: what hangs afterwards costs none of them.
        let mut keeps = true;
        while let Ok(Some(sockets)) = timeout_at(deadline, given.recv()).await {
            keeps = keeps && store(notifier, &sockets);
        }
        while ends.try_join_next().is_some() {}
        if !given.is_closed() {
            error!(volumes = ends.len(), "not waited for: volumes whose service does not end");
        }
        stored(notifier);
    }

    /// Ends service of one volume by `deadline`, and gives the connections of its device away.
    async fn stop_one(
        self: Arc<Self>,
        name: String,
        volume: Arc<Volume>,
        deadline: Instant,
        give: mpsc::UnboundedSender<Vec<(u32, OwnedFd)>>,
    ) {
        let left = || deadline.saturating_duration_since(Instant::now());
        let given = |sockets: Vec<_>| {
            if !sockets.is_empty() {
                // Who takes them has no more time.
                let _closed = give.send(sockets);
            }
        };
        let patience = volume.with(|now| match now.service {
            Service::Attached(_) | Service::Detaching(_) => {
                left().saturating_sub(GIVING_UP + CUT_OFF)
            }
            Service::Detached | Service::Attaching(_) => BEING_TRIED,
        });
        let Ok(_alone) = timeout(patience, volume.changing.lock()).await else {
            error!(
                volume = name,
                "not waited for: something that is being done to it does not end"
            );
            // First, so that the kernel sees no error: what it has sent is answered with the key.
            given(hand_over(&volume, GIVING_UP).await);
            self.give_up(&name, &volume, FenceReason::Stopping);
            return;
        };
        given(hand_over(&volume, HAND_OVER.min(left() / 2)).await);
        let within = DRAIN.min(left().saturating_sub(CUT_OFF));
        // Nothing of it that keeps the store from being closed.
        let unflushed = volume.with(|now| now.service.keyed()).map(|Keyed { export, .. }| {
            (export.volume().header().uuid(), Arc::clone(export.unflushed()))
        });
        // What failed was logged.
        let _ended = self.end(&name, &volume, FenceReason::Stopping, within).await;
        if let Some((uuid, unflushed)) = unflushed
            && unflushed.is_so()
        {
            self.note_unflushed(&name, uuid);
        }
        // Whoever began to end it may have been cut off, and it goes on.
        volume.ended(left().saturating_sub(CUT_OFF / 2)).await;
        self.give_up(&name, &volume, FenceReason::Stopping);
    }
}

/// What [`Daemon::end`] does, once nobody else can.
async fn end_service(
    audit: Arc<Audit>,
    name: String,
    volume: Arc<Volume>,
    attached: Attached,
    reason: FenceReason,
    within: Duration,
) -> io::Result<()> {
    let Attached { export, keeper, _listener: listener, .. } = attached;
    drop(listener);
    let wrapped = export.volume().header().token().wrapped.clone();
    let event = {
        let name = name.clone();
        move |kind| Event::new(kind).volume(&name).wrapped(&wrapped).reason(reason)
    };
    let record = {
        let (audit, destroyed) = (Arc::clone(&audit), event(Kind::KeyDestroyed));
        // Not of a volume that was fenced already.
        move |receipt: &KeyDestroyed| {
            if receipt.is_first() {
                audit.record(destroyed.clone());
            }
        }
    };
    // Not among work that may hang: the key would outlive its volume's service.
    let (stopping, records) = (Arc::clone(&export), record.clone());
    let stopped = apart("stop", move || stopping.stop(reason, within, records)).await;
    let flushed = stopped.unwrap_or_else(|no_thread| {
        record(&export.close_for_good(reason));
        Err(no_thread)
    });
    // Not earlier: a key that is denied while requests end is destroyed as at any other time.
    keeper.end().await;
    let detach = event(Kind::Detach);
    audit.record(match &flushed {
        Ok(()) => detach,
        Err(e) => detach.failed(ExitCode::Failed, &format!("the last flush failed: {e}")),
    });
    // What it holds is this volume's, and let go of below.
    let left = volume.leave_service();
    close((left, export)).await;
    match flushed {
        Ok(()) => {
            info!(volume = name, ?reason, "detached: flushed, the key is destroyed");
            Ok(())
        }
        Err(e) => {
            error!(volume = name, error = %e, "detached: the key is destroyed, the last flush failed");
            Err(e)
        }
    }
}

/// Our ends of the connections of the volume's device, if it has one, for the next daemon.
async fn hand_over(volume: &Volume, within: Duration) -> Vec<(u32, OwnedFd)> {
    let Some(device) = volume.with(|now| now.device.take()) else { return Vec::new() };
    let index = device.device().index;
    device.hand_over(within).await.into_iter().map(|end| (index, end)).collect()
}
