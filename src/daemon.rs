//! Puts the parts together: start, create, attach, detach, status, stop.
//!
//! A [`Daemon`] is shared by the control connections. It keeps the definitions of volumes and what
//! is attached; each volume has a lock of its own, so that one whose KMS is slow never delays
//! another.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tracing::{error, info, warn};

use crate::config::{
    AttachWhen, Auto, Config, ConfigErrors, VolumeConfig, is_volume_name, load_volumes,
};
use crate::control::server::ControlServer;
use crate::control::{
    API_VERSION, Answer, ControlError, LeaseStatus, Request, VolumeCreate, VolumeState,
    VolumeStatus,
};
use crate::crypt::{SelfTestError, self_test};
use crate::exit::ExitCode;
use crate::export::{Export, ExportError, ExportOptions, ExportTable};
use crate::fence::FenceReason;
use crate::keeper::{Keeper, KeyReport};
use crate::key::lease::{LeasePolicy, LeaseWord};
use crate::key::wrapped::{EncryptionContext, KeyArn};
use crate::kms::aws::{AwsKms, AwsSettings, AwsSettingsError, RoleToAssume};
use crate::kms::dev::{DevKms, DevKmsError};
use crate::kms::{KeyService, ServiceError, Verdict};
use crate::listener::{Listener, Peers};
use crate::luks2::Header;
use crate::store::DirectIo;
use crate::units::SectorSize;
use crate::volume::{
    Access, CreateOptions, LockedVolume, NewVolume, VolumeError, VolumeErrorClass, inspect,
};

/// How long requests in flight may take when a volume is detached or the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// How long to wait before a volume that should be attached is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The region of the development KMS.
pub const DEV_REGION: &str = "eu-central-1";

/// Why the daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The cipher is wrong.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// KMS cannot be set up.
    #[error(transparent)]
    Kms(#[from] AwsSettingsError),
    /// The development KMS cannot be started.
    #[error(transparent)]
    DevKms(#[from] DevKmsError),
    /// Another daemon is there.
    #[error("another byokd runs with {}", .0.display())]
    Running(PathBuf),
    /// A file or socket.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl StartError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    /// What the process exits with.
    #[must_use]
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Config(_) => ExitCode::Usage,
            Self::Running(_) => ExitCode::WrongState,
            Self::SelfTest(_) | Self::Kms(_) | Self::DevKms(_) | Self::Io { .. } => {
                ExitCode::Failed
            }
        }
    }

    /// What to do about it, one sentence.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::SelfTest(_) => "Do not serve volumes with this machine or this build; report it.",
            Self::Config(_) => "Mend the lines named above.",
            Self::Kms(_) => "Set `region` under [kms] in byokd.toml.",
            Self::DevKms(_) => "Check the state directory.",
            Self::Running(_) => "Stop that one first, or use another directory.",
            Self::Io { .. } => "Check the path and its permissions.",
        }
    }
}

/// How the daemon is run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Settings.
    pub config: Config,
    /// How KMS is reached.
    pub kms: AwsSettings,
    /// The policy of leases where nothing else says otherwise.
    pub policy: LeasePolicy,
    /// Run the development KMS with its state here.
    pub dev_state: Option<PathBuf>,
}

impl Setup {
    /// From a configuration file.
    #[must_use]
    pub fn from_config(config: Config) -> Self {
        let kms = AwsSettings {
            region: config.kms.region.clone(),
            endpoint: config.kms.endpoint.clone(),
            fips: config.kms.fips,
            profile: config.kms.profile.clone(),
            ..AwsSettings::default()
        };
        let policy = config.lease.policy(LeasePolicy::default());
        Self { config, kms, policy, dev_state: None }
    }

    /// For trials: everything under `dir`, with the development KMS.
    #[must_use]
    pub fn dev(dir: &Path, probe_interval: Duration) -> Self {
        let config = Config {
            volumes_dir: dir.join("volumes.d"),
            control_socket: dir.join("byokd.sock"),
            nbd_dir: dir.join("nbd"),
            ..Config::default()
        };
        let kms = AwsSettings {
            region: Some(DEV_REGION.to_owned()),
            // The development KMS accepts any credentials; these are no secret.
            static_credentials: Some(("dev".to_owned(), "dev".to_owned())),
            ..AwsSettings::default()
        };
        let policy = LeasePolicy { interval: probe_interval, ..LeasePolicy::default() };
        Self { config, kms, policy, dev_state: Some(dir.to_owned()) }
    }
}

