//! The witness: a key of the operator's own, asked when a customer's key denies access. If it is
//! denied as well, with the same credentials in the same region, the fault is ours (a broken role,
//! a service control policy, a VPC endpoint policy) and no verdict on the customer's key.
//!
//! It counts only while it has shown before that it can be used. What it said counts for questions
//! that were sent before it was asked, and for no later ones: those who are denied together ask it
//! once, but a denial and its confirmation each do.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};
use uuid::Uuid;

use super::{AwsKms, by};
use crate::key::lease::{Connection, Verdict, Whose};
use crate::key::wrapped::{Canary, EncryptionContext, KeyArn, Purpose};
use crate::kms::{KeyService, KmsError};

/// How long after it could not be made ready that is tried again, at the next success.
const AGAIN: Duration = Duration::from_secs(60);

/// How long a witness has: it is asked within a probe that has taken its time already.
const TESTIMONY: Duration = Duration::from_millis(750);

/// The error code that says nothing about whose fault it is.
const AMBIGUOUS: &str = "AccessDeniedException";

pub(super) struct Witness {
    arn: KeyArn,
    /// Held while it is asked: volumes that are denied together ask once.
    ready: Mutex<Option<Ready>>,
    making: std::sync::Mutex<Making>,
}

/// How far it is with being made ready.
#[derive(Clone, Copy, Debug)]
enum Making {
    Never,
    Begun(Instant),
    Done,
}

/// A witness that has shown that it can be used.
struct Ready {
    canary: Canary,
    /// When it was asked last, and what it said.
    said: Option<(Instant, Testimony)>,
}

/// What a witness says of a denial; [`Whose::Unknown`] if it does not answer.
type Testimony = Whose;

impl Witness {
    pub(super) fn new(arn: KeyArn) -> Self {
        Self { arn, ready: Mutex::default(), making: std::sync::Mutex::new(Making::Never) }
    }

    /// Whether it is to be made ready now; whoever hears that does it.
    fn is_due(&self) -> bool {
        let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let due = match *making {
            Making::Never => true,
            Making::Begun(at) => at.elapsed() >= AGAIN,
            Making::Done => false,
        };
        if due {
            *making = Making::Begun(Instant::now());
        }
        due
    }

    async fn is_ready(&self, canary: Canary) {
        *self.ready.lock().await = Some(Ready { canary, said: None });
        *self.making.lock().unwrap_or_else(PoisonError::into_inner) = Making::Done;
    }
}

impl AwsKms {
    /// Has the witness made ready, now that credentials and endpoint have just worked. Returns at
    /// once: whoever got a key has it whatever becomes of this.
    pub(super) fn prepare_witness(&self) {
        let Some(witness) = self.witness.as_ref().filter(|witness| witness.is_due()) else {
            return;
        };
        let (kms, witness) = (self.clone(), Arc::clone(witness));
        tokio::spawn(async move { kms.make_ready(&witness).await });
    }

    async fn make_ready(&self, witness: &Witness) {
        let mark = [("byokd-witness".to_owned(), "true".to_owned())];
        let Ok(context) = EncryptionContext::for_volume(Uuid::nil(), Purpose::Backup, mark) else {
            return;
        };
        match self.make_canary(&witness.arn, &context).await {
            Ok(canary) => {
                witness.is_ready(canary).await;
                info!(key = %witness.arn, "the witness key is ready");
            }
            Err(error) => {
                warn!(key = %witness.arn, %error, "the witness key cannot be used: every denial is taken for the customer's");
            }
        }
    }

    /// A denial that the witness shares, of a question that was sent at `asked`, becomes a fault of
    /// our own. The witness has until the `deadline` at most.
    pub(super) async fn ask_witness(
        &self,
        error: KmsError,
        asked: Instant,
        deadline: Instant,
    ) -> KmsError {
        let Some(witness) = &self.witness else { return error };
        if error.verdict != Verdict::Denied || error.key == witness.arn {
            return error;
        }
        if error.code != AMBIGUOUS {
            return KmsError { whose: Whose::Customers, ..error };
        }
        match self.testimony(witness, asked, deadline).await {
            whose @ (Whose::Unknown | Whose::Customers) => KmsError { whose, ..error },
            Whose::Ours => {
                warn!(key = %error.key, witness = %witness.arn, "denied, and so is the witness key: our own role, a service control policy or a VPC endpoint policy refuses");
                KmsError {
                    verdict: Verdict::Credentials,
                    whose: Whose::Ours,
                    remedy: format!(
                        "the witness key {} is denied as well, so the fault is byokd's own: mend its role, \
                         the service control policy or the VPC endpoint policy",
                        witness.arn
                    ),
                    ..error
                }
            }
        }
    }

    async fn testimony(&self, witness: &Witness, asked: Instant, deadline: Instant) -> Testimony {
        // Until it has been made ready it knows nothing, and nobody waits for that.
        let Ok(mut ready) = timeout_at(deadline, witness.ready.lock()).await else {
            return Whose::Unknown;
        };
        let Some(Ready { canary, said }) = ready.as_mut() else { return Whose::Unknown };
        if let Some((at, testimony)) = *said
            && at >= asked
        {
            return testimony;
        }
        let now = Instant::now();
        let full = now + TESTIMONY;
        let limit = deadline.min(full);
        let probe = self.probe_plainly(canary, Connection::Fresh, limit);
        let testimony = match by(limit, probe).await {
            Some(Err(error)) if error.verdict == Verdict::Denied && error.code == AMBIGUOUS => {
                Whose::Ours
            }
            Some(Ok(_)) => Whose::Customers,
            Some(Err(_)) | None => Whose::Unknown,
        };
        // That it was given too little time says nothing to others.
        if testimony != Whose::Unknown || limit == full {
            *said = Some((now, testimony));
        }
        testimony
    }
}
