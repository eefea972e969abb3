//! AWS KMS as a [`KeyService`].
//!
//! What stays true here:
//! - Every call ends within its time limit: the SDK itself sets none but for connecting.
//! - An answer counts only if it names the key that was asked for and holds what was expected; an
//!   HTTP 200 proves nothing.
//! - The encryption context and the key's ARN go with every call.
//! - A probe is one attempt, but for one more when our signature was refused: the SDK measures the
//!   clock's error from the first answer and signs the second one right.
//! - Whatever carries a volume key uses a connection of its own and wipes what it can reach (see
//!   `super::http`): the body of the answer, its frames, and the decoded plaintext.
//!
//! Four SDK clients share one configuration, so one set of cached credentials: with and without
//! retries, with pooled and with fresh connections.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use aws_config::identity::IdentityCache;
use aws_config::retry::RetryConfig;
use aws_config::sts::AssumeRoleProvider;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::operation::generate_data_key::GenerateDataKeyOutput;
use aws_sdk_kms::primitives::Blob;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::ConnectorError;
use thiserror::Error;
use tracing::warn;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::http::{self, Reuse};
use super::verdict::{self, Answer, DisconnectedStore, Transport, Unproven};
use super::{
    CheckStep, KeyDescription, KeyService, KmsError, NewKey, Operation, Proof, ServiceError,
};
use crate::key::lease::{Connection, Verdict};
use crate::key::secret::SecretMemoryError;
use crate::key::wrapped::{Canary, EncryptionContext, KeyArn, Purpose, WrappedKey};
use crate::key::{VOLUME_KEY_LEN, VolumeKey};

/// How KMS is reached and as whom.
#[derive(Clone)]
pub struct AwsSettings {
    /// The region whose KMS is asked; keys must lie in it. `None` takes the SDK's own chain:
    /// environment, profile, instance metadata.
    pub region: Option<String>,
    /// A KMS endpoint other than AWS's own, for example a VPC endpoint's or the development KMS's.
    pub endpoint: Option<String>,
    /// Use AWS's FIPS endpoints. Cannot be combined with `endpoint`.
    pub fips: bool,
    /// A profile of the shared AWS configuration files.
    pub profile: Option<String>,
    /// A role to assume on top of the credentials that were found.
    pub role: Option<RoleToAssume>,
    /// The limit for connecting, name resolution and TLS included.
    pub connect_timeout: Duration,
    /// The limit for one attempt, and for a whole probe.
    pub attempt_timeout: Duration,
    /// The limit for a call that is retried: making and unwrapping keys, describing.
    pub operation_timeout: Duration,
    /// What a disconnected custom key store means.
    pub disconnected_store: DisconnectedStore,
    /// Access key id and secret key, instead of the SDK's chain: for the development KMS only.
    pub static_credentials: Option<(String, String)>,
}

/// A role to assume, in the customer's account or ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleToAssume {
    /// The role's ARN.
    pub arn: String,
    /// The external id its trust policy asks for.
    pub external_id: Option<String>,
    /// The session name, seen in the customer's CloudTrail.
    pub session_name: Option<String>,
}

impl Default for AwsSettings {
    /// Times: one second is ten times a slow connect within a region. KMS answers in tens of
    /// milliseconds, and an external key store gets 250 ms from KMS itself, so 2.5 s is a failure
    /// by any measure and still leaves a probe every few seconds. Three attempts fit into 8 s.
    fn default() -> Self {
        Self {
            region: None,
            endpoint: None,
            fips: false,
            profile: None,
            role: None,
            connect_timeout: Duration::from_secs(1),
            attempt_timeout: Duration::from_millis(2500),
            operation_timeout: Duration::from_secs(8),
            disconnected_store: DisconnectedStore::default(),
            static_credentials: None,
        }
    }
}

/// Shows everything but the secret key.
impl fmt::Debug for AwsSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsSettings")
            .field("region", &self.region)
            .field("endpoint", &self.endpoint)
            .field("fips", &self.fips)
            .field("profile", &self.profile)
            .field("role", &self.role)
            .field("connect_timeout", &self.connect_timeout)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("operation_timeout", &self.operation_timeout)
            .field("disconnected_store", &self.disconnected_store)
            .field("static_credentials", &self.static_credentials.as_ref().map(|(id, _)| id))
            .finish()
    }
}

