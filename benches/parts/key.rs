//! The key that all benches use.

use byokd::key::VolumeKey;
use byokd::key::secret::SecretMemoryError;

/// A key whose halves differ, which is all that a cipher asks of it.
pub(crate) fn key() -> VolumeKey {
    VolumeKey::init_with(|k| {
        k[..32].fill(1);
        k[32..].fill(2);
        Ok::<_, SecretMemoryError>(())
    })
    .expect("locked memory")
}
