//! Puts the parts together: start, serve the control API, stop.
//!
//! A [`Daemon`] is shared by the control connections. It keeps the definitions of volumes and what
//! is attached; what is done to them stands in `create`, `volumes`, `stop`, `keys` and `rewrap`, what is said of
//! them in `status`.

pub mod args;
mod audited;
mod create;
mod devices;
mod in_kernel;
mod keys;
mod left;
mod look;
mod patience;
mod refusals;
mod reload;
mod resize;
mod rewrap;
mod service;
mod status;
mod stop;
mod volumes;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::attachment::Attachment;
use crate::audit::chain::Hash;
use crate::audit::record::Peer;
use crate::audit::{Audit, AuditOpenError, AuditSettings};
use crate::config::{
    AuditConfig, Config, ConfigError, ConfigErrors, Definitions, HttpConfig, SecretMemory,
    VolumeConfig, load_each_volume,
};
use crate::control::server::ControlServer;
use crate::control::{API_VERSION, Answer, Problem, Request, VolumeStatus};
use crate::crypt::{SelfTestError, self_test};
use crate::daemon::devices::AttachHow;
use crate::daemon::look::Seen;
use crate::daemon::refusals::Answered;
use crate::exit::ExitCode;
use crate::export::{Export, ExportTable};
use crate::http::{Http, HttpError};
use crate::keeper::group::Groups;
use crate::keeper::threads::apart;
use crate::keeper::{Keeper, Teller};
use crate::key::lease::{LeasePolicy, ProbePlan};
use crate::key::secret::use_locked_pages_only;
use crate::key::wrapped::Role;
use crate::kms::aws::{AwsKms, AwsSettings, AwsSettingsError};
use crate::kms::dev::{DEV_REGION, DevKms, DevKmsError};
use crate::listener::{Listener, Peers};
use crate::metrics::counters::VolumeCounters;
use crate::progress::Progress;
use crate::systemd::{Notifier, Systemd, Watchdog};
use crate::units::rfc3339;

/// How soon the control socket is heard of first.
const STARTING: Duration = Duration::from_secs(10);

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
    /// The audit trail cannot be kept.
    #[error(transparent)]
    Audit(#[from] AuditOpenError),
    /// Another daemon is there.
    #[error("another byokd runs with {}", .0.display())]
    Running(PathBuf),
    /// The HTTP listener.
    #[error(transparent)]
    Http(#[from] HttpError),
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
            Self::Running(_) | Self::Audit(AuditOpenError::InUse(_)) => ExitCode::WrongState,
            Self::Audit(_)
            | Self::SelfTest(_)
            | Self::Kms(_)
            | Self::DevKms(_)
            | Self::Http(_)
            | Self::Io { .. } => ExitCode::Failed,
        }
    }

    /// What to do about it, one sentence.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::SelfTest(_) => "Do not serve volumes with this machine or this build; report it.",
            Self::Config(_) => "Mend the lines named above.",
            Self::Kms(AwsSettingsError::NoCertificates) => {
                "Install the package ca-certificates, or name a bundle in SSL_CERT_FILE."
            }
            Self::Kms(_) => "Set `region` under [kms] in byokd.toml.",
            Self::DevKms(_) => "Check the state directory.",
            Self::Audit(AuditOpenError::InUse(_)) => {
                "Stop that one first, or give each a directory of its own under [audit]."
            }
            Self::Audit(_) => "Check the settings under [audit] in byokd.toml.",
            Self::Running(_) => "Stop that one first, or use another directory.",
            Self::Http(_) => "Mend [http] in byokd.toml.",
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
    /// How probes of many volumes are spread.
    pub plan: ProbePlan,
    /// Run the development KMS with its state here.
    pub dev_state: Option<PathBuf>,
    /// The file of the settings and the hash of what it held.
    pub file: Option<(PathBuf, Hash)>,
    /// How the audit trail is kept; in memory only if not at all.
    pub audit: Option<AuditSettings>,
}

impl Setup {
    /// From a configuration file.
    #[must_use]
    pub fn from_config(config: Config, file: Option<(PathBuf, Hash)>) -> Self {
        let kms = AwsSettings {
            region: config.kms.region.clone(),
            endpoint: config.kms.endpoint.clone(),
            fips: config.kms.fips,
            profile: config.kms.profile.clone(),
            witness: config.kms.witness_key.clone(),
            disconnected_store: config.kms.disconnected_store,
            ..AwsSettings::default()
        };
        let policy = config.lease.policy(LeasePolicy::default());
        let plan = config.kms.plan();
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let audit = config.audit.settings(credentials.as_deref());
        Self { config, kms, policy, plan, dev_state: None, file, audit }
    }

