//! What is done about plaintext that the node caches, after a fence: an order of steps, each with a
//! time limit, whatever becomes of the one before. The fence waits for none of them; requests that
//! wait for the key put them off.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{info, warn};

use super::{ask, unexpected};
use crate::audit::Audit;
use crate::audit::record::{Event, Kind};
use crate::exit::ExitCode;
use crate::export::Export;
use crate::kernel::client::KernelClient;
use crate::kernel::sysfs::Device;
use crate::kernel::{Ask, HeldBy, KernelError, PurgeStep, Told};
use crate::units::{rfc3339, word};

/// What is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PurgePlan {
    /// In this order.
    pub steps: Vec<PurgeStep>,
    /// Take the device away at last.
    pub disconnect: bool,
    /// For each step.
    pub limit: Duration,
}

/// A step that was done, or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its name.
    pub step: String,
    /// When it ended, RFC 3339.
    pub at: String,
    /// Whether all of it was done.
    pub ok: bool,
    /// What was worked on, and what could not be done.
    pub detail: Vec<String>,
}

pub(super) struct Purging {
    pub(super) name: String,
    pub(super) audit: Arc<Audit>,
    pub(super) client: KernelClient,
    pub(super) device: Device,
    /// Whose requests may wait for the key, if it is attached.
    pub(super) export: Option<Arc<Export>>,
    pub(super) done: mpsc::UnboundedSender<Done>,
}

/// Carries a plan out. Dropped, it does no more steps.
pub(super) async fn carry_out(plan: PurgePlan, purging: Purging) {
    const LOOK: Duration = Duration::from_millis(200);
    while let Some(left) = purging.export.as_ref().and_then(|export| export.held_for()) {
        sleep(left.min(LOOK).max(Duration::from_millis(1))).await;
    }
    let Device { index, volume } = purging.device;
    purging.say("mapped", purging.mapped(plan.limit).await);
    for step in plan.steps {
        let asked =
            ask(&purging.client, Ask::Purge { index, volume, step }, Vec::new(), plan.limit).await;
        purging.say(&word(step), asked);
    }
    // Whatever is still mapped after that stays in memory as long as those processes do.
    purging.say("still-mapped", purging.mapped(plan.limit).await);
    if plan.disconnect {
        let tell = Ask::Disconnect { index, volume };
        let told = ask(&purging.client, tell, Vec::new(), plan.limit).await;
        purging.say("disconnect", told);
    }
}

impl Purging {
    /// Who has files of the volume mapped: told as what could not be done.
    async fn mapped(&self, limit: Duration) -> Result<Told, KernelError> {
        let Device { index, volume } = self.device;
        let look = Ask::Holders { index, volume, mapped: true };
        match ask(&self.client, look, Vec::new(), limit).await? {
            Told::Holders { holders } => {
                let mapped = holders.iter().filter(|holder| holder.by == HeldBy::Mapping);
                Ok(Told::Purged {
                    what: Vec::new(),
                    failed: mapped.map(ToString::to_string).collect(),
                })
            }
            Told::Done | Told::Device { .. } | Told::Purged { .. } | Told::Failed(_) => {
                Err(unexpected())
            }
        }
    }

    fn say(&self, step: &str, told: Result<Told, KernelError>) {
        let (ok, detail) = match told {
            Ok(Told::Purged { what, failed }) => {
                (failed.is_empty(), what.into_iter().chain(failed).collect::<Vec<_>>())
            }
            Ok(_) => (true, Vec::new()),
            Err(error) => (false, vec![format!("{error}. {}", error.remedy)]),
        };
        let volume = &self.name;
        if ok {
            info!(volume, step, ?detail, "purge of cached plaintext");
        } else {
            warn!(volume, step, ?detail, "purge of cached plaintext: not all was done");
        }
        let mut event = Event::new(Kind::Purge)
            .volume(volume)
            .detail("step", step)
            .detail("device", &format!("/dev/nbd{}", self.device.index))
            .detail("details", &detail.join("; "));
        if !ok {
            event = event.failed(ExitCode::Failed, "not all was done");
        }
        self.audit.record(event);
        let at = rfc3339(Timestamp::now());
        // Nobody listens once the device is taken away.
        let _heard = self.done.send(Done { step: step.to_owned(), at, ok, detail });
    }
}
