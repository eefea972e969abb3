//! Faults on demand: what goes wrong between a customer's KMS and us, or within it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keys::KeyState;

/// A fault that requests are to meet, as `POST /_dev/faults` takes it.
///
/// All faults whose scope a request is in apply, in the order they were set: delays add up, and
/// the first one that is more than a delay decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What goes wrong.
    pub fault: FaultKind,
    /// Only these operations (`Decrypt`); all if empty.
    #[serde(default)]
    pub operations: Vec<String>,
    /// Only requests on this key, by id or ARN.
    #[serde(default)]
    pub key: Option<String>,
    /// How many requests pass unharmed first.
    #[serde(default)]
    pub skip: u64,
    /// How many requests meet it; without it, all until it is cleared.
    #[serde(default)]
    pub count: Option<u64>,
    /// Milliseconds: the delay of `latency` (default 1000), the length of `timeout` (default
    /// 60,000), the pause between the bytes of `drip` (default 100).
    #[serde(default)]
    pub ms: Option<u64>,
    /// The HTTP status of `http` (default 500) and `html` (default 403).
    #[serde(default)]
    pub status: Option<u16>,
    /// The code of `http`; without it the body is no error of KMS.
    #[serde(default)]
    pub code: Option<String>,
    /// The message of `http`.
    #[serde(default)]
    pub message: Option<String>,
    /// The key's state for `key-state`.
    #[serde(default)]
    pub state: Option<KeyState>,
    /// How far the clock of `clock-skew` is ahead of ours, in seconds.
    #[serde(default)]
    pub seconds: Option<i64>,
}

impl Fault {
    /// A fault without further conditions: every request meets it.
    #[must_use]
    pub fn new(fault: FaultKind) -> Self {
        Self {
            fault,
            operations: Vec::new(),
            key: None,
            skip: 0,
            count: None,
            ms: None,
            status: None,
            code: None,
            message: None,
            state: None,
            seconds: None,
        }
    }

    /// An error of KMS.
    #[must_use]
    pub fn error(status: u16, code: &str, message: &str) -> Self {
        Self {
            status: Some(status),
            code: Some(code.to_owned()),
            message: Some(message.to_owned()),
            ..Self::new(FaultKind::Http)
        }
    }

    /// The same fault for some operations only.
    #[must_use]
    pub fn on(self, operations: &[&str]) -> Self {
        Self { operations: operations.iter().map(|name| (*name).to_owned()).collect(), ..self }
    }

    /// The same fault, met `count` times.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    /// The same fault with this many milliseconds.
    #[must_use]
    pub fn lasting(self, time: Duration) -> Self {
        Self { ms: Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)), ..self }
    }

    /// Why it cannot be set, if it cannot.
    pub(super) fn complaint(&self) -> Option<&'static str> {
        if self.fault == FaultKind::KeyState && self.state.is_none() {
            return Some("key-state needs `state`");
        }
        if self.fault == FaultKind::ClockSkew && self.seconds.is_none() {
            return Some("clock-skew needs `seconds`");
        }
        if self.status.is_some_and(|status| !(200..=599).contains(&status)) {
            return Some("`status` is not from 200 to 599");
        }
        None
    }

    pub(super) fn ms_or(&self, default: u64) -> Duration {
        Duration::from_millis(self.ms.unwrap_or(default))
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// The answer comes late.
    Latency,
    /// No answer comes; the connection stays open.
    Timeout,
    /// The connection is reset instead of an answer.
    Reset,
    /// The connection is reset after half the answer's body.
    ResetMidBody,
    /// `ThrottlingException`.
    Throttle,
    /// An HTTP error with `status`, `code` and `message`.
    Http,
    /// HTTP 200 with a body that is not JSON.
    Garbage,
    /// An HTML page with `status`, as a proxy sends it.
    Html,
    /// HTTP 200 with an empty body.
    #[serde(rename = "empty-200")]
    Empty200,
    /// The right answer with another plaintext of the same length.
    WrongPlaintext,
    /// The right answer that names another key.
    WrongKeyArn,
    /// `AccessDeniedException` and the right answer by turns, the denial first: a change of policy
    /// that has not reached every endpoint yet.
    Alternate,
    /// The right answer, one byte at a time.
    Drip,
    /// The key is in `state`: `DescribeKey` says so, and its use fails accordingly.
    KeyState,
    /// The service's clock differs: signatures made more than five minutes off are refused.
    ClockSkew,
}

