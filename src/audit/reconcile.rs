//! The trail held against the customer's CloudTrail: what one has and the other lacks, and why.
//!
//! Events are joined by request id. A call whose answer never came has none; it is joined by
//! operation, key, encryption context and time. What stays is explained where it can be: it lies
//! outside the time of the other side, it is somebody else's, it is the customer's administration,
//! the daemon crashed before it wrote it. What nothing explains is a discrepancy.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::audit::record::{Kind, Record};
use crate::units::word;

/// One event of CloudTrail, as far as it is compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudEvent {
    /// When, in whole seconds.
    pub at: Timestamp,
    /// `Decrypt`, `GenerateDataKey`, ...
    pub operation: String,
    /// The id of KMS's answer.
    pub request_id: String,
    /// ARNs of the keys it was about.
    pub keys: Vec<String>,
    /// The encryption context; absent where CloudTrail has no parameters, as of what failed.
    pub context: Option<BTreeMap<String, String>>,
    /// The error it was answered with.
    pub error: Option<String>,
    /// Who called.
    pub principal: String,
}

/// Reads an export: files as CloudTrail delivers them (`Records`), answers of `aws cloudtrail
/// lookup-events` (`Events`), arrays of events, and any number of these one after the other.
/// Events of other services are left out.
///
/// # Errors
/// It is none of these.
pub fn read_export(bytes: &[u8]) -> Result<Vec<CloudEvent>, String> {
    let mut events = Vec::new();
    for document in serde_json::Deserializer::from_slice(bytes).into_iter::<Value>() {
        let document = document.map_err(|e| format!("it is no JSON: {e}"))?;
        collect(document, &mut events)?;
    }
    Ok(events)
}

fn collect(document: Value, events: &mut Vec<CloudEvent>) -> Result<(), String> {
    match document {
        Value::Array(all) => all.into_iter().try_for_each(|one| collect(one, events)),
        Value::Object(mut members) => {
            if let Some(records) = members.remove("Records").or_else(|| members.remove("Events")) {
                return collect(records, events);
            }
            if let Some(Value::String(text)) = members.get("CloudTrailEvent") {
                let inner = serde_json::from_str(text)
                    .map_err(|e| format!("a CloudTrailEvent is no JSON: {e}"))?;
                return collect(inner, events);
            }
            if members.contains_key("eventSource") {
                events.extend(event(&Value::Object(members))?);
                return Ok(());
            }
            Err("it holds neither Records nor Events of CloudTrail".to_owned())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            Err("it holds neither Records nor Events of CloudTrail".to_owned())
        }
    }
}

fn event(value: &Value) -> Result<Option<CloudEvent>, String> {
    if value["eventSource"] != "kms.amazonaws.com" {
        return Ok(None);
    }
    let text = |member: &str| value[member].as_str().map(str::to_owned);
    let at = text("eventTime").and_then(|time| time.parse().ok());
    let at = at.ok_or_else(|| format!("an event without eventTime: {}", value["eventID"]))?;
    let parameters = &value["requestParameters"];
    let context = parameters.is_object().then(|| {
        let pairs = ["encryptionContext", "destinationEncryptionContext"]
            .into_iter()
            .find_map(|member| parameters[member].as_object());
        let pairs = pairs.into_iter().flatten();
        pairs.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect()
    });
    let resources = value["resources"].as_array().into_iter().flatten();
    let mut keys: Vec<_> =
        resources.filter_map(|r| r["ARN"].as_str().or(r["arn"].as_str())).collect();
    let named = ["keyId", "sourceKeyId", "destinationKeyId"];
    keys.extend(named.into_iter().filter_map(|member| parameters[member].as_str()));
    let identity = &value["userIdentity"];
    let principal = ["arn", "principalId", "invokedBy", "type"];
    let principal = principal.into_iter().find_map(|member| identity[member].as_str());
    Ok(Some(CloudEvent {
        at,
        operation: text("eventName").unwrap_or_default(),
        request_id: text("requestID").unwrap_or_default(),
        keys: keys.into_iter().map(str::to_owned).collect(),
        context,
        error: text("errorCode"),
        principal: role_of(principal.unwrap_or("unknown")),
    }))
}

