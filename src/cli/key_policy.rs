//! The least key policy a customer has to grant: only the operations that byokd uses, and those
//! that touch keys only with the encryption context that byokd always sends.
//!
//! Source: AWS KMS Developer Guide, "Condition keys for AWS KMS".

use serde_json::{Value, json};

use crate::cli::args::PolicyArgs;
use crate::key::wrapped::{CONTEXT_PURPOSE, CONTEXT_VOLUME};

/// The statements to add to the key's policy.
#[must_use]
pub fn statement(policy: &PolicyArgs) -> Value {
    let mut condition = json!({
        "Null": { format!("kms:EncryptionContext:{CONTEXT_VOLUME}"): "false" }
    });
    if let Some(purpose) = policy.purpose {
        condition["StringEquals"] =
            json!({ format!("kms:EncryptionContext:{CONTEXT_PURPOSE}"): purpose.as_str() });
    }
    let mut uses = vec!["kms:Decrypt", "kms:GenerateDataKey"];
    if policy.rewrap {
        uses.extend(["kms:ReEncryptFrom", "kms:ReEncryptTo"]);
    }
    let principal = json!({ "AWS": policy.principal });
    json!({
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "ByokdUseKeyForVolumes",
                "Effect": "Allow",
                "Principal": principal,
                "Action": uses,
                "Resource": "*",
                "Condition": condition,
            },
            {
                "Sid": "ByokdSeeKeyState",
                "Effect": "Allow",
                "Principal": principal,
                "Action": "kms:DescribeKey",
                "Resource": "*",
            },
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::wrapped::Purpose;

    #[test]
    fn keys_are_only_used_with_a_volumes_context() {
        let policy = statement(&PolicyArgs {
            arn: "arn:aws:kms:eu-central-1:111122223333:key/k".parse().unwrap(),
            principal: "arn:aws:iam::444455556666:role/byokd".into(),
            purpose: Some(Purpose::Zeebe),
            rewrap: false,
        });
        let uses = &policy["Statement"][0];
        assert_eq!(uses["Action"], json!(["kms:Decrypt", "kms:GenerateDataKey"]));
        assert_eq!(uses["Condition"]["Null"]["kms:EncryptionContext:byokd:volume-uuid"], "false");
        let purpose = &uses["Condition"]["StringEquals"]["kms:EncryptionContext:byokd:purpose"];
        assert_eq!(purpose, "zeebe");
    }
}
