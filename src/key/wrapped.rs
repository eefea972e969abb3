//! The public words around a key: which KMS key wraps it, in which context, and the blob.
//!
//! Everything here may be printed, stored and logged. Source: the AWS KMS API reference
//! (`EncryptionContext`, key ARN), and ARCHITECTURE of the volume token.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// Context key that always holds the volume's uuid.
pub const CONTEXT_VOLUME: &str = "byokd:volume-uuid";
/// Context key that always holds the volume's purpose.
pub const CONTEXT_PURPOSE: &str = "byokd:purpose";

/// The ARN of a KMS key: `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`. Never an alias: an alias can
/// be pointed at another key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyArn(String);

/// Why a text is not the ARN of a KMS key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{text}` is not a KMS key ARN: {why} (expected arn:aws:kms:REGION:ACCOUNT:key/KEY-ID)")]
pub struct KeyArnError {
    text: String,
    why: &'static str,
}

impl KeyArn {
    /// The whole ARN.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn part(&self, index: usize) -> &str {
        self.0.splitn(6, ':').nth(index).unwrap_or_default()
    }

    /// The region, for example `eu-central-1`.
    #[must_use]
    pub fn region(&self) -> &str {
        self.part(3)
    }

    /// The twelve-digit account that owns the key.
    #[must_use]
    pub fn account(&self) -> &str {
        self.part(4)
    }

    /// The key id: a uuid, or `mrk-...` for a multi-Region key.
    #[must_use]
    pub fn key_id(&self) -> &str {
        self.part(5).strip_prefix("key/").unwrap_or_default()
    }
}

impl FromStr for KeyArn {
    type Err = KeyArnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |why| Err(KeyArnError { text: text.to_owned(), why });
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let [arn, partition, service, region, account, resource] = parts[..] else {
            return refuse("it does not have six parts");
        };
        let word =
            |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if arn != "arn" || !word(partition) {
            return refuse("it does not start with arn:PARTITION");
        }
        if service != "kms" {
            return refuse("its service is not kms");
        }
        if !word(region) {
            return refuse("it names no region");
        }
        if account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()) {
            return refuse("its account is not 12 digits");
        }
        if resource.starts_with("alias/") {
            return refuse("an alias can be pointed at another key; name the key itself");
        }
        match resource.strip_prefix("key/") {
            Some(id) if word(id) => Ok(Self(text.to_owned())),
            _ => refuse("it does not end in key/KEY-ID"),
        }
    }
}

