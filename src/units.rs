//! Offsets, sectors and geometry: the one place where ranges and overflow are checked; and how
//! times and words are written.
//!
//! A [`SectorRange`] is made only by [`Geometry`], so whoever holds one knows that it lies inside
//! the volume. Sizes are bytes unless a name says sectors.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A time as people and programs are given it: RFC 3339, UTC, milliseconds.
#[must_use]
pub fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// A time span in whole milliseconds.
#[must_use]
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The word that a value is in JSON, for other places that write it.
#[must_use]
pub fn word(value: impl Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    value.and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A size in bytes, written plainly or with K, M, G, T (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("`{text}` is not a size; write it like 10G, 512M or 1048576");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
            "" => 0,
            "K" | "k" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(wrong()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

/// The data unit of the cipher and the smallest thing the store is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum SectorSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes, the default.
    B4096,
}

/// A sector size other than 512 or 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a sector size of {0} bytes is not served; use 4096 or 512")]
pub struct SectorSizeError(pub u32);

impl SectorSize {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }

    /// The size in bytes, for arithmetic with offsets.
    #[must_use]
    pub const fn bytes_u64(self) -> u64 {
        self.bytes() as u64
    }

    /// The size in bytes, for indexing.
    #[must_use]
    pub const fn bytes_usize(self) -> usize {
        self.bytes() as usize
    }

    /// How far the tweak moves from one sector to the next: LUKS2 counts it in units of 512 bytes
    /// whatever the sector size.
    #[must_use]
    pub const fn tweak_step(self) -> u64 {
        self.bytes_u64() / 512
    }
}

impl TryFrom<u32> for SectorSize {
    type Error = SectorSizeError;
    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        match bytes {
            512 => Ok(Self::B512),
            4096 => Ok(Self::B4096),
            other => Err(SectorSizeError(other)),
        }
    }
}

impl From<SectorSize> for u32 {
    fn from(size: SectorSize) -> Self {
        size.bytes()
    }
}

/// A range that leaves the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{len} bytes at offset {offset} do not lie within the volume's {capacity} bytes")]
pub struct OutOfRange {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len: u64,
    /// The volume's size, in bytes.
    pub capacity: u64,
}

/// The size of a volume and of its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    capacity: u64,
    sector_size: SectorSize,
}

impl Geometry {
    /// A volume of `capacity` bytes, cut down to whole sectors.
    #[must_use]
    pub fn new(capacity: u64, sector_size: SectorSize) -> Self {
        Self { capacity: capacity - capacity % sector_size.bytes_u64(), sector_size }
    }

    /// The volume's size in bytes: what a client may address.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The size of a sector.
    #[must_use]
    pub fn sector_size(&self) -> SectorSize {
        self.sector_size
    }

    /// The sectors that hold `len` bytes at `offset`: the range grown outwards to whole sectors.
    ///
    /// # Errors
    /// The bytes do not all lie within the volume.
    pub fn sectors(&self, offset: u64, len: u64) -> Result<SectorRange, OutOfRange> {
        let out = OutOfRange { offset, len, capacity: self.capacity };
        let end = offset.checked_add(len).ok_or(out)?;
        if end > self.capacity {
            return Err(out);
        }
        let size = self.sector_size.bytes_u64();
        // No overflow: capacity is a multiple of the size and end does not pass it.
        let first = offset / size * size;
        let last = end.div_ceil(size) * size;
        Ok(SectorRange { offset: first, len: last.max(first) - first, size: self.sector_size })
    }

    /// The whole sectors within `len` bytes at `offset`: the range shrunk inwards, maybe to nothing.
    ///
    /// # Errors
    /// The bytes do not all lie within the volume.
    pub fn whole_sectors(&self, offset: u64, len: u64) -> Result<SectorRange, OutOfRange> {
        self.sectors(offset, len)?;
        let size = self.sector_size.bytes_u64();
        let first = offset.div_ceil(size) * size;
        let last = (offset + len) / size * size;
        Ok(SectorRange { offset: first, len: last.saturating_sub(first), size: self.sector_size })
    }
}

/// Whole sectors inside a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    offset: u64,
    len: u64,
    size: SectorSize,
}

impl SectorRange {
    /// Where it starts, in bytes from the volume's first.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One past its last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The size of its sectors.
    #[must_use]
    pub fn sector_size(&self) -> SectorSize {
        self.size
    }

    /// The tweak of its first sector: the number of 512-byte units before it.
    #[must_use]
    pub fn first_tweak(&self) -> u64 {
        self.offset / 512
    }

    /// Whether it is exactly `len` bytes at `offset`, that is, nothing was grown.
    #[must_use]
    pub fn is_exactly(&self, offset: u64, len: u64) -> bool {
        self.offset == offset && self.len == len
    }

    /// The first `max_bytes` (rounded down to whole sectors, at least one) and the rest.
    #[must_use]
    pub fn split_front(&self, max_bytes: u64) -> (Self, Self) {
        let sector = self.size.bytes_u64();
        let at = (max_bytes / sector * sector).max(sector).min(self.len);
        (
            Self { offset: self.offset, len: at, size: self.size },
            Self { offset: self.offset + at, len: self.len - at, size: self.size },
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let size = |text: &str| text.parse::<Size>().map(|s| s.0);
        assert_eq!(size("10G"), Ok(10 << 30));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("G").is_err() && size("1X").is_err() && size("99999999999T").is_err());
    }

    proptest! {
        #[test]
        fn sectors_cover_exactly_what_was_asked(
            capacity in 0u64..1 << 40, offset in any::<u64>(), len in 0u64..1 << 41, small in any::<bool>(),
        ) {
            let size = if small { SectorSize::B512 } else { SectorSize::B4096 };
            let geometry = Geometry::new(capacity, size);
            let offset = if small { offset } else { offset % (1 << 41) };
            let inside = offset.checked_add(len).is_some_and(|end| end <= geometry.capacity());
            match geometry.sectors(offset, len) {
                Ok(range) => {
                    prop_assert!(inside);
                    prop_assert!(range.offset() <= offset && range.end() >= offset + len);
                    prop_assert!(range.end() <= geometry.capacity());
                    prop_assert!(offset - range.offset() < size.bytes_u64());
                    prop_assert!(range.end() - (offset + len) < size.bytes_u64());
                    prop_assert_eq!(range.first_tweak() * 512, range.offset());
                    let whole = geometry.whole_sectors(offset, len).unwrap();
                    prop_assert!(whole.is_empty() || whole.offset() >= offset && whole.end() <= offset + len);
                }
                Err(_) => prop_assert!(!inside),
            }
        }

        #[test]
        fn a_split_loses_nothing(sectors in 1u64..1000, max in 1u64..10_000_000) {
            let geometry = Geometry::new(1 << 30, SectorSize::B4096);
            let range = geometry.sectors(8192, sectors * 4096).unwrap();
            let (a, b) = range.split_front(max);
            prop_assert!(!a.is_empty());
            prop_assert_eq!(a.offset(), range.offset());
            prop_assert_eq!(a.end(), b.offset());
            prop_assert_eq!(b.end(), range.end());
        }
    }
}
