//! Reads: into one buffer, in parts that are answered as they end, or whole for simple replies.

use std::io;

use tracing::debug;

use crate::buffer::{Ciphertext, MAX_BUFFER, Plaintext};
use crate::fence::{EnterError, Gate};
use crate::metrics::io::IoCounters;
use crate::nbd::transmission::{Data, Outcome, Reply, Transmission, TransmissionError, index};
use crate::nbd::wire::{Chunk, Head, ReplyStyle, Request};
use crate::store::uring::Op;
use crate::units::SectorRange;

impl Transmission {
    pub(super) fn read(&mut self, request: Request) -> Outcome {
        if request.len == 0 {
            let head = Head::data(self.modes.style, Chunk::Done, &request, request.offset, 0);
            return match self.modes.style {
                // An empty data chunk is not allowed.
                ReplyStyle::Structured | ReplyStyle::Extended => {
                    self.reply(Reply::Head(Head::end(self.modes.style, &request)))
                }
                ReplyStyle::Simple => self.reply(Reply::Head(head)),
            };
        }
        if self.modes.style == ReplyStyle::Simple && !self.fits_one_part(&request) {
            return self.read_whole(request);
        }
        let task = self.begin(request, 1);
        for (offset, len) in read_parts(request.offset, request.len, self.sector()) {
            if let Some(errno) = self.tasks.get(task).and_then(|t| t.errno) {
                debug!(?errno, "rest of a read given up");
                break;
            }
            let Ok(at) = self.export.geometry().sectors(offset, len) else { continue };
            let buffer = self.take(at)?;
            let skip = index(offset - at.offset());
            let wanted = skip..skip + index(len);
            self.start(task, at, wanted, None, Op::Read(Ciphertext::new(buffer)))?;
        }
        self.part_ended(task, Ok(()))
    }

    /// A large read for a client that knows only simple replies. After a header that promises data
    /// there is no way to report an error, so all of it is read and decrypted before the header
    /// goes out: a fence that closes meanwhile is an error, not a broken connection.
    pub(super) fn read_whole(&mut self, request: Request) -> Outcome {
        if !self.settle()? {
            return self.refuse(&request);
        }
        self.send()?;
        let covered = self.export.geometry().sectors(request.offset, request.len);
        let total = covered.map(|at| index(at.len())).unwrap_or(usize::MAX);
        if !self.budget.take(total) {
            return self.read_in_order(request);
        }
        self.from_budget += total;
        self.held += total;
        let mut left = total;
        let task = self.begin(request, 1);
        self.tasks.expect(task).whole.resize_with(total.div_ceil(MAX_BUFFER), || None);
        for (offset, len) in read_parts(request.offset, request.len, self.sector()) {
            if self.tasks.get(task).is_some_and(|t| t.errno.is_some()) {
                break;
            }
            let Ok(at) = self.export.geometry().sectors(offset, len) else { continue };
            let buffer = self.pool.take_clean(index(at.len())).map_err(io::Error::from)?;
            left -= buffer.len();
            let skip = index(offset - at.offset());
            let wanted = skip..skip + index(len);
            self.start(task, at, wanted, None, Op::Read(Ciphertext::new(buffer)))?;
        }
        self.release(left);
        self.part_ended(task, Ok(()))
    }

    /// The same while all the memory that connections share is in use: part by part, each sent
    /// before the next is read. An error after the first can only break the connection.
    pub(super) fn read_in_order(&mut self, request: Request) -> Outcome {
        let mut first = true;
        for (offset, len) in read_parts(request.offset, request.len, self.sector()) {
            let Ok(at) = self.export.geometry().sectors(offset, len) else { continue };
            match self.read_now(at)? {
                Ok((plain, held)) => {
                    let skip = index(offset - at.offset());
                    let wanted = skip..skip + index(len);
                    let head = if first {
                        Head::data(self.modes.style, Chunk::Done, &request, offset, len)
                    } else {
                        Head::nothing()
                    };
                    first = false;
                    self.reply(Reply::Data(head, Data { plain, wanted, held }))?;
                    self.send()?;
                }
                Err(errno) if first => {
                    self.count(&request, errno);
                    let head = Head::error(self.modes.style, &request, errno);
                    return self.reply(Reply::Head(head));
                }
                Err(_) => return Err(TransmissionError::CutReply),
            }
        }
        Ok(())
    }
}

/// Decrypts what was read, or gives it back as it is.
pub(super) fn unseal(
    gate: &Gate,
    io: &IoCounters,
    data: Ciphertext,
    at: SectorRange,
) -> Result<Plaintext, (EnterError, Ciphertext)> {
    match gate.enter() {
        Ok(pass) => {
            let began = io.cipher_begins();
            let plain = pass.unseal(data, at);
            io.cipher_ended(began);
            Ok(plain)
        }
        Err(error) => Err((error, data)),
    }
}

/// Cuts a range into parts whose sectors fit one buffer each; all but the first start at a sector.
pub(super) fn read_parts(offset: u64, len: u64, sector: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let next = (at - at % sector + MAX_BUFFER as u64).min(end);
        let part = (at, next - at);
        at = next;
        (part.1 > 0).then_some(part)
    })
}
