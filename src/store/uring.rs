//! A ring of one connection: backing I/O in flight, each with its buffer, and what its owner waits
//! for besides: its socket, its waker, and the thread beside its own.
//!
//! The ring owns a buffer from submission to completion, so whatever happens to the request or its
//! client, the kernel never writes to memory that is used for something else. An operation whose
//! request was given up (the fence closed, the backing store hangs) stays until the kernel is done;
//! dropping the ring waits for all of them. Partial transfers are resubmitted for the rest.

#![expect(unsafe_code, reason = "the kernel uses buffers that the ring's slots own")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::libc;

use crate::buffer::Ciphertext;
use crate::store::{Backing, Durability};
use crate::units::SectorRange;

/// Entries of a ring. Chosen by the queue depth that clients use (128 for the kernel's client); more
/// requests than it takes wait in the socket.
const ENTRIES: u32 = 128;

/// What ends a wait besides an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    /// The client sends more.
    Socket,
    /// Somebody wants the connection to look around.
    Waker,
    /// The thread beside the connection's own has something done.
    Aside,
}

impl Watched {
    const ALL: [Self; 3] = [Self::Socket, Self::Waker, Self::Aside];

    /// Unlike the index of any slot.
    fn tag(self) -> u64 {
        u64::MAX - self as u64
    }
}

/// What to do with the sectors of a range.
pub enum Op {
    /// Read them into this buffer.
    Read(Ciphertext),
    /// Write this buffer to them.
    Write(Ciphertext, Durability),
    /// Put everything written so far on stable storage; the range says nothing.
    Flush,
    /// Give their blocks back; whoever wants that on stable storage flushes afterwards.
    Discard(Durability),
    /// They will be read soon. Advice: failure means nothing.
    WillNeed,
}

/// One operation has ended.
pub struct Completion {
    /// The number its owner gave it.
    pub token: u64,
    /// How it ended.
    pub result: io::Result<()>,
    /// Its buffer, if it had one.
    pub buffer: Option<Ciphertext>,
}

struct Slot {
    token: u64,
    op: Op,
    fd: RawFd,
    may_wait: bool,
    position: u64,
    len: u64,
    done: u32,
    retries: u8,
}

/// How often an operation that says EAGAIN or EINTR is tried again before that is its result.
const RETRIES: u8 = 16;

/// See the module's text.
pub struct Ring {
    ring: IoUring,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    in_flight: usize,
    /// By [`Watched`].
    armed: [bool; Watched::ALL.len()],
}

