//! What is wrong with a volume's key, in the same words wherever it is told: log, command line,
//! console, audit trail.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::key::lease::{LeaseWord, Verdict};
use crate::kms::Evidence;

/// What is wrong with a volume, to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Whose doing it is.
    pub cause: String,
    /// What shows it: the words of KMS, verbatim, with their request id and time.
    pub evidence: String,
    /// What follows for the volume.
    pub effect: String,
    /// What to do about it.
    pub remedy: String,
}

/// What is wrong with the key of a volume whose lease stands so, if anything is; `said` is what KMS
/// said last that was not a success.
#[must_use]
pub fn trouble(volume: &str, lease: LeaseWord, said: Option<&Evidence>) -> Option<Trouble> {
    let trouble = |cause: &str, evidence: String, remedy: &str| Trouble {
        cause: cause.to_owned(),
        evidence,
        effect: effect(lease).to_owned(),
        remedy: remedy.to_owned(),
    };
    let told = said.map_or_else(|| "KMS gave no answer".to_owned(), Evidence::to_string);
    match lease {
        LeaseWord::Held => None,
        // What KMS said before has nothing to do with it.
        LeaseWord::Suspended => Some(trouble(
            "an operator suspended the key",
            "`byokctl key suspend`; the audit trail says who asked for it".to_owned(),
            &format!("whoever may end that: byokctl key resume {volume}"),
        )),
        LeaseWord::Restoring => Some(trouble(
            "KMS allows the key again, after it did not",
            told,
            "nothing: the volume is served again by itself",
        )),
        LeaseWord::Suspect | LeaseWord::Unverified | LeaseWord::Revoked | LeaseWord::Expired => {
            Some(match said {
                Some(said) => trouble(cause(said.verdict), told, &said.remedy),
                // The machine slept for longer than the allowance.
                None => trouble(
                    "KMS was not heard of for longer than the outage allowance",
                    told,
                    "wait for the next answer of KMS; `byokctl key recheck` asks now",
                ),
            })
        }
    }
}

/// Whose doing an answer of KMS is.
#[must_use]
pub fn cause(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allowed => "KMS allows the key",
        Verdict::Denied => "the customer's KMS key may not be used: KMS denied it",
        Verdict::Unavailable => "KMS gave no verdict on the key",
        Verdict::Credentials => "byokd's own credentials for KMS do not work",
        Verdict::Mismatch => "KMS's answer does not fit this volume",
    }
}

/// Why nothing is known of a key whose volume is served all the same, by what was heard last.
#[must_use]
pub fn unverified(heard: Verdict) -> &'static str {
    match heard {
        Verdict::Credentials => "byokd's own credentials fail",
        Verdict::Allowed | Verdict::Denied | Verdict::Unavailable | Verdict::Mismatch => {
            "KMS gives no verdict"
        }
    }
}

fn effect(lease: LeaseWord) -> &'static str {
    match lease {
        LeaseWord::Held => "the volume is served",
        LeaseWord::Suspect => {
            "the volume is served; KMS is asked again within a second, and if it says so again the \
             volume is fenced"
        }
        LeaseWord::Unverified => {
            "the volume is served until the outage allowance is over; then it is fenced"
        }
        LeaseWord::Revoked | LeaseWord::Expired => {
            "the volume is fenced: its key is destroyed in memory, and KMS goes on being asked"
        }
        LeaseWord::Suspended => {
            "the volume is fenced: its key is destroyed in memory, whatever KMS says"
        }
        LeaseWord::Restoring => {
            "the volume is still fenced; it is served again when KMS has allowed its key often \
             enough"
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, code, message, .. } = self;
        match &self.request_id {
            Some(id) => write!(f, "{code}: {message} (request id {id}, {at})"),
            None => write!(f, "{code}: {message} (no request id, {at})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(verdict: Verdict) -> Evidence {
        Evidence {
            at: "2026-03-01T12:00:00.000Z".to_owned(),
            code: "DisabledException".to_owned(),
            message: "it is disabled.".to_owned(),
            request_id: Some("7d5e".to_owned()),
            verdict,
            remedy: "ask the customer".to_owned(),
        }
    }

    #[test]
    fn what_kms_said_is_told_verbatim_with_its_request_id() {
        let told = trouble("v", LeaseWord::Revoked, Some(&said(Verdict::Denied))).unwrap();
        let words =
            "DisabledException: it is disabled. (request id 7d5e, 2026-03-01T12:00:00.000Z)";
        assert_eq!((told.evidence.as_str(), told.remedy.as_str()), (words, "ask the customer"));
        assert!(told.cause.contains("denied") && told.effect.contains("fenced"), "{told:?}");
    }

    #[test]
    fn what_came_without_a_request_id_says_so_in_plain_words() {
        let silent = Evidence { request_id: None, ..said(Verdict::Unavailable) };
        assert!(silent.to_string().ends_with("(no request id, 2026-03-01T12:00:00.000Z)"));
    }

    #[test]
    fn a_suspension_is_not_told_as_kms_doing() {
        let told = trouble("v", LeaseWord::Suspended, Some(&said(Verdict::Denied))).unwrap();
        assert!(!told.evidence.contains("DisabledException"), "{told:?}");
        assert!(told.remedy.ends_with("byokctl key resume v"), "{told:?}");
    }

    #[test]
    fn nothing_is_wrong_with_a_key_that_is_held_whatever_was_before() {
        assert_eq!(trouble("v", LeaseWord::Held, Some(&said(Verdict::Denied))), None);
    }

    #[test]
    fn a_lease_that_ended_without_a_word_of_kms_says_so() {
        let told = trouble("v", LeaseWord::Expired, None).unwrap();
        assert!(told.cause.contains("allowance"), "{told:?}");
    }
}