/// Settings that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AwsSettingsError {
    /// Neither the settings nor the SDK's chain name a region.
    #[error("no AWS region is configured: set `region`, or AWS_REGION in the environment")]
    NoRegion,
    /// FIPS endpoints are AWS's own.
    #[error(
        "`fips` and the endpoint {0} exclude each other: drop one, or name a FIPS endpoint as the \
         endpoint"
    )]
    FipsWithEndpoint(String),
    /// The endpoint is no URL.
    #[error("the KMS endpoint `{0}` is not a URL: write it as https://HOST[:PORT]")]
    Endpoint(String),
}

/// AWS KMS, or whatever speaks its protocol at the configured endpoint.
pub struct AwsKms {
    /// Retries, pooled connections: for what carries no secret.
    describing: Client,
    /// Retries, fresh connections: for volume keys.
    keys: Client,
    /// One attempt, pooled connections.
    probing: Client,
    /// One attempt, a fresh connection.
    confirming: Client,
    region: String,
    store: DisconnectedStore,
}

impl AwsKms {
    /// Sets the clients up. Nothing is sent to KMS yet; finding a region or credentials may read
    /// files and ask the instance's metadata service.
    ///
    /// # Errors
    /// The settings cannot work together, or there is no region.
    pub async fn connect(settings: AwsSettings) -> Result<Self, AwsSettingsError> {
        if let Some(endpoint) = &settings.endpoint {
            if settings.fips {
                return Err(AwsSettingsError::FipsWithEndpoint(endpoint.clone()));
            }
            let after_scheme = endpoint
                .strip_prefix("http://")
                .or_else(|| endpoint.strip_prefix("https://"))
                .unwrap_or_default();
            if after_scheme.is_empty() || after_scheme.starts_with('/') {
                return Err(AwsSettingsError::Endpoint(endpoint.clone()));
            }
        }
        Self::over(&shared_config(&settings).await, &settings)
    }

    /// The clients over a configuration whose region and credentials are known.
    fn over(shared: &SdkConfig, settings: &AwsSettings) -> Result<Self, AwsSettingsError> {
        let Some(region) = shared.region().map(ToString::to_string) else {
            return Err(AwsSettingsError::NoRegion);
        };
        let client = |reuse, retries: RetryConfig, limit: Duration| {
            let mut config = aws_sdk_kms::config::Builder::from(shared)
                .http_client(http::client(reuse))
                .retry_config(retries)
                .timeout_config(timeouts(settings, limit));
            // Not in the shared configuration: there it would move STS to that address too.
            if let Some(endpoint) = &settings.endpoint {
                config = config.endpoint_url(endpoint);
            }
            Client::from_conf(config.build())
        };
        let attempt = settings.attempt_timeout;
        let operation = settings.operation_timeout;
        Ok(Self {
            describing: client(Reuse::Pooled, retries(), operation),
            keys: client(Reuse::Never, retries(), operation),
            probing: client(Reuse::Pooled, RetryConfig::disabled(), attempt),
            confirming: client(Reuse::Never, RetryConfig::disabled(), attempt),
            region,
            store: settings.disconnected_store,
        })
    }

    /// The region whose KMS is asked.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Tries `arn` step by step, with a context like a volume's; the first failure ends the list.
    pub async fn check(&self, arn: &KeyArn) -> Vec<CheckStep> {
        match EncryptionContext::for_volume(Uuid::new_v4(), Purpose::Zeebe, []) {
            Ok(context) => self.check_in(arn, &context).await,
            Err(error) => vec![failed(
                "context",
                error.to_string(),
                "report this as a bug",
                Verdict::Mismatch,
            )],
        }
    }

    /// Tries `arn` step by step in `context`; the first failure ends the list.
    pub async fn check_in(&self, arn: &KeyArn, context: &EncryptionContext) -> Vec<CheckStep> {
        let mut steps = Vec::new();
        if let Err(step) = self.check_steps(arn, context, &mut steps).await {
            steps.push(step);
        }
        steps
    }

    async fn check_steps(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
        steps: &mut Vec<CheckStep>,
    ) -> Result<(), CheckStep> {
        let said = |step: &'static str| {
            move |error: KmsError| failed(step, said(&error), &error.remedy, error.verdict)
        };

        self.check_region(Operation::DescribeKey, arn).map_err(said("region"))?;
        steps.push(passed("region", format!("the key lies in {}, as configured", self.region)));

        let description = self.describe(arn).await.map_err(said("exists"))?;
        let multi = if description.multi_region { ", multi-Region" } else { "" };
        steps.push(passed(
            "exists",
            format!(
                "{} (origin {}{multi}){}",
                description.arn,
                description.origin,
                request(description.request_id.as_deref())
            ),
        ));

        self.check_state(arn, &description).map_err(said("enabled"))?;
        steps.push(passed("enabled", format!("its state is {}", description.state)));

