//! What is left in the kernel of devices that were disconnected while somebody had them mounted or open:
//! found, told, and never served again.

use std::collections::BTreeMap;
use std::path::Path;

use tokio::task::JoinSet;
use tracing::warn;

use crate::attachment::{holders, let_go, probe};
use crate::daemon::Daemon;
use crate::daemon::refusals::{Answered, by_kernel};
use crate::kernel::client::KernelClient;
use crate::kernel::noted::Mark;
use crate::kernel::sysfs::{self, Device};
use crate::kernel::{Holder, KernelError, KernelErrorClass};

impl Daemon {
    /// Whether a device that is there may be served; not one that has gone meanwhile. What is left of
    /// one that was disconnected may not: whoever has it mounted would write to a store that may
    /// have been in service elsewhere since.
    pub(super) async fn may_be_served(
        &self,
        what: &str,
        name: &str,
        device: Device,
    ) -> Answered<bool> {
        let client = self.helper();
        let Err(error) = still_connected(&self.devices_dir(), &client, device).await else {
            return Ok(true);
        };
        // It waits for udev; who does not say it keeps nothing from being said.
        let holders = if error.class == KernelErrorClass::Disconnected {
            holders(&client, device).await.unwrap_or_default()
        } else {
            Vec::new()
        };
        if sysfs::backend(device.index) != Some(device.volume) {
            return Ok(false);
        }
        let mut refusal = by_kernel(what, &error);
        if error.class == KernelErrorClass::Disconnected {
            if !holders.is_empty() {
                refusal.why = format!("{error}: {}", all_of(&holders));
            }
            refusal.remedy = what_frees(device, name);
        }
        Err(refusal)
    }

    /// Which devices of volumes that are known are not to be served again, by number: they were
    /// disconnected and are held, or are not ours.
    pub(super) async fn left_behind(
        &self,
        devices: &[(Device, Option<String>)],
    ) -> BTreeMap<u32, KernelError> {
        let mut probes = JoinSet::new();
        for (device, _) in devices.iter().filter(|(_, owner)| owner.is_some()) {
            let (notes, client, device) = (self.devices_dir(), self.helper(), *device);
            probes.spawn(async move {
                let abandoned = Mark::Abandoned.since(&notes, device.volume).is_some();
                let error = still_connected(&notes, &client, device).await.err()?;
                // Else it goes on, and its connections are made when the helper is there.
                let left = abandoned
                    || matches!(
                        error.class,
                        KernelErrorClass::Disconnected | KernelErrorClass::NotOurs
                    );
                left.then_some((device.index, error))
            });
        }
        let mut left = BTreeMap::new();
        while let Some(probed) = probes.join_next().await {
            left.extend(probed.ok().flatten());
        }
        left
    }
}

/// That a device that is there may be served again.
async fn still_connected(
    notes: &Path,
    client: &KernelClient,
    device: Device,
) -> Result<(), KernelError> {
    if Mark::Abandoned.since(notes, device.volume).is_some() {
        let_go(client, device).await?;
        Mark::Abandoned.clear(notes, device.volume);
    }
    probe(client, device).await
}

pub(super) fn all_of(holders: &[Holder]) -> String {
    let all: Vec<_> = holders.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// Says why a device is not served, and what to do.
pub(super) fn left_alone(name: &str, device: Device, error: &KernelError) {
    let remedy = if error.class == KernelErrorClass::Disconnected {
        what_frees(device, name)
    } else {
        error.remedy.clone()
    };
    let (device, why) = (format!("/dev/nbd{}", device.index), &error.why);
    warn!(volume = name, device, why, remedy, "left alone");
}

/// What to do about what is left of a device.
pub(super) fn what_frees(device: Device, name: &str) -> String {
    let Device { index, .. } = device;
    format!("Unmount /dev/nbd{index} and end what uses it, then: byokctl attach {name}")
}
