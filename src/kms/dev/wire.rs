//! The words of the KMS wire protocol: requests as they are sent, answers, exceptions.
//!
//! AWS JSON 1.1: `POST /`, `X-Amz-Target: TrentService.OPERATION`, blobs in base64, members in
//! PascalCase; an unknown member is ignored, as AWS does. Source: the AWS KMS API reference.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

/// An error as KMS words it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exception {
    /// The HTTP status.
    pub(super) status: u16,
    /// `__type`.
    pub(super) code: String,
    /// The message; KMS gives some exceptions none.
    pub(super) message: Option<String>,
}

impl Exception {
    /// An exception of the caller's making: HTTP 400.
    pub(super) fn new(code: &str, message: impl Into<String>) -> Self {
        Self { status: 400, code: code.to_owned(), message: Some(message.into()) }
    }

    /// One that KMS gives without a message.
    pub(super) fn silent(code: &str) -> Self {
        Self { status: 400, code: code.to_owned(), message: None }
    }

    /// A fault of KMS itself: HTTP 500.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self { status: 500, code: "KMSInternalException".to_owned(), message: Some(message.into()) }
    }

    pub(super) fn validation(message: impl Into<String>) -> Self {
        Self::new("ValidationException", message)
    }

    /// The body of the answer.
    pub(super) fn body(&self) -> Vec<u8> {
        let mut body = Map::new();
        body.insert("__type".to_owned(), json!(self.code));
        if let Some(message) = &self.message {
            // AWS's authorization layer writes the member with a capital, KMS itself without.
            let name = if self.code == "AccessDeniedException" { "Message" } else { "message" };
            body.insert(name.to_owned(), json!(message));
        }
        Value::Object(body).to_string().into_bytes()
    }
}

/// An answer that is no exception. The plaintext is apart from the rest so that it can be wiped.
pub(super) struct Reply {
    pub(super) members: Map<String, Value>,
    pub(super) plaintext: Option<Zeroizing<Vec<u8>>>,
}

impl Reply {
    pub(super) fn new(members: Value) -> Self {
        match members {
            Value::Object(members) => Self { members, plaintext: None },
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => Self { members: Map::new(), plaintext: None },
        }
    }

    pub(super) fn with_plaintext(self, plaintext: Zeroizing<Vec<u8>>) -> Self {
        Self { plaintext: Some(plaintext), ..self }
    }

    /// The body of the answer, in a buffer that wipes itself and was never moved.
    pub(super) fn body(&self) -> Zeroizing<Vec<u8>> {
        let rest = Value::Object(self.members.clone()).to_string();
        let Some(plaintext) = &self.plaintext else {
            return Zeroizing::new(rest.into_bytes());
        };
        let begin = br#"{"Plaintext":""#;
        let encoded_len = plaintext.len().div_ceil(3) * 4;
        let mut body = Zeroizing::new(vec![0; begin.len() + encoded_len + 2 + rest.len()]);
        let (head, tail) = body.split_at_mut(begin.len());
        head.copy_from_slice(begin);
        let written = STANDARD.encode_slice(plaintext.as_slice(), tail).unwrap_or_default();
        let mut end = begin.len() + written;
        // `{` of the rest becomes the comma between the two; without a rest there is no comma.
        let rest = rest.strip_prefix('{').unwrap_or(&rest);
        let between: &[u8] = if rest == "}" { b"\"" } else { b"\"," };
        for part in [between, rest.as_bytes()] {
            body[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        body.truncate(end);
        body
    }
}

/// A member that is base64 on the wire.
#[derive(Clone, Default)]
pub(super) struct Base64(pub(super) Zeroizing<Vec<u8>>);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        Ok(Self(Zeroizing::new(bytes)))
    }
}

/// An encryption context: sorted, so that it can be authenticated whatever order it came in.
pub(super) type Context = BTreeMap<String, String>;

