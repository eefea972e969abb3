//! The development KMS's keys: what they are, how they wrap, and where they are kept.
//!
//! One file a key, `keys/ID.json`, mode 0600 in a directory of mode 0700, its material in clear:
//! whoever reads it has the key. A file is written beside, synced and renamed, and the directory
//! synced, so a crash leaves the old key or the new one.
//!
//! A blob is `"BKD1"`, the length of the key's id and the id, the material's version (u32, big
//! endian), a nonce of 12 bytes, then AES-256-GCM of the plaintext. Authenticated with it is
//! everything before the ciphertext and the encryption context, in order of its keys, each text
//! with its length before it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::DevKmsError;
use super::policy::Policy;
use super::wire::{Context, Exception};

/// The account that all keys of the development KMS belong to.
pub(super) const ACCOUNT: &str = "000000000000";

/// `KeyState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyState {
    /// May be used.
    Enabled,
    /// The customer disabled it.
    Disabled,
    /// Its deletion is scheduled.
    PendingDeletion,
    /// Its material is yet to be imported, or was deleted.
    PendingImport,
    /// A multi-Region primary waiting for its replicas to go.
    PendingReplicaDeletion,
    /// Its custom key store is disconnected.
    Unavailable,
    /// Being made.
    Creating,
    /// Being changed.
    Updating,
}

/// One version of a key's material.
#[derive(Clone)]
pub(super) struct Material(Zeroizing<Vec<u8>>);

impl Material {
    fn random() -> Result<Self, Exception> {
        let mut bytes = Zeroizing::new(vec![0; AES_256_GCM.key_len()]);
        fill_random(&mut bytes)?;
        Ok(Self(bytes))
    }

    fn cipher(&self) -> Result<LessSafeKey, Exception> {
        UnboundKey::new(&AES_256_GCM, &self.0)
            .map(LessSafeKey::new)
            .map_err(|_| Exception::internal("key material of the wrong length"))
    }
}

impl Serialize for Material {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(STANDARD.encode(self.0.as_slice())))
    }
}

impl<'de> Deserialize<'de> for Material {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        let bytes = STANDARD.decode(text.as_str()).map_err(serde::de::Error::custom)?;
        Ok(Self(Zeroizing::new(bytes)))
    }
}

/// A key, as it is kept.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Key {
    pub(super) id: String,
    pub(super) arn: String,
    pub(super) description: String,
    pub(super) spec: String,
    pub(super) usage: String,
    pub(super) origin: String,
    pub(super) multi_region: bool,
    pub(super) state: KeyState,
    /// Seconds since 1970.
    pub(super) created: i64,
    /// Seconds since 1970, while its deletion is scheduled.
    pub(super) deletion: Option<i64>,
    pub(super) policy: Policy,
    /// The last one wraps, all unwrap.
    material: Vec<Material>,
}

impl Key {
    /// `KeyMetadata`, as `DescribeKey` gives it.
    pub(super) fn metadata(&self, state: KeyState) -> Value {
        let mut metadata = json!({
            "AWSAccountId": ACCOUNT,
            "KeyId": self.id,
            "Arn": self.arn,
            "CreationDate": self.created,
            "Enabled": state == KeyState::Enabled,
            "Description": self.description,
            "KeyUsage": self.usage,
            "KeyState": state,
            "Origin": self.origin,
            "KeyManager": "CUSTOMER",
            "CustomerMasterKeySpec": self.spec,
            "KeySpec": self.spec,
            "MultiRegion": self.multi_region,
        });
        if self.is_symmetric() {
            metadata["EncryptionAlgorithms"] = json!(["SYMMETRIC_DEFAULT"]);
        }
        if let Some(at) = self.deletion {
            metadata["DeletionDate"] = json!(at);
        }
        if self.multi_region {
            let region = self.arn.split(':').nth(3).unwrap_or_default();
            metadata["MultiRegionConfiguration"] = json!({
                "MultiRegionKeyType": "PRIMARY",
                "PrimaryKey": {"Arn": self.arn, "Region": region},
                "ReplicaKeys": [],
            });
        }
        metadata
    }

    /// Whether it wraps and unwraps data keys.
    pub(super) fn is_symmetric(&self) -> bool {
        self.spec == "SYMMETRIC_DEFAULT" && self.usage == "ENCRYPT_DECRYPT"
    }

    /// How many versions its material has.
    pub(super) fn versions(&self) -> usize {
        self.material.len()
    }

    /// New material from now on; the old one still unwraps.
    pub(super) fn rotate(&mut self) -> Result<(), Exception> {
        self.material.push(Material::random()?);
        Ok(())
    }