/// Sessions of one role are one principal, each hour has a session of its own; and so is the role
/// as IAM names it, with a path.
fn role_of(arn: &str) -> String {
    let (mut parts, mut path) = (arn.split(':'), arn.split('/'));
    let (account, kind) = (parts.nth(4), parts.next().unwrap_or_default());
    let partition = arn.split(':').nth(1).unwrap_or_default();
    let name = if kind.starts_with("assumed-role/") {
        path.nth(1)
    } else if kind.starts_with("role/") {
        path.next_back()
    } else {
        None
    };
    match (account, name) {
        (Some(account), Some(name)) => {
            format!("arn:{partition}:sts::{account}:assumed-role/{name}")
        }
        _ => arn.to_owned(),
    }
}

/// One request to KMS as the trail has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalCall {
    /// The record that has it.
    pub seq: u64,
    /// When it was answered or given up.
    pub at: Timestamp,
    /// What was asked for.
    pub operation: String,
    /// The id of the answer.
    pub request_id: Option<String>,
    /// The key.
    pub key: String,
    /// The encryption context.
    pub context: BTreeMap<String, String>,
    /// The exception.
    pub error: Option<String>,
}

/// What does not agree, in something that both have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The record.
    pub seq: u64,
    /// The request.
    pub request_id: String,
    /// What.
    pub what: String,
}

/// A request that one side alone has, and for which there is an explanation that nobody checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excused {
    /// When.
    pub at: Timestamp,
    /// What was asked for.
    pub operation: String,
    /// The id of the answer.
    pub request_id: Option<String>,
    /// The record that has it, if the trail has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
}

/// What is known of the daemon that writes the trail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writing {
    /// It runs.
    GoesOn,
    /// Nobody can tell, as of a copy.
    Unknown,
}

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// Requests that the trail has.
    pub calls: usize,
    /// Events of KMS that the export has.
    pub events: usize,
    /// Events that both have, by request id.
    pub matched: usize,
    /// Calls without an answer that CloudTrail has, by operation, key, context and time.
    pub matched_by_context: usize,
    /// Who byokd is in CloudTrail.
    pub principals: BTreeSet<String>,
    /// What both have, and does not agree.
    pub differences: Vec<Difference>,
    /// What CloudTrail has of byokd, and the trail lacks.
    pub missing_in_trail: Vec<CloudEvent>,
    /// What the trail has, and CloudTrail lacks.
    pub missing_in_cloudtrail: Vec<LocalCall>,
    /// Events of one side alone that are explained, by the explanation.
    pub explained: BTreeMap<String, Vec<Excused>>,
    /// Uses of the keys by others, by principal.
    pub others: BTreeMap<String, usize>,
    /// What was done to the keys: administration.
    pub administration: Vec<CloudEvent>,
}

impl Comparison {
    /// Whether anything was compared: a request that both have.
    #[must_use]
    pub fn compared(&self) -> bool {
        self.matched + self.matched_by_context > 0
    }

    /// Whether all of it agrees or is explained. Where nothing was compared, nothing agrees.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.compared()
            && self.differences.is_empty()
            && self.missing_in_trail.is_empty()
            && self.missing_in_cloudtrail.is_empty()
    }
}

/// The operations that byokd asks for.
const OURS: [&str; 4] = ["Decrypt", "GenerateDataKey", "DescribeKey", "ReEncrypt"];

/// Our word where no answer came.
const NO_ANSWER: &str = "NoAnswer";

/// What is refused before KMS looks at it need not be in CloudTrail.
const UNLOGGED: [&str; 5] = [
    "ThrottlingException",
    NO_ANSWER,
    "UnrecognizedClientException",
    "InvalidSignatureException",
    "ExpiredTokenException",
];

