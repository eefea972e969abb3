//! AWS KMS as a [`KeyService`].
//!
//! What stays true here:
//! - Every call ends within its time limit: the SDK itself sets none but for connecting. What it
//!   leads to is part of it: a second signature, a look at the key's state, the witness. An answer
//!   that is there is not thrown away because what it led to took too long.
//! - An answer counts only if it names the key that was asked for and holds what was expected; an
//!   HTTP 200 proves nothing.
//! - The encryption context and the key's ARN go with every call.
//! - A probe is one attempt, but for one more when our signature was refused: the SDK measures the
//!   clock's error from the first answer and signs the second one right.
//! - Whatever carries a volume key uses a connection of its own and wipes what it can reach (see
//!   `super::http`): the body of the answer, its frames, and the decoded plaintext.
//!
//! | file | what it is |
//! |---|---|
//! | `settings.rs` | region, endpoint, credentials, time limits |
//! | `answers.rs` | the answers that have come, so that none counts twice |
//! | `calls.rs` | every request, told to whoever keeps account of them |
//! | `check.rs` | a key tried step by step, and the rules it has to keep |
//! | `witness.rs` | whose fault a denial is |
//! | `words.rs` | what an error of the SDK says |
//!
//! Four SDK clients share one configuration, so one set of cached credentials: with and without
//! retries, with pooled and with fresh connections.

mod answers;
mod calls;
mod check;
mod settings;
mod witness;
mod words;

use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_config::SdkConfig;
use aws_config::retry::RetryConfig;
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::operation::generate_data_key::GenerateDataKeyOutput;
use aws_sdk_kms::primitives::Blob;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::http::{self, Reuse};
use super::verdict::{self, Answer, Unproven};
use super::{KeyDescription, KeyService, KmsError, NewKey, Operation, Proof, ServiceError};
use crate::clock::now;
use crate::key::lease::{Connection, DisconnectedStore, Verdict, Whose};
use crate::key::secret::SecretMemoryError;
use crate::key::wrapped::{Canary, EncryptionContext, KeyArn, WrappedKey};
use crate::key::{VOLUME_KEY_LEN, VolumeKey};
use crate::metrics::counters::KmsCalls;
use crate::units::word;
use calls::Calls;
use settings::{retries, shared_config, timeouts};
use witness::Witness;
use words::{Kind, Words};

pub use answers::Answers;
pub use settings::{AwsSettings, AwsSettingsError, RoleToAssume};

