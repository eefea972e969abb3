//! Writes and zeroes, whole sectors and parts of sectors, and trims.

use std::io;
use std::sync::Arc;

use crate::buffer::{Ciphertext, MAX_BUFFER, Plaintext};
use crate::device::{Busy, Claim, Lane};
use crate::fence::{EnterError, Gate};
use crate::metrics::io::IoCounters;
use crate::nbd::transmission::{Outcome, Reply, Transmission, index};
use crate::nbd::wire::{Errno, FLAG_FUA, Head, Request};
use crate::store::Durability;
use crate::store::uring::Op;
use crate::units::SectorRange;

/// Where a write's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Client,
    Zeroes,
}

impl Transmission {
    pub(super) fn write(&mut self, request: Request, source: Source) -> Outcome {
        let task = self.begin(request, 1);
        let durability =
            if request.flags & FLAG_FUA != 0 { Durability::Durable } else { Durability::Cached };
        let mut received = 0;
        for (offset, len) in write_parts(request.offset, request.len, self.sector()) {
            if self.tasks.get(task).is_some_and(|t| t.errno.is_some()) {
                break;
            }
            received += len;
            let Ok(at) = self.export.geometry().sectors(offset, len) else { continue };
            if at.is_exactly(offset, len) {
                self.write_sectors(task, at, source, durability)?;
            } else {
                self.write_partial(task, offset, len, source, durability)?;
            }
        }
        if source == Source::Client {
            self.discard_payload(request.len - received)?;
        }
        self.part_ended(task, Ok(()))
    }

    pub(super) fn write_sectors(
        &mut self,
        task: usize,
        at: SectorRange,
        source: Source,
        durability: Durability,
    ) -> Outcome {
        let mut buffer = self.take(at)?;
        let held = buffer.len();
        let sealed = match source {
            Source::Client if self.inbox.bytes().len() >= held => {
                let sealed = loop {
                    let error = match self.gate.enter() {
                        Ok(pass) => {
                            let received = &self.inbox.bytes()[..held];
                            let began = self.client.io().cipher_begins();
                            let sealed = pass.seal_from(received, buffer, at);
                            self.client.io().cipher_ended(began);
                            break Ok(sealed);
                        }
                        Err(error) => error,
                    };
                    buffer.wipe();
                    if !self.wait_out(&error)? {
                        break Err((error, buffer));
                    }
                };
                self.inbox.consume(held);
                sealed.map_err(|(error, buffer)| {
                    self.give_back(buffer, held);
                    error
                })
            }
            Source::Client => {
                // The client may be long in sending it.
                buffer.wipe();
                let mut plain = Plaintext::new(buffer);
                if !self.receive_exact(plain.bytes_mut())? {
                    self.pool.give_plaintext(plain);
                    self.release(held);
                    return self.part_refused(task, self.why_given_up());
                }
                plain = match self.leave_write(task, at, plain, durability) {
                    Ok(()) => return Ok(()),
                    Err(plain) => plain,
                };
                self.sealed(plain, at, held)?
            }
            Source::Zeroes => {
                buffer.bytes_mut().fill(0);
                self.sealed(Plaintext::new(buffer), at, held)?
            }
        };
        let data = match sealed {
            Ok(data) => data,
            Err(error) => {
                let errno = self.refused(error);
                return self.part_refused(task, errno);
            }
        };
        match self.claim(at)? {
            Some(claim) => self.start(task, at, 0..0, Some(claim), Op::Write(data, durability)),
            None => {
                self.give_back(data.into_buffer(), held);
                self.part_refused(task, self.why_given_up())
            }
        }
    }

    /// A part of a task that is not even begun.
    fn part_refused(&mut self, task: usize, errno: Errno) -> Outcome {
        self.tasks.expect(task).parts += 1;
        self.part_ended(task, Err(errno))
    }

    /// Encrypts what is to be written, when the fence lets it.
    pub(super) fn sealed(
        &mut self,
        mut plain: Plaintext,
        at: SectorRange,
        held: usize,
    ) -> Outcome<Result<Ciphertext, EnterError>> {
        loop {
            let (error, back) = match seal(&self.gate, self.client.io(), plain, at) {
                Ok(data) => return Ok(Ok(data)),
                Err(refused) => refused,
            };
            plain = back;
            if !self.wait_out(&error)? {
                self.pool.give_plaintext(plain);
                self.pool.wipe();
                self.release(held);
                return Ok(Err(error));
            }
        }
    }

    /// The right to write `at`, waiting for other writers; `None` when the fence closed or the
    /// export stops meanwhile.
    pub(super) fn claim(&mut self, at: SectorRange) -> Outcome<Option<Claim>> {
        if let Ok(claim) = self.lane.begin(at) {
            return Ok(Some(claim));
        }
        self.claim_waiting(|lane, give_up| lane.begin_waiting(at, give_up))
    }

