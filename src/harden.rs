//! What the process gives up before it handles a key: core dumps, being traced, open permissions.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use thiserror::Error;

/// A protection that the system did not grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("cannot {what}: {errno}")]
pub struct HardenError {
    what: &'static str,
    errno: nix::errno::Errno,
}

/// Forbids core dumps and tracing by others, makes new files private, and raises the limit of open
/// files to what is allowed.
///
/// # Errors
/// A protection could not be had. A limit of files that cannot be raised is not an error.
pub fn harden() -> Result<(), HardenError> {
    let fail = |what| move |errno| HardenError { what, errno };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(fail("forbid core dumps"))?;
    prctl::set_dumpable(false).map_err(fail("forbid being traced"))?;
    umask(Mode::from_bits_truncate(0o077));
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Fewer connections, then.
        let _raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    Ok(())
}
