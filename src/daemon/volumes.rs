//! What is done to volumes: create, attach, detach, forget.
//!
//! Each volume has one lock that orders these; none is held while another volume is asked for, so
//! that one whose KMS is slow never delays another.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::audit::record::{Event, Kind};
use crate::audit::{Audit, Owed};
use crate::clock::now;
use crate::config::{
    AttachWhen, Auto, VolumeConfig, is_volume_name, load_volume, load_volume_with_hash,
};
use crate::control::{Problem, VolumeCreate, VolumeStatus};
use crate::daemon::devices::{AttachHow, store, stored};
use crate::daemon::refusals::{Answered, by_export, by_panic, by_service, by_volume, refused};
use crate::daemon::status::status;
use crate::daemon::{Attached, Daemon, Keyed, Now, Service, Volume};
use crate::exit::ExitCode;
use crate::export::{Export, ExportOptions};
use crate::fence::KeyDestroyed;
use crate::keeper::plan::PlanStep;
use crate::keeper::threads::{Apart, apart, close};
use crate::keeper::{self, Keeper, Terms};
use crate::kernel::sysfs;
use crate::key::lease::{Allowance, Connection, FenceReason, Moment};
use crate::key::wrapped::{Canary, EncryptionContext, Role};
use crate::kms::aws::{AwsKms, AwsSettings, RoleToAssume};
use crate::kms::{KeyService, NewKey, ServiceError};
use crate::listener::{Listener, Peers};
use crate::luks2::Header;
use crate::store::DirectIo;
use crate::systemd::Notifier;
use crate::units::{rfc3339, word};
use crate::volume::{Access, CreateOptions, LockedVolume, NewVolume};

/// How long requests in flight may take when a volume is detached or the daemon stops.
pub(super) const DRAIN: Duration = Duration::from_secs(10);

/// How soon the keeper of a volume that is attached is heard of first.
const ATTACHING: Duration = Duration::from_secs(10);

/// How long to wait before a volume that should be attached is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How soon a first denial of a volume with a device is confirmed.
const CONFIRM: Duration = Duration::from_millis(500);

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

/// Descriptors that no further volume takes: what is attached needs them for clients, and for asking
/// KMS. A node that could not ask would lose all its volumes when their allowances end.
const SPARE_DESCRIPTORS: u64 = 32;

/// Whether another volume may be attached; if not, why.
fn room_for_descriptors() -> Result<(), String> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|e| e.to_string())?;
    let open = std::fs::read_dir("/proc/self/fd").map_err(|e| e.to_string())?.count() as u64;
    if open + SPARE_DESCRIPTORS > limit {
        return Err(format!(
            "{open} of {limit} files are open, and the rest is kept for clients and for KMS"
        ));
    }
    Ok(())
}

/// A name that a volume being made has for itself.
struct Reserved<'a> {
    daemon: &'a Daemon,
    name: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.daemon.creating().remove(&self.name);
    }
}

impl Daemon {
    /// The volume of that name: one that is known, or whose definition was put there since.
    pub(super) async fn find(&self, what: &str, name: &str) -> Answered<Arc<Volume>> {
        if let Some(volume) = self.volumes().get(name) {
            return Ok(Arc::clone(volume));
        }
        let definition =
            if is_volume_name(name) { self.read_definition(name).await } else { Ok(None) };
        match definition {
            Ok(Some(config)) => {
                let mut volumes = self.volumes();
                let volume = volumes.entry(name.to_owned());
                Ok(Arc::clone(volume.or_insert_with(|| Arc::new(Volume::new(config)))))
            }
            Ok(None) => Err(refused(
                ExitCode::WrongState,
                what,
                format!("there is no volume `{name}`"),
                "See `byokctl volume list` for those that there are.",
            )),
            Err(why) => Err(refused(ExitCode::Usage, what, why, "Mend the lines named above.")),
        }
    }

    pub(super) fn definition(&self, name: &str) -> PathBuf {
        self.setup.config.volumes_dir.join(format!("{name}.toml"))
    }

