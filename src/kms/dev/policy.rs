//! Key policies, as far as the development KMS decides by them.
//!
//! A statement's effect, actions and conditions count. There are no principals here: whoever
//! calls is taken for every principal that a statement names. Conditions are the string operators
//! (with `IfExists`, `ForAllValues:` and `ForAnyValue:`) and `Null`, on
//! `kms:EncryptionContext:KEY`, `kms:EncryptionContextKeys` and `kms:CallerAccount`. Anything else
//! is refused when the policy is put, so no policy is ever misunderstood in silence.
//!
//! As in AWS, an explicit deny wins, and what no statement allows is denied.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::keys::ACCOUNT;
use super::wire::{Context, Exception};

/// What a policy says about one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Allowed,
    ExplicitlyDenied,
    NotAllowed,
}

/// A key policy: the document as it was put, and what it means.
#[derive(Clone)]
pub(super) struct Policy {
    document: String,
    statements: Vec<Statement>,
}

#[derive(Clone)]
struct Statement {
    allows: bool,
    actions: Vec<String>,
    /// Whether `actions` lists what the statement is *not* about.
    except: bool,
    conditions: Vec<Condition>,
}

#[derive(Clone)]
struct Condition {
    operator: Operator,
    negated: bool,
    if_exists: bool,
    set: Option<Set>,
    key: ConditionKey,
    values: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equals,
    EqualsIgnoreCase,
    Like,
    Null,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Set {
    All,
    Any,
}

#[derive(Clone)]
enum ConditionKey {
    Context(String),
    ContextKeys,
    CallerAccount,
}

/// AWS's own limit for a key policy.
const LONGEST_POLICY: usize = 32 << 10;

impl Policy {
    /// The policy of a new key: everything is allowed.
    pub(super) fn allow_all() -> Self {
        // The document is ours and parses; an empty policy would deny.
        Self::parse(&allow_all_document())
            .unwrap_or(Self { document: String::new(), statements: Vec::new() })
    }

    /// Reads a policy document.
    ///
    /// # Errors
    /// `MalformedPolicyDocumentException`, with what is not understood.
    pub(super) fn parse(document: &str) -> Result<Self, Exception> {
        let malformed = |why: String| Exception::new("MalformedPolicyDocumentException", why);
        if document.len() > LONGEST_POLICY {
            return Err(Exception::new("LimitExceededException", "The policy is over 32 KiB."));
        }
        let value: Value =
            serde_json::from_str(document).map_err(|error| malformed(error.to_string()))?;
        let statements = match value.get("Statement") {
            Some(Value::Array(list)) => list.iter().collect(),
            Some(one @ Value::Object(_)) => vec![one],
            Some(_) | None => return Err(malformed("it has no Statement".to_owned())),
        };
        let statements =
            statements.into_iter().map(statement).collect::<Result<_, _>>().map_err(malformed)?;
        Ok(Self { document: document.to_owned(), statements })
    }

    /// The document as it was put.
    pub(super) fn document(&self) -> &str {
        &self.document
    }

    /// Whether `action` (`kms:Decrypt`) in `context` is allowed.
    pub(super) fn decide(&self, action: &str, context: &Context) -> Decision {
        let mut decision = Decision::NotAllowed;
        for statement in &self.statements {
            if !statement.is_about(action, context) {
                continue;
            }
            if !statement.allows {
                return Decision::ExplicitlyDenied;
            }
            decision = Decision::Allowed;
        }
        decision
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.document)
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let document = String::deserialize(deserializer)?;
        Self::parse(&document).map_err(|error| D::Error::custom(error.message.unwrap_or_default()))
    }
}

/// A policy that allows everything: what a new key has, and what undoes a denial.
#[must_use]
pub fn allow_all_document() -> String {
    json!({
        "Version": "2012-10-17",
        "Statement": [allow_statement()],
    })
    .to_string()
}