        self.check_kind(arn, &description).map_err(said("symmetric"))?;
        steps.push(passed("symmetric", format!("{} for {}", description.spec, description.usage)));

        let data_key = self.generate(arn, context, CANARY_LEN).await.map_err(said("generate"))?;
        steps.push(passed(
            "generate",
            format!("a data key was made{}", request(data_key.request_id.as_deref())),
        ));

        let wrapped =
            WrappedKey { key_arn: arn.clone(), blob: data_key.blob, context: context.clone() };
        let (plaintext, proof) =
            self.decrypt(&self.probing, &wrapped).await.map_err(said("decrypt"))?;
        if *plaintext != *data_key.plaintext {
            let error = self.unproven(Operation::Decrypt, arn, Unproven::OtherPlaintext, proof);
            return Err(said("decrypt")(error));
        }
        steps.push(passed("decrypt", format!("and unwrapped again{}", request(proof.as_deref()))));

        let mut other = context.pairs().clone();
        other.insert("byokd:check".to_owned(), "another context".to_owned());
        let moved = WrappedKey { context: EncryptionContext::from_map(other), ..wrapped };
        match self.decrypt(&self.probing, &moved).await {
            Err(error) if matches!(error.verdict, Verdict::Mismatch | Verdict::Denied) => {
                steps.push(passed(
                    "context",
                    format!("another context is refused, as it must be: {}", said_short(&error)),
                ));
                Ok(())
            }
            Err(error) => Err(said("context")(error)),
            Ok(_) => Err(failed(
                "context",
                "the data key was unwrapped in a context it was not made in".to_owned(),
                "this is not AWS KMS: check the endpoint setting",
                Verdict::Mismatch,
            )),
        }
    }

    /// The key must lie in the region that is asked; another region's KMS does not know it.
    fn check_region(&self, operation: Operation, arn: &KeyArn) -> Result<(), KmsError> {
        if arn.region() == self.region {
            return Ok(());
        }
        let remedy = if arn.key_id().starts_with("mrk-") {
            format!(
                "name the key's replica in {}, or make one there, or configure the region {}",
                self.region,
                arn.region()
            )
        } else {
            format!("use a key in {}, or configure the region {}", self.region, arn.region())
        };
        Err(KmsError {
            operation,
            key: arn.clone(),
            code: "WrongRegion".to_owned(),
            message: format!("the key lies in {}, byokd asks KMS in {}", arn.region(), self.region),
            request_id: None,
            verdict: Verdict::Mismatch,
            remedy,
        })
    }

    fn check_state(&self, arn: &KeyArn, key: &KeyDescription) -> Result<(), KmsError> {
        if key.state == "Enabled" {
            return Ok(());
        }
        // The table knows what each state means.
        let answer = Answer::Error {
            code: "KMSInvalidStateException",
            message: "",
            key_state: Some(&key.state),
        };
        let judgement = verdict::judge(answer, self.store);
        Err(KmsError {
            operation: Operation::DescribeKey,
            key: arn.clone(),
            code: "NotEnabled".to_owned(),
            message: format!("the key's state is {}, it must be Enabled", key.state),
            request_id: key.request_id.clone(),
            verdict: judgement.verdict,
            remedy: judgement.remedy.to_owned(),
        })
    }

    fn check_kind(&self, arn: &KeyArn, key: &KeyDescription) -> Result<(), KmsError> {
        if key.spec == "SYMMETRIC_DEFAULT" && key.usage == "ENCRYPT_DECRYPT" {
            return Ok(());
        }
        Err(KmsError {
            operation: Operation::DescribeKey,
            key: arn.clone(),
            code: "NotSymmetric".to_owned(),
            message: format!(
                "the key is {} for {}, it must be SYMMETRIC_DEFAULT for ENCRYPT_DECRYPT",
                key.spec, key.usage
            ),
            request_id: key.request_id.clone(),
            verdict: Verdict::Mismatch,
            remedy: "a key's kind cannot be changed: make a symmetric encryption key in KMS (the \
                     default kind) and use that"
                .to_owned(),
        })
    }

    /// The rules for a key that is to wrap a new volume's. KMS refuses an unfit key anyway, but
    /// says less clearly why; so a policy that does not let us describe the key is no obstacle.
    async fn check_rules(&self, arn: &KeyArn) -> Result<(), KmsError> {
        self.check_region(Operation::GenerateDataKey, arn)?;
        match self.describe(arn).await {
            Ok(description) => {
                self.check_state(arn, &description)?;
                self.check_kind(arn, &description)
            }
            Err(error) if error.code.starts_with("AccessDenied") => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A data key of `len` bytes.
    async fn generate(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
        len: i32,
    ) -> Result<DataKey, KmsError> {
        let answer = self
            .keys
            .generate_data_key()
            .key_id(arn.as_str())
            .number_of_bytes(len)
            .set_encryption_context(Some(pairs(context)))
            .send()
            .await;
        let mut output = match answer {
            Ok(output) => output,
            Err(error) => return Err(self.failed(Operation::GenerateDataKey, arn, error).await),
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let plaintext = take_plaintext(&mut output);
        let unproven =
            |what| self.unproven(Operation::GenerateDataKey, arn, what, request_id.clone());
        let blob = match output.ciphertext_blob.take() {
            Some(blob) if !blob.as_ref().is_empty() => blob.into_inner(),
            Some(_) | None => return Err(unproven(Unproven::Empty)),
        };
        match output.key_id() {
            Some(key) if key == arn.as_str() => {}
            Some(_) => return Err(unproven(Unproven::OtherKey)),
            None => return Err(unproven(Unproven::Empty)),
        }
        match plaintext {
            Some(plaintext) if i32::try_from(plaintext.len()) == Ok(len) => {
                Ok(DataKey { plaintext, blob, request_id })
            }
            Some(plaintext) if !plaintext.is_empty() => Err(unproven(Unproven::OtherPlaintext)),
            Some(_) | None => Err(unproven(Unproven::Empty)),
        }
    }

    /// The plaintext of `wrapped`, non-empty and from the key asked for; the caller knows what it
    /// must be.
    async fn decrypt(
        &self,
        client: &Client,
        wrapped: &WrappedKey,
    ) -> Result<(Zeroizing<Vec<u8>>, Option<String>), KmsError> {
        let arn = &wrapped.key_arn;
        let send = || {
            client
                .decrypt()
                .key_id(arn.as_str())
                .ciphertext_blob(Blob::new(wrapped.blob.clone()))
                .set_encryption_context(Some(pairs(&wrapped.context)))
                .send()
        };
        let mut answer = send().await;
        if answer.as_ref().is_err_and(|e| e.code().is_some_and(verdict::is_signature_error)) {
            answer = send().await;
        }
        let mut output = match answer {
            Ok(output) => output,
            Err(error) => return Err(self.failed(Operation::Decrypt, arn, error).await),
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let plaintext = output.plaintext.take().map(Blob::into_inner).map(Zeroizing::new);
        let unproven = |what| self.unproven(Operation::Decrypt, arn, what, request_id.clone());
        match output.key_id() {
            Some(key) if key == arn.as_str() => {}
            Some(_) => return Err(unproven(Unproven::OtherKey)),
            None => return Err(unproven(Unproven::Empty)),
        }
        match plaintext {
            Some(plaintext) if !plaintext.is_empty() => Ok((plaintext, request_id)),
            Some(_) | None => Err(unproven(Unproven::Empty)),
        }
    }

    fn unproven(
        &self,
        operation: Operation,
        arn: &KeyArn,
        what: Unproven,
        request_id: Option<String>,
    ) -> KmsError {
        let judgement = verdict::judge(Answer::Unproven(what), self.store);
        let message = match what {
            Unproven::NoCode => "an HTTP error without an error code of KMS",
            Unproven::Garbled => "an answer that cannot be read",
            Unproven::Empty => "a success without key ARN, plaintext or blob",
            Unproven::OtherKey => "a success that names another key",
            Unproven::OtherPlaintext => "a success with another plaintext than expected",
        };
        KmsError {
            operation,
            key: arn.clone(),
            code: what.code().to_owned(),
            message: message.to_owned(),
            request_id,
            verdict: judgement.verdict,
            remedy: judgement.remedy.to_owned(),
        }
    }

    /// The error of a call, judged. An invalid key state is looked up first, for the exception
    /// alone decides nothing.
    async fn failed<E>(
        &self,
        operation: Operation,
        arn: &KeyArn,
        error: SdkError<E, HttpResponse>,
    ) -> KmsError
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let words = Words::of(&error);
        drop(error);
        let mut key_state = None;
        if words.kind == Kind::Code && words.code == "KMSInvalidStateException" {
            // One attempt within a probe's limit: this is part of a probe.
            let answer = self.probing.describe_key().key_id(arn.as_str()).send().await;
            key_state = answer
                .ok()
                .and_then(|output| output.key_metadata)
                .and_then(|key| key.key_state.map(|state| state.as_str().to_owned()));
        }
        words.judged(operation, arn, key_state.as_deref(), self.store)
    }
}

impl KeyService for AwsKms {
    async fn make_key(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
    ) -> Result<NewKey, ServiceError> {
        self.check_rules(arn).await?;
        let data_key = self.generate(arn, context, VOLUME_KEY_LEN_I32).await?;
        let key = volume_key(&data_key.plaintext).ok_or_else(|| {
            self.unproven(
                Operation::GenerateDataKey,
                arn,
                Unproven::OtherPlaintext,
                data_key.request_id,
            )
        })??;
        let wrapped =
            WrappedKey { key_arn: arn.clone(), blob: data_key.blob, context: context.clone() };
        Ok(NewKey { key, wrapped })
    }

    async fn unwrap_key(&self, wrapped: &WrappedKey) -> Result<(VolumeKey, Proof), ServiceError> {
        self.check_region(Operation::Decrypt, &wrapped.key_arn)?;
        let (plaintext, request_id) = self.decrypt(&self.keys, wrapped).await?;
        let key = volume_key(&plaintext).ok_or_else(|| {
            let what = Unproven::OtherPlaintext;
            self.unproven(Operation::Decrypt, &wrapped.key_arn, what, request_id.clone())
        })??;
        Ok((key, Proof { request_id }))
    }

    async fn make_canary(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
    ) -> Result<Canary, ServiceError> {
        self.check_region(Operation::GenerateDataKey, arn)?;
        let data_key = self.generate(arn, context, CANARY_LEN).await?;
        let sha256 = sha256(&data_key.plaintext);
        let wrapped =
            WrappedKey { key_arn: arn.clone(), blob: data_key.blob, context: context.clone() };
        Ok(Canary { wrapped, sha256 })
    }

    async fn probe(&self, canary: &Canary, connection: Connection) -> Result<Proof, KmsError> {
        let arn = &canary.wrapped.key_arn;
        self.check_region(Operation::Decrypt, arn)?;
        let client = match connection {
            Connection::Pooled => &self.probing,
            Connection::Fresh => &self.confirming,
        };
        let (plaintext, request_id) = self.decrypt(client, &canary.wrapped).await?;
        if sha256(&plaintext) != canary.sha256 {
            let what = Unproven::OtherPlaintext;
            return Err(self.unproven(Operation::Decrypt, arn, what, request_id));
        }
        Ok(Proof { request_id })
    }

    async fn describe(&self, arn: &KeyArn) -> Result<KeyDescription, KmsError> {
        self.check_region(Operation::DescribeKey, arn)?;
        let output = match self.describing.describe_key().key_id(arn.as_str()).send().await {
            Ok(output) => output,
            Err(error) => return Err(self.failed(Operation::DescribeKey, arn, error).await),
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let unproven = |what| self.unproven(Operation::DescribeKey, arn, what, request_id.clone());
        let Some(key) = output.key_metadata else {
            return Err(unproven(Unproven::Empty));
        };
        match key.arn() {
            Some(answered) if answered == arn.as_str() => {}
            Some(_) => return Err(unproven(Unproven::OtherKey)),
            None => return Err(unproven(Unproven::Empty)),
        }
        let word = |word: Option<&str>| word.unwrap_or_default().to_owned();
        Ok(KeyDescription {
            arn: arn.as_str().to_owned(),
            state: word(key.key_state().map(|state| state.as_str())),
            spec: word(key.key_spec().map(|spec| spec.as_str())),
            usage: word(key.key_usage().map(|usage| usage.as_str())),
            origin: word(key.origin().map(|origin| origin.as_str())),
            multi_region: key.multi_region().unwrap_or_default(),
            request_id,
        })
    }
}

/// A canary is as long as an AES-256 key: no reason to be of another kind than what it stands for.
const CANARY_LEN: i32 = 32;
/// [`VOLUME_KEY_LEN`] as KMS counts it.
const VOLUME_KEY_LEN_I32: i32 = 64;
const _: () = assert!(VOLUME_KEY_LEN == 64);

/// A data key as it came, its plaintext wiped when dropped.
struct DataKey {
    plaintext: Zeroizing<Vec<u8>>,
    blob: Vec<u8>,
    request_id: Option<String>,
}

fn take_plaintext(output: &mut GenerateDataKeyOutput) -> Option<Zeroizing<Vec<u8>>> {
    output.plaintext.take().map(Blob::into_inner).map(Zeroizing::new)
}

/// The plaintext in secret memory; `None` if it is not as long as a volume key.
fn volume_key(plaintext: &[u8]) -> Option<Result<VolumeKey, SecretMemoryError>> {
    let bytes: &[u8; VOLUME_KEY_LEN] = plaintext.try_into().ok()?;
    Some(VolumeKey::init_with(|key| {
        key.copy_from_slice(bytes);
        Ok(())
    }))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut sum = [0; 32];
    sum.copy_from_slice(digest.as_ref());
    sum
}

fn pairs(context: &EncryptionContext) -> std::collections::HashMap<String, String> {
    context.pairs().iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Three attempts, with the SDK's own backoff: it never goes past the operation's limit.
fn retries() -> RetryConfig {
    RetryConfig::standard().with_max_attempts(3).with_initial_backoff(Duration::from_millis(200))
}

fn timeouts(settings: &AwsSettings, operation: Duration) -> TimeoutConfig {
    // A read limit does not stop an answer that drips, the attempt's limit does; both are set, as
    // the first says more clearly what went wrong.
    TimeoutConfig::builder()
        .connect_timeout(settings.connect_timeout)
        .read_timeout(settings.attempt_timeout)
        .operation_attempt_timeout(settings.attempt_timeout)
        .operation_timeout(operation)
        .build()
}

/// Region, credentials and time limits, as every client has them.
async fn shared_config(settings: &AwsSettings) -> SdkConfig {
    // Credentials are found within an attempt. Their limit is the shorter one, so that slow
    // credentials are not taken for a slow KMS.
    let credentials_limit = settings.attempt_timeout.mul_f32(0.8);
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http::client(Reuse::Pooled))
        .retry_config(retries())
        .timeout_config(timeouts(settings, settings.operation_timeout))
        .identity_cache(IdentityCache::lazy().load_timeout(credentials_limit).build());
    if let Some(region) = &settings.region {
        loader = loader.region(Region::new(region.clone()));
    }
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    if settings.fips {
        loader = loader.use_fips(true);
    }
    if let Some((id, secret)) = &settings.static_credentials {
        // The environment's FIPS setting is not meant for the development KMS.
        loader = loader.use_fips(false).credentials_provider(Credentials::new(
            id,
            secret,
            None,
            None,
            "byokd development",
        ));
    }
    let config = loader.load().await;
    let Some(role) = &settings.role else {
        return config;
    };
    let mut assumed = AssumeRoleProvider::builder(&role.arn)
        .configure(&config)
        .session_name(role.session_name.as_deref().unwrap_or("byokd"));
    if let Some(id) = &role.external_id {
        assumed = assumed.external_id(id);
    }
    let assumed = SharedCredentialsProvider::new(assumed.build().await);
    config.into_builder().credentials_provider(assumed).build()
}

/// What an SDK error says, taken out of its types.
struct Words {
    kind: Kind,
    code: String,
    message: String,
    request_id: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Code,
    Unproven(Unproven),
    Transport(Transport),
}

impl Words {
    fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let request_id = error.request_id().map(ToOwned::to_owned);
        let transport = |transport| (Kind::Transport(transport), chain_text(error));
        let (kind, message) = match error {
            SdkError::ServiceError(answer) => match answer.err().code() {
                Some(code) if !code.is_empty() => {
                    let message = answer.err().message().unwrap_or_default().to_owned();
                    return Self { kind: Kind::Code, code: code.to_owned(), message, request_id };
                }
                // The SDK's word for an answer it cannot parse is an error without a code.
                Some(_) | None if answer.raw().status().is_success() => {
                    (Kind::Unproven(Unproven::Garbled), excerpt(answer.raw()))
                }
                Some(_) | None => (Kind::Unproven(Unproven::NoCode), excerpt(answer.raw())),
            },
            SdkError::ResponseError(answer) => {
                (Kind::Unproven(Unproven::Garbled), excerpt(answer.raw()))
            }
            SdkError::TimeoutError(_) => transport(Transport::Timeout),
            SdkError::DispatchFailure(failure) => {
                let kind = failure
                    .as_connector_error()
                    .map_or(Kind::Transport(Transport::Connect), kind_of);
                (kind, chain_text(error))
            }
            // And what the SDK may add.
            SdkError::ConstructionFailure(_) | _ => transport(Transport::Configuration),
        };
        let code = match kind {
            Kind::Code => String::new(),
            Kind::Unproven(unproven) => unproven.code().to_owned(),
            Kind::Transport(transport) => transport.code().to_owned(),
        };
        Self { kind, code, message, request_id }
    }

    fn judged(
        self,
        operation: Operation,
        arn: &KeyArn,
        key_state: Option<&str>,
        store: DisconnectedStore,
    ) -> KmsError {
        let answer = match self.kind {
            Kind::Code => Answer::Error { code: &self.code, message: &self.message, key_state },
            Kind::Unproven(unproven) => Answer::Unproven(unproven),
            Kind::Transport(transport) => Answer::Transport(transport),
        };
        let judgement = verdict::judge(answer, store);
        if !judgement.known {
            warn!(%operation, key = %arn, code = self.code, message = self.message,
                request_id = self.request_id, "KMS gave an answer that decides nothing");
        }
        KmsError {
            operation,
            key: arn.clone(),
            code: self.code,
            message: self.message,
            request_id: self.request_id,
            verdict: judgement.verdict,
            remedy: judgement.remedy.to_owned(),
        }
    }
}

/// What a failure below the KMS protocol was. Only [`Transport::NoCredentials`] and
/// [`Transport::Configuration`] differ in verdict from the rest.
fn kind_of(error: &ConnectorError) -> Kind {
    if chain(error).any(|cause| cause.is::<CredentialsError>()) {
        return Kind::Transport(Transport::NoCredentials);
    }
    if error.is_timeout() {
        return Kind::Transport(Transport::Timeout);
    }
    if let Some(kind) = chain(error).find_map(kind_of_cause) {
        return kind;
    }
    if error.is_io() {
        return Kind::Transport(Transport::Connect);
    }
    // No connection was tried: there were no credentials in time (a private type of the SDK, so
    // its text has to do), or there is no usable endpoint.
    if chain_text(error).contains("identity resolver timed out") {
        return Kind::Transport(Transport::NoCredentials);
    }
    Kind::Transport(Transport::Configuration)
}

fn kind_of_cause(cause: &(dyn Error + 'static)) -> Option<Kind> {
    use std::io::ErrorKind;
    if let Some(http) = cause.downcast_ref::<hyper::Error>() {
        if http.is_parse() {
            return Some(Kind::Unproven(Unproven::Garbled));
        }
        if http.is_incomplete_message() || http.is_closed() || http.is_canceled() {
            return Some(Kind::Transport(Transport::Reset));
        }
    }
    let io = cause.downcast_ref::<std::io::Error>()?;
    let broken = matches!(
        io.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
    );
    if broken {
        Some(Kind::Transport(Transport::Reset))
    } else if io.kind() == ErrorKind::InvalidData {
        // What tokio-rustls makes of every protocol error of rustls.
        Some(Kind::Transport(Transport::Tls))
    } else if io.to_string().contains("failed to lookup address") {
        Some(Kind::Transport(Transport::Dns))
    } else {
        None
    }
}

/// The error and its causes, those inside an [`std::io::Error`] included.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| match error.downcast_ref::<std::io::Error>() {
        Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
        None => error.source(),
    })
}

