//! Waiting for the key instead of failing, where the volume is configured so.
//!
//! A held connection keeps its client waiting: it takes no more requests, so that the client's
//! socket fills up and nothing else. It holds no key and nothing that was decrypted: replies that
//! were ready go out when the fence closes, what had been read of a larger reply is wiped and read
//! again, and what is in flight in the store is ciphertext both ways. What the client has sent and
//! is not encrypted yet (a request, three of 1 MiB at most that were left to the thread beside it, and
//! up to 68 KiB behind them) waits in locked memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::buffer::{Ciphertext, Plaintext};
use crate::export::{HANG_UP, Stance};
use crate::fence::EnterError;
use crate::nbd::transmission::reads::unseal;
use crate::nbd::transmission::requests::{bytes, operation};
use crate::nbd::transmission::{Outcome, Transmission};
use crate::nbd::wire::{Command, Errno, Request};
use crate::registers;
use crate::units::SectorRange;

/// How long to sleep at most before looking whether the wait is over.
const LOOK_AGAIN_MILLIS: u16 = 500;

impl Transmission {
    /// Waits for a closed fence to open, if requests are to wait; `true` when it is open.
    pub(super) fn hold(&mut self) -> Outcome<bool> {
        loop {
            match self.export.stance() {
                Stance::Serving => return Ok(true),
                Stance::Refusing => return Ok(false),
                Stance::Held => self.let_go()?,
            }
            // Somebody in there may have waited until now, and taken the wake-up.
            if self.export.stance() != Stance::Held {
                continue;
            }
            let at_most = PollTimeout::from(LOOK_AGAIN_MILLIS);
            if self.wait_beside_waker(self.stream.as_fd(), HANG_UP, at_most) {
                // Done later, its requests could undo those of a client that has come since.
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    /// Waits for `events` of `fd`, says whether they came, and takes a wake-up. Interrupted or not:
    /// what counts is looked at again by the caller.
    pub(super) fn wait_beside_waker(
        &self,
        fd: BorrowedFd<'_>,
        events: PollFlags,
        at_most: PollTimeout,
    ) -> bool {
        let waker = PollFd::new(self.client.waker(), PollFlags::POLLIN);
        let mut fds = [PollFd::new(fd, events), waker];
        registers::wipe();
        let _polled = poll(&mut fds, at_most);
        if fds[1].any() != Some(false) {
            self.client.awake();
        }
        fds[0].any() != Some(false)
    }

    /// Whether to knock at the gate again, after waiting for that if this volume's requests wait.
    pub(super) fn wait_out(&mut self, error: &EnterError) -> Outcome<bool> {
        Ok(matches!(error, EnterError::Fenced(_)) && self.hold()?)
    }

    /// Gives up everything that was decrypted, and keeps what is in flight.
    pub(super) fn let_go(&mut self) -> Outcome {
        self.holding = true;
        self.take_all_done()?;
        // What was begun is not begun later.
        self.submit_queued()?;
        let mut read = Vec::new();
        for task in self.tasks.iter_mut().filter(|task| task.whole.iter().any(Option::is_some)) {
            task.again = true;
            read.extend(task.whole.iter_mut().map(Option::take));
        }
        self.drop_data(read);
        self.send()?;
        self.pool.wipe();
        self.inbox.wipe();
        self.note_closing();
        Ok(())
    }

    /// Decrypts what was read, when the fence lets it.
    pub(super) fn unsealed(
        &mut self,
        mut data: Ciphertext,
        at: SectorRange,
    ) -> Outcome<Result<Plaintext, (EnterError, Ciphertext)>> {
        loop {
            match unseal(&self.gate, self.client.io(), data, at) {
                Ok(plain) => return Ok(Ok(plain)),
                Err((error, mut back)) => {
                    back.wipe_behind();
                    if !self.wait_out(&error)? {
                        return Ok(Err((error, back)));
                    }
                    data = back;
                }
            }
        }
    }

    /// Counts an error that a client is told, if it is not the client's own.
    pub(super) fn count(&self, request: &Request, errno: Errno) {
        let writes = !matches!(request.command, Command::Read | Command::Flush);
        let fenced = errno == Errno::Perm && !(writes && self.export.options().read_only);
        if fenced || matches!(errno, Errno::Io | Errno::NoMem) {
            self.client.io().failed(operation(request), bytes(request));
            self.export.count_failed(&self.client);
        }
    }
}
