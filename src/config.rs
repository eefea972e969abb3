//! `byokd.toml` and `volumes.d/NAME.toml`: as written, checked, as used.
//!
//! Strict: a key that is not known is an error that names file, line and the nearest known key, and
//! all errors of all files are told at once.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use crate::audit::chain::Hash;
use crate::audit::{AuditSettings, OnFailure};
use crate::kernel::MAX_CONNECTIONS;
use crate::kernel::sysfs::index_of;
use crate::key::lease::{Allowance, DisconnectedStore, LeasePolicy, ProbePlan};
use crate::key::wrapped::{KeyArn, Role};
use crate::log::export::collector;
use crate::units::Size;

/// What is wrong with the files, all of it.
#[derive(Debug, Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<ConfigError>);

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// In which file.
    pub file: PathBuf,
    /// On which line, counted from one, if it is on one.
    pub line: Option<usize>,
    /// What.
    pub what: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.what),
            None => write!(f, "{}: {}", self.file.display(), self.what),
        }
    }
}

/// The daemon's settings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where definitions of volumes lie; next to the file if relative.
    pub volumes_dir: PathBuf,
    /// The control socket.
    pub control_socket: PathBuf,
    /// Where each volume's NBD socket is made.
    pub nbd_dir: PathBuf,
    /// Where the helper listens that attaches kernel devices.
    pub kernel_socket: PathBuf,
    /// User that owns the control socket; the daemon's own if absent.
    pub owner: Option<String>,
    /// Group that may use the control socket, and so all of byokd.
    pub group: Option<String>,
    /// User that owns the NBD sockets; the daemon's own if absent. A volume may say otherwise.
    pub nbd_owner: Option<String>,
    /// Group that may use the NBD sockets. A volume may say otherwise.
    pub nbd_group: Option<String>,
    /// Also listen for NBD here; loopback only.
    pub tcp_listen: Option<SocketAddr>,
    /// Connections to one volume.
    pub max_connections: usize,
    /// What keys lie in.
    pub secret_memory: SecretMemory,
    /// How AWS KMS is reached.
    pub kms: KmsConfig,
    /// How leases are kept.
    pub lease: LeaseConfig,
    /// How the audit trail is kept.
    pub audit: AuditConfig,
    /// Metrics, health, the JSON API and the console.
    pub http: HttpConfig,
    /// Where log lines go besides standard error.
    pub log: LogConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            volumes_dir: "/etc/byokd/volumes.d".into(),
            control_socket: "/run/byokd/byokd.sock".into(),
            nbd_dir: "/run/byokd/nbd".into(),
            kernel_socket: crate::kernel::SOCKET.into(),
            owner: None,
            group: None,
            nbd_owner: None,
            nbd_group: None,
            tcp_listen: None,
            max_connections: 1024,
            secret_memory: SecretMemory::default(),
            kms: KmsConfig::default(),
            lease: LeaseConfig::default(),
            audit: AuditConfig::default(),
            http: HttpConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// `[audit]`: how the audit trail is kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// Whether it is kept at all.
    pub enabled: bool,
    /// Where its files lie.
    pub directory: PathBuf,
    /// The size of a file after which the next one is begun.
    pub file_size: Size,
    /// Files that are kept; 0: all.
    pub keep: usize,
    /// Records between two checkpoints.
    pub checkpoint_every: u64,
    /// An Ed25519 key in PEM that checkpoints are signed with: a path, or the name of a systemd
    /// credential.
    pub signing_key: Option<PathBuf>,
    /// What happens if it cannot be written.
    pub on_failure: OnFailure,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            directory: "/var/lib/byokd/audit".into(),
            file_size: Size(16 << 20),
            keep: 0,
            checkpoint_every: 256,
            signing_key: None,
            on_failure: OnFailure::default(),
        }
    }
}