impl Ring {
    /// A ring with nothing in flight.
    ///
    /// # Errors
    /// The kernel gives none: io_uring is disabled (`kernel.io_uring_disabled`), or memory is short.
    pub fn new() -> io::Result<Self> {
        let tuned = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(ENTRIES * 2)
            .dontfork()
            .build(ENTRIES);
        let ring = match tuned {
            Ok(ring) => ring,
            // Kernels before 6.1 do not know all of these.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(ENTRIES)?,
            Err(error) => return Err(error),
        };
        Ok(Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            armed: [false; Watched::ALL.len()],
        })
    }

    /// Operations the kernel has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether another operation fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        // Some entries stay for what is watched.
        self.in_flight + Watched::ALL.len() < ENTRIES as usize
    }

    /// Queues an operation; [`Ring::wait`] or [`Ring::submit`] hands it to the kernel. `backing`
    /// must outlive the ring. `token` comes back with the completion.
    ///
    /// # Errors
    /// There is no room.
    pub fn push(
        &mut self,
        backing: &Backing,
        op: Op,
        at: SectorRange,
        token: u64,
    ) -> io::Result<()> {
        if !self.has_room() {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let len = at.len();
        let slot = Slot {
            token,
            op,
            fd: backing.as_fd().as_raw_fd(),
            may_wait: backing.may_wait(),
            position: backing.position(at),
            len,
            done: 0,
            retries: 0,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[index] = Some(slot);
        self.in_flight += 1;
        self.queue(index)
    }

    fn queue(&mut self, index: usize) -> io::Result<()> {
        let Some(slot) = self.slots[index].as_mut() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let fd = Fd(slot.fd);
        let rest = slot.len - u64::from(slot.done);
        // Buffers are much smaller than what 32 bits count.
        let short = |len: u64| u32::try_from(len).unwrap_or(u32::MAX);
        let end = usize::try_from(slot.len).unwrap_or(usize::MAX);
        let position = slot.position + u64::from(slot.done);
        let skip = slot.done as usize;
        let entry = match &mut slot.op {
            Op::Read(buffer) => {
                let part = &mut buffer.bytes_mut()[skip..end];
                opcode::Read::new(fd, part.as_mut_ptr(), short(part.len() as u64))
                    .offset(position)
                    .build()
            }
            Op::Write(buffer, durability) => {
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::Durable => libc::RWF_DSYNC,
                };
                let part = &buffer.bytes()[skip..end];
                opcode::Write::new(fd, part.as_ptr(), short(part.len() as u64))
                    .offset(position)
                    .rw_flags(flags)
                    .build()
            }
            Op::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Op::Discard(_) => opcode::Fallocate::new(fd, rest)
                .offset(position)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Op::WillNeed => {
                // The kernel counts in 32 bits here, and 0 is all the rest of the file.
                let len = i32::try_from(rest).unwrap_or_default();
                opcode::Fadvise::new(fd, len.into(), libc::POSIX_FADV_WILLNEED)
                    .offset(position)
                    .build()
            }
        };
        let flags = if slot.may_wait { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        self.enqueue(&entry.flags(flags).user_data(index as u64))
    }

    fn enqueue(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the descriptor is the caller's backing or what it watches, which outlive
            // the ring; a buffer named by the entry is owned by its slot until the completion.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Whether something has ended, or the kernel has to go on with it in this thread: the next wait does
    /// that.
    pub fn has_ended(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// Hands what is queued to the kernel without waiting.
    ///
    /// # Errors
    /// The kernel refused the whole call.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter(0, None)
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        let entered = match timeout {
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(want, &args)
            }
            None => self.ring.submit_and_wait(want),
        };
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Hands what is queued to the kernel and waits for a completion, or for one of `watched` to become
    /// readable, each always the same descriptor, or until `timeout`. Completions are added to
    /// `ended`; says whether the waker was written to. Of the others it says nothing: what was watched
    /// for in an earlier wait may end this one.
    ///
    /// # Errors
    /// The kernel refused the whole call.
    pub fn wait<'a>(
        &mut self,
        watched: impl IntoIterator<Item = (Watched, BorrowedFd<'a>)>,
        timeout: Option<Duration>,
        ended: &mut Vec<Completion>,
    ) -> io::Result<bool> {
        for (what, fd) in watched {
            if !self.armed[what as usize] {
                let poll = opcode::PollAdd::new(Fd(fd.as_raw_fd()), libc::POLLIN as u32);
                self.enqueue(&poll.build().user_data(what.tag()))?;
                self.armed[what as usize] = true;
            }
        }
        self.enter(1, timeout)?;
        self.reap(ended)
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) -> io::Result<bool> {
        let mut woken = false;
        let mut again = Vec::new();
        loop {
            let Some(event) = self.ring.completion().next() else { break };
            match Watched::ALL.iter().find(|what| what.tag() == event.user_data()) {
                Some(what) => {
                    self.armed[*what as usize] = false;
                    woken |= *what == Watched::Waker;
                }
                None => self.ended(&event, ended, &mut again),
            }
        }
        for index in again {
            self.queue(index)?;
        }
        Ok(woken)
    }

    fn ended(
        &mut self,
        event: &cqueue::Entry,
        ended: &mut Vec<Completion>,
        again: &mut Vec<usize>,
    ) {
        let Ok(index) = usize::try_from(event.user_data()) else { return };
        let Some(slot) = self.slots.get_mut(index).and_then(Option::as_mut) else { return };
        let transfers = matches!(slot.op, Op::Read(_) | Op::Write(..));
        let result = match u32::try_from(event.result()) {
            Ok(0) if transfers && u64::from(slot.done) < slot.len => {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(n) if transfers => {
                slot.done += n;
                if u64::from(slot.done) < slot.len {
                    again.push(index);
                    return;
                }
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(_) => {
                let errno = -event.result();
                if matches!(errno, libc::EAGAIN | libc::EINTR) && slot.retries < RETRIES {
                    slot.retries += 1;
                    again.push(index);
                    return;
                }
                let cannot = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS);
                let advice =
                    matches!(slot.op, Op::Discard(_)) && cannot || matches!(slot.op, Op::WillNeed);
                if advice { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
            }
        };
        if let Some(slot) = self.slots[index].take() {
            self.free.push(index);
            self.in_flight -= 1;
            let buffer = match slot.op {
                Op::Read(buffer) | Op::Write(buffer, _) => Some(buffer),
                Op::Flush | Op::Discard(_) | Op::WillNeed => None,
            };
            ended.push(Completion { token: slot.token, result, buffer });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while self.in_flight > 0 {
            if self.enter(1, None).is_err() || self.reap(&mut ended).is_err() {
                // The kernel may still write to the buffers: they must never be freed.
                self.slots.drain(..).for_each(std::mem::forget);
                return;
            }
            ended.clear();
        }
    }
}
