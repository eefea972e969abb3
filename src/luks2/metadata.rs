//! The JSON area: segments, digests, config and requirements. Tokens that are not ours, keyslots
//! and fields without meaning here are kept as they came.
//!
//! Source: LUKS2 On-Disk Format Specification, "JSON Area". 64-bit numbers are decimal strings.

#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use aws_lc_rs::pbkdf2;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};
use std::num::NonZeroU32;
use thiserror::Error;

use crate::key::VolumeKey;
use crate::units::SectorSize;

/// The only cipher served: a downgrade to another must not open.
pub const ENCRYPTION: &str = "aes-xts-plain64";

/// PBKDF2 iterations of the digests we make: the input is a random 512-bit key, not a password.
const DIGEST_ITERATIONS: u32 = 1000;

/// PBKDF2 iterations we are willing to do: a forged header must not cost minutes.
const MAX_ITERATIONS: u64 = 10_000_000;

/// Why metadata is not that of a volume byokd serves.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MetadataError {
    /// It is not JSON.
    #[error("its metadata is not JSON: {0}")]
    Json(String),
    /// A field is missing or malformed.
    #[error("its metadata has no usable `{0}`")]
    Field(&'static str),
    /// It asks for something byokd does not do.
    #[error("{0}")]
    Unsupported(String),
    /// The salt or digest cannot be made.
    #[error("the system gives no randomness")]
    NoRandomness,
}

/// Where the ciphertext lies and how it is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts, in bytes from the start of the device.
    pub offset: u64,
    /// How long it is, in bytes; `None` means to the end of the device.
    pub size: Option<u64>,
    /// The size of a sector.
    pub sector_size: SectorSize,
    /// Added to the number of each 512-byte unit to make the tweak.
    pub iv_tweak: u64,
}

/// A digest of the volume key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    iterations: NonZeroU32,
    salt: Vec<u8>,
    digest: Vec<u8>,
    hash: Hash,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha512,
}

impl Hash {
    fn algorithm(self) -> pbkdf2::Algorithm {
        match self {
            Self::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
            Self::Sha512 => pbkdf2::PBKDF2_HMAC_SHA512,
        }
    }
}

/// The metadata as it stands on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata(Map<String, Value>);

