//! The operations of the development KMS: a request in, an answer or an exception out.
//!
//! The order of checks is AWS's: the request's form, the key's existence, the key policy, the
//! key's state, the key's usage, the blob; then `DryRun`. What uses a key (and `DescribeKey`)
//! obeys the key policy. What manages it does not: here the operator plays the customer, and must
//! be able to undo a denial.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::keys::{self, Key, KeyState, KeyStore, NewKey};
use super::policy::{Decision, Policy};
use super::wire::{self, Context, Exception, Reply};

/// One request: what is to be done, and what the key's state is said to be.
pub(super) struct Call<'a> {
    pub(super) store: &'a KeyStore,
    pub(super) operation: &'a str,
    pub(super) body: &'a [u8],
    /// A key state that a fault pretends.
    pub(super) key_state: Option<KeyState>,
}

/// The key a request is about, if it says so: for faults, policies have their own way.
pub(super) fn key_id_of(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct About {
        #[serde(default)]
        key_id: Option<String>,
        #[serde(default)]
        source_key_id: Option<String>,
        #[serde(default)]
        ciphertext_blob: wire::Base64,
    }
    let about: About = wire::parse(body).ok()?;
    about
        .key_id
        .or(about.source_key_id)
        .map(|key| super::faults::key_id_in(&key).to_owned())
        .or_else(|| keys::key_id_of(&about.ciphertext_blob.0).map(ToOwned::to_owned))
}

