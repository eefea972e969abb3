//! Devices of the kernel: put in, taken out, and found again after a restart.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::attachment::purge::PurgePlan;
use crate::attachment::{Attachment, Owner, let_go};
use crate::clock::now;
use crate::config::{DeviceChoice, EndUsers, VolumeConfig};
use crate::control::Problem;
use crate::daemon::left::{all_of, left_alone, what_frees};
use crate::daemon::look::AT_A_TIME;
use crate::daemon::refusals::{Answered, NotAttached, by_export, by_kernel, refused};
use crate::daemon::stop::DRAIN;
use crate::daemon::volumes::TakenOut;
use crate::daemon::{Daemon, Now, Service, Volume};
use crate::exit::ExitCode;
use crate::export::{Export, ExportError};
use crate::keeper::threads::apart;
use crate::kernel::client::KernelClient;
use crate::kernel::noted::{Mark, note_of};
use crate::kernel::sysfs::{self, Device};
use crate::kernel::{Connect, KernelError, KernelErrorClass, MAX_CONNECTIONS, PurgeStep};
use crate::key::lease::{FenceReason, Moment};
use crate::systemd::Notifier;
use crate::units::rfc3339;
use crate::volume::inspect;

/// What descriptors of kernel connections are called in systemd's store: `kernel.nbdN.M`.
const STORED: &str = "kernel.";

/// How long the headers of all volumes may take to be read when devices have to be matched to them.
const MATCH: Duration = Duration::from_secs(10);

/// How long systemd may take to keep what it is given.
const STORE: Duration = Duration::from_secs(3);

/// How a volume is to be attached, besides what its definition says.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AttachHow {
    pub(super) read_only: bool,
    pub(super) device: Option<DeviceChoice>,
    pub(super) connections: Option<usize>,
    /// The daemon does it by itself: not once an operator has taken the volume out of service.
    pub(super) by_itself: bool,
}

impl AttachHow {
    /// As a request has it.
    pub(super) fn of(
        what: &str,
        read_only: bool,
        device: Option<&str>,
        connections: Option<usize>,
    ) -> Answered<Self> {
        let device = device.map(str::parse).transpose().map_err(|e| {
            refused(ExitCode::Usage, what, e, "Give --device auto, or --device /dev/nbdN.")
        })?;
        if connections.is_some_and(|n| n == 0 || n > MAX_CONNECTIONS) {
            let why = format!("a device has between 1 and {MAX_CONNECTIONS} connections");
            return Err(refused(ExitCode::Usage, what, why, "Mend --connections."));
        }
        Ok(Self { read_only, device, connections, by_itself: false })
    }

    /// The device of the kernel's that the volume is to have: as asked for, else as it is defined.
    pub(super) fn device(&self, config: &VolumeConfig) -> Option<DeviceChoice> {
        self.device.or(config.device)
    }
}

impl Daemon {
    pub(super) fn helper(&self) -> KernelClient {
        KernelClient::new(self.setup.config.kernel_socket.clone())
    }

    pub(super) fn owner(&self, name: &str, config: &VolumeConfig) -> Owner {
        Owner {
            name: name.to_owned(),
            client: self.helper(),
            table: self.table.clone(),
            audit: Arc::clone(&self.audit),
            plan: plan(config),
            notes: self.devices_dir(),
            gone: self.gone.clone(),
        }
    }

