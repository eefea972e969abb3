//! The parts of requests under way: started, ended, given up when the fence closes.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::buffer::{Ciphertext, MAX_BUFFER};
use crate::device::Claim;
use crate::nbd::transmission::requests::operation;
use crate::nbd::transmission::{Data, Outcome, Part, Reply, Task, Transmission, WATCH_CREDIT};
use crate::nbd::wire::{Chunk, Command, Errno, Head};
use crate::store::uring::{Completion, Op, Ring};
use crate::store::{Durability, Speed};
use crate::units::SectorRange;

impl Transmission {
    /// Starts one part of a task: at once where the store answers from memory, else by the ring.
    pub(super) fn start(
        &mut self,
        task: usize,
        at: SectorRange,
        wanted: Range<usize>,
        claim: Option<Claim>,
        op: Op,
    ) -> Outcome {
        self.tasks.expect(task).parts += 1;
        let held = match &op {
            Op::Read(data) | Op::Write(data, _) => data.bytes().len(),
            Op::Flush | Op::Discard => 0,
        };
        let durability = match &op {
            Op::Write(_, durability) => *durability,
            Op::Read(_) | Op::Flush | Op::Discard => Durability::Cached,
        };
        let part = Part { task, at, wanted, claim, held, orphan: false, durability, failures: 0 };
        self.submit(part, op)
    }

    fn submit(&mut self, part: Part, op: Op) -> Outcome {
        let at = part.at;
        if self.export.backing().speed() == Speed::Immediate {
            return self.start_now(part, op);
        }
        if self.ring.is_none() {
            self.ring = Some(Ring::new()?);
        }
        while self.ring.as_ref().is_some_and(|ring| !ring.has_room()) {
            self.send()?;
            self.wait_for_ring()?;
        }
        let token = self.parts.insert(part);
        match self.ring.as_mut() {
            Some(ring) => Ok(ring.push(self.export.backing(), op, at, token as u64)?),
            None => Ok(()),
        }
    }

    pub(super) fn start_now(&mut self, part: Part, op: Op) -> Outcome {
        let export = Arc::clone(&self.export);
        let (result, buffer) = match op {
            Op::Read(data) => match export.backing().read(part.at, data.into_buffer()) {
                Ok(data) => (Ok(()), Some(data)),
                Err((error, buffer)) => (Err(error), Some(Ciphertext::new(buffer))),
            },
            Op::Write(data, durability) => {
                (export.backing().write(part.at, &data, durability), Some(data))
            }
            Op::Flush => (export.backing().flush(), None),
            Op::Discard => (export.backing().discard(part.at), None),
        };
        self.finish(part, Completion { token: 0, result, buffer })
    }

    /// One part's I/O has ended.
    pub(super) fn finish(&mut self, mut part: Part, ended: Completion) -> Outcome {
        let (ended, again) = self.look_at_failure(&mut part, ended);
        if let Some(op) = again {
            return self.submit(part, op);
        }
        let Part { task, at, wanted, claim, held, orphan, .. } = part;
        let writes = claim.is_some();
        if let Some(claim) = claim {
            self.lane.end(claim);
        }
        if orphan {
            self.export.orphan_ended();
        }
        let reads = !wanted.is_empty();
        let answered = self.tasks.expect(task).answered;
        let result = match (ended.result, ended.buffer) {
            (Ok(()), Some(data)) if reads && !answered => match self.unsealed(data, at)? {
                Ok(plain) => return self.data_ready(task, at, Data { plain, wanted, held }),
                Err((error, data)) => {
                    self.give_back(data.into_buffer(), held);
                    Err(self.refused(error))
                }
            },
            (result, buffer) => {
                if let Some(data) = buffer {
                    self.give_back(data.into_buffer(), held);
                }
                let doing = match (reads, writes) {
                    (true, _) => "read",
                    (_, true) => "write",
                    _ => "flush",
                };
                result.map_err(|error| self.store_failed(doing, at, &error))
            }
        };
        self.part_ended(task, result)
    }

    /// What to try again, if that is worth it.
    fn look_at_failure(&mut self, part: &mut Part, ended: Completion) -> (Completion, Option<Op>) {
        let Completion { token, result: Err(error), buffer: Some(data) } = ended else {
            return (ended, None);
        };
        let given_up = part.orphan || self.tasks.expect(part.task).answered;
        let again = !given_up && self.try_again(&error, part.failures);
        if !again {
            return (Completion { token, result: Err(error), buffer: Some(data) }, None);
        }
        part.failures += 1;
        let op =
            if part.claim.is_some() { Op::Write(data, part.durability) } else { Op::Read(data) };
        (Completion { token, result: Err(error), buffer: None }, Some(op))
    }

    pub(super) fn data_ready(&mut self, index: usize, at: SectorRange, data: Data) -> Outcome {
        let (style, sector) = (self.modes.style, self.sector());
        let task = self.tasks.expect(index);
        if task.again {
            self.drop_data(vec![Some(data)]);
            return self.part_ended(index, Ok(()));
        }
        if !task.whole.is_empty() {
            let first = task.request.offset - task.request.offset % sector;
            let part = (at.offset() - first) / MAX_BUFFER as u64;
            task.whole[usize::try_from(part).unwrap_or_default()] = Some(data);
            return self.part_ended(index, Ok(()));
        }
        let single = task.request.len == data.wanted.len() as u64;
        let last = task.parts == 1 && task.errno.is_none();
        let chunk = if single || last { Chunk::Done } else { Chunk::More };
        if chunk == Chunk::Done {
            task.answered = true;
        }
        let offset = at.offset() + data.wanted.start as u64;
        let head = Head::data(style, chunk, &task.request, offset, data.wanted.len() as u64);
        self.reply(Reply::Data(head, data))?;
        self.part_ended(index, Ok(()))
    }