impl AuditConfig {
    /// How it is kept, if it is; `credentials` is systemd's directory of them.
    #[must_use]
    pub fn settings(&self, credentials: Option<&Path>) -> Option<AuditSettings> {
        let key = self.signing_key.as_ref().map(|key| match credentials {
            Some(directory) if key.is_relative() => directory.join(key),
            Some(_) | None => key.clone(),
        });
        self.enabled.then(|| AuditSettings {
            directory: self.directory.clone(),
            file_size: self.file_size.0,
            keep: self.keep,
            checkpoint_every: self.checkpoint_every,
            signing_key: key,
            on_failure: self.on_failure,
        })
    }
}

/// `[http]`: where metrics, health, the JSON API and the console are served; nowhere by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// An address; without a certificate and a token a loopback address.
    pub listen: Option<SocketAddr>,
    /// A certificate chain in PEM, to serve that address with TLS.
    pub certificate: Option<PathBuf>,
    /// Its key in PEM.
    pub certificate_key: Option<PathBuf>,
    /// A unix socket.
    pub socket: Option<PathBuf>,
    /// Group that may use that socket.
    pub group: Option<String>,
    /// A file that holds a token; who has it may read metrics and the API, and nobody else.
    pub token_file: Option<PathBuf>,
}

impl HttpConfig {
    fn check(&self, wrong: &mut impl FnMut(&str)) {
        if self.certificate.is_some() != self.certificate_key.is_some() {
            wrong("http.certificate and http.certificate_key go together: name both files");
        }
        if self.certificate.is_some() && self.listen.is_none() {
            wrong("http.certificate without http.listen: the socket has no TLS");
        }
        if self.listen.is_none_or(|address| address.ip().is_loopback()) {
            return;
        }
        if self.certificate.is_none() {
            wrong("http.listen is not a loopback address: set http.certificate, for TLS");
        }
        if self.token_file.is_none() {
            wrong("http.listen is not a loopback address: set http.token_file, or everybody reads");
        }
    }
}

/// `[log]`: where log lines go besides standard error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// The URL of an OpenTelemetry collector.
    pub otlp_endpoint: Option<String>,
}

/// `[kms]`: how AWS KMS is reached. Credentials come from the SDK's ordinary chain.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KmsConfig {
    /// The region; the SDK's own if absent.
    pub region: Option<String>,
    /// Another endpoint than the region's.
    pub endpoint: Option<String>,
    /// Use the FIPS endpoint.
    pub fips: bool,
    /// A profile of the shared configuration files.
    pub profile: Option<String>,
    /// A key of the operator's own, asked with the same credentials when a customer's key denies
    /// access: if it is denied as well, the fault is ours.
    pub witness_key: Option<KeyArn>,
    /// What it means that a custom key store is disconnected.
    pub disconnected_store: DisconnectedStore,
    /// Up to this many volumes on a key and role, each is probed every interval; more take turns.
    pub probe_each_up_to: usize,
    /// Probes a second of the whole node, at most.
    pub max_probes_per_second: u32,
}

impl Default for KmsConfig {
    fn default() -> Self {
        let plan = ProbePlan::default();
        Self {
            region: None,
            endpoint: None,
            fips: false,
            profile: None,
            witness_key: None,
            disconnected_store: DisconnectedStore::default(),
            probe_each_up_to: plan.each_up_to,
            max_probes_per_second: plan.most_per_second,
        }
    }
}

impl KmsConfig {
    /// How probes of many volumes are spread.
    #[must_use]
    pub fn plan(&self) -> ProbePlan {
        ProbePlan { each_up_to: self.probe_each_up_to, most_per_second: self.max_probes_per_second }
    }
}

/// `[lease]`: how leases are kept; a volume may say otherwise for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseConfig {
    /// Time between probes, at least 1 s; default 10 s.
    pub probe_interval: Option<Seconds>,
    /// The outage allowance, or `never`; default 1 h.
    pub fail_closed_after: Option<FailClosedAfter>,
    /// Successes in a row that open a closed fence; default 2.
    pub restore_after: Option<u32>,
}