impl TryFrom<String> for KeyArn {
    type Error = KeyArnError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<KeyArn> for String {
    fn from(arn: KeyArn) -> Self {
        arn.0
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a volume is for. It is part of the encryption context, so a customer can allow or deny by
/// it.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Zeebe's journal and state.
    Zeebe,
    /// Elasticsearch's or OpenSearch's indices and translog.
    Elasticsearch,
    /// Document storage.
    Documents,
    /// Backups and snapshots.
    Backup,
}

impl Purpose {
    /// The word used in the encryption context and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Zeebe => "zeebe",
            Self::Elasticsearch => "elasticsearch",
            Self::Documents => "documents",
            Self::Backup => "backup",
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The encryption context KMS binds a blob to: identifiers only, for it stands in clear in
/// CloudTrail. Always holds [`CONTEXT_VOLUME`] and [`CONTEXT_PURPOSE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EncryptionContext(BTreeMap<String, String>);

/// Why a pair cannot be part of an encryption context.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ContextError {
    /// The key is one byokd sets itself.
    #[error("the context key `{0}` is set by byokd itself; choose another key")]
    Reserved(String),
    /// Keys and values must not be empty.
    #[error("the context entry `{0}` has an empty key or value; write it as KEY=VALUE")]
    Empty(String),
    /// `aws:` keys belong to AWS.
    #[error("the context key `{0}` starts with `aws:`, which AWS keeps for itself")]
    AwsPrefix(String),
    /// The whole is over 4096 bytes.
    #[error("the context is {0} bytes; keep it under 4096: it is stored in the volume's header")]
    TooLong(usize),
}

impl EncryptionContext {
    /// The context of a volume, with the operator's own pairs added.
    ///
    /// # Errors
    /// A pair is empty, reserved, or the whole is too long.
    pub fn for_volume(
        uuid: Uuid,
        purpose: Purpose,
        extra: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ContextError> {
        let mut map = BTreeMap::new();
        for (key, value) in extra {
            if key.is_empty() || value.is_empty() {
                return Err(ContextError::Empty(format!("{key}={value}")));
            }
            if key.starts_with("byokd:") {
                return Err(ContextError::Reserved(key));
            }
            if key.starts_with("aws:") {
                return Err(ContextError::AwsPrefix(key));
            }
            map.insert(key, value);
        }
        map.insert(CONTEXT_VOLUME.to_owned(), uuid.to_string());
        map.insert(CONTEXT_PURPOSE.to_owned(), purpose.as_str().to_owned());
        let len: usize = map.iter().map(|(k, v)| k.len() + v.len()).sum();
        if len > 4096 {
            return Err(ContextError::TooLong(len));
        }
        Ok(Self(map))
    }

    /// A context as it was stored or sent; the caller checks what it holds.
    #[must_use]
    pub fn from_map(map: BTreeMap<String, String>) -> Self {
        Self(map)
    }

    /// The pairs, in order of their keys.
    #[must_use]
    pub fn pairs(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// The volume this context is bound to, if it says so.
    #[must_use]
    pub fn volume(&self) -> Option<Uuid> {
        self.0.get(CONTEXT_VOLUME)?.parse().ok()
    }

    /// The purpose this context is bound to, if it says so.
    #[must_use]
    pub fn purpose(&self) -> Option<Purpose> {
        let word = self.0.get(CONTEXT_PURPOSE)?;
        [Purpose::Zeebe, Purpose::Elasticsearch, Purpose::Documents, Purpose::Backup]
            .into_iter()
            .find(|p| p.as_str() == word)
    }
}

/// A role to assume for a key, in the customer's account or ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    /// The role's ARN.
    pub arn: String,
    /// The external id that its trust policy asks for.
    #[serde(default)]
    pub external_id: Option<String>,
}

/// A key as KMS wrapped it: public, useless without `kms:Decrypt` in the same context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey {
    /// The key that wrapped it.
    pub key_arn: KeyArn,
    /// KMS's `CiphertextBlob`.
    pub blob: Vec<u8>,
    /// The context it is bound to.
    pub context: EncryptionContext,
}

/// What probes decrypt: a blob made beside the volume key under the same key and context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canary {
    /// The wrapped canary.
    pub wrapped: WrappedKey,
    /// SHA-256 of its plaintext.
    pub sha256: [u8; 32],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arn_gives_its_parts() {
        let arn: KeyArn =
            "arn:aws:kms:eu-central-1:111122223333:key/mrk-12".parse().expect("a good ARN");
        assert_eq!(
            (arn.region(), arn.account(), arn.key_id()),
            ("eu-central-1", "111122223333", "mrk-12")
        );
    }

    #[test]
    fn what_is_not_a_key_arn_is_refused_with_the_reason() {
        for (text, why) in [
            ("alias/x", "six parts"),
            ("arn:aws:s3:eu-central-1:111122223333:key/x", "service"),
            ("arn:aws:kms::111122223333:key/x", "region"),
            ("arn:aws:kms:eu-central-1:1:key/x", "12 digits"),
            ("arn:aws:kms:eu-central-1:111122223333:alias/x", "alias"),
            ("arn:aws:kms:eu-central-1:111122223333:key/", "KEY-ID"),
        ] {
            let error = text.parse::<KeyArn>().expect_err("refused").to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_context_holds_volume_and_purpose_and_refuses_reserved_keys() {
        let uuid = Uuid::new_v4();
        let pair = |k: &str, v: &str| [(k.to_owned(), v.to_owned())];
        let context =
            EncryptionContext::for_volume(uuid, Purpose::Zeebe, pair("cluster", "c1")).unwrap();
        assert_eq!(context.volume(), Some(uuid));
        assert_eq!(context.purpose(), Some(Purpose::Zeebe));
        assert_eq!(context.pairs().len(), 3);
        for bad in [pair("byokd:purpose", "x"), pair("aws:x", "y"), pair("", "y"), pair("x", "")] {
            EncryptionContext::for_volume(uuid, Purpose::Backup, bad).unwrap_err();
        }
    }
}
