//! Large pieces of data on stores that answer from memory: whether one is left to the thread beside
//! the connection's own, and how it goes on with what that has done.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread::available_parallelism;

use crate::buffer::{Buffer, Plaintext};
use crate::nbd::transmission::aside::{Aside, Done, End, Work};
use crate::nbd::transmission::parts::perform;
use crate::nbd::transmission::{Data, Outcome, Part, Transmission};
use crate::store::uring::{Completion, Op};
use crate::store::{Durability, Speed};
use crate::units::SectorRange;

/// Bytes from which a piece is large: what handing it over costs shows no more beside doing it.
const LARGE: u64 = 128 << 10;

/// A connection that moves large pieces, until it waits for its client with nothing to do.
pub(super) struct Bulk(());

/// Those of this process.
static BULKY: AtomicUsize = AtomicUsize::new(0);

impl Bulk {
    fn begins() -> Self {
        BULKY.fetch_add(1, Ordering::Relaxed);
        Self(())
    }

    /// Whether there is a second processor for each of them.
    fn have_two_each() -> bool {
        static CORES: LazyLock<usize> =
            LazyLock::new(|| available_parallelism().map_or(1, |cores| cores.get()));
        BULKY.load(Ordering::Relaxed) * 2 <= *CORES
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        BULKY.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Transmission {
    /// Leaves a read to the thread beside this one, or gives the buffer back.
    pub(super) fn leave_read(&mut self, part: Part, buffer: Buffer) -> Result<(), (Part, Buffer)> {
        if !self.is_for_another(part.at) || !self.has_more() {
            return Err((part, buffer));
        }
        self.leave(part, Work::Read(buffer));
        Ok(())
    }

    /// Leaves a write to the thread beside this one, or gives the plaintext back.
    pub(super) fn leave_write(
        &mut self,
        task: usize,
        at: SectorRange,
        plain: Plaintext,
        durability: Durability,
    ) -> Result<(), Plaintext> {
        let refused = self.tasks.expect(task).answered;
        if refused || !self.is_for_another(at) || !(self.pipelines || self.has_more()) {
            return Err(plain);
        }
        // Whoever has to wait for other writers holds nothing in the clear meanwhile.
        let Ok(claim) = self.lane.begin(at) else { return Err(plain) };
        self.tasks.expect(task).parts += 1;
        let part = Part::write(task, at, claim, plain.bytes().len(), durability);
        self.leave(part, Work::Write(plain, durability));
        Ok(())
    }

    /// Whether a piece is better dealt with beside this thread, if there is something to do here
    /// meanwhile.
    fn is_for_another(&mut self, at: SectorRange) -> bool {
        if at.len() < LARGE
            || self.store.speed() != Speed::Immediate
            || self.precedence.stands_back()
        {
            return false;
        }
        self.bulk.get_or_insert_with(Bulk::begins);
        Bulk::have_two_each() && self.aside_with_room()
    }

    fn aside_with_room(&mut self) -> bool {
        if self.aside.is_none() {
            let gate = self.export.gatekeeper().gate();
            let aside = Aside::new(gate, Arc::clone(&self.store), Arc::clone(&self.client));
            // Where no more threads are to be had, this one does it all.
            self.aside = aside.ok();
        }
        self.aside.as_ref().is_some_and(Aside::has_room)
    }

    /// Whether the client has sent more than what is being looked at.
    fn has_more(&self) -> bool {
        !self.inbox.bytes().is_empty() || self.stream.is_readable()
    }

    fn leave(&mut self, part: Part, work: Work) {
        let at = part.at;
        let token = self.parts.insert(part);
        if let Some(aside) = &mut self.aside {
            aside.push(token, at, work);
        }
    }

    /// Notes, before a large write is answered, whether its client waits for that.
    pub(super) fn note_pipelining(&mut self, at: SectorRange) {
        if at.len() >= LARGE {
            self.pipelines = self.parts.len() > 0 || self.has_more();
        }
    }

    /// Goes on with what the thread beside this one has done.
    pub(super) fn take_done(&mut self) -> Outcome {
        let Some(aside) = &mut self.aside else { return Ok(()) };
        let mut taken = Ok(());
        let mut done = aside.take();
        // What was decrypted first: the others may have to wait for the key.
        done.sort_by_key(|done| matches!(done.end, End::Refused(_) | End::Sealed(_)));
        // All of it is accounted for, also when a reply cannot be sent.
        for Done { token, end } in done {
            if let Some(part) = self.parts.remove(token) {
                taken = taken.and(self.done(part, end));
            }
        }
        taken
    }

    /// The same, once it has nothing more in hand: nor is there anything in the clear with it then.
    pub(super) fn take_all_done(&mut self) -> Outcome {
        if let Some(aside) = &self.aside {
            aside.rest();
        }
        self.take_done()
    }

    fn done(&mut self, part: Part, end: End) -> Outcome {
        let ended = |result, data| Completion { token: 0, result, buffer: Some(data) };
        match end {
            End::Read(plain) => self.has_read(part, plain),
            End::Refused(plain) => self.write_after_all(part, plain),
            End::Sealed(data) => self.finish(part, ended(Ok(()), data)),
            End::Written(data) => {
                self.note_pipelining(part.at);
                self.finish(part, ended(Ok(()), data))
            }
            End::Failed(error, data) => self.finish(part, ended(Err(error), data)),
        }
    }

    /// A part was read and decrypted.
    fn has_read(&mut self, part: Part, plain: Plaintext) -> Outcome {
        let Part { task: Some(task), at, wanted, held, orphan, .. } = part else { return Ok(()) };
        if orphan {
            self.export.orphan_ended();
        }
        let data = Data { plain, wanted, held };
        if self.tasks.expect(task).answered {
            self.drop_data(vec![Some(data)]);
            return self.part_ended(task, Ok(()));
        }
        self.data_ready(task, at, data)
    }

    /// The fence was closed before a part was encrypted: it is done here, if it is to be done at all.
    fn write_after_all(&mut self, part: Part, plain: Plaintext) -> Outcome {
        let Part { task: Some(task), at, held, durability, .. } = part else { return Ok(()) };
        let sealed = if self.tasks.expect(task).answered {
            self.pool.give_plaintext(plain);
            self.release(held);
            Ok(Err(self.why_given_up()))
        } else {
            self.sealed(plain, at, held).map(|sealed| sealed.map_err(|error| self.refused(error)))
        };
        let refused = match sealed {
            Ok(Ok(data)) => {
                let ended = perform(&self.store, at, Op::Write(data, durability));
                return self.finish(part, ended);
            }
            Ok(Err(errno)) => Ok(errno),
            Err(broken) => Err(broken),
        };
        if let Some(claim) = part.claim {
            self.lane.end(claim);
        }
        if part.orphan {
            self.export.orphan_ended();
        }
        self.part_ended(task, Err(refused?))
    }
}
