//! The chain: how a record becomes a line, and what a line proves by itself.
//!
//! A line is one JSON object whose last member is `hash`: the SHA-256, in small hex digits, of all
//! bytes of the line before `,"hash":"`. Those bytes hold `prev`, the hash of the record before.
//! The bytes as they stand are what is hashed, so nothing depends on how JSON is written, and
//! `sed` and `sha256sum` are enough to check a line.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::audit::record::{Foreign, Record, Torn};

/// A SHA-256, written as 64 small hex digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash([u8; 32]);

/// A text that is no hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a hash is 64 hex digits, small letters")]
pub struct NoHash;

impl Hash {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
        Self(hash)
    }

    /// Its first 12 hex digits as a number: what a double can hold.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.iter().take(6).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl FromStr for Hash {
    type Err = NoHash;
    fn from_str(text: &str) -> Result<Self, NoHash> {
        let bytes = unhex(text).ok_or(NoHash)?;
        Ok(Self(bytes.try_into().map_err(|_| NoHash)?))
    }
}

impl TryFrom<String> for Hash {
    type Error = NoHash;
    fn try_from(text: String) -> Result<Self, NoHash> {
        text.parse()
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        hash.to_string()
    }
}

/// Small hex digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// The bytes of small hex digits.
#[must_use]
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(nibble(*pair.first()?)? << 4 | nibble(*pair.get(1)?)?)).collect()
}

/// What stands between the bytes that are hashed and the hash.
const MEMBER: &str = ",\"hash\":\"";

/// The hash member and the brace that closes the line.
const SEAL_LEN: usize = MEMBER.len() + 64 + 2;

/// The line of a record, with the hash that it gives it; without a newline.
///
/// # Panics
/// Never: a record has only texts and numbers, which can be written as JSON.
#[must_use]
pub fn seal(record: &mut Record) -> String {
    record.hash = Hash::default();
    let text = json(record);
    let mut line = text[..text.len() - SEAL_LEN].to_owned();
    record.hash = Hash::of(line.as_bytes());
    line.push_str(MEMBER);
    line.push_str(&record.hash.to_string());
    line.push_str("\"}");
    line
}

fn json(record: &Record) -> String {
    serde_json::to_string(record).expect("texts and numbers can be written as JSON")
}

/// `,"prev":"`, a hash, and a quotation mark.
const PREV_LEN: usize = 9 + 64 + 1;

/// What the signature of a record that has none yet covers: all of it, and its place in the chain.
///
/// # Panics
/// Never, like [`seal`].
#[must_use]
pub fn signed_text(record: &Record) -> String {
    let text = json(record);
    let content = &text[..text.len() - SEAL_LEN - PREV_LEN];
    text_to_sign(&record.prev, &Hash::of(content.as_bytes()))
}

fn text_to_sign(prev: &Hash, content: &Hash) -> String {
    format!("byokd audit record 1\n{prev}\n{content}\n")
}

/// Why a line is no record as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LineError {
    /// It does not end in a hash.
    #[error("it does not end in a hash")]
    NoSeal,
    /// The hash is not that of the line.
    #[error("its hash is {is}, the line's is {should}")]
    Hash {
        /// What stands there.
        is: Hash,
        /// What should.
        should: Hash,
    },
    /// The hash fits, but what it covers is no record.
    #[error("its hash fits, but it is no record: {0}")]
    NoRecord(String),
}

/// What a line says of its place in the chain. Kinds of events that a later version has are no
/// reason to doubt a trail.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Link {
    /// Its number.
    pub seq: u64,
    /// When.
    pub time: String,
    /// The run that recorded it.
    #[serde(default)]
    pub instance: String,
    /// What kind of thing happened.
    pub event: String,
    /// The hash of the record before.
    pub prev: Hash,
    /// Its own.
    pub hash: Hash,
    /// What a crash cut off before it.
    pub torn: Option<Torn>,
    /// What stands in a file and was written by something else.
    pub foreign: Option<Foreign>,
    /// The first record that is kept.
    pub kept_from: Option<u64>,
    /// Events that could not be recorded.
    pub lost: Option<u64>,
    /// The signature.
    pub signature: Option<String>,
    /// Whose.
    pub signer: Option<String>,
    /// Of all that stands before the signature, if nothing but its place in the chain follows it.
    #[serde(skip)]
    pub content: Option<Hash>,
}

/// Checks a line, without its newline, by itself.
///
/// # Errors
/// It is no record as it was written.
pub fn check(line: &[u8]) -> Result<Link, LineError> {
    let at = line.len().checked_sub(SEAL_LEN).ok_or(LineError::NoSeal)?;
    let (covered, seal) = line.split_at(at);
    let seal = std::str::from_utf8(seal).map_err(|_| LineError::NoSeal)?;
    let written = seal.strip_prefix(MEMBER).and_then(|rest| rest.strip_suffix("\"}"));
    let is: Hash = written.and_then(|hash| hash.parse().ok()).ok_or(LineError::NoSeal)?;
    let should = Hash::of(covered);
    if is != should {
        return Err(LineError::Hash { is, should });
    }
    let mut link: Link =
        serde_json::from_slice(line).map_err(|e| LineError::NoRecord(e.to_string()))?;
    link.content = content(line, &link);
    Ok(link)
}

fn content(line: &[u8], link: &Link) -> Option<Hash> {
    let (signature, signer) = (link.signature.as_ref()?, link.signer.as_ref()?);
    let end = format!(
        ",\"signature\":\"{signature}\",\"signer\":\"{signer}\",\"prev\":\"{}\"{MEMBER}{}\"}}",
        link.prev, link.hash
    );
    line.strip_suffix(end.as_bytes()).map(Hash::of)
}

/// How every line begins.
const BEGINNING: &[u8] = b"{\"seq\":";

/// Whether bytes without a newline at their end can be the start of a line that was cut off: not
/// if they begin in another way, and not if the end of a line is there.
#[must_use]
pub fn may_be_cut_off(fragment: &[u8]) -> bool {
    if !fragment.starts_with(BEGINNING) && !BEGINNING.starts_with(fragment) {
        return false;
    }
    let member = MEMBER.as_bytes();
    let end = fragment.windows(member.len()).rposition(|window| window == member);
    end.is_none_or(|at| fragment.len() < at + SEAL_LEN)
}

/// What a record's signature covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signed {
    /// It has none.
    Not,
    /// It is not that of the key.
    Wrongly,
    /// The chain up to the record before. Versions before 0.1 signed so, and checkpoints alone.
    Before,
    /// The record, and with it the chain up to it.
    Whole,
}

/// What a record's signature covers, if it is that of the key.
#[must_use]
pub fn signed_by(link: &Link, public_key: &[u8]) -> Signed {
    let Some(signature) = &link.signature else { return Signed::Not };
    let Some(signature) = unhex(signature) else { return Signed::Wrongly };
    let key = UnparsedPublicKey::new(&ED25519, public_key);
    let fits = |text: &str| key.verify(text.as_bytes(), &signature).is_ok();
    if link.content.is_some_and(|content| fits(&text_to_sign(&link.prev, &content))) {
        return Signed::Whole;
    }
    let before = format!("byokd audit checkpoint 1\n{}\n{}\n", link.seq, link.prev);
    if is_mark(&link.event) && fits(&before) { Signed::Before } else { Signed::Wrongly }
}

/// Whether that kind of record was signed when only checkpoints were.
#[must_use]
pub fn is_mark(event: &str) -> bool {
    matches!(event, "checkpoint" | "daemon-stop")
}