    pub(super) async fn read_definition(&self, name: &str) -> Result<Option<VolumeConfig>, String> {
        let path = self.definition(name);
        let read = apart("definition", move || load_volume(&path).map_err(|e| e.to_string()));
        read.await.unwrap_or_else(|e| Err(e.to_string()))
    }

    /// Whether there is a definition of that name.
    pub(super) async fn is_defined(&self, name: &str) -> io::Result<bool> {
        let path = self.definition(name);
        apart("definition", move || path.exists()).await
    }

    async fn reserve(&self, what: &str, name: &str) -> Answered<Reserved<'_>> {
        let taken = || {
            refused(
                ExitCode::WrongState,
                what,
                "there is a volume of that name",
                "Choose another name, or `byokctl volume forget` that one (its data stays).",
            )
        };
        let reserved = {
            let mut creating = self.creating();
            if self.volumes().contains_key(name) || !creating.insert(name.to_owned()) {
                return Err(taken());
            }
            Reserved { daemon: self, name: name.to_owned() }
        };
        if self.is_defined(name).await.map_err(|e| by_panic(what, e))? {
            return Err(taken());
        }
        Ok(reserved)
    }

    pub(super) async fn create(&self, create: VolumeCreate) -> Answered<Box<VolumeStatus>> {
        let what = format!("create volume {}", create.name);
        if !is_volume_name(&create.name) {
            return Err(refused(
                ExitCode::Usage,
                &what,
                "that cannot be a volume's name",
                "Use letters, digits, `-`, `_` and `.`, at most 64, beginning with a letter or digit.",
            ));
        }
        if create.backing.is_relative() {
            return Err(refused(
                ExitCode::Usage,
                &what,
                format!("{} is a relative path", create.backing.display()),
                "Give the backing file or device as an absolute path.",
            ));
        }
        let reserved = self.reserve(&what, &create.name).await?;
        let uuid = self.make(&what, &create).await?;
        let mut config = VolumeConfig::new(create.backing);
        config.uuid = Some(uuid);
        config.role_arn = create.role.as_ref().map(|role| role.arn.clone());
        config.external_id = create.role.and_then(|role| role.external_id);
        let (path, defined) = (self.definition(&create.name), config.clone());
        let written = apart("define", move || define(&path, &defined)).await;
        written.flatten().map_err(|e| {
            let why = format!("the volume is made, but its definition is not written: {e}");
            refused(
                ExitCode::Failed,
                &what,
                why,
                "Write the definition by hand, or create it again with --force.",
            )
        })?;
        let defined = Event::new(Kind::ConfigChange).volume(&create.name);
        self.audit.record(defined.detail("change", "defined"));
        info!(volume = create.name, key = %create.key, purpose = %create.purpose, "volume created");
        // A reload may have found the definition already, and attach the volume.
        let volume = {
            let mut volumes = self.volumes();
            let volume = volumes.entry(create.name.clone());
            Arc::clone(volume.or_insert_with(|| Arc::new(Volume::new(config))))
        };
        drop(reserved);
        Ok(Box::new(status(&create.name, &volume).await))
    }

    /// Writes the volume to its store. The key has proved by then that it can be used in the
    /// volume's context, also for unwrapping.
    async fn make(&self, what: &str, create: &VolumeCreate) -> Answered<Uuid> {
        let options = CreateOptions {
            backing: create.backing.clone(),
            capacity: create.size,
            sector_size: create.sector_size,
            label: create.name.clone(),
            force: create.force,
            preallocate: create.preallocate,
        };
        let prepared = apart("prepare", move || NewVolume::prepare(options)).await;
        let new = prepared.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        let uuid = new.uuid();
        let (key, canary) = match self.make_key(what, create, uuid).await {
            Ok(made) => made,
            Err(refused) => {
                close(new).await;
                return Err(refused);
            }
        };
        let event = Event::new(Kind::Create).volume(&create.name).wrapped(&key.wrapped);
        let event = event.detail("backing", &create.backing.display().to_string());
        // Not among work that may hang, as the key would.
        let sealed = apart("seal", move || new.seal(key.key, key.wrapped, canary)).await;
        let sealed = sealed.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        if let Err(refused) = self.first_record(what, event).await {
            close(sealed).await;
            return Err(refused);
        }
        let committed = apart("commit", move || sealed.commit()).await;
        committed.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        Ok(uuid)
    }

    /// A key for a new volume, which has proved that it can be used, and a canary.
    async fn make_key(
        &self,
        what: &str,
        create: &VolumeCreate,
        uuid: Uuid,
    ) -> Answered<(NewKey, Canary)> {
        let pairs = create.context.clone();
        let context = EncryptionContext::for_volume(uuid, create.purpose, pairs)
            .map_err(|e| refused(ExitCode::Usage, what, e, "Mend the --context options."))?;
        let kms = self.kms_for(what, create.role.as_ref()).await?;
        let by_kms = |error: ServiceError| by_service(what, &error);
        let key = kms.make_key(&create.key, &context).await.map_err(by_kms)?;
        let canary = kms.make_canary(&create.key, &context).await.map_err(by_kms)?;
        let probed = kms.probe(&canary, Connection::Fresh).await;
        probed.map_err(|e| by_kms(e.into()))?;
        Ok((key, canary))
    }

    /// Does `act` while the volume is known, or refuses what is asked for it: it may have been forgotten,
    /// or a reload found its definition gone, and another one may have its name.
    fn while_known(
        &self,
        what: &str,
        name: &str,
        volume: &Arc<Volume>,
        act: impl FnOnce(&mut Now),
    ) -> Answered<()> {
        let volumes = self.volumes();
        if volumes.get(name).is_some_and(|known| Arc::ptr_eq(known, volume)) {
            volume.with(act);
            return Ok(());
        }
        let why = "it was forgotten meanwhile";
        Err(refused(ExitCode::WrongState, what, why, "Try again if it is back."))
    }

    pub(super) async fn forget(&self, name: &str) -> Answered<()> {
        let what = format!("forget volume {name}");
        let volume = self.find(&what, name).await?;
        let _alone = volume.changing.lock().await;
        self.while_known(&what, name, &volume, |_| ())?;
        if volume.with(|now| !matches!(now.service, Service::Detached) || now.device.is_some()) {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "it is attached",
                format!("Detach it first: byokctl detach {name}"),
            ));
        }
        let definition = self.definition(name);
        let removed = apart("forget", move || match std::fs::remove_file(definition) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        });
        let removed = removed.await.flatten();
        removed.map_err(|e| refused(ExitCode::Failed, &what, e, "Check the volumes directory."))?;
        let unsuspended = self.unsuspend(name).await;
        unsuspended
            .map_err(|e| refused(ExitCode::Failed, &what, e, "Check the volumes directory."))?;
        // Another one that a reload made of a definition written since is not this one.
        self.volumes().retain(|_, known| !Arc::ptr_eq(known, &volume));
        self.audit
            .record(Event::new(Kind::ConfigChange).volume(name).detail("change", "forgotten"));
        info!(volume = name, "volume forgotten; its data stays");
        Ok(())
    }

    /// KMS, by way of a role if there is one. Volumes of one role share its credentials.
    pub(super) async fn kms_for(&self, what: &str, role: Option<&Role>) -> Answered<Arc<AwsKms>> {
        let Some(role) = role else { return Ok(Arc::clone(&self.kms)) };
        let mut roles = self.roles.lock().await;
        if let Some(kms) = roles.get(role) {
            return Ok(Arc::clone(kms));
        }
        let assume = RoleToAssume {
            arn: role.arn.clone(),
            external_id: role.external_id.clone(),
            session_name: None,
        };
        let settings = AwsSettings { role: Some(assume), ..self.setup.kms.clone() };
        let connected = AwsKms::connect(settings).await;
        let kms = connected
            .map(Arc::new)
            .map_err(|e| refused(ExitCode::Usage, what, e, "Mend the volume's role."))?;
        roles.insert(role.clone(), Arc::clone(&kms));
        Ok(kms)
    }

    pub(super) async fn attach(&self, name: &str, how: AttachHow) -> Answered<Box<VolumeStatus>> {
        let what = format!("attach volume {name}");
        let volume = self.find(&what, name).await?;
        let _alone = volume.changing.lock().await;
        self.goes_into_service(&what)?;
        self.while_known(&what, name, &volume, |_| ())?;
        if volume.with(|now| matches!(now.service, Service::Attached(_))) {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "it is attached already",
                format!("See `byokctl status {name}`."),
            ));
        }
        room_for_descriptors().map_err(|why| {
            let remedy = "Raise LimitNOFILE for byokd, or attach fewer volumes.";
            refused(ExitCode::Failed, &what, why, remedy)
        })?;
        self.not_suspended(&what, name).await?;
        let definition = self.definition(name);
        let loaded = apart("definition", move || load_volume_with_hash(&definition)).await;
        let config = match loaded.map_err(|e| by_panic(&what, e))? {
            Ok(Some((config, hash))) => {
                if volume.with(|now| now.definition.replace(hash)) != Some(hash) {
                    let event = Event::new(Kind::ConfigLoad).volume(name);
                    let file = self.definition(name);
                    let event = event.detail("file", &file.display().to_string());
                    self.audit.record(event.detail("sha256", &hash.to_string()));
                }
                config
            }
            Ok(None) => {
                let why = format!("its definition {} is gone", self.definition(name).display());
                let remedy = format!("Put it back, or `byokctl volume forget {name}`.");
                return Err(refused(ExitCode::WrongState, &what, why, remedy));
            }
            Err(why) => {
                return Err(refused(ExitCode::Usage, &what, why, "Mend the lines named above."));
            }
        };
        self.while_known(&what, name, &volume, |now| {
            now.config = config.clone();
            now.at_next_attach = Vec::new();
            now.service = Service::Attaching(None);
        })?;
        let done = match self.unlock(&what, name, &volume, &config, how.read_only).await {
            Ok(attached) => {
                volume.with(|now| now.service = Service::Attached(attached));
                let device = self.put_in_kernel(&what, name, &volume, &config, how).await;
                if device.is_err() {
                    // What failed was logged.
                    let _ended = self.end(name, &volume, FenceReason::Detached, DRAIN).await;
                }
                device
            }
            Err(error) => {
                close(volume.leave_service()).await;
                Err(error)
            }
        };
        let outcome = done.as_ref().err().map_or(ExitCode::Ok, |error| error.exit);
        volume.counters.attaches.add(&word(outcome));
        if let Err(error) = &done {
            // Tried again every few seconds, it is recorded once.
            let known = volume.with(|now| {
                now.problem.as_ref().is_some_and(|problem| problem.remedy == error.remedy)
            });
            if !known {
                let event = Event::new(Kind::AttachFailed).volume(name);
                self.audit.record(event.failed(error.exit, &error.why));
            }
        }
        volume.with(|now| {
            now.problem = done.as_ref().err().map(|error| Problem {
                at: rfc3339(Timestamp::now()),
                why: error.why.clone(),
                remedy: error.remedy.clone(),
            });
        });
        done?;
        Ok(Box::new(status(name, &volume).await))
    }

    async fn unlock(
        &self,
        what: &str,
        name: &str,
        volume: &Volume,
        config: &VolumeConfig,
        read_only: bool,
    ) -> Answered<Attached> {
        let peers = self.peers_of(config).map_err(|e| {
            refused(ExitCode::Usage, what, e, "Mend `owner` and `group` of the definition.")
        })?;
        let read_only = read_only || config.read_only;
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        let direct = match config.direct {
            Auto::Auto => DirectIo::Auto,
            Auto::Off => DirectIo::Off,
        };
        let backing = config.backing.clone();
        let opened = apart("open", move || {
            let locked = LockedVolume::open(&backing, access)?;
            // A store that hangs does so now, not when the key is here.
            locked.open_store(direct)?;
            Ok(locked)
        });
        let opened = opened.await.map_err(|e| by_panic(what, e))?;
        let locked = opened.map_err(|e| by_volume(what, &e))?;
        let header = locked.header();
        let locked = Apart::new(locked);
        let wrapped = header.token().wrapped.clone();
        let role = config.role();
        let asked = now();
        let unwrapped = async {
            is_the_one(what, config, &header)?;
            let kms = self.kms_for(what, role.as_ref()).await?;
            let unwrapped = kms.unwrap_key(&wrapped).await;
            unwrapped.map(|(key, proof)| (kms, key, proof)).map_err(|e| by_service(what, &e))
        };
        let (kms, key, proof) = match Box::pin(unwrapped).await {
            Ok(unwrapped) => unwrapped,
            Err(error) => {
                close(locked.into_inner()).await;
                return Err(error);
            }
        };
        let event = |kind| Event::new(kind).volume(name).wrapped(&wrapped);
        self.audit.record(event(Kind::Unwrap).request_id(proof.request_id.as_deref()));
        let options = ExportOptions {
            name: name.to_owned(),
            description: String::new(),
            read_only,
            trim: config.trim,
            max_connections: self.setup.config.max_connections,
            direct,
            hold: config.hold(),
        };
        let tried = what.to_owned();
        let mut custody = Unserved::new(&self.audit, event(Kind::KeyDestroyed));
        // Not among work that may hang: the key has no lease yet.
        let opened = apart("unlock", move || {
            // Wiped before that is recorded, where it comes to nothing.
            let key = key;
            let unlocked =
                locked.into_inner().unlock(&key).map_err(|(_, e)| by_volume(&tried, &e))?;
            let purpose = unlocked.header().token().wrapped.context.purpose();
            let description = purpose.map(|p| format!("byokd volume for {p}")).unwrap_or_default();
            let export = Export::open(unlocked, key, ExportOptions { description, ..options })
                .map_err(|e| by_export(&tried, &e))?;
            custody.export = Some(Arc::clone(&export));
            Ok((export, custody))
        });
        let (export, custody) = opened.await.map_err(|e| by_panic(what, e))??;
        let steps = config.on_fence.iter();
        let on_fence =
            steps.map(|s| PlanStep { run: s.run.clone(), timeout: s.timeout.0 }).collect();
        let policy = config.lease.policy(self.setup.policy);
        let terms = Terms { policy, asked, on_fence, audit: Arc::clone(&self.audit) };
        // Whatever is waited for from here on, the key has a lease.
        let keeper = Keeper::start(
            Arc::clone(&export),
            kms,
            terms,
            &self.groups,
            role.as_ref(),
            self.progress.part(format!("the keeper of {name}"), ATTACHING),
            Arc::clone(&volume.counters),
        );
        // From here on an operator can fence it. He did, if he was quicker.
        let keyed = Keyed { export: Arc::clone(&export), teller: keeper.teller() };
        volume.with(|now| now.service = Service::Attaching(Some(keyed)));
        let attach = event(Kind::Attach).detail("backing", &config.backing.display().to_string());
        let attach = attach.detail("access", if read_only { "read-only" } else { "read-write" });
        let socket = self.setup.config.nbd_dir.join(format!("{name}.sock"));
        let ready = async {
            self.goes_into_service(what)?;
            self.not_suspended(what, name).await?;
            let mended = Arc::clone(&export);
            let repaired = apart("repair", move || mended.volume().repair()).await;
            repaired.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
            self.first_record(what, attach).await?;
            let table = self.table.only(Arc::clone(&export));
            Listener::nbd_unix(&socket, peers, table).map_err(|e| {
                let why = format!("cannot listen on {}: {e}", socket.display());
                refused(ExitCode::Failed, what, why, "Check the nbd_dir of byokd.toml.")
            })
        };
        let listener = match ready.await {
            Ok(listener) => listener,
            Err(error) => {
                keeper.end().await;
                drop(custody);
                keeper::settle(&export).await;
                return Err(error);
            }
        };
        custody.served();
        self.table.insert(Arc::clone(&export));
        info!(volume = name, request_id = proof.request_id, socket = %socket.display(), "attached");
        Ok(Attached { export, keeper, socket, _listener: listener })
    }

    /// Who may connect to a volume: what its definition says, else what the daemon's settings say.
    fn peers_of(&self, config: &VolumeConfig) -> io::Result<Peers> {
        let settings = &self.setup.config;
        let owner = config.owner.as_ref().or(settings.nbd_owner.as_ref());
        let group = config.group.as_ref().or(settings.nbd_group.as_ref());
        Peers::of(owner.map(String::as_str), group.map(String::as_str))
    }

    pub(super) async fn detach(&self, name: &str, force: bool) -> Answered<Box<VolumeStatus>> {
        let what = format!("detach volume {name}");
        let volume = self.find(&what, name).await?;
        let _alone = volume.changing.lock().await;
        let had_device = self.take_from_kernel(&what, name, &volume, force).await?;
        let ended = self.end(name, &volume, FenceReason::Detached, DRAIN).await.map_err(|e| {
            let why = format!("it is detached and its key destroyed, but the last flush failed: {e}");
            refused(
                ExitCode::Failed,
                &what,
                why,
                "What was written since a client's last flush may be lost; check the backing store.",
            )
        })?;
        if !ended && !had_device {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "it is not attached",
                format!("See `byokctl status {name}`."),
            ));
        }
        Ok(Box::new(status(name, &volume).await))
    }

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

    /// The daemon stops, and a key that is still here is destroyed, whatever is being done to its
    /// volume.
    fn give_up(&self, name: &str, volume: &Volume) {
        if let Some(Keyed { export, .. }) = volume.with(|now| now.service.keyed()) {
            self.destroy(name, &export, FenceReason::Stopping);
        }
    }

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
                (Some(device), Refuse::Now) => device.refuse().await,
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
            self.give_up(&name, &volume);
            return;
        };
        given(hand_over(&volume, HAND_OVER.min(left() / 2)).await);
        let within = DRAIN.min(left().saturating_sub(CUT_OFF));
        // What failed was logged.
        let _ended = self.end(&name, &volume, FenceReason::Stopping, within).await;
        // Whoever began to end it may have been cut off, and it goes on.
        volume.ended(left().saturating_sub(CUT_OFF / 2)).await;
        self.give_up(&name, &volume);
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

