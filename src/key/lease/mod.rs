//! The lease on a volume's key: verdicts and time go in, what to do comes out. Pure.
//!
//! ```text
//!              Allowed                    Denied               Denied again
//!   Held <------------------- Suspect <---------- Held/Unverified ---> Revoked
//!    |  no verdict                 \ no verdict: confirm again            |
//!    v                              \                                     | Allowed
//!   Unverified -- allowance over --> Expired --- Allowed ---> Restoring <-+
//!    ^   \-- Allowed --> Held                                   |   \-- Denied --> Revoked
//!    |                                         enough successes |
//!   Held <------------------------------------------------------+
//!   any -- suspend --> Suspended -- resume --> Restoring
//! ```
//!
//! A denial is confirmed by a second one on a new connection before the fence closes; an answer that
//! does not fit the volume by five more in a row, for damaged bytes look like that. A denial that
//! nothing confirms or takes back within an interval and 1.5 s is believed. After a
//! confirmed denial one success does not open it again: KMS is eventually consistent and may
//! answer by turns. Time is [`Moment`], which goes on while the machine sleeps.

mod words;

use std::time::Duration;

pub use crate::key::lease::words::{
    Allowance, Connection, DisconnectedStore, FenceReason, LeasePolicy, LeaseState, LeaseWord,
    Moment, ProbePlan, Step, Verdict, Whose,
};

/// Answers in a row that do not fit a volume before it is fenced for it.
///
/// One byte in three of an answer betrays itself so when it is damaged; as many in a row by chance
/// are rarer than once in a thousand, if every single answer is damaged.
const MISMATCHES: u32 = 6;

/// How long a probe may take, all that belongs to it included: KMS answers in tens of milliseconds,
/// and an external key store gets 250 ms from KMS itself, so this is a failure by any measure and
/// still leaves a probe every few seconds.
pub const PROBE_LIMIT: Duration = Duration::from_millis(2500);

/// How long after a probe interval a denial is believed that nothing has confirmed or taken back.
pub const UNCONFIRMED: Duration = Duration::from_millis(1500);

/// What is promised: a probe interval and this after the first denied answer the key is destroyed.
pub const FENCE_MARGIN: Duration = Duration::from_secs(2);
const _: () = assert!(UNCONFIRMED.as_millis() < FENCE_MARGIN.as_millis());

/// The lease on one volume's key.
#[derive(Clone, Debug)]
pub struct KeyLease {
    policy: LeasePolicy,
    state: LeaseState,
    /// When it got into its state.
    since: Moment,
    last_success: Moment,
    /// When the first denial of the current run came.
    first_denial: Option<Moment>,
    /// When the answer came that is to be observed next, if it was a failure.
    came: Option<Moment>,
    /// It is certain that one of them was the customer's.
    certain: bool,
    /// Answers in a row that did not fit the volume.
    mismatches: u32,
    /// Why the fence is closed, if it is.
    closed: Option<FenceReason>,
}

