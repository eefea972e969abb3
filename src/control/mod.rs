//! The control API: what `byokctl` asks of `byokd` over its unix socket, and what it answers.
//!
//! One request a line, one answer a line, JSON both ways. The types are the API: [`server`] and
//! [`client`] only carry them. Fields are added, never renamed or removed, within one
//! [`API_VERSION`].

pub mod client;
pub mod server;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::audit::AuditStatus;
use crate::audit::record::Record;
use crate::exit::ExitCode;
use crate::key::lease::{FenceReason, Verdict};
use crate::key::wrapped::{EncryptionContext, KeyArn, Purpose, Role};
use crate::kms::trouble::Trouble;
use crate::kms::{CheckStep, Evidence};
use crate::units::SectorSize;

/// The version of this API, part of [`Answer::Version`].
pub const API_VERSION: u32 = 1;

/// What may be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Who is there: answered with [`Answer::Version`].
    Version,
    /// Makes a volume and its definition: answered with [`Answer::Volume`].
    VolumeCreate(VolumeCreate),
    /// Every volume known: answered with [`Answer::Volumes`].
    VolumeList,
    /// One volume: answered with [`Answer::Volume`].
    VolumeShow {
        /// Its name.
        name: String,
    },
    /// Drops the definition, not the data: answered with [`Answer::Done`].
    VolumeForget {
        /// Its name.
        name: String,
    },
    /// Makes a volume larger, also while it is in use: answered with [`Answer::Volume`].
    VolumeResize {
        /// Its name.
        name: String,
        /// Bytes that a client may use from then on.
        size: u64,
    },
    /// Unlocks and serves a volume: answered with [`Answer::Volume`].
    Attach {
        /// Its name.
        name: String,
        /// Serve it read-only whatever its definition says.
        #[serde(default)]
        read_only: bool,
        /// As which device of the kernel, `auto` or `/dev/nbdN`, whatever its definition says.
        #[serde(default)]
        device: Option<String>,
        /// How many connections that device has.
        #[serde(default)]
        connections: Option<usize>,
    },
    /// Drains, flushes and stops serving: answered with [`Answer::Volume`].
    Detach {
        /// Its name.
        name: String,
        /// Take its kernel device away whoever uses it, and whatever hangs.
        #[serde(default)]
        force: bool,
    },
    /// The state of one volume or all: answered with [`Answer::Volumes`].
    Status {
        /// Only this one.
        #[serde(default)]
        name: Option<String>,
    },
    /// Fences a volume by hand, and keeps it fenced or detached until it is resumed, also over a
    /// restart: answered with [`Answer::Volume`].
    KeySuspend {
        /// Its name.
        name: String,
    },
    /// Takes a suspension back; an attached volume is served again once KMS allows it: answered
    /// with [`Answer::Volume`].
    KeyResume {
        /// Its name.
        name: String,
    },
    /// Probes now, instead of when it is due, and acts upon the answers: answered with
    /// [`Answer::Volumes`], those that were probed.
    KeyRecheck {
        /// A volume's name, or a key's ARN for all attached volumes under it.
        target: String,
    },
    /// Wraps the volume key anew, attached or not, and writes it to the header: answered with
    /// [`Answer::Volume`].
    KeyRewrap {
        /// The volume's name.
        name: String,
        /// By this key; by the one that it has, without.
        #[serde(default)]
        key: Option<KeyArn>,
    },
    /// Reads the settings and the definitions anew: answered with [`Answer::Reloaded`].
    Reload,
    /// The latest records of the audit trail: answered with [`Answer::AuditRecords`].
    AuditRecords {
        /// Only this volume's.
        #[serde(default)]
        volume: Option<String>,
        /// Only those after this number.
        #[serde(default)]
        since: u64,
        /// At most so many, the latest.
        #[serde(default = "hundred")]
        last: usize,
    },
    /// How the audit trail is: answered with [`Answer::AuditHead`].
    AuditHead,
    /// Tries a key step by step: answered with [`Answer::KeyCheck`].
    KeyCheck {
        /// The key.
        arn: KeyArn,
        /// As whom to ask.
        #[serde(default)]
        role: Option<Role>,
    },
}

fn hundred() -> usize {
    100
}

