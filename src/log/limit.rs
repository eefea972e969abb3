//! A line that comes again and again is left out and counted, so that trouble of KMS or of a store
//! does not fill the disk and hide what else there is to see.
//!
//! Lines are of one kind if they come from the same place in the code and name the same volume, key,
//! device, code or the like; what is wrong with one volume takes no line from another. The count is
//! told with the first line after the minute.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_subscriber::fmt::format::{DefaultVisitor, Writer};

/// Lines of a kind that are written in a minute: enough to see what it is and how often it comes.
const WRITTEN: u32 = 20;

const WINDOW: Duration = Duration::from_secs(60);

/// Kinds that are told apart; more than a node has volumes and ways to fail. What comes beyond is
/// one kind.
const KINDS: usize = 4096;

/// Fields that say of what a line is.
const NAMES: [&str; 12] = [
    "volume", "key", "device", "code", "verdict", "from", "to", "reason", "name", "path",
    "program", "step",
];

/// What follows for a line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Passage {
    /// Whether it is written.
    pub(super) written: bool,
    /// What is to be told before it.
    pub(super) left_out: Vec<LeftOut>,
}

/// Lines that were not written.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    count: u64,
    like: String,
    /// How grave they are.
    pub(super) level: Level,
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, like, .. } = self;
        write!(f, "left out {count} more lines like: {like}")
    }
}

/// Counts lines.
#[derive(Default)]
pub(super) struct Limit(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    begun: Option<Instant>,
    kinds: HashMap<u64, Kind>,
}

#[derive(Default)]
struct Kind {
    written: u32,
    left_out: Option<LeftOut>,
}

impl Limit {
    /// Whether this event is written, and what is to be told before it.
    pub(super) fn pass(&self, event: &Event<'_>) -> Passage {
        debug_assert!(
            names_are_its_own(event),
            "two fields of one name are one in the journal: {event:?}"
        );
        let level = *event.metadata().level();
        // Whoever asks for these wants to see all.
        if level > Level::INFO {
            return Passage { written: true, left_out: Vec::new() };
        }
        let mut kind = Identity(DefaultHasher::new());
        event.metadata().callsite().hash(&mut kind.0);
        event.record(&mut kind);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.pass(kind.0.finish(), level, Instant::now(), || line(event))
    }
}

impl Counts {
    fn pass(
        &mut self,
        kind: u64,
        level: Level,
        now: Instant,
        line: impl FnOnce() -> String,
    ) -> Passage {
        let mut passage = Passage::default();
        if self.begun.is_none_or(|begun| now.duration_since(begun) >= WINDOW) {
            self.begun = Some(now);
            passage.left_out.extend(self.kinds.drain().filter_map(|(_, kind)| kind.left_out));
        }
        let known = self.kinds.len() < KINDS || self.kinds.contains_key(&kind);
        let kind = self.kinds.entry(if known { kind } else { 0 }).or_default();
        if kind.written < WRITTEN {
            kind.written += 1;
            passage.written = true;
        } else {
            let first = || LeftOut { count: 0, like: line(), level };
            kind.left_out.get_or_insert_with(first).count += 1;
        }
        passage
    }
}

/// Whether no two fields of an event of ours have the same name; its text is one, `message`.
fn names_are_its_own(event: &Event<'_>) -> bool {
    let ours = event.metadata().target().split("::").next() == Some("byokd");
    let mut names: Vec<_> = event.fields().map(|field| field.name()).collect();
    names.sort_unstable();
    !ours || names.windows(2).all(|pair| pair[0] != pair[1])
}

/// A line without its time and level.
pub(super) fn line(event: &Event<'_>) -> String {
    let mut line = String::new();
    event.record(&mut DefaultVisitor::new(Writer::new(&mut line), true));
    line
}

struct Identity(DefaultHasher);

impl Visit for Identity {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if NAMES.contains(&field.name()) {
            field.name().hash(&mut self.0);
            format!("{value:?}").hash(&mut self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(counts: &mut Counts, kind: u64, now: Instant) -> Passage {
        counts.pass(kind, Level::WARN, now, || format!("kind {kind}"))
    }

    #[test]
    fn what_repeats_is_left_out_and_its_count_told_after_the_minute() {
        let (mut counts, begun) = (Counts::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let written = (0..100).filter(|_| pass(&mut counts, 1, at(1)).written).count();
        assert_eq!(written, 20);
        assert!(pass(&mut counts, 2, at(2)).written, "another kind is not in its way");
        let after = pass(&mut counts, 2, at(61));
        assert!(after.written);
        let told: Vec<_> = after.left_out.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["left out 80 more lines like: kind 1"]);
        assert_eq!(after.left_out[0].level, Level::WARN);
        let again = pass(&mut counts, 1, at(62));
        assert_eq!(again, Passage { written: true, left_out: Vec::new() });
    }

    #[test]
    #[should_panic(expected = "two fields of one name")]
    fn a_field_that_takes_the_name_of_the_text_is_found() {
        use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

        struct Limited(Limit);
        impl<S: tracing::Subscriber> Layer<S> for Limited {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.pass(event);
            }
        }
        let all = tracing_subscriber::registry().with(Limited(Limit::default()));
        tracing::subscriber::with_default(all, || {
            tracing::warn!(message = "it is disabled.", "a probe did not succeed");
        });
    }

    #[test]
    fn more_kinds_than_can_be_told_apart_take_no_more_memory() {
        let (mut counts, now) = (Counts::default(), Instant::now());
        let written = (1..10_000).filter(|kind| pass(&mut counts, *kind, now).written).count();
        assert_eq!((counts.kinds.len(), written), (KINDS + 1, KINDS + 20));
    }
}
