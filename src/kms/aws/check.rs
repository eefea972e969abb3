//! A customer's key, tried step by step, and the rules a key has to keep.

use uuid::Uuid;

use super::{AwsKms, CANARY_LEN};
use crate::clock::now;
use crate::key::lease::{Verdict, Whose};
use crate::key::wrapped::{EncryptionContext, KeyArn, Purpose, WrappedKey};
use crate::kms::verdict::{self, Answer, Unproven};
use crate::kms::{CheckStep, KeyDescription, KeyService, KmsError, Operation};

impl AwsKms {
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
        let (plaintext, proof) = self
            .decrypt(&self.probing, &wrapped, self.probe_deadline())
            .await
            .map_err(said("decrypt"))?;
        if *plaintext != *data_key.plaintext {
            let error = self.unproven(Operation::Decrypt, arn, Unproven::OtherPlaintext, proof);
            return Err(said("decrypt")(error));
        }
        steps.push(passed("decrypt", format!("and unwrapped again{}", request(proof.as_deref()))));

        let mut other = context.pairs().clone();
        other.insert("byokd:check".to_owned(), "another context".to_owned());
        let moved = WrappedKey { context: EncryptionContext::from_map(other), ..wrapped };
        match self.decrypt(&self.probing, &moved, self.probe_deadline()).await {
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
    pub(super) fn check_region(&self, operation: Operation, arn: &KeyArn) -> Result<(), KmsError> {
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
            whose: Whose::Unknown,
            came: now(),
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
            whose: Whose::Unknown,
            came: now(),
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
            whose: Whose::Unknown,
            came: now(),
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
    pub(super) async fn check_rules(&self, arn: &KeyArn) -> Result<(), KmsError> {
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
}

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