/// AWS KMS, or whatever speaks its protocol at the configured endpoint. Clones share everything.
#[derive(Clone)]
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
    endpoint: Option<String>,
    store: DisconnectedStore,
    witness: Option<Arc<Witness>>,
    calls: Arc<KmsCalls>,
    /// The limit for a probe.
    probe_limit: Duration,
    /// The limit for a call that is retried.
    call_limit: Duration,
    /// Answers that have come.
    answers: Arc<Answers>,
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
        // Else every call would fail, and look as if KMS were out of reach.
        let plain = settings.endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        if !plain && !http::has_roots() {
            return Err(AwsSettingsError::NoCertificates);
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
            if let Some(observer) = &settings.observer {
                config = config.interceptor(Calls(Arc::clone(observer)));
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
            endpoint: settings.endpoint.clone().or_else(|| elsewhere(shared)),
            store: settings.disconnected_store,
            witness: settings.witness.clone().map(Witness::new).map(Arc::new),
            calls: Arc::clone(&settings.calls),
            probe_limit: attempt,
            call_limit: operation,
            answers: Arc::clone(&settings.answers),
        })
    }

    /// The region whose KMS is asked.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Where KMS is asked, if the settings or the environment name another place than AWS's own.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint.as_deref()
    }

    /// Whether what KMS answers, volume keys among it, crosses a network in the clear.
    #[must_use]
    pub fn is_cleartext(&self) -> bool {
        self.endpoint.as_deref().is_some_and(is_cleartext)
    }

    /// A call, counted with its outcome and time. Callers box it: it is large, and would be part of
    /// their own futures twice.
    async fn counted<T>(
        &self,
        operation: Operation,
        call: impl Future<Output = Result<T, KmsError>>,
    ) -> Result<T, KmsError> {
        let began = Instant::now();
        let ended = call.await;
        let outcome = ended.as_ref().err().map_or(Verdict::Allowed, |error| error.verdict);
        self.calls.add(&operation.to_string(), &word(outcome), began.elapsed());
        ended
    }

    /// When a call that begins now has to have ended, if it may be retried.
    fn call_deadline(&self) -> Instant {
        Instant::now() + self.call_limit
    }

    /// When a probe that begins now has to have ended, with all that belongs to it.
    fn probe_deadline(&self) -> Instant {
        Instant::now() + self.probe_limit
    }

    /// A data key of `len` bytes.
    async fn generate(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
        len: i32,
    ) -> Result<DataKey, KmsError> {
        let call = self.generate_uncounted(arn, context, len);
        self.counted(Operation::GenerateDataKey, Box::pin(call)).await
    }

    async fn generate_uncounted(
        &self,
        arn: &KeyArn,
        context: &EncryptionContext,
        len: i32,
    ) -> Result<DataKey, KmsError> {
        let deadline = self.call_deadline();
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
            Err(error) => {
                return Err(self.failed(Operation::GenerateDataKey, arn, error, deadline).await);
            }
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let plaintext = take_plaintext(&mut output);
        let unproven =
            |what| self.unproven(Operation::GenerateDataKey, arn, what, request_id.clone());
        if self.is_replayed(request_id.as_deref()) {
            return Err(unproven(Unproven::Replayed));
        }
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
    /// must be. The client's limit ends at the `deadline`.
    async fn decrypt(
        &self,
        client: &Client,
        wrapped: &WrappedKey,
        deadline: Instant,
    ) -> Result<(Zeroizing<Vec<u8>>, Option<String>), KmsError> {
        let call = self.decrypt_uncounted(client, wrapped, deadline);
        self.counted(Operation::Decrypt, Box::pin(call)).await
    }

    async fn decrypt_uncounted(
        &self,
        client: &Client,
        wrapped: &WrappedKey,
        deadline: Instant,
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
            // Without one, the first answer is what there is: our signature was refused.
            answer = by(deadline, send()).await.unwrap_or(answer);
        }
        let mut output = match answer {
            Ok(output) => output,
            Err(error) => {
                return Err(self.failed(Operation::Decrypt, arn, error, deadline).await);
            }
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let plaintext = output.plaintext.take().map(Blob::into_inner).map(Zeroizing::new);
        let unproven = |what| self.unproven(Operation::Decrypt, arn, what, request_id.clone());
        if self.is_replayed(request_id.as_deref()) {
            return Err(unproven(Unproven::Replayed));
        }
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

    /// A probe as KMS answers it, whoever is at fault.
    async fn probe_plainly(
        &self,
        canary: &Canary,
        connection: Connection,
        deadline: Instant,
    ) -> Result<Proof, KmsError> {
        let arn = &canary.wrapped.key_arn;
        self.check_region(Operation::Decrypt, arn)?;
        let client = match connection {
            Connection::Pooled => &self.probing,
            Connection::Fresh => &self.confirming,
        };
        let (plaintext, request_id) = self.decrypt(client, &canary.wrapped, deadline).await?;
        if sha256(&plaintext) != canary.sha256 {
            let what = Unproven::OtherPlaintext;
            return Err(self.unproven(Operation::Decrypt, arn, what, request_id));
        }
        Ok(Proof { request_id })
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
            Unproven::Replayed => "an answer with the request id of an earlier one",
        };
        KmsError {
            operation,
            key: arn.clone(),
            code: what.code().to_owned(),
            message: message.to_owned(),
            request_id,
            verdict: judgement.verdict,
            remedy: judgement.remedy.to_owned(),
            whose: Whose::Unknown,
            came: now(),
        }
    }

    /// Whether an answer with this request id came before; it is remembered.
    fn is_replayed(&self, id: Option<&str>) -> bool {
        id.is_some_and(|id| self.answers.came_before(id))
    }

    /// The error of a call, judged. An invalid key state is looked up first, for the exception
    /// alone decides nothing.
    async fn failed<E>(
        &self,
        operation: Operation,
        arn: &KeyArn,
        error: SdkError<E, HttpResponse>,
        deadline: Instant,
    ) -> KmsError
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let words = Words::of(&error);
        drop(error);
        self.judged(operation, arn, words, deadline).await
    }

    async fn judged(
        &self,
        operation: Operation,
        arn: &KeyArn,
        words: Words,
        deadline: Instant,
    ) -> KmsError {
        let unproven = |what, words: Words| self.unproven(operation, arn, what, words.request_id());
        if self.is_replayed(words.request_id().as_deref()) {
            return unproven(Unproven::Replayed, words);
        }
        // A request that was damaged on the way is answered for a key that nobody asked for.
        if words.kind == Kind::Code && words.names_another_key(arn) {
            return unproven(Unproven::OtherKey, words);
        }
        let mut key_state = None;
        if words.kind == Kind::Code && words.code == "KMSInvalidStateException" {
            key_state = self.state_of(arn, deadline).await;
        }
        words.judged(operation, arn, key_state.as_deref(), self.store)
    }

    /// What `DescribeKey` says by the `deadline` of the key's state. If it says nothing that can be
    /// relied on, the message of the exception has to do: that decides only where it names a
    /// decision of the customer's.
    async fn state_of(&self, arn: &KeyArn, deadline: Instant) -> Option<String> {
        let request = self.confirming.describe_key().key_id(arn.as_str()).send();
        let answer = by(deadline, request).await?.ok()?;
        if self.is_replayed(answer.request_id()) {
            return None;
        }
        let key = answer.key_metadata.filter(|key| key.arn() == Some(arn.as_str()))?;
        key.key_state.map(|state| state.as_str().to_owned())
    }

    /// The error of a rewrap, judged for whichever of the two keys it names.
    async fn rewrap_failed(
        &self,
        from: &KeyArn,
        to: &KeyArn,
        words: Words,
        deadline: Instant,
    ) -> KmsError {
        let about = if words.names_another_key(from) { to } else { from };
        let error = self.judged(Operation::ReEncrypt, about, words, deadline).await;
        if !error.code.starts_with("AccessDenied") {
            return error;
        }
        let remedy = "a rewrap needs kms:ReEncryptFrom on the old key and kms:ReEncryptTo on the new \
                      one: `byokctl key policy ARN --rewrap` prints the statements";
        KmsError { remedy: remedy.to_owned(), ..error }
    }

    async fn describe_uncounted(&self, arn: &KeyArn) -> Result<KeyDescription, KmsError> {
        self.check_region(Operation::DescribeKey, arn)?;
        let deadline = self.call_deadline();
        let output = match self.describing.describe_key().key_id(arn.as_str()).send().await {
            Ok(output) => output,
            Err(error) => {
                return Err(self.failed(Operation::DescribeKey, arn, error, deadline).await);
            }
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let unproven = |what| self.unproven(Operation::DescribeKey, arn, what, request_id.clone());
        if self.is_replayed(request_id.as_deref()) {
            return Err(unproven(Unproven::Replayed));
        }
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

    async fn rewrap_uncounted(
        &self,
        wrapped: &WrappedKey,
        to: &KeyArn,
    ) -> Result<WrappedKey, KmsError> {
        let from = &wrapped.key_arn;
        self.check_region(Operation::ReEncrypt, from)?;
        self.check_rules(to).await?;
        let context = pairs(&wrapped.context);
        let deadline = self.call_deadline();
        let answer = self
            .describing
            .re_encrypt()
            .source_key_id(from.as_str())
            .destination_key_id(to.as_str())
            .ciphertext_blob(Blob::new(wrapped.blob.clone()))
            .set_source_encryption_context(Some(context.clone()))
            .set_destination_encryption_context(Some(context))
            .send()
            .await;
        let output = match answer {
            Ok(output) => output,
            Err(error) => {
                return Err(self.rewrap_failed(from, to, Words::of(&error), deadline).await);
            }
        };
        let request_id = output.request_id().map(ToOwned::to_owned);
        let unproven = |what| self.unproven(Operation::ReEncrypt, to, what, request_id.clone());
        if self.is_replayed(request_id.as_deref()) {
            return Err(unproven(Unproven::Replayed));
        }
        match (output.source_key_id(), output.key_id()) {
            (Some(source), Some(key)) if source == from.as_str() && key == to.as_str() => {}
            (Some(_), Some(_)) => return Err(unproven(Unproven::OtherKey)),
            _ => return Err(unproven(Unproven::Empty)),
        }
        match output.ciphertext_blob {
            Some(blob) if !blob.as_ref().is_empty() => Ok(WrappedKey {
                key_arn: to.clone(),
                blob: blob.into_inner(),
                context: wrapped.context.clone(),
            }),
            Some(_) | None => Err(unproven(Unproven::Empty)),
        }
    }
}

/// The answer to a request that an earlier answer led to, if it comes by the `deadline`.
async fn by<T>(deadline: Instant, request: impl Future<Output = T>) -> Option<T> {
    timeout_at(deadline, Box::pin(request)).await.ok()
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
        let (asked, deadline) = (Instant::now(), self.call_deadline());
        let (plaintext, request_id) = match self.decrypt(&self.keys, wrapped, deadline).await {
            Ok(unwrapped) => unwrapped,
            Err(error) => return Err(self.ask_witness(error, asked, deadline).await.into()),
        };
        let key = volume_key(&plaintext).ok_or_else(|| {
            let what = Unproven::OtherPlaintext;
            self.unproven(Operation::Decrypt, &wrapped.key_arn, what, request_id.clone())
        })??;
        // No key waits for it.
        self.prepare_witness();
        Ok((key, Proof { request_id }))
    }

    async fn rewrap_key(&self, wrapped: &WrappedKey, to: &KeyArn) -> Result<WrappedKey, KmsError> {
        self.counted(Operation::ReEncrypt, Box::pin(self.rewrap_uncounted(wrapped, to))).await
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
        let (asked, deadline) = (Instant::now(), self.probe_deadline());
        match self.probe_plainly(canary, connection, deadline).await {
            Ok(proof) => Ok(proof),
            Err(error) => Err(self.ask_witness(error, asked, deadline).await),
        }
    }

    async fn describe(&self, arn: &KeyArn) -> Result<KeyDescription, KmsError> {
        self.counted(Operation::DescribeKey, Box::pin(self.describe_uncounted(arn))).await
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

/// Where the environment says that KMS is asked, in the order of the SDK.
fn elsewhere(shared: &SdkConfig) -> Option<String> {
    let own = std::env::var("AWS_ENDPOINT_URL_KMS").ok().filter(|url| !url.is_empty());
    own.or_else(|| shared.endpoint_url().map(str::to_owned))
}

/// Whether that is reached without TLS by more than the machine's own loopback.
fn is_cleartext(endpoint: &str) -> bool {
    let Some(rest) = endpoint.strip_prefix("http://") else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next(),
        None => host.split(':').next(),
    };
    let host = host.unwrap_or_default();
    let loopback = host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    !loopback && !host.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use aws_credential_types::Credentials;
    use aws_credential_types::credential_fn::provide_credentials_fn;
    use aws_credential_types::provider::SharedCredentialsProvider;
    use aws_credential_types::provider::error::CredentialsError;

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

    #[test]
    fn cleartext_is_what_leaves_the_machine_without_tls() {
        for here in ["http://127.0.0.1:1", "http://[::1]:1/x", "http://LocalHost", "https://kms.a"]
        {
            assert!(!is_cleartext(here), "{here}");
        }
        for out in ["http://10.0.2.2:1", "http://127.0.0.1@kms.a/", "http://[fd00::1]", "http://a"]
        {
            assert!(is_cleartext(out), "{out}");
        }
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
