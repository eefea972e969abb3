//! A bound on how often a whole node asks KMS, and who goes first when more want to ask than may.
//!
//! Volumes of one key that are denied together all want to ask at once, and again soon after. None
//! of them may delay what another key's volume has to ask. So those who wait stand in two lines, one
//! for denials that are to be confirmed and one for everything else, which take turns; and in each
//! line keys take turns, whoever has been waiting longest for a key going first.
//!
//! `Line` decides and is pure; `Pace` waits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

/// What a volume asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// To confirm a denial, or to have it taken back.
    Confirm,
    /// Anything else: a regular probe, or one because a sibling was denied.
    Other,
}

/// The pace of a node.
pub(super) struct Pace(Arc<Mutex<Waiting>>);

struct Waiting {
    line: Line<oneshot::Sender<()>>,
    /// Keys with volumes, and all volumes.
    keys: usize,
    volumes: usize,
    /// Somebody lets those who wait go.
    attended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pace {
    pub(super) fn new(most_per_second: u32) -> Self {
        let line = Line::new(Duration::from_secs(1) / most_per_second.max(1));
        Self(Arc::new(Mutex::new(Waiting { line, keys: 0, volumes: 0, attended: false })))
    }

    /// There is one more volume, and with it one more key or not.
    pub(super) fn came(&self, new_key: bool) {
        let mut here = lock(&self.0);
        here.volumes += 1;
        here.keys += usize::from(new_key);
    }

    /// A volume has gone, and its key with it or not.
    pub(super) fn went(&self, last_of_key: bool) {
        let mut here = lock(&self.0);
        here.volumes = here.volumes.saturating_sub(1);
        here.keys = here.keys.saturating_sub(usize::from(last_of_key));
    }

    /// How long a volume waits at most that is behind so many of its key, if all of a node want to
    /// ask at once: keys take turns, in two lines, and each volume stands in one of them once.
    pub(super) fn longest_wait(&self, behind: usize) -> Duration {
        let here = lock(&self.0);
        if here.volumes <= 1 {
            return Duration::ZERO;
        }
        let of_keys = here.keys.saturating_mul(behind.saturating_add(1));
        let turns = of_keys.min(here.volumes).saturating_mul(2).saturating_add(1);
        here.line.gap.saturating_mul(u32::try_from(turns).unwrap_or(u32::MAX))
    }

    /// Waits until a volume of the key with this number may ask. Dropped, it gives its place up.
    pub(super) fn turn(&self, errand: Errand, key: u64) -> impl Future<Output = ()> + use<> {
        let waiting = Arc::clone(&self.0);
        async move {
            let Some(turn) = Self::queue(&waiting, errand, key) else { return };
            // Nobody lets go of it unheard but a runtime that ends.
            let _come = turn.await;
        }
    }

    /// A place in line; `None` if there is nobody else and it may ask now.
    fn queue(
        waiting: &Arc<Mutex<Waiting>>,
        errand: Errand,
        key: u64,
    ) -> Option<oneshot::Receiver<()>> {
        let now = Instant::now();
        let (go, turn) = oneshot::channel();
        let mut here = lock(waiting);
        here.line.join(now, errand, key, go);
        if !here.attended {
            if here.line.next(now, |_| true).is_some() {
                return None;
            }
            here.attended = true;
            // It ends by itself, with the last who waits.
            let _attendant = tokio::spawn(Self::attend(Arc::clone(waiting)));
        }
        Some(turn)
    }

    async fn attend(waiting: Arc<Mutex<Waiting>>) {
        loop {
            let due = {
                let mut here = lock(&waiting);
                let due = here.line.due();
                here.attended = due.is_some();
                due
            };
            let Some(due) = due else { return };
            sleep_until(due).await;
            let now = Instant::now();
            let go = lock(&waiting).line.next(now, |go| !go.is_closed());
            if let Some(go) = go {
                // Who waited may be gone since; then a turn is lost, which is no harm.
                let _told = go.send(());
            }
        }
    }
}

/// Those who wait to ask, and when the next of them may.
struct Line<T> {
    gap: Duration,
    /// Not earlier.
    due: Option<Instant>,
    confirming: ByKey<T>,
    other: ByKey<T>,
    /// Who went last.
    last: Errand,
}

/// Keys in the order in which their turns come, each with those who wait for it.
type ByKey<T> = VecDeque<(u64, VecDeque<T>)>;

impl<T> Line<T> {
    fn new(gap: Duration) -> Self {
        Self {
            gap,
            due: None,
            confirming: VecDeque::new(),
            other: VecDeque::new(),
            last: Errand::Other,
        }
    }

