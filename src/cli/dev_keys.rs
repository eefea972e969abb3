//! `byokctl dev key`: what a customer does to a key, on the development KMS, over the same wire
//! protocol as AWS.

use std::path::Path;

use aws_config::{BehaviorVersion, Region};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::Credentials;
use aws_sdk_kms::error::{DisplayErrorContext, SdkError};
use serde_json::json;

use crate::cli::args::{DevCommand, DevKeyCommand};
use crate::cli::output::Output;
use crate::control::ControlError;
use crate::exit::ExitCode;
use crate::key::wrapped::KeyArn;
use crate::kms::dev::DEV_REGION;

fn failed(exit: ExitCode, why: String, remedy: &str) -> ControlError {
    ControlError {
        exit,
        what: "use the development KMS".to_owned(),
        why,
        remedy: remedy.to_owned(),
    }
}

fn sdk<E, R>(error: SdkError<E, R>) -> ControlError
where
    SdkError<E, R>: std::error::Error,
{
    let why = DisplayErrorContext(&error).to_string();
    failed(ExitCode::Failed, why, "Check that `byokd --dev` runs with that state directory.")
}

/// The development KMS of one state directory.
pub struct DevKeys {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl DevKeys {
    /// That of the daemon which runs with `state_dir`.
    ///
    /// # Errors
    /// No daemon has left its endpoint there.
    pub fn open(state_dir: &Path) -> Result<Self, ControlError> {
        let path = state_dir.join("kms-endpoint");
        let endpoint = std::fs::read_to_string(&path).map_err(|e| {
            let why = format!("{}: {e}", path.display());
            failed(
                ExitCode::WrongState,
                why,
                "Start `byokd --dev --state-dir DIR` first, and name the same DIR.",
            )
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| failed(ExitCode::Failed, e.to_string(), "Free memory."))?;
        let config = aws_sdk_kms::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(DEV_REGION))
            .endpoint_url(endpoint.trim())
            // The development KMS accepts any credentials; these are no secret.
            .credentials_provider(Credentials::new("dev", "dev", None, None, "development"))
            .build();
        Ok(Self { runtime, client: Client::from_conf(config) })
    }

    /// Makes a key.
    ///
    /// # Errors
    /// The development KMS does not answer.
    pub fn create(&self) -> Result<String, ControlError> {
        let made = self.runtime.block_on(self.client.create_key().send()).map_err(sdk)?;
        let metadata = made.key_metadata();
        let arn = metadata.and_then(|m| m.arn()).unwrap_or_default();
        Ok(arn.to_owned())
    }

    /// Disables or enables a key.
    ///
    /// # Errors
    /// The development KMS refuses.
    pub fn set_enabled(&self, arn: &KeyArn, enabled: bool) -> Result<(), ControlError> {
        self.runtime.block_on(async {
            if enabled {
                self.client.enable_key().key_id(arn.as_str()).send().await.map_err(sdk)?;
            } else {
                self.client.disable_key().key_id(arn.as_str()).send().await.map_err(sdk)?;
            }
            Ok(())
        })
    }

    /// Denies a key's use by its policy, or allows it again.
    ///
    /// # Errors
    /// The development KMS refuses.
    pub fn set_policy(&self, arn: &KeyArn, denied: bool) -> Result<(), ControlError> {
        let allow = json!({
            "Sid": "Allow", "Effect": "Allow", "Principal": {"AWS": "*"},
            "Action": "kms:*", "Resource": "*",
        });
        let deny = json!({
            "Sid": "Deny", "Effect": "Deny", "Principal": {"AWS": "*"},
            "Action": ["kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey*", "kms:ReEncrypt*", "kms:DescribeKey"],
            "Resource": "*",
        });
        let statements = if denied { vec![allow, deny] } else { vec![allow] };
        let policy = json!({ "Version": "2012-10-17", "Statement": statements }).to_string();
        let put = self.client.put_key_policy().key_id(arn.as_str()).policy(policy);
        self.runtime.block_on(put.send()).map_err(sdk)?;
        Ok(())
    }

    fn schedule_deletion(&self, arn: &KeyArn) -> Result<(), ControlError> {
        let call =
            self.client.schedule_key_deletion().key_id(arn.as_str()).pending_window_in_days(7);
        self.runtime.block_on(call.send()).map_err(sdk)?;
        Ok(())
    }

    fn cancel_deletion(&self, arn: &KeyArn) -> Result<(), ControlError> {
        let call = self.client.cancel_key_deletion().key_id(arn.as_str());
        self.runtime.block_on(call.send()).map_err(sdk)?;
        Ok(())
    }

    fn list(&self) -> Result<Vec<(String, String)>, ControlError> {
        self.runtime.block_on(async {
            let keys = self.client.list_keys().send().await.map_err(sdk)?;
            let mut listed = Vec::new();
            for key in keys.keys() {
                let arn = key.key_arn().unwrap_or_default();
                let said = self.client.describe_key().key_id(arn).send().await;
                let state = match &said {
                    Ok(said) => said
                        .key_metadata()
                        .and_then(|m| m.key_state())
                        .map_or("unknown", |s| s.as_str())
                        .to_owned(),
                    Err(_) => "denied by its policy".to_owned(),
                };
                listed.push((arn.to_owned(), state));
            }
            Ok(listed)
        })
    }
}

/// Does what was asked for.
///
/// # Errors
/// Why it could not be done.
pub fn run(command: DevCommand, out: &Output) -> Result<ExitCode, ControlError> {
    let DevCommand::Key { state_dir, command } = command;
    let state_dir = state_dir.ok_or_else(|| {
        let why = "the state directory of `byokd --dev` is not named".to_owned();
        failed(ExitCode::Usage, why, "Add --state-dir DIR, or set BYOKD_STATE_DIR.")
    })?;
    let keys = DevKeys::open(&state_dir)?;
    let said = |arn: &KeyArn, state: &str| {
        out.line(&format!("{arn}: {state}"));
        out.value(&json!({ "key_arn": arn, "state": state }));
    };
    match command {
        DevKeyCommand::Create => {
            let arn = keys.create()?;
            out.line(&arn);
            out.value(&json!({ "key_arn": arn, "state": "Enabled" }));
        }
        DevKeyCommand::List => {
            let listed = keys.list()?;
            for (arn, state) in &listed {
                out.line(&format!("{arn}  {state}"));
            }
            let objects: Vec<_> =
                listed.iter().map(|(arn, s)| json!({ "key_arn": arn, "state": s })).collect();
            out.value(&objects);
        }
        DevKeyCommand::Disable { arn } => {
            keys.set_enabled(&arn, false)?;
            said(&arn, "disabled");
        }
        DevKeyCommand::Enable { arn } => {
            keys.set_enabled(&arn, true)?;
            said(&arn, "enabled");
        }
        DevKeyCommand::Deny { arn } => {
            keys.set_policy(&arn, true)?;
            said(&arn, "denied by its policy");
        }
        DevKeyCommand::Allow { arn } => {
            keys.set_policy(&arn, false)?;
            said(&arn, "allowed by its policy");
        }
        DevKeyCommand::Delete { arn } => {
            keys.schedule_deletion(&arn)?;
            said(&arn, "pending deletion");
        }
        DevKeyCommand::Restore { arn } => {
            keys.cancel_deletion(&arn)?;
            keys.set_enabled(&arn, true)?;
            said(&arn, "enabled");
        }
    }
    Ok(ExitCode::Ok)
}
