//! Descriptors that systemd keeps from one run of the service to the next.
//!
//! What is stored outlives this process and is passed to the next by name. Stored with FDPOLL=0:
//! systemd drops others when their peer hangs up. A descriptor that is taken after a start is still
//! in the store until [`Notifier::forget_fds`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use listenfd::ListenFd;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{close, pipe2};
use thiserror::Error;
use tracing::warn;

use crate::systemd::Notifier;

/// A name that systemd takes for no descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` cannot name a descriptor: 1 to 255 printable characters without `:`")]
pub struct FdNameError(String);

impl From<FdNameError> for io::Error {
    fn from(error: FdNameError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

impl Notifier {
    /// Gives systemd a duplicate of `fd` to keep as `name`; several may have one name. Says whether
    /// there was anybody to keep it. [`Notifier::settle`] tells when it is kept.
    ///
    /// # Errors
    /// The name is none, or systemd takes no message.
    pub fn store_fd(&self, name: &str, fd: impl AsFd) -> io::Result<bool> {
        let message = format!("FDSTORE=1\nFDNAME={}\nFDPOLL=0", checked(name)?);
        self.send(&message, &[fd.as_fd().as_raw_fd()])?;
        Ok(self.is_active())
    }

    /// Has systemd close all that it keeps as `name`.
    ///
    /// # Errors
    /// The name is none, or systemd takes no message.
    pub fn forget_fds(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={}", checked(name)?), &[])
    }

    /// Waits until systemd has acted upon everything it was told, so that this process may end: what
    /// a process that is gone has said may be lost.
    ///
    /// # Errors
    /// systemd took no message, or longer than `within`.
    pub fn settle(&self, within: Duration) -> io::Result<()> {
        if !self.is_active() {
            return Ok(());
        }
        // systemd closes its end when it comes to the message.
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        self.send("BARRIER=1", &[theirs.as_raw_fd()])?;
        drop(theirs);
        let wait = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], wait)? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

fn checked(name: &str) -> Result<&str, FdNameError> {
    let printable = name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b':');
    if printable && (1..=255).contains(&name.len()) {
        Ok(name)
    } else {
        Err(FdNameError(name.to_owned()))
    }
}

/// What systemd passed at the start: unix stream sockets, which is all that is stored. What nobody
/// takes is closed when this is dropped.
#[derive(Default)]
pub struct PassedFds(Vec<(String, OwnedFd)>);

impl PassedFds {
    /// By `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`, the first two of which it removes. They
    /// are closed on exec from now on, and what is no unix stream socket is closed at once.
    pub(super) fn from_env() -> Self {
        let variable = |name| std::env::var(name).ok();
        let ours = |pid: String| pid.parse() == Ok(std::process::id());
        if !variable("LISTEN_PID").is_some_and(ours) {
            return Self::default();
        }
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut given = ListenFd::from_env();
        let mut passed = Vec::new();
        for at in 0..given.len() {
            // systemd names what has no name `unknown` or, of the store, `stored`.
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned();
            let kind = (libc::AF_UNIX, libc::SOCK_STREAM);
            match given.take_custom::<OwnedFd>(at, kind.0, kind.1, "unix stream socket") {
                Ok(Some(fd)) => passed.push((name, fd)),
                Ok(None) => {}
                Err(error) => {
                    warn!(name, %error, "closed what systemd passed and nobody can use");
                    if let Ok(Some(fd)) = given.take_raw_fd(at) {
                        // It was not open, then.
                        let _closed = close(fd);
                    }
                }
            }
        }
        Self(passed)
    }

    /// Takes those whose name is wanted, in the order in which they were stored.
    pub fn take(&mut self, mut wanted: impl FnMut(&str) -> bool) -> Vec<(String, OwnedFd)> {
        self.0.extract_if(.., |(name, _)| wanted(name)).collect()
    }

    /// Closes what nobody took, in the store too.
    pub fn close_rest(mut self, notifier: &Notifier) {
        for (name, fd) in std::mem::take(&mut self.0) {
            warn!(name, "closed what systemd passed and nobody knows");
            drop(fd);
            if let Err(error) = notifier.forget_fds(&name) {
                warn!(name, %error, "systemd keeps what nobody knows");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_systemd_would_cut_are_refused() {
        assert_eq!(checked("nbd-zeebe-0"), Ok("nbd-zeebe-0"));
        for name in ["", "a:b", "a\nREADY=1", "ä", &"x".repeat(256)] {
            assert_eq!(checked(name), Err(FdNameError(name.to_owned())), "{name}");
        }
    }

    #[test]
    fn what_is_passed_is_taken_by_name_and_once() {
        let socket = || std::os::unix::net::UnixStream::pair().unwrap().0.into();
        let mut passed = PassedFds(vec![
            ("a".to_owned(), socket()),
            ("b".to_owned(), socket()),
            ("a".to_owned(), socket()),
        ]);
        assert_eq!(passed.take(|name| name == "a").len(), 2);
        assert!(passed.take(|name| name == "a").is_empty());
        assert_eq!(passed.take(|_| true).len(), 1);
    }
}
