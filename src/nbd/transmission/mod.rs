//! One connection's transmission phase: read requests, do them, reply.
//!
//! One thread per connection runs this from beginning to end: it takes whatever requests have
//! arrived, does those that memory answers at once, hands the others to its ring, and sends the
//! replies that are ready in one gather. It waits in exactly three places: for the peer with nothing
//! in flight (idle, all plaintext wiped), for what is in flight (woken by completions, its socket, or
//! the fence), and for the peer to take replies. Where there are processors for it, `aside` is a
//! second thread, which large pieces are left to.
//!
//! A request larger than [`MAX_BUFFER`](crate::buffer::MAX_BUFFER) is done in parts; a `Task` counts its parts down. A write
//! that does not cover whole sectors is a read-modify-write under [`Lane::begin_partial`].

mod aside;
mod given_up;
mod handover;
mod hold;
mod inbox;
mod large;
mod lone;
mod parts;
mod precedence;
mod reads;
mod replies;
mod requests;
mod retry;
mod slab;
mod spin;
mod writes;

use std::convert::Infallible;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFlags, PollTimeout};
use thiserror::Error;
use tracing::warn;
use zeroize::Zeroize;

use crate::buffer::{Plaintext, Pool};
use crate::device::{Claim, Lane};
use crate::export::{Budget, Client, Export};
use crate::fence::Gate;
use crate::metrics::io::IoOperation;
use crate::nbd::stream::NbdStream;
use crate::nbd::transmission::aside::Aside;
use crate::nbd::transmission::inbox::Inbox;
use crate::nbd::transmission::large::Bulk;
use crate::nbd::transmission::precedence::Precedence;
use crate::nbd::transmission::retry::Later;
use crate::nbd::transmission::slab::Slab;
use crate::nbd::transmission::spin::Spin;
use crate::nbd::wire::{BadMagic, Command, Errno, Head, ReplyStyle, Request};
use crate::registers;
use crate::store::uring::{Completion, Ring};
use crate::store::{Backing, Durability};
use crate::units::SectorRange;

/// The largest request served and advertised: clients in the wild send 50 MB.
pub const MAX_REQUEST: u64 = 64 << 20;

/// Bytes received ahead: a batch of sixteen 4 KiB writes with their headers.
const INBOX: usize = 68 << 10;

/// Replies are sent when this much has gathered, if not before: what stays in a core's cache.
const OUTBOX_BYTES: usize = 256 << 10;
/// And when this many have gathered.
const OUTBOX_REPLIES: usize = 64;

/// A connection holds at most this much for requests in flight: enough for eight of 1 MiB.
const HOLD_LIMIT: usize = 16 << 20;

/// Idle for this long, a connection gives its memory back.
const IDLE_TRIM: Duration = Duration::from_secs(2);

/// How long a client may take no replies at all before it is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// After a wait that found the client sending more meanwhile, the next waits watch the socket too.
const WATCH_CREDIT: u8 = 64;

/// So much of a payload that has not come is looked for also while something is in flight: the client
/// is in the middle of sending it, and may be waiting for room in its socket.
const LONG_REST: usize = 64 << 10;

/// Extents in one block status reply: bounded work however fragmented the file is.
const MOST_EXTENTS: usize = 4096;

/// What the handshake agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Modes {
    /// Which replies.
    pub style: ReplyStyle,
    /// The id of `base:allocation`, if the client selected it.
    pub base_allocation: Option<u32>,
}

/// How a connection ended, if not by the client's leave.
#[derive(Debug, Error)]
pub enum TransmissionError {
    /// The stream makes no sense any more.
    #[error(transparent)]
    BadMagic(#[from] BadMagic),
    /// The socket or the ring failed.
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    /// A simple reply's data had begun when the rest could not be read: there is no other way to
    /// say so.
    #[error("cannot finish a reply that has begun")]
    CutReply,
}

/// How a connection ended, if nothing was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The client said so.
    Disconnected,
    /// The client closed its socket.
    Closed,
    /// Between two requests, everything answered; the socket is as good as before.
    HandedOver,
}

type Outcome<T = ()> = Result<T, TransmissionError>;

/// One request that is under way.
struct Task {
    request: Request,
    parts: usize,
    errno: Option<Errno>,
    /// The reply has gone out; its parts only have to end.
    answered: bool,
    /// A read whose data goes out whole or not at all: what has been read of it, part by part.
    whole: Vec<Option<Data>>,
    /// What had been read of it was wiped; it is done again from the start.
    again: bool,
    /// When it came; taken when its answer is counted.
    came: Option<Instant>,
}

