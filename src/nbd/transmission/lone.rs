//! Calls of the store that a request waits for before it can go on: the reading half of a
//! read-modify-write, and what the ring cannot do. Neither makes a fence that closes wait: what the
//! store keeps is left behind.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

use nix::poll::{PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::buffer::{Ciphertext, Plaintext};
use crate::nbd::transmission::parts::perform;
use crate::nbd::transmission::{Outcome, Part, Transmission};
use crate::nbd::wire::Errno;
use crate::store::uring::{Completion, Op};
use crate::store::{Extent, Speed};
use crate::units::SectorRange;

impl Transmission {
    /// Reads and decrypts, waiting for it. Nothing else is in flight.
    pub(super) fn read_now(
        &mut self,
        at: SectorRange,
    ) -> Outcome<Result<(Plaintext, usize), Errno>> {
        let buffer = self.take(at)?;
        let held = buffer.len();
        let (mut failures, mut data) = (0, Ciphertext::new(buffer));
        loop {
            let Some(ended) = self.alone(at, Op::Read(data))? else {
                return Ok(Err(self.why_given_up()));
            };
            match (ended.result, ended.buffer) {
                (Ok(()), Some(read)) => {
                    return Ok(match self.unsealed(read, at)? {
                        Ok(plain) => Ok((plain, held)),
                        Err((error, data)) => {
                            self.give_back(data.into_buffer(), held);
                            Err(self.refused(error))
                        }
                    });
                }
                (Err(error), Some(back)) => {
                    if !self.waits_to_try_again(&error, failures)? {
                        self.give_back(back.into_buffer(), held);
                        return Ok(Err(self.store_failed("read", at, &error)));
                    }
                    (failures, data) = (failures + 1, back);
                }
                (_, None) => return Ok(Err(Errno::Io)),
            }
        }
    }

    /// Has the store do this alone, and waits; `None` if the fence closed meanwhile.
    fn alone(&mut self, at: SectorRange, op: Op) -> Outcome<Option<Completion>> {
        if self.store.speed() == Speed::Immediate {
            return Ok(Some(perform(&self.store, at, op)));
        }
        let part = Part::new(None, at, 0..0, None, &op);
        self.submit(part, op)?;
        loop {
            if let Some(ended) = self.lone.take() {
                return Ok(Some(ended));
            }
            if self.given_up || !self.tasks_in_flight() {
                return Ok(None);
            }
            self.wait_for_ring()?;
        }
    }

    /// What was done alone has ended, whether or not it is still waited for.
    pub(super) fn lone_ended(&mut self, part: &Part, ended: Completion) {
        if part.orphan {
            self.export.orphan_ended();
            if let Some(data) = ended.buffer {
                self.give_back(data.into_buffer(), part.held);
            }
            return;
        }
        self.lone = Some(ended);
    }

    /// Which parts of `at` have blocks; `None` if the fence closed meanwhile. The ring has no such
    /// call, so a thread makes it.
    pub(super) fn extents(
        &mut self,
        at: SectorRange,
        most: usize,
    ) -> Outcome<Option<io::Result<Vec<Extent>>>> {
        if self.store.speed() == Speed::Immediate {
            return Ok(Some(self.store.extents(at, most)));
        }
        let ended = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(io::Error::from)?);
        let (tell, told) = mpsc::sync_channel(1);
        let (store, end) = (Arc::clone(&self.store), Arc::clone(&ended));
        let looks = move || {
            // Nobody waits any more if the fence closed.
            let _told = tell.send(store.extents(at, most));
            let _woken = end.write(1);
        };
        std::thread::Builder::new().name("extents".into()).spawn(looks)?;
        loop {
            self.wait_beside_waker(ended.as_fd(), PollFlags::POLLIN, PollTimeout::NONE);
            if let Ok(runs) = told.try_recv() {
                return Ok(Some(runs));
            }
            self.notice_fence()?;
            if self.export.gives_up() {
                return Ok(None);
            }
        }
    }
}
