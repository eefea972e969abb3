//! Writes and zeroes, whole sectors and parts of sectors, and trims.

use std::io;
use std::sync::Arc;

use crate::buffer::{Ciphertext, MAX_BUFFER, Plaintext};
use crate::device::Claim;
use crate::fence::EnterError;
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
                let result = self.write_partial(offset, len, source, durability)?;
                self.tasks.expect(task).parts += 1;
                self.part_ended(task, result)?;
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
                let mut plain = Plaintext::new(buffer);
                self.receive_exact(plain.bytes_mut())?;
                self.seal(plain, at, held)?
            }
            Source::Zeroes => {
                buffer.bytes_mut().fill(0);
                self.seal(Plaintext::new(buffer), at, held)?
            }
        };
        let data = match sealed {
            Ok(data) => data,
            Err(error) => {
                let errno = self.refused(error);
                self.tasks.expect(task).parts += 1;
                return self.part_ended(task, Err(errno));
            }
        };
        match self.claim(at)? {
            Some(claim) => self.start(task, at, 0..0, Some(claim), Op::Write(data, durability)),
            None => {
                self.give_back(data.into_buffer(), held);
                let errno = self.why_given_up();
                self.tasks.expect(task).parts += 1;
                self.part_ended(task, Err(errno))
            }
        }
    }

    pub(super) fn seal(
        &mut self,
        plain: Plaintext,
        at: SectorRange,
        held: usize,
    ) -> Outcome<Result<Ciphertext, EnterError>> {
        loop {
            let error = match self.gate.enter() {
                Ok(pass) => {
                    let began = self.client.io().cipher_begins();
                    let sealed = pass.seal(plain, at);
                    self.client.io().cipher_ended(began);
                    return Ok(Ok(sealed));
                }
                Err(error) => error,
            };
            if !self.wait_out(&error)? {
                self.pool.give_plaintext(plain);
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
        self.settle()?;
        let export = Arc::clone(&self.export);
        Ok(self.lane.begin_waiting(at, &|| export.gives_up()).ok())
    }

    /// A read-modify-write of `len` bytes at `offset`, which is at most one part long.
    pub(super) fn write_partial(
        &mut self,
        offset: u64,
        len: u64,
        source: Source,
        durability: Durability,
    ) -> Outcome<Result<(), Errno>> {
        let mut new = Plaintext::new(self.pool.take(index(len)).map_err(io::Error::from)?);
        match source {
            Source::Client => self.receive_exact(new.bytes_mut())?,
            Source::Zeroes => new.bytes_mut().fill(0),
        }
        self.settle()?;
        let Ok(at) = self.export.geometry().sectors(offset, len) else {
            return Ok(Err(Errno::NoSpc));
        };
        let export = Arc::clone(&self.export);
        let lane = Arc::clone(&self.lane);
        let result = lane.partial(at, &|| export.gives_up(), || {
            let (mut old, held) = self.read_now(at)?;
            let skip = index(offset - at.offset());
            old.bytes_mut()[skip..skip + index(len)].copy_from_slice(new.bytes());
            let sealed = self.seal(old, at, held).map_err(|_| Errno::Io)?;
            let data = sealed.map_err(|error| self.refused(error))?;
            let mut failures = 0;
            let written = loop {
                match export.backing().write(at, &data, durability) {
                    Err(error) if self.try_again(&error, failures) => failures += 1,
                    ended => break ended,
                }
            };
            self.give_back(data.into_buffer(), held);
            written.map_err(|error| self.store_failed("write", at, &error))
        });
        self.pool.give_plaintext(new);
        Ok(result.unwrap_or_else(|_| Err(self.why_given_up())))
    }

    pub(super) fn trim(&mut self, request: Request) -> Outcome {
        let whole = self.export.geometry().whole_sectors(request.offset, request.len);
        let at = whole.unwrap_or_else(|_| unreachable!("checked before"));
        if at.is_empty() {
            return self.reply(Reply::Head(Head::done(self.modes.style, &request)));
        }
        match self.claim(at)? {
            Some(claim) => {
                // One trim may cover the whole volume: it is done by itself, so that its length
                // does not have to fit what the ring takes.
                self.settle()?;
                let mut done = self.export.backing().discard(at);
                if done.is_ok() && request.flags & FLAG_FUA != 0 {
                    done = self.export.backing().flush();
                }
                self.lane.end(claim);
                let head = match done {
                    Ok(()) => Head::done(self.modes.style, &request),
                    Err(error) => {
                        let errno = self.store_failed("discard", at, &error);
                        self.count(&request, errno);
                        Head::error(self.modes.style, &request, errno)
                    }
                };
                self.reply(Reply::Head(head))
            }
            None => {
                let errno = self.why_given_up();
                self.count(&request, errno);
                self.reply(Reply::Head(Head::error(self.modes.style, &request, errno)))
            }
        }
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
