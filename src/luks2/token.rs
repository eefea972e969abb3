//! The `byokd-aws-kms` token: the wrapped volume key, its context, the canary, and the MAC that
//! binds them and the volume's immutable facts to the volume key.
//!
//! All fields are public. Whoever may `kms:Decrypt` the blob in its context has the volume key, and
//! opens the volume with standard tools.

#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;

use aws_lc_rs::hkdf::{self, HKDF_SHA256};
use aws_lc_rs::hmac::{self, HMAC_SHA256};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::key::VolumeKey;
use crate::key::wrapped::{Canary, EncryptionContext, KeyArn, WrappedKey};
use crate::luks2::metadata::{ENCRYPTION, Segment};

/// The token's type.
pub const TOKEN_TYPE: &str = "byokd-aws-kms";
/// The version of the token's fields and of what the MAC covers.
const VERSION: u32 = 1;

/// Why a token cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TokenError {
    /// It does not have the fields.
    #[error("its token is malformed: {0}")]
    Malformed(String),
    /// A later byokd made it.
    #[error("its token has version {0}; this byokd knows version {VERSION}: upgrade")]
    Version(u32),
    /// It belongs to another volume.
    #[error(
        "its token belongs to volume {token}, but this is volume {volume}: the header was assembled from two"
    )]
    OtherVolume {
        /// The uuid in the token's context.
        token: String,
        /// The uuid in the header.
        volume: Uuid,
    },
}

/// The token's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The volume key as KMS wrapped it.
    pub wrapped: WrappedKey,
    /// What probes decrypt.
    pub canary: Canary,
    /// Bytes a client may use.
    pub capacity: u64,
    /// When it was made, RFC 3339.
    pub created: String,
    mac: Vec<u8>,
}

/// As it stands in the JSON.
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    version: u32,
    key_arn: KeyArn,
    ciphertext_blob: String,
    encryption_context: BTreeMap<String, String>,
    canary_blob: String,
    canary_sha256: String,
    capacity: String,
    created: String,
    header_mac: String,
}

impl Token {
    /// Makes the token of a volume and seals it with the volume key.
    #[must_use]
    pub fn seal(
        volume: Uuid,
        segment: Segment,
        capacity: u64,
        created: String,
        wrapped: WrappedKey,
        canary: Canary,
        key: &VolumeKey,
    ) -> Self {
        let mut token = Self { wrapped, canary, capacity, created, mac: Vec::new() };
        token.mac =
            hmac::sign(&mac_key(key, volume), &token.covered(volume, segment)).as_ref().to_vec();
        token
    }

    /// Whether the MAC was made with `key` over this token and these facts. Takes the same time
    /// for every key.
    #[must_use]
    pub fn is_sealed(&self, volume: Uuid, segment: Segment, key: &VolumeKey) -> bool {
        let covered = self.covered(volume, segment);
        hmac::verify(&mac_key(key, volume), &covered, &self.mac).is_ok()
    }

    /// Reads a token and checks that it belongs to `volume`.
    ///
    /// # Errors
    /// It is malformed, too new, or another volume's.
    pub fn parse(value: &Value, volume: Uuid) -> Result<Self, TokenError> {
        let malformed = |e: &dyn std::fmt::Display| TokenError::Malformed(e.to_string());
        let stored = Stored::deserialize(value).map_err(|e| malformed(&e))?;
        if stored.version != VERSION {
            return Err(TokenError::Version(stored.version));
        }
        let bytes = |text: &str| BASE64_STANDARD.decode(text).map_err(|e| malformed(&e));
        let context = EncryptionContext::from_map(stored.encryption_context);
        if context.volume() != Some(volume) {
            let token = context.pairs().get(crate::key::wrapped::CONTEXT_VOLUME);
            let token = token.cloned().unwrap_or_else(|| "(none)".into());
            return Err(TokenError::OtherVolume { token, volume });
        }
        let wrapped =
            |blob| WrappedKey { key_arn: stored.key_arn.clone(), blob, context: context.clone() };
        let sha256 = bytes(&stored.canary_sha256)?
            .try_into()
            .map_err(|_| TokenError::Malformed("canary_sha256 is not 32 bytes".into()))?;
        Ok(Self {
            wrapped: wrapped(bytes(&stored.ciphertext_blob)?),
            canary: Canary { wrapped: wrapped(bytes(&stored.canary_blob)?), sha256 },
            capacity: stored.capacity.parse().map_err(|e| malformed(&e))?,
            created: stored.created,
            mac: bytes(&stored.header_mac)?,
        })
    }

    /// The token as JSON.
    ///
    /// # Errors
    /// It cannot be written as JSON, which its fields do not allow to happen.
    pub fn encode(&self) -> Result<Value, TokenError> {
        serde_json::to_value(Stored {
            kind: TOKEN_TYPE.into(),
            keyslots: Vec::new(),
            version: VERSION,
            key_arn: self.wrapped.key_arn.clone(),
            ciphertext_blob: BASE64_STANDARD.encode(&self.wrapped.blob),
            encryption_context: self.wrapped.context.pairs().clone(),
            canary_blob: BASE64_STANDARD.encode(&self.canary.wrapped.blob),
            canary_sha256: BASE64_STANDARD.encode(self.canary.sha256),
            capacity: self.capacity.to_string(),
            created: self.created.clone(),
            header_mac: BASE64_STANDARD.encode(&self.mac),
        })
        .map_err(|e| TokenError::Malformed(e.to_string()))
    }

    /// What the MAC covers: each field with its length before it, so that no two tokens give the
    /// same bytes.
    fn covered(&self, volume: Uuid, segment: Segment) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |field: &[u8]| {
            out.extend((field.len() as u64).to_be_bytes());
            out.extend(field);
        };
        put(b"byokd header v1");
        put(volume.as_bytes());
        put(ENCRYPTION.as_bytes());
        put(&segment.offset.to_be_bytes());
        put(&segment.sector_size.bytes().to_be_bytes());
        put(&segment.iv_tweak.to_be_bytes());
        put(&self.capacity.to_be_bytes());
        put(self.created.as_bytes());
        put(self.wrapped.key_arn.as_str().as_bytes());
        put(&self.wrapped.blob);
        put(&self.canary.wrapped.blob);
        put(&self.canary.sha256);
        for (key, value) in self.wrapped.context.pairs() {
            put(key.as_bytes());
            put(value.as_bytes());
        }
        out
    }
}

/// The key of the MAC: derived, so that the volume key itself is used for nothing but data.
fn mac_key(key: &VolumeKey, volume: Uuid) -> hmac::Key {
    let salt = hkdf::Salt::new(HKDF_SHA256, volume.as_bytes());
    let prk = key.expose(|key| salt.extract(key));
    let mut bytes = Zeroizing::new([0; 32]);
    let info = [&b"byokd header mac v1"[..]];
    let filled = prk.expand(&info, HMAC_SHA256).and_then(|okm| okm.fill(&mut *bytes));
    assert!(filled.is_ok(), "HKDF-SHA256 gives 32 bytes of output");
    hmac::Key::new(HMAC_SHA256, &*bytes)
}