    /// Counts one part of a task down; with the last one the task is answered.
    pub(super) fn part_ended(&mut self, index: usize, result: Result<(), Errno>) -> Outcome {
        let task = self.tasks.expect(index);
        task.parts -= 1;
        if let Err(errno) = result {
            task.errno.get_or_insert(errno);
        }
        if task.parts > 0 {
            return Ok(());
        }
        let Some(Task { request, errno, answered, whole, again, came, .. }) =
            self.tasks.remove(index)
        else {
            return Ok(());
        };
        match came {
            Some(came) if again && errno.is_none() && !answered => {
                self.again.push((request, came));
                return Ok(());
            }
            Some(came) => self.unsent.push((operation(&request), came)),
            // It was counted when it was given up.
            None => {}
        }
        if answered {
            return Ok(());
        }
        let style = self.modes.style;
        let head = match (errno, request.command) {
            (Some(errno), _) => {
                self.drop_data(whole);
                self.count(&request, errno);
                Head::error(style, &request, errno)
            }
            (None, Command::Read) if !whole.is_empty() => {
                let mut head =
                    Head::data(style, Chunk::Done, &request, request.offset, request.len);
                for data in whole.into_iter().flatten() {
                    self.reply(Reply::Data(std::mem::replace(&mut head, Head::nothing()), data))?;
                }
                return Ok(());
            }
            (None, Command::Read) => Head::end(style, &request),
            (None, _) => Head::done(style, &request),
        };
        self.reply(Reply::Head(head))
    }

    pub(super) fn drop_data(&mut self, whole: Vec<Option<Data>>) {
        for data in whole.into_iter().flatten() {
            self.pool.give_plaintext(data.plain);
            self.release(data.held);
        }
    }

    pub(super) fn tasks_in_flight(&self) -> bool {
        self.parts.len() > 0
    }

    /// Waits for the ring: for a completion, the fence, or more from the client where that is worth
    /// watching for.
    pub(super) fn wait_for_ring(&mut self) -> Outcome {
        if self.given_up {
            // It may be long until the store is done, and nobody else wipes meanwhile.
            self.pool.wipe();
            self.inbox.wipe();
        }
        let Some(ring) = self.ring.as_mut() else { return Ok(()) };
        // Who has been told that his request failed may send the next one.
        let watches = (self.watch > 0 || self.given_up) && !self.at_end;
        let socket = watches.then(|| self.stream.as_fd());
        let mut ended = std::mem::take(&mut self.ended);
        let waited = ring.wait(socket, self.client.waker(), None, &mut ended);
        if self.watch > 0 {
            self.watch -= 1;
        }
        // Every completion is accounted for, also when a reply to one of them cannot be sent.
        let mut finished = Ok(());
        for completion in ended.drain(..) {
            let token = usize::try_from(completion.token).unwrap_or(usize::MAX);
            if let Some(part) = self.parts.remove(token) {
                finished = finished.and(self.finish(part, completion));
            }
        }
        self.ended = ended;
        self.given_up &= self.parts.len() > 0;
        finished?;
        let woken = waited?;
        if woken.waker {
            self.client.awake();
        }
        if woken.socket {
            self.watch = WATCH_CREDIT;
        }
        self.notice_fence()
    }

    /// Acts on a fence that has closed since the last look.
    pub(super) fn notice_fence(&mut self) -> Outcome {
        let held = self.export.is_held();
        if self.holding && !held && self.export.is_serving() {
            self.holding = false;
            self.note_closing();
        }
        let waits_in_vain = self.holding && !held;
        if self.closings == self.export.gatekeeper().closings() && !waits_in_vain {
            return Ok(());
        }
        if held {
            return self.let_go();
        }
        self.holding = false;
        self.give_up_in_flight()
    }

    /// The fence has closed: whoever waits is told so now. What the kernel has is only waited for.
    pub(super) fn give_up_in_flight(&mut self) -> Outcome {
        let style = self.modes.style;
        self.orphan_parts();
        let waiting: Vec<_> = self
            .tasks
            .iter_mut()
            .filter(|task| !task.answered)
            .map(|task| {
                task.answered = true;
                task.errno.get_or_insert(Errno::Perm);
                (task.request, task.came.take())
            })
            .collect();
        let read: Vec<_> =
            self.tasks.iter_mut().flat_map(|task| std::mem::take(&mut task.whole)).collect();
        self.drop_data(read);
        for (request, came) in waiting {
            self.count(&request, Errno::Perm);
            self.unsent.extend(came.map(|came| (operation(&request), came)));
            self.reply(Reply::Head(Head::error(style, &request, Errno::Perm)))?;
        }
        self.send()?;
        self.pool.wipe();
        self.note_closing();
        Ok(())
    }

    /// What the kernel still has of tasks that are given up must not be overtaken by what comes.
    pub(super) fn orphan_parts(&mut self) {
        let new = self.parts.iter_mut().map(|part| !std::mem::replace(&mut part.orphan, true));
        self.export.orphaned(new.filter(|new| *new).count());
        self.given_up = self.parts.len() > 0;
    }

    /// Nothing from before the fence's last closing is held in the clear any more.
    pub(super) fn note_closing(&mut self) {
        let closings = self.export.gatekeeper().closings();
        if closings != self.closings {
            self.closings = closings;
        }
        self.client.clean(closings);
    }

    /// Finishes everything in flight.
    pub(super) fn settle(&mut self) -> Outcome {
        while self.tasks_in_flight() {
            self.send()?;
            self.wait_for_ring()?;
        }
        Ok(())
    }
}
