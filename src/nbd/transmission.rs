//! One connection's transmission phase: read requests, do them, reply.
//!
//! One thread per connection runs this from beginning to end: it takes whatever requests have
//! arrived, does those that memory answers at once, hands the others to its ring, and sends the
//! replies that are ready in one gather. It waits in exactly three places: for the peer with nothing
//! in flight (idle, all plaintext wiped), for the ring (woken by completions, its socket, or the
//! fence), and for the peer to take replies.
//!
//! A request larger than [`MAX_BUFFER`] is done in parts; a `Task` counts its parts down. A write
//! that does not cover whole sectors is a read-modify-write under [`Lane::partial`].

use std::collections::VecDeque;
use std::io;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tracing::{debug, error, warn};

use crate::buffer::{Buffer, Ciphertext, MAX_BUFFER, Plaintext, Pool};
use crate::device::{Claim, Lane};
use crate::export::{Budget, Client, Export};
use crate::fence::{EnterError, Gate};
use crate::nbd::stream::NbdStream;
use crate::nbd::wire::{
    BadMagic, Chunk, Command, Errno, FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE,
    FLAG_PAYLOAD_LEN, FLAG_REQ_ONE, Head, ReplyStyle, Request, block_status,
};
use crate::store::uring::{Completion, Op, Ring};
use crate::store::{Durability, Speed};
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
}

impl Task {
    fn new(request: Request, parts: usize) -> Self {
        Self { request, parts, errno: None, answered: false, whole: Vec::new() }
    }
}

/// Bytes that were asked for, in the buffer that they were read with.
struct Data {
    plain: Plaintext,
    wanted: Range<usize>,
    held: usize,
}

/// One part of a task that the ring has.
struct Part {
    task: usize,
    at: SectorRange,
    /// For a read: the bytes asked for, within the sectors read.
    wanted: Range<usize>,
    claim: Option<Claim>,
    held: usize,
    /// Its task was given up, and the export counts it.
    orphan: bool,
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
    ended: Vec<Completion>,
    tasks: Slab<Task>,
    parts: Slab<Part>,
    held: usize,
    from_budget: usize,
    closings: u64,
    watch: u8,
    timeout_set: bool,
    /// The client sends no more.
    at_end: bool,
}