    /// For trials: everything under `dir`, with the development KMS; HTTP on that port of this
    /// machine, any free one if it is 0.
    #[must_use]
    pub fn dev(dir: &Path, probe_interval: Duration, http_port: u16) -> Self {
        let audit = AuditConfig { directory: dir.join("audit"), ..AuditConfig::default() };
        // `http-endpoint` in `dir` says which port.
        let listen = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, http_port)));
        let config = Config {
            http: HttpConfig { listen, ..HttpConfig::default() },
            volumes_dir: dir.join("volumes.d"),
            control_socket: dir.join("byokd.sock"),
            nbd_dir: dir.join("nbd"),
            kernel_socket: dir.join("kernel.sock"),
            ..Config::default()
        };
        let kms = AwsSettings {
            region: Some(DEV_REGION.to_owned()),
            // The development KMS accepts any credentials; these are no secret.
            static_credentials: Some(("dev".to_owned(), "dev".to_owned())),
            ..AwsSettings::default()
        };
        let policy = LeasePolicy { interval: probe_interval, ..LeasePolicy::default() };
        let plan = ProbePlan::default();
        let audit = audit.settings(None);
        Self { config, kms, policy, plan, dev_state: Some(dir.to_owned()), file: None, audit }
    }
}

/// A running daemon.
pub struct Daemon {
    setup: Setup,
    kms: Arc<AwsKms>,
    /// KMS by way of each role that a volume names.
    roles: tokio::sync::Mutex<BTreeMap<Role, Arc<AwsKms>>>,
    /// Volumes that share a key.
    groups: Groups,
    table: ExportTable,
    progress: Progress,
    audit: Arc<Audit>,
    /// Hears the names of volumes whose kernel devices have gone by themselves.
    gone: mpsc::UnboundedSender<String>,
    volumes: Mutex<BTreeMap<String, Arc<Volume>>>,
    /// Names of volumes that are being made.
    creating: Mutex<BTreeSet<String>>,
    /// One after the other: what was read first is not to be in force last.
    reloading: tokio::sync::Mutex<()>,
    /// Attach volumes that should be.
    tries: Mutex<JoinSet<()>>,
    /// No volume goes into service any more.
    stopping: AtomicBool,
    /// When it started, RFC 3339.
    started: String,
    /// Settings that were changed since the start.
    at_restart: Mutex<Option<Problem>>,
    /// Definitions that could not be read at the start, by their files.
    skipped: Mutex<BTreeMap<PathBuf, Problem>>,
    /// Whether the devices that an earlier daemon left were looked for.
    resumed: tokio::sync::watch::Sender<bool>,
}

/// A volume that is known.
struct Volume {
    /// Held while it is attached, detached or forgotten: one at a time.
    changing: tokio::sync::Mutex<()>,
    /// Counts how often an operator took it out of service: whoever attaches it gives up.
    taken_out: tokio::sync::watch::Sender<u64>,
    /// Has the daemon's next try to attach it begin.
    try_now: tokio::sync::Notify,
    /// The store that was opened last. Held while it is, however long that takes: one that hangs
    /// holds one thread.
    opening: Mutex<(PathBuf, Arc<tokio::sync::Mutex<()>>)>,
    /// Told when its service has ended.
    left: tokio::sync::Notify,
    /// Held while its key is rewrapped: one at a time.
    rewrapping: tokio::sync::Mutex<()>,
    now: Mutex<Now>,
    seen: Arc<Seen>,
    counters: Arc<VolumeCounters>,
}

/// How a volume is at this moment.
struct Now {
    config: VolumeConfig,
    /// The hash of its definition as it was attached last.
    definition: Option<Hash>,
    service: Service,
    /// Its device in the kernel, which may be there before and after its service.
    device: Option<Arc<Attachment>>,
    /// Why it was not attached the last time that was tried.
    problem: Option<Problem>,
    /// Keys of its definition that were changed since it was attached.
    at_next_attach: Vec<&'static str>,
    /// The daemon is to attach it, and has not tried yet.
    awaited: bool,
    tries: Tries,
}

/// What the daemon does by itself to attach a volume.
#[derive(Default)]
struct Tries {
    /// Until an operator takes it out of service.
    wanted: bool,
    /// A task makes them; it alone ends this.
    running: bool,
}

/// Whether a volume is in service.
enum Service {
    Detached,
    /// Its key is here once KMS has given it.
    Attaching(Option<Keyed>),
    Attached(Attached),
    Detaching(Keyed),
}

