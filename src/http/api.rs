//! The JSON API, version 1: volumes and events, to look at. `openapi.json` describes it, and a test
//! holds real answers against that.
//!
//! Volumes are what the control API says of them, events are records of the audit trail with a
//! sentence for people. Members are added, never renamed or removed, within one version.

use hyper::StatusCode;
use jiff::Timestamp;
use serde::Serialize;

use crate::audit::record::Record;
use crate::control::{Problem, VolumeStatus};
use crate::daemon::Daemon;
use crate::units::rfc3339;

/// The description of this API.
pub(super) const OPENAPI: &str = include_str!("openapi.json");

/// Where it is served.
pub(super) const OPENAPI_PATH: &str = "/api/v1/openapi.json";

/// Events in one answer, if it is not said how many.
const USUALLY: usize = 100;

/// Events in one answer at most.
const MOST: usize = 1000;

/// `/api/v1/volumes`.
#[derive(Serialize)]
struct Volumes {
    now: String,
    version: &'static str,
    summary: String,
    problems: Vec<Problem>,
    volumes: Vec<VolumeStatus>,
}

/// `/api/v1/volumes/NAME`.
#[derive(Serialize)]
struct OneVolume {
    now: String,
    volume: VolumeStatus,
}

/// `/api/v1/events`.
#[derive(Serialize)]
struct Events<'a> {
    now: String,
    events: Vec<Event<'a>>,
}

/// A record, and what it says.
#[derive(Serialize)]
struct Event<'a> {
    words: String,
    record: &'a Record,
}

impl<'a> Event<'a> {
    fn of(record: &'a Record) -> Self {
        Self { words: record.event.to_string(), record }
    }
}

/// Why there is no answer.
#[derive(Serialize)]
struct NoAnswer {
    why: String,
    remedy: &'static str,
}

/// What is asked of events.
#[derive(Debug, PartialEq, Eq)]
struct Which {
    volume: Option<String>,
    since: u64,
    last: usize,
}

impl Which {
    fn of(query: &str) -> Result<Self, String> {
        let mut which = Self { volume: None, since: 0, last: USUALLY };
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let number = || value.parse().map_err(|_| format!("`{name}` is not a number"));
            match name {
                "volume" => which.volume = Some(value.to_owned()),
                "since" => which.since = number()?,
                "last" => {
                    which.last = usize::try_from(number()?).unwrap_or(MOST);
                    if !(1..=MOST).contains(&which.last) {
                        return Err(format!("`last` is not from 1 to {MOST}"));
                    }
                }
                _ => return Err("there is no such parameter".to_owned()),
            }
        }
        Ok(which)
    }
}

/// The status and JSON for a path below `/api/v1/`.
pub(super) async fn answer(daemon: &Daemon, path: &str, query: &str) -> (StatusCode, String) {
    let now = || rfc3339(Timestamp::now());
    if let Some(name) = path.strip_prefix("volumes/") {
        return match daemon.look_at(name).await {
            Some(volume) => json(&OneVolume { now: now(), volume }),
            None => refuse(
                StatusCode::NOT_FOUND,
                "there is no such volume".to_owned(),
                "See /api/v1/volumes for those that there are.",
            ),
        };
    }
    match path {
        "volumes" => {
            let volumes = daemon.look().await;
            json(&Volumes {
                now: now(),
                version: env!("CARGO_PKG_VERSION"),
                summary: daemon.summary(),
                problems: daemon.problems(),
                volumes,
            })
        }
        "events" => match Which::of(query) {
            Ok(which) => {
                let last = daemon.audit().recent(which.volume.as_deref(), which.since, which.last);
                json(&Events { now: now(), events: last.iter().map(|r| Event::of(r)).collect() })
            }
            Err(why) => refuse(
                StatusCode::BAD_REQUEST,
                why,
                "Ask with volume=NAME, since=NUMBER and last=NUMBER, or without.",
            ),
        },
        _ => refuse(
            StatusCode::NOT_FOUND,
            "there is nothing of that name".to_owned(),
            "See /api/v1/openapi.json for what there is.",
        ),
    }
}

fn json(answer: &impl Serialize) -> (StatusCode, String) {
    match serde_json::to_string(answer) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => refuse(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the answer cannot be written: {error}"),
            "Report this as a bug.",
        ),
    }
}

fn refuse(status: StatusCode, why: String, remedy: &'static str) -> (StatusCode, String) {
    (status, serde_json::to_string(&NoAnswer { why, remedy }).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_asked_for_by_volume_number_and_count() {
        let which = |volume: Option<&str>, since, last| {
            Ok(Which { volume: volume.map(str::to_owned), since, last })
        };
        assert_eq!(Which::of(""), which(None, 0, USUALLY));
        assert_eq!(Which::of("volume=a.b&since=7&last=3"), which(Some("a.b"), 7, 3));
        for wrong in ["last=0", "last=1001", "last=x", "since=-1", "what=1", "since"] {
            assert!(Which::of(wrong).is_err(), "{wrong}");
        }
    }
}
