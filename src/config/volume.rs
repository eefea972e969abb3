//! `volumes.d/NAME.toml`: definitions of volumes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use crate::audit::chain::Hash;
use crate::config::file::{self, ConfigError, ConfigErrors};
use crate::config::values::{Auto, Seconds};
use crate::config::{LeaseConfig, SHORTEST_INTERVAL};
use crate::kernel::MAX_CONNECTIONS;
use crate::kernel::sysfs::index_of;
use crate::key::wrapped::Role;

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
    let (volume, sha256): (VolumeConfig, _) = file::parse(path)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