impl Transmission {
    pub(crate) fn new(
        stream: NbdStream,
        export: Arc<Export>,
        client: Arc<Client>,
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
            ended: Vec::new(),
            tasks: Slab::default(),
            parts: Slab::default(),
            held: 0,
            from_budget: 0,
            closings,
            watch: 0,
            timeout_set: false,
            at_end: false,
            export,
        }
    }

    /// Serves requests until the client leaves, the export stops, or the stream breaks.
    ///
    /// # Errors
    /// The connection broke.
    pub fn run(&mut self) -> Outcome {
        self.stream.tune()?;
        self.stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        let result = self.serve();
        self.wind_down();
        result
    }

    fn serve(&mut self) -> Outcome {
        let extended = self.modes.style == ReplyStyle::Extended;
        let mut batch = 0;
        loop {
            while let Some((request, len)) = Request::parse(self.inbox.bytes(), extended)? {
                self.inbox.consume(len);
                batch += 1;
                if request.command == Command::Disconnect {
                    self.settle()?;
                    return self.send();
                }
                self.request(request, extended)?;
            }
            if self.tasks_in_flight() {
                self.send()?;
                self.wait_for_ring()?;
                if self.receive_more()? {
                    self.watch = WATCH_CREDIT;
                }
            } else {
                self.send()?;
                self.notice_fence()?;
                let pipelined = batch > 1;
                batch = 0;
                // A client that pipelines has more on its way: its buffers need not be wiped yet.
                if pipelined && self.receive_more()? {
                    continue;
                }
                if !self.receive_idle()? {
                    return Ok(());
                }
            }
        }
    }

    /// Finishes with the backing store when the client is gone. What the kernel still has is
    /// counted as orphaned, so that nothing new overtakes it.
    fn wind_down(&mut self) {
        self.outbox.clear();
        self.pool.trim();
        self.inbox.wipe();
        self.orphan_parts();
        self.tasks.iter_mut().for_each(|task| task.answered = true);
        self.client.set_idle(true);
        self.at_end = true;
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

    // ---- receiving ----

    /// Waits for the client with nothing in flight and nothing to send; `false` when it has left.
    fn receive_idle(&mut self) -> Outcome<bool> {
        self.pool.wipe();
        self.inbox.wipe();
        self.note_closing();
        if !self.timeout_set {
            self.stream.set_read_timeout(Some(IDLE_TRIM))?;
            self.timeout_set = true;
        }
        self.client.set_idle(true);
        let received = loop {
            match self.inbox.fill(|to| self.stream.read(to)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.pool.trim();
                    self.inbox.shrink();
                    self.ring = None;
                    self.stream.set_read_timeout(None)?;
                    self.timeout_set = false;
                }
                other => break other,
            }
        };
        self.client.set_idle(false);
        Ok(received? > 0)
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
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives exactly `to`, from what has arrived and then from the socket; meanwhile what is in
    /// flight goes on.
    fn receive_exact(&mut self, to: &mut [u8]) -> Outcome {
        let mut got = self.inbox.take(to);
        while got < to.len() {
            match self.stream.try_read(&mut to[got..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.send()?;
                    if self.tasks_in_flight() {
                        self.watch = WATCH_CREDIT;
                        self.wait_for_ring()?;
                    } else {
                        match self.stream.read(&mut to[got..]) {
                            Ok(0) => {
                                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                            }
                            Ok(n) => got += n,
                            // Only the idle limit: a slow sender is not an error.
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                            Err(error) => return Err(error.into()),
                        }
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn discard_payload(&mut self, mut left: u64) -> Outcome {
        let mut scratch = self.pool.take(64 << 10).map_err(io::Error::from)?;
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(usize::MAX).min(scratch.len());
            self.receive_exact(&mut scratch.bytes_mut()[..now])?;
            left -= now as u64;
        }
        self.pool.give_plaintext(Plaintext::new(scratch));
        Ok(())
    }

    // ---- requests ----

    fn request(&mut self, request: Request, extended: bool) -> Outcome {
        let payload = request.payload(extended);
        let allowed = self.check(&request);
        if let Err(errno) = allowed {
            self.discard_payload(payload)?;
            return self.reply(Reply::Head(Head::error(self.modes.style, &request, errno)));
        }
        match request.command {
            Command::Read => self.read(request),
            Command::Write => self.write(request, Source::Client),
            Command::WriteZeroes => self.write(request, Source::Zeroes),
            Command::Flush => self.flush(request),
            Command::Trim => self.trim(request),
            Command::Cache => {
                if let Ok(at) = self.export.geometry().sectors(request.offset, request.len) {
                    self.export.backing().will_need(at);
                }
                self.reply(Reply::Head(Head::done(self.modes.style, &request)))
            }
            Command::BlockStatus => self.block_status(request),
            Command::Disconnect | Command::Unknown(_) => {
                self.reply(Reply::Head(Head::error(self.modes.style, &request, Errno::Inval)))
            }
        }
    }

    /// Everything that can be refused before anything is done.
    fn check(&self, request: &Request) -> Result<(), Errno> {
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
        if self.export.is_stopping() {
            return Err(Errno::Shutdown);
        }
        self.export.gatekeeper().check().map_err(|_| Errno::Perm)
    }

    fn read(&mut self, request: Request) -> Outcome {
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
        let task = self.tasks.insert(Task::new(request, 1));
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
    fn read_whole(&mut self, request: Request) -> Outcome {
        self.settle()?;
        self.send()?;
        let covered = self.export.geometry().sectors(request.offset, request.len);
        let total = covered.map(|at| index(at.len())).unwrap_or(usize::MAX);
        if !self.budget.take(total) {
            return self.read_in_order(request);
        }
        self.from_budget += total;
        self.held += total;
        let mut left = total;
        let mut task = Task::new(request, 1);
        task.whole.resize_with(total.div_ceil(MAX_BUFFER), || None);
        let task = self.tasks.insert(task);
        for (offset, len) in read_parts(request.offset, request.len, self.sector()) {
            if self.tasks.get(task).is_some_and(|t| t.errno.is_some()) {
                break;
            }
            let Ok(at) = self.export.geometry().sectors(offset, len) else { continue };
            let buffer = self.pool.take(index(at.len())).map_err(io::Error::from)?;
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
    fn read_in_order(&mut self, request: Request) -> Outcome {
        self.settle()?;
        self.send()?;
        let mut first = true;
        for (offset, len) in read_parts(request.offset, request.len, self.sector()) {
            let Ok(at) = self.export.geometry().sectors(offset, len) else { continue };
            match self.read_now(at) {
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
                    let head = Head::error(self.modes.style, &request, errno);
                    return self.reply(Reply::Head(head));
                }
                Err(_) => return Err(TransmissionError::CutReply),
            }
        }
        Ok(())
    }

    /// Reads and decrypts, waiting for it. Nothing else is in flight.
    fn read_now(&mut self, at: SectorRange) -> Result<(Plaintext, usize), Errno> {
        let buffer = self.take(at).map_err(|_| Errno::NoMem)?;
        let held = buffer.len();
        match self.export.backing().read(at, buffer) {
            Ok(data) => match unseal(&self.gate, data, at) {
                Ok(plain) => Ok((plain, held)),
                Err((error, data)) => {
                    self.give_back(data.into_buffer(), held);
                    Err(self.refused(error))
                }
            },
            Err((error, buffer)) => {
                self.give_back(buffer, held);
                Err(self.store_failed("read", at, &error))
            }
        }
    }

    fn write(&mut self, request: Request, source: Source) -> Outcome {
        let task = self.tasks.insert(Task::new(request, 1));
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

    fn write_sectors(
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
                let received = &self.inbox.bytes()[..held];
                let sealed = match self.gate.enter() {
                    Ok(pass) => Ok(pass.seal_from(received, buffer, at)),
                    Err(error) => Err((error, buffer)),
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
                self.seal(plain, at, held)
            }
            Source::Zeroes => {
                buffer.bytes_mut().fill(0);
                self.seal(Plaintext::new(buffer), at, held)
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

    fn seal(
        &mut self,
        plain: Plaintext,
        at: SectorRange,
        held: usize,
    ) -> Result<Ciphertext, EnterError> {
        let sealed = match self.gate.enter() {
            Ok(pass) => Ok(pass.seal(plain, at)),
            Err(error) => Err((error, plain)),
        };
        match sealed {
            Ok(data) => Ok(data),
            Err((error, plain)) => {
                self.pool.give_plaintext(plain);
                self.release(held);
                Err(error)
            }
        }
    }

    /// The right to write `at`, waiting for other writers; `None` when the fence closed or the
    /// export stops meanwhile.
    fn claim(&mut self, at: SectorRange) -> Outcome<Option<Claim>> {
        if let Ok(claim) = self.lane.begin(at) {
            return Ok(Some(claim));
        }
        self.settle()?;
        let export = Arc::clone(&self.export);
        Ok(self.lane.begin_waiting(at, &|| !export.is_serving()).ok())
    }

    /// A read-modify-write of `len` bytes at `offset`, which is at most one part long.
    fn write_partial(
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
        let result = lane.partial(at, &|| !export.is_serving(), || {
            let (mut old, held) = self.read_now(at)?;
            let skip = index(offset - at.offset());
            old.bytes_mut()[skip..skip + index(len)].copy_from_slice(new.bytes());
            let data = self.seal(old, at, held).map_err(|error| self.refused(error))?;
            let written = export.backing().write(at, &data, durability);
            self.give_back(data.into_buffer(), held);
            written.map_err(|error| self.store_failed("write", at, &error))
        });
        self.pool.give_plaintext(new);
        Ok(result.unwrap_or_else(|_| Err(self.why_given_up())))
    }

    fn flush(&mut self, request: Request) -> Outcome {
        if self.export.options().read_only {
            return self.reply(Reply::Head(Head::done(self.modes.style, &request)));
        }
        let Ok(nothing) = self.export.geometry().sectors(0, 0) else {
            return Err(TransmissionError::CutReply);
        };
        let task = self.tasks.insert(Task::new(request, 0));
        self.start(task, nothing, 0..0, None, Op::Flush)
    }

    fn trim(&mut self, request: Request) -> Outcome {
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
                        Head::error(self.modes.style, &request, errno)
                    }
                };
                self.reply(Reply::Head(head))
            }
            None => {
                let errno = self.why_given_up();
                self.reply(Reply::Head(Head::error(self.modes.style, &request, errno)))
            }
        }
    }

    fn block_status(&mut self, request: Request) -> Outcome {
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
        let runs = match self.export.backing().extents(at, most) {
            Ok(extents) => extents,
            Err(error) => {
                let errno = self.store_failed("extents", at, &error);
                return self.reply(Reply::Head(Head::error(self.modes.style, &request, errno)));
            }
        };
        let mut skip = request.offset - at.offset();
        let mut left = request.len.min(limit);
        let mut told = Vec::with_capacity(runs.len());
        for run in runs {
            let len = run.len.saturating_sub(skip).min(left);
            skip = skip.saturating_sub(run.len);
            left -= len;
            if len > 0 {
                told.push((len, run.allocated));
            }
        }
        let context = self.modes.base_allocation.unwrap_or_default();
        self.reply(Reply::Body(block_status(self.modes.style, &request, context, &told)))
    }

    // ---- parts of tasks ----

    /// Starts one part of a task: at once where the store answers from memory, else by the ring.
    fn start(
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
        let part = Part { task, at, wanted, claim, held, orphan: false };
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

    fn start_now(&mut self, part: Part, op: Op) -> Outcome {
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
    fn finish(&mut self, part: Part, ended: Completion) -> Outcome {
        let Part { task, at, wanted, claim, held, orphan } = part;
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
            (Ok(()), Some(data)) if reads && !answered => match unseal(&self.gate, data, at) {
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

    fn data_ready(&mut self, index: usize, at: SectorRange, data: Data) -> Outcome {
        let (style, sector) = (self.modes.style, self.sector());
        let task = self.tasks.expect(index);
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
    fn part_ended(&mut self, index: usize, result: Result<(), Errno>) -> Outcome {
        let task = self.tasks.expect(index);
        task.parts -= 1;
        if let Err(errno) = result {
            task.errno.get_or_insert(errno);
        }
        if task.parts > 0 {
            return Ok(());
        }
        let Some(Task { request, errno, answered, whole, .. }) = self.tasks.remove(index) else {
            return Ok(());
        };
        if answered {
            return Ok(());
        }
        let style = self.modes.style;
        let head = match (errno, request.command) {
            (Some(errno), _) => {
                self.drop_data(whole);
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

    fn drop_data(&mut self, whole: Vec<Option<Data>>) {
        for data in whole.into_iter().flatten() {
            self.pool.give_plaintext(data.plain);
            self.release(data.held);
        }
    }

    fn tasks_in_flight(&self) -> bool {
        self.parts.len() > 0
    }

    /// Waits for the ring: for a completion, the fence, or more from the client where that is worth
    /// watching for.
    fn wait_for_ring(&mut self) -> Outcome {
        let Some(ring) = self.ring.as_mut() else { return Ok(()) };
        let socket = (self.watch > 0 && !self.at_end).then(|| self.stream.as_fd());
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
    fn notice_fence(&mut self) -> Outcome {
        if self.closings == self.export.gatekeeper().closings() {
            return Ok(());
        }
        self.give_up_in_flight()
    }

    /// The fence has closed: whoever waits is told so now. What the kernel has is only waited for.
    fn give_up_in_flight(&mut self) -> Outcome {
        let style = self.modes.style;
        self.orphan_parts();
        let waiting: Vec<Head> = self
            .tasks
            .iter_mut()
            .filter(|task| !task.answered)
            .map(|task| {
                task.answered = true;
                task.errno.get_or_insert(Errno::Perm);
                Head::error(style, &task.request, Errno::Perm)
            })
            .collect();
        let read: Vec<_> =
            self.tasks.iter_mut().flat_map(|task| std::mem::take(&mut task.whole)).collect();
        self.drop_data(read);
        for head in waiting {
            self.reply(Reply::Head(head))?;
        }
        self.send()?;
        self.pool.wipe();
        self.note_closing();
        Ok(())
    }

    /// What the kernel still has of tasks that are given up must not be overtaken by what comes.
    fn orphan_parts(&mut self) {
        let new = self.parts.iter_mut().map(|part| !std::mem::replace(&mut part.orphan, true));
        self.export.orphaned(new.filter(|new| *new).count());
    }

    /// Nothing from before the fence's last closing is held in the clear any more.
    fn note_closing(&mut self) {
        let closings = self.export.gatekeeper().closings();
        if closings != self.closings {
            self.closings = closings;
        }
        self.client.clean(closings);
    }

    /// Finishes everything in flight.
    fn settle(&mut self) -> Outcome {
        while self.tasks_in_flight() {
            self.send()?;
            self.wait_for_ring()?;
        }
        Ok(())
    }

    // ---- memory ----

    /// A buffer for the sectors of `at`, when this connection may hold it.
    fn take(&mut self, at: SectorRange) -> Outcome<Buffer> {
        let len = index(at.len());
        loop {
            if self.held == 0 {
                // Every connection may have one buffer, whatever the others hold.
                break;
            }
            if self.held + len <= HOLD_LIMIT && self.budget.take(len) {
                self.from_budget += len;
                break;
            }
            self.send()?;
            if self.tasks_in_flight() {
                self.wait_for_ring()?;
            }
        }
        self.held += len;
        Ok(self.pool.take(len).map_err(io::Error::from)?)
    }

    fn give_back(&mut self, buffer: Buffer, held: usize) {
        self.pool.give(buffer);
        self.release(held);
    }

    fn release(&mut self, held: usize) {
        self.held -= held;
        let surplus = self.from_budget.saturating_sub(self.held);
        if surplus > 0 {
            self.from_budget -= surplus;
            self.budget.give(surplus);
        }
    }

    // ---- replies ----

    fn reply(&mut self, reply: Reply) -> Outcome {
        self.outbox_bytes += match &reply {
            Reply::Head(_) => 0,
            Reply::Data(_, data) => data.wanted.len(),
            Reply::Body(body) => body.len(),
        };
        self.outbox.push(reply);
        if self.outbox_bytes >= OUTBOX_BYTES || self.outbox.len() >= OUTBOX_REPLIES {
            return self.send();
        }
        Ok(())
    }

    fn send(&mut self) -> Outcome {
        if self.outbox.is_empty() {
            return Ok(());
        }
        // What the ring has not seen yet starts before the peer is waited for.
        if let Some(ring) = self.ring.as_mut() {
            ring.submit()?;
        }
        let mut parts = Vec::with_capacity(self.outbox.len() * 2);
        for reply in &self.outbox {
            match reply {
                Reply::Head(head) => parts.push(IoSlice::new(head.bytes())),
                Reply::Data(head, Data { plain, wanted, .. }) => {
                    parts.push(IoSlice::new(head.bytes()));
                    parts.push(IoSlice::new(&plain.bytes()[wanted.clone()]));
                }
                Reply::Body(body) => parts.push(IoSlice::new(body)),
            }
        }
        let sent = self.stream.write_all_vectored(&mut parts);
        drop(parts);
        self.outbox_bytes = 0;
        let mut outbox = std::mem::take(&mut self.outbox);
        for reply in outbox.drain(..) {
            if let Reply::Data(_, data) = reply {
                self.pool.give_plaintext(data.plain);
                self.release(data.held);
            }
        }
        self.outbox = outbox;
        Ok(sent?)
    }

    // ---- errors ----

    fn fits_one_part(&self, request: &Request) -> bool {
        let at = self.export.geometry().sectors(request.offset, request.len);
        at.is_ok_and(|at| at.len() <= MAX_BUFFER as u64)
    }

    fn sector(&self) -> u64 {
        self.export.geometry().sector_size().bytes_u64()
    }

    fn why_given_up(&self) -> Errno {
        if self.export.is_stopping() { Errno::Shutdown } else { Errno::Perm }
    }

    fn refused(&self, error: EnterError) -> Errno {
        match error {
            EnterError::Fenced(_) => Errno::Perm,
            EnterError::Crypt(error) => {
                error!(volume = self.export.name(), %error, "a connection cannot set up its cipher");
                Errno::NoMem
            }
        }
    }

    fn store_failed(&self, doing: &'static str, at: SectorRange, error: &io::Error) -> Errno {
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

/// Where a write's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Client,
    Zeroes,
}

/// Decrypts what was read, or gives it back as it is.
fn unseal(
    gate: &Gate,
    data: Ciphertext,
    at: SectorRange,
) -> Result<Plaintext, (EnterError, Ciphertext)> {
    match gate.enter() {
        Ok(pass) => Ok(pass.unseal(data, at)),
        Err(error) => Err((error, data)),
    }
}

/// A length within a buffer, which fits memory.
fn index(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Cuts a range into parts whose sectors fit one buffer each; all but the first start at a sector.
fn read_parts(offset: u64, len: u64, sector: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let next = (at - at % sector + MAX_BUFFER as u64).min(end);
        let part = (at, next - at);
        at = next;
        (part.1 > 0).then_some(part)
    })
}

/// Cuts a range into parts that are either whole sectors or within one sector; each fits a buffer.
fn write_parts(offset: u64, len: u64, sector: u64) -> impl Iterator<Item = (u64, u64)> {
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

/// Bytes received and not yet used.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// How far plaintext may reach since the last wipe.
    touched: usize,
}

impl Inbox {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    fn take(&mut self, to: &mut [u8]) -> usize {
        let n = to.len().min(self.end - self.start);
        to[..n].copy_from_slice(&self.bytes[self.start..self.start + n]);
        self.consume(n);
        n
    }

    fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        if self.bytes.is_empty() {
            self.bytes = vec![0; INBOX];
        }
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.bytes.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = read(&mut self.bytes[self.end..])?;
        self.end += n;
        self.touched = self.touched.max(self.end);
        Ok(n)
    }

    /// Wipes what has been used.
    fn wipe(&mut self) {
        use zeroize::Zeroize;
        if self.touched > self.end {
            self.bytes[self.end..self.touched].zeroize();
        }
        if self.start > 0 {
            self.bytes[..self.start].zeroize();
        }
        self.touched = self.end;
    }

    /// Gives its memory back while it is empty.
    fn shrink(&mut self) {
        if self.start == self.end {
            self.wipe();
            *self = Self::default();
        }
    }
}

/// Values by small numbers, reused.
struct Slab<T> {
    slots: Vec<Option<T>>,
    free: VecDeque<usize>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: VecDeque::new() }
    }
}

impl<T> Slab<T> {
    fn insert(&mut self, value: T) -> usize {
        if let Some(index) = self.free.pop_back() {
            self.slots[index] = Some(value);
            return index;
        }
        self.slots.push(Some(value));
        self.slots.len() - 1
    }

    fn get(&self, index: usize) -> Option<&T> {
        self.slots.get(index)?.as_ref()
    }

    fn expect(&mut self, index: usize) -> &mut T {
        self.slots[index].as_mut().expect("a task lives until its last part has ended")
    }

    fn remove(&mut self, index: usize) -> Option<T> {
        let value = self.slots.get_mut(index)?.take();
        if value.is_some() {
            self.free.push_back(index);
        }
        value
    }

    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().flatten()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
