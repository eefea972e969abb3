//! A thread beside a connection's own, for large pieces of data on stores that answer from memory: it
//! encrypts one and writes it, or reads one and decrypts it, while the connection receives the next or
//! sends the last. With one thread the client waits at a full socket meanwhile, or at an empty one.
//!
//! It has a gate of its own in the fence, as a connection has. What the gate refuses comes back as it
//! is, and the connection deals with it as with its own. Who has to know that it holds nothing in the
//! clear [waits for it](Aside::rest): at most for two pieces to be copied and encrypted, about a
//! millisecond.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

use crate::buffer::{Buffer, Ciphertext, Plaintext};
use crate::device::{Claim, Lane};
use crate::export::Client;
use crate::fence::Gate;
use crate::registers;
use crate::store::{Backing, Durability};
use crate::units::SectorRange;

/// Pieces that it has at a time: one under way, and the next. Its connection is sooner done with a third
/// by itself.
const MOST: usize = 2;

/// It encrypts and makes system calls.
const STACK: usize = 128 << 10;

/// What is to be done with a piece.
pub(super) enum Work {
    /// Read it, and decrypt it.
    Read(Buffer),
    /// Encrypt it, and write it, as this claim allows.
    Write(Plaintext, Durability, Claim),
}

/// How that ended.
pub(super) enum End {
    /// Read and decrypted.
    Read(Plaintext),
    /// Read, and the gate gave no pass.
    Sealed(Ciphertext),
    /// Encrypted and written; the claim has ended with it.
    Written(Ciphertext),
    /// The gate gave no pass: it is as it was.
    Refused(Plaintext, Claim),
    /// The store failed at reading it, or at writing it by this claim.
    Failed(io::Error, Ciphertext, Option<Claim>),
}

/// One piece has been dealt with.
pub(super) struct Done {
    /// The number that its owner gave it.
    pub(super) token: usize,
    pub(super) end: End,
}

/// What it does its work with.
pub(super) struct Hand {
    /// For it alone.
    pub(super) gate: Gate,
    pub(super) store: Arc<Backing>,
    /// Its connection's.
    pub(super) lane: Arc<Lane>,
    pub(super) client: Arc<Client>,
}

/// See the module's text.
pub(super) struct Aside {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Pieces that have not come back.
    out: usize,
}

struct Shared {
    state: Mutex<State>,
    /// There is something to do.
    work: Condvar,
    /// There is nothing to do any more.
    rests: Condvar,
    /// For an owner that waits.
    told: EventFd,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    busy: bool,
    done: Vec<Done>,
    /// The owner waits for what is done.
    awaited: bool,
    /// The owner is gone.
    over: bool,
}

struct Job {
    token: usize,
    at: SectorRange,
    work: Work,
}

