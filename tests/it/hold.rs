//! Requests that wait for the key, at an export whose fence closes and opens many times a second.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

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

/// Opens and closes the fence until told, and counts how often.
fn open_and_close(export: &Export, rounds: &AtomicU32, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let _destroyed = export.fence(FenceReason::Denied);
        assert!(export.is_held(), "the fence is closed, and requests wait");
        until("the store has ended what was given up", || export.stalled() == 0);
        export.restore(key()).unwrap();
        let round = rounds.fetch_add(1, Ordering::Relaxed);
        let enough = export.io().requests() + u64::from(round % 16);
        until("requests go on", || {
            over.load(Ordering::Relaxed) || export.io().requests() >= enough
        });
    }
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
    let (over, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let closer = scope.spawn(|| open_and_close(&export, &rounds, &over));
        // Whatever fails in there, the closer has to end.
        let worked = std::panic::catch_unwind(|| {
            while rounds.load(Ordering::Relaxed) < CLOSINGS {
                everybody_works(&socket);
            }
        });
        over.store(true, Ordering::Relaxed);
        closer.join().unwrap();
        worked.unwrap();
    });
    assert_eq!(export.failed(), 0, "after {rounds:?} closings");
}

#[test]
fn no_request_fails_however_often_the_key_goes_and_comes_in_memory() {
    no_request_fails(Path::new("/dev/shm"));
}

#[test]
fn no_request_fails_however_often_the_key_goes_and_comes_on_a_disk() {
    no_request_fails(Path::new(env!("CARGO_TARGET_TMPDIR")));
}