    fn join(&mut self, now: Instant, errand: Errand, key: u64, who: T) {
        if self.confirming.is_empty() && self.other.is_empty() {
            // Nothing is saved up while nobody asks.
            self.due = Some(self.due.map_or(now, |due| due.max(now)));
        }
        let line = match errand {
            Errand::Confirm => &mut self.confirming,
            Errand::Other => &mut self.other,
        };
        match line.iter_mut().find(|(of, _)| *of == key) {
            Some((_, waiting)) => waiting.push_back(who),
            None => line.push_back((key, VecDeque::from([who]))),
        }
    }

    /// When the next one may go, if anybody waits.
    fn due(&self) -> Option<Instant> {
        let nobody = self.confirming.is_empty() && self.other.is_empty();
        self.due.filter(|_| !nobody)
    }

    /// Who may go now. Whoever is not there any more is left out.
    fn next(&mut self, now: Instant, is_there: impl Fn(&T) -> bool) -> Option<T> {
        let due = self.due().filter(|due| *due <= now)?;
        let order = match self.last {
            Errand::Confirm => [Errand::Other, Errand::Confirm],
            Errand::Other => [Errand::Confirm, Errand::Other],
        };
        for errand in order {
            let line = match errand {
                Errand::Confirm => &mut self.confirming,
                Errand::Other => &mut self.other,
            };
            while let Some((key, mut waiting)) = line.pop_front() {
                let who = waiting.pop_front();
                if !waiting.is_empty() {
                    line.push_back((key, waiting));
                }
                if let Some(who) = who
                    && is_there(&who)
                {
                    self.last = errand;
                    // Whoever lets them go may be a little late; that is made up for by one turn at
                    // most.
                    self.due = Some((due + self.gap).max(now));
                    return Some(who);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    const RATE: u32 = 200;
    const GAP: Duration = Duration::from_millis(5);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// No window of time in which more ask than the rate allows, but for one that was late.
    fn keeps_the_pace(times: &[Duration]) -> bool {
        let too_fast = |first: usize, len: usize| {
            let last = first + len + 1;
            last < times.len() && times[last] - times[first] < GAP * u32::try_from(len).unwrap()
        };
        (0..times.len()).all(|first| (1..=400).all(|len| !too_fast(first, len)))
    }

    /// A volume that asks.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct Volume {
        key: u64,
        number: u32,
    }

    /// When each volume was answered first and for the second time, and all times of asking, where
    /// each of `asking` asks first when it says, and each is denied 30 ms after it asks and wants to
    /// confirm that 500 ms after it asked.
    fn denied(
        asking: &BTreeSet<(Duration, Volume)>,
    ) -> (BTreeMap<Volume, Vec<Duration>>, Vec<Duration>) {
        let start = Instant::now();
        let mut line = Line::new(Duration::from_secs(1) / RATE);
        let mut todo: BTreeSet<_> =
            asking.iter().map(|(at, who)| (*at, *who, Errand::Other as u8)).collect();
        let (mut answers, mut asked) = (BTreeMap::<_, Vec<_>>::new(), Vec::new());
        loop {
            let due = line.due().map(|due| due.duration_since(start));
            match (todo.first().copied(), due) {
                (Some((at, who, errand)), due) if due.is_none_or(|due| at <= due) => {
                    todo.pop_first();
                    let confirm = errand == Errand::Confirm as u8;
                    let errand = if confirm { Errand::Confirm } else { Errand::Other };
                    line.join(start + at, errand, who.key, who);
                }
                (_, Some(due)) => {
                    let who = line.next(start + due, |_| true).unwrap();
                    asked.push(due);
                    let heard = answers.entry(who).or_default();
                    heard.push(due + ms(30));
                    if heard.len() == 1 {
                        todo.insert((due + ms(500), who, Errand::Confirm as u8));
                    }
                }
                (None, None) => return (answers, asked),
                (Some(_), None) => unreachable!("nobody waits, so the next one joins"),
            }
        }
    }

    #[test]
    fn a_key_that_loses_a_thousand_volumes_at_once_delays_no_other_keys_confirmation() {
        let crowd = (0..1000).map(|number| (Duration::ZERO, Volume { key: 0, number }));
        // Of nine other keys a volume is denied each, while the crowd asks.
        let others = (1..10).map(|key| (ms(10 + 400 * key), Volume { key, number: 0 }));
        let (answers, asked) = denied(&crowd.chain(others.clone()).collect());
        assert!(keeps_the_pace(&asked), "the ceiling of the node");
        for (at, volume) in others {
            let heard = &answers[&volume];
            assert!(heard[0] <= at + ms(100), "{volume:?} asked at {at:?}: {heard:?}");
            assert!(heard[1] <= heard[0] + ms(1500), "{volume:?} asked at {at:?}: {heard:?}");
        }
        for heard in answers.values() {
            assert_eq!(heard.len(), 2, "nobody starves");
            assert!(heard[1] - heard[0] <= ms(1500), "a denial is confirmed soon: {heard:?}");
            assert!(heard[1] <= Duration::from_secs(2 + 2 * 1000 / 200), "and all in time");
        }
    }

    #[test]
    fn a_thousand_keys_denied_at_once_are_each_confirmed_in_time() {
        let all = (0..1000).map(|key| (ms(10 * key), Volume { key, number: 0 }));
        let (answers, asked) = denied(&all.collect());
        assert!(keeps_the_pace(&asked));
        assert!(answers.values().all(|heard| heard[1] - heard[0] <= ms(1500)));
    }

    #[test]
    fn nothing_is_saved_up_for_a_burst() {
        let mut line = Line::new(GAP);
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        line.join(now, Errand::Other, 0, 0);
        assert_eq!(line.next(now, |_| true), Some(0));
        (1..4).for_each(|who| line.join(later, Errand::Other, 0, who));
        assert_eq!(line.next(later, |_| true), Some(1));
        assert_eq!((line.next(later, |_| true), line.due()), (None, Some(later + GAP)));
    }

    #[tokio::test]
    async fn whoever_gives_up_takes_nobodys_turn() {
        let pace = Pace::new(20);
        let began = Instant::now();
        pace.turn(Errand::Other, 0).await;
        for _ in 0..100 {
            let turn = tokio::time::timeout(Duration::from_millis(1), pace.turn(Errand::Other, 0));
            assert!(turn.await.is_err() || began.elapsed() >= ms(50), "it has to wait");
        }
        let alone = Instant::now();
        pace.turn(Errand::Confirm, 1).await;
        assert!(alone.elapsed() < Duration::from_secs(1), "those who are gone are passed over");
    }

    proptest! {
        #[test]
        fn everybody_gets_a_turn_in_order_and_in_a_time_that_other_keys_cannot_lengthen(
            joins in proptest::collection::vec((0u64..2000, 0u64..20, any::<bool>()), 1..300),
        ) {
            let start = Instant::now();
            let mut line = Line::new(GAP);
            let mut joins = joins;
            joins.sort();
            let keys = joins.iter().map(|(_, key, _)| key).collect::<BTreeSet<_>>().len();
            let (mut asked, mut gone) = (Vec::new(), Vec::new());
            let mut before = BTreeMap::<_, usize>::new();
            let mut pending = joins.into_iter().enumerate().peekable();
            loop {
                let due = line.due().map(|due| due.duration_since(start));
                match (pending.peek(), due) {
                    (Some((_, (at, _, _))), due) if due.is_none_or(|due| ms(*at) <= due) => {
                        let (who, (at, key, confirm)) = pending.next().unwrap();
                        let errand = if confirm { Errand::Confirm } else { Errand::Other };
                        let ahead = before.entry((key, confirm)).or_default();
                        line.join(start + ms(at), errand, key, (who, key, confirm, ms(at), *ahead));
                        *ahead += 1;
                    }
                    (_, Some(due)) => {
                        let gone_now = line.next(start + due, |_| true).unwrap();
                        *before.get_mut(&(gone_now.1, gone_now.2)).unwrap() -= 1;
                        asked.push(due);
                        gone.push((gone_now, due));
                    }
                    _ => break,
                }
            }
            prop_assert!(keeps_the_pace(&asked));
            let mut last = BTreeMap::new();
            for ((who, key, confirm, at, ahead), went) in gone {
                prop_assert!(last.insert((key, confirm), who) < Some(who), "first come, first served");
                let most = GAP * u32::try_from(2 * keys * (ahead + 1) + 1).unwrap();
                prop_assert!(went - at <= most, "{:?} for one behind {} of its key", went - at, ahead);
            }
        }
    }
}