/// A policy that denies the key to everyone, as a customer would.
#[must_use]
pub fn deny_all_document() -> String {
    json!({
        "Version": "2012-10-17",
        "Statement": [allow_statement(), {
            "Sid": "Denied", "Effect": "Deny", "Principal": "*", "Action": "kms:*", "Resource": "*",
        }],
    })
    .to_string()
}

/// A policy that denies only what is bound to `value` under `key` in its encryption context: one
/// volume out of many on the same key.
#[must_use]
pub fn deny_context_document(key: &str, value: &str) -> String {
    let mut equals = Map::new();
    equals.insert(format!("kms:EncryptionContext:{key}"), json!(value));
    json!({
        "Version": "2012-10-17",
        "Statement": [allow_statement(), {
            "Sid": "DeniedInThisContext", "Effect": "Deny", "Principal": "*", "Action": "kms:*",
            "Resource": "*", "Condition": {"StringEquals": equals},
        }],
    })
    .to_string()
}

fn allow_statement() -> Value {
    json!({
        "Sid": "Enable IAM User Permissions", "Effect": "Allow",
        "Principal": {"AWS": format!("arn:aws:iam::{ACCOUNT}:root")},
        "Action": "kms:*", "Resource": "*",
    })
}

fn statement(value: &Value) -> Result<Statement, String> {
    let Value::Object(members) = value else {
        return Err("a statement is not an object".to_owned());
    };
    const KNOWN: [&str; 7] =
        ["Sid", "Effect", "Principal", "Action", "NotAction", "Resource", "Condition"];
    if let Some(unknown) = members.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(format!("the development KMS does not know {unknown} in a statement"));
    }
    let allows = match members.get("Effect").and_then(Value::as_str) {
        Some("Allow") => true,
        Some("Deny") => false,
        Some(_) | None => return Err("a statement's Effect is neither Allow nor Deny".to_owned()),
    };
    if !members.contains_key("Principal") {
        return Err("a statement of a key policy needs a Principal".to_owned());
    }
    let (actions, except) = match (members.get("Action"), members.get("NotAction")) {
        (Some(actions), None) => (actions, false),
        (None, Some(actions)) => (actions, true),
        _ => return Err("a statement needs either Action or NotAction".to_owned()),
    };
    let conditions = match members.get("Condition") {
        None => Vec::new(),
        Some(Value::Object(operators)) => conditions(operators)?,
        Some(_) => return Err("a Condition is not an object".to_owned()),
    };
    Ok(Statement { allows, actions: words(actions)?, except, conditions })
}

fn conditions(operators: &Map<String, Value>) -> Result<Vec<Condition>, String> {
    let mut conditions = Vec::new();
    for (name, keys) in operators {
        let (set, base) = match name.split_once(':') {
            Some(("ForAllValues", base)) => (Some(Set::All), base),
            Some(("ForAnyValue", base)) => (Some(Set::Any), base),
            Some(_) | None => (None, name.as_str()),
        };
        let (base, if_exists) = match base.strip_suffix("IfExists") {
            Some(base) => (base, true),
            None => (base, false),
        };
        let (operator, negated) = match base {
            "StringEquals" => (Operator::Equals, false),
            "StringNotEquals" => (Operator::Equals, true),
            "StringEqualsIgnoreCase" => (Operator::EqualsIgnoreCase, false),
            "StringNotEqualsIgnoreCase" => (Operator::EqualsIgnoreCase, true),
            "StringLike" => (Operator::Like, false),
            "StringNotLike" => (Operator::Like, true),
            "Null" if !if_exists => (Operator::Null, false),
            _ => return Err(format!("the development KMS does not know the operator {name}")),
        };
        let Value::Object(keys) = keys else {
            return Err(format!("the condition {name} is not an object"));
        };
        for (key, values) in keys {
            let values = words(values)?;
            let key = condition_key(key)?;
            conditions.push(Condition { operator, negated, if_exists, set, key, values });
        }
    }
    Ok(conditions)
}