impl LeaseConfig {
    /// The policy: what this says, else what `base` says.
    #[must_use]
    pub fn policy(&self, base: LeasePolicy) -> LeasePolicy {
        LeasePolicy {
            interval: self.probe_interval.map_or(base.interval, |s| s.0),
            allowance: self.fail_closed_after.map_or(base.allowance, |f| f.0),
            restore_after: self.restore_after.unwrap_or(base.restore_after).max(1),
            confirm: base.confirm,
        }
    }
}

/// A duration written like `10s`, `5m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Seconds(pub Duration);

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a duration; write it like `10s`, `500ms`, `5m` or `1h`")]
pub struct DurationError(String);

impl std::str::FromStr for Seconds {
    type Err = DurationError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || DurationError(text.to_owned());
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let millis = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "" if number == 0 => 0,
            _ => return Err(wrong()),
        };
        Ok(Self(Duration::from_millis(number.checked_mul(millis).ok_or_else(wrong)?)))
    }
}

impl TryFrom<String> for Seconds {
    type Error = DurationError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// An outage allowance: a duration, or `never`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct FailClosedAfter(pub Allowance);

impl TryFrom<String> for FailClosedAfter {
    type Error = DurationError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text == "never" {
            return Ok(Self(Allowance::Never));
        }
        text.parse().map(|Seconds(duration)| Self(Allowance::For(duration)))
    }
}

/// Whether something is done by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// It is.
    #[default]
    Auto,
    /// Only when asked for.
    Off,
}

/// What requests do when the key is denied, or the outage allowance is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDenial {
    /// They fail at once.
    #[default]
    Error,
    /// They wait for a while, without the key.
    Hold,
}

/// `[[on_fence]]`: a program to run after a fence.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnFence {
    /// The program, by its absolute path, and its arguments.
    pub run: Vec<String>,
    /// When it is killed; default 30 s.
    #[serde(default = "thirty_seconds")]
    pub timeout: Seconds,
}

fn thirty_seconds() -> Seconds {
    Seconds(Duration::from_secs(30))
}

/// How long requests wait if nothing else is said: shorter than what makes a file system or a
/// cluster give a node up, long enough to undo a mistake.
const HOLD_FOR: Duration = Duration::from_secs(120);

/// What keys lie in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecretMemory {
    /// `memfd_secret` where the kernel gives it, locked pages elsewhere.
    #[default]
    Auto,
    /// Locked pages.
    Locked,
}

/// When a volume is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachWhen {
    /// When the daemon starts.
    Auto,
    /// When it is asked to.
    #[default]
    Manual,
}

/// A volume's definition. What the volume is, its key included, stands in its own header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// File or block device.
    pub backing: PathBuf,
    /// Which volume lies there; any, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// When to attach it.
    #[serde(default)]
    pub attach: AttachWhen,
    /// Whether clients may trim; holes show which parts are in use to whoever sees the store.
    #[serde(default = "yes")]
    pub trim: bool,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// Bypass the page cache where possible.
    #[serde(default)]
    pub direct: Auto,
    /// A role to assume for this volume's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role_arn: Option<String>,
    /// The external id for that role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_id: Option<String>,
    /// User that owns this volume's socket, instead of the daemon's `nbd_owner`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Group that may use this volume's socket, instead of the daemon's `nbd_group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What requests do when the key is denied, or the outage allowance is over.
    #[serde(default)]
    pub on_denial: OnDenial,
    /// How long they wait, if they do.
    #[serde(default, skip_serializing)]
    pub hold_for: Option<Seconds>,
    /// Programs to run after a fence, in order.
    #[serde(default, skip_serializing)]
    pub on_fence: Vec<OnFence>,
    /// Attach it as a device of the kernel.
    #[serde(default, skip_serializing)]
    pub device: Option<DeviceChoice>,
    /// Connections of that device.
    #[serde(default, skip_serializing)]
    pub connections: Option<usize>,
    /// When the kernel sends a request again over a new connection; default 30 s.
    #[serde(default, skip_serializing)]
    pub request_timeout: Option<Seconds>,
    /// How long the kernel's requests wait for a daemon that is not there; default 90 s.
    #[serde(default, skip_serializing)]
    pub dead_timeout: Option<Seconds>,
    /// What is done about plaintext that the node caches, after a fence.
    #[serde(default, skip_serializing)]
    pub purge: PurgeConfig,
    /// Instead of the daemon's `[lease]`.
    #[serde(default, skip_serializing)]
    pub lease: LeaseConfig,
}

