//! Volumes that a customer takes away together: those under one key, asked for by one role.
//!
//! A few are each probed every interval. When they are many, one probe per interval takes them in
//! turn: the key's fate is still heard within an interval, that of one volume alone within as many
//! intervals as there are volumes. What one hears the others are told: that KMS answers, or does
//! not, is true of all; a denial makes each ask for itself at once. Only volumes that are served
//! take turns, while there is one: one that is denied by itself has nothing to tell of the key. It
//! asks for itself when another has heard that the key is allowed.
//!
//! ```text
//!   each    v1 |-----|-----|-----|      turns   v1 |-----------------|----
//!           v2 --|-----|-----|---|              v2 ------|----------------
//!                                               v3 ------------|----------
//! ```
//!
//! A pace bounds how often the whole node asks, whatever happens (see [`super::pace`]).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::keeper::pace::{Errand, Pace};
use crate::key::lease::{Moment, ProbePlan, Verdict};
use crate::key::wrapped::{KeyArn, Role};

/// A key, and as whom it is asked for.
type GroupId = (KeyArn, Option<Role>);

/// All groups of a node.
pub struct Groups {
    plan: ProbePlan,
    pace: Arc<Pace>,
    groups: Mutex<BTreeMap<GroupId, Arc<Group>>>,
    /// How many groups there have been.
    made: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Groups {
    /// A node without volumes.
    #[must_use]
    pub fn new(plan: ProbePlan) -> Self {
        let pace = Arc::new(Pace::new(plan.most_per_second));
        Self { plan, pace, groups: Mutex::default(), made: AtomicU64::new(0) }
    }

    /// A seat for a volume that is probed every `interval` while it is on its own.
    pub fn join(&self, key: &KeyArn, role: Option<&Role>, interval: Duration) -> Seat {
        let mut groups = lock(&self.groups);
        groups.retain(|_, group| Arc::strong_count(group) > 1);
        let group = groups.entry((key.clone(), role.cloned())).or_insert_with(|| {
            Arc::new(Group {
                number: self.made.fetch_add(1, Ordering::Relaxed),
                each_up_to: self.plan.each_up_to,
                epoch: Instant::now(),
                members: Mutex::default(),
            })
        });
        let member = Arc::new(Member {
            interval,
            serves: AtomicBool::new(true),
            heard: Mutex::default(),
            news: Notify::new(),
        });
        let mut members = lock(&group.members);
        self.pace.came(members.is_empty());
        members.push(Arc::clone(&member));
        drop(members);
        Seat { group: Arc::clone(group), pace: Arc::clone(&self.pace), member }
    }

    /// Probes of the whole node in a second, as its volumes are now.
    #[must_use]
    pub fn probes_per_second(&self) -> f64 {
        let rate = |interval: Duration| 1.0 / interval.as_secs_f64().max(0.001);
        let of_group = |group: &Arc<Group>| {
            let members = lock(&group.members);
            match group.turns(&members) {
                None => members.iter().map(|m| rate(m.interval)).sum(),
                // Those who are fenced ask for themselves whenever the key is allowed to another.
                Some(Turns { interval, who }) => {
                    let fenced = members.len().saturating_sub(who.len());
                    rate(interval) * (1.0 + f64::from(u32::try_from(fenced).unwrap_or(u32::MAX)))
                }
            }
        };
        lock(&self.groups).values().map(of_group).sum()
    }
}

struct Group {
    number: u64,
    each_up_to: usize,
    /// When turns are counted from.
    epoch: Instant,
    members: Mutex<Vec<Arc<Member>>>,
}

impl Group {
    /// How its volumes take turns; `None` while they are few enough for each to be probed.
    fn turns<'a>(&self, members: &'a [Arc<Member>]) -> Option<Turns<'a>> {
        if members.len() <= self.each_up_to {
            return None;
        }
        let interval = members.iter().map(|m| m.interval).min()?;
        let serving: Vec<_> = members.iter().filter(|m| m.serves.load(Ordering::Relaxed)).collect();
        let who = if serving.is_empty() { members.iter().collect() } else { serving };
        Some(Turns { interval, who })
    }
}

/// One probe per interval takes these in turn: who is served, or all if nobody is.
struct Turns<'a> {
    interval: Duration,
    who: Vec<&'a Arc<Member>>,
}

