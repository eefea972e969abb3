//! One of an export's connections, as its export and its own thread know it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, recv, shutdown};

use crate::export::Connected;
use crate::metrics::io::{IoCounters, IoTotals};

/// The peer sends no more; nix has no name for it.
pub(crate) const HANG_UP: PollFlags = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);

/// What an export knows of one of its connections.
pub(crate) struct Client {
    socket: OwnedFd,
    waker: EventFd,
    /// It may begin what its peer sends; before, it only waits for what others left.
    begun: AtomicBool,
    /// It waits for its peer and holds no plaintext.
    idle: AtomicBool,
    /// The closings of the fence after which it has held no plaintext from before.
    clean_after: AtomicU64,
    pid: Option<i32>,
    /// The kernel's own client: it can be handed from one daemon to the next.
    kernel: bool,
    /// It is to stop between two requests, and leave its socket as it is.
    handing_over: AtomicBool,
    failed: AtomicU64,
    io: IoCounters,
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerKind {
    /// A process, here or elsewhere.
    Program,
    /// The kernel's NBD client, by a socketpair.
    Kernel,
}

impl Client {
    /// A connection that has begun nothing and holds nothing from before the `closings`-th closing of
    /// the fence.
    ///
    /// # Errors
    /// There are no more descriptors to be had.
    pub(crate) fn new(socket: BorrowedFd<'_>, kind: PeerKind, closings: u64) -> io::Result<Self> {
        let pid = match kind {
            // It calls itself what it was made by, which is us.
            PeerKind::Kernel => Some(0),
            PeerKind::Program => getsockopt(&socket, PeerCredentials).ok().map(|peer| peer.pid()),
        };
        Ok(Self {
            socket: socket.try_clone_to_owned()?,
            waker: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            begun: AtomicBool::new(false),
            idle: AtomicBool::new(true),
            clean_after: AtomicU64::new(closings),
            pid,
            kernel: kind == PeerKind::Kernel,
            handing_over: AtomicBool::new(false),
            failed: AtomicU64::new(0),
            io: IoCounters::default(),
        })
    }

    /// To people.
    pub(super) fn told(&self) -> Connected {
        Connected { pid: self.pid, failed: self.failed() }
    }

    /// Its requests that failed by a fence or by the backing store.
    pub(super) fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    pub(super) fn count_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Has it stop between two requests.
    pub(super) fn hand_over(&self) {
        self.handing_over.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// What it counts; for its own thread, and the one beside it, alone.
    #[inline]
    pub(crate) fn io(&self) -> &IoCounters {
        &self.io
    }

    /// Interrupts its wait for the backing store.
    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then it is awake already.
        let _woken = self.waker.write(1);
    }

    pub(super) fn shut(&self, how: Shutdown) {
        // The socket may be gone already, which is what is wanted.
        let _shut = shutdown(self.socket.as_raw_fd(), how);
    }

    /// Whether its peer sends no more.
    pub(crate) fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), HANG_UP)];
        poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].any() != Some(false)
    }

    /// Its requests that are not answered yet.
    pub(super) fn in_flight(&self) -> u64 {
        let mut totals = IoTotals::default();
        totals.add(&self.io);
        totals.in_flight()
    }

    /// Whether its peer has gone, and it may still do something that it was sent. It says that it is
    /// busy before it receives anything, and the kernel's looks only then whether its peer has gone;
    /// here it is looked at the other way round: so none begins anything later.
    pub(super) fn is_left_behind(&self) -> bool {
        let may_do = || {
            !self.kernel && self.has_unread()
                || !self.idle.load(Ordering::SeqCst)
                || self.in_flight() > 0
        };
        self.has_hung_up() && self.begun.load(Ordering::SeqCst) && may_do()
    }

    /// Ends what its own thread may wait for: that its peer takes what it has asked for, and it sends
    /// nothing more. What is in the store goes on.
    pub(super) fn shut_if_left_behind(&self) {
        if self.is_left_behind() {
            self.shut(Shutdown::Both);
        }
    }

    /// Whether its peer has gone, and it may do what it was sent when it begins. The kernel's does not.
    pub(super) fn may_begin_late(&self) -> bool {
        !self.kernel && self.has_hung_up() && !self.begun.load(Ordering::SeqCst)
    }

    /// Whether there is something from its peer that it has not received.
    fn has_unread(&self) -> bool {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.socket.as_raw_fd(), &mut [0], peek).is_ok_and(|length| length > 0)
    }

    pub(super) fn is_clean(&self, closings: u64) -> bool {
        self.idle.load(Ordering::SeqCst) || self.clean_after.load(Ordering::SeqCst) >= closings
    }

    pub(crate) fn is_kernel(&self) -> bool {
        self.kernel
    }

    pub(crate) fn is_handing_over(&self) -> bool {
        self.handing_over.load(Ordering::SeqCst)
    }

    pub(crate) fn waker(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }

    /// Takes a wake-up.
    pub(crate) fn awake(&self) {
        // EAGAIN: somebody woke it for nothing.
        let _count = self.waker.read();
    }

    /// From here on it does what its peer sends.
    pub(crate) fn begins(&self) {
        self.set_idle(false);
        self.begun.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// It has wiped what it held and waits for its peer.
    pub(crate) fn set_idle(&self, idle: bool) {
        self.idle.store(idle, Ordering::SeqCst);
        // Before anything that is looked at next.
        fence(Ordering::SeqCst);
    }

    /// It holds no plaintext from before the fence closed for the `closings`-th time.
    pub(crate) fn clean(&self, closings: u64) {
        self.clean_after.store(closings, Ordering::SeqCst);
    }
}