    /// The same for whatever `begin` asks for. Whoever waits has nothing in flight, and heeds the
    /// fence.
    fn claim_waiting(
        &mut self,
        begin: impl FnOnce(&Lane, &mut dyn FnMut() -> bool) -> Result<Claim, Busy>,
    ) -> Outcome<Option<Claim>> {
        if !self.settle()? {
            return Ok(None);
        }
        let lane = Arc::clone(&self.lane);
        let mut heeded = Ok(());
        let claim = begin(&lane, &mut || {
            heeded = self.notice_fence().and_then(|()| self.is_still_there());
            heeded.is_err() || self.export.gives_up()
        });
        // Who gave up claimed nothing.
        heeded.map(|()| claim.ok())
    }

    /// A read-modify-write of `len` bytes at `offset`, which is at most one part long.
    fn write_partial(
        &mut self,
        task: usize,
        offset: u64,
        len: u64,
        source: Source,
        durability: Durability,
    ) -> Outcome {
        let mut new = Plaintext::new(self.pool.take_clean(index(len)).map_err(io::Error::from)?);
        match source {
            Source::Client if self.receive_exact(new.bytes_mut())? => {}
            Source::Client => {
                self.pool.give_plaintext(new);
                return self.part_refused(task, self.why_given_up());
            }
            Source::Zeroes => new.bytes_mut().fill(0),
        }
        self.take_in_hand();
        let modified = self.modify(offset, &new);
        self.pool.give_plaintext(new);
        self.lay_down();
        match modified? {
            Ok((at, claim, data)) => {
                self.start(task, at, 0..0, Some(claim), Op::Write(data, durability))
            }
            Err(errno) => self.part_refused(task, errno),
        }
    }

    /// The sectors around `offset` with the bytes of `new` in them, and the right to write them.
    fn modify(
        &mut self,
        offset: u64,
        new: &Plaintext,
    ) -> Outcome<Result<(SectorRange, Claim, Ciphertext), Errno>> {
        let Ok(at) = self.export.geometry().sectors(offset, new.bytes().len() as u64) else {
            return Ok(Err(Errno::NoSpc));
        };
        let claim = self.claim_waiting(|lane, give_up| lane.begin_partial(at, give_up))?;
        let Some(claim) = claim else { return Ok(Err(self.why_given_up())) };
        match self.read_and_seal(at, index(offset - at.offset()), new) {
            Ok(Ok(data)) => Ok(Ok((at, claim, data))),
            Ok(Err(errno)) => {
                self.lane.end(claim);
                Ok(Err(errno))
            }
            Err(error) => {
                self.lane.end(claim);
                Err(error)
            }
        }
    }

    /// Reads the sectors of `at`, and encrypts them with the bytes of `new` from `skip` on. Should
    /// the fence close in between and requests be held, it begins again: nothing that was decrypted
    /// waits.
    fn read_and_seal(
        &mut self,
        at: SectorRange,
        skip: usize,
        new: &Plaintext,
    ) -> Outcome<Result<Ciphertext, Errno>> {
        loop {
            let (mut plain, held) = match self.read_now(at)? {
                Ok(read) => read,
                Err(errno) => return Ok(Err(errno)),
            };
            plain.bytes_mut()[skip..skip + new.bytes().len()].copy_from_slice(new.bytes());
            let (error, plain) = match seal(&self.gate, self.client.io(), plain, at) {
                Ok(data) => return Ok(Ok(data)),
                Err(refused) => refused,
            };
            self.pool.give_plaintext(plain);
            self.release(held);
            if !self.wait_out(&error)? {
                return Ok(Err(self.refused(error)));
            }
        }
    }

    pub(super) fn trim(&mut self, request: Request) -> Outcome {
        let whole = self.export.geometry().whole_sectors(request.offset, request.len);
        let at = whole.unwrap_or_else(|_| unreachable!("checked before"));
        if at.is_empty() {
            return self.reply(Reply::Head(Head::done(self.modes.style, &request)));
        }
        let durability =
            if request.flags & FLAG_FUA != 0 { Durability::Durable } else { Durability::Cached };
        match self.claim(at)? {
            Some(claim) => {
                let task = self.begin(request, 0);
                self.start(task, at, 0..0, Some(claim), Op::Discard(durability))
            }
            None => self.refuse(&request),
        }
    }
}

/// Encrypts what is to be written, or gives it back as it is.
fn seal(
    gate: &Gate,
    io: &IoCounters,
    plain: Plaintext,
    at: SectorRange,
) -> Result<Ciphertext, (EnterError, Plaintext)> {
    match gate.enter() {
        Ok(pass) => {
            let began = io.cipher_begins();
            let data = pass.seal(plain, at);
            io.cipher_ended(began);
            Ok(data)
        }
        Err(error) => Err((error, plain)),
    }
}

/// Cuts a range into parts that are either whole sectors or within one sector; each fits a buffer.
pub(super) fn write_parts(offset: u64, len: u64, sector: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let mut next = (at - at % sector + MAX_BUFFER as u64).min(end);
        // Only a head or tail that is not whole sectors pays for a read-modify-write.
        if !at.is_multiple_of(sector) {
            next = next.min(at - at % sector + sector);
        } else if next == end && !end.is_multiple_of(sector) && end - at > sector {
            next = end - end % sector;
        }
        let part = (at, next - at);
        at = next;
        Some(part)
    })
}