/// CloudTrail has whole seconds, and the clocks of two sides.
const SLACK: SignedDuration = SignedDuration::from_secs(120);

/// Calls are gathered for so long before they are written, so a crash may lose them.
const GATHERED: SignedDuration = SignedDuration::from_secs(600 + 120);

/// Every call that a trail has.
#[must_use]
pub fn calls(records: &[Record]) -> Vec<LocalCall> {
    let of_kms = records.iter().filter(|record| record.event.event == Kind::KmsCalls);
    let calls = of_kms.flat_map(|record| {
        record.event.calls.iter().filter_map(|call| {
            let event = &record.event;
            Some(LocalCall {
                seq: record.seq,
                at: call.at.parse().ok()?,
                operation: word(call.operation),
                request_id: call.request_id.clone(),
                key: event.key.as_ref()?.to_string(),
                context: event.context.as_ref().map(|c| c.pairs().clone()).unwrap_or_default(),
                error: call.error.clone(),
            })
        })
    });
    calls.collect()
}

/// Holds a trail against an export. `principals` are byokd's own, besides those that joined events
/// show.
#[must_use]
pub fn compare(
    records: &[Record],
    export: &[CloudEvent],
    principals: &[String],
    writing: Writing,
) -> Comparison {
    let local = calls(records);
    let mut found = Comparison {
        calls: local.len(),
        principals: principals.iter().map(|arn| role_of(arn)).collect(),
        ..Comparison::default()
    };
    // Exports overlap, and CloudTrail may deliver an event twice.
    let mut seen = HashSet::new();
    let export: Vec<_> = export
        .iter()
        .filter(|event| seen.insert((&event.request_id, &event.operation, event.at, &event.keys)))
        .collect();
    found.events = export.len();
    let by_id: HashMap<&str, &CloudEvent> =
        export.iter().map(|event| (event.request_id.as_str(), *event)).collect();
    let mut joined: HashSet<&str> = HashSet::new();
    let mut alone = Vec::new();
    for call in &local {
        match call.request_id.as_deref().and_then(|id| by_id.get(id)) {
            Some(event) => {
                joined.insert(&event.request_id);
                found.matched += 1;
                found.principals.insert(event.principal.clone());
                found.differences.extend(difference(call, event));
            }
            None => alone.push(call),
        }
    }
    // Answers that never came, by what was asked.
    let ours = found.principals.clone();
    alone.retain(|call| {
        let fits = |event: &CloudEvent| {
            call.request_id.is_none()
                && !joined.contains(event.request_id.as_str())
                && (ours.is_empty() || ours.contains(&event.principal))
                && event.operation == call.operation
                && event.context.as_ref() == Some(&call.context)
                && event.keys.contains(&call.key)
                && event.at.duration_since(call.at).abs() <= SLACK
        };
        let Some(event) = export.iter().find(|event| fits(event)) else { return true };
        joined.insert(&event.request_id);
        found.matched_by_context += 1;
        found.principals.insert(event.principal.clone());
        false
    });
    explain_calls(&alone, &export, &mut found);
    let rest = export.iter().filter(|event| !joined.contains(event.request_id.as_str()));
    explain_events(rest.copied(), records, writing, &mut found);
    found
}

fn difference(call: &LocalCall, event: &CloudEvent) -> Option<Difference> {
    let what = if call.operation != event.operation {
        format!("the operation is {} here and {} there", call.operation, event.operation)
    } else if call.operation != "DescribeKey"
        && event.context.as_ref().is_some_and(|context| *context != call.context)
    {
        "the encryption context is another one".to_owned()
    } else if !event.keys.is_empty() && !event.keys.contains(&call.key) {
        format!("the key is {} here and {} there", call.key, event.keys.join(", "))
    } else {
        match (call.error.as_deref(), event.error.as_deref()) {
            (None, Some(error)) => format!("it succeeded here and failed there with {error}"),
            // It came to KMS, and its answer did not come whole.
            (Some(NO_ANSWER), None) | (None, None) | (Some(_), Some(_)) => return None,
            (Some(error), None) => format!(
                "it failed here with {error} and succeeded there: what KMS answered was changed on \
                 its way, or one of the two"
            ),
        }
    };
    let request_id = event.request_id.clone();
    Some(Difference { seq: call.seq, request_id, what })
}