/// A running daemon.
pub struct Daemon {
    setup: Setup,
    kms: Arc<AwsKms>,
    peers: Peers,
    table: ExportTable,
    volumes: Mutex<BTreeMap<String, Arc<Mutex<Volume>>>>,
}

/// A volume that is known.
struct Volume {
    config: VolumeConfig,
    attached: Option<Attached>,
}

/// A volume in service. Dropped, it stops probing and listening.
struct Attached {
    export: Arc<Export>,
    keeper: Keeper,
    socket: PathBuf,
    _listener: Listener,
}

/// Runs a daemon until it is told to stop, and stops it cleanly.
///
/// # Errors
/// It could not start.
pub async fn run(mut setup: Setup) -> Result<(), StartError> {
    self_test()?;
    let mut directories = vec![setup.config.volumes_dir.clone(), setup.config.nbd_dir.clone()];
    directories.extend(setup.dev_state.clone());
    directories.extend(setup.config.control_socket.parent().map(Path::to_owned));
    for dir in directories {
        let made = DirBuilder::new().recursive(true).mode(0o750).create(&dir);
        made.map_err(StartError::io("make the directory", &dir))?;
    }
    let _alone = alone(&setup.config.nbd_dir)?;
    let dev = match &setup.dev_state {
        Some(dir) => Some(start_dev(dir, &mut setup.kms).await?),
        None => None,
    };
    let volumes = load_volumes(&setup.config.volumes_dir)?;
    let control = setup.config.control_socket.clone();
    let peers = Peers::group(setup.config.group.as_deref())
        .map_err(StartError::io("find the group of", &control))?;
    let table = ExportTable::new();
    let tcp = match setup.config.tcp_listen {
        Some(address) => Some(
            Listener::nbd_tcp(address, table.clone())
                .await
                .map_err(StartError::io("listen on", Path::new(&address.to_string())))?,
        ),
        None => None,
    };
    let kms = Arc::new(AwsKms::connect(setup.kms.clone()).await?);
    let known = volumes
        .into_iter()
        .map(|(name, config)| (name, Arc::new(Mutex::new(Volume { config, attached: None }))));
    let daemon = Arc::new(Daemon {
        kms,
        peers: peers.clone(),
        table,
        volumes: Mutex::new(known.collect()),
        setup,
    });
    let mut term =
        signal(SignalKind::terminate()).map_err(StartError::io("watch signals for", &control))?;
    let mut int =
        signal(SignalKind::interrupt()).map_err(StartError::io("watch signals for", &control))?;
    let server = ControlServer::start(&control, peers, Arc::clone(&daemon))
        .map_err(StartError::io("listen on", &control))?;
    info!(control = %control.display(), version = env!("CARGO_PKG_VERSION"), "ready");
    let attaching = tokio::spawn(Arc::clone(&daemon).attach_all());
    tokio::select! {
        _ = term.recv() => info!("stopping: SIGTERM"),
        _ = int.recv() => info!("stopping: SIGINT"),
    }
    attaching.abort();
    drop((server, tcp));
    daemon.stop().await;
    drop(dev);
    info!("stopped");
    Ok(())
}

/// Makes sure that no other daemon uses the same sockets.
fn alone(dir: &Path) -> Result<Flock<File>, StartError> {
    let path = dir.join(".lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(StartError::io("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| StartError::Running(dir.to_owned()))
}

async fn start_dev(dir: &Path, kms: &mut AwsSettings) -> Result<DevKms, StartError> {
    let dev = DevKms::start(&dir.join("kms"), DEV_REGION).await?;
    let path = dir.join("kms-endpoint");
    std::fs::write(&path, format!("{}\n", dev.endpoint()))
        .map_err(StartError::io("write", &path))?;
    kms.endpoint = Some(dev.endpoint().to_owned());
    Ok(dev)
}

type Answered<T> = Result<T, ControlError>;

#[expect(
    clippy::needless_pass_by_value,
    reason = "texts are given as literals, errors and formats"
)]
fn error(exit: ExitCode, what: &str, why: impl ToString, remedy: impl ToString) -> ControlError {
    ControlError { exit, what: what.to_owned(), why: why.to_string(), remedy: remedy.to_string() }
}

