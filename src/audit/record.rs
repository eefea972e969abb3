//! What is recorded: an [`Event`], and the [`Record`] it becomes in the trail.
//!
//! All of it is public: identifiers, words of KMS, names of programs. No type that holds a key can
//! be serialised, so none can get in here.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::audit::chain::Hash;
use crate::exit::ExitCode;
use crate::key::lease::{FenceReason, LeaseWord, Verdict};
use crate::key::wrapped::{EncryptionContext, KeyArn, WrappedKey};
use crate::kms::trouble::{Trouble, cause};
use crate::kms::{Call, Evidence, KmsError, Operation};
use crate::units::rfc3339;

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The daemon started.
    DaemonStart,
    /// The daemon stopped in order.
    DaemonStop,
    /// Settings or a volume's definition were read.
    ConfigLoad,
    /// A volume's definition was written or dropped.
    ConfigChange,
    /// Somebody asked for something over the control socket.
    Request,
    /// What became of that.
    Answer,
    /// A volume was made.
    Create,
    /// KMS unwrapped a volume's key.
    Unwrap,
    /// A volume goes into service: recorded before anybody is served.
    Attach,
    /// A volume could not be attached.
    AttachFailed,
    /// A volume's key is about to be wrapped anew: recorded before its header is written.
    Rewrap,
    /// A volume is about to grow: recorded before its header is written.
    Resize,
    /// A volume went out of service.
    Detach,
    /// The lease on a key got into another state.
    Lease,
    /// KMS denied the key.
    Denial,
    /// KMS gave no verdict, or an answer that does not fit.
    KmsError,
    /// The volume is fenced, for the reason given. It never waits for this record.
    Fence,
    /// The key and every cipher keyed with it are destroyed.
    KeyDestroyed,
    /// KMS allows the key again, and the volume is served.
    Restore,
    /// KMS allows the key again, but the volume could not be served.
    RestoreFailed,
    /// A program of `on_fence` ended.
    OnFence,
    /// A volume got a device in the kernel, or an earlier daemon's was found again.
    DeviceAttach,
    /// A device in the kernel was taken away, or has gone by itself.
    DeviceDetach,
    /// A step against plaintext that the node caches ended.
    Purge,
    /// Requests to KMS and their ids.
    KmsCalls,
    /// A mark in the chain, signed if a key for that is configured.
    Checkpoint,
    /// The first record of a file.
    FileStart,
    /// Old files were deleted, as the settings say.
    FilesDropped,
    /// What a crash cut off stands before this record.
    Torn,
    /// The file before does not hold what it should; the chain goes on from its last good record.
    Damaged,
    /// While the daemon ran, something else wrote to its file, cut it, or put another in its place.
    ForeignChange,
}

/// Who is at the other end of the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, if the kernel says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Its program, if we may see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
}

/// One request to KMS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallNote {
    /// When it was answered, or given up, RFC 3339.
    pub at: String,
    /// What was asked for.
    pub operation: Operation,
    /// What joins it to the customer's CloudTrail; absent if no answer came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The exception, or `NoAnswer`; absent after a success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl CallNote {
    /// What is noted of a call.
    #[must_use]
    pub fn of(call: &Call, at: Timestamp) -> Self {
        Self {
            at: rfc3339(at),
            operation: call.operation,
            request_id: call.request_id.clone(),
            error: call.error.clone(),
        }
    }
}

/// What a crash left of a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Torn {
    /// Bytes.
    pub bytes: u64,
    /// Their SHA-256.
    pub sha256: Hash,
}

/// What something else wrote into a file, while the daemon wrote to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    /// The file's name.
    pub file: String,
    /// Where it begins.
    pub at: u64,
    /// Bytes.
    pub bytes: u64,
    /// Their SHA-256.
    pub sha256: Hash,
}

/// What happened. Members that do not apply are left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// What kind of thing.
    pub event: Kind,
    /// The volume's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// The volume's uuid, also in the encryption context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// The customer's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyArn>,
    /// The encryption context of the calls to KMS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<EncryptionContext>,
    /// Who asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Peer>,
    /// What was asked for, as in the control API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// The sequence number of the request that this answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<u64>,
    /// How it ended, as an exit code's word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitCode>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The id of the KMS answer that this follows from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// What that answer means for the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The exception of KMS, or our word for a failure below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// Its message, verbatim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What is wrong, in words: whose doing it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What follows from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// The state that a lease leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<LeaseWord>,
    /// The state that it gets into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<LeaseWord>,
    /// Why a volume is fenced or its key destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<FenceReason>,
    /// From the first denied answer to the key's destruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub millis: Option<u64>,
    /// Requests to KMS.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<CallNote>,
    /// What else is to be known, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub detail: BTreeMap<String, String>,
    /// What a crash cut off before this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torn: Option<Torn>,
    /// What something else wrote into a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign: Option<Foreign>,
    /// The file before this one, of a file's first record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The first record that is kept, after files were deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_from: Option<u64>,
    /// Events before this one that could not be recorded, for the trail could not be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
    /// Ed25519 over the record and its place in the chain (`chain::signed_text`), in hex. It and
    /// the key stand last before `prev`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
    /// The public key that verifies it, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
}