fn range(times: impl Iterator<Item = Timestamp> + Clone) -> Option<(Timestamp, Timestamp)> {
    Some((times.clone().min()?, times.max()?))
}

impl Excused {
    fn call(call: &LocalCall) -> Self {
        let LocalCall { seq, at, operation, request_id, .. } = call.clone();
        Self { at, operation, request_id, seq: Some(seq) }
    }

    fn event(event: &CloudEvent) -> Self {
        let CloudEvent { at, operation, request_id, .. } = event.clone();
        Self { at, operation, request_id: Some(request_id), seq: None }
    }
}

fn explain(found: &mut Comparison, why: &str, what: Excused) {
    found.explained.entry(why.to_owned()).or_default().push(what);
}

/// What is written yet, or lost; nobody can tell that it is so. The ids of these are told.
const UNWRITTEN: [&str; 3] = [
    "in CloudTrail alone: the daemon crashed before it wrote it",
    "in CloudTrail alone: the daemon has yet to write it, within minutes",
    "in CloudTrail alone: the trail ends before it was written: the daemon has yet to write it, or \
     it crashed before",
];

/// Whether that explanation is one that only looks likely.
#[must_use]
pub fn is_unproven(why: &str) -> bool {
    UNWRITTEN.contains(&why)
}

/// Calls that CloudTrail does not have.
fn explain_calls(alone: &[&LocalCall], export: &[&CloudEvent], found: &mut Comparison) {
    let covered = range(export.iter().map(|event| event.at));
    let keys: HashSet<&str> =
        export.iter().flat_map(|event| &event.keys).map(String::as_str).collect();
    for call in alone {
        let excused = Excused::call(call);
        let inside = covered.is_some_and(|(from, to)| call.at >= from && call.at <= to);
        if !inside {
            explain(found, "in the trail alone: before or after what the export covers", excused);
        } else if call.request_id.is_none() {
            explain(
                found,
                "in the trail alone: no answer of KMS came, so it has no request id",
                excused,
            );
        } else if call.error.as_deref().is_some_and(|error| UNLOGGED.contains(&error)) {
            explain(found, "in the trail alone: refused before KMS looked at it", excused);
        } else if !keys.contains(call.key.as_str()) {
            explain(found, "in the trail alone: a key of which the export has no event", excused);
        } else {
            found.missing_in_cloudtrail.push((*call).clone());
        }
    }
}

/// Events that the trail does not have.
fn explain_events<'a>(
    rest: impl Iterator<Item = &'a CloudEvent>,
    records: &[Record],
    writing: Writing,
    found: &mut Comparison,
) {
    let [crashed, yet_to_write, unwritten_yet] = UNWRITTEN;
    let covered = range(records.iter().filter_map(|record| record.time.parse().ok()));
    let crashes = crashes(records);
    let stopped = records.last().is_some_and(|record| record.event.event == Kind::DaemonStop);
    let unwritten = covered.filter(|_| !stopped).map(|(_, to)| to - GATHERED);
    for event in rest {
        let excused = Excused::event(event);
        let inside = covered.is_some_and(|(from, to)| event.at >= from - SECOND && event.at <= to);
        if !OURS.contains(&event.operation.as_str()) {
            found.administration.push(event.clone());
        } else if !found.principals.contains(&event.principal) {
            *found.others.entry(event.principal.clone()).or_default() += 1;
        } else if !inside {
            explain(found, "in CloudTrail alone: before or after what the trail covers", excused);
        } else if crashes
            .iter()
            .any(|crash| event.at <= *crash && crash.duration_since(event.at) <= GATHERED)
        {
            explain(found, crashed, excused);
        } else if unwritten.is_some_and(|since| event.at >= since) {
            let why = match writing {
                Writing::GoesOn => yet_to_write,
                Writing::Unknown => unwritten_yet,
            };
            explain(found, why, excused);
        } else {
            found.missing_in_trail.push(event.clone());
        }
    }
}