fn volume_error(what: &str, error: &VolumeError) -> ControlError {
    let exit = match error.class() {
        VolumeErrorClass::NotFound
        | VolumeErrorClass::Busy
        | VolumeErrorClass::WouldOverwrite
        | VolumeErrorClass::NotAVolume => ExitCode::WrongState,
        VolumeErrorClass::Request => ExitCode::Usage,
        VolumeErrorClass::Damaged
        | VolumeErrorClass::TooSmall
        | VolumeErrorClass::NoSpace
        | VolumeErrorClass::ReadOnly
        | VolumeErrorClass::WrongKey
        | VolumeErrorClass::Io => ExitCode::Failed,
    };
    self::error(exit, what, error, error.remedy())
}

fn service_error(what: &str, error: &ServiceError) -> ControlError {
    match error {
        ServiceError::Kms(kms) => {
            let exit = match kms.verdict {
                Verdict::Denied => ExitCode::KeyDenied,
                Verdict::Unavailable | Verdict::Credentials => ExitCode::KmsUnavailable,
                Verdict::Mismatch | Verdict::Allowed => ExitCode::Failed,
            };
            self::error(exit, what, kms, &kms.remedy)
        }
        ServiceError::Memory(memory) => {
            self::error(ExitCode::Failed, what, memory, "Raise LimitMEMLOCK for byokd.")
        }
    }
}

fn export_error(what: &str, error: &ExportError) -> ControlError {
    self::error(ExitCode::Failed, what, error, "See the daemon's log.")
}

fn panicked(what: &str, error: impl ToString) -> ControlError {
    self::error(ExitCode::Failed, what, error, "Report this as a bug.")
}

impl Daemon {
    /// Answers one request of the control API.
    pub async fn answer(self: &Arc<Self>, request: Request) -> Answer {
        let answered = match request {
            Request::Version => Ok(Answer::Version {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                api: API_VERSION,
            }),
            Request::VolumeCreate(create) => self.create(create).await.map(Answer::Volume),
            Request::VolumeList => self.statuses(None).await,
            Request::Status { name } => self.statuses(name).await,
            Request::VolumeShow { name } => self.show(&name).await.map(Answer::Volume),
            Request::VolumeForget { name } => self.forget(&name).await.map(|()| Answer::Done),
            Request::Attach { name, read_only } => {
                self.attach(&name, read_only).await.map(Answer::Volume)
            }
            Request::Detach { name } => self.detach(&name).await.map(Answer::Volume),
            Request::KeyCheck { arn } => Ok(Answer::KeyCheck { steps: self.kms.check(&arn).await }),
        };
        answered.unwrap_or_else(Answer::Error)
    }

    async fn find(&self, what: &str, name: &str) -> Answered<Arc<Mutex<Volume>>> {
        let found = self.volumes.lock().await.get(name).cloned();
        found.ok_or_else(|| {
            error(
                ExitCode::WrongState,
                what,
                format!("there is no volume `{name}`"),
                "See `byokctl volume list` for those that there are.",
            )
        })
    }

    fn definition(&self, name: &str) -> PathBuf {
        self.setup.config.volumes_dir.join(format!("{name}.toml"))
    }