fn condition_key(name: &str) -> Result<ConditionKey, String> {
    const PREFIX: &str = "kms:EncryptionContext:";
    match name.split_at_checked(PREFIX.len()) {
        Some((prefix, key)) if prefix.eq_ignore_ascii_case(PREFIX) && !key.is_empty() => {
            Ok(ConditionKey::Context(key.to_owned()))
        }
        _ if name.eq_ignore_ascii_case("kms:EncryptionContextKeys") => {
            Ok(ConditionKey::ContextKeys)
        }
        _ if name.eq_ignore_ascii_case("kms:CallerAccount") => Ok(ConditionKey::CallerAccount),
        _ => Err(format!("the development KMS does not know the condition key {name}")),
    }
}

/// One text or a list of them. `Null` takes booleans, which AWS takes as texts too.
fn words(value: &Value) -> Result<Vec<String>, String> {
    let word = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(truth) => Ok(truth.to_string()),
        Value::Null | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            Err(format!("{value} is not a text"))
        }
    };
    if let Value::Array(list) = value {
        return list.iter().map(word).collect();
    }
    Ok(vec![word(value)?])
}

impl Statement {
    fn is_about(&self, action: &str, context: &Context) -> bool {
        let action = action.to_ascii_lowercase();
        let listed =
            self.actions.iter().any(|pattern| like(&pattern.to_ascii_lowercase(), &action));
        listed != self.except && self.conditions.iter().all(|condition| condition.holds(context))
    }
}

impl Condition {
    fn holds(&self, context: &Context) -> bool {
        let present: Vec<&str> = match &self.key {
            ConditionKey::Context(key) => {
                context.get(key).map(String::as_str).into_iter().collect()
            }
            ConditionKey::ContextKeys => context.keys().map(String::as_str).collect(),
            ConditionKey::CallerAccount => vec![ACCOUNT],
        };
        if self.operator == Operator::Null {
            return self.values.iter().any(|value| (value == "true") == present.is_empty());
        }
        if present.is_empty() && self.if_exists {
            return true;
        }
        let one = |value: &&str| {
            self.values.iter().any(|pattern| self.fits(pattern, value)) != self.negated
        };
        match self.set {
            Some(Set::All) => present.iter().all(one),
            Some(Set::Any) => present.iter().any(one),
            // A key that is absent equals nothing.
            None if present.is_empty() => self.negated,
            None => present.iter().any(one),
        }
    }

    fn fits(&self, pattern: &str, value: &str) -> bool {
        match self.operator {
            Operator::Equals => pattern == value,
            Operator::EqualsIgnoreCase => pattern.eq_ignore_ascii_case(value),
            Operator::Like => like(pattern, value),
            Operator::Null => false,
        }
    }
}

