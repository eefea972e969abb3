//! The parts of requests under way: started, ended, given up when the fence closes.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::buffer::{Ciphertext, MAX_BUFFER};
use crate::device::Claim;
use crate::export::Stance;
use crate::nbd::transmission::aside::{Aside, Work};
use crate::nbd::transmission::requests::operation;
use crate::nbd::transmission::retry::Later;
use crate::nbd::transmission::{Data, Outcome, Part, Reply, Task, Transmission};
use crate::nbd::wire::{Chunk, Command, Errno, Head};
use crate::registers;
use crate::store::uring::{Completion, Op, Ring, Watched};
use crate::store::{Backing, Durability, Speed};
use crate::units::SectorRange;

/// A store that answers within this time is not worth watching the client meanwhile, which costs
/// about a microsecond for each request.
const QUICK: Duration = Duration::from_micros(100);

/// A moment later something that ends is over.
const MOMENT: Duration = Duration::from_millis(1);

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
        let whole = self.tasks.expect(task);
        whole.parts += 1;
        let refused = whole.answered;
        let part = Part::new(Some(task), at, wanted, claim, &op);
        // Refused while something was waited for: the client may have sent the next one by now.
        if refused { self.abandon(part, op) } else { self.submit(part, op) }
    }

    pub(super) fn submit(&mut self, part: Part, op: Op) -> Outcome {
        if self.store.speed() == Speed::Immediate {
            return self.do_now(part, op);
        }
        match self.make_room() {
            // The fence may have closed meanwhile, and the client may have sent the next one by now.
            Ok(true) if !self.is_answered(&part) => {}
            Ok(_) => return self.abandon(part, op),
            Err(error) => {
                self.undo(part, op);
                return Err(error);
            }
        }
        let at = part.at;
        let token = self.parts.insert(part);
        match self.ring.as_mut() {
            Some(ring) => Ok(ring.push(&self.store, op, at, token as u64)?),
            None => Ok(()),
        }
    }

    /// Has a store in memory do it: by a plain call, or beside this thread.
    fn do_now(&mut self, part: Part, op: Op) -> Outcome {
        let at = part.at;
        let writes = match op {
            Op::Read(data) if self.leaves_read(at) => {
                self.leave(part, Work::Read(data.into_buffer()));
                return Ok(());
            }
            Op::Write(..) => true,
            Op::Read(_) | Op::Flush | Op::Discard(_) | Op::WillNeed => false,
        };
        let ended = perform(&self.store, at, op);
        if writes {
            self.note_pipelining(at);
        }
        self.finish(part, ended)
    }

    pub(super) fn is_answered(&self, part: &Part) -> bool {
        part.task.and_then(|task| self.tasks.get(task)).is_some_and(|task| task.answered)
    }

    /// Waits until the ring has room; `false` if the fence has closed and the store keeps what fills
    /// it.
    fn make_room(&mut self) -> Outcome<bool> {
        self.need_ring()?;
        while self.ring.as_ref().is_some_and(|ring| !ring.has_room()) {
            if self.given_up {
                return Ok(false);
            }
            self.send()?;
            self.wait_for_ring()?;
        }
        Ok(true)
    }

    pub(super) fn need_ring(&mut self) -> io::Result<()> {
        if self.ring.is_none() {
            self.ring = Some(Ring::new()?);
        }
        Ok(())
    }

    /// Hands the kernel what the ring has not yet handed it.
    pub(super) fn submit_queued(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), Ring::submit)
    }

    /// A part that the store does not have is not done any more.
    pub(super) fn abandon(&mut self, part: Part, op: Op) -> Outcome {
        let task = part.task;
        self.undo(part, op);
        let errno = self.why_given_up();
        task.map_or(Ok(()), |task| self.part_ended(task, Err(errno)))
    }

    /// Gives back what a part has that the store does not have.
    fn undo(&mut self, part: Part, op: Op) {
        if let Some(claim) = part.claim {
            self.lane.end(claim);
        }
        if let Op::Read(data) | Op::Write(data, _) = op {
            self.give_back(data.into_buffer(), part.held);
        }
    }

    /// One part's I/O has ended.
    pub(super) fn finish(&mut self, part: Part, ended: Completion) -> Outcome {
        let Some(task) = part.task else {
            self.lone_ended(&part, ended);
            return Ok(());
        };
        let answered = self.tasks.expect(task).answered;
        let Some((part, ended)) = self.unless_tried_again(part, ended, answered) else {
            return Ok(());
        };
        let Part { at, wanted, claim, held, orphan, doing, .. } = part;
        if let Some(claim) = claim {
            self.lane.end(claim);
        }
        if orphan {
            self.export.orphan_ended();
        }
        let reads = !wanted.is_empty();
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
                result.map_err(|error| self.store_failed(doing, at, &error))
            }
        };
        if part.then_flush && result.is_ok() && !answered {
            let part = Part::new(Some(task), at, 0..0, None, &Op::Flush);
            if self.store.speed() == Speed::Immediate {
                return self.submit(part, Op::Flush);
            }
            self.later.push(Later { due: Instant::now(), part, op: Op::Flush });
            return Ok(());
        }
        self.part_ended(task, result)
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
        self.parts.len() > 0 || !self.later.is_empty()
    }

    /// Waits for the ring: for a completion or the fence.
    pub(super) fn wait_for_ring(&mut self) -> Outcome {
        self.wait(None, false)
    }

    /// The same, or for more from the client where that is worth watching for. Whoever calls this
    /// takes what has come.
    pub(super) fn wait_and_watch(&mut self) -> Outcome {
        // Who has been told that his request failed may send the next one.
        let aside = self.aside.as_ref().is_some_and(Aside::has_any);
        if aside || self.watch > 0 || self.given_up || self.at_end {
            return self.wait(None, !self.at_end);
        }
        let before = self.parts.len();
        self.wait(Some(Instant::now() + QUICK), false)?;
        if self.parts.len() == before {
            // It takes its time, and nobody else's: the client may have sent more by now.
            self.watch = 1;
        }
        Ok(())
    }

    /// As [`Transmission::wait_for_ring`], and no longer than `until`.
    pub(super) fn wait_until(&mut self, until: Instant) -> Outcome {
        self.wait(Some(until), false)
    }

    /// Goes on with what has ended, without sleeping.
    pub(super) fn take_ended(&mut self) -> Outcome {
        if self.ring.as_mut().is_some_and(Ring::has_ended) {
            return self.wait_until(Instant::now());
        }
        self.submit_queued()?;
        self.notice_fence()?;
        self.take_done()
    }

    fn wait(&mut self, until: Option<Instant>, watches: bool) -> Outcome {
        if self.given_up {
            // It may be long until the store is done, and nobody else wipes meanwhile.
            self.pool.wipe();
            self.inbox.wipe();
        }
        self.need_ring()?;
        let Some(ring) = self.ring.as_mut() else { return Ok(()) };
        let socket = watches.then(|| (Watched::Socket, self.stream.as_fd()));
        let aside = self.aside.as_ref().filter(|aside| aside.has_any());
        let aside = aside.map(|aside| (Watched::Aside, aside.told()));
        let waker = (Watched::Waker, self.client.waker());
        let has_room = ring.has_room();
        let due = self.later.iter().filter(|_| has_room).map(|later| later.due);
        // Nobody wakes it while somebody tries to bring the key back.
        let hold_ends = self.holding.then(|| self.export.hold_ends_in()).flatten();
        let now = Instant::now();
        let hold_ends = hold_ends.map(|left| now + left + MOMENT);
        let timeout = due.chain(until).chain(hold_ends).min();
        let timeout = timeout.map(|due| due.saturating_duration_since(now));
        let mut ended = std::mem::take(&mut self.ended);
        registers::wipe();
        let watched = [socket, aside, Some(waker)].into_iter().flatten();
        let waited = ring.wait(watched, timeout, &mut ended);
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
        if matches!(waited, Ok(true)) {
            self.client.awake();
        }
        // Before anything that it gives up is handed to the store.
        finished = finished.and(self.notice_fence());
        finished = finished.and(self.take_done());
        if !self.later.is_empty() {
            finished = finished.and(self.start_due());
        }
        self.given_up &= self.parts.len() > 0;
        finished?;
        waited?;
        Ok(())
    }

    /// Acts on a fence that has closed since the last look.
    pub(super) fn notice_fence(&mut self) -> Outcome {
        let (stance, closings) = self.export.look();
        let news = closings != self.closings;
        match stance {
            Stance::Serving | Stance::Held if news && self.export.holds() => {
                self.let_go()?;
                // Somebody in there may have waited for what is to be known now.
                self.notice_fence()
            }
            Stance::Serving if news => self.give_up_in_flight(),
            Stance::Serving => {
                self.holding = false;
                Ok(())
            }
            Stance::Held => Ok(()),
            Stance::Refusing if news || self.holding => {
                self.holding = false;
                self.give_up_in_flight()
            }
            Stance::Refusing => Ok(()),
        }
    }

    /// The fence has closed: whoever waits is told so now. What the kernel has is only waited for.
    pub(super) fn give_up_in_flight(&mut self) -> Outcome {
        let style = self.modes.style;
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
        self.take_all_done()?;
        self.orphan_parts();
        for (request, came) in waiting {
            self.count(&request, Errno::Perm);
            self.unsent.extend(came.map(|came| (operation(&request), came)));
            self.reply(Reply::Head(Head::error(style, &request, Errno::Perm)))?;
        }
        for Later { part, op, .. } in std::mem::take(&mut self.later) {
            self.abandon(part, op)?;
        }
        self.send()?;
        self.pool.wipe();
        self.inbox.wipe();
        self.note_closing();
        Ok(())
    }

    /// What the kernel still has of tasks that are given up must not be overtaken by what comes.
    pub(super) fn orphan_parts(&mut self) {
        let new = self.parts.iter_mut().map(|part| !std::mem::replace(&mut part.orphan, true));
        self.export.orphaned(new.filter(|new| *new).count());
        self.given_up = self.parts.len() > 0;
    }

    /// Nothing from before the fence's last closing is held in the clear any more, but for what the
    /// caller has in hand.
    pub(super) fn note_closing(&mut self) {
        self.closings = self.export.gatekeeper().closings();
        if !self.in_hand {
            self.client.clean(self.closings);
        }
    }

    /// The caller has plaintext that nobody else can wipe: if the fence closes now, it is not clean
    /// before [`Transmission::lay_down`]. Where requests are held, so is what a client has sent.
    pub(super) fn take_in_hand(&mut self) {
        self.in_hand = !self.export.holds();
    }

    /// It is wiped, or in the pool.
    pub(super) fn lay_down(&mut self) {
        if !std::mem::take(&mut self.in_hand) {
            return;
        }
        if self.given_up || self.export.gives_up() {
            self.pool.wipe();
        }
        self.client.clean(self.closings);
    }

    /// Finishes everything in flight; `false` if the fence has closed and the store keeps some of
    /// it.
    pub(super) fn settle(&mut self) -> Outcome<bool> {
        while self.tasks_in_flight() {
            if self.given_up {
                return Ok(false);
            }
            self.send()?;
            self.wait_for_ring()?;
        }
        Ok(true)
    }
}

