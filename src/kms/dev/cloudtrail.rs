//! What a customer would find in CloudTrail: the latest requests in the shape of its files.

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::keys::{ACCOUNT, KeyStore};
use super::server::Seen;

/// The events, as a file of CloudTrail has them. What a fault kept from KMS is none.
pub(super) fn records(seen: &[Seen], store: &KeyStore) -> Value {
    let of_kms = seen.iter().filter(|s| !s.error.as_deref().unwrap_or("").starts_with("fault "));
    let records: Vec<_> = of_kms.map(|seen| record(seen, store)).collect();
    json!({ "Records": records })
}

fn record(seen: &Seen, store: &KeyStore) -> Value {
    let who = seen.access_key.as_deref().unwrap_or("unknown");
    let key = seen.key.as_deref().and_then(|id| store.find(id).ok());
    let arn = key.map(|key| key.arn);
    let region = arn.as_deref().and_then(|arn| arn.split(':').nth(3)).unwrap_or_default();
    // CloudTrail has whole seconds.
    let at = Timestamp::from_second(seen.at_ms.div_euclid(1000)).unwrap_or_default();
    let mut parameters = json!({});
    if let Some(context) = &seen.context {
        parameters["encryptionContext"] = context.clone();
    }
    if let Some(arn) = &arn {
        parameters["keyId"] = json!(arn);
    }
    let resources: Vec<_> = arn
        .iter()
        .map(|arn| json!({"accountId": ACCOUNT, "type": "AWS::KMS::Key", "ARN": arn}))
        .collect();
    let reads = matches!(
        seen.operation.as_str(),
        "Decrypt" | "DescribeKey" | "GenerateDataKey" | "GetKeyPolicy" | "ListKeys"
    );
    let mut event = json!({
        "eventVersion": "1.08",
        "userIdentity": {
            "type": "IAMUser",
            "principalId": who,
            "arn": format!("arn:aws:iam::{ACCOUNT}:user/{who}"),
            "accountId": ACCOUNT,
            "accessKeyId": who,
        },
        "eventTime": at.to_string(),
        "eventSource": "kms.amazonaws.com",
        "eventName": seen.operation,
        "awsRegion": region,
        "sourceIPAddress": "127.0.0.1",
        "requestParameters": parameters,
        "responseElements": null,
        "requestID": seen.request_id,
        "eventID": Uuid::new_v4(),
        "readOnly": reads,
        "resources": resources,
        "eventType": "AwsApiCall",
        "recipientAccountId": ACCOUNT,
    });
    if let Some(error) = &seen.error {
        event["errorCode"] = json!(error);
    }
    event
}