    /// `plaintext` wrapped in `context`.
    pub(super) fn wrap(&self, plaintext: &[u8], context: &Context) -> Result<Vec<u8>, Exception> {
        let Some(material) = self.material.last() else {
            return Err(Exception::internal("the key has no material"));
        };
        let version = u32::try_from(self.material.len()).unwrap_or(u32::MAX);
        let id_len = u8::try_from(self.id.len())
            .map_err(|_| Exception::internal("the key's id is too long"))?;
        let mut nonce = [0; NONCE_LEN];
        fill_random(&mut nonce)?;
        let mut blob = Vec::with_capacity(128 + plaintext.len());
        blob.extend_from_slice(MAGIC);
        blob.push(id_len);
        blob.extend_from_slice(self.id.as_bytes());
        blob.extend_from_slice(&version.to_be_bytes());
        blob.extend_from_slice(&nonce);
        let aad = Aad::from(authenticated(&blob, context));
        let mut sealed =
            Zeroizing::new(Vec::with_capacity(plaintext.len() + AES_256_GCM.tag_len()));
        sealed.extend_from_slice(plaintext);
        material
            .cipher()?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut *sealed)
            .map_err(|_| Exception::internal("sealing failed"))?;
        blob.extend_from_slice(&sealed);
        Ok(blob)
    }

    /// What `blob` wraps, if this key wrapped it in `context`.
    pub(super) fn unwrap(
        &self,
        blob: &[u8],
        context: &Context,
    ) -> Result<Zeroizing<Vec<u8>>, Exception> {
        // KMS says no more than that: not whether blob or context is at fault.
        let invalid = || Exception::silent("InvalidCiphertextException");
        let parts = BlobParts::of(blob).filter(|p| p.key_id == self.id).ok_or_else(invalid)?;
        let material = usize::try_from(parts.version)
            .ok()
            .and_then(|version| self.material.get(version.checked_sub(1)?))
            .ok_or_else(invalid)?;
        let aad = Aad::from(authenticated(parts.head, context));
        let mut opened = Zeroizing::new(parts.sealed.to_vec());
        let len = material
            .cipher()?
            .open_in_place(Nonce::assume_unique_for_key(parts.nonce), aad, &mut opened)
            .map_err(|_| invalid())?
            .len();
        opened.truncate(len);
        Ok(opened)
    }
}

const MAGIC: &[u8] = b"BKD1";

struct BlobParts<'a> {
    head: &'a [u8],
    key_id: &'a str,
    version: u32,
    nonce: [u8; NONCE_LEN],
    sealed: &'a [u8],
}

impl<'a> BlobParts<'a> {
    fn of(blob: &'a [u8]) -> Option<Self> {
        let rest = blob.strip_prefix(MAGIC)?;
        let (id_len, rest) = rest.split_first()?;
        let (key_id, rest) = rest.split_at_checked(usize::from(*id_len))?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        Some(Self {
            head: blob.get(..blob.len() - sealed.len())?,
            key_id: std::str::from_utf8(key_id).ok()?,
            version: u32::from_be_bytes(*version),
            nonce: *nonce,
            sealed,
        })
    }
}

/// The id of the key that a blob says it was wrapped by.
pub(super) fn key_id_of(blob: &[u8]) -> Option<&str> {
    BlobParts::of(blob).map(|parts| parts.key_id)
}