    async fn create(&self, create: VolumeCreate) -> Answered<Box<VolumeStatus>> {
        let what = format!("create volume {}", create.name);
        if !is_volume_name(&create.name) {
            return Err(error(
                ExitCode::Usage,
                &what,
                "that cannot be a volume's name",
                "Use letters, digits, `-`, `_` and `.`, at most 64, beginning with a letter or digit.",
            ));
        }
        let mut volumes = self.volumes.lock().await;
        if volumes.contains_key(&create.name) {
            return Err(error(
                ExitCode::WrongState,
                &what,
                "there is a volume of that name",
                "Choose another name, or `byokctl volume forget` that one (its data stays).",
            ));
        }
        if create.backing.is_relative() {
            return Err(error(
                ExitCode::Usage,
                &what,
                format!("{} is a relative path", create.backing.display()),
                "Give the backing file or device as an absolute path.",
            ));
        }
        let options = CreateOptions {
            backing: create.backing.clone(),
            capacity: create.size,
            sector_size: create.sector_size,
            label: create.name.clone(),
            force: create.force,
            preallocate: create.preallocate,
        };
        let prepared = spawn_blocking(move || NewVolume::prepare(options)).await;
        let new = prepared.map_err(|e| panicked(&what, e))?.map_err(|e| volume_error(&what, &e))?;
        let context = EncryptionContext::for_volume(new.uuid(), create.purpose, create.context)
            .map_err(|e| error(ExitCode::Usage, &what, e, "Mend the --context options."))?;
        self.check_key(&what, &create.key, &context).await?;
        let made = self.kms.make_key(&create.key, &context).await;
        let key = made.map_err(|e| service_error(&what, &e))?;
        let made = self.kms.make_canary(&create.key, &context).await;
        let canary = made.map_err(|e| service_error(&what, &e))?;
        let committed = spawn_blocking(move || new.commit(&key.key, key.wrapped, canary)).await;
        committed.map_err(|e| panicked(&what, e))?.map_err(|e| volume_error(&what, &e))?;
        let config = VolumeConfig::new(create.backing);
        self.define(&create.name, &config).map_err(|e| {
            let why = format!("the volume is made, but its definition is not written: {e}");
            error(
                ExitCode::Failed,
                &what,
                why,
                "Write the definition by hand, or create it again with --force.",
            )
        })?;
        info!(volume = create.name, key = %create.key, purpose = %create.purpose, "volume created");
        let volume = Volume { config, attached: None };
        let status = Box::new(status(&create.name, &volume));
        volumes.insert(create.name, Arc::new(Mutex::new(volume)));
        Ok(status)
    }

    /// Refuses a key for which the rules of a volume's key do not hold, saying which.
    async fn check_key(
        &self,
        what: &str,
        arn: &KeyArn,
        context: &EncryptionContext,
    ) -> Answered<()> {
        let steps = self.kms.check_in(arn, context).await;
        let Some(failed) = steps.into_iter().find(|step| !step.ok) else { return Ok(()) };
        // Whether it is the customer's word or an outage decides the exit code: ask for it.
        let exit = match self.kms.describe(arn).await {
            Ok(_) => ExitCode::KeyDenied,
            Err(e) => match e.verdict {
                Verdict::Unavailable | Verdict::Credentials => ExitCode::KmsUnavailable,
                Verdict::Denied | Verdict::Mismatch | Verdict::Allowed => ExitCode::KeyDenied,
            },
        };
        let why = format!("key {arn} fails the rule `{}`: {}", failed.step, failed.detail);
        Err(error(exit, what, why, failed.remedy.unwrap_or_default()))
    }

    /// Writes a definition so that it is there whole or not at all.
    fn define(&self, name: &str, config: &VolumeConfig) -> io::Result<()> {
        let path = self.definition(name);
        let text = toml::to_string(config).map_err(io::Error::other)?;
        let new = path.with_extension("toml.new");
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        File::open(&self.setup.config.volumes_dir)?.sync_all()
    }

