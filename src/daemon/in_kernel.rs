//! Devices that are in the kernel before their volumes are in service: how they were made, which
//! nothing changes until they are gone, and whose they are.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::{error, info, warn};
use uuid::Uuid;

use crate::attachment::Attachment;
use crate::config::{VolumeConfig, is_volume_name};
use crate::daemon::devices::by_headers;
use crate::daemon::left::left_alone;
use crate::daemon::refusals::{Answered, refused};
use crate::daemon::{Daemon, Service, Volume};
use crate::exit::ExitCode;
use crate::kernel::noted::name_of;
use crate::kernel::sysfs::{self, Device};

/// What the kernel was told when a device was made. Whatever a definition says since: a file system on
/// it would see errors if the volume were served otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Made {
    index: u32,
    read_only: bool,
    trim: bool,
}

impl Made {
    /// How the volume's device was made, if it has one and that is still there.
    fn of(volume: &Volume) -> Option<Self> {
        let Device { index, volume: uuid } =
            volume.with(|now| now.device.as_ref().map(|device| device.device()))?;
        let (read_only, trim) = (sysfs::is_read_only(index), sysfs::takes_trim(index));
        // Last: what was read is of no device if it has gone.
        (sysfs::backend(index) == Some(uuid)).then_some(Self { index, read_only, trim })
    }

    /// What of a definition is in force while the device is there.
    fn keeps(self, definition: VolumeConfig) -> VolumeConfig {
        // One that is read-only was told nothing about trim.
        let trim = if self.read_only { definition.trim } else { self.trim };
        VolumeConfig { read_only: self.read_only, trim, ..definition }
    }
}

/// What of a definition is in force for a volume now: its device, if it is in the kernel already, stays
/// as it was made. Refuses `read_only` where the device is not.
pub(super) fn in_force(
    what: &str,
    name: &str,
    volume: &Volume,
    definition: &VolumeConfig,
    read_only: bool,
) -> Answered<VolumeConfig> {
    let Some(made) = Made::of(volume) else { return Ok(definition.clone()) };
    if read_only && !made.read_only {
        let why = format!("/dev/nbd{} is in the kernel, and can be written to", made.index);
        let remedy = format!("Attach it without --read-only; or first: byokctl detach {name}");
        return Err(refused(ExitCode::WrongState, what, why, remedy));
    }
    Ok(made.keeps(definition.clone()))
}

/// Puts that in force, and says what of the definition waits for the next attach.
pub(super) fn put_in_force(volume: &Volume, in_force: &VolumeConfig, definition: &VolumeConfig) {
    volume.with(|now| {
        now.at_next_attach = in_force.differing(definition);
        now.config.clone_from(in_force);
    });
}

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
        if let Some(made) = Made::of(volume) {
            put_in_force(volume, &made.keeps(config.clone()), &config);
        }
        Ok(())
    }

    /// Takes a device over that has the uuid which the store's header has; says whether there was one.
    pub(super) async fn adopt(
        &self,
        what: &str,
        name: &str,
        volume: &Volume,
        uuid: Uuid,
    ) -> Answered<bool> {
        let meant = volume.with(|now| {
            now.device.is_none() && now.config.uuid.is_none_or(|wanted| wanted == uuid)
        });
        let found = self.nobodys().into_iter().find(|device| device.volume == uuid);
        let (true, Some(device)) = (meant, found) else { return Ok(false) };
        if !self.may_be_served(what, name, device).await? {
            return Ok(false);
        }
        let taken = self.take_over(name, volume, device, Vec::new());
        taken.map_err(|e| refused(ExitCode::Failed, what, e, "Raise the limits of byokd."))?;
        Ok(true)
    }

    /// Takes over what an earlier daemon left of volumes that were not known when this one started;
    /// the names of those that have a device now.
    pub(super) async fn find_devices(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        if self.nobodys().is_empty() {
            return found;
        }
        let all = self.volumes().clone();
        let devices = self.devices_of(&all).await;
        let left = self.left_behind(&devices).await;
        for (device, owner) in devices {
            let owner = owner.and_then(|name| Some((all.get(&name)?, name)));
            let Some((volume, name)) = owner else { continue };
            if let Some(error) = left.get(&device.index) {
                left_alone(&name, device, error);
                continue;
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_stays_as_it_was_made_whatever_the_definition_says_since() {
        let definition =
            |read_only, trim| VolumeConfig { read_only, trim, ..VolumeConfig::new("/x".into()) };
        let made = |read_only, trim| Made { index: 0, read_only, trim };
        // How it was made, what the definition says, what is in force and what waits.
        for (read_only, trim, says, in_force, waits) in [
            (false, true, (false, true), (false, true), &[][..]),
            (false, true, (true, true), (false, true), &["read_only"]),
            (false, true, (false, false), (false, true), &["trim"]),
            (false, false, (true, true), (false, false), &["trim", "read_only"]),
            (true, false, (false, true), (true, true), &["read_only"]),
            (true, false, (true, false), (true, false), &[]),
        ] {
            let says = definition(says.0, says.1);
            let kept = made(read_only, trim).keeps(says.clone());
            assert_eq!((kept.read_only, kept.trim), in_force);
            assert_eq!(kept.differing(&says), waits);
        }
    }
}
