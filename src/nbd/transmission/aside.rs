//! A thread beside a connection's own, for large pieces of data: it encrypts one while the connection
//! receives the next, where with one thread the client waits at a full socket. At stores that answer
//! from memory it writes it as well, and reads and decrypts one while the connection sends the last; at
//! others that is left to the connection and its ring.
//!
//! It has a gate of its own in the fence, as a connection has. What the gate refuses comes back as it
//! is, and the connection deals with it as with its own. Who has to know that it holds nothing in the
//! clear [waits for it](Aside::take_all): at most for three pieces to be copied and encrypted, about a
//! millisecond.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::buffer::{Buffer, Ciphertext, Plaintext};
use crate::device::{Claim, Lane};
use crate::export::Client;
use crate::fence::Gate;
use crate::registers;
use crate::store::{Backing, Durability};
use crate::units::SectorRange;

/// Pieces that it has at a time: one under way, the next, and one that is done and waits to be taken
/// back. Its connection is sooner done with a fourth by itself.
const MOST: usize = 3;

/// It encrypts and makes system calls.
const STACK: usize = 128 << 10;

/// What is to be done with a piece.
pub(super) enum Work {
    /// Read it, and decrypt it.
    Read(Buffer),
    /// Encrypt it, and write it, as this claim allows.
    Write(Plaintext, Durability, Claim),
    /// Encrypt it.
    Encrypt(Plaintext),
}

/// How that ended.
pub(super) enum End {
    /// Read and decrypted.
    Read(Plaintext),
    /// Read, and the gate gave no pass.
    Sealed(Ciphertext),
    /// Encrypted and written; the claim has ended with it.
    Written(Ciphertext),
    /// Encrypted.
    Encrypted(Ciphertext),
    /// The gate gave no pass: it is as it was, and so is the claim to write it, if it came with one.
    Refused(Plaintext, Option<Claim>),
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
    /// `None`: the thread is to end.
    jobs: Option<Sender<Job>>,
    done: Receiver<Done>,
    /// Written to after each that is done, for an owner that waits.
    told: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Pieces that have not come back.
    out: usize,
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
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let told = Arc::new(EventFd::from_flags(flags)?);
        let (jobs, its_jobs) = mpsc::channel();
        let (its_done, done) = mpsc::channel();
        let tells = Arc::clone(&told);
        let thread = std::thread::Builder::new().name("nbd-aside".into()).stack_size(STACK);
        let thread = thread.spawn(move || hand.run(&its_jobs, &its_done, &tells))?;
        Ok(Self { jobs: Some(jobs), done, told, thread: Some(thread), out: 0 })
    }

    /// Whether it takes one more.
    pub(super) fn has_room(&self) -> bool {
        self.out < MOST
    }

    /// Whether there is anything that has not come back.
    pub(super) fn has_any(&self) -> bool {
        self.out > 0
    }

    /// Hands a piece over.
    pub(super) fn push(&mut self, token: usize, at: SectorRange, work: Work) {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(Job { token, at, work }));
        assert!(matches!(sent, Some(Ok(()))), "the thread lives as long as this");
        self.out += 1;
    }

    /// What is done.
    pub(super) fn take(&mut self) -> Vec<Done> {
        if self.out == 0 {
            return Vec::new();
        }
        // What is told of later was taken now, and ends a wait for nothing.
        let _count = self.told.read();
        let done: Vec<_> = self.done.try_iter().collect();
        self.out -= done.len();
        done
    }

    /// All that it has, when that is done: it holds nothing then.
    pub(super) fn take_all(&mut self) -> Vec<Done> {
        self.done.iter().take(std::mem::take(&mut self.out)).collect()
    }

    /// Readable when something is done.
    pub(super) fn told(&self) -> BorrowedFd<'_> {
        self.told.as_fd()
    }
}

impl Hand {
    fn run(&self, jobs: &Receiver<Job>, done: &Sender<Done>, told: &EventFd) {
        for Job { token, at, work } in jobs {
            let end = self.perform(at, work);
            registers::wipe();
            if done.send(Done { token, end }).is_err() {
                // The owner is gone.
                return;
            }
            // It fails only when the counter is full, and then it is readable already.
            let _told = told.write(1);
        }
    }

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
            Work::Encrypt(plain) => match self.encrypt(at, plain) {
                Ok(data) => End::Encrypted(data),
                Err(plain) => End::Refused(plain, None),
            },
            Work::Write(plain, durability, claim) => {
                let data = match self.encrypt(at, plain) {
                    Ok(data) => data,
                    Err(plain) => return End::Refused(plain, Some(claim)),
                };
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

    fn encrypt(&self, at: SectorRange, plain: Plaintext) -> Result<Ciphertext, Plaintext> {
        let Ok(pass) = self.gate.enter() else { return Err(plain) };
        let began = Instant::now();
        let data = pass.seal(plain, at);
        self.client.io().cipher_aside(began.elapsed());
        Ok(data)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.jobs = None;
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
    use crate::key::lease::FenceReason;
    use crate::store::DirectIo;
    use crate::units::{Geometry, SectorSize};
    use crate::volume::tests::key;

    #[test]
    fn what_a_closed_gate_does_not_let_through_comes_back_as_it_was() {
        const LEN: usize = 8192;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("store");
        let file = File::options().create_new(true).read(true).write(true).open(path).unwrap();
        file.set_len(LEN as u64).unwrap();
        let at = Geometry::new(LEN as u64, SectorSize::B4096).sectors(0, LEN as u64).unwrap();
        let store = Backing::open(&file, 0, at, false, DirectIo::Auto).unwrap();
        let fence = Fence::open(key(1)).unwrap();
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
        let End::Refused(back, Some(claim)) = write(plain(4)) else { panic!("it is refused") };
        assert_eq!(back.bytes(), [4; LEN]);
        hand.lane.end(claim);
        let End::Refused(back, None) = hand.perform(at, Work::Encrypt(back)) else {
            panic!("it is not encrypted")
        };
        assert_eq!(back.bytes(), [4; LEN]);
        let End::Sealed(data) = read(Pool::new().take(LEN).unwrap()) else {
            panic!("it is read, and not decrypted")
        };
        assert_eq!(data.bytes(), written, "what was refused was not written");
    }
}