impl Call<'_> {
    /// Does it.
    pub(super) fn run(&self) -> Result<Reply, Exception> {
        match self.operation {
            "CreateKey" => self.create_key(),
            "DescribeKey" => self.describe_key(),
            "ListKeys" => self.list_keys(),
            "GenerateDataKey" => self.generate_data_key(true),
            "GenerateDataKeyWithoutPlaintext" => self.generate_data_key(false),
            "Encrypt" => self.encrypt(),
            "Decrypt" => self.decrypt(),
            "ReEncrypt" => self.re_encrypt(),
            "EnableKey" => self.set_enabled(KeyState::Enabled),
            "DisableKey" => self.set_enabled(KeyState::Disabled),
            "ScheduleKeyDeletion" => self.schedule_key_deletion(),
            "CancelKeyDeletion" => self.cancel_key_deletion(),
            "PutKeyPolicy" => self.put_key_policy(),
            "GetKeyPolicy" => self.get_key_policy(),
            "RotateKeyOnDemand" => self.rotate_key_on_demand(),
            other => {
                let _: IgnoredAny = wire::parse(self.body)?;
                Err(Exception::new(
                    "UnknownOperationException",
                    format!("the development KMS does not know {other}"),
                ))
            }
        }
    }

    fn create_key(&self) -> Result<Reply, Exception> {
        let request: wire::CreateKey = wire::parse(self.body)?;
        let spec = request
            .key_spec
            .or(request.customer_master_key_spec)
            .unwrap_or_else(|| "SYMMETRIC_DEFAULT".to_owned());
        let usages: &[&str] = match spec.as_str() {
            "SYMMETRIC_DEFAULT" => &["ENCRYPT_DECRYPT"],
            "RSA_2048" | "RSA_3072" | "RSA_4096" => &["ENCRYPT_DECRYPT", "SIGN_VERIFY"],
            "ECC_NIST_P256" | "ECC_NIST_P384" | "ECC_NIST_P521" => {
                &["SIGN_VERIFY", "KEY_AGREEMENT"]
            }
            "ECC_SECG_P256K1" => &["SIGN_VERIFY"],
            "HMAC_224" | "HMAC_256" | "HMAC_384" | "HMAC_512" => &["GENERATE_VERIFY_MAC"],
            _ => return Err(Exception::validation(format!("Unknown key spec {spec}"))),
        };
        let usage = request.key_usage.unwrap_or_else(|| "ENCRYPT_DECRYPT".to_owned());
        if !usages.contains(&usage.as_str()) {
            return Err(Exception::validation(format!(
                "KeyUsage {usage} is not compatible with KeySpec {spec}"
            )));
        }
        let origin = request.origin.unwrap_or_else(|| "AWS_KMS".to_owned());
        if !matches!(origin.as_str(), "AWS_KMS" | "EXTERNAL") {
            return Err(Exception::new(
                "UnsupportedOperationException",
                "the development KMS has no custom key stores; their failures are faults on demand",
            ));
        }
        if request.description.len() > 8192 {
            return Err(Exception::validation("Description is longer than 8192"));
        }
        let policy = match request.policy {
            Some(document) => Policy::parse(&document)?,
            None => Policy::allow_all(),
        };
        let key = self.store.create(NewKey {
            description: request.description,
            spec,
            usage,
            origin,
            multi_region: request.multi_region,
            policy,
        })?;
        Ok(Reply::new(json!({"KeyMetadata": key.metadata(key.state)})))
    }

    fn describe_key(&self) -> Result<Reply, Exception> {
        let request: wire::OneKey = wire::parse(self.body)?;
        let key = self.store.find(&request.key_id)?;
        authorize(&key, "kms:DescribeKey", &Context::new(), &request.grant_tokens)?;
        Ok(Reply::new(json!({"KeyMetadata": key.metadata(self.state_of(&key))})))
    }

    fn list_keys(&self) -> Result<Reply, Exception> {
        let request: wire::ListKeys = wire::parse(self.body)?;
        let limit = request.limit.unwrap_or(100);
        if !(1..=1000).contains(&limit) {
            return Err(Exception::validation("Limit is not from 1 to 1000"));
        }
        let after = request.marker.unwrap_or_default();
        let mut keys: Vec<Key> =
            self.store.list().into_iter().filter(|key| key.id > after).take(limit + 1).collect();
        let truncated = keys.len() > limit;
        keys.truncate(limit);
        let listed: Vec<Value> =
            keys.iter().map(|key| json!({"KeyId": key.id, "KeyArn": key.arn})).collect();
        let mut answer = json!({"Keys": listed, "Truncated": truncated});
        if let Some(last) = keys.last().filter(|_| truncated) {
            answer["NextMarker"] = json!(last.id);
        }
        Ok(Reply::new(answer))
    }

    fn generate_data_key(&self, with_plaintext: bool) -> Result<Reply, Exception> {
        let request: wire::GenerateDataKey = wire::parse(self.body)?;
        let len =
            match (request.key_spec.as_deref(), request.number_of_bytes) {
                (Some("AES_256"), None) => 32,
                (Some("AES_128"), None) => 16,
                (Some(spec), None) => {
                    return Err(Exception::validation(format!("Unknown data key spec {spec}")));
                }
                (None, Some(len)) => usize::try_from(len)
                    .ok()
                    .filter(|len| (1..=1024).contains(len))
                    .ok_or_else(|| Exception::validation("NumberOfBytes is not from 1 to 1024"))?,
                (None, None) | (Some(_), Some(_)) => {
                    return Err(Exception::validation(
                        "Please specify either number of bytes or key spec.",
                    ));
                }
            };
        check_context(&request.encryption_context)?;
        let key = self.store.find(&request.key_id)?;
        self.usable(&key, &request.encryption_context, &request.grant_tokens, self.operation)?;
        dry_run(request.dry_run)?;
        let mut plaintext = Zeroizing::new(vec![0; len]);
        keys::fill_random(&mut plaintext)?;
        let blob = key.wrap(&plaintext, &request.encryption_context)?;
        let reply = Reply::new(json!({"CiphertextBlob": STANDARD.encode(blob), "KeyId": key.arn}));
        Ok(if with_plaintext { reply.with_plaintext(plaintext) } else { reply })
    }

    fn encrypt(&self) -> Result<Reply, Exception> {
        let request: wire::Encrypt = wire::parse(self.body)?;
        if !(1..=4096).contains(&request.plaintext.0.len()) {
            return Err(Exception::validation(
                "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: \
                 Member must have length from 1 to 4096",
            ));
        }
        check_algorithm(request.encryption_algorithm.as_deref())?;
        check_context(&request.encryption_context)?;
        let key = self.store.find(&request.key_id)?;
        self.usable(&key, &request.encryption_context, &request.grant_tokens, "Encrypt")?;
        dry_run(request.dry_run)?;
        let blob = key.wrap(&request.plaintext.0, &request.encryption_context)?;
        Ok(Reply::new(json!({
            "CiphertextBlob": STANDARD.encode(blob),
            "KeyId": key.arn,
            "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        })))
    }

    fn decrypt(&self) -> Result<Reply, Exception> {
        let request: wire::Decrypt = wire::parse(self.body)?;
        check_algorithm(request.encryption_algorithm.as_deref())?;
        check_context(&request.encryption_context)?;
        let key = self.key_of_blob(&request.ciphertext_blob.0, request.key_id.as_deref())?;
        self.usable(&key, &request.encryption_context, &request.grant_tokens, "Decrypt")?;
        self.same_key(&key, &request.ciphertext_blob.0)?;
        let plaintext = key.unwrap(&request.ciphertext_blob.0, &request.encryption_context)?;
        dry_run(request.dry_run)?;
        let reply = Reply::new(json!({
            "KeyId": key.arn,
            "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        }));
        Ok(reply.with_plaintext(plaintext))
    }

    fn re_encrypt(&self) -> Result<Reply, Exception> {
        let request: wire::ReEncrypt = wire::parse(self.body)?;
        check_algorithm(request.source_encryption_algorithm.as_deref())?;
        check_algorithm(request.destination_encryption_algorithm.as_deref())?;
        check_context(&request.source_encryption_context)?;
        check_context(&request.destination_encryption_context)?;
        let source =
            self.key_of_blob(&request.ciphertext_blob.0, request.source_key_id.as_deref())?;
        let destination = self.store.find(&request.destination_key_id)?;
        let tokens = &request.grant_tokens;
        self.usable(&source, &request.source_encryption_context, tokens, "ReEncryptFrom")?;
        let context = &request.destination_encryption_context;
        self.usable(&destination, context, tokens, "ReEncryptTo")?;
        self.same_key(&source, &request.ciphertext_blob.0)?;
        let plaintext =
            source.unwrap(&request.ciphertext_blob.0, &request.source_encryption_context)?;
        dry_run(request.dry_run)?;
        let blob = destination.wrap(&plaintext, context)?;
        Ok(Reply::new(json!({
            "CiphertextBlob": STANDARD.encode(blob),
            "SourceKeyId": source.arn,
            "KeyId": destination.arn,
            "SourceEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
            "DestinationEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        })))
    }

    fn set_enabled(&self, wanted: KeyState) -> Result<Reply, Exception> {
        let request: wire::OneKey = wire::parse(self.body)?;
        self.store.update(&request.key_id, |key| {
            if !matches!(key.state, KeyState::Enabled | KeyState::Disabled) {
                return Err(wrong_state(key, key.state));
            }
            key.state = wanted;
            Ok(())
        })?;
        Ok(Reply::new(json!({})))
    }

    fn schedule_key_deletion(&self) -> Result<Reply, Exception> {
        let request: wire::ScheduleKeyDeletion = wire::parse(self.body)?;
        let days = request.pending_window_in_days.unwrap_or(30);
        if !(7..=30).contains(&days) {
            return Err(Exception::validation("PendingWindowInDays is not from 7 to 30"));
        }
        let answer = self.store.update(&request.key_id, |key| {
            if key.state == KeyState::PendingDeletion {
                return Err(wrong_state(key, key.state));
            }
            let at = keys::now() + days * 24 * 60 * 60;
            key.state = KeyState::PendingDeletion;
            key.deletion = Some(at);
            Ok(json!({
                "KeyId": key.arn,
                "DeletionDate": at,
                "KeyState": key.state,
                "PendingWindowInDays": days,
            }))
        })?;
        Ok(Reply::new(answer))
    }

    fn cancel_key_deletion(&self) -> Result<Reply, Exception> {
        let request: wire::OneKey = wire::parse(self.body)?;
        let arn = self.store.update(&request.key_id, |key| {
            if key.state != KeyState::PendingDeletion {
                return Err(Exception::new(
                    "KMSInvalidStateException",
                    format!("{} is not pending deletion.", key.arn),
                ));
            }
            // As in AWS: saved from deletion, but not in use again until someone enables it.
            key.state = KeyState::Disabled;
            key.deletion = None;
            Ok(key.arn.clone())
        })?;
        Ok(Reply::new(json!({"KeyId": arn})))
    }

    fn put_key_policy(&self) -> Result<Reply, Exception> {
        let request: wire::PutKeyPolicy = wire::parse(self.body)?;
        check_policy_name(request.policy_name.as_deref())?;
        let policy = Policy::parse(&request.policy)?;
        self.store.update(&request.key_id, |key| {
            key.policy = policy;
            Ok(())
        })?;
        Ok(Reply::new(json!({})))
    }

    fn get_key_policy(&self) -> Result<Reply, Exception> {
        let request: wire::PutKeyPolicy = wire::parse(self.body)?;
        check_policy_name(request.policy_name.as_deref())?;
        let key = self.store.find(&request.key_id)?;
        Ok(Reply::new(json!({"Policy": key.policy.document(), "PolicyName": "default"})))
    }

    fn rotate_key_on_demand(&self) -> Result<Reply, Exception> {
        let request: wire::OneKey = wire::parse(self.body)?;
        let arn = self.store.update(&request.key_id, |key| {
            check_state(key, self.state_of(key))?;
            if !key.is_symmetric() || key.origin != "AWS_KMS" {
                return Err(Exception::new(
                    "UnsupportedOperationException",
                    format!("{} cannot be rotated.", key.arn),
                ));
            }
            if key.versions() > ROTATIONS {
                return Err(Exception::new(
                    "LimitExceededException",
                    format!("{} was rotated on demand {ROTATIONS} times already.", key.arn),
                ));
            }
            key.rotate()?;
            Ok(key.arn.clone())
        })?;
        Ok(Reply::new(json!({"KeyId": arn})))
    }

    fn state_of(&self, key: &Key) -> KeyState {
        self.key_state.unwrap_or(key.state)
    }

    /// Whether a cryptographic operation may use the key now.
    fn usable(
        &self,
        key: &Key,
        context: &Context,
        grant_tokens: &[String],
        action: &str,
    ) -> Result<(), Exception> {
        authorize(key, &format!("kms:{action}"), context, grant_tokens)?;
        check_state(key, self.state_of(key))?;
        if key.is_symmetric() {
            return Ok(());
        }
        Err(Exception::new(
            "InvalidKeyUsageException",
            format!(
                "{} key usage is {} and key spec {}, which is not valid for {}.",
                key.arn, key.usage, key.spec, self.operation
            ),
        ))
    }

    /// The key to unwrap with: the one that is named, else the one the blob names.
    fn key_of_blob(&self, blob: &[u8], key_id: Option<&str>) -> Result<Key, Exception> {
        if !(1..=6144).contains(&blob.len()) {
            return Err(Exception::validation(
                "1 validation error detected: Value at 'ciphertextBlob' failed to satisfy \
                 constraint: Member must have length from 1 to 6144",
            ));
        }
        match key_id {
            Some(key_id) => self.store.find(key_id),
            None => {
                let id = keys::key_id_of(blob)
                    .ok_or_else(|| Exception::silent("InvalidCiphertextException"))?;
                self.store.find(id).map_err(|_| {
                    Exception::new(
                        "AccessDeniedException",
                        "The ciphertext refers to a customer master key that does not exist, does \
                         not exist in this region, or you are not allowed to access.",
                    )
                })
            }
        }
    }

    /// Whether the blob is this key's, as far as it says.
    fn same_key(&self, key: &Key, blob: &[u8]) -> Result<(), Exception> {
        match keys::key_id_of(blob) {
            Some(id) if id == key.id => Ok(()),
            None => Err(Exception::silent("InvalidCiphertextException")),
            Some(_) => Err(Exception::new(
                "IncorrectKeyException",
                "The key ID in the request does not identify a CMK that can perform this \
                 operation.",
            )),
        }
    }
}

/// AWS's limit on rotations on demand of one key.
const ROTATIONS: usize = 25;
/// Whom the development KMS takes every caller for.
const CALLER: &str = "arn:aws:iam::000000000000:user/development";

fn authorize(
    key: &Key,
    action: &str,
    context: &Context,
    grant_tokens: &[String],
) -> Result<(), Exception> {
    if !grant_tokens.is_empty() {
        return Err(Exception::new("InvalidGrantTokenException", "The grant token is not valid."));
    }
    let refused = |why: String| {
        Err(Exception::new(
            "AccessDeniedException",
            format!(
                "User: {CALLER} is not authorized to perform: {action} on resource: {} {why}",
                key.arn
            ),
        ))
    };
    match key.policy.decide(action, context) {
        Decision::Allowed => Ok(()),
        Decision::ExplicitlyDenied => {
            refused("with an explicit deny in a resource-based policy".to_owned())
        }
        Decision::NotAllowed => {
            refused(format!("because no resource-based policy allows the {action} action"))
        }
    }
}

fn check_state(key: &Key, state: KeyState) -> Result<(), Exception> {
    match state {
        KeyState::Enabled => Ok(()),
        KeyState::Disabled => {
            Err(Exception::new("DisabledException", format!("{} is disabled.", key.arn)))
        }
        KeyState::PendingDeletion
        | KeyState::PendingImport
        | KeyState::PendingReplicaDeletion
        | KeyState::Unavailable
        | KeyState::Creating
        | KeyState::Updating => Err(wrong_state(key, state)),
    }
}

fn wrong_state(key: &Key, state: KeyState) -> Exception {
    let words = match state {
        KeyState::Enabled => "enabled",
        KeyState::Disabled => "disabled",
        KeyState::PendingDeletion => "pending deletion",
        KeyState::PendingImport => "pending import",
        KeyState::PendingReplicaDeletion => "pending replica deletion",
        KeyState::Unavailable => "unavailable",
        KeyState::Creating => "creating",
        KeyState::Updating => "updating",
    };
    Exception::new("KMSInvalidStateException", format!("{} is {words}.", key.arn))
}

fn check_context(context: &Context) -> Result<(), Exception> {
    let len: usize = context.iter().map(|(key, value)| key.len() + value.len()).sum();
    if len > 8192 {
        return Err(Exception::validation("EncryptionContext is longer than 8192"));
    }
    if context.keys().any(String::is_empty) {
        return Err(Exception::validation("EncryptionContext has an empty key"));
    }
    Ok(())
}

fn check_algorithm(algorithm: Option<&str>) -> Result<(), Exception> {
    match algorithm {
        None | Some("SYMMETRIC_DEFAULT") => Ok(()),
        Some(other) => Err(Exception::new(
            "InvalidKeyUsageException",
            format!("Algorithm {other} is incompatible with key spec SYMMETRIC_DEFAULT."),
        )),
    }
}

fn check_policy_name(name: Option<&str>) -> Result<(), Exception> {
    match name {
        None | Some("default") => Ok(()),
        Some(_) => Err(Exception::new("NotFoundException", "No such policy exists")),
    }
}

fn dry_run(asked: bool) -> Result<(), Exception> {
    if asked {
        return Err(Exception::new(
            "DryRunOperationException",
            "The request would have succeeded, but the DryRun option is set.",
        ));
    }
    Ok(())
}