/// Whether `text` fits `pattern`, where `*` is any text and `?` one byte. Linear but for the last
/// `*`, to which it goes back.
fn like(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            Some(_) | None => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, t) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(pairs: &[(&str, &str)]) -> Context {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn decide(document: &str, action: &str, pairs: &[(&str, &str)]) -> Decision {
        Policy::parse(document).expect("understood").decide(action, &context(pairs))
    }

    #[test]
    fn a_denial_wins_and_what_nothing_allows_is_denied() {
        assert_eq!(decide(&allow_all_document(), "kms:Decrypt", &[]), Decision::Allowed);
        assert_eq!(decide(&deny_all_document(), "kms:Decrypt", &[]), Decision::ExplicitlyDenied);
        let only_describe = r#"{"Statement":{"Effect":"Allow","Principal":"*",
            "Action":["kms:Describe*"],"Resource":"*"}}"#;
        assert_eq!(decide(only_describe, "kms:DescribeKey", &[]), Decision::Allowed);
        assert_eq!(decide(only_describe, "kms:Decrypt", &[]), Decision::NotAllowed);
    }

    #[test]
    fn a_denial_can_be_for_one_context_only() {
        let document = deny_context_document("byokd:volume-uuid", "u1");
        let decide = |pairs| decide(&document, "kms:Decrypt", pairs);
        assert_eq!(decide(&[("byokd:volume-uuid", "u1")]), Decision::ExplicitlyDenied);
        assert_eq!(decide(&[("byokd:volume-uuid", "u2")]), Decision::Allowed);
        assert_eq!(decide(&[]), Decision::Allowed);
    }

    #[test]
    fn conditions_are_as_aws_documents_them() {
        for (condition, pairs, allowed) in [
            (r#"{"StringLike":{"kms:EncryptionContext:a":"x*z"}}"#, &[("a", "xyz")][..], true),
            (r#"{"StringLike":{"kms:EncryptionContext:a":"x*z"}}"#, &[("a", "xy")], false),
            (r#"{"StringLike":{"kms:EncryptionContext:a":"*"}}"#, &[], false),
            (r#"{"StringNotEquals":{"kms:EncryptionContext:a":["x","y"]}}"#, &[("a", "y")], false),
            (r#"{"StringNotEquals":{"kms:EncryptionContext:a":["x","y"]}}"#, &[], true),
            (r#"{"StringEqualsIfExists":{"kms:EncryptionContext:a":"x"}}"#, &[], true),
            (r#"{"StringEquals":{"kms:EncryptionContext:A":"x"}}"#, &[("a", "x")], false),
            (r#"{"StringEqualsIgnoreCase":{"kms:EncryptionContext:a":"X"}}"#, &[("a", "x")], true),
            (r#"{"Null":{"kms:EncryptionContext:a":"false"}}"#, &[("a", "x")], true),
            (r#"{"Null":{"kms:EncryptionContext:a":false}}"#, &[], false),
            (
                r#"{"ForAllValues:StringEquals":{"kms:EncryptionContextKeys":["a","b"]}}"#,
                &[("a", "x"), ("c", "x")],
                false,
            ),
            (
                r#"{"ForAnyValue:StringEquals":{"kms:EncryptionContextKeys":["a","b"]}}"#,
                &[("a", "x"), ("c", "x")],
                true,
            ),
            (r#"{"StringEquals":{"kms:CallerAccount":"000000000000"}}"#, &[], true),
        ] {
            let document = format!(
                r#"{{"Statement":[{{"Effect":"Allow","Principal":{{"AWS":"*"}},"Action":"kms:*",
                "Resource":"*","Condition":{condition}}}]}}"#
            );
            let decision = decide(&document, "kms:Decrypt", pairs);
            assert_eq!(decision == Decision::Allowed, allowed, "{condition} {pairs:?}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_when_it_is_put() {
        for document in [
            "",
            "[]",
            "{}",
            r#"{"Statement":[{"Effect":"Allow"}]}"#,
            r#"{"Statement":[{"Effect":"Allow","Principal":"*"}]}"#,
            r#"{"Statement":[{"Effect":"Perhaps","Principal":"*","Action":"*"}]}"#,
            r#"{"Statement":[{"Effect":"Allow","NotPrincipal":"*","Action":"*"}]}"#,
            r#"{"Statement":[{"Effect":"Allow","Principal":"*","Action":"*","Condition":{"DateLessThan":{"aws:CurrentTime":"x"}}}]}"#,
            r#"{"Statement":[{"Effect":"Allow","Principal":"*","Action":"*","Condition":{"StringEquals":{"kms:ViaService":"x"}}}]}"#,
        ] {
            let error = Policy::parse(document).err().expect(document);
            assert_eq!(error.code, "MalformedPolicyDocumentException");
        }
    }

    #[test]
    fn a_hostile_pattern_ends() {
        let pattern = "*a".repeat(200);
        assert!(!like(&pattern, &"a".repeat(150)));
        assert!(like("*", "") && like("", "") && !like("?", "") && like("a?c*", "abc"));
    }
}