/// Texts of others are cut at this length: a proxy's error page is no reason for a long line.
const LONGEST_TEXT: usize = 2048;

fn cut(text: &str) -> String {
    text.chars().take(LONGEST_TEXT).collect()
}

impl Event {
    /// Something of this kind.
    #[must_use]
    pub fn new(event: Kind) -> Self {
        Self {
            event,
            volume: None,
            uuid: None,
            key: None,
            context: None,
            by: None,
            request: None,
            of: None,
            exit: None,
            why: None,
            request_id: None,
            verdict: None,
            code: None,
            message: None,
            cause: None,
            effect: None,
            remedy: None,
            from: None,
            to: None,
            reason: None,
            millis: None,
            calls: Vec::new(),
            detail: BTreeMap::new(),
            torn: None,
            foreign: None,
            after: None,
            kept_from: None,
            lost: None,
            signature: None,
            signer: None,
        }
    }

    /// It happened to this volume.
    #[must_use]
    pub fn volume(mut self, name: &str) -> Self {
        self.volume = Some(cut(name));
        self
    }

    /// And to this key of it, in this context.
    #[must_use]
    pub fn wrapped(mut self, wrapped: &WrappedKey) -> Self {
        self.uuid = wrapped.context.volume();
        self.key = Some(wrapped.key_arn.clone());
        self.context = Some(wrapped.context.clone());
        self
    }

    /// KMS answered with this id.
    #[must_use]
    pub fn request_id(mut self, id: Option<&str>) -> Self {
        self.request_id = id.map(cut);
        self
    }

    /// KMS answered with this.
    #[must_use]
    pub fn error(mut self, error: &KmsError) -> Self {
        self.verdict = Some(error.verdict);
        self.code = Some(cut(&error.code));
        self.message = Some(cut(&error.message));
        self.cause = Some(cause(error.verdict).to_owned());
        self.remedy = Some(cut(&error.remedy));
        self.request_id(error.request_id.as_deref())
    }

    /// It follows from this, which KMS said.
    #[must_use]
    pub fn evidence(mut self, said: &Evidence) -> Self {
        self.verdict = Some(said.verdict);
        self.code = Some(cut(&said.code));
        self.message = Some(cut(&said.message));
        self.request_id(said.request_id.as_deref())
    }

    /// This is wrong.
    #[must_use]
    pub fn trouble(mut self, trouble: Option<&Trouble>) -> Self {
        self.cause = trouble.map(|trouble| cut(&trouble.cause));
        self.effect = trouble.map(|trouble| cut(&trouble.effect));
        self.remedy = trouble.map(|trouble| cut(&trouble.remedy));
        self
    }

    /// For this reason.
    #[must_use]
    pub fn reason(mut self, reason: FenceReason) -> Self {
        self.reason = Some(reason);
        self
    }

    /// From one state of a lease to another.
    #[must_use]
    pub fn states(mut self, from: LeaseWord, to: LeaseWord) -> Self {
        (self.from, self.to) = (Some(from), Some(to));
        self
    }

    /// It took so long.
    #[must_use]
    pub fn millis(mut self, millis: u64) -> Self {
        self.millis = Some(millis);
        self
    }

    /// It failed, with this exit code and for this reason.
    #[must_use]
    pub fn failed(mut self, exit: ExitCode, why: &str) -> Self {
        (self.exit, self.why) = (Some(exit), Some(cut(why)));
        self
    }

    /// Something else to be known.
    #[must_use]
    pub fn detail(mut self, name: &str, value: &str) -> Self {
        self.detail.insert(name.to_owned(), cut(value));
        self
    }
}

/// One line of the trail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, one more than that of the record before; the first is 1.
    pub seq: u64,
    /// When it was recorded, RFC 3339, UTC.
    pub time: String,
    /// The run of the daemon that recorded it.
    pub instance: Uuid,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// The hash of the record before; zeroes for the first.
    pub prev: Hash,
    /// The SHA-256 of this line up to this member. It stands last.
    #[serde(default)]
    pub hash: Hash,
}