impl KeyLease {
    /// A lease that begins with a success, that of the unwrapping, which was asked for at `asked`.
    #[must_use]
    pub fn new(policy: LeasePolicy, asked: Moment) -> Self {
        Self {
            policy,
            state: LeaseState::Held,
            since: asked,
            last_success: asked,
            first_denial: None,
            came: None,
            certain: false,
            mismatches: 0,
            closed: None,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> LeaseState {
        self.state
    }

    /// When it got there.
    #[must_use]
    pub fn since(&self) -> Moment {
        self.since
    }

    /// When the question was sent that KMS last answered by allowing the key.
    #[must_use]
    pub fn last_success(&self) -> Moment {
        self.last_success
    }

    /// Within what time of the first denied answer the key is destroyed: the promise.
    #[must_use]
    pub fn fenced_within(&self) -> Duration {
        self.policy.interval.saturating_add(FENCE_MARGIN)
    }

    /// When the first denial of the current run was heard.
    #[must_use]
    pub fn first_denial(&self) -> Option<Moment> {
        self.first_denial
    }

    /// When the allowance is over; `None` when it never is, or does not run.
    #[must_use]
    pub fn allowance_until(&self) -> Option<Moment> {
        match (self.policy.allowance, self.state) {
            (Allowance::For(allowance), LeaseState::Unverified | LeaseState::Suspect) => {
                Some(Moment(self.last_success.0.saturating_add(allowance)))
            }
            _ => None,
        }
    }

    /// Until when requests may be served if nothing more is heard or decided; `None` for ever. The
    /// data's way looks at it itself, so that a machine that wakes serves nothing that is over
    /// before anybody has ticked.
    #[must_use]
    pub fn serves_until(&self) -> Option<Moment> {
        self.end().map(|(end, _)| end)
    }

    /// When service is over if nothing more is heard, and in which state the lease is then.
    fn end(&self) -> Option<(Moment, LeaseState)> {
        if !self.state.serves() {
            return None;
        }
        let after = |moment: Moment, time| Moment(moment.0.saturating_add(time));
        let denied = self.first_denial.map(|denial| {
            let end = after(denial, self.policy.interval.saturating_add(UNCONFIRMED));
            (end, LeaseState::Revoked(FenceReason::Denied))
        });
        let expired = match self.policy.allowance {
            Allowance::Never => None,
            Allowance::For(allowance) if self.state == LeaseState::Unverified => Some(allowance),
            // With an allowance of nothing, the time a probe takes must not count as an outage.
            Allowance::For(allowance) => {
                let next = self.policy.interval.saturating_mul(2).saturating_add(PROBE_LIMIT);
                Some(allowance.max(next))
            }
        };
        let expired = expired.map(|time| (after(self.last_success, time), LeaseState::Expired));
        denied.into_iter().chain(expired).min_by_key(|(end, _)| *end)
    }

    /// How long after the last probe the next one is due, before jitter, and over which connection.
    #[must_use]
    pub fn next_probe(&self) -> (Duration, Connection) {
        if self.state.is_in_doubt() {
            (self.policy.confirm.min(self.policy.interval), Connection::Fresh)
        } else {
            (self.policy.interval, Connection::Pooled)
        }
    }

    /// An answer of KMS was heard at `now`, to a question that was sent at `asked`. A success proves
    /// nothing of the time after that: the answer may have been long on its way.
    pub fn observe(&mut self, now: Moment, verdict: Verdict, asked: Moment) -> Step {
        let came = self.came.take().map_or(now, |came| came.min(now));
        if verdict == Verdict::Allowed {
            self.last_success = self.last_success.max(asked);
        }
        if self.state == LeaseState::Suspended {
            return Step::None;
        }
        if verdict != Verdict::Mismatch {
            self.mismatches = 0;
        }
        if verdict == Verdict::Allowed {
            self.certain = false;
        }
        let step = match verdict {
            Verdict::Allowed => self.allowed(now),
            Verdict::Denied => self.denied(now, came),
            Verdict::Mismatch => self.mismatched(now),
            Verdict::Unavailable | Verdict::Credentials => self.no_verdict(now),
        };
        if step == Step::None { self.tick(now) } else { step }
    }

    /// The answer that is to be observed next says whose doing it is that KMS denies the key. What
    /// is our own takes back a denial of which nobody could tell, for it was the same: else a witness
    /// that was silent once would cost a volume whose customer has denied nothing. It `came` before
    /// the witness was asked, and the time until the fence counts from then.
    pub fn attribute(&mut self, whose: Whose, came: Moment) {
        self.came = Some(came);
        match whose {
            Whose::Unknown => {}
            Whose::Customers => self.certain = true,
            Whose::Ours if self.state == LeaseState::Suspect && !self.certain => {
                self.first_denial = None;
            }
            Whose::Ours => {}
        }
    }

    /// Time has passed. To be called at least as often as a probe is due, and when the machine
    /// wakes, before anything is served.
    pub fn tick(&mut self, now: Moment) -> Step {
        match self.end() {
            Some((end, state)) if now > end => self.fence(now, state),
            _ => Step::None,
        }
    }

    /// Another volume under the same key was probed, instead of this one: volumes of one key take
    /// turns when they are many. That KMS and the key are there, or not, is true of all of them;
    /// a denial may be that volume's alone, and is no answer about this one.
    pub fn observe_sibling(&mut self, now: Moment, verdict: Verdict, asked: Moment) -> Step {
        match (verdict, self.state) {
            (Verdict::Allowed, LeaseState::Held | LeaseState::Unverified) => {
                self.last_success = self.last_success.max(asked);
                self.enter(now, LeaseState::Held);
            }
            (Verdict::Unavailable | Verdict::Credentials, LeaseState::Held) => {
                self.enter(now, LeaseState::Unverified);
            }
            _ => {}
        }
        self.tick(now)
    }

    /// An operator fences the volume by hand.
    pub fn suspend(&mut self, now: Moment) -> Step {
        self.fence(now, LeaseState::Suspended)
    }

    /// An operator takes his fence back; KMS has to allow the key anew.
    pub fn resume(&mut self, now: Moment) {
        if self.state == LeaseState::Suspended {
            self.enter(now, LeaseState::Restoring(0));
        }
    }

    /// The fence is open again, with a key that was asked for at `asked`.
    pub fn restored(&mut self, now: Moment, asked: Moment) {
        self.closed = None;
        self.first_denial = None;
        self.last_success = self.last_success.max(asked);
        self.enter(now, LeaseState::Held);
    }

    /// The volume has another key, which KMS has just allowed: what was heard of the one before is not
    /// of this one.
    pub fn rewrapped(&mut self, now: Moment) {
        if self.state.serves() {
            (self.first_denial, self.certain, self.mismatches) = (None, false, 0);
            if self.state == LeaseState::Suspect {
                self.enter(now, LeaseState::Held);
            }
        }
    }

    /// The key could not be unwrapped or the fence not opened: the run of successes begins anew.
    pub fn restore_failed(&mut self, now: Moment) {
        if !matches!(self.state, LeaseState::Suspended) {
            self.enter(now, LeaseState::Restoring(0));
        }
    }

    fn allowed(&mut self, now: Moment) -> Step {
        let successes = match self.state {
            LeaseState::Held => return Step::None,
            LeaseState::Suspect | LeaseState::Unverified => {
                self.first_denial = None;
                self.enter(now, LeaseState::Held);
                return Step::None;
            }
            LeaseState::Restoring(successes) => successes.saturating_add(1),
            LeaseState::Revoked(_) | LeaseState::Expired => 1,
            LeaseState::Suspended => return Step::None,
        };
        self.enter(now, LeaseState::Restoring(successes));
        if successes >= self.policy.restore_after { Step::Restore } else { Step::None }
    }

    fn denied(&mut self, now: Moment, came: Moment) -> Step {
        match self.state {
            LeaseState::Held | LeaseState::Unverified => {
                self.first_denial = Some(came);
                self.enter(now, LeaseState::Suspect);
                Step::None
            }
            // Suspected for an answer that did not fit.
            LeaseState::Suspect if self.first_denial.is_none() => {
                self.first_denial = Some(came);
                Step::None
            }
            LeaseState::Suspect | LeaseState::Expired | LeaseState::Restoring(_) => {
                self.first_denial.get_or_insert(came);
                self.fence(now, LeaseState::Revoked(FenceReason::Denied))
            }
            LeaseState::Revoked(_) | LeaseState::Suspended => Step::None,
        }
    }

    /// Bytes that were damaged on the way look like this once or twice; an endpoint that is not the
    /// customer's KMS does always.
    fn mismatched(&mut self, now: Moment) -> Step {
        self.mismatches = self.mismatches.saturating_add(1);
        match self.state {
            LeaseState::Held | LeaseState::Unverified => {
                self.enter(now, LeaseState::Suspect);
                Step::None
            }
            LeaseState::Suspect | LeaseState::Expired if self.mismatches < MISMATCHES => Step::None,
            // A run of successes has to be one; whoever waits for the key goes on waiting.
            LeaseState::Restoring(_) if self.mismatches < MISMATCHES => {
                self.enter(now, LeaseState::Restoring(0));
                Step::None
            }
            LeaseState::Suspect | LeaseState::Expired | LeaseState::Restoring(_) => {
                self.fence(now, LeaseState::Revoked(FenceReason::Mismatch))
            }
            LeaseState::Revoked(_) | LeaseState::Suspended => Step::None,
        }
    }

    fn no_verdict(&mut self, now: Moment) -> Step {
        match self.state {
            LeaseState::Held => self.enter(now, LeaseState::Unverified),
            // A run of successes has to be one.
            LeaseState::Restoring(_) => self.enter(now, LeaseState::Restoring(0)),
            // It was not a denial that made it suspect, and the run of what did has ended.
            LeaseState::Suspect if self.first_denial.is_none() => {
                self.enter(now, LeaseState::Unverified);
            }
            LeaseState::Suspect
                if Allowance::For(now.since(self.last_success)) > self.policy.allowance =>
            {
                return self.fence(now, LeaseState::Expired);
            }
            LeaseState::Suspect
            | LeaseState::Unverified
            | LeaseState::Revoked(_)
            | LeaseState::Expired
            | LeaseState::Suspended => {}
        }
        Step::None
    }

    fn fence(&mut self, now: Moment, state: LeaseState) -> Step {
        let reason = match state {
            LeaseState::Revoked(reason) => reason,
            LeaseState::Expired => FenceReason::Expired,
            LeaseState::Suspended => FenceReason::Suspended,
            LeaseState::Held
            | LeaseState::Suspect
            | LeaseState::Unverified
            | LeaseState::Restoring(_) => return Step::None,
        };
        self.enter(now, state);
        match self.closed.replace(reason) {
            // A denial among successes, before they were enough: it never opened.
            Some(before) if before == reason => Step::None,
            // Closed for another reason from now on. No denial is left to count the time from.
            Some(_) => {
                self.first_denial = None;
                Step::Fence(reason)
            }
            None => Step::Fence(reason),
        }
    }

    fn enter(&mut self, now: Moment, state: LeaseState) {
        if self.state.word() != state.word() {
            self.since = now;
        }
        self.state = state;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(1000 + seconds))
    }

    fn lease() -> KeyLease {
        KeyLease::new(LeasePolicy::default(), at(0))
    }

    #[test]
    fn a_second_denial_closes_the_fence_and_one_does_not() {
        let mut lease = lease();
        assert_eq!(lease.observe(at(10), Verdict::Denied, at(10)), Step::None);
        assert_eq!(lease.next_probe().1, Connection::Fresh);
        assert!(lease.next_probe().0 <= Duration::from_secs(1));
        assert_eq!(
            lease.observe(at(11), Verdict::Denied, at(11)),
            Step::Fence(FenceReason::Denied)
        );
        assert_eq!(lease.first_denial(), Some(at(10)));
    }

    #[test]
    fn an_outage_is_not_answered_by_asking_faster() {
        let mut lease = lease();
        let interval = LeasePolicy::default().interval;
        lease.observe(at(10), Verdict::Mismatch, at(10));
        lease.observe(at(11), Verdict::Unavailable, at(11));
        assert_eq!(lease.state(), LeaseState::Unverified);
        assert_eq!(lease.next_probe().0, interval);
        lease.observe(at(20), Verdict::Denied, at(20));
        lease.observe(at(21), Verdict::Denied, at(21));
        lease.observe(at(30), Verdict::Allowed, at(30));
        assert!(lease.next_probe().0 < interval, "a second success would restore it");
        lease.observe(at(31), Verdict::Unavailable, at(31));
        assert_eq!(lease.next_probe().0, interval);
    }

    #[test]
    fn a_denial_that_nothing_confirms_or_takes_back_is_believed_in_time() {
        let mut lease = lease();
        lease.observe(at(10), Verdict::Denied, at(10));
        for second in 11..=21 {
            assert_eq!(lease.observe(at(second), Verdict::Unavailable, at(second)), Step::None);
        }
        assert_eq!(lease.serves_until(), Some(Moment(at(21).0 + Duration::from_millis(500))));
        assert_eq!(lease.tick(at(22)), Step::Fence(FenceReason::Denied));
    }

    #[test]
    fn the_time_until_a_fence_counts_from_the_answer_and_not_from_what_was_asked_further() {
        let mut lease = lease();
        lease.attribute(Whose::Unknown, at(10));
        lease.observe(at(12), Verdict::Denied, at(9));
        assert_eq!(lease.first_denial(), Some(at(10)));
        assert_eq!(lease.serves_until(), Some(Moment(at(21).0 + Duration::from_millis(500))));
        // It is of that answer alone, and never of the time to come.
        let mut other = lease;
        other.restored(at(13), at(13));
        other.attribute(Whose::Unknown, at(14));
        other.observe(at(15), Verdict::Unavailable, at(14));
        other.observe(at(16), Verdict::Denied, at(16));
        assert_eq!(other.first_denial(), Some(at(16)));
    }

    #[test]
    fn a_denial_of_the_key_before_is_none_of_the_key_that_a_volume_has_now() {
        let mut lease = lease();
        lease.observe(at(10), Verdict::Denied, at(10));
        lease.rewrapped(at(11));
        assert_eq!(lease.state(), LeaseState::Held);
        lease.observe(at(12), Verdict::Unavailable, at(12));
        assert_eq!(lease.tick(at(100)), Step::None);
        lease.observe(at(101), Verdict::Denied, at(101));
        assert_eq!(lease.state(), LeaseState::Suspect, "one alone fences nothing");
        // What is fenced comes back when the new key is allowed, not before.
        lease.observe(at(102), Verdict::Denied, at(102));
        lease.rewrapped(at(103));
        assert_eq!(lease.state(), LeaseState::Revoked(FenceReason::Denied));
    }

    #[test]
    fn what_is_our_own_takes_a_denial_back_of_which_nobody_could_tell_and_no_other() {
        let hears = |lease: &mut KeyLease, second, verdict, whose| {
            lease.attribute(whose, at(second));
            lease.observe(at(second), verdict, at(second))
        };
        let mut unsure = lease();
        hears(&mut unsure, 10, Verdict::Denied, Whose::Unknown);
        assert_eq!(unsure.state(), LeaseState::Suspect);
        for second in 11..3600 {
            assert_eq!(hears(&mut unsure, second, Verdict::Credentials, Whose::Ours), Step::None);
            assert_eq!(unsure.state(), LeaseState::Unverified);
        }
        let mut certain = lease();
        hears(&mut certain, 10, Verdict::Denied, Whose::Customers);
        hears(&mut certain, 11, Verdict::Credentials, Whose::Ours);
        assert_eq!(certain.state(), LeaseState::Suspect);
        assert_eq!(certain.tick(at(22)), Step::Fence(FenceReason::Denied));
        hears(&mut certain, 23, Verdict::Allowed, Whose::Unknown);
        hears(&mut certain, 24, Verdict::Allowed, Whose::Unknown);
        certain.restored(at(24), at(24));
        hears(&mut certain, 34, Verdict::Denied, Whose::Unknown);
        hears(&mut certain, 35, Verdict::Credentials, Whose::Ours);
        assert_eq!(certain.state(), LeaseState::Unverified, "that is another run of denials");
    }

    #[test]
    fn a_damaged_answer_is_no_denial_and_does_not_confirm_one() {
        let mut lease = lease();
        assert_eq!(lease.observe(at(10), Verdict::Mismatch, at(10)), Step::None);
        assert_eq!(lease.observe(at(11), Verdict::Mismatch, at(11)), Step::None);
        assert_eq!(lease.observe(at(12), Verdict::Denied, at(12)), Step::None, "the first denial");
        assert_eq!(lease.observe(at(13), Verdict::Mismatch, at(13)), Step::None);
        assert_eq!(
            lease.observe(at(14), Verdict::Denied, at(14)),
            Step::Fence(FenceReason::Denied)
        );
    }

    #[test]
    fn a_denial_that_is_not_confirmed_changes_nothing() {
        let mut lease = lease();
        lease.observe(at(10), Verdict::Denied, at(10));
        assert_eq!(lease.observe(at(11), Verdict::Allowed, at(11)), Step::None);
        assert_eq!(lease.state(), LeaseState::Held);
    }

    #[test]
    fn trouble_that_is_no_denial_fences_only_after_the_allowance() {
        for verdict in [Verdict::Unavailable, Verdict::Credentials] {
            let mut lease = lease();
            for second in (10..=3600).step_by(10) {
                assert_eq!(lease.observe(at(second), verdict, at(second)), Step::None, "{second}");
            }
            assert_eq!(
                lease.observe(at(3601), verdict, at(3601)),
                Step::Fence(FenceReason::Expired)
            );
        }
    }

    #[test]
    fn a_machine_that_slept_longer_than_the_allowance_serves_nothing_before_a_fresh_success() {
        let mut lease = lease();
        lease.observe(at(10), Verdict::Allowed, at(10));
        assert_eq!(lease.tick(at(10 + 3601)), Step::Fence(FenceReason::Expired));
        assert_eq!(lease.observe(at(3612), Verdict::Allowed, at(3612)), Step::None);
        assert_eq!(lease.observe(at(3613), Verdict::Allowed, at(3613)), Step::Restore);
    }

    #[test]
    fn a_success_counts_from_when_its_question_was_sent() {
        let mut lease = lease();
        lease.observe(at(12), Verdict::Allowed, at(10));
        assert_eq!(lease.last_success(), at(10));
        lease.observe_sibling(at(13), Verdict::Allowed, at(9));
        assert_eq!(lease.last_success(), at(10), "an older one takes nothing back");
        lease.observe(at(14), Verdict::Unavailable, at(13));
        assert_eq!(lease.serves_until(), Some(at(10 + 3600)));
        lease.tick(at(10 + 3601));
        lease.observe(at(3613), Verdict::Allowed, at(3612));
        assert_eq!(lease.observe(at(3614), Verdict::Allowed, at(3613)), Step::Restore);
        lease.restored(at(3622), at(3614));
        assert_eq!(lease.last_success(), at(3614), "so does the unwrapping");
        let short = LeasePolicy {
            interval: Duration::from_secs(1),
            allowance: Allowance::For(Duration::ZERO),
            ..LeasePolicy::default()
        };
        let mut lease = KeyLease::new(short, at(0));
        assert_eq!(lease.tick(at(4)), Step::None, "a slow answer is no outage");
        assert_eq!(lease.tick(at(5)), Step::Fence(FenceReason::Expired));
    }

    #[test]
    fn answers_by_turns_never_open_a_closed_fence() {
        let mut lease = lease();
        lease.observe(at(1), Verdict::Denied, at(1));
        lease.observe(at(2), Verdict::Denied, at(2));
        for second in 3..100 {
            let verdict = if second % 2 == 0 { Verdict::Denied } else { Verdict::Allowed };
            assert_ne!(lease.observe(at(second), verdict, at(second)), Step::Restore);
        }
    }

    #[test]
    fn a_closed_fence_is_not_closed_again_nor_the_time_counted_from_an_old_denial() {
        let mut lease = lease();
        lease.observe(at(1), Verdict::Denied, at(1));
        assert_eq!(lease.observe(at(2), Verdict::Denied, at(2)), Step::Fence(FenceReason::Denied));
        assert_eq!(lease.first_denial(), Some(at(1)));
        for second in (3600..3700).step_by(2) {
            assert_eq!(lease.observe(at(second), Verdict::Allowed, at(second)), Step::None);
            assert_eq!(lease.observe(at(second + 1), Verdict::Denied, at(second + 1)), Step::None);
        }
        assert_eq!(lease.suspend(at(4000)), Step::Fence(FenceReason::Suspended));
        assert_eq!(lease.first_denial(), None);
    }

    #[test]
    fn a_damaged_answer_does_not_end_the_wait_for_a_key_that_comes_back() {
        let mut lease = lease();
        lease.observe(at(1), Verdict::Denied, at(1));
        lease.observe(at(2), Verdict::Denied, at(2));
        assert_eq!(lease.observe(at(3), Verdict::Allowed, at(3)), Step::None);
        for second in 4..9 {
            assert_eq!(lease.observe(at(second), Verdict::Mismatch, at(second)), Step::None);
        }
        assert_eq!(
            lease.observe(at(9), Verdict::Allowed, at(9)),
            Step::None,
            "the run begins anew"
        );
        assert_eq!(lease.observe(at(10), Verdict::Allowed, at(10)), Step::Restore);
    }

    #[test]
    fn an_operators_fence_stays_whatever_kms_says() {
        let mut lease = lease();
        assert_eq!(lease.suspend(at(1)), Step::Fence(FenceReason::Suspended));
        for second in 2..10 {
            assert_eq!(lease.observe(at(second), Verdict::Allowed, at(second)), Step::None);
        }
        lease.resume(at(10));
        assert_eq!(lease.observe(at(11), Verdict::Allowed, at(11)), Step::None);
        assert_eq!(lease.observe(at(12), Verdict::Allowed, at(12)), Step::Restore);
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            3 => Just(Verdict::Allowed),
            3 => Just(Verdict::Denied),
            2 => Just(Verdict::Unavailable),
            1 => Just(Verdict::Credentials),
            2 => Just(Verdict::Mismatch),
        ]
    }

