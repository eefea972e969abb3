//! Stopping between two requests, so that another daemon can go on with the same socket: for the
//! kernel's client, which would otherwise have to wait for whatever it has sent.
//!
//! What has been received is done and answered; of a request that has arrived in part exactly the
//! rest is received. What the kernel sends after that stays in the socket.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::nbd::transmission::{IDLE_TRIM, Outcome, Transmission};
use crate::nbd::wire::REQUEST_LEN;

/// How long the rest of a request may take. It is on its way: the kernel sends a request as a whole.
const REST: Duration = Duration::from_secs(2);

impl Transmission {
    /// Whether this is a place between two requests; everything is answered then. Else the rest of
    /// a request's header has been received.
    pub(super) fn between_requests(&mut self) -> Outcome<bool> {
        // Before anything is waited for that hears no fence.
        self.settle()?;
        self.send()?;
        let have = self.inbox.bytes().len();
        if have == 0 {
            return Ok(self.again.is_empty());
        }
        // Payloads are received exactly wherever they are.
        let rest = REQUEST_LEN.saturating_sub(have);
        self.stream.set_read_timeout(Some(REST))?;
        let got = self.inbox.fill(|to| {
            let rest = rest.min(to.len());
            self.stream.read(&mut to[..rest])
        })?;
        if got == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(false)
    }

    /// Waits until there is something to read; `false` if the connection is handed over instead.
    pub(super) fn may_read(&mut self) -> Outcome<bool> {
        loop {
            if self.client.is_handing_over() {
                return Ok(false);
            }
            let mut fds = [
                PollFd::new(self.stream.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.client.waker(), PollFlags::POLLIN),
            ];
            let wait = if self.rested {
                PollTimeout::NONE
            } else {
                PollTimeout::try_from(IDLE_TRIM).unwrap_or(PollTimeout::MAX)
            };
            let woken = match poll(&mut fds, wait) {
                Ok(0) => {
                    self.idle_for_long();
                    continue;
                }
                Ok(_) => fds.map(|fd| fd.any().unwrap_or(true)),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(io::Error::from(errno).into()),
            };
            if woken[1] {
                // For the fence, which an idle connection has nothing to do with, or to hand over.
                self.client.awake();
            }
            if woken[0] {
                return Ok(true);
            }
        }
    }
}
