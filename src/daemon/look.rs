//! What those who look over HTTP are told of volumes. They ask every second, and from anywhere: they
//! get what is in memory, and no disk keeps them waiting.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};
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

/// Headers that one look reads at a time: a disk gives no more when it is asked by more threads.
pub(super) const AT_A_TIME: usize = 64;

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
    /// Since when one reads: a disk that hangs holds one thread for each volume at most.
    reading: Option<Instant>,
    /// Why the last one could not begin to.
    no_thread: Option<String>,
}

impl Seen {
    fn now(&self) -> MutexGuard<'_, SeenNow> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the header, unless what is known is younger than `fresh`. Whoever wants it as it is now
    /// waits for one who reads it already, and reads it again. Dropped, it reads on for others. As
    /// many at a time as there are `places`.
    async fn read(self: Arc<Self>, backing: PathBuf, fresh: Duration, places: Arc<Semaphore>) {
        let mut ended = self.ended.subscribe();
        let _place = loop {
            // Not while it waits for somebody else's reading.
            if self.now().reading.is_none() {
                // It is never closed.
                let place = Arc::clone(&places).acquire_owned().await;
                let mut now = self.now();
                if now.reading.is_none() {
                    if now.at.is_some_and(|at| at.elapsed() < fresh) {
                        return;
                    }
                    now.reading = Some(Instant::now());
                    break place;
                }
            }
            if !fresh.is_zero() {
                return;
            }
            // It ends only with what this belongs to.
            let _ended = ended.changed().await;
        };
        let seen = Arc::clone(&self);
        // Not among work that others wait for.
        let read = apart("look", move || {
            let header = inspect(&backing).map_err(|error| error.to_string());
            let (header, at) = (Some(header), Some(Instant::now()));
            *seen.now() = SeenNow { header, at, ..SeenNow::default() };
            seen.ended.send_replace(());
        });
        if let Err(error) = read.await {
            let mut now = self.now();
            (now.no_thread, now.reading) = (Some(error.to_string()), None);
            drop(now);
            self.ended.send_replace(());
        }
    }

