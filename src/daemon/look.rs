//! What those who look over HTTP are told of volumes. They ask every second, and from anywhere: they
//! get what is in memory, and no disk keeps them waiting.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::control::{Problem, VolumeStatus};
use crate::daemon::status::{describe_header, has_header, known};
use crate::daemon::{Daemon, Volume};
use crate::keeper::threads::apart;
use crate::luks2::Header;
use crate::volume::inspect;

/// How old what was read of a detached volume's header may be. It changes when its key is rewrapped.
const FRESH: Duration = Duration::from_secs(10);

/// How long the first look waits for headers; a disk that takes longer is told of at a later look.
const PATIENCE: Duration = Duration::from_millis(300);

/// What was read last of the header of a volume that is not attached.
pub(super) struct Seen {
    now: Mutex<SeenNow>,
    /// Tells when a header has been read.
    ended: watch::Sender<()>,
}

impl Default for Seen {
    fn default() -> Self {
        Self { now: Mutex::default(), ended: watch::Sender::new(()) }
    }
}

#[derive(Default)]
struct SeenNow {
    header: Option<Result<(Header, Option<String>), String>>,
    at: Option<Instant>,
    /// One reads already: a disk that hangs holds one thread for each volume at most.
    reading: bool,
}

impl Seen {
    fn now(&self) -> MutexGuard<'_, SeenNow> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the header, unless what is known is younger than `fresh`. Whoever wants it as it is now
    /// waits for one who reads it already, and reads it again. Dropped, it reads on for others.
    async fn read(self: Arc<Self>, backing: PathBuf, fresh: Duration) {
        let mut ended = self.ended.subscribe();
        loop {
            {
                let mut now = self.now();
                if !now.reading {
                    if now.at.is_some_and(|at| at.elapsed() < fresh) {
                        return;
                    }
                    now.reading = true;
                    break;
                }
                if !fresh.is_zero() {
                    return;
                }
            }
            // It ends only with what this belongs to.
            let _ended = ended.changed().await;
        }
        let seen = Arc::clone(&self);
        // Not among work that others wait for.
        let read = apart("look", move || {
            let header = inspect(&backing).map_err(|error| error.to_string());
            *seen.now() =
                SeenNow { header: Some(header), at: Some(Instant::now()), reading: false };
            seen.ended.send_replace(());
        });
        if let Err(error) = read.await {
            let mut now = self.now();
            (now.header, now.reading) = (Some(Err(error.to_string())), false);
            drop(now);
            self.ended.send_replace(());
        }
    }

    fn describe(&self, status: &mut VolumeStatus) {
        let now = self.now();
        match &now.header {
            Some(Ok((header, note))) => {
                describe_header(status, header);
                status.header_note.clone_from(note);
                if now.reading {
                    status.header_note =
                        Some("its store does not answer; this was read before".to_owned());
                }
            }
            Some(Err(error)) => status.header_note = Some(error.clone()),
            None => status.header_note = Some("its header is still being read".to_owned()),
        }
    }
}

impl Daemon {
    /// Every volume, by name.
    pub async fn look(&self) -> Vec<VolumeStatus> {
        let all: Vec<_> = self.volumes().clone().into_iter().collect();
        look_at(all, FRESH, PATIENCE).await
    }

    /// The volume of that name, if it is known.
    pub async fn look_at(&self, name: &str) -> Option<VolumeStatus> {
        let volume = self.volumes().get(name).cloned()?;
        look_at(vec![(name.to_owned(), volume)], FRESH, PATIENCE).await.pop()
    }

    /// What is wrong with the daemon as a whole.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.audit_problem().into_iter().chain(self.settings_problem()).collect()
    }
}

/// Each of them, with a header that is younger than `fresh` if it can be had within `patience`.
pub(super) async fn look_at(
    volumes: Vec<(String, Arc<Volume>)>,
    fresh: Duration,
    patience: Duration,
) -> Vec<VolumeStatus> {
    let mut looks: Vec<_> = volumes
        .into_iter()
        .map(|(name, volume)| (volume.with(|now| known(&name, now)), volume))
        .collect();
    let mut reads = JoinSet::new();
    for (status, volume) in looks.iter().filter(|(status, _)| !has_header(status)) {
        reads.spawn(Arc::clone(&volume.seen).read(status.backing.clone(), fresh));
    }
    // What is not there in time is told of later.
    let _read = timeout(patience, async { while reads.join_next().await.is_some() {} }).await;
    for (status, volume) in looks.iter_mut().filter(|(status, _)| !has_header(status)) {
        volume.seen.describe(status);
    }
    looks.into_iter().map(|(status, _)| status).collect()
}
