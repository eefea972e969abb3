//! The customer's key service: make a data key, unwrap it, probe, describe.
//!
//! [`KeyService`] is what the rest of the program sees; [`aws`] speaks to AWS KMS, [`verdict`]
//! says what an error means for the customer's key, and [`dev`] is an embedded KMS for trials and
//! tests that speaks the same wire protocol.

pub mod aws;
pub mod dev;
mod http;
pub mod trouble;
pub mod verdict;

use std::future::Future;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::key::VolumeKey;
use crate::key::lease::{Connection, Moment, Verdict, Whose};
use crate::key::secret::SecretMemoryError;
use crate::key::wrapped::{Canary, EncryptionContext, KeyArn, WrappedKey};

/// The operation of the KMS API that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// `DescribeKey`.
    DescribeKey,
    /// `GenerateDataKey`.
    GenerateDataKey,
    /// `Decrypt`.
    Decrypt,
    /// `ReEncrypt`.
    ReEncrypt,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::DescribeKey => "DescribeKey",
            Self::GenerateDataKey => "GenerateDataKey",
            Self::Decrypt => "Decrypt",
            Self::ReEncrypt => "ReEncrypt",
        })
    }
}

/// One request that was sent to KMS, as the customer's CloudTrail has it too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What was asked for.
    pub operation: Operation,
    /// Of which key.
    pub key: KeyArn,
    /// The encryption context that went with it.
    pub context: Option<EncryptionContext>,
    /// The id of the answer, if one came.
    pub request_id: Option<String>,
    /// The exception it was answered with, or `NoAnswer`; absent after a success.
    pub error: Option<String>,
}

/// Is told of every request to KMS once its answer is there, or will not come. It must not wait.
pub type Observer = Arc<dyn Fn(Call) + Send + Sync>;

/// A call to KMS that did not succeed: what was tried, on which key, what came back.
#[derive(Debug, Error)]
#[error("KMS {operation} with {key} failed: {code}: {message}{}", request_id.as_deref().map(|id| format!(" (request id {id})")).unwrap_or_default())]
pub struct KmsError {
    /// What was tried.
    pub operation: Operation,
    /// On which key.
    pub key: KeyArn,
    /// The exception's name as KMS gave it (`DisabledException`), or our own word for a failure
    /// below it (`Timeout`, `Connect`, `Tls`, `NoCredentials`, `EmptyAnswer`, ...).
    pub code: String,
    /// The message that came with it, verbatim.
    pub message: String,
    /// What joins this to the customer's CloudTrail event, if KMS answered at all.
    pub request_id: Option<String>,
    /// What it means for the customer's key (see [`verdict`]).
    pub verdict: Verdict,
    /// What a person should do about it, one sentence.
    pub remedy: String,
    /// Whose doing it is that KMS denies the key, as far as a witness can tell.
    pub whose: Whose,
    /// When the answer came. What was asked further about it may have taken longer.
    pub came: Moment,
}

/// A data key just made: the secret, and the same key wrapped.
pub struct NewKey {
    /// The secret.
    pub key: VolumeKey,
    /// What the token keeps.
    pub wrapped: WrappedKey,
}

/// What `DescribeKey` says of a key, as far as byokd has rules about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDescription {
    /// The key's ARN as KMS gives it.
    pub arn: String,
    /// `KeyState`: `Enabled`, `Disabled`, `PendingDeletion`, ...
    pub state: String,
    /// `KeySpec`: must be `SYMMETRIC_DEFAULT`.
    pub spec: String,
    /// `KeyUsage`: must be `ENCRYPT_DECRYPT`.
    pub usage: String,
    /// `Origin`: `AWS_KMS`, `EXTERNAL`, `AWS_CLOUDHSM`, `EXTERNAL_KEY_STORE`.
    pub origin: String,
    /// Whether it is a multi-Region key (primary or replica).
    pub multi_region: bool,
    /// The request id of the answer.
    pub request_id: Option<String>,
}

/// A proof that KMS let us use the key just now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The request id of the answer, which joins it to the customer's CloudTrail.
    pub request_id: Option<String>,
}

/// One step of a key check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStep {
    /// `exists`, `enabled`, `symmetric`, `region`, `generate`, `decrypt`, `context`.
    pub step: String,
    /// Whether it worked.
    pub ok: bool,
    /// What was seen, or KMS's words with the request id.
    pub detail: String,
    /// What to do, if it did not work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// What its failure means, if it did not work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
}

/// What KMS said, verbatim, and what it means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// When, RFC 3339.
    pub at: String,
    /// The exception's name.
    pub code: String,
    /// Its message.
    pub message: String,
    /// What joins it to CloudTrail.
    pub request_id: Option<String>,
    /// `denied`, `unavailable`, `credentials`, `mismatch`.
    pub verdict: Verdict,
    /// What to do about it.
    pub remedy: String,
}

/// An error of the service, or of the secret memory its answer goes to.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// KMS refused, failed, or could not be asked.
    #[error(transparent)]
    Kms(#[from] KmsError),
    /// There was no locked memory for the key.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

/// A key service, as the rest of the program sees it. Every call ends within its time limit.
pub trait KeyService: Send + Sync + 'static {
    /// Makes a new 64-byte volume key wrapped by `arn` in `context`.
    fn make_key(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
    ) -> impl Future<Output = Result<NewKey, ServiceError>> + Send;

    /// Unwraps a volume key. It succeeds only if the answer names the same key ARN and holds
    /// exactly 64 bytes.
    fn unwrap_key(
        &self,
        wrapped: &WrappedKey,
    ) -> impl Future<Output = Result<(VolumeKey, Proof), ServiceError>> + Send;

    /// Wraps a wrapped volume key anew, by `to`, in the same context: KMS does it within itself, so
    /// that the key crosses no wire. What comes back is proved only by unwrapping it.
    fn rewrap_key(
        &self,
        wrapped: &WrappedKey,
        to: &KeyArn,
    ) -> impl Future<Output = Result<WrappedKey, KmsError>> + Send;

    /// Makes a canary: a 32-byte data key under the same key and context, of which only the blob
    /// and the plaintext's SHA-256 are kept.
    fn make_canary(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
    ) -> impl Future<Output = Result<Canary, ServiceError>> + Send;

    /// Asks whether the key may still be used, by decrypting `canary`: one attempt, no retries. It
    /// succeeds only if key ARN and the plaintext's hash both match.
    fn probe(
        &self,
        canary: &Canary,
        connection: Connection,
    ) -> impl Future<Output = Result<Proof, KmsError>> + Send;

    /// What KMS says of the key itself.
    fn describe(
        &self,
        arn: &KeyArn,
    ) -> impl Future<Output = Result<KeyDescription, KmsError>> + Send;
}