/// A volume whose key is here and that nobody is served of yet. Dropped, whatever becomes of its
/// attach, the key is destroyed, and that is recorded.
struct Unserved {
    /// Where the key is; none while it has not got there.
    export: Option<Arc<Export>>,
    destroyed: Owed,
}

impl Unserved {
    fn new(audit: &Arc<Audit>, destroyed: Event) -> Self {
        let destroyed = Owed::new(audit, destroyed.reason(FenceReason::Detached));
        Self { export: None, destroyed }
    }

    fn served(mut self) {
        self.export = None;
        self.destroyed.forgive();
    }
}

impl Drop for Unserved {
    fn drop(&mut self) {
        if let Some(export) = self.export.take()
            && !export.close_for_good(FenceReason::Detached).is_first()
        {
            self.destroyed.forgive();
        }
    }
}

/// Writes a definition so that it is there whole or not at all.
fn define(path: &Path, config: &VolumeConfig) -> io::Result<()> {
    let text = toml::to_string(config).map_err(io::Error::other)?;
    let new = path.with_extension("toml.new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// Checks that the store holds the volume that the definition means.
pub(super) fn is_the_one(what: &str, config: &VolumeConfig, header: &Header) -> Answered<()> {
    match config.uuid {
        Some(uuid) if uuid != header.uuid() => Err(refused(
            ExitCode::WrongState,
            what,
            format!("its definition means volume {uuid}, its store holds {}", header.uuid()),
            "Put the store back, or mend `backing` or `uuid` of the definition.",
        )),
        _ => Ok(()),
    }
}

/// Whether a volume should be in service and is not.
pub(super) fn is_wanted(volume: &Volume) -> bool {
    volume.with(|now| {
        let wanted = now.device.is_some() || now.config.attach == AttachWhen::Auto;
        wanted && !matches!(now.service, Service::Attached(_))
    })
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