    /// Makes a device of a volume that is attached, if it is to have one; or goes on with the one
    /// that it has.
    pub(super) async fn put_in_kernel(
        &self,
        what: &str,
        name: &str,
        volume: &Volume,
        config: &VolumeConfig,
        how: AttachHow,
        until: &mut TakenOut,
    ) -> Result<(), NotAttached> {
        let served = volume.with(|now| match &now.service {
            Service::Attached(attached) => {
                Some((Arc::clone(&attached.export), attached.keeper.reports()))
            }
            Service::Detached | Service::Attaching(_) | Service::Detaching(_) => None,
        });
        let Some((export, reports)) = served else { return Ok(()) };
        // Else the next daemon would find its device with connections of this one.
        self.goes_into_service(what)?;
        let uuid = export.volume().header().uuid();
        let connections = how.connections.or(config.connections).unwrap_or(1);
        let device = volume.with(|now| now.device.clone());
        let choice = how.device(config);
        if device.is_none() && choice.is_none() {
            return Ok(());
        }
        if device.is_none()
            && let Some(other) = self.whose_device_is_of(uuid)
        {
            let why = format!("volume {other} has a device of the same uuid: one store is a copy");
            let remedy = format!("Detach that one first: byokctl detach {other}");
            return Err(refused(ExitCode::WrongState, what, why, remedy).into());
        }
        let opened = Arc::clone(&export);
        let opening = async {
            let opened = apart("open", move || opened.open_for_kernel()).await.flatten();
            Ok(opened.map_err(|e| by_export(what, &ExportError::Backing(e)))?)
        };
        until.or(what, opening).await?;
        if let Some(device) = device {
            let Device { index, volume: other } = device.device();
            if other != uuid {
                return Err(NotAttached::for_good(refused(
                    ExitCode::WrongState,
                    what,
                    format!("/dev/nbd{index} is of volume {other}, its store now holds {uuid}"),
                    format!("Put the store back, or: byokctl detach {name} --force"),
                )));
            }
            self.tell_what_was_noted(name, &export, uuid);
            device.serve(export, reports, plan(config)).await;
            return Ok(());
        }
        let Some(choice) = choice else { return Ok(()) };
        self.note(name, uuid).map_err(|e| {
            refused(ExitCode::Failed, what, e, "Check the directory of the control socket.")
        })?;
        let geometry = export.geometry();
        let connect = Connect {
            index: match choice {
                DeviceChoice::Auto => None,
                DeviceChoice::Number(index) => Some(index),
            },
            volume: uuid,
            size: geometry.capacity(),
            block_size: geometry.sector_size().bytes(),
            read_only: export.options().read_only,
            trim: export.options().trim,
            request_timeout: config.request_timeout(),
            dead_timeout: config.dead_timeout(),
        };
        Mark::ALL.iter().for_each(|mark| mark.clear(&self.devices_dir(), uuid));
        let owner = self.owner(name, config);
        let connected = Attachment::connect(owner, connect, connections, export, reports).await;
        let device = connected.map_err(|e| by_kernel(what, &e))?;
        info!(
            volume = name,
            device = format!("/dev/nbd{}", device.device().index),
            "in the kernel"
        );
        if connections > 1
            && let Some(kernel) = sysfs::stalls_with_several()
        {
            warn!(
                volume = name,
                connections,
                kernel,
                "several connections may stall on this kernel: detach it, and attach it with one"
            );
        }
        volume.with(|now| now.device = Some(Arc::new(device)));
        Ok(())
    }

    /// The volume that has a device with that uuid.
    pub(super) fn whose_device_is_of(&self, uuid: Uuid) -> Option<String> {
        let has = |now: &mut Now| now.device.as_ref().is_some_and(|d| d.device().volume == uuid);
        let volumes = self.volumes();
        volumes.iter().find(|(_, volume)| volume.with(has)).map(|(name, _)| name.clone())
    }

    /// Takes the volume's device away, if it has one; says whether it had.
    pub(super) async fn take_from_kernel(
        &self,
        what: &str,
        name: &str,
        volume: &Volume,
        force: bool,
    ) -> Answered<bool> {
        let Some(device) = volume.with(|now| now.device.clone()) else { return Ok(false) };
        if !force {
            let holders = match device.holders().await {
                // It has gone.
                Err(error) if error.class == KernelErrorClass::NotOurs => Vec::new(),
                holders => holders.map_err(|e| by_kernel(what, &e))?,
            };
            if !holders.is_empty() {
                let path = device.device().index;
                return Err(refused(
                    ExitCode::WrongState,
                    what,
                    format!("/dev/nbd{path} is in use: {}", all_of(&holders)),
                    "Unmount it and end what uses it; or detach --force, which loses what is not written yet.",
                ));
            }
        }
        if let Err(error) = device.disconnect().await {
            if !force {
                return Err(by_kernel(what, &error));
            }
            warn!(volume = name, %error, remedy = error.remedy, "the device cannot be taken away; closing its connections");
            device.abandon().await;
            if let Err(error) =
                Mark::Abandoned.set(&self.devices_dir(), device.device().volume, now().0)
            {
                warn!(volume = name, %error, "the next attach may go on with the device");
            }
        }
        volume.with(|now| now.device = None);
        // A leftover does no harm: it is read for devices that are there.
        let _gone = std::fs::remove_file(self.noted(device.device().volume));
        Ok(true)
    }

    /// Where udev's rule finds the name of the volume that a device belongs to.
    fn noted(&self, volume: Uuid) -> PathBuf {
        self.devices_dir().join(volume.to_string())
    }

    /// The kernel hears of what the last daemon could not flush. It is noted until then.
    fn tell_what_was_noted(&self, name: &str, export: &Export, uuid: Uuid) {
        let dir = self.devices_dir();
        if Mark::Unflushed.since(&dir, uuid).is_some() {
            warn!(volume = name, "the last flush before this start failed: the next one fails too");
            export.unflushed().since_before(move || Mark::Unflushed.clear(&dir, uuid));
        }
    }

