//! What is done to volumes: attach, detach, forget.
//!
//! Each volume has one lock that orders these; none is held while another volume is asked for, so
//! that one whose KMS is slow never delays another.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::audit::record::{Event, Kind};
use crate::audit::{Audit, Owed};
use crate::clock::now;
use crate::config::{Auto, VolumeConfig, is_volume_name, load_volume, load_volume_with_hash};
use crate::control::{Problem, VolumeStatus};
use crate::daemon::devices::AttachHow;
use crate::daemon::in_kernel::{in_force, put_in_force};
use crate::daemon::refusals::{
    Answered, NotAttached, by_export, by_panic, by_service, by_volume, refused,
};
use crate::daemon::status::status;
use crate::daemon::stop::DRAIN;
use crate::daemon::{Attached, Daemon, Keyed, Now, Service, Volume};
use crate::exit::ExitCode;
use crate::export::{Export, ExportOptions};
use crate::keeper::plan::PlanStep;
use crate::keeper::threads::{Apart, apart, close};
use crate::keeper::{self, Keeper, Terms};
use crate::key::lease::FenceReason;
use crate::key::wrapped::Role;
use crate::kms::KeyService;
use crate::kms::aws::{AwsKms, AwsSettings, RoleToAssume};
use crate::listener::{Listener, Peers};
use crate::luks2::Header;
use crate::store::DirectIo;
use crate::units::{rfc3339, word};
use crate::volume::{Access, LockedVolume};

/// How soon the keeper of a volume that is attached is heard of first.
const ATTACHING: Duration = Duration::from_secs(10);

/// How long a store may take to be opened. Longer than a disk takes to spin up, shorter than a start
/// waits for the first tries: a store that hangs is tried again, and told of.
const OPEN: Duration = Duration::from_secs(15);

/// How long a forced detach waits for whatever else is done to the volume: time for its parts that
/// are bounded and short. With what is bounded after it, it ends in 20 s.
const CUT_IN: Duration = Duration::from_secs(5);

