//! AES-256-XTS as LUKS2 and dm-crypt use it (IEEE 1619, `aes-xts-plain64`).
//!
//! One data unit is one sector. Its tweak is the little-endian number of 512-byte units before it
//! in the data segment, also when sectors are 4096 bytes. [`awslc`] is what serves; [`mod@reference`]
//! is an independent second implementation that [`self_test`] and the property tests hold it to.
//! Nobody but [`crate::fence`] holds an engine for a volume in service.

pub mod awslc;
pub mod reference;

use std::sync::Arc;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use thiserror::Error;

use crate::key::secret::{SecretArena, SecretMemoryError};
use crate::key::{VOLUME_KEY_LEN, VolumeKey};
use crate::units::SectorSize;

/// Why an engine could not be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CryptError {
    /// The two halves of the key are equal, which IEEE 1619 implementations refuse.
    #[error("the volume key's two halves are equal: not a usable AES-256-XTS key")]
    WeakKey,
    /// The library would put key schedules into ordinary memory.
    #[error("the cipher library does not take its memory from us, so its keys cannot be protected")]
    MemoryNotOurs,
    /// There is no locked memory for the key schedules.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

/// One implementation of the cipher, keyed. Data is whole sectors; the first has `tweak`.
pub trait Engine {
    /// Encrypts `data` in place.
    fn encrypt(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize);
    /// Decrypts `data` in place.
    fn decrypt(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize);
}

