//! The header of a volume: LUKS2 with a `byokd-aws-kms` token. Pure: bytes in, values out.
//!
//! Source: LUKS2 On-Disk Format Specification (cryptsetup), and `docs/format.md`. A header is two
//! copies of a binary header and a JSON area. [`Header::parse`] takes the newer good copy and says
//! what was wrong with the other; [`Header::copies`] gives both for writing.

pub mod binary;
pub mod metadata;
pub mod token;

use aws_lc_rs::rand;
use thiserror::Error;
use uuid::Uuid;

use crate::key::VolumeKey;
use crate::key::wrapped::{Canary, WrappedKey};
use crate::units::SectorSize;
use binary::{COPY_SIZES, Copy, CopyError, Which};
use metadata::{Metadata, MetadataError, Segment};
use token::{TOKEN_TYPE, Token, TokenError};

/// Where the data of a new volume starts, in bytes: what cryptsetup leaves too.
pub const DATA_OFFSET: u64 = 16 << 20;

/// Bytes of each copy of a new volume's header.
const NEW_COPY_SIZE: usize = 16 << 10;

/// How much of the start of a device can hold header: two copies of the largest size.
pub const AREA: usize = 8 << 20;

/// What a device that is not a volume of ours turned out to be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// Nothing of LUKS2 is there.
    #[error("there is no LUKS2 header")]
    None,
    /// LUKS version 1.
    #[error("this is a LUKS1 device; byokd volumes are LUKS2")]
    Luks1,
    /// Both copies are damaged.
    #[error(
        "both copies of its header are damaged (first: {primary}; second: {secondary}); restore one with `cryptsetup luksHeaderRestore`"
    )]
    BothDamaged {
        /// What is wrong with the first.
        primary: CopyError,
        /// What is wrong with the second.
        secondary: CopyError,
    },
    /// LUKS2, but not one we serve.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// LUKS2 without our token.
    #[error("it is a LUKS2 device without a {TOKEN_TYPE} token: not made by byokd")]
    NoToken,
    /// More than one token of ours.
    #[error("it has {0} {TOKEN_TYPE} tokens; there must be one")]
    ManyTokens(usize),
    /// A token that cannot be used.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The uuid is none.
    #[error("its uuid `{0}` is not a uuid")]
    Uuid(String),
    /// A new header does not fit.
    #[error("the header cannot be written: {0}")]
    Encode(CopyError),
    /// No randomness.
    #[error("the system gives no randomness")]
    NoRandomness,
}

/// Why a key does not open a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WrongKey {
    /// The digest says so.
    #[error("the key that KMS unwrapped is not this volume's key")]
    Digest,
    /// The key is right, but the header was changed by someone who does not have it.
    #[error(
        "the header was changed by someone without the key (its MAC is wrong): offset, sizes, context or wrapped key are not what they were"
    )]
    Mac,
}

/// A volume's header.
#[derive(Clone, Debug)]
pub struct Header {
    copy: Copy,
    metadata: Metadata,
    uuid: Uuid,
    segment: Segment,
    token_id: String,
    token: Token,
}

/// The state the copies were found in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Both good and the same.
    NotNeeded,
    /// One had to be passed over.
    Needed(String),
}

/// What a new header says.
#[derive(Clone, Debug)]
pub struct NewHeader {
    /// The volume's identity.
    pub uuid: Uuid,
    /// Words for people and `blkid`, at most 47 bytes.
    pub label: String,
    /// Bytes a client may use.
    pub capacity: u64,
    /// The size of a sector.
    pub sector_size: SectorSize,
    /// When, RFC 3339.
    pub created: String,
}

impl Header {
    /// A header for a new volume.
    ///
    /// # Errors
    /// There is no randomness, or it does not fit.
    pub fn new(
        new: NewHeader,
        key: &VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
    ) -> Result<Self, HeaderError> {
        let NewHeader { uuid, label, capacity, sector_size, created } = new;
        let segment = Segment { offset: DATA_OFFSET, size: None, sector_size, iv_tweak: 0 };
        let token = Token::seal(uuid, segment, capacity, created, wrapped, canary, key);
        let metadata = Metadata::new(segment, key, &token.encode()?, NEW_COPY_SIZE as u64)?;
        let copy = Copy {
            size: NEW_COPY_SIZE,
            seqid: 1,
            label,
            uuid: uuid.to_string(),
            subsystem: String::new(),
            json: metadata.encode(),
        };
        Ok(Self { copy, metadata, uuid, segment, token_id: "0".into(), token })
    }