    async fn forget(&self, name: &str) -> Answered<()> {
        let what = format!("forget volume {name}");
        let volume = self.find(&what, name).await?;
        let volume = volume.lock().await;
        if volume.attached.is_some() {
            return Err(error(
                ExitCode::WrongState,
                &what,
                "it is attached",
                format!("Detach it first: byokctl detach {name}"),
            ));
        }
        let path = self.definition(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(error(ExitCode::Failed, &what, e, "Check the volumes directory."));
            }
            _ => {}
        }
        self.volumes.lock().await.remove(name);
        info!(volume = name, "volume forgotten; its data stays");
        Ok(())
    }

    async fn show(&self, name: &str) -> Answered<Box<VolumeStatus>> {
        let volume = self.find(&format!("show volume {name}"), name).await?;
        let volume = volume.lock().await;
        Ok(Box::new(status(name, &volume)))
    }

    async fn statuses(&self, name: Option<String>) -> Answered<Answer> {
        if let Some(name) = name {
            return Ok(Answer::Volumes { volumes: vec![*self.show(&name).await?] });
        }
        let volumes = self.volumes.lock().await.clone();
        let mut statuses = Vec::with_capacity(volumes.len());
        for (name, volume) in volumes {
            statuses.push(status(&name, &*volume.lock().await));
        }
        Ok(Answer::Volumes { volumes: statuses })
    }

    /// KMS as a volume's definition wants it reached.
    async fn kms_for(&self, what: &str, config: &VolumeConfig) -> Answered<Arc<AwsKms>> {
        let Some(arn) = config.role_arn.clone() else { return Ok(Arc::clone(&self.kms)) };
        let external_id = config.external_id.clone();
        let role = Some(RoleToAssume { arn, external_id, session_name: None });
        let settings = AwsSettings { role, ..self.setup.kms.clone() };
        let kms = AwsKms::connect(settings).await;
        kms.map(Arc::new)
            .map_err(|e| error(ExitCode::Failed, what, e, "Mend the volume's role settings."))
    }

    async fn attach(&self, name: &str, read_only: bool) -> Answered<Box<VolumeStatus>> {
        let what = format!("attach volume {name}");
        let volume = self.find(&what, name).await?;
        let mut volume = volume.lock().await;
        if volume.attached.is_some() {
            return Err(error(
                ExitCode::WrongState,
                &what,
                "it is attached already",
                format!("See `byokctl status {name}`."),
            ));
        }
        let config = volume.config.clone();
        let read_only = read_only || config.read_only;
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        let backing = config.backing.clone();
        let opened = spawn_blocking(move || LockedVolume::open(&backing, access)).await;
        let locked =
            opened.map_err(|e| panicked(&what, e))?.map_err(|e| volume_error(&what, &e))?;
        let kms = self.kms_for(&what, &config).await?;
        let unwrapped = kms.unwrap_key(&locked.header().token().wrapped).await;
        let (key, proof) = unwrapped.map_err(|e| service_error(&what, &e))?;
        let unlocked = locked.unlock(&key).map_err(|(_, e)| volume_error(&what, &e))?;
        let purpose = unlocked.header().token().wrapped.context.purpose();
        let options = ExportOptions {
            name: name.to_owned(),
            description: purpose.map(|p| format!("byokd volume for {p}")).unwrap_or_default(),
            read_only,
            trim: config.trim,
            max_connections: self.setup.config.max_connections,
            direct: match config.direct {
                Auto::Auto => DirectIo::Auto,
                Auto::Off => DirectIo::Off,
            },
        };
        let export = Export::open(unlocked, key, options).map_err(|e| export_error(&what, &e))?;
        let socket = self.setup.config.nbd_dir.join(format!("{name}.sock"));
        let table = self.table.only(Arc::clone(&export));
        let listener = Listener::nbd_unix(&socket, self.peers.clone(), table).map_err(|e| {
            let why = format!("cannot listen on {}: {e}", socket.display());
            error(ExitCode::Failed, &what, why, "Check the nbd_dir of byokd.toml.")
        })?;
        self.table.insert(Arc::clone(&export));
        let policy = config.lease.policy(self.setup.policy);
        let keeper = Keeper::start(Arc::clone(&export), kms, policy);
        info!(volume = name, request_id = proof.request_id, socket = %socket.display(), "attached");
        volume.attached = Some(Attached { export, keeper, socket, _listener: listener });
        Ok(Box::new(status(name, &volume)))
    }

    async fn detach(&self, name: &str) -> Answered<Box<VolumeStatus>> {
        let what = format!("detach volume {name}");
        let volume = self.find(&what, name).await?;
        let mut volume = volume.lock().await;
        let Some(attached) = volume.attached.take() else {
            return Err(error(
                ExitCode::WrongState,
                &what,
                "it is not attached",
                format!("See `byokctl status {name}`."),
            ));
        };
        self.end(name, attached, FenceReason::Detached).await.map_err(|e| {
            let why = format!("it is detached and its key destroyed, but the last flush failed: {e}");
            error(ExitCode::Failed, &what, why, "What was written since a client's last flush may be lost; check the backing store.")
        })?;
        Ok(Box::new(status(name, &volume)))
    }

    async fn end(&self, name: &str, attached: Attached, reason: FenceReason) -> io::Result<()> {
        self.table.remove(name);
        let Attached { export, keeper, _listener: listener, .. } = attached;
        drop((listener, keeper));
        let stopped = spawn_blocking(move || export.stop(reason, DRAIN)).await;
        match stopped.unwrap_or_else(|e| Err(io::Error::other(e))) {
            Ok(_key_destroyed) => {
                info!(volume = name, ?reason, "detached: flushed, the key is destroyed");
                Ok(())
            }
            Err(e) => {
                error!(volume = name, error = %e, "detached: the key is destroyed, the last flush failed");
                Err(e)
            }
        }
    }

    /// Attaches what should be attached, again and again while KMS gives no verdict.
    async fn attach_all(self: Arc<Self>) {
        let mut waiting = Vec::new();
        for (name, volume) in self.volumes.lock().await.clone() {
            if volume.lock().await.config.attach == AttachWhen::Auto {
                waiting.push(name);
            }
        }
        let tries = waiting.into_iter().map(|name| {
            let daemon = Arc::clone(&self);
            tokio::spawn(async move {
                while let Err(e) = daemon.attach(&name, false).await {
                    if e.exit != ExitCode::KmsUnavailable && e.exit != ExitCode::KeyDenied {
                        error!(volume = name, why = e.why, remedy = e.remedy, "not attached");
                        return;
                    }
                    warn!(volume = name, why = e.why, remedy = e.remedy, "not attached yet");
                    tokio::time::sleep(RETRY).await;
                }
            })
        });
        for one in tries.collect::<Vec<_>>() {
            // One that was cut off is being stopped.
            let _ended = one.await;
        }
    }

    /// Ends service of every volume, all at the same time.
    async fn stop(&self) {
        let volumes = self.volumes.lock().await.clone();
        let ends = volumes.into_iter().map(async |(name, volume)| {
            if let Some(attached) = volume.lock().await.attached.take() {
                // What failed was logged.
                let _ended = self.end(&name, attached, FenceReason::Stopping).await;
            }
        });
        futures_join(ends).await;
    }
}

