//! The binary header: the first 4096 bytes of each of the two copies.
//!
//! Source: LUKS2 On-Disk Format Specification, "Binary Header". Integers are big-endian. The
//! checksum covers the binary header with its own field zeroed and the whole JSON area.

#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use aws_lc_rs::digest::{SHA256, digest};
use thiserror::Error;

/// Bytes of the binary header; the JSON area follows.
pub const BINARY_LEN: usize = 4096;

/// The sizes a copy (binary header and JSON area) may have.
pub const COPY_SIZES: [usize; 9] =
    [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];

const PRIMARY_MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SECONDARY_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
const CHECKSUM_AT: usize = 448;
const CHECKSUM_LEN: usize = 64;

/// Which of the two copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The one at the start.
    Primary,
    /// The one behind it.
    Secondary,
}

impl Which {
    fn magic(self) -> &'static [u8; 6] {
        match self {
            Self::Primary => PRIMARY_MAGIC,
            Self::Secondary => SECONDARY_MAGIC,
        }
    }

    /// Where it lies, when a copy has `size` bytes.
    #[must_use]
    pub fn offset(self, size: usize) -> usize {
        match self {
            Self::Primary => 0,
            Self::Secondary => size,
        }
    }
}

/// Why a copy is not good.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CopyError {
    /// It does not begin as one.
    #[error("no LUKS2 magic")]
    Magic,
    /// It begins as LUKS, of another version.
    #[error("LUKS version {0}, not 2")]
    Version(u16),
    /// A field has a value the format does not know.
    #[error("its {0} is not one the format allows")]
    Field(&'static str),
    /// It ends before it should.
    #[error("it is cut off")]
    Short,
    /// Its checksum is wrong.
    #[error("its checksum is wrong: damaged, or written only in part")]
    Checksum,
}

/// A copy's binary header and its JSON text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Bytes of the whole copy.
    pub size: usize,
    /// Goes up by one at each update; the higher good copy wins.
    pub seqid: u64,
    /// `label`, text.
    pub label: String,
    /// `uuid`, text.
    pub uuid: String,
    /// `subsystem`, text.
    pub subsystem: String,
    /// The JSON text, without the padding.
    pub json: Vec<u8>,
}

fn field(bytes: &[u8], at: usize, len: usize) -> Result<&[u8], CopyError> {
    let end = at.checked_add(len).ok_or(CopyError::Short)?;
    bytes.get(at..end).ok_or(CopyError::Short)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], CopyError> {
    field(bytes, at, N)?.try_into().map_err(|_| CopyError::Short)
}

fn text(bytes: &[u8], at: usize, len: usize, name: &'static str) -> Result<String, CopyError> {
    let field = field(bytes, at, len)?;
    let end = field.iter().position(|b| *b == 0).ok_or(CopyError::Field(name))?;
    let text = field.get(..end).unwrap_or_default().to_vec();
    String::from_utf8(text).map_err(|_| CopyError::Field(name))
}

fn checksum(copy: &[u8]) -> Result<[u8; 32], CopyError> {
    let mut whole = copy.to_vec();
    let end = CHECKSUM_AT.saturating_add(CHECKSUM_LEN);
    whole.get_mut(CHECKSUM_AT..end).ok_or(CopyError::Short)?.fill(0);
    digest(&SHA256, &whole).as_ref().try_into().map_err(|_| CopyError::Checksum)
}

impl Copy {
    /// The copy of which `area` (the start of the device) should hold one at `offset`.
    ///
    /// # Errors
    /// There is no good copy there.
    pub fn parse(area: &[u8], offset: usize, which: Which) -> Result<Self, CopyError> {
        let start = area.get(offset..).ok_or(CopyError::Short)?;
        let magic = start.get(..6).ok_or(CopyError::Short)?;
        if magic != which.magic() {
            return Err(CopyError::Magic);
        }
        let version = u16::from_be_bytes(number(start, 6)?);
        if version != 2 {
            return Err(CopyError::Version(version));
        }
        let size = usize::try_from(u64::from_be_bytes(number(start, 8)?))
            .ok()
            .filter(|size| COPY_SIZES.contains(size))
            .ok_or(CopyError::Field("header size"))?;
        if u64::from_be_bytes(number(start, 256)?) != offset as u64 || offset != which.offset(size)
        {
            return Err(CopyError::Field("header offset"));
        }
        if text(start, 72, 32, "checksum algorithm")? != "sha256" {
            return Err(CopyError::Field("checksum algorithm"));
        }
        let copy = start.get(..size).ok_or(CopyError::Short)?;
        if field(copy, CHECKSUM_AT, 32)? != checksum(copy)? {
            return Err(CopyError::Checksum);
        }
        let json = copy.get(BINARY_LEN..).ok_or(CopyError::Short)?;
        let end = json.iter().position(|b| *b == 0).unwrap_or(json.len());
        Ok(Self {
            size,
            seqid: u64::from_be_bytes(number(copy, 16)?),
            label: text(copy, 24, 48, "label")?,
            uuid: text(copy, 168, 40, "uuid")?,
            subsystem: text(copy, 208, 48, "subsystem")?,
            json: json.get(..end).unwrap_or_default().to_vec(),
        })
    }

    /// The bytes of the copy, with `salt` as its salt.
    ///
    /// # Errors
    /// The JSON or a text does not fit.
    pub fn encode(&self, which: Which, salt: &[u8; 64]) -> Result<Vec<u8>, CopyError> {
        let mut out = vec![0; self.size];
        let mut put = |at: usize, bytes: &[u8], most: usize, name| {
            let end = at.saturating_add(bytes.len());
            match out.get_mut(at..end) {
                Some(to) if bytes.len() <= most => {
                    to.copy_from_slice(bytes);
                    Ok(())
                }
                _ => Err(CopyError::Field(name)),
            }
        };
        put(0, which.magic(), 6, "magic")?;
        put(6, &2u16.to_be_bytes(), 2, "version")?;
        put(8, &(self.size as u64).to_be_bytes(), 8, "header size")?;
        put(16, &self.seqid.to_be_bytes(), 8, "seqid")?;
        put(24, self.label.as_bytes(), 47, "label")?;
        put(72, b"sha256", 31, "checksum algorithm")?;
        put(104, salt, 64, "salt")?;
        put(168, self.uuid.as_bytes(), 39, "uuid")?;
        put(208, self.subsystem.as_bytes(), 47, "subsystem")?;
        put(256, &(which.offset(self.size) as u64).to_be_bytes(), 8, "header offset")?;
        // At least one NUL ends the JSON text.
        let room = self.size.saturating_sub(BINARY_LEN).saturating_sub(1);
        put(BINARY_LEN, &self.json, room, "metadata size")?;
        let sum = checksum(&out)?;
        out.get_mut(CHECKSUM_AT..)
            .and_then(|out| out.get_mut(..32))
            .ok_or(CopyError::Short)?
            .copy_from_slice(&sum);
        Ok(out)
    }
}