    /// The header in `area`, the start of a device: up to [`AREA`] bytes, fewer if it is smaller.
    ///
    /// # Errors
    /// There is no volume of ours.
    pub fn parse(area: &[u8]) -> Result<(Self, Recovery), HeaderError> {
        let primary = Copy::parse(area, 0, Which::Primary);
        if primary == Err(CopyError::Version(1)) {
            return Err(HeaderError::Luks1);
        }
        // A damaged first copy may not even say where the second one is.
        let secondary = COPY_SIZES
            .into_iter()
            .map(|size| Copy::parse(area, size, Which::Secondary))
            .max_by_key(|copy| match copy {
                Ok(copy) => (2, copy.seqid),
                Err(CopyError::Magic | CopyError::Short) => (0, 0),
                Err(_) => (1, 0),
            })
            .unwrap_or(Err(CopyError::Magic));
        let (copy, recovery) = match (primary, secondary) {
            (Ok(first), Ok(second)) if first.seqid == second.seqid => {
                let same = first.json == second.json && first.size == second.size;
                let note = "the second copy of the header differed from the first";
                let found = if same { Recovery::NotNeeded } else { needed(note) };
                (first, found)
            }
            (Ok(first), Ok(second)) => {
                let note = format!(
                    "an update of the header was cut off: copies {} and {}, the newer one counts",
                    first.seqid, second.seqid
                );
                let newer = if first.seqid > second.seqid { first } else { second };
                (newer, needed(&note))
            }
            (Ok(first), Err(error)) => {
                (first, needed(&format!("the second copy of the header is damaged: {error}")))
            }
            (Err(error), Ok(second)) => {
                (second, needed(&format!("the first copy of the header is damaged: {error}")))
            }
            (
                Err(CopyError::Magic | CopyError::Short),
                Err(CopyError::Magic | CopyError::Short),
            ) => {
                return Err(HeaderError::None);
            }
            (Err(primary), Err(secondary)) => {
                return Err(HeaderError::BothDamaged { primary, secondary });
            }
        };
        Ok((Self::from_copy(copy)?, recovery))
    }

    fn from_copy(copy: Copy) -> Result<Self, HeaderError> {
        let metadata = Metadata::parse(&copy.json)?;
        let uuid = copy.uuid.parse().map_err(|_| HeaderError::Uuid(copy.uuid.clone()))?;
        let tokens: Vec<_> = metadata.tokens(TOKEN_TYPE).collect();
        let (token_id, token) = match tokens[..] {
            [(id, value)] => (id.to_owned(), Token::parse(value, uuid)?),
            [] => return Err(HeaderError::NoToken),
            _ => return Err(HeaderError::ManyTokens(tokens.len())),
        };
        let segment = metadata.segment()?;
        metadata.digest()?;
        Ok(Self { copy, metadata, uuid, segment, token_id, token })
    }

    /// The identity of the volume.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Where the data lies.
    #[must_use]
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// Our token.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// The number of this version of the header.
    #[must_use]
    pub fn seqid(&self) -> u64 {
        self.copy.seqid
    }

    /// Whether `key` is this volume's, and the header is as its holder made it.
    ///
    /// # Errors
    /// It is not.
    pub fn verify(&self, key: &VolumeKey) -> Result<(), WrongKey> {
        match self.metadata.digest() {
            Ok(digest) if digest.matches(key) => {}
            _ => return Err(WrongKey::Digest),
        }
        if self.token.is_sealed(self.uuid, self.segment, key) { Ok(()) } else { Err(WrongKey::Mac) }
    }

    /// The next version of this header: the same with another wrapped key and canary.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn rewrapped(
        &self,
        key: &VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
    ) -> Result<Self, HeaderError> {
        self.sealed_anew(self.token.capacity, key, wrapped, canary)
    }

    /// The next version of this header: the same with another capacity.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn resized(&self, key: &VolumeKey, capacity: u64) -> Result<Self, HeaderError> {
        let Token { wrapped, canary, .. } = self.token.clone();
        self.sealed_anew(capacity, key, wrapped, canary)
    }

    fn sealed_anew(
        &self,
        capacity: u64,
        key: &VolumeKey,
        wrapped: WrappedKey,
        canary: Canary,
    ) -> Result<Self, HeaderError> {
        let created = self.token.created.clone();
        let mut next = self.clone();
        next.token = Token::seal(self.uuid, self.segment, capacity, created, wrapped, canary, key);
        next.metadata.set_token(&self.token_id, next.token.encode()?)?;
        next.copy.json = next.metadata.encode();
        next.copy.seqid = self.copy.seqid.saturating_add(1);
        Ok(next)
    }

    /// Both copies as bytes, each with where it goes: to be written one after the other, with a
    /// sync in between, so that a cut at any byte leaves one that is good.
    ///
    /// # Errors
    /// It does not fit, or there is no randomness for the salts.
    pub fn copies(&self) -> Result<[(u64, Vec<u8>); 2], HeaderError> {
        let one = |which: Which| -> Result<_, HeaderError> {
            let mut salt = [0; 64];
            rand::fill(&mut salt).map_err(|_| HeaderError::NoRandomness)?;
            let bytes = self.copy.encode(which, &salt).map_err(HeaderError::Encode)?;
            Ok((which.offset(self.copy.size) as u64, bytes))
        };
        Ok([one(Which::Secondary)?, one(Which::Primary)?])
    }
}

fn needed(note: &str) -> Recovery {
    Recovery::Needed(note.to_owned())
}