const SECOND: SignedDuration = SignedDuration::from_secs(1);

/// When a daemon started after one that had not stopped in order.
fn crashes(records: &[Record]) -> Vec<Timestamp> {
    let pairs = records.windows(2);
    let crashed = pairs.filter(|pair| {
        pair[0].instance != pair[1].instance && pair[0].event.event != Kind::DaemonStop
    });
    crashed.filter_map(|pair| pair[1].time.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::audit::chain::Hash;
    use crate::audit::record::{CallNote, Event};
    use crate::key::wrapped::EncryptionContext;
    use crate::kms::Operation;

    const KEY: &str =
        "arn:aws:kms:eu-central-1:111122223333:key/5b6e0bd4-7d2c-4f2f-9d39-1d9d8a0f4a11";

    fn record(seq: u64, time: &str, instance: u128, calls: Vec<CallNote>) -> Record {
        let kind = if calls.is_empty() { Kind::DaemonStart } else { Kind::KmsCalls };
        let mut event = Event::new(kind);
        event.key = Some(KEY.parse().unwrap());
        let pairs = [("byokd:purpose".to_owned(), "zeebe".to_owned())];
        event.context = Some(EncryptionContext::from_map(pairs.into()));
        event.calls = calls;
        Record {
            seq,
            time: time.to_owned(),
            instance: Uuid::from_u128(instance),
            event,
            prev: Hash::default(),
            hash: Hash::default(),
        }
    }

    fn compare(records: &[Record], export: &[CloudEvent], principals: &[String]) -> Comparison {
        super::compare(records, export, principals, Writing::Unknown)
    }

    fn call(at: &str, id: Option<&str>) -> CallNote {
        CallNote {
            at: at.to_owned(),
            operation: Operation::Decrypt,
            request_id: id.map(str::to_owned),
            error: id.is_none().then(|| "NoAnswer".to_owned()),
        }
    }

    fn cloud(at: &str, id: &str, who: &str) -> Value {
        serde_json::json!({
            "eventSource": "kms.amazonaws.com", "eventName": "Decrypt", "eventTime": at,
            "requestID": id, "eventID": id,
            "requestParameters": {"encryptionContext": {"byokd:purpose": "zeebe"}},
            "resources": [{"ARN": KEY, "type": "AWS::KMS::Key"}],
            "userIdentity": {"arn": format!("arn:aws:sts::1:assumed-role/{who}/session")},
        })
    }

    fn stop(seq: u64, time: &str) -> Record {
        let mut record = record(seq, time, 1, vec![]);
        record.event.event = Kind::DaemonStop;
        record
    }

    fn trail() -> Vec<Record> {
        vec![
            record(1, "2026-03-01T12:00:00Z", 1, vec![]),
            record(
                2,
                "2026-03-01T12:10:00Z",
                1,
                vec![
                    call("2026-03-01T12:01:00Z", Some("a")),
                    call("2026-03-01T12:02:00Z", None),
                    call("2026-03-01T12:03:00Z", Some("b")),
                ],
            ),
            record(3, "2026-03-01T13:00:00Z", 1, vec![call("2026-03-01T12:59:00Z", Some("z"))]),
        ]
    }

    #[test]
    fn both_shapes_of_an_export_are_read_and_other_services_left_out() {
        let mut other = cloud("2026-03-01T12:01:00Z", "s3", "byokd");
        other["eventSource"] = "s3.amazonaws.com".into();
        let one = cloud("2026-03-01T12:01:00Z", "a", "byokd");
        let file = serde_json::json!({"Records": [one, other]});
        let looked_up =
            serde_json::json!({"Events": [{"EventId": "a", "CloudTrailEvent": one.to_string()}]});
        let read = |value: &Value| read_export(value.to_string().as_bytes()).unwrap();
        assert_eq!(read(&file).len(), 1);
        assert_eq!(read(&file), read(&looked_up));
        let principal = |arn: &str| role_of(arn);
        assert_eq!(read(&file)[0].principal, principal("arn:aws:iam::1:role/nodes/byokd"));
        assert_eq!(principal("arn:aws:iam::1:user/a/b"), "arn:aws:iam::1:user/a/b");
        read_export(b"{\"Other\": 1}").unwrap_err();
        read_export(b"no JSON").unwrap_err();
    }

    #[test]
    fn what_one_side_lacks_is_found_and_what_explains_it_is_said() {
        // Stolen credentials are used for what the trail never heard of.
        let mut other_key = cloud("2026-03-01T12:07:00Z", "elsewhere", "byokd");
        other_key["resources"][0]["ARN"] = KEY.replace("5b6e0bd4", "00000000").into();
        let export = serde_json::json!({"Records": [
            cloud("2026-03-01T11:00:00Z", "early", "byokd"),
            cloud("2026-03-01T12:01:00Z", "a", "byokd"),
            cloud("2026-03-01T12:02:01Z", "lost", "byokd"),
            cloud("2026-03-01T12:05:00Z", "unknown", "byokd"),
            cloud("2026-03-01T12:05:00Z", "unknown", "byokd"),
            cloud("2026-03-01T12:06:00Z", "theirs", "somebody"),
            other_key,
        ]});
        let export = read_export(export.to_string().as_bytes()).unwrap();
        let found = compare(&trail(), &export, &[]);
        assert_eq!((found.matched, found.matched_by_context), (1, 1), "{found:#?}");
        let ids = |events: &[CloudEvent]| {
            events.iter().map(|event| event.request_id.clone()).collect::<Vec<_>>()
        };
        assert_eq!(ids(&found.missing_in_trail), ["unknown", "elsewhere"]);
        assert_eq!(found.missing_in_cloudtrail.len(), 1);
        assert_eq!(found.missing_in_cloudtrail[0].request_id.as_deref(), Some("b"));
        assert_eq!(found.others.values().sum::<usize>(), 1);
        let explained = found.explained.values().flatten();
        let mut ids: Vec<_> = explained.filter_map(|one| one.request_id.as_deref()).collect();
        ids.sort_unstable();
        assert_eq!(ids, ["early", "z"], "{found:#?}");
        assert!(!found.agrees());
    }

    #[test]
    fn what_the_daemon_has_yet_to_write_is_explained_until_it_stopped() {
        let export = serde_json::json!([
            cloud("2026-03-01T12:59:00Z", "z", "byokd"),
            cloud("2026-03-01T12:59:30Z", "recent", "byokd"),
        ]);
        let export = read_export(export.to_string().as_bytes()).unwrap();
        let mut records = trail();
        for (writing, word) in [(Writing::GoesOn, "within minutes"), (Writing::Unknown, "crashed")]
        {
            let found = super::compare(&records, &export, &[], writing);
            assert!(found.agrees(), "{found:#?}");
            let (why, excused) = found.explained.iter().find(|(why, _)| is_unproven(why)).unwrap();
            assert!(why.contains(word), "{why}");
            assert_eq!(excused[0].request_id.as_deref(), Some("recent"));
        }
        records.push(stop(4, "2026-03-01T13:00:01Z"));
        assert_eq!(compare(&records, &export, &[]).missing_in_trail.len(), 1);
    }

    #[test]
    fn a_call_without_an_answer_is_not_joined_with_a_strangers() {
        let export = serde_json::json!([
            cloud("2026-03-01T12:01:00Z", "a", "byokd"),
            cloud("2026-03-01T12:02:01Z", "theirs", "somebody"),
            cloud("2026-03-01T12:03:00Z", "b", "byokd"),
        ]);
        let export = read_export(export.to_string().as_bytes()).unwrap();
        let found = compare(&trail(), &export, &[]);
        assert_eq!((found.matched, found.matched_by_context), (2, 0), "{found:#?}");
        assert_eq!(found.principals.len(), 1, "{found:#?}");
        assert_eq!(found.others.len(), 1, "{found:#?}");
        assert!(found.agrees(), "{found:#?}");
    }

    #[test]
    fn what_failed_has_no_parameters_in_cloudtrail_and_that_is_no_difference() {
        let mut failed = cloud("2026-03-01T12:01:00Z", "a", "byokd");
        failed["requestParameters"] = Value::Null;
        failed["errorCode"] = "AccessDenied".into();
        let mut records = trail();
        records[1].event.calls.truncate(1);
        let export = read_export(failed.to_string().as_bytes()).unwrap();
        let found = compare(&records, &export, &[]);
        assert!(found.differences[0].what.contains("AccessDenied"), "{found:#?}");
        records[1].event.calls[0].error = Some("AccessDeniedException".to_owned());
        let found = compare(&records, &export, &[]);
        assert!(found.agrees(), "{found:#?}");
        assert_eq!(found.matched, 1);
    }

    #[test]
    fn what_failed_here_and_succeeded_there_is_a_difference_unless_no_answer_came() {
        let there = cloud("2026-03-01T12:01:00Z", "a", "byokd");
        let export = read_export(there.to_string().as_bytes()).unwrap();
        let mut records = trail();
        records[1].event.calls.truncate(1);
        records[1].event.calls[0].error = Some("DisabledException".to_owned());
        let found = compare(&records, &export, &[]);
        assert!(found.differences[0].what.contains("DisabledException"), "{found:#?}");
        assert!(!found.agrees());
        records[1].event.calls[0].error = Some(NO_ANSWER.to_owned());
        assert!(compare(&records, &export, &[]).agrees());
    }

    #[test]
    fn nothing_agrees_where_nothing_was_compared() {
        for text in ["", "[]", "{\"Records\":[]}", "{\"Events\":[]}"] {
            let export = read_export(text.as_bytes()).unwrap();
            let found = compare(&trail(), &export, &[]);
            assert!(!found.compared() && !found.agrees(), "{text}: {found:#?}");
            assert_eq!((found.calls, found.events), (4, 0));
        }
        let theirs = cloud("2026-03-01T12:06:00Z", "theirs", "somebody");
        let export = read_export(theirs.to_string().as_bytes()).unwrap();
        assert!(!compare(&trail(), &export, &[]).agrees(), "of somebody else alone");
    }

    #[test]
    fn what_a_crash_lost_is_explained_and_what_differs_is_told() {
        let mut records = trail();
        records.push(record(4, "2026-03-01T13:05:00Z", 2, vec![]));
        records.push(record(5, "2026-03-01T13:06:00Z", 2, vec![]));
        let mut changed = cloud("2026-03-01T12:01:00Z", "a", "byokd");
        changed["requestParameters"]["encryptionContext"]["byokd:purpose"] = "backup".into();
        let crashed = cloud("2026-03-01T13:04:00Z", "gathered", "byokd");
        let export = serde_json::json!([changed, crashed]);
        let export = read_export(export.to_string().as_bytes()).unwrap();
        let found = compare(&records, &export, &[]);
        assert!(found.missing_in_trail.is_empty(), "{found:#?}");
        assert_eq!(found.differences.len(), 1);
        assert!(found.differences[0].what.contains("context"));
    }
}
