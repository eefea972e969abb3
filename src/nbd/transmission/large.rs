//! Large pieces of data: whether one is left to the thread beside the connection's own, and how it goes
//! on with what that has done.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tracing::debug;

use crate::buffer::{Ciphertext, Plaintext};
use crate::nbd::transmission::aside::{Aside, Done, End, Hand, Work};
use crate::nbd::transmission::retry::Later;
use crate::nbd::transmission::{Data, Outcome, Part, Transmission};
use crate::store::uring::{Completion, Op};
use crate::store::{Durability, Speed};
use crate::turns;
use crate::units::SectorRange;

/// Bytes from which a piece is large: to hand it to another thread costs little beside doing it
/// (`docs/PERFORMANCE.md`).
const fn large(speed: Speed) -> u64 {
    match speed {
        Speed::Immediate => 128 << 10,
        // It comes back to be written.
        Speed::Queued => 256 << 10,
    }
}

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
        BULKY.load(Ordering::Relaxed) * 2 <= turns::processors()
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        BULKY.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Transmission {
    /// Whether a read is [left](Transmission::leave) to the thread beside this one.
    pub(super) fn leaves_read(&mut self, at: SectorRange) -> bool {
        self.is_large(at) && self.has_more() && self.aside_has_room()
    }

    /// Leaves a write to the thread beside this one, or gives the plaintext back.
    pub(super) fn leave_write(
        &mut self,
        task: usize,
        at: SectorRange,
        plain: Plaintext,
        durability: Durability,
    ) -> Result<(), Plaintext> {
        let goes_on = self.is_large(at) && (self.pipelines || self.has_several());
        let refused = self.tasks.expect(task).answered;
        if !goes_on || refused || !self.aside_has_room() {
            return Err(plain);
        }
        // Whoever has to wait for other writers holds nothing in the clear meanwhile.
        let Ok(claim) = self.lane.begin(at) else { return Err(plain) };
        self.tasks.expect(task).parts += 1;
        let part = Part::write(task, at, plain.bytes().len(), durability);
        match self.store.speed() {
            Speed::Immediate => self.leave(part, Work::Write(plain, durability, claim)),
            Speed::Queued => {
                self.leave(Part { claim: Some(claim), ..part }, Work::Encrypt(plain));
            }
        }
        Ok(())
    }

    /// Whether a piece is one for the thread beside this one; notes those who move such pieces.
    fn is_large(&mut self, at: SectorRange) -> bool {
        let is_large = self.is_of_size(at) && !self.precedence.stands_back();
        if is_large {
            self.bulk.get_or_insert_with(Bulk::begins);
        }
        is_large && Bulk::have_two_each()
    }

    fn is_of_size(&self, at: SectorRange) -> bool {
        at.len() >= large(self.store.speed())
    }

    /// Whether the client has sent more than what is being looked at: there is something to do here
    /// meanwhile.
    fn has_more(&self) -> bool {
        !self.inbox.bytes().is_empty() || self.stream.is_readable()
    }

    /// Whether the client has more under way than what is being looked at.
    fn has_several(&self) -> bool {
        self.parts.len() > 0 || self.has_more()
    }

    /// Whether the thread beside this one takes one more; starts it if there is none.
    fn aside_has_room(&mut self) -> bool {
        if self.aside.is_none()
            && let Err(error) = self.start_aside()
        {
            debug!(%error, "large pieces have no thread of their own");
        }
        self.aside.as_ref().is_some_and(Aside::has_room)
    }

    fn start_aside(&mut self) -> io::Result<()> {
        // To wait for it.
        self.need_ring()?;
        let hand = Hand {
            gate: self.export.gatekeeper().gate(),
            store: Arc::clone(&self.store),
            lane: Arc::clone(&self.lane),
            client: Arc::clone(&self.client),
        };
        self.aside = Some(Aside::new(hand)?);
        Ok(())
    }

    /// Leaves a part to the thread beside this one, which has room.
    pub(super) fn leave(&mut self, part: Part, work: Work) {
        let at = part.at;
        let token = self.parts.insert(part);
        let aside = self.aside.as_mut().expect("whoever leaves it something has looked for room");
        aside.push(token, at, work);
    }

    /// Notes, before a large write to a store in memory is answered, whether its client waits for that.
    pub(super) fn note_pipelining(&mut self, at: SectorRange) {
        if self.is_of_size(at) {
            self.pipelines = self.has_several();
        }
    }

    /// Goes on with what the thread beside this one has done.
    pub(super) fn take_done(&mut self) -> Outcome {
        let done = self.aside.as_mut().map(Aside::take).unwrap_or_default();
        if done.is_empty() {
            return Ok(());
        }
        self.go_on_with(done)?;
        // Somebody in there may have waited for the key, and taken the wake-up.
        self.notice_fence()
    }

    /// The same, once it has nothing more in hand: nor is there anything in the clear with it then.
    pub(super) fn take_all_done(&mut self) -> Outcome {
        let done = self.aside.as_mut().map(Aside::take_all);
        self.go_on_with(done.unwrap_or_default())
    }

    fn go_on_with(&mut self, mut done: Vec<Done>) -> Outcome {
        // What was decrypted first: the others may have to wait for the key.
        done.sort_by_key(|done| matches!(done.end, End::Refused(..) | End::Sealed(_)));
        let mut taken = Ok(());
        for Done { token, end } in done {
            let Some(part) = self.parts.remove(token) else { continue };
            if taken.is_err() {
                // The connection ends: nothing more comes of it, but all of it is accounted for.
                self.tasks.expect(task_of(&part)).answered = true;
            }
            taken = taken.and(self.go_on(part, end));
        }
        taken
    }

    fn go_on(&mut self, part: Part, end: End) -> Outcome {
        let ended = |result, data| Completion { token: 0, result, buffer: Some(data) };
        match end {
            End::Read(plain) => self.has_read(part, plain),
            End::Sealed(data) => self.finish(part, ended(Ok(()), data)),
            End::Written(data) => {
                self.note_pipelining(part.at);
                self.finish(part, ended(Ok(()), data))
            }
            End::Encrypted(data) => self.write_encrypted(part, data),
            End::Refused(plain, claim) => {
                self.write_after_all(Part { claim: claim.or(part.claim), ..part }, plain)
            }
            End::Failed(error, data, claim) => {
                self.finish(Part { claim, ..part }, ended(Err(error), data))
            }
        }
    }

    /// A part was read and decrypted.
    fn has_read(&mut self, part: Part, plain: Plaintext) -> Outcome {
        let task = task_of(&part);
        let data = Data { plain, wanted: part.wanted, held: part.held };
        if self.tasks.expect(task).answered {
            self.drop_data(vec![Some(data)]);
            return self.part_ended(task, Ok(()));
        }
        self.data_ready(task, part.at, data)
    }

    /// A part was encrypted, and goes to the store, which is not waited for: others that have come back with
    /// it may be in the clear.
    fn write_encrypted(&mut self, part: Part, data: Ciphertext) -> Outcome {
        let op = Op::Write(data, part.durability);
        if self.is_answered(&part) {
            return self.abandon(part, op);
        }
        if self.ring.as_ref().is_some_and(|ring| !ring.has_room()) {
            self.later.push(Later { due: Instant::now(), part, op });
            return Ok(());
        }
        self.submit(part, op)?;
        // It may be long until the ring is looked at again.
        Ok(self.submit_queued()?)
    }

    /// The fence was closed before a part was encrypted: it is done here, if it is to be done at all.
    fn write_after_all(&mut self, part: Part, plain: Plaintext) -> Outcome {
        let (task, at) = (task_of(&part), part.at);
        let sealed = if self.tasks.expect(task).answered {
            self.pool.give_plaintext(plain);
            self.release(part.held);
            Ok(Err(self.why_given_up()))
        } else {
            let sealed = self.sealed(plain, at, part.held);
            sealed.map(|sealed| sealed.map_err(|error| self.refused(error)))
        };
        let refused = match sealed {
            Ok(Ok(data)) => return self.write_encrypted(part, data),
            Ok(Err(errno)) => Ok(errno),
            Err(broken) => Err(broken),
        };
        if let Some(claim) = part.claim {
            self.lane.end(claim);
        }
        self.part_ended(task, Err(refused?))
    }
}

fn task_of(part: &Part) -> usize {
    part.task.expect("only parts of tasks are left to another thread")
}