struct Member {
    interval: Duration,
    /// Not fenced.
    serves: AtomicBool,
    heard: Mutex<Heard>,
    news: Notify,
}

/// What siblings heard since this was last looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// One of them was denied.
    pub denied: bool,
    /// The last thing heard of KMS and the key, if that was not a denial, and when that was asked;
    /// only in turns.
    pub verdict: Option<(Verdict, Moment)>,
}

/// Within what time the first denied answer comes, as long as KMS answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HearsWithin {
    /// The key is taken away, and so all its volumes.
    pub key: Duration,
    /// This volume alone is.
    pub volume: Duration,
}

/// A volume's place in its group; dropped, it is free.
pub struct Seat {
    group: Arc<Group>,
    pace: Arc<Pace>,
    member: Arc<Member>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut members = lock(&self.group.members);
        members.retain(|m| !Arc::ptr_eq(m, &self.member));
        self.pace.went(members.is_empty());
    }
}

impl Seat {
    /// When this volume's next regular probe is due, if its last one was at `last`. `spread` is
    /// random, within ±1.
    #[must_use]
    pub fn next(&self, last: Instant, spread: f64) -> Instant {
        let members = lock(&self.group.members);
        let Some(Turns { interval, who }) = self.group.turns(&members) else {
            return last + self.member.interval.mul_f64(1.0 + SPREAD * spread);
        };
        let Some(place) = who.iter().position(|m| Arc::ptr_eq(m, &self.member)) else {
            // Told by those who are served when it is worth asking; and by itself once a round.
            return last + times(interval, members.len()).mul_f64(1.0 + SPREAD * spread);
        };
        let since = last.saturating_duration_since(self.group.epoch);
        let at = turn_after(since, interval, place, who.len());
        // Two neighbours' turns are at most 1.1 intervals apart.
        self.group.epoch + at + interval.mul_f64(SPREAD / 2.0 * (1.0 + spread))
    }

    /// Within what time a denial is first heard, as long as the node's volumes want no more than its
    /// pace allows.
    #[must_use]
    pub fn hears_within(&self) -> HearsWithin {
        let members = lock(&self.group.members);
        let (interval, round, behind) = match self.group.turns(&members) {
            None => (self.member.interval, self.member.interval, members.len().saturating_sub(1)),
            // Those who are fenced ask beside whoever's turn it is.
            Some(Turns { interval, who }) => {
                (interval, times(interval, who.len()), members.len().saturating_sub(who.len()))
            }
        };
        let spread = interval.mul_f64(SPREAD);
        HearsWithin {
            key: interval + spread + self.pace.longest_wait(0),
            volume: round + spread + self.pace.longest_wait(behind),
        }
    }

    /// How many volumes the group has, and how many of them take turns: what is due when depends on
    /// it.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        let members = lock(&self.group.members);
        (members.len(), self.group.turns(&members).map_or(0, |turns| turns.who.len()))
    }

    /// Says whether this volume is served.
    pub fn serves(&self, serves: bool) {
        self.member.serves.store(serves, Ordering::Relaxed);
    }

    /// Waits until the node's pace lets this volume ask.
    pub fn turn(&self, errand: Errand) -> impl Future<Output = ()> + use<> {
        self.pace.turn(errand, self.group.number)
    }

    /// Tells the others what a probe of this volume heard that was sent at `asked`. `news` says whether this volume was
    /// served until now: a denial that is known already wakes nobody.
    pub fn tell(&self, verdict: Verdict, asked: Moment, news: bool) {
        let members = lock(&self.group.members).clone();
        let in_turns = self.group.turns(&members).is_some();
        for member in members.iter().filter(|m| !Arc::ptr_eq(m, &self.member)) {
            let mut heard = lock(&member.heard);
            match verdict {
                Verdict::Denied if news => heard.denied = true,
                Verdict::Allowed | Verdict::Unavailable | Verdict::Credentials if in_turns => {
                    heard.verdict = Some((verdict, asked));
                }
                Verdict::Allowed
                | Verdict::Unavailable
                | Verdict::Credentials
                | Verdict::Denied
                | Verdict::Mismatch => continue,
            }
            drop(heard);
            member.news.notify_one();
        }
    }

    /// Waits for what siblings hear.
    pub async fn news(&self) -> Heard {
        loop {
            let heard = std::mem::take(&mut *lock(&self.member.heard));
            if heard != Heard::default() {
                return heard;
            }
            self.member.news.notified().await;
        }
    }
}