/// A volume whose key is here, and the way to its keeper: whatever is waited for, an operator can
/// fence it.
#[derive(Clone)]
struct Keyed {
    export: Arc<Export>,
    teller: Teller,
}

impl Service {
    /// The volume and the way to its keeper, while its key may be here.
    fn keyed(&self) -> Option<Keyed> {
        match self {
            Self::Attached(attached) => Some(attached.keyed()),
            Self::Attaching(keyed) => keyed.clone(),
            Self::Detaching(keyed) => Some(keyed.clone()),
            Self::Detached => None,
        }
    }
}

/// A volume in service. Dropped, it stops probing and listening.
struct Attached {
    export: Arc<Export>,
    keeper: Keeper,
    socket: PathBuf,
    _listener: Listener,
}

impl Attached {
    fn keyed(&self) -> Keyed {
        Keyed { export: Arc::clone(&self.export), teller: self.keeper.teller() }
    }
}

impl Volume {
    fn new(config: VolumeConfig) -> Self {
        let now = Now {
            config,
            definition: None,
            service: Service::Detached,
            device: None,
            problem: None,
            at_next_attach: Vec::new(),
            awaited: false,
            tries: Tries::default(),
        };
        Self {
            changing: tokio::sync::Mutex::default(),
            taken_out: tokio::sync::watch::Sender::default(),
            try_now: tokio::sync::Notify::new(),
            opening: Mutex::default(),
            left: tokio::sync::Notify::new(),
            rewrapping: tokio::sync::Mutex::default(),
            now: Mutex::new(now),
            seen: Arc::default(),
            counters: Arc::default(),
        }
    }