/// How often it tells those who attach the volume.
const CUT_IN_AGAIN: Duration = Duration::from_millis(500);

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
                self.not_skipped(name);
                let mut volumes = self.volumes();
                let volume = volumes.entry(name.to_owned());
                Ok(Arc::clone(volume.or_insert_with(|| Arc::new(Volume::new(config)))))
            }
            Ok(None) => {
                self.not_skipped(name);
                Err(refused(
                    ExitCode::WrongState,
                    what,
                    format!("there is no volume `{name}`"),
                    "See `byokctl volume list` for those that there are.",
                ))
            }
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
        if is_this(&volumes, name, volume) {
            volume.with(act);
            return Ok(());
        }
        let why = "it was forgotten meanwhile";
        Err(refused(ExitCode::WrongState, what, why, "Try again if it is back."))
    }

    pub(super) fn is_known(&self, name: &str, volume: &Arc<Volume>) -> bool {
        is_this(&self.volumes(), name, volume)
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

    pub(super) async fn attach(
        &self,
        name: &str,
        how: AttachHow,
    ) -> Result<Box<VolumeStatus>, NotAttached> {
        let what = format!("attach volume {name}");
        let volume = self.find(&what, name).await?;
        let _alone = volume.changing.lock().await;
        let mut until = TakenOut(volume.taken_out.subscribe());
        self.goes_into_service(&what)?;
        self.while_known(&what, name, &volume, |_| ())?;
        // It may have waited for whoever took it out of service.
        if how.by_itself && !volume.with(|now| now.tries.wanted) {
            let why = "it was detached meanwhile";
            let remedy = format!("If it is to be served: byokctl attach {name}");
            let refusal = refused(ExitCode::WrongState, &what, why, remedy);
            return Err(NotAttached::for_good(refusal));
        }
        if volume.with(|now| matches!(now.service, Service::Attached(_))) {
            let why = "it is attached already";
            let remedy = format!("See `byokctl status {name}`.");
            return Err(refused(ExitCode::WrongState, &what, why, remedy).into());
        }
        room_for_descriptors().map_err(|why| {
            let remedy = "Raise LimitNOFILE for byokd, or attach fewer volumes.";
            refused(ExitCode::Failed, &what, why, remedy)
        })?;
        self.not_suspended(&what, name).await.map_err(NotAttached::for_good)?;
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
                return Err(refused(ExitCode::WrongState, &what, why, remedy).into());
            }
            Err(why) => {
                let remedy = "Mend the lines named above.";
                return Err(refused(ExitCode::Usage, &what, why, remedy).into());
            }
        };
        let none = how.device(&config).is_none() && volume.with(|now| now.device.is_none());
        if how.connections.is_some() && none {
            let why =
                "only a device of the kernel has connections to choose, and it is to have none";
            let remedy = "Give --device auto as well, or leave --connections out.";
            return Err(refused(ExitCode::Usage, &what, why, remedy).into());
        }
        let first = in_force(&what, name, &volume, &config, how.read_only)
            .map_err(NotAttached::for_good)?;
        self.while_known(&what, name, &volume, |now| now.service = Service::Attaching(None))?;
        put_in_force(&volume, &first, &config);
        let unlocked = self.unlock(&what, name, &volume, &config, how.read_only, &mut until).await;
        let done = match unlocked {
            Ok(attached) => {
                volume.with(|now| now.service = Service::Attached(attached));
                let device = self.put_in_kernel(&what, name, &volume, &config, how, &mut until);
                let device = device.await;
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
        let outcome = done.as_ref().err().map_or(ExitCode::Ok, |not| not.error.exit);
        volume.counters.attaches.add(&word(outcome));
        if let Err(NotAttached { error, .. }) = &done {
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
            now.problem = done.as_ref().err().map(|NotAttached { error, .. }| Problem {
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
        definition: &VolumeConfig,
        read_only: bool,
        until: &mut TakenOut,
    ) -> Result<Attached, NotAttached> {
        let peers = self.peers_of(definition).map_err(|e| {
            refused(ExitCode::Usage, what, e, "Mend `owner` and `group` of the definition.")
        })?;
        let direct = match definition.direct {
            Auto::Auto => DirectIo::Auto,
            Auto::Off => DirectIo::Off,
        };
        let opening = |config: &VolumeConfig| {
            let read_only = read_only || config.read_only;
            let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
            open(what, volume, definition.backing.clone(), access, direct)
        };
        let mut config = volume.with(|now| now.config.clone());
        let mut locked = until.or(what, opening(&config)).await?;
        // It asks byokd-kernel, which takes its time.
        let adopting = self.adopt(what, name, volume, locked.header().uuid());
        let adopted = until.or(what, async { Ok(adopting.await?) }).await;
        let made = adopted.and_then(|adopted| {
            let made = adopted.then(|| in_force(what, name, volume, definition, read_only));
            made.transpose().map_err(NotAttached::for_good)
        });
        match made {
            Ok(None) => {}
            Ok(Some(made)) => {
                config = made;
                close(locked).await;
                locked = until.or(what, opening(&config)).await?;
            }
            Err(error) => {
                close(locked).await;
                return Err(error);
            }
        }
        let (config, read_only) = (&config, read_only || config.read_only);
        let header = locked.header();
        let locked = Apart::new(locked);
        let wrapped = header.token().wrapped.clone();
        let role = config.role();
        let asked = now();
        let unwrapped = async {
            is_the_one(what, config, &header).map_err(NotAttached::for_good)?;
            let kms = self.kms_for(what, role.as_ref()).await?;
            let unwrapped = kms.unwrap_key(&wrapped).await;
            let unwrapped = unwrapped.map_err(|e| by_service(what, &e))?;
            Ok::<_, NotAttached>((kms, unwrapped.0, unwrapped.1))
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
            let unlocked = match locked.into_inner().unlock(&key) {
                Ok(unlocked) => unlocked,
                Err((_locked, error)) => {
                    // Before the store is closed, which may hang.
                    drop(key);
                    drop(custody);
                    return Err(by_volume(&tried, &error));
                }
            };
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
            self.not_suspended(what, name).await.map_err(NotAttached::for_good)?;
            let mended = Arc::clone(&export);
            let repaired = apart("repair", move || mended.volume().repair()).await;
            repaired.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
            self.first_record(what, attach).await?;
            let table = self.table.only(Arc::clone(&export));
            let listener = Listener::nbd_unix(&socket, peers, table).map_err(|e| {
                let why = format!("cannot listen on {}: {e}", socket.display());
                refused(ExitCode::Failed, what, why, "Check the nbd_dir of byokd.toml.")
            });
            Ok(listener?)
        };
        let listener = match until.or(what, ready).await {
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
        let attaching = volume.with(|now| matches!(now.service, Service::Attaching(_)));
        let no_more_tries = |now: &mut Now| std::mem::take(&mut now.tries.wanted);
        // Nothing refuses it then: not even a try that is about to begin holds it up.
        let cut_short = force && volume.with(no_more_tries);
        let alone = if force { cut_in(&volume).await } else { Some(volume.changing.lock().await) };
        let had_device = self.take_from_kernel(&what, name, &volume, force).await?;
        // Nor does one that waits for its turn, or for its time, bring it back.
        let was_tried = volume.with(no_more_tries) || cut_short;
        volume.taken_out.send_modify(|times| *times += 1);
        if was_tried {
            // Nobody wants it attached.
            volume.with(|now| now.problem = None);
            info!(volume = name, "not tried any more");
        }
        if alone.is_none() {
            warn!(volume = name, "not waited for: something that is being done to it does not end");
            self.give_up(name, &volume, FenceReason::Detached);
        }
        let ended = self.end(name, &volume, FenceReason::Detached, DRAIN).await.map_err(|e| {
            let why = format!("it is detached and its key destroyed, but the last flush failed: {e}");
            refused(
                ExitCode::Failed,
                &what,
                why,
                "What was written since a client's last flush may be lost; check the backing store.",
            )
        })?;
        let cut_off = force && attaching;
        if !(ended || had_device || was_tried || cut_off) {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "it is not attached",
                format!("See `byokctl status {name}`."),
            ));
        }
        Ok(Box::new(status(name, &volume).await))
    }
}

fn is_this(known: &BTreeMap<String, Arc<Volume>>, name: &str, volume: &Arc<Volume>) -> bool {
    known.get(name).is_some_and(|known| Arc::ptr_eq(known, volume))
}

/// Opens a volume's store, in bounded time. What a store that hangs gives later is closed again.
async fn open(
    what: &str,
    volume: &Volume,
    backing: PathBuf,
    access: Access,
    direct: DirectIo,
) -> Result<LockedVolume, NotAttached> {
    let path = backing.clone();
    let opening = async {
        let place = volume.place_to_open(&backing).lock_owned().await;
        apart("open", move || {
            let opened = LockedVolume::open(&backing, access).and_then(|locked| {
                // A store that hangs does so now, not when the key is here.
                locked.open_store(direct)?;
                Ok(locked)
            });
            // In this order, where nobody waits for them.
            (opened, place)
        })
        .await
    };
    let Ok(opened) = timeout(OPEN, opening).await else {
        let (path, seconds) = (path.display(), OPEN.as_secs());
        let why = format!("its store {path} hangs: it was not opened within {seconds} s");
        let remedy = "See the system's log for the backing store.";
        return Err(refused(ExitCode::Failed, what, why, remedy).into());
    };
    let (opened, _place) = opened.map_err(|e| by_panic(what, e))?;
    opened.map_err(|e| NotAttached::by_volume(what, &e))
}

impl Volume {
    /// What is held while the store at `backing` is opened. Another one does not wait for it.
    fn place_to_open(&self, backing: &Path) -> Arc<Mutex<()>> {
        let mut opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if opening.0 != backing {
            *opening = (backing.to_owned(), Arc::default());
        }
        Arc::clone(&opening.1)
    }
}

/// Tells whoever attaches a volume that an operator takes it out of service.
pub(super) struct TakenOut(watch::Receiver<u64>);

impl TakenOut {
    /// What `work` comes to, unless the volume is taken out of service first.
    pub(super) async fn or<T>(
        &mut self,
        what: &str,
        work: impl Future<Output = Result<T, NotAttached>>,
    ) -> Result<T, NotAttached> {
        tokio::select! {
            biased;
            // The volume outlives whoever attaches it.
            _ = self.0.changed() => {
                let why = "it was detached by force meanwhile";
                let remedy = "Attach it again when it is to be served.";
                let refusal = refused(ExitCode::WrongState, what, why, remedy);
                Err(NotAttached::for_good(refusal))
            }
            done = work => done,
        }
    }
}

/// Has whoever attaches the volume give up, and waits for that; in vain where something else is done
/// to it that hangs.
async fn cut_in(volume: &Volume) -> Option<MutexGuard<'_, ()>> {
    let mut waited = Duration::ZERO;
    while waited < CUT_IN {
        // Again for those who began meanwhile.
        volume.taken_out.send_modify(|times| *times += 1);
        if let Ok(alone) = timeout(CUT_IN_AGAIN, volume.changing.lock()).await {
            return Some(alone);
        }
        waited += CUT_IN_AGAIN;
    }
    None
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
