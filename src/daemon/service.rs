//! What the service manager is told of the daemon.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::control::VolumeState;
use crate::daemon::Daemon;
use crate::daemon::status::state;
use crate::systemd::Notifier;

/// How often the words that systemd shows are compared with what is so. People read them; a
/// machine that serves has other things to do.
const LOOK: Duration = Duration::from_secs(2);

impl Daemon {
    /// Tells systemd that the service is up, once each volume that should be attached was tried
    /// (`each_was_tried` ends), and from then on how it is. Never ends.
    pub(super) async fn tell(&self, notifier: &Notifier, mut each_was_tried: mpsc::Receiver<()>) {
        if !notifier.is_active() {
            return std::future::pending().await;
        }
        notifier.status(&format!("starting: {}", self.summary()));
        // Nothing is ever sent: it ends.
        let _ended = each_was_tried.recv().await;
        let mut told = self.summary();
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

    /// All volumes, in words for people: `3 volumes serving, 1 fenced`.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut count = Count::default();
        let volumes: Vec<_> = self.volumes().values().cloned().collect();
        for volume in volumes {
            volume.with(|now| match state(&now.service) {
                VolumeState::Serving => count.serving += 1,
                VolumeState::Unverified => count.unverified += 1,
                VolumeState::Fenced => count.fenced += 1,
                VolumeState::Attaching => count.attaching += 1,
                VolumeState::Detaching => count.detaching += 1,
                VolumeState::Detached if now.problem.is_some() => count.failed += 1,
                VolumeState::Detached => count.detached += 1,
            });
        }
        count.words()
    }
}

#[derive(Default)]
struct Count {
    serving: usize,
    unverified: usize,
    fenced: usize,
    attaching: usize,
    detaching: usize,
    failed: usize,
    detached: usize,
}

impl Count {
    fn words(&self) -> String {
        let rest = [
            (self.unverified, "serving though KMS does not answer"),
            (self.fenced, "fenced"),
            (self.attaching, "attaching"),
            (self.detaching, "detaching"),
            (self.failed, "not attached, with a problem"),
            (self.detached, "detached"),
        ];
        let volumes = if self.serving == 1 { "volume" } else { "volumes" };
        let mut words = format!("{} {volumes} serving", self.serving);
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
        let count = Count { serving: 1, failed: 2, detached: 1, ..Count::default() };
        assert_eq!(count.words(), "1 volume serving, 2 not attached, with a problem, 1 detached");
    }
}