impl Request {
    /// Whether it changes nothing and asks KMS nothing.
    #[must_use]
    pub fn only_looks(&self) -> bool {
        match self {
            Self::Version
            | Self::VolumeList
            | Self::VolumeShow { .. }
            | Self::Status { .. }
            | Self::AuditRecords { .. }
            | Self::AuditHead => true,
            Self::VolumeCreate(_)
            | Self::VolumeForget { .. }
            | Self::VolumeResize { .. }
            | Self::Reload
            | Self::Attach { .. }
            | Self::Detach { .. }
            | Self::KeySuspend { .. }
            | Self::KeyResume { .. }
            | Self::KeyRewrap { .. }
            | Self::KeyRecheck { .. }
            | Self::KeyCheck { .. } => false,
        }
    }
}

/// What a new volume should be.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreate {
    /// Its name: letters, digits, `-`, `_` and `.`, at most 64, not starting with a dot or dash.
    pub name: String,
    /// File or block device; a file is made.
    pub backing: PathBuf,
    /// Bytes a client may use; the header comes on top. For a block device 0 means all of it.
    pub size: u64,
    /// The customer's key.
    pub key: KeyArn,
    /// What the volume is for.
    pub purpose: Purpose,
    /// As whom to use the key, now and at each attach.
    #[serde(default)]
    pub role: Option<Role>,
    /// Pairs added to the encryption context.
    #[serde(default)]
    pub context: BTreeMap<String, String>,
    /// Sector size in bytes.
    pub sector_size: SectorSize,
    /// Format over something that looks like data.
    #[serde(default)]
    pub force: bool,
    /// Allocate all blocks now instead of a sparse file.
    #[serde(default)]
    pub preallocate: bool,
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The daemon and its API.
    Version {
        /// The program's version.
        version: String,
        /// [`API_VERSION`].
        api: u32,
    },
    /// Nothing more to say than that it is done.
    Done,
    /// One volume.
    Volume(Box<VolumeStatus>),
    /// Several volumes, in order of their names.
    Volumes {
        /// The volumes.
        volumes: Vec<VolumeStatus>,
        /// What is wrong with the daemon as a whole; absent if nothing is.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        problems: Vec<Problem>,
    },
    /// What reading the settings and the definitions anew has changed.
    Reloaded(Reloaded),
    /// Records of the audit trail, oldest first.
    AuditRecords {
        /// The records.
        records: Vec<Record>,
    },
    /// How the audit trail is.
    AuditHead(Box<AuditStatus>),
    /// A key, step by step.
    KeyCheck {
        /// In the order they were tried; the first failure ends the list.
        steps: Vec<CheckStep>,
    },
    /// It could not be done.
    Error(ControlError),
}

/// What a reload has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Volumes that are known from now on.
    pub added: Vec<String>,
    /// Volumes whose definitions are gone, and which are not attached.
    pub removed: Vec<String>,
    /// Volumes whose new definitions are in force.
    pub changed: Vec<String>,
    /// Volumes that are attached, and take the rest of their new definitions when they are
    /// attached anew.
    pub at_next_attach: Vec<String>,
    /// Settings of `byokd.toml` that take effect at the daemon's next start.
    pub at_restart: Vec<String>,
}

/// Why something could not be done, for people and for scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {why}")]
pub struct ControlError {
    /// The exit code `byokctl` ends with.
    pub exit: ExitCode,
    /// What was tried, on what.
    pub what: String,
    /// Why it failed.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allowed => Self::Ok,
            Verdict::Denied => Self::KeyDenied,
            Verdict::Unavailable | Verdict::Credentials => Self::KmsUnavailable,
            Verdict::Mismatch => Self::Failed,
        }
    }
}

/// Whether a volume is being served, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Known, not attached.
    Detached,
    /// KMS is being asked for its key.
    Attaching,
    /// Requests in flight are drained and flushed.
    Detaching,
    /// Attached and serving.
    Serving,
    /// Attached; KMS gave no verdict lately, the outage allowance is running.
    Unverified,
    /// Attached, fenced: every request is answered with an error, the key is destroyed.
    Fenced,
}

impl VolumeState {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::Detached,
        Self::Attaching,
        Self::Detaching,
        Self::Serving,
        Self::Unverified,
        Self::Fenced,
    ];
}