/// Which device of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum DeviceChoice {
    /// The first one that is free.
    Auto,
    /// `/dev/nbdN`.
    Number(u32),
}

/// Why a text is no device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is no device; write `auto` or `/dev/nbdN`")]
pub struct DeviceChoiceError(String);

impl std::str::FromStr for DeviceChoice {
    type Err = DeviceChoiceError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let number = if text.starts_with("/dev/") { index_of(text) } else { None };
        number.map(Self::Number).ok_or_else(|| DeviceChoiceError(text.to_owned()))
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = DeviceChoiceError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// `[purge]`: what is done, in this order, about plaintext of a kernel device that the node caches,
/// after a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PurgeConfig {
    /// Shut down file systems on the device.
    pub shut_down: bool,
    /// End those who use them.
    pub end: EndUsers,
    /// Unmount them lazily.
    pub unmount: bool,
    /// Drop what is cached of the device itself.
    pub flush_device: bool,
    /// Drop clean cached pages of the whole node.
    pub drop_caches: bool,
    /// Take the device away.
    pub disconnect: bool,
    /// For each step; default 10 s.
    pub step_timeout: Seconds,
}

impl Default for PurgeConfig {
    fn default() -> Self {
        Self {
            shut_down: true,
            end: EndUsers::Nobody,
            unmount: false,
            flush_device: true,
            drop_caches: true,
            disconnect: false,
            step_timeout: Seconds(Duration::from_secs(10)),
        }
    }
}

/// Whom a purge ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndUsers {
    /// Nobody.
    #[default]
    Nobody,
    /// Processes that use a file system on the device, or have its files mapped.
    Processes,
    /// The control groups of those processes.
    Groups,
}

/// A request takes this long in the worst case of a store that is slow, not dead: the kernel's queue
/// (128 requests of 128 KiB) at under 1 MB/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Long enough for an upgrade, shorter than the 120 s after which the kernel calls a task hung.
const DEAD_TIMEOUT: Duration = Duration::from_secs(90);

fn yes() -> bool {
    true
}

impl VolumeConfig {
    /// The definition that `volume create` writes.
    #[must_use]
    pub fn new(backing: PathBuf) -> Self {
        Self {
            backing,
            uuid: None,
            attach: AttachWhen::Manual,
            trim: true,
            read_only: false,
            direct: Auto::Auto,
            role_arn: None,
            external_id: None,
            owner: None,
            group: None,
            on_denial: OnDenial::default(),
            hold_for: None,
            on_fence: Vec::new(),
            device: None,
            connections: None,
            request_timeout: None,
            dead_timeout: None,
            purge: PurgeConfig::default(),
            lease: LeaseConfig::default(),
        }
    }

    /// When the kernel sends a request again, in whole seconds.
    #[must_use]
    pub fn request_timeout(&self) -> u64 {
        whole_seconds(self.request_timeout.map_or(REQUEST_TIMEOUT, |s| s.0))
    }

    /// How long the kernel's requests wait for a daemon, in whole seconds.
    #[must_use]
    pub fn dead_timeout(&self) -> u64 {
        whole_seconds(self.dead_timeout.map_or(DEAD_TIMEOUT, |s| s.0))
    }

    /// How long requests wait for a key that is denied; `None`: they fail at once.
    #[must_use]
    pub fn hold(&self) -> Option<Duration> {
        match self.on_denial {
            OnDenial::Error => None,
            OnDenial::Hold => Some(self.hold_for.map_or(HOLD_FOR, |Seconds(hold)| hold)),
        }
    }