impl Part {
    /// A write that is left to the thread beside the connection's own.
    pub(super) fn write(task: usize, at: SectorRange, held: usize, durability: Durability) -> Self {
        Self { held, durability, ..Self::bare(Some(task), at, "write") }
    }

    pub(super) fn new(
        task: Option<usize>,
        at: SectorRange,
        wanted: Range<usize>,
        claim: Option<Claim>,
        op: &Op,
    ) -> Self {
        let (doing, held, durability) = match op {
            Op::Read(data) => ("read", data.bytes().len(), Durability::Cached),
            Op::Write(data, durability) => ("write", data.bytes().len(), *durability),
            Op::Flush => ("flush", 0, Durability::Cached),
            Op::Discard(durability) => ("discard", 0, *durability),
            Op::WillNeed => ("read ahead", 0, Durability::Cached),
        };
        let then_flush = matches!(op, Op::Discard(Durability::Durable));
        Self { wanted, claim, held, durability, then_flush, ..Self::bare(task, at, doing) }
    }

    fn bare(task: Option<usize>, at: SectorRange, doing: &'static str) -> Self {
        Self {
            task,
            at,
            wanted: 0..0,
            claim: None,
            held: 0,
            orphan: false,
            doing,
            durability: Durability::Cached,
            then_flush: false,
            failures: 0,
        }
    }
}

/// Does it by plain calls: for a store that does not make its caller wait.
pub(super) fn perform(backing: &Backing, at: SectorRange, op: Op) -> Completion {
    let (result, buffer) = match op {
        Op::Read(data) => match backing.read(at, data.into_buffer()) {
            Ok(data) => (Ok(()), Some(data)),
            Err((error, buffer)) => (Err(error), Some(Ciphertext::new(buffer))),
        },
        Op::Write(data, durability) => (backing.write(at, &data, durability), Some(data)),
        Op::Flush => (backing.flush(), None),
        Op::Discard(_) => (backing.discard(at), None),
        Op::WillNeed => (Ok(()), None),
    };
    Completion { token: 0, result, buffer }
}