impl Aside {
    /// A thread with nothing to do.
    ///
    /// # Errors
    /// No more threads or descriptors are to be had.
    pub(super) fn new(hand: Hand) -> io::Result<Self> {
        let told = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (work, rests) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { state: Mutex::default(), work, rests, told });
        let thread = std::thread::Builder::new().name("nbd-aside".into()).stack_size(STACK);
        let its = Arc::clone(&shared);
        let thread = thread.spawn(move || its.run(&hand))?;
        Ok(Self { shared, thread: Some(thread), out: 0 })
    }

    /// Whether it takes one more.
    pub(super) fn has_room(&self) -> bool {
        let state = self.shared.lock();
        state.queue.len() + usize::from(state.busy) < MOST
    }

    /// Whether there is anything that has not come back.
    pub(super) fn has_any(&self) -> bool {
        self.out > 0
    }

    /// Hands a piece over.
    pub(super) fn push(&mut self, token: usize, at: SectorRange, work: Work) {
        self.out += 1;
        self.shared.lock().queue.push_back(Job { token, at, work });
        self.shared.work.notify_one();
    }

    /// What is done.
    pub(super) fn take(&mut self) -> Vec<Done> {
        if self.out == 0 {
            return Vec::new();
        }
        let done = std::mem::take(&mut self.shared.lock().done);
        self.out -= done.len();
        done
    }

    /// Waits for something to be done, or for `socket` (if given) to become readable, or for `waker`, or
    /// until `timeout`; says whether the waker was written to.
    ///
    /// # Errors
    /// The kernel refused the call.
    pub(super) fn wait(
        &self,
        socket: Option<BorrowedFd<'_>>,
        waker: BorrowedFd<'_>,
        timeout: Option<Duration>,
    ) -> io::Result<bool> {
        let mut state = self.shared.lock();
        state.awaited = state.done.is_empty();
        let timeout = if state.awaited { timeout } else { Some(Duration::ZERO) };
        drop(state);
        let watched = [Some(waker), Some(self.shared.told.as_fd()), socket];
        let mut fds: Vec<_> =
            watched.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let polled = ppoll(&mut fds, timeout.map(TimeSpec::from), None);
        self.shared.lock().awaited = false;
        match polled {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
        let is_ready = |fd: &PollFd<'_>| fd.any() != Some(false);
        if is_ready(&fds[1]) {
            // It fails only where there is nothing to take.
            let _count = self.shared.told.read();
        }
        Ok(is_ready(&fds[0]))
    }

    /// Waits until it has nothing in hand.
    pub(super) fn rest(&self) {
        let mut state = self.shared.lock();
        while state.busy || !state.queue.is_empty() {
            state = self.shared.rests.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process (panic = "abort"); in tests the data is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, hand: &Hand) {
        let mut state = self.lock();
        loop {
            let Some(Job { token, at, work }) = state.queue.pop_front() else {
                if state.over {
                    return;
                }
                self.rests.notify_all();
                registers::wipe();
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.busy = true;
            drop(state);
            let end = hand.perform(at, work);
            state = self.lock();
            state.busy = false;
            state.done.push(Done { token, end });
            if std::mem::take(&mut state.awaited) {
                // It fails only when the counter is full, and then it is readable already.
                let _told = self.told.write(1);
            }
        }
    }
}

impl Hand {
    fn perform(&self, at: SectorRange, work: Work) -> End {
        match work {
            Work::Read(buffer) => {
                let data = match self.store.read(at, buffer) {
                    Ok(data) => data,
                    Err((error, buffer)) => {
                        return End::Failed(error, Ciphertext::new(buffer), None);
                    }
                };
                let Ok(pass) = self.gate.enter() else { return End::Sealed(data) };
                let began = Instant::now();
                let plain = pass.unseal(data, at);
                self.client.io().cipher_aside(began.elapsed());
                End::Read(plain)
            }
            Work::Write(plain, durability, claim) => {
                let Ok(pass) = self.gate.enter() else { return End::Refused(plain, claim) };
                let began = Instant::now();
                let data = pass.seal(plain, at);
                self.client.io().cipher_aside(began.elapsed());
                match self.store.write(at, &data, durability) {
                    Ok(()) => {
                        // Others may wait for that, and the connection for its client.
                        self.lane.end(claim);
                        End::Written(data)
                    }
                    Err(error) => End::Failed(error, data, Some(claim)),
                }
            }
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.lock().over = true;
        self.shared.work.notify_one();
        // If it panicked, that has been said.
        let _ended = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::buffer::Pool;
    use crate::device::WriteOrder;
    use crate::export::PeerKind;
    use crate::fence::Fence;
    use crate::key::VolumeKey;
    use crate::key::lease::FenceReason;
    use crate::key::secret::SecretMemoryError;
    use crate::store::DirectIo;
    use crate::units::{Geometry, SectorSize};

    fn key() -> VolumeKey {
        VolumeKey::init_with(|key| {
            key[..32].fill(1);
            key[32..].fill(2);
            Ok::<_, SecretMemoryError>(())
        })
        .unwrap()
    }

    #[test]
    fn what_a_closed_gate_does_not_let_through_comes_back_as_it_was() {
        const LEN: usize = 8192;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("store");
        let file = File::options().create_new(true).read(true).write(true).open(path).unwrap();
        file.set_len(LEN as u64).unwrap();
        let at = Geometry::new(LEN as u64, SectorSize::B4096).sectors(0, LEN as u64).unwrap();
        let store = Backing::open(&file, 0, at, false, DirectIo::Auto).unwrap();
        let fence = Fence::open(key()).unwrap();
        let lane = Arc::new(Arc::new(WriteOrder::default()).lane());
        let (socket, _peer) = UnixStream::pair().unwrap();
        let client = Arc::new(Client::new(socket.as_fd(), PeerKind::Program, 0).unwrap());
        let hand = Hand { gate: fence.gate(), store: Arc::new(store), lane, client };
        let mut pool = Pool::new();
        let mut plain = |byte| {
            let mut plain = Plaintext::new(pool.take(LEN).unwrap());
            plain.bytes_mut().fill(byte);
            plain
        };
        let write = |plain| {
            let claim = hand.lane.begin(at).unwrap();
            hand.perform(at, Work::Write(plain, Durability::Cached, claim))
        };
        let read = |buffer| hand.perform(at, Work::Read(buffer));
        let End::Written(data) = write(plain(3)) else { panic!("it is written") };
        let written = data.bytes().to_vec();
        assert_ne!(written, [3; LEN], "encrypted");
        let End::Read(back) = read(data.into_buffer()) else { panic!("it is read") };
        assert_eq!(back.bytes(), [3; LEN]);

        let _receipt = fence.close(FenceReason::Denied);
        let End::Refused(back, claim) = write(plain(4)) else { panic!("it is refused") };
        assert_eq!(back.bytes(), [4; LEN]);
        hand.lane.end(claim);
        let End::Sealed(data) = read(Pool::new().take(LEN).unwrap()) else {
            panic!("it is read, and not decrypted")
        };
        assert_eq!(data.bytes(), written, "what was refused was not written");
    }
}