    /// The role to assume, if one is named.
    #[must_use]
    pub fn role(&self) -> Option<Role> {
        let arn = self.role_arn.clone()?;
        Some(Role { arn, external_id: self.external_id.clone() })
    }
}

/// Never none: the kernel takes 0 for no limit.
fn whole_seconds(time: Duration) -> u64 {
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0)).max(1)
}

/// Whether a volume's name can be the name of a file, a socket and an export: letters, digits, `-`,
/// `_` and `.`, at most 64, beginning with a letter or digit.
#[must_use]
pub fn is_volume_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && name.len() <= 64 && bytes.all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Names of the members that differ; a member that is not listed does not compile.
macro_rules! differing {
    ($type:ident, $one:expr, $other:expr, $($member:ident),+ $(,)?) => {{
        let $type { $($member),+ } = $one;
        let members = [$((stringify!($member), *$member == $other.$member)),+];
        members.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }};
}

impl Config {
    /// Settings that `other` has otherwise.
    #[must_use]
    pub fn differing(&self, other: &Self) -> Vec<&'static str> {
        differing!(
            Config,
            self,
            other,
            volumes_dir,
            control_socket,
            nbd_dir,
            kernel_socket,
            owner,
            group,
            nbd_owner,
            nbd_group,
            tcp_listen,
            max_connections,
            secret_memory,
            kms,
            lease,
            audit,
            http,
            log,
        )
    }
}

impl VolumeConfig {
    /// Keys that `other` has otherwise.
    #[must_use]
    pub fn differing(&self, other: &Self) -> Vec<&'static str> {
        differing!(
            VolumeConfig,
            self,
            other,
            backing,
            uuid,
            attach,
            trim,
            read_only,
            direct,
            role_arn,
            external_id,
            owner,
            group,
            on_denial,
            hold_for,
            on_fence,
            device,
            connections,
            request_timeout,
            dead_timeout,
            purge,
            lease,
        )
    }
}

/// Reads the daemon's settings.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    load_with_hash(path).map(|(config, _)| config)
}

/// The same, with the SHA-256 of what was read.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn load_with_hash(path: &Path) -> Result<(Config, Hash), ConfigErrors> {
    let (mut config, sha256): (Config, _) = parse_file(path).map_err(|e| ConfigErrors(vec![e]))?;
    let mut errors = Vec::new();
    let mut wrong = |what: &str| {
        errors.push(ConfigError { file: path.to_owned(), line: None, what: what.to_owned() });
    };
    if config.lease.probe_interval.is_some_and(|s| s.0 < SHORTEST_INTERVAL) {
        wrong("lease.probe_interval is under 1s: KMS would throttle the account");
    }
    if config.tcp_listen.is_some_and(|address| !address.ip().is_loopback()) {
        wrong("tcp_listen is not a loopback address; NBD without TLS stays on this machine");
    }
    config.http.check(&mut wrong);
    if let Some(error) = config.log.otlp_endpoint.as_deref().and_then(|url| collector(url).err()) {
        wrong(&format!("log.otlp_endpoint: {error}"));
    }
    if config.max_connections == 0 {
        wrong("max_connections is 0: nobody could connect");
    }
    if config.audit.directory.is_relative() {
        wrong("audit.directory is a relative path; the daemon has no directory of its own");
    }
    if config.audit.file_size.0 < SMALLEST_AUDIT_FILE {
        wrong("audit.file_size is under 64K: there would be more files than records");
    }
    if config.audit.checkpoint_every == 0 {
        wrong("audit.checkpoint_every is 0: write at least 1");
    }
    if config.audit.keep == 1 {
        wrong("audit.keep is 1: each new file would delete the whole trail; 0 keeps all");
    }
    if config.kms.max_probes_per_second == 0 {
        wrong("kms.max_probes_per_second is 0: nothing would be probed");
    }
    if config.kms.fips && config.kms.endpoint.is_some() {
        wrong("kms.fips and kms.endpoint exclude each other: name the FIPS endpoint itself");
    }
    if !errors.is_empty() {
        return Err(ConfigErrors(errors));
    }
    if config.volumes_dir.is_relative() {
        config.volumes_dir = path.parent().unwrap_or(Path::new(".")).join(&config.volumes_dir);
    }
    Ok((config, sha256))
}