fn times(interval: Duration, count: usize) -> Duration {
    interval.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Probes are spread by this share of the interval, both ways.
const SPREAD: f64 = 0.1;

/// The first turn of `place` among `members` that begins at least half an interval after `since`
/// (so that a turn which was spread backwards is not taken twice). Turns are an interval apart.
fn turn_after(since: Duration, interval: Duration, place: usize, members: usize) -> Duration {
    let interval = interval.max(Duration::from_millis(1));
    let (place, members) = (place as u128, members.max(1) as u128);
    let earliest = (since + interval / 2).as_nanos().div_ceil(interval.as_nanos());
    let round = earliest.saturating_sub(place).div_ceil(members);
    let turn = u32::try_from(round * members + place).unwrap_or(u32::MAX);
    interval.saturating_mul(turn)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const ASKED: Moment = Moment(INTERVAL);

    fn key() -> KeyArn {
        "arn:aws:kms:eu-central-1:111122223333:key/5b6e0bd4-7d2c-4f2f-9d39-1d9d8a0f4a11"
            .parse()
            .unwrap()
    }

    fn seats(count: usize) -> Vec<Seat> {
        let groups = Groups::new(ProbePlan::default());
        (0..count).map(|_| groups.join(&key(), None, INTERVAL)).collect()
    }

    /// When each of `count` volumes is probed during `span`, in order.
    fn schedule(count: usize, span: Duration) -> Vec<(Duration, usize)> {
        schedule_of(&seats(count), span)
    }

    fn schedule_of(seats: &[Seat], span: Duration) -> Vec<(Duration, usize)> {
        let epoch = seats[0].group.epoch;
        let mut probes = Vec::new();
        for (volume, seat) in seats.iter().enumerate() {
            let mut at = epoch;
            let mut spread = 0.9;
            loop {
                at = seat.next(at, spread);
                spread = -spread;
                if at.duration_since(epoch) > span {
                    break;
                }
                probes.push((at.duration_since(epoch), volume));
            }
        }
        probes.sort();
        probes
    }

    #[test]
    fn few_volumes_are_each_probed_every_interval() {
        let probes = schedule(16, INTERVAL * 20);
        for volume in 0..16 {
            let count = probes.iter().filter(|(_, v)| *v == volume).count();
            assert!((18..=22).contains(&count), "{count} probes in 20 intervals");
        }
    }

    #[test]
    fn many_volumes_take_turns_so_that_the_key_is_asked_every_interval() {
        for count in [17, 100, 1000] {
            let probes = schedule(count, INTERVAL * 2500);
            for pair in probes.windows(2) {
                let gap = pair[1].0 - pair[0].0;
                assert!(gap <= INTERVAL.mul_f64(1.1), "{gap:?} without a probe");
                assert!(gap >= INTERVAL.mul_f64(0.9), "{gap:?} between two probes");
                assert_ne!(pair[0].1, pair[1].1);
            }
            for volume in 0..count {
                let own: Vec<_> = probes.iter().filter(|(_, v)| *v == volume).collect();
                assert!(own.len() >= 2, "volume {volume} has its turns");
                for pair in own.windows(2) {
                    let most = INTERVAL.mul_f64(count as f64 + 0.1);
                    assert!(pair[1].0 - pair[0].0 <= most, "at most a round between two");
                }
            }
        }
    }

    #[test]
    fn whoever_is_fenced_takes_no_turn_from_those_who_are_served() {
        let seats = seats(100);
        let fenced = |volume: usize| volume % 10 < 6;
        let shape = seats[0].shape();
        for (volume, seat) in seats.iter().enumerate() {
            seat.serves(!fenced(volume));
        }
        assert_ne!(seats[0].shape(), shape, "everybody plans anew");
        let probes = schedule_of(&seats, INTERVAL * 500);
        let served: Vec<_> = probes.iter().filter(|(_, volume)| !fenced(*volume)).collect();
        for pair in served.windows(2) {
            assert!(pair[1].0 - pair[0].0 <= INTERVAL.mul_f64(1.1), "the key is asked for in time");
        }
        for volume in (0..100).filter(|volume| fenced(*volume)) {
            assert!(probes.iter().any(|(_, v)| *v == volume), "{volume} is not forgotten");
        }
        seats.iter().for_each(|seat| seat.serves(false));
        assert_eq!(seats[0].shape(), (100, 100), "a key that is gone is asked for as ever");
    }

    #[tokio::test]
    async fn a_denial_that_is_news_wakes_every_sibling_and_a_known_one_nobody() {
        let seats = seats(3);
        seats[0].tell(Verdict::Denied, ASKED, true);
        for seat in &seats[1..] {
            assert_eq!(seat.news().await, Heard { denied: true, verdict: None });
        }
        seats[0].tell(Verdict::Denied, ASKED, false);
        seats[0].tell(Verdict::Allowed, ASKED, true);
        assert!(seats.iter().all(|seat| *lock(&seat.member.heard) == Heard::default()));
    }

    #[tokio::test]
    async fn volumes_that_take_turns_share_what_is_true_of_the_key() {
        let seats = seats(17);
        seats[3].tell(Verdict::Unavailable, ASKED, false);
        seats[3].tell(Verdict::Allowed, ASKED, false);
        let heard = seats[16].news().await;
        assert_eq!(heard, Heard { denied: false, verdict: Some((Verdict::Allowed, ASKED)) });
    }

    #[test]
    fn the_cost_and_the_bound_of_each_mode_are_told() {
        let groups = Groups::new(ProbePlan::default());
        let bound = INTERVAL.mul_f64(1.1);
        let one = groups.join(&key(), None, INTERVAL);
        assert_eq!(one.hears_within(), HearsWithin { key: bound, volume: bound });
        let mut few: Vec<_> = (1..16).map(|_| groups.join(&key(), None, INTERVAL)).collect();
        few.push(one);
        // At 200 a second, two turns for the key, or for each of its volumes, and one that is going.
        let pace = |turns: u32| Duration::from_millis(5) * (turns + 1);
        let told = HearsWithin { key: bound + pace(2), volume: bound + pace(32) };
        assert_eq!(few[3].hears_within(), told);
        assert!((groups.probes_per_second() - 1.6).abs() < 1e-9);
        let one_more = groups.join(&key(), None, INTERVAL);
        let round = INTERVAL.mul_f64(17.1);
        let told = HearsWithin { key: bound + pace(2), volume: round + pace(2) };
        assert_eq!(one_more.hears_within(), told);
        assert!((groups.probes_per_second() - 0.1).abs() < 1e-9, "they take turns");
        few[0].serves(false);
        assert!((groups.probes_per_second() - 0.2).abs() < 1e-9, "and who is fenced asks as well");
    }

    #[test]
    fn a_key_by_two_roles_is_two_groups() {
        let groups = Groups::new(ProbePlan::default());
        let role = Role { arn: "arn:aws:iam::111122223333:role/r".to_owned(), external_id: None };
        let own = groups.join(&key(), None, INTERVAL);
        let by_role = groups.join(&key(), Some(&role), INTERVAL);
        own.tell(Verdict::Denied, ASKED, true);
        assert_eq!(*lock(&by_role.member.heard), Heard::default());
        drop((own, by_role));
        let _other = groups.join(&key(), None, INTERVAL);
        assert_eq!(lock(&groups.groups).len(), 1, "groups without volumes are dropped");
    }

    proptest! {
        #[test]
        fn turns_come_in_order_and_none_is_taken_twice(
            place in 0usize..50, extra in 0usize..50, since in 0u64..1_000_000,
        ) {
            let members = place + extra + 1;
            let since = Duration::from_millis(since);
            let turn = turn_after(since, INTERVAL, place, members);
            prop_assert!(turn >= since + INTERVAL / 2);
            prop_assert!(turn <= since + INTERVAL / 2 + INTERVAL * u32::try_from(members).unwrap());
            let next = turn_after(turn, INTERVAL, place, members);
            prop_assert_eq!(next - turn, INTERVAL * u32::try_from(members).unwrap());
        }
    }
}