impl Task {
    fn new(request: Request, parts: usize, came: Instant) -> Self {
        Self {
            request,
            parts,
            errno: None,
            answered: false,
            whole: Vec::new(),
            again: false,
            came: Some(came),
        }
    }
}

/// Bytes that were asked for, in the buffer that they were read with.
struct Data {
    plain: Plaintext,
    wanted: Range<usize>,
    held: usize,
}

/// One part of a task that the store has.
struct Part {
    /// `None`: whoever has it done waits for it.
    task: Option<usize>,
    at: SectorRange,
    /// For a read: the bytes asked for, within the sectors read.
    wanted: Range<usize>,
    claim: Option<Claim>,
    held: usize,
    /// Its task was given up, and the export counts it.
    orphan: bool,
    /// To people.
    doing: &'static str,
    /// For a write.
    durability: Durability,
    /// It counts when a flush has followed.
    then_flush: bool,
    /// How often the store has failed at it.
    failures: u32,
}

enum Reply {
    Head(Head),
    Data(Head, Data),
    Body(Vec<u8>),
}

/// A connection in its transmission phase.
pub struct Transmission {
    stream: NbdStream,
    export: Arc<Export>,
    client: Arc<Client>,
    budget: Arc<Budget>,
    modes: Modes,
    gate: Gate,
    lane: Arc<Lane>,
    pool: Pool,
    inbox: Inbox,
    outbox: Vec<Reply>,
    outbox_bytes: usize,
    ring: Option<Ring>,
    /// Once something was left to it.
    aside: Option<Aside>,
    /// While it moves large pieces.
    bulk: Option<Bulk>,
    /// The client has sent more before a large write was answered.
    pipelines: bool,
    /// After the ring, which uses it to its end.
    store: Arc<Backing>,
    ended: Vec<Completion>,
    tasks: Slab<Task>,
    parts: Slab<Part>,
    /// Parts that go to the store at their time.
    later: Vec<Later>,
    /// What was done alone and has ended.
    lone: Option<Completion>,
    /// A caller has plaintext that only it can wipe.
    in_hand: bool,
    held: usize,
    from_budget: usize,
    closings: u64,
    /// The fence has closed, and what is in flight waits for it to open.
    holding: bool,
    /// Requests to be done again from the start, and when they came.
    again: Vec<(Request, Instant)>,
    /// When what is being looked at was received.
    received: Instant,
    /// When the request that is being looked at came.
    came: Instant,
    /// Tasks that have been begun.
    begun: u64,
    /// Requests whose answers wait to be sent, and when they came.
    unsent: Vec<(IoOperation, Instant)>,
    watch: u8,
    /// The store still has what was given up when the fence closed.
    given_up: bool,
    spin: Spin,
    /// The same for the rest of a payload.
    rest_spin: Spin,
    precedence: Precedence,
    /// It has given back what it does not need while it is idle.
    rested: bool,
    /// The client sends no more.
    at_end: bool,
}

impl Transmission {
    pub(crate) fn new(
        stream: NbdStream,
        export: Arc<Export>,
        client: Arc<Client>,
        store: Arc<Backing>,
        budget: Arc<Budget>,
        modes: Modes,
    ) -> Self {
        let fence = export.gatekeeper();
        let (gate, closings) = (fence.gate(), fence.closings());
        let lane = Arc::new(export.write_order().lane());
        Self {
            stream,
            client,
            budget,
            modes,
            gate,
            lane,
            pool: Pool::new(),
            inbox: Inbox::default(),
            outbox: Vec::with_capacity(OUTBOX_REPLIES + 1),
            outbox_bytes: 0,
            ring: None,
            aside: None,
            bulk: None,
            pipelines: false,
            store,
            ended: Vec::new(),
            tasks: Slab::default(),
            parts: Slab::default(),
            later: Vec::new(),
            lone: None,
            in_hand: false,
            held: 0,
            from_budget: 0,
            closings,
            holding: false,
            again: Vec::new(),
            received: Instant::now(),
            came: Instant::now(),
            begun: 0,
            unsent: Vec::with_capacity(OUTBOX_REPLIES + 1),
            watch: 0,
            given_up: false,
            spin: Spin::default(),
            rest_spin: Spin::default(),
            precedence: Precedence::default(),
            rested: false,
            at_end: false,
            export,
        }
    }