    /// Has the next daemon tell the kernel of a last flush that failed.
    pub(super) fn note_unflushed(&self, name: &str, uuid: Uuid) {
        if sysfs::devices().iter().any(|device| device.volume == uuid)
            && let Err(error) = Mark::Unflushed.set(&self.devices_dir(), uuid, now().0)
        {
            error!(volume = name, %error, "the kernel will not hear that its last writes may be lost");
        }
    }

    /// Since when the key of the volume with that device may not be had, as its last daemon knew.
    pub(super) fn fenced_since(&self, device: Device) -> Option<Moment> {
        Mark::Fenced.since(&self.devices_dir(), device.volume).map(Moment)
    }

    pub(super) fn devices_dir(&self) -> PathBuf {
        let dir = self.setup.config.control_socket.parent().map(PathBuf::from).unwrap_or_default();
        dir.join("devices")
    }

    pub(super) fn note(&self, name: &str, volume: Uuid) -> io::Result<()> {
        let dir = self.devices_dir();
        std::fs::create_dir_all(&dir)?;
        let new = dir.join(format!("{volume}.new"));
        std::fs::write(&new, note_of(name))?;
        std::fs::rename(&new, self.noted(volume))
    }

    /// Finds the devices that an earlier daemon left, and has their requests wait. `sockets` are
    /// what it handed over.
    pub(super) async fn resume_devices(
        &self,
        sockets: Vec<(String, OwnedFd)>,
        notifier: &Notifier,
    ) {
        let mut handed_over: BTreeMap<u32, Vec<OwnedFd>> = BTreeMap::new();
        for (name, socket) in sockets {
            // A crash must close them: else the kernel waits for what this process has read.
            if let Err(error) = notifier.forget_fds(&name) {
                warn!(name, %error, "systemd keeps a descriptor that is in use");
            }
            match index_of(&name) {
                Some(index) => handed_over.entry(index).or_default().push(socket),
                None => warn!(name, "closed a descriptor that nobody knows"),
            }
        }
        let all = self.volumes().clone();
        let devices = self.devices_of(&all).await;
        // First those whose requests need not wait: the helper may take its time to say what of the
        // others is still connected.
        let (waiting, orphans): (Vec<_>, Vec<_>) =
            devices.into_iter().partition(|(device, _)| handed_over.contains_key(&device.index));
        self.take_all_over(&all, waiting, &BTreeMap::new(), &mut handed_over);
        let left = self.left_behind(&orphans).await;
        self.take_all_over(&all, orphans, &left, &mut handed_over);
    }

    /// Has the requests of these devices wait, but for those that are `left`.
    fn take_all_over(
        &self,
        all: &BTreeMap<String, Arc<Volume>>,
        devices: Vec<(Device, Option<String>)>,
        left: &BTreeMap<u32, KernelError>,
        handed_over: &mut BTreeMap<u32, Vec<OwnedFd>>,
    ) {
        for (device, owner) in devices {
            let Device { index, volume: uuid } = device;
            let path = format!("/dev/nbd{index}");
            let owner = owner.and_then(|name| Some((all.get(&name)?, name)));
            let Some((volume, name)) = owner else {
                warn!(device = path, volume = %uuid, "a device of no volume that is known; put its definition back or mend it, then: byokctl reload; or: nbd-client -d {path}");
                continue;
            };
            if let Some(error) = left.get(&index) {
                left_alone(&name, device, error);
                continue;
            }
            let sockets = handed_over.remove(&index).unwrap_or_default();
            if let Err(error) = self.take_over(&name, volume, device, sockets) {
                error!(volume = name, device = path, %error, "a device cannot be taken over");
            }
        }
    }

    /// Ends the service of volumes whose devices have gone by themselves. One whose store hangs keeps
    /// no other waiting.
    pub(super) async fn watch_devices(self: Arc<Self>, mut gone: mpsc::UnboundedReceiver<String>) {
        let mut ends = JoinSet::new();
        while let Some(name) = gone.recv().await {
            while ends.try_join_next().is_some() {}
            let volume = self.volumes().get(&name).cloned();
            if let Some(volume) = volume {
                ends.spawn(Arc::clone(&self).device_gone(name, volume));
            }
        }
    }

    async fn device_gone(self: Arc<Self>, name: String, volume: Arc<Volume>) {
        let (name, volume) = (&name, &volume);
        let _alone = volume.changing.lock().await;
        let device = volume.with(|now| now.device.take_if(|d| d.state().gone.is_some()));
        let Some(device) = device else { return };
        let why = device.state().gone.unwrap_or_default();
        let known = device.device();
        // Before the volume's end: whoever drops its export last closes the store.
        drop(device);
        // What failed was logged.
        let _ended = self.end(name, volume, FenceReason::Detached, DRAIN).await;
        // Whoever disconnected it: while somebody holds it, nothing brings it back.
        if let Err(error) = let_go(&self.helper(), known).await {
            warn!(volume = name, %error, "what is left of its device may be connected again");
        }
        let at = rfc3339(Timestamp::now());
        let remedy = if sysfs::backend(known.index) == Some(known.volume) {
            what_frees(known, name)
        } else {
            format!("byokctl attach {name}")
        };
        volume.with(|now| now.problem = Some(Problem { at, why, remedy }));
    }
}