/// The members of a request, as its operation wants them.
///
/// # Errors
/// `SerializationException`: it is not JSON, or a member has the wrong type.
pub(super) fn parse<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, Exception> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|_| Exception::silent("SerializationException"))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CreateKey {
    #[serde(default)]
    pub(super) description: String,
    #[serde(default)]
    pub(super) key_spec: Option<String>,
    #[serde(default)]
    pub(super) customer_master_key_spec: Option<String>,
    #[serde(default)]
    pub(super) key_usage: Option<String>,
    #[serde(default)]
    pub(super) origin: Option<String>,
    #[serde(default)]
    pub(super) multi_region: bool,
    #[serde(default)]
    pub(super) policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct OneKey {
    #[serde(default)]
    pub(super) key_id: String,
    #[serde(default)]
    pub(super) grant_tokens: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ListKeys {
    #[serde(default)]
    pub(super) limit: Option<usize>,
    #[serde(default)]
    pub(super) marker: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct GenerateDataKey {
    #[serde(default)]
    pub(super) key_id: String,
    #[serde(default)]
    pub(super) key_spec: Option<String>,
    #[serde(default)]
    pub(super) number_of_bytes: Option<i64>,
    #[serde(default)]
    pub(super) encryption_context: Context,
    #[serde(default)]
    pub(super) grant_tokens: Vec<String>,
    #[serde(default)]
    pub(super) dry_run: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Encrypt {
    #[serde(default)]
    pub(super) key_id: String,
    #[serde(default)]
    pub(super) plaintext: Base64,
    #[serde(default)]
    pub(super) encryption_context: Context,
    #[serde(default)]
    pub(super) encryption_algorithm: Option<String>,
    #[serde(default)]
    pub(super) grant_tokens: Vec<String>,
    #[serde(default)]
    pub(super) dry_run: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Decrypt {
    #[serde(default)]
    pub(super) key_id: Option<String>,
    #[serde(default)]
    pub(super) ciphertext_blob: Base64,
    #[serde(default)]
    pub(super) encryption_context: Context,
    #[serde(default)]
    pub(super) encryption_algorithm: Option<String>,
    #[serde(default)]
    pub(super) grant_tokens: Vec<String>,
    #[serde(default)]
    pub(super) dry_run: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ReEncrypt {
    #[serde(default)]
    pub(super) ciphertext_blob: Base64,
    #[serde(default)]
    pub(super) source_key_id: Option<String>,
    #[serde(default)]
    pub(super) source_encryption_context: Context,
    #[serde(default)]
    pub(super) destination_key_id: String,
    #[serde(default)]
    pub(super) destination_encryption_context: Context,
    #[serde(default)]
    pub(super) source_encryption_algorithm: Option<String>,
    #[serde(default)]
    pub(super) destination_encryption_algorithm: Option<String>,
    #[serde(default)]
    pub(super) grant_tokens: Vec<String>,
    #[serde(default)]
    pub(super) dry_run: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ScheduleKeyDeletion {
    #[serde(default)]
    pub(super) key_id: String,
    #[serde(default)]
    pub(super) pending_window_in_days: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct PutKeyPolicy {
    #[serde(default)]
    pub(super) key_id: String,
    #[serde(default)]
    pub(super) policy_name: Option<String>,
    #[serde(default)]
    pub(super) policy: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_with_a_plaintext_is_the_json_of_both() {
        for members in [json!({}), json!({"KeyId": "k", "A": [1, 2]})] {
            for len in [0, 1, 2, 3, 32, 64] {
                let plaintext: Vec<u8> = (0..len).collect();
                let reply =
                    Reply::new(members.clone()).with_plaintext(Zeroizing::new(plaintext.clone()));
                let mut parsed: Value = serde_json::from_slice(&reply.body()).expect("JSON");
                let text = parsed.as_object_mut().expect("an object").remove("Plaintext");
                assert_eq!(text, Some(json!(STANDARD.encode(plaintext))));
                assert_eq!(parsed, members);
            }
        }
    }
}
