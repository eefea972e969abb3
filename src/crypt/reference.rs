//! The cipher a second time, by the `aes` and `xts-mode` crates: slow, independent, and what the
//! self-test and the property tests hold AWS-LC to. It never touches a volume in service.

use aes::Aes256;
use aes::cipher::KeyInit;
use xts_mode::{Xts128, get_tweak_default};

use crate::crypt::Engine;
use crate::key::VolumeKey;
use crate::units::SectorSize;

/// AES-256-XTS by the `aes` and `xts-mode` crates. Its key schedule lies in ordinary memory and is
/// wiped on drop: for test keys only.
pub struct Xts(Xts128<Aes256>);

impl Xts {
    /// Keys an engine: first half data key, second half tweak key.
    #[must_use]
    pub fn new(key: &VolumeKey) -> Self {
        key.expose(|bytes| {
            let (data, tweak) = bytes.split_at(32);
            let cipher = |half: &[u8]| Aes256::new_from_slice(half).expect("a half has 32 bytes");
            Self(Xts128::new(cipher(data), cipher(tweak)))
        })
    }

    fn area(data: &mut [u8], tweak: u64, sector: SectorSize, mut one: impl FnMut(&mut [u8], u128)) {
        let mut number = u128::from(tweak);
        for unit in data.chunks_exact_mut(sector.bytes_usize()) {
            one(unit, number);
            number += u128::from(sector.tweak_step());
        }
    }
}

impl Engine for Xts {
    fn encrypt(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize) {
        Self::area(data, tweak, sector, |unit, number| {
            self.0.encrypt_sector(unit, get_tweak_default(number));
        });
    }

    fn decrypt(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize) {
        Self::area(data, tweak, sector, |unit, number| {
            self.0.decrypt_sector(unit, get_tweak_default(number));
        });
    }
}
