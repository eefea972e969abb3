//! `byokd.toml` and `volumes.d/NAME.toml`: as written, checked, as used.
//!
//! Strict: a key that is not known is an error that names file, line and the nearest known key, and
//! all errors of all files are told at once.

/// Names of the members that differ; a member that is not listed does not compile.
macro_rules! differing {
    ($type:ident, $one:expr, $other:expr, $($member:ident),+ $(,)?) => {{
        let $type { $($member),+ } = $one;
        let members = [$((stringify!($member), *$member == $other.$member)),+];
        members.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }};
}

mod file;
mod values;
mod volume;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::audit::chain::Hash;
use crate::audit::{AuditSettings, OnFailure};
pub use crate::config::file::{ConfigError, ConfigErrors};
pub use crate::config::values::{Auto, DurationError, FailClosedAfter, Seconds};
pub use crate::config::volume::{
    AttachWhen, Definitions, DeviceChoice, DeviceChoiceError, EndUsers, OnDenial, OnFence,
    PurgeConfig, VolumeConfig, is_volume_name, load_each_volume, load_volume,
    load_volume_with_hash, load_volumes,
};
use crate::key::lease::{DisconnectedStore, LeasePolicy, ProbePlan};
use crate::key::wrapped::KeyArn;
use crate::log::export::collector;
use crate::units::Size;

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
    let (mut config, sha256): (Config, _) = file::parse(path).map_err(|e| ConfigErrors(vec![e]))?;
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

/// Reads the settings and every definition, and changes nothing: how many volumes are defined.
///
/// # Errors
/// Everything that is wrong with the files.
pub fn check(path: &Path) -> Result<usize, ConfigErrors> {
    let config = load(path)?;
    load_volumes(&config.volumes_dir).map(|volumes| volumes.len())
}

/// A record of KMS calls has some ten kilobytes.
const SMALLEST_AUDIT_FILE: u64 = 64 << 10;

/// More often than this, KMS would throttle.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::lease::Allowance;

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
}
