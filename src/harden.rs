//! What the process gives up before it handles a key: core dumps, being traced, open permissions.

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use thiserror::Error;
use tracing::warn;

/// A protection that the system did not grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("cannot {what}: {errno}")]
pub struct HardenError {
    what: &'static str,
    errno: nix::errno::Errno,
}

/// Forbids core dumps and tracing by others, keeps all memory out of swap, makes new files private,
/// and raises the limit of open files to what is allowed. Keys and pooled buffers lock their own
/// memory in any case; locking everything covers the rest, such as what a library holds of a
/// client's bytes or of an answer of KMS.
///
/// # Errors
/// A protection could not be had. A limit of files that cannot be raised is not an error, nor is a
/// limit of locked memory that is too low for everything: that is logged.
pub fn harden() -> Result<(), HardenError> {
    let fail = |what| move |errno| HardenError { what, errno };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(fail("forbid core dumps"))?;
    prctl::set_dumpable(false).map_err(fail("forbid being traced"))?;
    lock_all();
    umask(Mode::from_bits_truncate(0o077));
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Fewer connections, then.
        let _raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    Ok(())
}

/// Locks what is mapped now and later, as it is touched. With a limit, memory could not be mapped
/// any more once it is reached, so only where there is none.
fn lock_all() {
    let unlimited =
        getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY);
    let all = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE;
    let as_touched = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    let locked = (unlimited || may_lock()).then(|| mlockall(all | as_touched));
    if locked != Some(Ok(())) {
        warn!(
            "only keys and buffers are locked, other memory may be swapped; set LimitMEMLOCK=infinity"
        );
    }
}

/// Whether the limit does not apply: the process has `CAP_IPC_LOCK`.
fn may_lock() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}