    /// Looks at it, or changes it, without waiting for anybody.
    fn with<T>(&self, look: impl FnOnce(&mut Now) -> T) -> T {
        look(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// It is detached from now on. What belonged to its service may take long to drop: not while
    /// others want to look at the volume.
    fn leave_service(&self) -> Service {
        let left = self.with(|now| std::mem::replace(&mut now.service, Service::Detached));
        self.left.notify_waiters();
        left
    }

    /// Waits until its service has ended, if that is under way, or for so long.
    async fn ended(&self, within: Duration) {
        let ended = async {
            loop {
                let left = self.left.notified();
                if !self.with(|now| matches!(now.service, Service::Detaching(_))) {
                    return;
                }
                left.await;
            }
        };
        // What takes longer is given up.
        let _ended = timeout(within, ended).await;
    }
}

/// How long systemd waits for a daemon that stops, from each time that it is told to: the unit's `TimeoutStopSec=`.
const STOPPING: Duration = Duration::from_secs(6);

/// How long a stop takes at most, whatever hangs.
const LONGEST_STOP: Duration = Duration::from_secs(40);

/// Runs a daemon until it is told to stop, and stops it cleanly.
///
/// # Errors
/// It could not start.
pub async fn run(mut setup: Setup, systemd: Systemd) -> Result<(), StartError> {
    if setup.config.secret_memory == SecretMemory::Locked {
        use_locked_pages_only();
    }
    self_test()?;
    let mut directories = vec![setup.config.volumes_dir.clone(), setup.config.nbd_dir.clone()];
    directories.extend(setup.dev_state.clone());
    directories.extend(setup.config.control_socket.parent().map(Path::to_owned));
    for dir in directories {
        make_dir(&dir).map_err(StartError::io("make the directory", &dir))?;
    }
    let _alone = alone(&setup.config.nbd_dir)?;
    let dev = match &setup.dev_state {
        Some(dir) => Some(start_dev(dir, &mut setup.kms).await?),
        None => None,
    };
    let (volumes, skipped) = load_each_volume(&setup.config.volumes_dir)?;
    let control = setup.config.control_socket.clone();
    let settings = &setup.config;
    let peers = Peers::of(settings.owner.as_deref(), settings.group.as_deref())
        .map_err(StartError::io("find the owner of", &control))?;
    Peers::of(settings.nbd_owner.as_deref(), settings.nbd_group.as_deref())
        .map_err(StartError::io("find the owner of sockets in", &settings.nbd_dir))?;
    let table = ExportTable::new();
    let tcp = match setup.config.tcp_listen {
        Some(address) => Some(
            Listener::nbd_tcp(address, table.clone())
                .await
                .map_err(StartError::io("listen on", Path::new(&address.to_string())))?,
        ),
        None => None,
    };
    let audit = match setup.audit.clone() {
        Some(settings) => Audit::open(settings)?,
        None => Audit::in_memory(),
    };
    let calls = Arc::clone(&audit);
    setup.kms.observer = Some(Arc::new(move |call| calls.called(&call)));
    let kms = Arc::new(AwsKms::connect(setup.kms.clone()).await?);
    audited::start(&audit, &setup, &kms, &volumes, &skipped);
    let (daemon, devices_gone) =
        Daemon::new(setup, kms, table, Arc::clone(&audit), volumes, skipped);
    let mut term =
        signal(SignalKind::terminate()).map_err(StartError::io("watch signals for", &control))?;
    let told_to_stop =
        signal(SignalKind::terminate()).map_err(StartError::io("watch signals for", &control))?;
    let mut int =
        signal(SignalKind::interrupt()).map_err(StartError::io("watch signals for", &control))?;
    let hup =
        signal(SignalKind::hangup()).map_err(StartError::io("watch signals for", &control))?;
    let Systemd { notifier, mut passed, watchdog } = systemd;
    let part = daemon.progress.part("the control socket", STARTING);
    let server = ControlServer::start(&control, peers, Arc::clone(&daemon), part)
        .map_err(StartError::io("listen on", &control))?;
    let http = Http::start(&daemon.setup.config.http, &daemon).await?;
    if let (Some(dir), Some(address)) = (&daemon.setup.dev_state, http.address()) {
        let path = dir.join("http-endpoint");
        std::fs::write(&path, format!("http://{address}\n"))
            .map_err(StartError::io("write", &path))?;
    }
    let watchdog = match watchdog {
        Some(interval) => Some(
            Watchdog::start(notifier.clone(), interval, daemon.progress.clone())
                .map_err(StartError::io("start the watchdog of", &control))?,
        ),
        None => None,
    };
    let stopping = tokio::spawn(takes_time(notifier.clone(), told_to_stop));
    // Nothing fails from here on: the next daemon would miss what systemd forgets now.
    daemon.resume_devices(passed.take(devices::is_stored), &notifier).await;
    passed.close_rest(&notifier);
    let devices = tokio::spawn(Arc::clone(&daemon).watch_devices(devices_gone));
    // Whether it is ready, volumes that are to be attached decide.
    info!(control = %control.display(), version = env!("CARGO_PKG_VERSION"), "started");
    let (tried, each_was_tried) = mpsc::channel(1);
    daemon.attach_all(tried);
    // Whoever detaches a volume from here on finds that it is tried.
    daemon.resumed.send_replace(true);
    let reloading = tokio::spawn(Arc::clone(&daemon).reload_when_told(hup));
    let by = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
        () = daemon.tell(&notifier, each_was_tried) => "",
    };
    info!("stopping: {by}");
    notifier.stopping(&format!("stopping: {}", daemon.summary()));
    // Before anything is cut off: nothing else begins in its place.
    daemon.stopping.store(true, Ordering::SeqCst);
    reloading.abort();
    let tries = std::mem::take(&mut *daemon.tries.lock().unwrap_or_else(PoisonError::into_inner));
    { tries }.shutdown().await;
    drop((server, tcp, http));
    daemon.stop(&notifier).await;
    devices.abort();
    drop(watchdog);
    drop(dev);
    let _stopped = apart("audit-stop", move || audit.stop(by)).await;
    stopping.abort();
    info!("stopped");
    Ok(())
}

/// Has systemd wait once the daemon is told to stop, also while it still starts, though not for ever. A
/// process that has stopped may be kept by a store that hangs: for that one systemd does not wait long,
/// since the next daemon has other volumes to serve.
async fn takes_time(notifier: Notifier, mut told: Signal) {
    let step = STOPPING / 3;
    if told.recv().await.is_some() {
        let mut tick = tokio::time::interval(step);
        for _ in 0..LONGEST_STOP.as_secs() / step.as_secs() {
            tick.tick().await;
            notifier.extend_timeout(STOPPING);
        }
    }
}

/// Makes a directory that is not there. Others may pass through it to the sockets that are theirs
/// to use, and list nothing.
fn make_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
    // Against the umask.
    std::fs::set_permissions(dir, Permissions::from_mode(0o711))
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

impl Daemon {
    /// One that serves nothing yet, and what hears the names of volumes whose kernel devices have gone.
    fn new(
        setup: Setup,
        kms: Arc<AwsKms>,
        table: ExportTable,
        audit: Arc<Audit>,
        volumes: Definitions,
        skipped: Vec<ConfigError>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<String>) {
        let known = volumes.into_iter().map(|(name, config)| (name, Arc::new(Volume::new(config))));
        let (gone, devices_gone) = mpsc::unbounded_channel();
        let daemon = Self {
            kms,
            roles: tokio::sync::Mutex::default(),
            groups: Groups::new(setup.plan),
            table,
            progress: Progress::default(),
            audit,
            gone,
            volumes: Mutex::new(known.collect()),
            creating: Mutex::default(),
            reloading: tokio::sync::Mutex::default(),
            tries: Mutex::default(),
            stopping: AtomicBool::new(false),
            started: rfc3339(Timestamp::now()),
            at_restart: Mutex::default(),
            skipped: Mutex::new(skipped.into_iter().map(reload::skipped).collect()),
            resumed: tokio::sync::watch::Sender::new(false),
            setup,
        };
        (Arc::new(daemon), devices_gone)
    }

