//! Devices that are in the kernel before their volumes are in service: whose they are.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::{error, info, warn};
use uuid::Uuid;

use crate::attachment::Attachment;
use crate::config::is_volume_name;
use crate::daemon::devices::by_headers;
use crate::daemon::refusals::{Answered, refused};
use crate::daemon::{Daemon, Service, Volume};
use crate::exit::ExitCode;
use crate::kernel::noted::name_of;
use crate::kernel::sysfs::{self, Device};

impl Daemon {
    /// Devices of nobody's that is known, or of somebody else's.
    fn nobodys(&self) -> Vec<Device> {
        let mut devices = sysfs::devices();
        devices.retain(|device| self.whose_device_is_of(device.volume).is_none());
        devices
    }

    /// The devices that have no volume yet, with the names of their volumes, as noted or else as their
    /// headers say.
    pub(super) async fn devices_of(
        &self,
        all: &BTreeMap<String, Arc<Volume>>,
    ) -> Vec<(Device, Option<String>)> {
        let devices = self.nobodys();
        let noted: BTreeMap<_, _> = devices
            .iter()
            .filter_map(|device| Some((device.volume, self.noted_for(device.volume, all)?)))
            .collect();
        let mut owners = BTreeMap::new();
        if devices.iter().any(|device| !noted.contains_key(&device.volume)) {
            owners = by_headers(all).await;
        }
        owners.extend(noted);
        let owner = |device: Device| (device, owners.get(&device.volume).cloned());
        devices.into_iter().map(owner).collect()
    }

    /// The volume with that uuid, as noted.
    fn noted_for(&self, uuid: Uuid, all: &BTreeMap<String, Arc<Volume>>) -> Option<String> {
        let name = name_of(&self.devices_dir(), uuid, is_volume_name).ok()?;
        all.contains_key(&name).then_some(name)
    }

    /// Has the requests of a device wait, over `sockets` if there are any: it is the volume's from here
    /// on.
    pub(super) fn take_over(
        &self,
        name: &str,
        volume: &Volume,
        device: Device,
        sockets: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let config = volume.with(|now| now.config.clone());
        let (count, wanted) = (sockets.len(), config.connections.unwrap_or(1));
        let wanted = if count > 0 { count } else { wanted };
        let resumed = Attachment::resume(self.owner(name, &config), device, sockets, wanted)?;
        info!(
            volume = name,
            device = format!("/dev/nbd{}", device.index),
            handed_over = count,
            "found again; its requests wait for the key"
        );
        if let Err(error) = self.note(name, device.volume) {
            warn!(volume = name, %error, "udev will not find the name of the device");
        }
        volume.with(|now| now.device = Some(Arc::new(resumed)));
        Ok(())
    }

    /// Takes a device over that has the uuid which the store's header has, if there is one.
    pub(super) fn adopt(
        &self,
        what: &str,
        name: &str,
        volume: &Volume,
        uuid: Uuid,
    ) -> Answered<()> {
        let meant = volume.with(|now| {
            now.device.is_none() && now.config.uuid.is_none_or(|wanted| wanted == uuid)
        });
        let found = self.nobodys().into_iter().find(|device| device.volume == uuid);
        let (true, Some(device)) = (meant, found) else { return Ok(()) };
        let taken = self.take_over(name, volume, device, Vec::new());
        taken.map_err(|e| refused(ExitCode::Failed, what, e, "Raise the limits of byokd."))
    }

    /// Takes over what an earlier daemon left of volumes that were not known when this one started;
    /// the names of those that have a device now.
    pub(super) async fn find_devices(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        if self.nobodys().is_empty() {
            return found;
        }
        let all = self.volumes().clone();
        for (device, owner) in self.devices_of(&all).await {
            let owner = owner.and_then(|name| Some((all.get(&name)?, name)));
            let Some((volume, name)) = owner else { continue };
            // Whoever is at it finds its device as well.
            let Ok(_alone) = volume.changing.try_lock() else { continue };
            let without =
                volume.with(|now| matches!(now.service, Service::Detached) && now.device.is_none());
            if !without || !self.is_known(&name, volume) {
                continue;
            }
            match self.take_over(&name, volume, device, Vec::new()) {
                Ok(()) => {
                    found.insert(name);
                }
                Err(error) => {
                    error!(volume = name, device = device.index, %error, "a device cannot be taken over")
                }
            }
        }
        found
    }
}