    /// Tells what is known, and why that is not what was asked for by one who waited for `patience`.
    fn describe(&self, status: &mut VolumeStatus, patience: Duration) {
        let now = self.now();
        // Somebody else's reading may just have begun.
        let hangs = now.reading.is_some_and(|since| since.elapsed() >= patience / 2);
        match &now.header {
            Some(Ok((header, note))) => {
                describe_header(status, header);
                status.header_note = match &now.no_thread {
                    _ if hangs => {
                        Some("its store does not answer; this was read before".to_owned())
                    }
                    Some(error) => Some(format!("this was read before; not now: {error}")),
                    None => note.clone(),
                };
            }
            Some(Err(error)) => status.header_note = Some(error.clone()),
            None => {
                let why = now.no_thread.clone();
                let busy = match now.reading {
                    Some(_) => "its header is still being read",
                    None => "its header is read after those of others",
                };
                status.header_note = Some(why.unwrap_or_else(|| busy.to_owned()));
            }
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
        let mut problems = self.audit_problems();
        problems.extend(self.settings_problem());
        problems.extend(self.skipped_problems());
        problems.extend(self.kms_problem());
        problems
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
    let (mut reads, places) = (JoinSet::new(), Arc::new(Semaphore::new(AT_A_TIME)));
    for (status, volume) in looks.iter().filter(|(status, _)| !has_header(status)) {
        let (backing, places) = (status.backing.clone(), Arc::clone(&places));
        reads.spawn(Arc::clone(&volume.seen).read(backing, fresh, places));
    }
    // What is not there in time is told of later.
    let _read = timeout(patience, async { while reads.join_next().await.is_some() {} }).await;
    for (status, volume) in looks.iter_mut().filter(|(status, _)| !has_header(status)) {
        volume.seen.describe(status, patience);
    }
    looks.into_iter().map(|(status, _)| status).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;
    use crate::config::VolumeConfig;
    use crate::key::VolumeKey;
    use crate::key::secret::SecretMemoryError;
    use crate::key::wrapped::{Canary, EncryptionContext, Purpose, WrappedKey};
    use crate::units::SectorSize;
    use crate::volume::{CreateOptions, NewVolume};

    fn volume(backing: PathBuf) -> Arc<Volume> {
        Arc::new(Volume::new(VolumeConfig::new(backing)))
    }

    #[tokio::test]
    async fn one_look_reads_few_headers_at_a_time_however_many_stores_hang() {
        let dir = tempfile::tempdir().unwrap();
        let named = |n: usize| {
            // Nobody writes to it.
            let store = dir.path().join(n.to_string());
            mkfifo(&store, Mode::from_bits_truncate(0o600)).unwrap();
            (n.to_string(), volume(store))
        };
        let volumes: Vec<_> = (0..2 * AT_A_TIME).map(named).collect();
        let look = tokio::spawn(look_at(volumes.clone(), FRESH, Duration::from_secs(3600)));
        let begun = || {
            let begun = |volume: &Volume| volume.seen.now().reading.is_some();
            volumes.iter().filter(|(_, volume)| begun(volume)).count()
        };
        while begun() < AT_A_TIME {
            tokio::task::yield_now().await;
        }
        assert_eq!(begun(), AT_A_TIME);
        // Each ends when somebody has written nothing to it; then the next one begins.
        let end = move || {
            for (name, _) in &volumes {
                drop(File::options().write(true).open(dir.path().join(name)).unwrap());
                let reading =
                    |(_, volume): &&(String, Arc<Volume>)| volume.seen.now().reading.is_some();
                assert!(volumes.iter().filter(reading).count() <= AT_A_TIME);
            }
        };
        tokio::task::spawn_blocking(end).await.unwrap();
        let looked = look.await.unwrap();
        assert!(looked.iter().all(|status| status.header_note.is_some()));
    }

    fn make(backing: PathBuf) {
        let new = NewVolume::prepare(CreateOptions {
            backing,
            capacity: 4096,
            sector_size: SectorSize::B4096,
            label: "v".to_owned(),
            force: false,
            preallocate: false,
        })
        .unwrap();
        let arn = "arn:aws:kms:eu-central-1:111122223333:key/5b6e0bd4-7d2c-4f2f-9d39-1d9d8a0f4a11";
        let context = EncryptionContext::for_volume(new.uuid(), Purpose::Zeebe, []).unwrap();
        let wrapped = WrappedKey { key_arn: arn.parse().unwrap(), blob: vec![1; 64], context };
        let key = VolumeKey::init_with(|key| {
            key[..32].fill(1);
            key[32..].fill(2);
            Ok::<_, SecretMemoryError>(())
        });
        let canary = Canary { wrapped: wrapped.clone(), sha256: [0; 32] };
        new.seal(key.unwrap(), wrapped, canary).unwrap().commit().unwrap();
    }

    #[tokio::test]
    async fn a_store_is_said_not_to_answer_when_it_did_not_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("v");
        make(store.clone());
        let volume = volume(store);
        let named = vec![("v".to_owned(), Arc::clone(&volume))];
        let note = async || {
            let looked = look_at(named.clone(), FRESH, PATIENCE).await.pop().unwrap();
            assert!(has_header(&looked));
            looked.header_note
        };
        assert_eq!(note().await, None);
        volume.seen.now().reading = Some(Instant::now());
        assert_eq!(note().await, None, "somebody has just begun to read it anew");
        volume.seen.now().reading = Instant::now().checked_sub(PATIENCE);
        let said = note().await.unwrap();
        assert!(said.starts_with("its store does not answer"), "{said}");
        volume.seen.now().reading = None;
        volume.seen.now().no_thread = Some("no thread".to_owned());
        let said = note().await.unwrap();
        assert!(said.ends_with("not now: no thread"), "{said}");
    }
}
