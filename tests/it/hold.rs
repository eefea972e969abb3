//! Requests that wait for the key, at an export whose fence closes and opens many times a second.

use std::os::unix::net::UnixListener;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use byokd::export::{Export, ExportOptions, ExportTable};
use byokd::key::VolumeKey;
use byokd::key::lease::FenceReason;
use byokd::key::secret::SecretMemoryError;
use byokd::key::wrapped::{Canary, EncryptionContext, Purpose, WrappedKey};
use byokd::nbd::serve;
use byokd::nbd::stream::NbdStream;
use byokd::store::DirectIo;
use byokd::units::SectorSize;
use byokd::volume::{Access, CreateOptions, LockedVolume, NewVolume};

use crate::concurrency::{BYTES, everybody_works};
use crate::support::until;

/// How often the fence is closed at least.
const CLOSINGS: u32 = 100;

pub(crate) fn key() -> VolumeKey {
    VolumeKey::init_with(|key| {
        key[..32].fill(1);
        key[32..].fill(2);
        Ok::<_, SecretMemoryError>(())
    })
    .unwrap()
}

/// A volume whose requests wait for the key, without a daemon around it.
pub(crate) fn held_export(dir: &Path, hold: Duration) -> Arc<Export> {
    export(dir, Some(hold))
}

/// The same, whose requests wait if there is a time to.
pub(crate) fn export(dir: &Path, hold: Option<Duration>) -> Arc<Export> {
    let backing = dir.join("v.img");
    make(&backing);
    open(&backing, hold, DirectIo::Auto)
}

/// A new volume with [`key`].
pub(crate) fn make(backing: &Path) {
    let new = NewVolume::prepare(CreateOptions {
        backing: backing.to_owned(),
        capacity: BYTES,
        sector_size: SectorSize::B4096,
        label: "v".to_owned(),
        force: false,
        preallocate: false,
    })
    .unwrap();
    let arn = "arn:aws:kms:eu-central-1:111122223333:key/5b6e0bd4-7d2c-4f2f-9d39-1d9d8a0f4a11";
    let context = EncryptionContext::for_volume(new.uuid(), Purpose::Zeebe, []).unwrap();
    let wrapped = WrappedKey { key_arn: arn.parse().unwrap(), blob: vec![1; 64], context };
    new.seal(key(), wrapped.clone(), Canary { wrapped, sha256: [0; 32] })
        .unwrap()
        .commit()
        .unwrap();
}

/// Serves that volume.
pub(crate) fn open(backing: &Path, hold: Option<Duration>, direct: DirectIo) -> Arc<Export> {
    let volume = LockedVolume::open(backing, Access::ReadWrite).unwrap().unlock(&key());
    let options = ExportOptions {
        name: "v".to_owned(),
        description: String::new(),
        read_only: false,
        trim: true,
        max_connections: 16,
        direct,
        hold,
    };
    Export::open(volume.map_err(|(_, error)| error).unwrap(), key(), options).unwrap()
}

/// Closes and opens the fence until told, after up to `apart` requests each time, and counts how often.
/// Half the times it took no longer than this until requests went on.
fn open_and_close(
    export: &Export,
    holds: bool,
    apart: u64,
    rounds: &AtomicU32,
    over: &AtomicBool,
) -> Duration {
    let mut waits = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let _destroyed = export.fence(FenceReason::Denied);
        assert_eq!(export.is_held(), holds, "the fence is closed, and requests wait or do not");
        until("the store has ended what was given up", || export.stalled() == 0);
        export.restore(key()).unwrap();
        let (open, before) = (Instant::now(), export.io().requests());
        let go_on = |more| {
            until("requests go on", || {
                over.load(Ordering::Relaxed) || export.io().requests() >= before + more
            });
        };
        let more = u64::from(rounds.fetch_add(1, Ordering::Relaxed)) % apart;
        if more > 0 {
            go_on(1);
            waits.push(open.elapsed());
        }
        go_on(more);
    }
    waits.sort_unstable();
    waits[waits.len() / 2]
}

/// Has `work` done again and again until the fence has been closed and opened so often meanwhile. Half
/// the times it took no longer than this until requests went on.
pub(crate) fn while_the_key_goes_and_comes(
    export: &Export,
    holds: bool,
    apart: u64,
    closings: u32,
    mut work: impl FnMut(),
) -> Duration {
    let (over, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let closer = scope.spawn(|| open_and_close(export, holds, apart, &rounds, &over));
        // Whatever fails in there, the closer has to end.
        let works = AssertUnwindSafe(|| {
            while rounds.load(Ordering::Relaxed) < closings && !closer.is_finished() {
                work();
            }
        });
        let worked = std::panic::catch_unwind(works);
        over.store(true, Ordering::Relaxed);
        let waited = closer.join().unwrap();
        worked.unwrap();
        waited
    })
}

/// Serves it on a socket in `dir`.
pub(crate) fn serve_in(dir: &Path, export: &Arc<Export>) -> PathBuf {
    let table = ExportTable::new();
    table.insert(Arc::clone(export));
    let socket = dir.join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // The peers' threads end with their connections.
            serve(NbdStream::Unix(stream.unwrap()), table.clone(), ()).unwrap();
        }
    });
    socket
}

fn no_request_fails(place: &Path) {
    let dir = tempfile::tempdir_in(place).unwrap();
    let export = held_export(dir.path(), Duration::from_secs(600));
    let socket = serve_in(dir.path(), &export);
    while_the_key_goes_and_comes(&export, true, 16, CLOSINGS, || {
        everybody_works(&socket);
    });
    assert_eq!(export.failed(), 0, "after {CLOSINGS} closings");
}

#[test]
fn no_request_fails_however_often_the_key_goes_and_comes_in_memory() {
    no_request_fails(Path::new("/dev/shm"));
}

#[test]
fn no_request_fails_however_often_the_key_goes_and_comes_on_a_disk() {
    no_request_fails(Path::new(env!("CARGO_TARGET_TMPDIR")));
}