fn authenticated(head: &[u8], context: &Context) -> Vec<u8> {
    let mut bytes = head.to_vec();
    for text in context.iter().flat_map(|(key, value)| [key, value]) {
        bytes.extend_from_slice(&u64::try_from(text.len()).unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// Random bytes for keys and nonces.
pub(super) fn fill_random(bytes: &mut [u8]) -> Result<(), Exception> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| Exception::internal("no randomness"))
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// What a new key is to be.
pub(super) struct NewKey {
    pub(super) description: String,
    pub(super) spec: String,
    pub(super) usage: String,
    pub(super) origin: String,
    pub(super) multi_region: bool,
    pub(super) policy: Policy,
}

/// All keys, in memory and on disk.
pub(super) struct KeyStore {
    dir: PathBuf,
    region: String,
    keys: Mutex<BTreeMap<String, Key>>,
    /// Held while the store is open: two of them would overwrite each other's keys.
    _lock: Flock<File>,
}

impl KeyStore {
    /// Opens the store in `state_dir`, made if need be.
    pub(super) fn open(state_dir: &Path, region: &str) -> Result<Self, DevKmsError> {
        let dir = state_dir.join("keys");
        let failed = |step: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| DevKmsError::State { step, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(failed("make the directory", &dir))?;
        // An existing directory keeps the mode it had; keys want it closed.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
            .map_err(failed("close to others", &dir))?;
        let lock_path = dir.join("lock");
        let lock = private_file(&lock_path, false).map_err(failed("open", &lock_path))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, _)| DevKmsError::InUse { path: dir.clone() })?;
        let mut keys = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed("read", &dir))? {
            let path = entry.map_err(failed("read", &dir))?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => {
                    let key = read_key(&path).map_err(failed("read the key", &path))?;
                    keys.insert(key.id.clone(), key);
                }
                // A write that a crash cut short; the key itself is untouched.
                Some("new") => fs::remove_file(&path).map_err(failed("remove", &path))?,
                Some(_) | None => {}
            }
        }
        Ok(Self { dir, region: region.to_owned(), keys: Mutex::new(keys), _lock: lock })
    }

    /// Makes a key and keeps it.
    pub(super) fn create(&self, new: NewKey) -> Result<Key, Exception> {
        let uuid = Uuid::new_v4();
        let id = if new.multi_region { format!("mrk-{}", uuid.simple()) } else { uuid.to_string() };
        let mut key = Key {
            arn: format!("arn:aws:kms:{}:{ACCOUNT}:key/{id}", self.region),
            id,
            description: new.description,
            spec: new.spec,
            usage: new.usage,
            origin: new.origin,
            multi_region: new.multi_region,
            state: KeyState::Enabled,
            created: now(),
            deletion: None,
            policy: new.policy,
            material: Vec::new(),
        };
        if key.origin == "EXTERNAL" {
            key.state = KeyState::PendingImport;
        } else {
            // Asymmetric keys get material too, unused: they are here to be refused.
            key.rotate()?;
        }
        let mut keys = self.keys();
        self.save(&key)?;
        keys.insert(key.id.clone(), key.clone());
        Ok(key)
    }

    /// The key that `KeyId` names: an id or an ARN.
    pub(super) fn find(&self, key_id: &str) -> Result<Key, Exception> {
        let keys = self.keys();
        Ok(self.lookup(&keys, key_id)?.clone())
    }

    /// Changes a key and keeps the change.
    pub(super) fn update<T>(
        &self,
        key_id: &str,
        change: impl FnOnce(&mut Key) -> Result<T, Exception>,
    ) -> Result<T, Exception> {
        let mut keys = self.keys();
        let mut key = self.lookup(&keys, key_id)?.clone();
        let result = change(&mut key)?;
        self.save(&key)?;
        keys.insert(key.id.clone(), key);
        Ok(result)
    }

    /// Every key, in order of their ids.
    pub(super) fn list(&self) -> Vec<Key> {
        self.keys().values().cloned().collect()
    }

    /// The keys, without those whose waiting period is over.
    fn keys(&self) -> MutexGuard<'_, BTreeMap<String, Key>> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let now = now();
        keys.retain(|id, key| {
            let due = key.deletion.is_some_and(|at| at <= now);
            if due && let Err(error) = fs::remove_file(self.path(id)) {
                tracing::warn!(key = id, %error, "a deleted key's file could not be removed");
            }
            !due
        });
        keys
    }

    fn lookup<'a>(
        &self,
        keys: &'a BTreeMap<String, Key>,
        key_id: &str,
    ) -> Result<&'a Key, Exception> {
        let not_found = |message: String| Exception::new("NotFoundException", message);
        if key_id.is_empty() {
            return Err(Exception::validation(
                "1 validation error detected: Value at 'keyId' failed to satisfy constraint: \
                 Member must not be null",
            ));
        }
        if key_id.len() > 2048 {
            return Err(Exception::validation(
                "1 validation error detected: Value at 'keyId' failed to satisfy constraint: \
                 Member must have length less than or equal to 2048",
            ));
        }
        if key_id.starts_with("alias/") || key_id.contains(":alias/") {
            return Err(not_found(format!("Alias {key_id} is not found.")));
        }
        let is_arn = key_id.starts_with("arn:");
        let id = if is_arn {
            let mut parts = key_id.splitn(6, ':').skip(2);
            let (service, region) = (parts.next(), parts.next());
            let (_account, resource) = (parts.next(), parts.next());
            let id = resource.and_then(|resource| resource.strip_prefix("key/"));
            match (service, id) {
                // Keys made under another region's name stay usable under their own ARN.
                (Some("kms"), Some(id)) if keys.get(id).is_some_and(|key| key.arn == key_id) => id,
                (Some("kms"), Some(id)) if region == Some(self.region.as_str()) => id,
                (Some("kms"), Some(_)) => {
                    let region = region.unwrap_or_default();
                    return Err(not_found(format!("Invalid arn {region}")));
                }
                _ => {
                    let message = format!("Invalid arn {key_id}");
                    return Err(Exception::new("InvalidArnException", message));
                }
            }
        } else {
            key_id
        };
        match keys.get(id) {
            Some(key) if !is_arn || key.arn == key_id => Ok(key),
            _ if is_arn => Err(not_found(format!("Key '{key_id}' does not exist"))),
            _ if Uuid::parse_str(id.trim_start_matches("mrk-")).is_ok() => {
                let arn = format!("arn:aws:kms:{}:{ACCOUNT}:key/{id}", self.region);
                Err(not_found(format!("Key '{arn}' does not exist")))
            }
            _ => Err(not_found(format!("Invalid keyId '{id}'"))),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    fn save(&self, key: &Key) -> Result<(), Exception> {
        self.write(key).map_err(|error| {
            tracing::warn!(key = key.id, %error, "the development KMS could not keep a key");
            Exception::internal(format!("cannot keep the key: {error}"))
        })
    }

    fn write(&self, key: &Key) -> io::Result<()> {
        let path = self.path(&key.id);
        let beside = path.with_extension("new");
        let text = Zeroizing::new(serde_json::to_vec_pretty(key)?);
        let mut file = private_file(&beside, true)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        File::open(&self.dir)?.sync_all()
    }
}