    /// Answers one request of the control API; `by` asks.
    pub async fn answer(self: &Arc<Self>, request: Request, by: Peer) -> Answer {
        self.has_resumed().await;
        let asked = self.asked(&request, by);
        let answered = Box::pin(self.carry_out(request)).await;
        self.answered(asked, &answered);
        answered.unwrap_or_else(Answer::Error)
    }

    /// Whoever asked for something earlier would not find the devices that there are.
    async fn has_resumed(&self) {
        let mut resumed = self.resumed.subscribe();
        while !*resumed.borrow_and_update() {
            if resumed.changed().await.is_err() {
                return;
            }
        }
    }

    async fn carry_out(self: &Arc<Self>, request: Request) -> Answered<Answer> {
        match request {
            Request::Version => Ok(Answer::Version {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                api: API_VERSION,
            }),
            Request::VolumeCreate(create) => self.create(create).await.map(Answer::Volume),
            Request::VolumeList => Ok(self.every_status().await),
            Request::Status { name: None } => Ok(self.every_status().await),
            Request::Status { name: Some(name) } => {
                self.one_status(&name).await.map(|one| self.volumes_are(vec![one]))
            }
            Request::VolumeShow { name } => {
                self.one_status(&name).await.map(|one| Answer::Volume(Box::new(one)))
            }
            Request::VolumeResize { name, size } => {
                self.resize(&name, size).await.map(Answer::Volume)
            }
            Request::Reload => self.reload().await.map(Answer::Reloaded),
            Request::VolumeForget { name } => self.forget(&name).await.map(|()| Answer::Done),
            Request::Attach { name, read_only, device, connections } => {
                let what = format!("attach volume {name}");
                let attached = match AttachHow::of(&what, read_only, device.as_deref(), connections)
                {
                    Ok(how) => {
                        let attached = self.attach(&name, how).await;
                        if attached.is_err() {
                            self.try_on(&name);
                        }
                        attached.map(Answer::Volume).map_err(|not| not.error)
                    }
                    Err(refused) => Err(refused),
                };
                if let Err(e) = &attached {
                    warn!(volume = name, why = e.why, remedy = e.remedy, "not attached");
                }
                attached
            }
            Request::Detach { name, force } => self.detach(&name, force).await.map(Answer::Volume),
            Request::KeySuspend { name } => self.suspend(&name).await.map(Answer::Volume),
            Request::KeyResume { name } => self.resume(&name).await.map(Answer::Volume),
            Request::KeyRewrap { name, key } => self.rewrap(&name, key).await.map(Answer::Volume),
            Request::KeyRecheck { target } => {
                self.recheck(&target).await.map(|volumes| self.volumes_are(volumes))
            }
            Request::AuditRecords { volume, since, last } => {
                let records = self.audit.recent(volume.as_deref(), since, last);
                Ok(Answer::AuditRecords {
                    records: records.iter().map(|record| (**record).clone()).collect(),
                })
            }
            Request::AuditHead => Ok(Answer::AuditHead(Box::new(self.audit.status()))),
            Request::KeyCheck { arn, role } => {
                match self.kms_for("check a key", role.as_ref()).await {
                    Ok(kms) => Ok(Answer::KeyCheck { steps: kms.check(&arn).await }),
                    Err(refused) => Err(refused),
                }
            }
        }
    }

    async fn one_status(&self, name: &str) -> Answered<VolumeStatus> {
        let volume = self.find(&format!("show volume {name}"), name).await?;
        Ok(status::status(name, &volume).await)
    }

    async fn every_status(&self) -> Answer {
        let all: Vec<_> = self.volumes().clone().into_iter().collect();
        self.volumes_are(status::each(all).await)
    }

    fn volumes_are(&self, volumes: Vec<VolumeStatus>) -> Answer {
        Answer::Volumes { volumes, problems: self.problems() }
    }

    /// The audit trail, of which others want to know what happened lately.
    #[must_use]
    pub fn audit(&self) -> &Arc<Audit> {
        &self.audit
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Volume>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn creating(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