/// The chain in words, outermost first, each said once.
fn chain_text(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in chain(error) {
        let words = cause.to_string();
        if !text.contains(&words) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&words);
        }
    }
    text
}

/// The status and the beginning of an answer that is not KMS's. It is an error or unreadable, so
/// it holds no plaintext that we asked for; only its printable characters are kept.
fn excerpt(answer: &HttpResponse) -> String {
    let status = answer.status().as_u16();
    if answer.status().is_success() {
        return format!("HTTP {status} with a body that is not an answer of KMS");
    }
    let body = answer.body().bytes().unwrap_or_default();
    let begin = body.get(..EXCERPT).unwrap_or(body);
    let text: String = String::from_utf8_lossy(begin)
        .chars()
        .map(|c| if c.is_control() || c == char::REPLACEMENT_CHARACTER { ' ' } else { c })
        .collect();
    format!("HTTP {status} without an error code: {}", text.trim())
}

/// Enough to recognise whose error page it is.
const EXCERPT: usize = 120;

fn passed(step: &str, detail: String) -> CheckStep {
    CheckStep { step: step.to_owned(), ok: true, detail, remedy: None, verdict: None }
}

fn failed(step: &str, detail: String, remedy: &str, verdict: Verdict) -> CheckStep {
    CheckStep {
        step: step.to_owned(),
        ok: false,
        detail,
        remedy: Some(remedy.to_owned()),
        verdict: Some(verdict),
    }
}