/// Everything known of a volume. All of it is public: no secret is reachable from here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name, and the name of its NBD export.
    pub name: String,
    /// Its state.
    pub state: VolumeState,
    /// The LUKS2 uuid; absent if the header could not be read.
    pub uuid: Option<Uuid>,
    /// What it is for.
    pub purpose: Option<Purpose>,
    /// Bytes a client may use.
    pub size: Option<u64>,
    /// Sector size in bytes.
    pub sector_size: Option<SectorSize>,
    /// Where its ciphertext lies.
    pub backing: PathBuf,
    /// The key that wraps its volume key.
    pub key: Option<KeyArn>,
    /// The context the wrapped key is bound to.
    pub context: Option<EncryptionContext>,
    /// The header's sequence number.
    pub header_seqid: Option<u64>,
    /// What was repaired when the header was opened, or why it could not be read.
    pub header_note: Option<String>,
    /// Served read-only.
    pub read_only: bool,
    /// The NBD URI of its socket, while attached.
    pub uri: Option<String>,
    /// Connections now.
    pub connections: usize,
    /// Who is connected.
    pub clients: Vec<ClientStatus>,
    /// Requests that failed by a fence or by the backing store, since it was attached.
    pub failed_requests: u64,
    /// Its device in the kernel, if it has one.
    pub device: Option<DeviceStatus>,
    /// What clients asked for since it was attached, by operation: `read`, `write`, `flush`,
    /// `trim`, `zero`, `other`.
    pub io: BTreeMap<String, IoStatus>,
    /// The lease, while attached.
    pub lease: Option<LeaseStatus>,
    /// Why it is not attached, if that was tried and failed.
    pub problem: Option<Problem>,
    /// What of its definition was changed while it was attached, and takes effect when it is
    /// attached anew.
    #[serde(default)]
    pub at_next_attach: Vec<String>,
    /// How it is, in a few words.
    pub headline: String,
    /// What is wrong with it, if anything is.
    pub trouble: Option<Trouble>,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoStatus {
    /// How many.
    pub requests: u64,
    /// Bytes that they were about.
    pub bytes: u64,
    /// Those that failed by a fence or by the backing store.
    pub failed: u64,
    /// Bytes that those were about.
    pub failed_bytes: u64,
}

/// A volume's device in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// `/dev/nbdN`.
    pub path: String,
    /// Its stable name.
    pub link: String,
    /// What is done with its requests.
    pub requests: DeviceRequests,
    /// Connections that the kernel has.
    pub kernel_connections: usize,
    /// Mount points of file systems that saw errors and do not work any more.
    pub damaged_mounts: Vec<String>,
    /// What to run about them, one command for each.
    pub recover: Vec<String>,
    /// What was done about cached plaintext after the last fence.
    pub purge: Vec<PurgeStatus>,
}

/// What is done with requests of a kernel device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceRequests {
    /// The volume answers.
    Served,
    /// They wait for the key, as KMS gives no verdict.
    Wait,
    /// They are answered with errors: the key may not be had, or the volume cannot be opened.
    Refused,
}

/// A step of a purge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeStatus {
    /// Its name.
    pub step: String,
    /// When it ended, RFC 3339.
    pub at: String,
    /// Whether all of it was done.
    pub done: bool,
    /// What was worked on, and what could not be done.
    pub details: Vec<String>,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientStatus {
    /// The process at the other end, if it is on this machine; 0 for the kernel's own client.
    pub pid: Option<i32>,
    /// Its program.
    pub program: Option<String>,
    /// Requests of this connection that failed by a fence or by the backing store. A file system
    /// on it has to be unmounted and mounted again.
    pub failed_requests: u64,
}

/// Why a volume could not be attached, or what is wrong with the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// When it was tried last, or since when it is wrong, RFC 3339.
    pub at: String,
    /// Why it failed.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

/// The lease of an attached volume's key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// `held`, `suspect`, `unverified`, `revoked`, `expired`, `restoring`, `suspended`.
    pub state: String,
    /// When it got into this state, RFC 3339.
    pub since: String,
    /// The last success of KMS, RFC 3339.
    pub last_success: Option<String>,
    /// Seconds until the outage allowance runs out; absent when it never does or is not running.
    pub allowance_left: Option<u64>,
    /// Seconds for which requests still wait instead of failing; absent if they do not wait.
    pub held_for: Option<u64>,
    /// What the last answer of KMS meant, or that there was none, to a probe of this volume or of one
    /// under the same key.
    pub verdict: Verdict,
    /// Why the volume was fenced last.
    pub fence_reason: Option<FenceReason>,
    /// From the first denied answer to the key's destruction, in milliseconds, of the last fence;
    /// absent if no denial led to it.
    pub fence_ms: Option<u64>,
    /// Seconds until the volume is fenced if nothing more is heard of KMS; absent if that never
    /// happens, 0 while it is fenced.
    pub remaining: Option<u64>,
    /// What KMS said last that was not a success.
    pub evidence: Option<Evidence>,
}
