//! How KMS is reached and as whom: region, endpoint, credentials, time limits.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_config::identity::IdentityCache;
use aws_config::retry::RetryConfig;
use aws_config::sts::AssumeRoleProvider;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use thiserror::Error;

use crate::key::lease::{DisconnectedStore, PROBE_LIMIT};
use crate::key::wrapped::KeyArn;
use crate::kms::Observer;
use crate::kms::aws::answers::Answers;
use crate::kms::http::{self, Reuse};
use crate::metrics::counters::KmsCalls;

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
    /// A key of the operator's own, which shows whose fault a denial is.
    pub witness: Option<KeyArn>,
    /// Access key id and secret key, instead of the SDK's chain: for the development KMS only.
    pub static_credentials: Option<(String, String)>,
    /// Who is told of every request.
    pub observer: Option<Observer>,
    /// Where requests are counted.
    pub calls: Arc<KmsCalls>,
    /// Answers that have come, to whomever of those with these settings.
    pub answers: Arc<Answers>,
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
    /// Times: one second is ten times a slow connect within a region. An attempt has as long as a
    /// probe, which is one. Three attempts fit into 8 s.
    fn default() -> Self {
        Self {
            region: None,
            endpoint: None,
            fips: false,
            profile: None,
            role: None,
            connect_timeout: Duration::from_secs(1),
            attempt_timeout: PROBE_LIMIT,
            operation_timeout: Duration::from_secs(8),
            disconnected_store: DisconnectedStore::default(),
            witness: None,
            static_credentials: None,
            observer: None,
            calls: Arc::default(),
            answers: Arc::default(),
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
            .field("witness", &self.witness)
            .field("static_credentials", &self.static_credentials.as_ref().map(|(id, _)| id))
            .field("observer", &self.observer.is_some())
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
    /// KMS is reached over TLS, and no server would be known.
    #[error("this machine has no CA certificates, so that no KMS can be told from a false one")]
    NoCertificates,
}

/// Three attempts, with the SDK's own backoff: it never goes past the operation's limit.
pub(super) fn retries() -> RetryConfig {
    RetryConfig::standard().with_max_attempts(3).with_initial_backoff(Duration::from_millis(200))
}

pub(super) fn timeouts(settings: &AwsSettings, operation: Duration) -> TimeoutConfig {
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
pub(super) async fn shared_config(settings: &AwsSettings) -> SdkConfig {
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
