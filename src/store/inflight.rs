//! A lock that lasts as long as something is written.
//!
//! A process that is killed leaves its locks at once, but not what the kernel writes for it: a write
//! that waits for a path to a disk may reach it much later, over what the next daemon has written. It
//! holds on to the open file that it goes by, though, and so to a lock of that one (`F_OFD_SETLK`,
//! fcntl(2)): on a byte that no file has.

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The byte. Locks of all the rest end before it.
pub(crate) const BYTE: i64 = i64::MAX - 1;

/// Whether somebody writes by another open file, or has died and something is still written for him.
///
/// # Errors
/// The file system has no such locks.
pub(crate) fn is_held(file: &File) -> Result<bool, Errno> {
    let mut lock = request(libc::F_WRLCK, BYTE, 1)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Holds it for all that is written by this open file, beside others of the same volume.
///
/// # Errors
/// The file system has no such locks, or is a server's that takes them all for one.
pub(super) fn hold(file: &File) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&request(libc::F_RDLCK, BYTE, 1)?)).map(|_| ())
}

/// A request for a lock of that kind: `len` bytes from `start` on.
pub(crate) fn request(kind: libc::c_int, start: i64, len: i64) -> Result<libc::flock, Errno> {
    let short = |value| libc::c_short::try_from(value).map_err(|_| Errno::EINVAL);
    let (l_type, l_whence) = (short(kind)?, short(libc::SEEK_SET)?);
    Ok(libc::flock { l_type, l_whence, l_start: start, l_len: len, l_pid: 0 })
}
