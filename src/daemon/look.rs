//! What those who look over HTTP are told of volumes. They ask every second, and from anywhere: they
//! get what is in memory, and no disk keeps them waiting.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout_at;

use crate::control::{Problem, VolumeStatus};
use crate::daemon::status::{describe_header, is_in_service, known};
use crate::daemon::{Daemon, Volume};
use crate::luks2::Header;
use crate::volume::inspect;

/// How old what was read of a detached volume's header may be. It changes when its key is rewrapped.
const FRESH: Duration = Duration::from_secs(10);

/// How long the first look waits for headers; a disk that takes longer is told of at a later look.
const PATIENCE: Duration = Duration::from_millis(300);

/// What was read last of the header of a volume that is not attached.
#[derive(Default)]
pub(super) struct Seen(Mutex<SeenNow>);

#[derive(Default)]
struct SeenNow {
    header: Option<Result<(Header, Option<String>), String>>,
    at: Option<Instant>,
    /// One reads already: a disk that hangs holds one thread for each volume at most.
    reading: bool,
}

impl Seen {
    fn now(&self) -> MutexGuard<'_, SeenNow> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the header if that is due.
    fn read(self: &Arc<Self>, backing: PathBuf) -> Option<JoinHandle<()>> {
        let mut now = self.now();
        if now.reading || now.at.is_some_and(|at| at.elapsed() < FRESH) {
            return None;
        }
        now.reading = true;
        drop(now);
        let seen = Arc::clone(self);
        Some(spawn_blocking(move || {
            let header = inspect(&backing).map_err(|error| error.to_string());
            *seen.now() =
                SeenNow { header: Some(header), at: Some(Instant::now()), reading: false };
        }))
    }

    fn describe(&self, status: &mut VolumeStatus) {
        match &self.now().header {
            Some(Ok((header, note))) => {
                describe_header(status, header);
                status.header_note.clone_from(note);
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
        look_at(all).await
    }

    /// The volume of that name, if it is known.
    pub async fn look_at(&self, name: &str) -> Option<VolumeStatus> {
        let volume = self.volumes().get(name).cloned()?;
        look_at(vec![(name.to_owned(), volume)]).await.pop()
    }

    /// What is wrong with the daemon as a whole.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.audit_problem().into_iter().chain(self.settings_problem()).collect()
    }
}

async fn look_at(volumes: Vec<(String, Arc<Volume>)>) -> Vec<VolumeStatus> {
    let mut looks: Vec<_> = volumes
        .into_iter()
        .map(|(name, volume)| (volume.with(|now| known(&name, now)), volume))
        .collect();
    let reads: Vec<_> = looks
        .iter()
        .filter(|(status, _)| !is_in_service(status))
        .filter_map(|(status, volume)| volume.seen.read(status.backing.clone()))
        .collect();
    let until = tokio::time::Instant::now() + PATIENCE;
    for read in reads {
        // What is not there in time is told of later.
        let _read = timeout_at(until, read).await;
    }
    for (status, volume) in looks.iter_mut().filter(|(status, _)| !is_in_service(status)) {
        volume.seen.describe(status);
    }
    looks.into_iter().map(|(status, _)| status).collect()
}