/// The names of volumes by the uuids in their headers, as far as these can be read within [`MATCH`].
pub(super) async fn by_headers(all: &BTreeMap<String, Arc<Volume>>) -> BTreeMap<Uuid, String> {
    let (mut reads, places) = (JoinSet::new(), Arc::new(Semaphore::new(AT_A_TIME)));
    for (name, volume) in all {
        let (name, places) = (name.clone(), Arc::clone(&places));
        let backing = volume.with(|now| now.config.backing.clone());
        reads.spawn(async move {
            // It is never closed.
            let _place = places.acquire_owned().await;
            let read = apart("look", move || inspect(&backing)).await;
            Some((read.ok()?.ok()?.0.uuid(), name))
        });
    }
    let mut names = BTreeMap::new();
    let reading = async {
        while let Some(read) = reads.join_next().await {
            let Some((uuid, name)) = read.ok().flatten() else { continue };
            // Of copies the first one by name, whichever is read first.
            let first = names.entry(uuid).or_insert_with(|| name.clone());
            if name < *first {
                *first = name;
            }
        }
    };
    if timeout(MATCH, reading).await.is_err() {
        warn!("not waited for: stores that do not give their headers");
    }
    names
}

/// Gives systemd what one volume's device handed over, for the next daemon; says whether it takes
/// more.
pub(super) fn store(notifier: &Notifier, sockets: &[(u32, OwnedFd)]) -> bool {
    for (at, (index, socket)) in sockets.iter().enumerate() {
        match notifier.store_fd(&format!("{STORED}nbd{index}.{at}"), socket) {
            Ok(true) => {}
            Ok(false) => warn!(
                device = format!("/dev/nbd{index}"),
                "nobody keeps the connection; requests wait for the next byokd"
            ),
            Err(error) => {
                warn!(device = format!("/dev/nbd{index}"), %error, "systemd does not keep the connection");
                // It does not read; the next one would wait as long.
                if error.kind() == io::ErrorKind::WouldBlock {
                    return false;
                }
            }
        }
    }
    true
}

/// Waits until systemd keeps all that it was given.
pub(super) fn stored(notifier: &Notifier) {
    if let Err(error) = notifier.settle(STORE) {
        warn!(%error, "systemd may not have kept all connections");
    }
}

/// Whether a descriptor of systemd's store is a connection of the kernel's.
pub(super) fn is_stored(name: &str) -> bool {
    name.starts_with(STORED)
}

fn index_of(name: &str) -> Option<u32> {
    let (device, _) = name.strip_prefix(STORED)?.split_once('.')?;
    sysfs::index_of(device)
}

fn plan(config: &VolumeConfig) -> PurgePlan {
    let purge = &config.purge;
    let end = match purge.end {
        EndUsers::Nobody => None,
        EndUsers::Processes => Some(PurgeStep::EndProcesses),
        EndUsers::Groups => Some(PurgeStep::EndGroups),
    };
    let steps = [
        purge.shut_down.then_some(PurgeStep::ShutDown),
        end,
        purge.unmount.then_some(PurgeStep::Unmount),
        purge.flush_device.then_some(PurgeStep::FlushDevice),
        purge.drop_caches.then_some(PurgeStep::DropCaches),
    ];
    PurgePlan {
        steps: steps.into_iter().flatten().collect(),
        disconnect: purge.disconnect,
        limit: purge.step_timeout.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_purge_goes_from_file_systems_to_the_device() {
        let mut config = VolumeConfig::new("/x".into());
        let usual = plan(&config);
        assert_eq!(
            usual.steps,
            [PurgeStep::ShutDown, PurgeStep::FlushDevice, PurgeStep::DropCaches]
        );
        assert!(!usual.disconnect);
        config.purge.end = EndUsers::Processes;
        config.purge.unmount = true;
        let all = plan(&config).steps;
        assert_eq!(all[1..3], [PurgeStep::EndProcesses, PurgeStep::Unmount]);
    }

    #[test]
    fn stored_connections_name_their_device() {
        assert!(is_stored("kernel.nbd12.3"));
        assert_eq!(index_of("kernel.nbd12.3"), Some(12));
        assert_eq!(index_of("kernel.sda.3"), None);
        assert_eq!(index_of("stored"), None);
    }
}