impl Metadata {
    /// Metadata of a new volume, with one crypt segment to the end of the device, one digest, and
    /// one token.
    ///
    /// # Errors
    /// There is no randomness for the digest's salt.
    pub fn new(
        segment: Segment,
        key: &VolumeKey,
        token: &Value,
        copy_size: u64,
    ) -> Result<Self, MetadataError> {
        let mut salt = [0; 32];
        aws_lc_rs::rand::fill(&mut salt).map_err(|_| MetadataError::NoRandomness)?;
        let iterations = NonZeroU32::new(DIGEST_ITERATIONS).unwrap_or(NonZeroU32::MIN);
        let mut digest = [0; 32];
        key.expose(|key| {
            pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, key, &mut digest);
        });
        let copies = copy_size.saturating_mul(2);
        let value = json!({
            "keyslots": {},
            "tokens": { "0": token },
            "segments": { "0": {
                "type": "crypt",
                "offset": segment.offset.to_string(),
                "size": segment.size.map_or("dynamic".to_owned(), |size| size.to_string()),
                "iv_tweak": segment.iv_tweak.to_string(),
                "encryption": ENCRYPTION,
                "sector_size": segment.sector_size.bytes(),
            }},
            "digests": { "0": {
                "type": "pbkdf2",
                "keyslots": [],
                "segments": ["0"],
                "hash": "sha256",
                "iterations": DIGEST_ITERATIONS,
                "salt": BASE64_STANDARD.encode(salt),
                "digest": BASE64_STANDARD.encode(digest),
            }},
            "config": {
                "json_size": copy_size.saturating_sub(4096).to_string(),
                "keyslots_size": segment.offset.saturating_sub(copies).to_string(),
            },
        });
        match value {
            Value::Object(map) => Ok(Self(map)),
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => Err(MetadataError::Field("object")),
        }
    }

    /// Reads the JSON text.
    ///
    /// # Errors
    /// It is not a JSON object.
    pub fn parse(json: &[u8]) -> Result<Self, MetadataError> {
        serde_json::from_slice(json).map(Self).map_err(|e| MetadataError::Json(e.to_string()))
    }

    /// The JSON text.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        Value::Object(self.0.clone()).to_string().into_bytes()
    }

    fn objects(&self, name: &'static str) -> Result<&Map<String, Value>, MetadataError> {
        self.0.get(name).and_then(Value::as_object).ok_or(MetadataError::Field(name))
    }

    /// The one data segment.
    ///
    /// # Errors
    /// There is none, more than one, or one that byokd does not serve.
    pub fn segment(&self) -> Result<Segment, MetadataError> {
        let config = self.objects("config")?;
        if let Some(requirements) = config.get("requirements") {
            return Err(MetadataError::Unsupported(format!(
                "its header requires {requirements}, which byokd does not do; finish or undo that with cryptsetup first"
            )));
        }
        let segments = self.objects("segments")?;
        let mut all = segments.iter();
        let (Some((id, segment)), None) = (all.next(), all.next()) else {
            return Err(MetadataError::Unsupported(format!(
                "it has {} data segments; byokd serves volumes with exactly one",
                segments.len()
            )));
        };
        if id != "0" || segment.get("type").and_then(Value::as_str) != Some("crypt") {
            return Err(MetadataError::Unsupported("its segment is not an encrypted one".into()));
        }
        let encryption = segment.get("encryption").and_then(Value::as_str).unwrap_or_default();
        if encryption != ENCRYPTION {
            return Err(MetadataError::Unsupported(format!(
                "its data is encrypted as `{encryption}`; byokd serves {ENCRYPTION} only"
            )));
        }
        for field in ["integrity", "flags"] {
            if let Some(value) = segment.get(field) {
                return Err(MetadataError::Unsupported(format!(
                    "its segment has `{field}` {value}, which byokd does not do"
                )));
            }
        }
        let decimal = |name| {
            let text = segment.get(name).and_then(Value::as_str);
            text.and_then(|t| t.parse::<u64>().ok()).ok_or(MetadataError::Field(name))
        };
        let size = match segment.get("size").and_then(Value::as_str) {
            Some("dynamic") => None,
            _ => Some(decimal("size")?),
        };
        let sector_size = segment
            .get("sector_size")
            .and_then(Value::as_u64)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or(MetadataError::Field("sector_size"))?;
        let sector_size = SectorSize::try_from(sector_size)
            .map_err(|e| MetadataError::Unsupported(e.to_string()))?;
        let iv_tweak = decimal("iv_tweak")?;
        if iv_tweak != 0 {
            return Err(MetadataError::Unsupported(format!(
                "its segment has iv_tweak {iv_tweak}; byokd serves 0 only"
            )));
        }
        let offset = decimal("offset")?;
        if offset == 0 || offset % 512 != 0 {
            return Err(MetadataError::Field("offset"));
        }
        Ok(Segment { offset, size, sector_size, iv_tweak })
    }

    /// The digest of segment 0's key.
    ///
    /// # Errors
    /// There is none that can be checked.
    pub fn digest(&self) -> Result<Digest, MetadataError> {
        const FIELD: MetadataError = MetadataError::Field("digest of segment 0");
        let covers = |digest: &&Value| {
            let segments = digest.get("segments").and_then(Value::as_array);
            segments.is_some_and(|s| s.iter().any(|id| id == "0"))
        };
        let digest = self.objects("digests")?.values().find(covers).ok_or(FIELD)?;
        let text = |name| digest.get(name).and_then(Value::as_str);
        if text("type") != Some("pbkdf2") {
            return Err(FIELD);
        }
        let hash = match text("hash") {
            Some("sha256") => Hash::Sha256,
            Some("sha512") => Hash::Sha512,
            _ => return Err(FIELD),
        };
        let bytes = |name| text(name).and_then(|t| BASE64_STANDARD.decode(t).ok()).ok_or(FIELD);
        let iterations = digest.get("iterations").and_then(Value::as_u64).unwrap_or_default();
        let iterations = u32::try_from(iterations)
            .ok()
            .filter(|n| u64::from(*n) <= MAX_ITERATIONS)
            .and_then(NonZeroU32::new)
            .ok_or(FIELD)?;
        let (salt, digest) = (bytes("salt")?, bytes("digest")?);
        if digest.len() < 16 || digest.len() > 64 {
            return Err(FIELD);
        }
        Ok(Digest { iterations, salt, digest, hash })
    }

    /// Every token of a type, with its id.
    pub fn tokens<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let tokens = self.0.get("tokens").and_then(Value::as_object);
        tokens
            .into_iter()
            .flatten()
            .filter(move |(_, token)| token.get("type").and_then(Value::as_str) == Some(kind))
            .map(|(id, token)| (id.as_str(), token))
    }

    /// Puts a token in the place of the one with that id.
    ///
    /// # Errors
    /// The metadata has no tokens object.
    pub fn set_token(&mut self, id: &str, token: Value) -> Result<(), MetadataError> {
        let tokens = self.0.get_mut("tokens").and_then(Value::as_object_mut);
        tokens.ok_or(MetadataError::Field("tokens"))?.insert(id.to_owned(), token);
        Ok(())
    }
}

impl Digest {
    /// Whether this is the digest of `key`. Takes the same time for every key.
    #[must_use]
    pub fn matches(&self, key: &VolumeKey) -> bool {
        key.expose(|key| {
            let algorithm = self.hash.algorithm();
            pbkdf2::verify(algorithm, self.iterations, &self.salt, key, &self.digest).is_ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_others_are_written_as_they_were_read() {
        for number in ["0.1", "2.2250738585072014e-308", "7.2057594037927945e16", "-0.0", "17"] {
            let text = format!(r#"{{"tokens":{{"3":{{"type":"other","n":{number}}}}}}}"#);
            let metadata = Metadata::parse(text.as_bytes()).unwrap();
            let again = Metadata::parse(&metadata.encode()).unwrap();
            let value = |metadata: &Metadata| {
                metadata.tokens("other").next().and_then(|(_, t)| t["n"].as_f64()).unwrap()
            };
            assert_eq!(value(&metadata).to_bits(), number.parse::<f64>().unwrap().to_bits());
            assert_eq!(metadata, again, "{number}");
        }
    }
}
