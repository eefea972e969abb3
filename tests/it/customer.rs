//! The customer's side: a development KMS of the test's own, with one key, and a console to it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use byokd::key::lease::{Connection, Verdict};
use byokd::key::wrapped::{Canary, EncryptionContext, KeyArn, Purpose};
use byokd::kms::KeyService;
use byokd::kms::aws::{AwsKms, AwsSettings};
use byokd::kms::dev::{DEV_REGION, DevKms};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::support::{Daemon, in_memory, run};

/// A key service with one key, and what a customer's console is to it.
pub(crate) struct Customer {
    // Before the runtime, which it runs on.
    pub(crate) kms: DevKms,
    pub(crate) console: aws_sdk_kms::Client,
    pub(crate) key: KeyArn,
    pub(crate) runtime: Runtime,
    _dir: TempDir,
}

impl Customer {
    pub(crate) fn new() -> Self {
        let dir = in_memory();
        let runtime = Runtime::new().unwrap();
        let kms = runtime.block_on(DevKms::start(dir.path(), DEV_REGION)).unwrap();
        let config = aws_sdk_kms::Config::builder()
            .behavior_version(aws_config::BehaviorVersion::latest())
            .region(aws_config::Region::new(DEV_REGION))
            .endpoint_url(kms.endpoint())
            .credentials_provider(aws_sdk_kms::config::Credentials::new("a", "b", None, None, "t"))
            .build();
        let console = aws_sdk_kms::Client::from_conf(config);
        let made = runtime.block_on(console.create_key().send()).unwrap();
        let key = made.key_metadata().unwrap().arn().unwrap().parse().unwrap();
        Self { kms, console, key, runtime, _dir: dir }
    }

    /// byokd's own client, with limits that let a stall end soon.
    pub(crate) fn client_at(&self, endpoint: &str) -> AwsKms {
        let settings =
            AwsSettings { endpoint: Some(endpoint.to_owned()), ..self.client_settings() };
        self.runtime.block_on(AwsKms::connect(settings)).unwrap()
    }

    /// The settings of such a client of this KMS.
    pub(crate) fn client_settings(&self) -> AwsSettings {
        AwsSettings {
            region: Some(DEV_REGION.to_owned()),
            endpoint: Some(self.kms.endpoint().to_owned()),
            attempt_timeout: Duration::from_millis(500),
            operation_timeout: Duration::from_secs(2),
            static_credentials: Some(("dev".to_owned(), "dev".to_owned())),
            ..AwsSettings::default()
        }
    }

    pub(crate) fn canary(&self, client: &AwsKms) -> Canary {
        let context = EncryptionContext::for_volume(Uuid::new_v4(), Purpose::Zeebe, []).unwrap();
        self.runtime.block_on(client.make_canary(&self.key, &context)).unwrap()
    }

    /// What a probe says: the verdict, and the code.
    pub(crate) fn probe(&self, client: &AwsKms, canary: &Canary) -> (Verdict, String) {
        match self.runtime.block_on(client.probe(canary, Connection::Fresh)) {
            Ok(_) => (Verdict::Allowed, String::new()),
            Err(error) => (error.verdict, error.code),
        }
    }

    /// byokd as in production, under this KMS, probing every second.
    pub(crate) fn daemon(&self) -> Daemon {
        self.daemon_with("", "probe_interval = \"1s\"\n")
    }

    /// The same with more under `[kms]`, and this under `[lease]`.
    pub(crate) fn daemon_with(&self, kms: &str, lease: &str) -> Daemon {
        Daemon::configured(&self.settings(kms, lease))
    }

    /// The settings of a daemon under this KMS.
    pub(crate) fn settings(&self, kms: &str, lease: &str) -> String {
        format!(
            "[kms]\nregion = \"{DEV_REGION}\"\nendpoint = \"{}\"\n{kms}[lease]\n{lease}",
            self.kms.endpoint()
        )
    }

    /// The volume key of a store, as anybody with `kms:Decrypt` gets it.
    pub(crate) fn volume_key(&self, store: &Path) -> Vec<u8> {
        let export = ["token", "export", "--token-id", "0"];
        let token = run(Command::new("/usr/sbin/cryptsetup").args(export).arg(store));
        let token: serde_json::Value = serde_json::from_str(&token).unwrap();
        let blob = BASE64_STANDARD.decode(token["ciphertext_blob"].as_str().unwrap()).unwrap();
        let context = serde_json::from_value(token["encryption_context"].clone()).unwrap();
        let decrypt = self
            .console
            .decrypt()
            .ciphertext_blob(aws_sdk_kms::primitives::Blob::new(blob))
            .set_encryption_context(Some(context));
        let answer = self.runtime.block_on(decrypt.send()).unwrap();
        answer.plaintext.unwrap().into_inner()
    }

    /// Another key.
    pub(crate) fn another_key(&self) -> KeyArn {
        let made = self.runtime.block_on(self.console.create_key().send()).unwrap();
        made.key_metadata().unwrap().arn().unwrap().parse().unwrap()
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.set_key_enabled(&self.key, enabled);
    }

    pub(crate) fn set_key_enabled(&self, key: &KeyArn, enabled: bool) {
        let key = key.as_str();
        if enabled {
            self.runtime.block_on(self.console.enable_key().key_id(key).send()).unwrap();
        } else {
            self.runtime.block_on(self.console.disable_key().key_id(key).send()).unwrap();
        }
    }

    /// A policy that allows everything but what names this volume.
    pub(crate) fn deny_volume(&self, uuid: &str) {
        self.put_policy(
            &serde_json::json!({"Version": "2012-10-17", "Statement": [
                {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "kms:*", "Resource": "*"},
                {"Effect": "Deny", "Principal": {"AWS": "*"}, "Action": "kms:Decrypt", "Resource": "*",
                 "Condition": {"StringEquals": {"kms:EncryptionContext:byokd:volume-uuid": uuid}}},
            ]})
            .to_string(),
        );
    }

    pub(crate) fn allow_all(&self) {
        self.deny_volume("none");
    }

    pub(crate) fn put_policy(&self, policy: &str) {
        let put = self.console.put_key_policy().key_id(self.key.as_str()).policy(policy);
        self.runtime.block_on(put.send()).unwrap();
    }
}