/// The self-test found an implementation wrong; a daemon that fails it must not serve.
#[derive(Debug, Error)]
pub enum SelfTestError {
    /// A known answer came out wrong.
    #[error("cipher self-test failed: {engine} gives a wrong answer for {vector}")]
    KnownAnswer {
        /// Which implementation.
        engine: &'static str,
        /// Which vector.
        vector: &'static str,
    },
    /// The two implementations disagree on random sectors.
    #[error("cipher self-test failed: the two implementations disagree on {0}")]
    Disagree(&'static str),
    /// The test could not run.
    #[error("cipher self-test could not run: {0}")]
    CannotRun(#[from] CryptError),
    /// No randomness.
    #[error("cipher self-test could not run: the system gives no randomness")]
    NoRandomness,
}

impl From<SecretMemoryError> for SelfTestError {
    fn from(error: SecretMemoryError) -> Self {
        Self::CannotRun(error.into())
    }
}

/// IEEE 1619-2007 annex B, vector 10 (XTS-AES-256, data unit ff, 512 bytes): the head and tail of
/// the ciphertext of the bytes 00, 01, ... ff, 00, ... ff.
const VECTOR_10_HEAD: [u8; 32] = [
    0x1c, 0x3b, 0x3a, 0x10, 0x2f, 0x77, 0x03, 0x86, 0xe4, 0x83, 0x6c, 0x99, 0xe3, 0x70, 0xcf, 0x9b,
    0xea, 0x00, 0x80, 0x3f, 0x5e, 0x48, 0x23, 0x57, 0xa4, 0xae, 0x12, 0xd4, 0x14, 0xa3, 0xe6, 0x3b,
];
const VECTOR_10_TAIL: [u8; 16] = [
    0xc4, 0xf3, 0x6f, 0xfd, 0xa9, 0xfc, 0xea, 0x70, 0xb9, 0xc6, 0xe6, 0x93, 0xe1, 0x48, 0xc1, 0x51,
];
/// Its key 1 and key 2: e and pi.
const VECTOR_10_KEY: [u8; 64] = [
    0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71, 0x35, 0x26,
    0x62, 0x49, 0x77, 0x57, 0x24, 0x70, 0x93, 0x69, 0x99, 0x59, 0x57, 0x49, 0x66, 0x96, 0x76, 0x27,
    0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64, 0x33, 0x83, 0x27, 0x95,
    0x02, 0x88, 0x41, 0x97, 0x16, 0x93, 0x99, 0x37, 0x51, 0x05, 0x82, 0x09, 0x74, 0x94, 0x45, 0x92,
];

fn known_key(bytes: &[u8; VOLUME_KEY_LEN]) -> Result<VolumeKey, SecretMemoryError> {
    VolumeKey::init_with(|k| {
        k.copy_from_slice(bytes);
        Ok(())
    })
}

fn known_answer(engine: &mut impl Engine, name: &'static str) -> Result<(), SelfTestError> {
    let plain: Vec<u8> = (0..=255u8).chain(0..=255).collect();
    let mut data = plain.clone();
    engine.encrypt(&mut data, 0xff, SectorSize::B512);
    let right = data.starts_with(&VECTOR_10_HEAD) && data.ends_with(&VECTOR_10_TAIL);
    engine.decrypt(&mut data, 0xff, SectorSize::B512);
    if right && data == plain {
        Ok(())
    } else {
        Err(SelfTestError::KnownAnswer { engine: name, vector: "IEEE 1619 vector 10" })
    }
}

/// Holds both implementations to the standard's known answer and to each other on random sectors
/// of both sizes, in both directions, with random keys and tweaks.
///
/// # Errors
/// They are wrong or disagree, or the test could not run.
pub fn self_test() -> Result<(), SelfTestError> {
    let arena = Arc::new(SecretArena::new());
    let key = known_key(&VECTOR_10_KEY)?;
    known_answer(&mut awslc::Xts::new(&key, &arena)?, "AWS-LC")?;
    known_answer(&mut reference::Xts::new(&key), "the reference")?;

    let random = SystemRandom::new();
    let fill = |bytes: &mut [u8]| random.fill(bytes).map_err(|_| SelfTestError::NoRandomness);
    for sector in [SectorSize::B512, SectorSize::B4096] {
        let key = VolumeKey::init_with(|k| fill(k))?;
        let mut fast = awslc::Xts::new(&key, &arena)?;
        let mut slow = reference::Xts::new(&key);
        let mut tweak = [0; 8];
        fill(&mut tweak)?;
        // Far enough from the end that four sectors do not wrap the 64-bit sector number.
        let tweak = u64::from_le_bytes(tweak) >> 1;
        let mut plain = vec![0; 4 * sector.bytes_usize()];
        fill(&mut plain)?;
        let (mut a, mut b) = (plain.clone(), plain.clone());
        fast.encrypt(&mut a, tweak, sector);
        slow.encrypt(&mut b, tweak, sector);
        if a != b || a == plain {
            return Err(SelfTestError::Disagree("encryption of random sectors"));
        }
        fast.decrypt(&mut a, tweak, sector);
        slow.decrypt(&mut b, tweak, sector);
        if a != plain || b != plain {
            return Err(SelfTestError::Disagree("decryption of random sectors"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_self_test_passes() {
        self_test().expect("both engines are right");
    }

    #[test]
    fn equal_halves_are_refused() {
        let key = known_key(&[9; 64]).unwrap();
        let error = awslc::Xts::new(&key, &Arc::new(SecretArena::new())).err();
        assert_eq!(error, Some(CryptError::WeakKey));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn both_engines_agree(
            key in proptest::array::uniform32(any::<u8>()), tweak in 0u64..u64::MAX / 2,
            sectors in 1usize..9, small in any::<bool>(), seed in any::<u8>(),
        ) {
            let size = if small { SectorSize::B512 } else { SectorSize::B4096 };
            let mut bytes = [0; 64];
            bytes[..32].copy_from_slice(&key);
            bytes[32..].copy_from_slice(&key.map(|b| b ^ 0x5a));
            let key = known_key(&bytes).unwrap();
            let arena = Arc::new(SecretArena::new());
            let plain: Vec<u8> =
                (0..251).cycle().take(sectors * size.bytes_usize()).map(|i| seed.wrapping_add(i)).collect();
            let (mut a, mut b) = (plain.clone(), plain.clone());
            let mut fast = awslc::Xts::new(&key, &arena).unwrap();
            fast.encrypt(&mut a, tweak, size);
            reference::Xts::new(&key).encrypt(&mut b, tweak, size);
            prop_assert_eq!(&a, &b);
            let mut from = vec![0; plain.len()];
            fast.encrypt_to(&plain, &mut from, tweak, size);
            prop_assert_eq!(&a, &from);
            fast.decrypt(&mut a, tweak, size);
            prop_assert_eq!(&a, &plain);
        }
    }
}