    fn policy() -> impl Strategy<Value = LeasePolicy> {
        let allowance = prop_oneof![
            Just(Allowance::Never),
            Just(Allowance::For(Duration::ZERO)),
            (1u64..7200).prop_map(|seconds| Allowance::For(Duration::from_secs(seconds))),
        ];
        (prop_oneof![Just(1u64), Just(10), Just(60)], allowance, 1u32..5).prop_map(
            |(interval, allowance, restore_after)| LeasePolicy {
                interval: Duration::from_secs(interval),
                allowance,
                restore_after,
                ..LeasePolicy::default()
            },
        )
    }

    /// Between two events: none, less than a probe takes, some intervals, or a night's sleep.
    fn pause() -> impl Strategy<Value = Duration> {
        prop_oneof![
            Just(0u64),
            1u64..1500,
            1000u64..30_000,
            20_000u64..4_000_000,
            3_600_000u64..40_000_000
        ]
        .prop_map(Duration::from_millis)
    }

    proptest! {
        #[test]
        fn siblings_open_no_fence_and_confirm_no_denial_and_an_operator_comes_first(
            events in proptest::collection::vec((0u8..6, verdict(), 0u64..300), 1..200),
        ) {
            let mut lease = lease();
            let (mut now, mut suspended, mut denials) = (0, false, 0);
            for (kind, verdict, pause) in events {
                now += pause / 10;
                let served = lease.state().serves();
                match kind {
                    0 => {
                        lease.suspend(at(now));
                        suspended = true;
                    }
                    1 => {
                        lease.resume(at(now));
                        suspended = false;
                    }
                    2 | 3 => {
                        let step = lease.observe_sibling(at(now), verdict, at(now));
                        prop_assert!(served || !lease.state().serves(), "a sibling opens nothing");
                        if step != Step::None {
                            let time_alone = lease.clone().tick(at(now)) == Step::None;
                            prop_assert!(time_alone, "only time fences after a sibling's answer");
                        }
                    }
                    _ => {
                        match verdict {
                            Verdict::Denied => denials += 1,
                            Verdict::Allowed => denials = 0,
                            Verdict::Unavailable | Verdict::Credentials | Verdict::Mismatch => {}
                        }
                        if lease.observe(at(now), verdict, at(now)) == Step::Restore {
                            prop_assert!(!suspended);
                            lease.restored(at(now), at(now));
                        }
                        prop_assert!(denials < 2 || !lease.state().serves());
                    }
                }
                prop_assert_eq!(suspended, lease.state() == LeaseState::Suspended);
            }
        }

        #[test]
        fn whatever_happens_the_promises_hold(
            policy in policy(),
            events in proptest::collection::vec(
                (verdict(), pause(), any::<bool>(), 0u64..2500, 0u64..2500),
                1..200,
            ),
        ) {
            let mut lease = KeyLease::new(policy, at(0));
            let believed_after = policy.interval + UNCONFIRMED;
            let (allowed_for, at_least) = match policy.allowance {
                Allowance::Never => (Duration::MAX, Duration::MAX),
                Allowance::For(time) => (time, time.max(policy.interval * 2 + PROBE_LIMIT)),
            };
            // What happened, in the words of the promises.
            let (mut now, mut last_success) = (at(0), at(0));
            let (mut fenced, mut run, mut denials, mut mismatches) = (false, 0, 0, 0);
            let mut denied_at: Option<Moment> = None;
            for (verdict, pause, ticks, took, judged) in events {
                // One probe at a time, so its question was sent after the answer before it.
                let asked = Moment(now.0 + pause.saturating_sub(Duration::from_millis(took)));
                now.0 += pause;
                // A denied answer came some time before all was known of it, and after its question.
                let came = Moment(now.0.saturating_sub(Duration::from_millis(judged)).max(asked.0));
                let unconfirmed = denied_at.is_some_and(|at| now.since(at) > believed_after);
                if ticks {
                    match lease.tick(now) {
                        Step::Fence(FenceReason::Denied) => {
                            prop_assert!(unconfirmed);
                            (fenced, run) = (true, 0);
                        }
                        Step::Fence(reason) => {
                            prop_assert_eq!(reason, FenceReason::Expired);
                            prop_assert!(now.since(last_success) > allowed_for);
                            (fenced, run) = (true, 0);
                        }
                        step @ (Step::None | Step::Restore) => {
                            prop_assert_eq!(step, Step::None, "time alone restores nothing");
                        }
                    }
                    prop_assert!(fenced || !unconfirmed, "a denial is not put off for ever");
                    prop_assert!(
                        fenced || now.since(last_success) <= at_least,
                        "a machine that slept serves nothing that is over"
                    );
                }
                mismatches = if verdict == Verdict::Mismatch { mismatches + 1 } else { 0 };
                match verdict {
                    Verdict::Allowed => {
                        (run, last_success, denials, denied_at) = (run + 1, asked, 0, None);
                    }
                    Verdict::Denied => {
                        (run, denials) = (0, denials + 1);
                        denied_at.get_or_insert(came);
                        lease.attribute(Whose::Unknown, came);
                    }
                    Verdict::Unavailable | Verdict::Credentials | Verdict::Mismatch => run = 0,
                }
                let unconfirmed = denied_at.is_some_and(|at| now.since(at) > believed_after);
                match lease.observe(now, verdict, asked) {
                    Step::Fence(FenceReason::Denied) => {
                        prop_assert!(verdict == Verdict::Denied || unconfirmed);
                        prop_assert!(denials >= 2 || fenced || unconfirmed, "one denial alone never fences");
                        fenced = true;
                    }
                    Step::Fence(FenceReason::Mismatch) => {
                        prop_assert!(mismatches >= 6 || fenced, "one damaged answer never fences");
                        fenced = true;
                    }
                    Step::Fence(reason) => {
                        prop_assert_eq!(reason, FenceReason::Expired);
                        prop_assert!(now.since(last_success) > allowed_for);
                        fenced = true;
                    }
                    Step::Restore => {
                        prop_assert!(
                            fenced && run >= policy.restore_after,
                            "only a run of successes opens a fence"
                        );
                        lease.restored(now, asked);
                        (fenced, run, denied_at) = (false, 0, None);
                    }
                    Step::None => {}
                }
                prop_assert_eq!(lease.state().serves(), !fenced);
                prop_assert!(fenced || denials < 2, "a confirmed denial always fences");
                prop_assert!(fenced || mismatches < 6, "a wrong endpoint always fences");
                prop_assert!(
                    fenced || verdict == Verdict::Allowed || now.since(last_success) <= at_least,
                    "the allowance is kept"
                );
                let no_verdict = matches!(verdict, Verdict::Unavailable | Verdict::Credentials);
                if !fenced && no_verdict && denied_at.is_none() {
                    prop_assert!(now.since(last_success) <= allowed_for, "and to the letter in an outage");
                }
                if policy.allowance == Allowance::Never {
                    prop_assert!(
                        denials > 0 || mismatches > 0 || lease.state() != LeaseState::Expired,
                        "an outage never fences where it must not"
                    );
                }
                if let Some(end) = lease.serves_until() {
                    prop_assert!(end >= now, "what is served is not over");
                }
            }
        }
    }
}
