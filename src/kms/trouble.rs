//! What a failure of KMS means, in the same words wherever it is told: log, command line, console.

use serde::{Deserialize, Serialize};

use crate::key::lease::{LeaseWord, Verdict};
use crate::kms::Evidence;

/// A failure of KMS, to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Whose doing it is.
    pub cause: String,
    /// What KMS said, verbatim, with its request id and when.
    pub evidence: String,
    /// What follows for the volume.
    pub effect: String,
    /// What to do about it.
    pub remedy: String,
}

impl Evidence {
    /// In words, for a volume whose lease stands so.
    #[must_use]
    pub fn trouble(&self, lease: LeaseWord) -> Trouble {
        let cause = match self.verdict {
            Verdict::Allowed => "KMS allows the key",
            Verdict::Denied => "the customer's KMS key may not be used: KMS denied it",
            Verdict::Unavailable => "KMS gave no verdict on the key",
            Verdict::Credentials => "byokd's own credentials for KMS do not work",
            Verdict::Mismatch => "KMS's answer does not fit this volume",
        };
        let effect = match lease {
            LeaseWord::Held => "the volume is served",
            LeaseWord::Suspect => {
                "the volume is served; KMS is asked again within a second, and if it says so again \
                 the volume is fenced"
            }
            LeaseWord::Unverified => {
                "the volume is served until the outage allowance is over; then it is fenced"
            }
            LeaseWord::Revoked | LeaseWord::Expired | LeaseWord::Suspended => {
                "the volume is fenced: its key is destroyed in memory, and KMS goes on being asked"
            }
            LeaseWord::Restoring => {
                "the volume is still fenced; it is served again when KMS has allowed its key often \
                 enough"
            }
        };
        let id = self.request_id.as_deref().unwrap_or("none");
        Trouble {
            cause: cause.to_owned(),
            evidence: format!("{}: {} (request id {id}, {})", self.code, self.message, self.at),
            effect: effect.to_owned(),
            remedy: self.remedy.clone(),
        }
    }
}
