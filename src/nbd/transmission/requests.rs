//! What is asked for: refused before anything is done, or handed on.

use std::io;
use std::time::Instant;

use tracing::error;

use crate::buffer::MAX_BUFFER;
use crate::fence::EnterError;
use crate::metrics::io::IoOperation;
use crate::nbd::transmission::writes::Source;
use crate::nbd::transmission::{
    MAX_REQUEST, MOST_EXTENTS, Outcome, Reply, Task, Transmission, TransmissionError,
};
use crate::nbd::wire::{
    Command, Errno, FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN,
    FLAG_REQ_ONE, Head, ReplyStyle, Request, block_status,
};
use crate::store::Extent;
use crate::store::uring::Op;
use crate::units::SectorRange;

impl Transmission {
    /// Does a request that came at that time.
    pub(super) fn request(&mut self, request: Request, came: Instant, extended: bool) -> Outcome {
        let begun = self.begun;
        self.came = came;
        let done = self.handle(request, extended);
        // A task is counted when its last part has ended.
        if self.begun == begun {
            self.unsent.push((operation(&request), came));
        }
        done
    }

    fn handle(&mut self, request: Request, extended: bool) -> Outcome {
        let payload = request.payload(extended);
        let allowed = match self.check(&request) {
            Ok(()) if self.hold()? => Ok(()),
            Ok(()) => Err(self.why_given_up()),
            wrong => wrong,
        };
        if let Err(errno) = allowed {
            self.count(&request, errno);
            self.discard_payload(payload)?;
            return self.reply(Reply::Head(Head::error(self.modes.style, &request, errno)));
        }
        self.precedence.asked(&request, self.came);
        match request.command {
            Command::Read => self.read(request),
            Command::Write => self.write(request, Source::Client),
            Command::WriteZeroes => self.write(request, Source::Zeroes),
            Command::Flush => self.flush(request),
            Command::Trim => self.trim(request),
            Command::Cache => {
                let at = self.export.geometry().sectors(request.offset, request.len);
                match at {
                    Ok(at) if !self.store.is_direct() => {
                        let task = self.begin(request, 0);
                        self.start(task, at, 0..0, None, Op::WillNeed)
                    }
                    // There is no cache to read it into.
                    _ => self.reply(Reply::Head(Head::done(self.modes.style, &request))),
                }
            }
            Command::BlockStatus => self.block_status(request),
            Command::Disconnect | Command::Unknown(_) => {
                self.reply(Reply::Head(Head::error(self.modes.style, &request, Errno::Inval)))
            }
        }
    }

    /// Counts what is asked for.
    #[inline]
    pub(super) fn tally(&self, request: &Request) {
        self.client.io().asked(operation(request), bytes(request));
    }

    /// A task for a request.
    pub(super) fn begin(&mut self, request: Request, parts: usize) -> usize {
        self.begun += 1;
        self.tasks.insert(Task::new(request, parts, self.came))
    }

    /// Everything about a request that can be refused before anything is done.
    pub(super) fn check(&self, request: &Request) -> Result<(), Errno> {
        let options = self.export.options();
        let (known, writes) = match request.command {
            Command::Read => (FLAG_DF, false),
            Command::Write => (FLAG_FUA, true),
            Command::WriteZeroes => (FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO, true),
            Command::Trim => (FLAG_FUA, true),
            Command::Flush | Command::Cache => (0, false),
            Command::BlockStatus => (FLAG_REQ_ONE, false),
            Command::Disconnect | Command::Unknown(_) => return Err(Errno::Inval),
        };
        // Under extended headers a write says so; some clients allow themselves FUA on anything.
        let extended = self.modes.style == ReplyStyle::Extended;
        let ignored =
            if extended && request.command == Command::Write { FLAG_PAYLOAD_LEN } else { 0 };
        if request.flags & !(known | ignored | FLAG_FUA) != 0 {
            return Err(Errno::Inval);
        }
        if request.flags & FLAG_DF != 0 && self.modes.style == ReplyStyle::Simple {
            return Err(Errno::Inval);
        }
        if writes && options.read_only {
            return Err(Errno::Perm);
        }
        if request.command == Command::Flush {
            if request.offset != 0 || request.len != 0 {
                return Err(Errno::Inval);
            }
        } else {
            let past_end = if writes && request.command != Command::Trim {
                Errno::NoSpc
            } else {
                Errno::Inval
            };
            self.export.geometry().sectors(request.offset, request.len).map_err(|_| past_end)?;
        }
        let data = matches!(request.command, Command::Read | Command::Write);
        if data && request.len > MAX_REQUEST {
            return Err(Errno::Overflow);
        }
        if request.flags & FLAG_DF != 0 && !self.fits_one_part(request) {
            return Err(Errno::Overflow);
        }
        if request.flags & FLAG_FAST_ZERO != 0 {
            // Zeroes have to be encrypted and written: never faster than a write.
            return Err(Errno::NotSup);
        }
        if request.command == Command::Trim && !options.trim {
            return Err(Errno::Inval);
        }
        if request.command == Command::BlockStatus
            && (self.modes.base_allocation.is_none() || request.len == 0)
        {
            return Err(Errno::Inval);
        }
        Ok(())
    }