/// Definitions by their volumes' names, in that order.
pub type Definitions = Vec<(String, VolumeConfig)>;

/// Reads every volume's definition.
///
/// # Errors
/// Everything that is wrong with the files.
pub fn load_volumes(dir: &Path) -> Result<Definitions, ConfigErrors> {
    match load_each_volume(dir)? {
        (volumes, errors) if errors.is_empty() => Ok(volumes),
        (_, errors) => Err(ConfigErrors(errors)),
    }
}

/// Reads every volume's definition that can be read, and says what is wrong with the others.
///
/// # Errors
/// The directory cannot be read: whatever lies there is unknown.
pub fn load_each_volume(dir: &Path) -> Result<(Definitions, Vec<ConfigError>), ConfigErrors> {
    let one = |file: &Path, what: String| ConfigError { file: file.to_owned(), line: None, what };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Default::default()),
        Err(error) => return Err(ConfigErrors(vec![one(dir, error.to_string())])),
    };
    let (mut volumes, mut errors) = (Vec::new(), Vec::new());
    for entry in entries {
        let entry = entry.map_err(|error| ConfigErrors(vec![one(dir, error.to_string())]))?;
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
        if !is_volume_name(&name) {
            errors.push(one(&path, format!("`{name}` cannot be a volume's name")));
            continue;
        }
        match load_volume(&path) {
            Ok(Some(volume)) => volumes.push((name, volume)),
            // Removed since the directory was read.
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    volumes.sort_by(|a, b| a.0.cmp(&b.0));
    errors.sort_by(|a, b| a.file.cmp(&b.file));
    Ok((volumes, errors))
}

/// Reads the settings and every definition, and changes nothing: how many volumes are defined.
///
/// # Errors
/// Everything that is wrong with the files.
pub fn check(path: &Path) -> Result<usize, ConfigErrors> {
    let config = load(path)?;
    load_volumes(&config.volumes_dir).map(|volumes| volumes.len())
}

/// Reads one volume's definition; none if there is no such file.
///
/// # Errors
/// What is wrong with the file.
pub fn load_volume(path: &Path) -> Result<Option<VolumeConfig>, ConfigError> {
    load_volume_with_hash(path).map(|read| read.map(|(volume, _)| volume))
}

/// The same, with the SHA-256 of what was read.
///
/// # Errors
/// What is wrong with the file.
pub fn load_volume_with_hash(path: &Path) -> Result<Option<(VolumeConfig, Hash)>, ConfigError> {
    if matches!(path.try_exists(), Ok(false)) {
        return Ok(None);
    }
    let (volume, sha256): (VolumeConfig, _) = parse_file(path)?;
    let wrong =
        |what: &str| ConfigError { file: path.to_owned(), line: None, what: what.to_owned() };
    if volume.external_id.is_some() && volume.role_arn.is_none() {
        return Err(wrong("external_id without role_arn: it goes with the role that is assumed"));
    }
    let absolute = |hook: &OnFence| hook.run.first().is_some_and(|p| Path::new(p).is_absolute());
    if !volume.on_fence.iter().all(absolute) {
        return Err(wrong("on_fence.run does not begin with the absolute path of a program"));
    }
    if volume.hold_for.is_some() && volume.on_denial != OnDenial::Hold {
        return Err(wrong("hold_for without on_denial = \"hold\": nothing waits"));
    }
    if volume.lease.probe_interval.is_some_and(|s| s.0 < SHORTEST_INTERVAL) {
        return Err(wrong("lease.probe_interval is under 1s: KMS would throttle the account"));
    }
    if volume.connections.is_some_and(|n| n == 0 || n > MAX_CONNECTIONS) {
        return Err(wrong(&format!("connections is not between 1 and {MAX_CONNECTIONS}")));
    }
    let none = |time: Option<Seconds>| time.is_some_and(|s| s.0.is_zero());
    if none(volume.request_timeout) || none(volume.dead_timeout) {
        return Err(wrong(
            "request_timeout or dead_timeout is 0: a dead connection would be for ever",
        ));
    }
    if volume.backing.is_relative() {
        return Err(wrong("backing is a relative path; the daemon has no directory of its own"));
    }
    Ok(Some((volume, sha256)))
}

/// A record of KMS calls has some ten kilobytes.
const SMALLEST_AUDIT_FILE: u64 = 64 << 10;

/// More often than this, KMS would throttle.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// A file's settings, and its hash.
fn parse_file<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<(T, Hash), ConfigError> {
    let fail = |line, what| ConfigError { file: path.to_owned(), line, what };
    let text = std::fs::read_to_string(path).map_err(|e| fail(None, e.to_string()))?;
    let sha256 = Hash::of(text.as_bytes());
    toml::from_str(&text).map(|settings| (settings, sha256)).map_err(|error| {
        let line = error.span().map(|span| {
            text.get(..span.start).unwrap_or_default().bytes().filter(|b| *b == b'\n').count() + 1
        });
        fail(line, format!("{}{}", setting(&text, line, error.message()), explain(error.message())))
    })
}

/// The setting on that line, for words that do not name it: `http.listen: `.
fn setting(text: &str, line: Option<usize>, message: &str) -> String {
    let Some(line) = line.filter(|_| !message.contains('`')) else { return String::new() };
    let before: Vec<_> = text.lines().take(line).collect();
    let Some((key, _)) = before.last().and_then(|line| line.split_once('=')) else {
        return String::new();
    };
    let table =
        before.iter().rev().find_map(|line| line.trim().strip_prefix('[')?.split(']').next());
    let key = key.trim();
    match table {
        Some(table) => format!("{table}.{key}: "),
        None => format!("{key}: "),
    }
}

/// Serde's words for an unknown key list all known ones; what helps is the nearest.
fn explain(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else { return message.to_owned() };
    let Some((unknown, rest)) = rest.split_once('`') else { return message.to_owned() };
    let known = rest.split('`').skip(1).step_by(2);
    let nearest = known.min_by_key(|known| strsim::damerau_levenshtein(unknown, known));
    match nearest {
        Some(nearest) => format!("unknown key `{unknown}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{unknown}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("byokd.toml");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn an_unknown_key_is_an_error_with_file_line_and_the_nearest_key() {
        let (_dir, path) = file("max_connections = 5\n\n[lease]\nprobe_intervall = \"5s\"\n");
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("byokd.toml:4"), "{error}");
        assert!(error.contains("did you mean `probe_interval`?"), "{error}");
    }

    #[test]
    fn a_value_that_cannot_be_read_is_told_with_its_setting() {
        let (_dir, path) =
            file("max_connections = 5\n\n[http]\n# x\nlisten = \"localhost:9441\"\n");
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("byokd.toml:5: http.listen: invalid socket address"), "{error}");
        let (_dir, path) = file("tcp_listen = \"x\"\n");
        let error = load(&path).unwrap_err().to_string();
        assert!(error.contains("byokd.toml:1: tcp_listen: invalid socket address"), "{error}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_all_at_once() {
        let (_dir, path) = file(
            "tcp_listen = \"0.0.0.0:10809\"\nmax_connections = 0\n[lease]\nprobe_interval = \"10ms\"\n",
        );
        let error = load(&path).unwrap_err();
        assert_eq!(error.0.len(), 3, "{error}");
        let (_dir, path) = file("[lease]\nfail_closed_after = \"soon\"\n");
        assert!(load(&path).unwrap_err().to_string().contains("not a duration"));
    }

    #[test]
    fn a_collector_that_nothing_can_be_exported_to_is_refused() {
        let read = |url: &str| {
            let (_dir, path) = file(&format!("[log]\notlp_endpoint = \"{url}\"\n"));
            load(&path).map(|_| ()).map_err(|errors| errors.to_string())
        };
        let error = read("127.0.0.1:4318").unwrap_err();
        assert!(error.contains("log.otlp_endpoint: "), "{error}");
        let usable = read("http://127.0.0.1:4318");
        if cfg!(feature = "otel") {
            assert_eq!(usable, Ok(()));
        } else {
            assert!(usable.unwrap_err().contains("--features otel"), "it says what it needs");
        }
    }

    #[test]
    fn more_than_this_machine_is_served_only_with_tls_and_a_token() {
        let read = |more: &str| {
            let (_dir, path) = file(&format!("[http]\n{more}"));
            load(&path).map(|_| ()).map_err(|errors| errors.0.len())
        };
        let tls = "certificate = \"/c\"\ncertificate_key = \"/k\"\n";
        let token = "token_file = \"/t\"\n";
        let everywhere = "listen = \"0.0.0.0:1\"\n";
        assert_eq!(read("listen = \"[::1]:1\""), Ok(()));
        assert_eq!(read(&format!("listen = \"127.0.0.1:1\"\n{tls}")), Ok(()));
        assert_eq!(read(everywhere), Err(2));
        assert_eq!(read(&format!("{everywhere}{tls}")), Err(1));
        assert_eq!(read(&format!("{everywhere}{token}")), Err(1));
        assert_eq!(read(&format!("{everywhere}{tls}{token}")), Ok(()));
        assert_eq!(read(tls), Err(1));
        assert_eq!(read("listen = \"127.0.0.1:1\"\ncertificate = \"/c\""), Err(1));
    }

    #[test]
    fn durations_and_allowances_are_read() {
        let (_dir, path) =
            file("[lease]\nprobe_interval = \"5s\"\nfail_closed_after = \"never\"\n");
        let policy = load(&path).unwrap().lease.policy(LeasePolicy::default());
        assert_eq!(policy.interval, Duration::from_secs(5));
        assert_eq!(policy.allowance, Allowance::Never);
        assert_eq!("90m".parse(), Ok(Seconds(Duration::from_secs(5400))));
    }

    #[test]
    fn a_definition_that_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let volume = VolumeConfig::new("/data/zeebe.img".into());
        let text = toml::to_string(&volume).unwrap();
        std::fs::write(dir.path().join("zeebe-0.toml"), text).unwrap();
        assert_eq!(load_volumes(dir.path()).unwrap(), [("zeebe-0".to_owned(), volume)]);
        std::fs::write(dir.path().join("-x.toml"), "").unwrap();
        std::fs::write(dir.path().join("y.toml"), "backin = 1").unwrap();
        assert_eq!(load_volumes(dir.path()).unwrap_err().0.len(), 2);
        let (volumes, errors) = load_each_volume(dir.path()).unwrap();
        assert_eq!((volumes.len(), errors.len()), (1, 2), "what can be read is");
    }

    #[test]
    fn devices_and_their_limits_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.toml");
        let read = |more: &str| {
            std::fs::write(&path, format!("backing = \"/x\"\n{more}")).unwrap();
            load_volume(&path).map(|volume| volume.unwrap())
        };
        let volume = read("device = \"/dev/nbd3\"\nrequest_timeout = \"1500ms\"").unwrap();
        assert_eq!(volume.device, Some(DeviceChoice::Number(3)));
        assert_eq!((volume.request_timeout(), volume.dead_timeout()), (2, 90));
        assert_eq!(read("device = \"auto\"").unwrap().device, Some(DeviceChoice::Auto));
        for wrong in [
            "device = \"/dev/sda\"",
            "device = \"nbd1\"",
            "connections = 0",
            "connections = 17",
            "request_timeout = \"0\"",
            "dead_timeout = \"0s\"",
            "[purge]\nend = \"everybody\"",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "-x", "ä", "a b"] {
            assert!(!is_volume_name(name), "{name}");
        }
        assert!(is_volume_name("zeebe-0.data_1"));
    }
}