    /// Serves requests until the client leaves, the export stops, or the stream breaks.
    ///
    /// # Errors
    /// The connection broke.
    pub fn run(&mut self) -> Outcome<Ending> {
        self.stream.tune()?;
        self.stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        self.note_closing();
        self.client.begins();
        let result = self.serve();
        self.wind_down();
        result
    }

    fn serve(&mut self) -> Outcome<Ending> {
        let extended = self.modes.style == ReplyStyle::Extended;
        let mut batch = 0;
        loop {
            while let Some((request, came)) = self.again.pop() {
                self.request(request, came, extended)?;
            }
            if let Some(ending) = self.heed_given_up()? {
                return Ok(ending);
            }
            while let Some((request, len)) = Request::parse(self.inbox.bytes(), extended)? {
                self.inbox.consume(len);
                batch += 1;
                if request.command == Command::Disconnect {
                    self.settle()?;
                    self.send()?;
                    return Ok(Ending::Disconnected);
                }
                self.tally(&request);
                self.request(request, self.received, extended)?;
            }
            if self.client.is_handing_over() {
                if self.between_requests()? {
                    return Ok(Ending::HandedOver);
                }
                continue;
            }
            if self.tasks_in_flight() {
                self.send()?;
                self.wait_and_watch()?;
                // Otherwise what has ended is answered first: whoever waits for that sends no more.
                if self.tasks_in_flight() && self.receive_more()? {
                    self.watch = WATCH_CREDIT;
                }
            } else {
                self.send()?;
                self.notice_fence()?;
                if !self.again.is_empty() {
                    continue;
                }
                let pipelined = batch > 1;
                batch = 0;
                // A client that pipelines has more on its way: its buffers need not be wiped yet.
                if pipelined && self.receive_more()? {
                    continue;
                }
                if self.look_for_more()? {
                    continue;
                }
                if !self.receive_idle()? {
                    return Ok(Ending::Closed);
                }
            }
        }
    }

    /// Finishes with the backing store when the client is gone. What the kernel still has is
    /// counted as orphaned, so that nothing new overtakes it.
    fn wind_down(&mut self) {
        self.outbox.clear();
        // What has been read of larger replies, and what nobody looks at any more: the store may take
        // its time.
        for task in self.tasks.iter_mut() {
            task.answered = true;
            task.whole.clear();
        }
        self.inbox = Inbox::default();
        // All of it is answered, so that nothing is sent that could fail.
        let _taken = self.take_all_done();
        self.pool.trim();
        self.orphan_parts();
        self.client.set_idle(true);
        self.at_end = true;
        for Later { part, op, .. } in std::mem::take(&mut self.later) {
            // Nobody is answered any more.
            let _abandoned = self.abandon(part, op);
        }
        while self.tasks_in_flight() {
            if let Err(error) = self.wait_for_ring() {
                // The orphans stay counted: better no restore than a stale write after it.
                warn!(volume = self.export.name(), %error, "lost track of the backing store");
                break;
            }
        }
        self.budget.give(self.from_budget);
        self.from_budget = 0;
    }

    /// Waits for the client with nothing in flight and nothing to send; `false` when it has left.
    fn receive_idle(&mut self) -> Outcome<bool> {
        self.pool.wipe();
        self.inbox.wipe();
        self.bulk = None;
        self.note_closing();
        registers::wipe();
        self.client.set_idle(true);
        let readable = self.may_read();
        // Before anything is received: whoever looks whether it was left behind relies on it.
        self.client.set_idle(false);
        if !readable? {
            return Ok(true);
        }
        self.rested = false;
        match self.inbox.fill(|to| self.stream.try_read(to)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            received => {
                self.received = Instant::now();
                Ok(received? > 0)
            }
        }
    }

    /// Gives back what an idle connection does not need.
    fn idle_for_long(&mut self) {
        self.pool.trim();
        self.inbox.shrink();
        self.ring = None;
        self.aside = None;
        self.rested = true;
    }