    pub(super) fn flush(&mut self, request: Request) -> Outcome {
        if self.export.options().read_only {
            return self.reply(Reply::Head(Head::done(self.modes.style, &request)));
        }
        if self.client.is_kernel() && self.export.unflushed().is_told() {
            error!(
                volume = self.export.name(),
                "what was written before the last start may be lost"
            );
            return self.refuse_with(&request, Errno::Io);
        }
        let Ok(nothing) = self.export.geometry().sectors(0, 0) else {
            return Err(TransmissionError::CutReply);
        };
        let task = self.begin(request, 0);
        self.start(task, nothing, 0..0, None, Op::Flush)
    }

    pub(super) fn block_status(&mut self, request: Request) -> Outcome {
        let most = if request.flags & FLAG_REQ_ONE != 0 { 1 } else { MOST_EXTENTS };
        let geometry = self.export.geometry();
        // A length of 32 bits has to hold each run.
        let limit = match self.modes.style {
            ReplyStyle::Extended => u64::MAX,
            ReplyStyle::Simple | ReplyStyle::Structured => u64::from(u32::MAX) & !4095,
        };
        let at = geometry
            .sectors(request.offset, request.len.min(limit))
            .unwrap_or_else(|_| unreachable!("checked before"));
        let runs = match self.extents(at, most)? {
            None => return self.refuse(&request),
            Some(Ok(extents)) => extents,
            Some(Err(error)) => {
                let errno = self.store_failed("extents", at, &error);
                self.count(&request, errno);
                return self.reply(Reply::Head(Head::error(self.modes.style, &request, errno)));
            }
        };
        let told = told(&runs, request.offset - at.offset(), request.len.min(limit));
        let context = self.modes.base_allocation.unwrap_or_default();
        self.reply(Reply::Body(block_status(self.modes.style, &request, context, &told)))
    }

    pub(super) fn fits_one_part(&self, request: &Request) -> bool {
        let at = self.export.geometry().sectors(request.offset, request.len);
        at.is_ok_and(|at| at.len() <= MAX_BUFFER as u64)
    }

    pub(super) fn sector(&self) -> u64 {
        self.export.geometry().sector_size().bytes_u64()
    }

    /// Answers that it is not done, because the fence has closed or service ends.
    pub(super) fn refuse(&mut self, request: &Request) -> Outcome {
        self.refuse_with(request, self.why_given_up())
    }

    fn refuse_with(&mut self, request: &Request, errno: Errno) -> Outcome {
        self.count(request, errno);
        self.reply(Reply::Head(Head::error(self.modes.style, request, errno)))
    }

    pub(super) fn why_given_up(&self) -> Errno {
        if self.export.is_stopping() { Errno::Shutdown } else { Errno::Perm }
    }

    pub(super) fn refused(&self, error: EnterError) -> Errno {
        match error {
            EnterError::Fenced(_) => Errno::Perm,
            EnterError::Crypt(error) => {
                error!(volume = self.export.name(), %error, "a connection cannot set up its cipher");
                Errno::NoMem
            }
        }
    }

    pub(super) fn store_failed(
        &self,
        doing: &'static str,
        at: SectorRange,
        error: &io::Error,
    ) -> Errno {
        self.export.count_backing_error();
        error!(
            volume = self.export.name(),
            doing,
            offset = at.offset(),
            len = at.len(),
            %error,
            "the backing store failed"
        );
        if error.kind() == io::ErrorKind::StorageFull { Errno::NoSpc } else { Errno::Io }
    }
}

/// What is told about `asked` bytes, of which the first is `skip` bytes into `runs`.
fn told(runs: &[Extent], mut skip: u64, asked: u64) -> Vec<(u64, bool)> {
    let mut left = asked;
    let mut told = Vec::with_capacity(runs.len());
    for run in runs {
        let len = run.len.saturating_sub(skip).min(left);
        skip = skip.saturating_sub(run.len);
        left -= len;
        if len > 0 {
            told.push((len, run.allocated));
        }
    }
    if told.is_empty() {
        // Few runs, and smaller than a sector. An answer has to say something, and this is never wrong.
        told.push((asked, true));
    }
    told
}

/// Bytes that a request is counted as.
pub(super) fn bytes(request: &Request) -> u64 {
    match operation(request) {
        IoOperation::Read | IoOperation::Write | IoOperation::Trim | IoOperation::Zero => {
            request.len
        }
        IoOperation::Flush | IoOperation::Other => 0,
    }
}

/// What a request is counted as.
pub(super) fn operation(request: &Request) -> IoOperation {
    match request.command {
        Command::Read => IoOperation::Read,
        Command::Write => IoOperation::Write,
        Command::Flush => IoOperation::Flush,
        Command::Trim => IoOperation::Trim,
        Command::WriteZeroes => IoOperation::Zero,
        Command::Cache | Command::BlockStatus | Command::Disconnect | Command::Unknown(_) => {
            IoOperation::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_status_says_something_of_what_was_asked_for_and_no_more() {
        let hole = Extent { len: 1024, allocated: false };
        let data = Extent { len: 8192, allocated: true };
        assert_eq!(told(&[hole, data], 0, 4096), [(1024, false), (3072, true)]);
        assert_eq!(told(&[data, hole], 512, 9000), [(7680, true), (1024, false)]);
        assert_eq!(told(&[hole], 2048, 512), [(512, true)], "a run that ends before it");
    }
}