fn private_file(path: &Path, truncate: bool) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(truncate).mode(0o600).open(path)
}

fn read_key(path: &Path) -> io::Result<Key> {
    let text = Zeroizing::new(fs::read(path)?);
    let key: Key = serde_json::from_slice(&text)?;
    if path.file_stem().and_then(|stem| stem.to_str()) != Some(key.id.as_str()) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it holds another key's id"));
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn store(dir: &Path) -> KeyStore {
        KeyStore::open(dir, "eu-central-1").expect("a store")
    }

    fn symmetric() -> NewKey {
        NewKey {
            description: String::new(),
            spec: "SYMMETRIC_DEFAULT".to_owned(),
            usage: "ENCRYPT_DECRYPT".to_owned(),
            origin: "AWS_KMS".to_owned(),
            multi_region: false,
            policy: Policy::allow_all(),
        }
    }

    fn context(pairs: &[(&str, &str)]) -> Context {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn keys_outlive_a_restart_and_are_nobody_elses_to_read() {
        let dir = tempfile::tempdir().unwrap();
        let first = store(dir.path());
        let key = first.create(symmetric()).unwrap();
        let blob = key.wrap(b"secret", &context(&[("a", "b")])).unwrap();
        first.update(&key.id, |key| key.rotate()).unwrap();
        assert!(
            matches!(KeyStore::open(dir.path(), "x"), Err(DevKmsError::InUse { .. })),
            "a second store on the same keys must be refused"
        );
        drop(first);
        let again = store(dir.path());
        let key = again.find(&key.arn).unwrap();
        assert_eq!(key.versions(), 2);
        assert_eq!(&**key.unwrap(&blob, &context(&[("a", "b")])).unwrap(), b"secret");
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.path().join("keys")), 0o700);
        assert_eq!(mode(dir.path().join("keys").join(format!("{}.json", key.id))), 0o600);
    }

    #[test]
    fn a_damaged_key_file_is_named_not_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let key = store(dir.path()).create(symmetric()).unwrap();
        let path = dir.path().join("keys").join(format!("{}.json", key.id));
        fs::write(&path, b"{").unwrap();
        let error = KeyStore::open(dir.path(), "x").err().expect("refused").to_string();
        assert!(error.contains(&key.id), "{error}");
    }

    #[test]
    fn a_key_past_its_deletion_date_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let key = store.create(symmetric()).unwrap();
        store
            .update(&key.id, |key| {
                key.deletion = Some(now() - 1);
                Ok(())
            })
            .unwrap();
        assert_eq!(store.find(&key.id).err().unwrap().code, "NotFoundException");
        assert!(!dir.path().join("keys").join(format!("{}.json", key.id)).exists());
    }

    proptest! {
        #[test]
        fn a_blob_opens_only_whole_and_in_its_own_context(
            plaintext in proptest::collection::vec(any::<u8>(), 1..100),
            flip in any::<proptest::sample::Index>(),
            cut in any::<proptest::sample::Index>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let key = store(dir.path()).create(symmetric()).unwrap();
            let own = context(&[("ab", "c"), ("d", "e")]);
            let blob = key.wrap(&plaintext, &own).unwrap();
            prop_assert_eq!(&**key.unwrap(&blob, &own).unwrap(), &plaintext);
            // The same letters, cut into other words.
            for other in [context(&[]), context(&[("a", "bc"), ("d", "e")]), context(&[("ab", "c")])] {
                prop_assert!(key.unwrap(&blob, &other).is_err());
            }
            let mut flipped = blob.clone();
            flipped[flip.index(blob.len())] ^= 1;
            prop_assert!(key.unwrap(&flipped, &own).is_err());
            prop_assert!(key.unwrap(&blob[..cut.index(blob.len())], &own).is_err());
        }
    }
}
