//! The key's custody: from unwrapping to destruction.
//!
//! [`secret`] is the memory that key bytes live in, [`VolumeKey`] the 64 bytes themselves,
//! [`wrapped`] the public words around them (key ARN, encryption context, ciphertext blob), and
//! [`lease`] decides for how long a key may be used.

pub mod lease;
pub mod secret;
pub mod wrapped;

use secret::SecretBytes;

/// Length of a volume key in bytes: two AES-256 keys, data then tweak (IEEE 1619).
pub const VOLUME_KEY_LEN: usize = 64;

/// The key that encrypts a volume's data: AES-256-XTS, data key then tweak key.
///
/// It has no `Debug`, `Clone`, `PartialEq` or `Serialize`, so that nothing which holds one can
/// have them either.
pub struct VolumeKey(SecretBytes<VOLUME_KEY_LEN>);

impl VolumeKey {
    /// Makes a key whose bytes `fill` writes in place; whatever it leaves stays zero.
    ///
    /// # Errors
    /// Secret memory could not be had, or `fill` failed: its error, and the memory is wiped.
    pub fn init_with<E>(
        fill: impl FnOnce(&mut [u8; VOLUME_KEY_LEN]) -> Result<(), E>,
    ) -> Result<Self, E>
    where
        E: From<secret::SecretMemoryError>,
    {
        Ok(Self(SecretBytes::init_with(fill)?))
    }

    /// Shows the bytes to `reader`. Whoever copies them out answers for the copy.
    pub fn expose<T>(&self, reader: impl FnOnce(&[u8; VOLUME_KEY_LEN]) -> T) -> T {
        self.0.expose(reader)
    }
}
