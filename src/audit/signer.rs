//! The key that records are signed with.
//!
//! Each record is signed, not only checkpoints: between two checkpoints whoever can write the file
//! could put what he likes, and after a crash the next checkpoint would cover it. A signature costs
//! some 20 microseconds; syncing the record costs a hundred times that.
//!
//! Ed25519 and not an HMAC: whoever checks a trail then needs nothing that could forge one.

use std::fmt;
use std::path::{Path, PathBuf};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::audit::chain::{hex, signed_text, unhex};
use crate::audit::record::Record;

/// A key file that cannot be used.
#[derive(Debug, Error)]
#[error("{}: {why}", path.display())]
pub struct KeyFileError {
    path: PathBuf,
    why: String,
}

/// Signs records.
pub(super) struct Signer {
    pair: Ed25519KeyPair,
    public: String,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.public)
    }
}

impl Signer {
    /// The key in a PEM file (PKCS#8), as `openssl genpkey -algorithm ed25519` writes it.
    pub(super) fn read(path: &Path) -> Result<Self, KeyFileError> {
        let fail = |why: String| KeyFileError { path: path.to_owned(), why };
        let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        let text = Zeroizing::new(text);
        let der = Zeroizing::new(
            pem(&text, "PRIVATE KEY").ok_or_else(|| fail("it holds no PEM PRIVATE KEY".into()))?,
        );
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der)
            .map_err(|e| fail(format!("it is no Ed25519 key: {e}")))?;
        let public = hex(pair.public_key().as_ref());
        Ok(Self { pair, public })
    }

    /// Signs a record that is about to be sealed.
    pub(super) fn sign(&self, record: &mut Record) {
        let signature = hex(self.pair.sign(signed_text(record).as_bytes()).as_ref());
        record.event.signature = Some(signature);
        record.event.signer = Some(self.public.clone());
    }

    /// The public key, in hex.
    pub(super) fn public(&self) -> &str {
        &self.public
    }
}

/// A public key: 64 hex digits, or a PEM file as `openssl pkey -pubout` writes it.
///
/// # Errors
/// It is neither.
pub fn public_key(text: &str) -> Result<Vec<u8>, KeyFileError> {
    if let Some(key) = unhex(text).filter(|key| key.len() == 32) {
        return Ok(key);
    }
    let fail = |why: String| KeyFileError { path: text.into(), why };
    let read = std::fs::read_to_string(text).map_err(|e| fail(e.to_string()))?;
    let der = pem(&read, "PUBLIC KEY").ok_or_else(|| fail("it holds no PEM PUBLIC KEY".into()))?;
    // RFC 8410: an Ed25519 SubjectPublicKeyInfo is these twelve bytes and the key.
    match der.strip_prefix(b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00") {
        Some(key) if key.len() == 32 => Ok(key.to_vec()),
        Some(_) | None => Err(fail("it is no Ed25519 key".to_owned())),
    }
}

fn pem(text: &str, label: &str) -> Option<Vec<u8>> {
    let body = text.split(&format!("-----BEGIN {label}-----")).nth(1)?;
    let body = body.split(&format!("-----END {label}-----")).next()?;
    let digits: Zeroizing<String> = Zeroizing::new(body.split_whitespace().collect());
    BASE64_STANDARD.decode(digits.as_bytes()).ok()
}