fn said(error: &KmsError) -> String {
    format!("{}: {}{}", error.code, error.message, request(error.request_id.as_deref()))
}

fn said_short(error: &KmsError) -> String {
    format!("{}{}", error.code, request(error.request_id.as_deref()))
}

fn request(id: Option<&str>) -> String {
    id.map(|id| format!(" (request id {id})")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use aws_credential_types::credential_fn::provide_credentials_fn;

    use super::*;
    use crate::kms::dev::{DevKms, Fault};

    fn settings(kms: &DevKms) -> AwsSettings {
        AwsSettings {
            region: Some("eu-central-1".to_owned()),
            endpoint: Some(kms.endpoint().to_owned()),
            attempt_timeout: Duration::from_millis(500),
            static_credentials: Some(("dev".to_owned(), "dev".to_owned())),
            ..AwsSettings::default()
        }
    }

    fn some_arn() -> KeyArn {
        "arn:aws:kms:eu-central-1:000000000000:key/00000000-0000-4000-8000-000000000000"
            .parse()
            .expect("an ARN")
    }

    async fn dev(dir: &std::path::Path) -> DevKms {
        DevKms::start(dir, "eu-central-1").await.expect("the development KMS")
    }

    /// With this provider of credentials instead of the static ones.
    async fn with_provider<F, Fut>(kms: &DevKms, provide: F) -> AwsKms
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Credentials, CredentialsError>> + Send + 'static,
    {
        let settings = settings(kms);
        let shared = shared_config(&settings)
            .await
            .into_builder()
            .credentials_provider(SharedCredentialsProvider::new(provide_credentials_fn(provide)))
            .build();
        AwsKms::over(&shared, &settings).expect("settings that fit")
    }

    #[tokio::test]
    async fn missing_and_hanging_credentials_are_ours_not_the_customers() {
        let dir = tempfile::tempdir().unwrap();
        let server = dev(dir.path()).await;
        let none = with_provider(&server, || async {
            Err(CredentialsError::not_loaded("the metadata service is down"))
        })
        .await;
        let slow = with_provider(&server, || async {
            std::future::pending::<()>().await;
            Err(CredentialsError::unhandled("never"))
        })
        .await;
        for kms in [none, slow] {
            let error = kms.describe(&some_arn()).await.expect_err("no credentials");
            assert_eq!(
                (error.verdict, error.code.as_str()),
                (Verdict::Credentials, "NoCredentials"),
                "{error}"
            );
        }
        assert!(server.requests().is_empty(), "nothing is sent unsigned");
    }

    #[tokio::test]
    async fn expired_credentials_are_ours_and_fresh_ones_work_again() {
        let dir = tempfile::tempdir().unwrap();
        let server = dev(dir.path()).await;
        let given = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&given);
        let kms =
            with_provider(&server, move || {
                let n = count.fetch_add(1, Ordering::Relaxed);
                // The first ones run out at once.
                let life = if n == 0 { Duration::ZERO } else { Duration::from_secs(3600) };
                let expiry = std::time::SystemTime::now() + life;
                async move {
                    Ok(Credentials::new(format!("AKID{n}"), "secret", None, Some(expiry), "test"))
                }
            })
            .await;
        server.inject(Fault::error(400, "ExpiredTokenException", "The token expired").times(1));
        let error = kms.describe(&some_arn()).await.expect_err("expired");
        assert_eq!(error.verdict, Verdict::Credentials, "{error}");
        let error = kms.describe(&some_arn()).await.expect_err("no such key");
        assert_eq!(error.code, "NotFoundException", "{error}");
        let keys: Vec<_> = server.requests().into_iter().filter_map(|r| r.access_key).collect();
        assert_eq!(keys, ["AKID0", "AKID1"], "the second call asked for credentials again");
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_refused() {
        let both = AwsSettings {
            fips: true,
            region: Some("eu-central-1".to_owned()),
            endpoint: Some("https://kms.example.com".to_owned()),
            ..AwsSettings::default()
        };
        assert!(matches!(
            AwsKms::connect(both).await,
            Err(AwsSettingsError::FipsWithEndpoint(endpoint)) if endpoint.contains("example")
        ));
        for endpoint in ["kms.example.com", "http://", "ftp://x", "https:///x"] {
            let wrong =
                AwsSettings { endpoint: Some(endpoint.to_owned()), ..AwsSettings::default() };
            assert!(
                matches!(AwsKms::connect(wrong).await, Err(AwsSettingsError::Endpoint(_))),
                "{endpoint}"
            );
        }
    }

    #[test]
    fn settings_show_no_secret() {
        let settings = AwsSettings {
            static_credentials: Some(("AKID".to_owned(), "hidden".to_owned())),
            ..AwsSettings::default()
        };
        let shown = format!("{settings:?}");
        assert!(shown.contains("AKID") && !shown.contains("hidden"), "{shown}");
    }
}