    /// Takes what has arrived, without waiting; `false` when there is nothing (or the client has
    /// left, which the next wait will see).
    fn receive_more(&mut self) -> Outcome<bool> {
        match self.inbox.fill(|to| self.stream.try_read(to)) {
            Ok(0) => {
                // Its replies are still sent: it may have closed only one direction.
                self.at_end = true;
                Ok(false)
            }
            Ok(_) => {
                self.received = Instant::now();
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what arrives while waiting without sleeping is worth it; `false` when nothing does.
    fn look_for_more(&mut self) -> Outcome<bool> {
        let mut spin = self.spin;
        let found: Outcome<bool> = spin.until(|| Ok(self.receive_more()? || self.at_end));
        self.spin = spin;
        Ok(found? && !self.at_end)
    }

    /// Looks for the rest of a payload while waiting without sleeping is worth it: clients send a
    /// request's head and its payload by two calls, and a large payload in pieces of what a socket
    /// holds. Whether there is some. Who stands back for others leaves looking to them.
    fn look_for_rest(&mut self) -> bool {
        if self.precedence.stands_back() {
            return false;
        }
        let stream = &self.stream;
        let Ok(found) = self.rest_spin.until(|| Ok::<_, Infallible>(stream.is_readable()));
        found
    }

    /// Receives exactly `to`, from what has arrived and then from the socket; meanwhile what is in
    /// flight goes on. If the fence closes before all is there, `to` is wiped, and the answer is
    /// `false`: the request has been refused, and nothing may come of it.
    fn receive_exact(&mut self, to: &mut [u8]) -> Outcome<bool> {
        let mut got = self.inbox.take(to);
        let mut void = false;
        while got < to.len() {
            let received = match self.stream.try_read(&mut to[got..]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let closings = self.closings;
                    self.take_in_hand();
                    let waited = self.wait_for_more(to.len() - got);
                    void |= self.closings != closings && !self.export.holds();
                    if void {
                        to[..got].zeroize();
                    }
                    self.lay_down();
                    waited?;
                    continue;
                }
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                other => other?,
            };
            got += received;
            if void {
                to[..got].zeroize();
            }
        }
        Ok(!void)
    }

    /// Waits for more of a payload, of which so much has not come, or for whatever else has to be done.
    fn wait_for_more(&mut self, rest: usize) -> Outcome {
        self.send()?;
        let busy = self.tasks_in_flight();
        let found = (rest >= LONG_REST || !busy) && self.look_for_rest();
        match (busy, found) {
            // What has ended meanwhile is not to wait until the client has sent all.
            (true, true) => self.take_ended(),
            (true, false) => {
                self.watch = WATCH_CREDIT;
                self.wait_and_watch()
            }
            (false, true) => self.notice_fence(),
            (false, false) => {
                // A client that is slow to send is not cut off by a fence: it is told like any other.
                self.wait_beside_waker(self.stream.as_fd(), PollFlags::POLLIN, PollTimeout::NONE);
                self.notice_fence()
            }
        }
    }

    fn discard_payload(&mut self, mut left: u64) -> Outcome {
        if left == 0 {
            return Ok(());
        }
        let mut scratch = Plaintext::new(self.pool.take_clean(64 << 10).map_err(io::Error::from)?);
        while left > 0 {
            let to = scratch.bytes_mut();
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(to.len());
            self.receive_exact(&mut to[..now])?;
            // The next piece may be long in coming.
            to[..now].zeroize();
            left -= now as u64;
        }
        self.pool.give_plaintext(scratch);
        Ok(())
    }
}

/// A length within a buffer, which fits memory.
fn index(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::reads::read_parts;
    use super::writes::write_parts;
    use crate::buffer::MAX_BUFFER;

    proptest! {
        #[test]
        fn parts_cover_a_range_and_each_fits_a_buffer(
            offset in 0u64..10_000_000, len in 0u64..70_000_000, small in any::<bool>(),
        ) {
            let sector = if small { 512 } else { 4096 };
            let mut at = offset;
            for (start, part) in write_parts(offset, len, sector) {
                prop_assert_eq!(start, at);
                prop_assert!(part > 0);
                let covered = (start + part).div_ceil(sector) * sector - start / sector * sector;
                prop_assert!(covered <= MAX_BUFFER as u64);
                let whole = start % sector == 0 && part % sector == 0;
                prop_assert!(whole || covered == sector, "only single sectors are partial");
                at += part;
            }
            prop_assert_eq!(at, offset + len);
            let read: u64 = read_parts(offset, len, sector).map(|(_, part)| part).sum();
            prop_assert_eq!(read, len);
        }
    }
}