/// Waits for all of them at once.
async fn futures_join(all: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        all.retain_mut(|one| one.as_mut().poll(context).is_pending());
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

fn status(name: &str, volume: &Volume) -> VolumeStatus {
    let mut status = VolumeStatus {
        name: name.to_owned(),
        state: VolumeState::Detached,
        uuid: None,
        purpose: None,
        size: None,
        sector_size: None,
        backing: volume.config.backing.clone(),
        key: None,
        context: None,
        header_seqid: None,
        header_note: None,
        read_only: volume.config.read_only,
        uri: None,
        connections: 0,
        lease: None,
    };
    match &volume.attached {
        Some(attached) => {
            let report = attached.keeper.report();
            let unlocked = attached.export.volume();
            describe(&mut status, unlocked.header());
            status.header_note = unlocked.recovery().map(str::to_owned);
            status.read_only = attached.export.options().read_only;
            status.connections = attached.export.connections();
            let socket = attached.socket.display();
            status.uri = Some(format!("nbd+unix:///{name}?socket={socket}"));
            status.state = match (report.serves, report.state) {
                (false, _) => VolumeState::Fenced,
                (true, LeaseWord::Unverified) => VolumeState::Unverified,
                (true, _) => VolumeState::Serving,
            };
            status.lease = Some(lease_status(report));
        }
        None => match inspect(&volume.config.backing) {
            Ok((header, note)) => {
                describe(&mut status, &header);
                status.header_note = note;
            }
            Err(error) => status.header_note = Some(error.to_string()),
        },
    }
    status
}

fn describe(status: &mut VolumeStatus, header: &Header) {
    let token = header.token();
    let sector_size: SectorSize = header.segment().sector_size;
    status.uuid = Some(header.uuid());
    status.purpose = token.wrapped.context.purpose();
    status.size = Some(token.capacity);
    status.sector_size = Some(sector_size);
    status.key = Some(token.wrapped.key_arn.clone());
    status.context = Some(token.wrapped.context.clone());
    status.header_seqid = Some(header.seqid());
}

fn lease_status(report: KeyReport) -> LeaseStatus {
    let word = serde_json::to_value(report.state).ok();
    LeaseStatus {
        state: word.and_then(|w| w.as_str().map(str::to_owned)).unwrap_or_default(),
        since: report.since.to_string(),
        last_success: Some(report.last_success.to_string()),
        allowance_left: report.allowance_left.map(|left| left.as_secs()),
        fence_ms: report.fenced_after.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
        evidence: report.evidence,
    }
}
