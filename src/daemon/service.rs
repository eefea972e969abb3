//! What the service manager is told of the daemon.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};

use crate::control::VolumeState;
use crate::daemon::status::state;
use crate::daemon::{Daemon, Service};
use crate::key::lease::Verdict;
use crate::kms::trouble::unverified;
use crate::systemd::Notifier;

/// How often the words that systemd shows are compared with what is so. People read them; a
/// machine that serves has other things to do.
const LOOK: Duration = Duration::from_secs(2);

/// How long a start waits for the first tries to attach: longer than a store may take to be opened
/// and KMS to answer. `TimeoutStartSec` of the unit is longer than this and all that comes before.
const FIRST_TRIES: Duration = Duration::from_secs(20);

impl Daemon {
    /// Tells systemd that the service is up, once each volume that should be attached was tried
    /// (`each_was_tried` ends), or had the time for it, and from then on how it is. Never ends.
    pub(super) async fn tell(&self, notifier: &Notifier, mut each_was_tried: mpsc::Receiver<()>) {
        if notifier.is_active() {
            notifier.status(&format!("starting: {}", self.summary()));
        }
        // Nothing is ever sent: it ends.
        if timeout(FIRST_TRIES, each_was_tried.recv()).await.is_err() {
            for (name, volume) in self.volumes().clone() {
                if volume.with(|now| std::mem::take(&mut now.awaited)) {
                    warn!(
                        volume = name,
                        "not waited for any longer: the first try to attach it does not end"
                    );
                }
            }
        }
        let mut told = self.summary();
        info!("ready: {told}");
        if !notifier.is_active() {
            return std::future::pending().await;
        }
        notifier.ready(&told);
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            let summary = self.summary();
            if summary != told {
                notifier.status(&summary);
                told = summary;
            }
        }
    }

    /// All volumes, in words for people: `3 volumes serving, 1 fenced`; of those that are served it
    /// says how many are so though KMS gives no verdict, or byokd's own credentials fail.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut count = Count::default();
        let volumes: Vec<_> = self.volumes().values().cloned().collect();
        for volume in volumes {
            volume.with(|now| match state(&now.service) {
                VolumeState::Serving => count.serving += 1,
                VolumeState::Unverified => {
                    count.serving += 1;
                    *count.unverified.entry(unverified(heard(&now.service))).or_default() += 1;
                }
                VolumeState::Fenced => count.fenced += 1,
                VolumeState::Detaching => count.detaching += 1,
                VolumeState::Detached | VolumeState::Attaching if now.problem.is_some() => {
                    count.failed += 1;
                }
                VolumeState::Attaching => count.attaching += 1,
                VolumeState::Detached => count.detached += 1,
            });
        }
        count.skipped = self.skipped_problems().len();
        count.words()
    }
}

/// What the last answer meant for a volume in service.
fn heard(service: &Service) -> Verdict {
    match service {
        Service::Attached(attached) => attached.keeper.report().verdict,
        Service::Detached | Service::Attaching(_) | Service::Detaching(_) => Verdict::Unavailable,
    }
}

#[derive(Default)]
struct Count {
    serving: usize,
    /// Of those, by what is the matter.
    unverified: BTreeMap<&'static str, usize>,
    fenced: usize,
    attaching: usize,
    detaching: usize,
    failed: usize,
    detached: usize,
    /// Definitions that cannot be read.
    skipped: usize,
}

impl Count {
    fn words(&self) -> String {
        let rest = [
            (self.fenced, "fenced"),
            (self.attaching, "attaching"),
            (self.detaching, "detaching"),
            (self.failed, "not attached, with a problem"),
            (self.detached, "detached"),
            (self.skipped, "not known, as the definition cannot be read"),
        ];
        let volumes = if self.serving == 1 { "volume" } else { "volumes" };
        let mut words = format!("{} {volumes} serving", self.serving);
        let unverified: Vec<_> =
            self.unverified.iter().map(|(why, count)| format!("{count} though {why}")).collect();
        if !unverified.is_empty() {
            words += &format!(" ({})", unverified.join(", "));
        }
        for (count, what) in rest.into_iter().filter(|(count, _)| *count > 0) {
            words += &format!(", {count} {what}");
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_name_what_there_is() {
        assert_eq!(Count::default().words(), "0 volumes serving");
        let count = Count { serving: 3, fenced: 1, ..Count::default() };
        assert_eq!(count.words(), "3 volumes serving, 1 fenced");
        let of = |heard: &[Verdict]| {
            heard.iter().fold(BTreeMap::new(), |mut all, heard| {
                *all.entry(unverified(*heard)).or_default() += 1;
                all
            })
        };
        let silent = of(&[Verdict::Unavailable; 3]);
        let count = Count { serving: 3, unverified: silent, ..Count::default() };
        assert_eq!(count.words(), "3 volumes serving (3 though KMS gives no verdict)");
        let both = of(&[Verdict::Credentials, Verdict::Unavailable]);
        let count = Count { serving: 3, fenced: 1, unverified: both, ..Count::default() };
        let words = "3 volumes serving (1 though KMS gives no verdict, 1 though byokd's own \
                     credentials fail), 1 fenced";
        assert_eq!(count.words(), words);
        let count = Count { serving: 1, failed: 2, detached: 1, ..Count::default() };
        assert_eq!(count.words(), "1 volume serving, 2 not attached, with a problem, 1 detached");
    }
}
