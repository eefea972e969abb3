//! What goes into a lease and comes out of it: moments, verdicts, policies, states, steps.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point in time since boot, counting sleep (`CLOCK_BOOTTIME`): a step of the wall clock does not
/// move it, and a suspended machine does not stop it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Duration);

impl Moment {
    /// How long it is since `earlier`; zero if that is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// What an answer of KMS says about the customer's will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The key may be used: the answer proved it.
    Allowed,
    /// The customer took the key away.
    Denied,
    /// No verdict: KMS could not be asked, or could not answer.
    Unavailable,
    /// No verdict, and the fault is our own: credentials, signature, clock.
    Credentials,
    /// The answer does not fit the volume: header damaged or swapped.
    Mismatch,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 5] =
        [Self::Allowed, Self::Denied, Self::Unavailable, Self::Credentials, Self::Mismatch];

    /// Whether one such answer alone leads to nothing: it has to come again.
    #[must_use]
    pub fn is_made_certain(self) -> bool {
        match self {
            Self::Denied | Self::Mismatch => true,
            Self::Allowed | Self::Unavailable | Self::Credentials => false,
        }
    }

    /// The alert of `monitoring/alerts.yml` that such answers lead to; a success leads to none.
    #[must_use]
    pub fn alert(self) -> Option<&'static str> {
        match self {
            Self::Allowed => None,
            Self::Denied => Some("KeyDenied"),
            Self::Unavailable => Some("KmsUnreachable"),
            Self::Credentials => Some("OwnCredentialsFailing"),
            Self::Mismatch => Some("VolumeFenced"),
        }
    }
}

/// Whose doing a denial is, as far as a witness can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whose {
    /// Nobody can tell.
    #[default]
    Unknown,
    /// The customer's: the witness may be used, or the words of KMS leave no doubt.
    Customers,
    /// Our own: the witness is denied as well.
    Ours,
}

/// What the key state `Unavailable` means: the customer disconnected the custom key store that
/// holds the key. AWS shows the same state when it lost the connection by itself, so this is a
/// setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DisconnectedStore {
    /// A disconnected key store is the customer's decision: denied.
    #[default]
    Denied,
    /// A disconnected key store is an outage: no verdict.
    Unavailable,
}

/// Whether a probe may use a pooled connection or must open its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Any connection, a pooled one if there is one.
    Pooled,
    /// A new one: confirming a denial must not hear the same stale endpoint again.
    Fresh,
}

/// Why a fence is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FenceReason {
    /// KMS denied the use of the key, twice.
    Denied,
    /// KMS gave no verdict for longer than the outage allowance.
    Expired,
    /// KMS's answer does not fit the volume.
    Mismatch,
    /// An operator fenced it by hand.
    Suspended,
    /// The volume is being detached.
    Detached,
    /// The daemon is stopping.
    Stopping,
}

impl FenceReason {
    /// Every reason; its place here is its number in a fence.
    pub const ALL: [Self; 6] = [
        Self::Denied,
        Self::Expired,
        Self::Mismatch,
        Self::Suspended,
        Self::Detached,
        Self::Stopping,
    ];

    /// The alert of `monitoring/alerts.yml` that a volume fenced for it leads to first.
    #[must_use]
    pub fn alert(self) -> Option<&'static str> {
        match self {
            Self::Denied => Some("KeyDenied"),
            Self::Expired | Self::Mismatch | Self::Suspended => Some("VolumeFenced"),
            Self::Detached | Self::Stopping => None,
        }
    }

    /// One sentence for people.
    #[must_use]
    pub fn explain(self) -> &'static str {
        match self {
            Self::Denied => "the customer's KMS key may not be used: KMS denied it",
            Self::Expired => "KMS could not be asked for longer than the outage allowance",
            Self::Mismatch => "KMS's answer does not fit this volume's header",
            Self::Suspended => "an operator suspended the key",
            Self::Detached => "the volume is being detached",
            Self::Stopping => "the daemon is stopping",
        }
    }
}

/// For how long KMS may give no verdict before the volume is fenced all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allowance {
    /// This long after the last success.
    For(Duration),
    /// For ever: an outage never fences.
    Never,
}

/// How a lease is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeasePolicy {
    /// Time between probes.
    pub interval: Duration,
    /// Time from a denial to its confirmation.
    pub confirm: Duration,
    /// The outage allowance.
    pub allowance: Allowance,
    /// Successes in a row that open a closed fence.
    pub restore_after: u32,
}

impl Default for LeasePolicy {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            confirm: Duration::from_millis(500),
            allowance: Allowance::For(Duration::from_secs(3600)),
            restore_after: 2,
        }
    }
}

/// How a node that keeps many leases asks KMS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePlan {
    /// Up to this many volumes on a key and role, each is probed every interval.
    pub each_up_to: usize,
    /// Probes a second of the whole node, at most.
    pub most_per_second: u32,
}

impl Default for ProbePlan {
    fn default() -> Self {
        Self { each_up_to: 16, most_per_second: 200 }
    }
}

/// Where a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// The last answer allowed it.
    Held,
    /// Denied once; being confirmed.
    Suspect,
    /// No verdict since the last success.
    Unverified,
    /// Denied twice: fenced.
    Revoked(FenceReason),
    /// No verdict for longer than the allowance: fenced.
    Expired,
    /// Allowed again, not yet often enough: still fenced.
    Restoring(u32),
    /// Fenced by an operator, whatever KMS says.
    Suspended,
}

/// A lease's state in one word, for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseWord {
    /// [`LeaseState::Held`].
    Held,
    /// [`LeaseState::Suspect`].
    Suspect,
    /// [`LeaseState::Unverified`].
    Unverified,
    /// [`LeaseState::Revoked`].
    Revoked,
    /// [`LeaseState::Expired`].
    Expired,
    /// [`LeaseState::Restoring`].
    Restoring,
    /// [`LeaseState::Suspended`].
    Suspended,
}

impl LeaseWord {
    /// Every word.
    pub const ALL: [Self; 7] = [
        Self::Held,
        Self::Suspect,
        Self::Unverified,
        Self::Revoked,
        Self::Expired,
        Self::Restoring,
        Self::Suspended,
    ];
}

impl LeaseState {
    /// In one word.
    #[must_use]
    pub fn word(self) -> LeaseWord {
        match self {
            Self::Held => LeaseWord::Held,
            Self::Suspect => LeaseWord::Suspect,
            Self::Unverified => LeaseWord::Unverified,
            Self::Revoked(_) => LeaseWord::Revoked,
            Self::Expired => LeaseWord::Expired,
            Self::Restoring(_) => LeaseWord::Restoring,
            Self::Suspended => LeaseWord::Suspended,
        }
    }

    /// Whether the next answer decides: it is asked for soon, on a new connection.
    #[must_use]
    pub fn is_in_doubt(self) -> bool {
        match self {
            Self::Suspect => true,
            // Without a success in the current run there is nothing to hurry for.
            Self::Restoring(successes) => successes > 0,
            Self::Held | Self::Unverified | Self::Revoked(_) | Self::Expired | Self::Suspended => {
                false
            }
        }
    }

    /// Whether the volume may be served.
    #[must_use]
    pub fn serves(self) -> bool {
        matches!(self, Self::Held | Self::Suspect | Self::Unverified)
    }
}

/// What has to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    None,
    /// Close the fence.
    Fence(FenceReason),
    /// Unwrap the key and open the fence; tell [`restored`](crate::key::lease::KeyLease::restored)
    /// or [`restore_failed`](crate::key::lease::KeyLease::restore_failed).
    Restore,
}