/// What one request meets.
#[derive(Default)]
pub(super) struct Met {
    pub(super) delay: Duration,
    pub(super) fault: Option<Fault>,
    pub(super) key_state: Option<KeyState>,
    pub(super) clock_ahead: Option<i64>,
}

/// The faults that are set.
#[derive(Default)]
pub(super) struct Faults(Mutex<Vec<Armed>>);

struct Armed {
    fault: Fault,
    seen: u64,
}

impl Faults {
    pub(super) fn add(&self, fault: Fault) {
        self.armed().push(Armed { fault, seen: 0 });
    }

    pub(super) fn clear(&self) {
        self.armed().clear();
    }

    pub(super) fn list(&self) -> Vec<Fault> {
        self.armed().iter().map(|armed| armed.fault.clone()).collect()
    }

    /// What a request for `operation` on the key `key_id` meets.
    pub(super) fn meet(&self, operation: &str, key_id: Option<&str>) -> Met {
        let mut met = Met::default();
        for armed in self.armed().iter_mut() {
            let fault = &armed.fault;
            let concerned = fault.operations.is_empty()
                || fault.operations.iter().any(|name| name == operation);
            let named = fault.key.as_deref().map(key_id_in);
            if !concerned || named.is_some() && named != key_id {
                continue;
            }
            armed.seen = armed.seen.saturating_add(1);
            let Some(turn) = armed.seen.checked_sub(fault.skip).filter(|turn| *turn > 0) else {
                continue;
            };
            if fault.count.is_some_and(|count| turn > count) {
                continue;
            }
            match fault.fault {
                FaultKind::Latency => met.delay = met.delay.saturating_add(fault.ms_or(1000)),
                FaultKind::KeyState => met.key_state = fault.state,
                FaultKind::ClockSkew => met.clock_ahead = fault.seconds,
                FaultKind::Alternate if turn % 2 == 0 => {}
                FaultKind::Timeout
                | FaultKind::Reset
                | FaultKind::ResetMidBody
                | FaultKind::Throttle
                | FaultKind::Http
                | FaultKind::Garbage
                | FaultKind::Html
                | FaultKind::Empty200
                | FaultKind::WrongPlaintext
                | FaultKind::WrongKeyArn
                | FaultKind::Alternate
                | FaultKind::Drip => {
                    if met.fault.is_none() {
                        met.fault = Some(fault.clone());
                    }
                }
            }
        }
        met
    }

    fn armed(&self) -> std::sync::MutexGuard<'_, Vec<Armed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key id in an id or ARN.
pub(super) fn key_id_in(key: &str) -> &str {
    key.rsplit_once(":key/").map_or(key, |(_, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_a_scope_a_beginning_and_an_end() {
        let faults = Faults::default();
        let mut fault = Fault::new(FaultKind::Throttle).on(&["Decrypt"]).times(2);
        fault.skip = 1;
        fault.key = Some("arn:aws:kms:x:0:key/k1".to_owned());
        faults.add(fault);
        let meets = |operation, key| faults.meet(operation, Some(key)).fault.is_some();
        assert!(!meets("Encrypt", "k1") && !meets("Decrypt", "k2"), "out of scope");
        let turns: Vec<bool> = (0..4).map(|_| meets("Decrypt", "k1")).collect();
        assert_eq!(turns, [false, true, true, false]);
        faults.add(Fault::new(FaultKind::Alternate));
        let turns: Vec<bool> = (0..4).map(|_| meets("Decrypt", "k1")).collect();
        assert_eq!(turns, [true, false, true, false]);
        faults.clear();
        assert!(faults.list().is_empty());
    }

    #[test]
    fn a_fault_reads_as_documented() {
        let fault: Fault = serde_json::from_str(
            r#"{"fault":"empty-200","operations":["Decrypt"],"key":null,"count":3}"#,
        )
        .expect("understood");
        assert_eq!((fault.fault, fault.count), (FaultKind::Empty200, Some(3)));
        serde_json::from_str::<Fault>(r#"{"fault":"latency","msec":5}"#)
            .expect_err("an unknown member");
    }
}
