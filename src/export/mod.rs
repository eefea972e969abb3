//! What is served: one unlocked volume behind its fence, and the connections that use it.
//!
//! An [`Export`] is made by the daemon at attach and shared by its connections' threads. It starts
//! and ends service for all of them at once: [`Export::close`] closes the fence at once, from
//! whatever thread; [`Export::settle`], [`Export::restore`] and [`Export::stop`] block, within the
//! bounds they name, and are called from threads that may block.
//!
//! | file | what it is |
//! |---|---|
//! | `client.rs` | one connection |
//! | `table.rs` | the names that clients can ask for |

mod client;
mod table;
mod unflushed;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::socket::Shutdown;
use thiserror::Error;
use tracing::{error, info, warn};

use crate::clock;
use crate::crypt::CryptError;
use crate::device::WriteOrder;
use crate::fence::{Fence, KeyDestroyed};
use crate::key::VolumeKey;
use crate::key::lease::{FENCE_MARGIN, FenceReason, UNCONFIRMED};
use crate::metrics::io::IoTotals;
use crate::store::{Backing, DirectIo};
use crate::units::{Geometry, SectorSize, millis};
use crate::volume::{Access, UnlockedVolume, VolumeError};

pub(crate) use client::{Client, HANG_UP, PeerKind};
pub(crate) use table::Budget;
pub use table::ExportTable;
pub use unflushed::Unflushed;

/// How long a connection has, after the fence closed, to answer what it holds and wipe it. Then it
/// is cut off: its client takes no answers. Nothing may be sent later than is promised of a denial
/// that was believed at last.
pub(crate) const QUIESCE: Duration = Duration::from_millis(450);
const _: () = assert!(UNCONFIRMED.as_millis() + QUIESCE.as_millis() < FENCE_MARGIN.as_millis());

/// How long a connection that was cut off has to notice.
const CUT_OFF: Duration = Duration::from_millis(200);

/// How long the backing store may keep operations that were given up before a restore or a new
/// connection is refused.
pub(crate) const ORPHANS: Duration = Duration::from_secs(10);

/// How long whoever has hung up may keep others waiting for replies that it does not take.
const DEAF: Duration = Duration::from_secs(1);

/// How a volume is to be served.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The export's name.
    pub name: String,
    /// Words for `NBD_INFO_DESCRIPTION`.
    pub description: String,
    /// Refuse writes.
    pub read_only: bool,
    /// Offer `NBD_CMD_TRIM` and punch holes.
    pub trim: bool,
    /// Refuse more connections than this, besides those of the kernel's client.
    pub max_connections: usize,
    /// Bypass the page cache where possible.
    pub direct: DirectIo,
    /// How long requests wait for the key when it is denied or the outage allowance is over, before
    /// they fail; `None`: they fail at once.
    pub hold: Option<Duration>,
}

/// Why an export could not be opened or restored.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The backing store cannot be used for I/O.
    #[error("cannot open the backing store for I/O: {0}")]
    Backing(#[source] io::Error),
    /// The cipher cannot be set up.
    #[error(transparent)]
    Crypt(#[from] CryptError),
    /// The key does not belong to the volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The backing store has not ended what was given up when the fence closed.
    #[error("the backing store still holds {0} operations from before the fence; it is stalled")]
    Stalled(usize),
    /// The export is stopping.
    #[error("the export is stopping")]
    Stopping,
}

/// A volume in service.
pub struct Export {
    options: ExportOptions,
    volume: UnlockedVolume,
    backing: Arc<Backing>,
    /// As the kernel's client has it.
    kernel_store: OnceLock<Arc<Backing>>,
    sector_size: SectorSize,
    /// Bytes a client may use; it only grows.
    capacity: AtomicU64,
    fence: Arc<Fence>,
    order: Arc<WriteOrder>,
    clients: Mutex<Vec<Arc<Client>>>,
    changed: Condvar,
    stopping: AtomicBool,
    /// The kernel's connections stop between two requests; changed with `clients` locked.
    handing_over: AtomicBool,
    /// What the kernel's client was told is written may not be.
    unflushed: Arc<Unflushed>,
    orphans: AtomicUsize,
    transition: Mutex<()>,
    /// Milliseconds since boot until which requests wait for a closed fence; 0: they do not.
    held_until: AtomicU64,
    /// Requests that failed by a fence or by the backing store.
    failed: AtomicU64,
    /// Errors of the backing store.
    backing_errors: AtomicU64,
    /// What connections that are gone have asked for.
    past: Mutex<IoTotals>,
}

/// A connection, to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// The process at the other end, if it is on this machine.
    pub pid: Option<i32>,
    /// Requests of this connection that failed by a fence or by the backing store.
    pub failed: u64,
}

/// What becomes of a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stance {
    /// It is done.
    Serving,
    /// It waits for the fence to open.
    Held,
    /// It fails.
    Refusing,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Export {
    /// Puts an unlocked volume into service.
    ///
    /// # Errors
    /// The backing store cannot be opened for I/O, or the cipher not set up.
    pub fn open(
        volume: UnlockedVolume,
        key: VolumeKey,
        options: ExportOptions,
    ) -> Result<Arc<Self>, ExportError> {
        let geometry = volume.geometry();
        let read_only = options.read_only || volume.access() == Access::ReadOnly;
        let probe = geometry.sectors(0, geometry.capacity().min(4096)).unwrap_or_else(|_| {
            unreachable!("the start of a volume lies within it");
        });
        let open = || {
            let read_only = volume.access() == Access::ReadOnly;
            let offset = volume.data_offset();
            Backing::open(volume.file(), offset, probe, read_only, options.direct)
        };
        let backing = volume.take_store().map_or_else(open, Ok).map_err(ExportError::Backing)?;
        let fence = Fence::open(key)?;
        info!(
            volume = options.name,
            direct = backing.is_direct(),
            speed = ?backing.speed(),
            read_only,
            "serving"
        );
        Ok(Arc::new(Self {
            options: ExportOptions { read_only, ..options },
            volume,
            backing: Arc::new(backing),
            kernel_store: OnceLock::new(),
            sector_size: geometry.sector_size(),
            capacity: AtomicU64::new(geometry.capacity()),
            fence,
            order: Arc::default(),
            clients: Mutex::default(),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
            handing_over: AtomicBool::new(false),
            unflushed: Arc::default(),
            orphans: AtomicUsize::new(0),
            transition: Mutex::default(),
            held_until: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            backing_errors: AtomicU64::new(0),
            past: Mutex::default(),
        }))
    }

    /// Closes the fence and waits until that has taken effect: [`Export::close`], then
    /// [`Export::settle`]. Takes less than a second, whatever the backing store does.
    pub fn fence(&self, reason: FenceReason) -> KeyDestroyed {
        let receipt = self.close(reason);
        self.settle();
        receipt
    }

    /// Closes the fence: the key is destroyed when this returns, and every connection hears of it.
    /// Takes microseconds, needs no other thread and waits for nobody's I/O, so that nothing that
    /// stands still elsewhere can make it late.
    ///
    /// With [`ExportOptions::hold`], requests wait instead of failing, without the key and without
    /// any plaintext that was decrypted; what a client has sent and byokd has not taken yet is kept.
    pub fn close(&self, reason: FenceReason) -> KeyDestroyed {
        let receipt = {
            let _one_at_a_time = lock(&self.transition);
            self.set_hold(reason);
            self.fence.close(reason)
        };
        self.each_client(Client::wake);
        receipt
    }

    /// Closes the fence as [`Export::close`] does, and for good: whatever brings a key from here on
    /// finds service ended.
    pub fn close_for_good(&self, reason: FenceReason) -> KeyDestroyed {
        let receipt = {
            let _one_at_a_time = lock(&self.transition);
            self.stopping.store(true, Ordering::Release);
            self.set_hold(reason);
            self.fence.close(reason)
        };
        self.each_client(Client::wake);
        receipt
    }

    /// Waits, after [`Export::close`], until every request in flight has been answered with an
    /// error and no connection holds plaintext from before. A connection whose client takes no
    /// answers is cut off. Blocks for less than a second, whatever the backing store does.
    pub fn settle(&self) {
        let closings = self.fence.closings();
        if self.wait_clients(QUIESCE, |client| client.is_clean(closings)) {
            return;
        }
        self.cut_off();
        if !self.wait_clients(CUT_OFF, |client| client.is_clean(closings)) {
            error!(
                volume = self.name(),
                "the key is destroyed, but a connection still holds what it had decrypted"
            );
        }
    }

    /// Whether no connection holds plaintext from before the fence was closed.
    pub(crate) fn is_settled(&self) -> bool {
        let closings = self.fence.closings();
        lock(&self.clients).iter().all(|client| client.is_clean(closings))
    }

    /// Cuts off the connections that do.
    pub(crate) fn cut_off(&self) {
        let closings = self.fence.closings();
        let clients = lock(&self.clients).clone();
        let held = clients.iter().filter(|client| !client.is_clean(closings));
        let cut = held.map(|client| client.shut(Shutdown::Both)).count();
        warn!(volume = self.name(), connections = cut, "cut off connections that take no answers");
    }

    /// Decides how long requests wait; a fence that was closed already is not held for longer.
    fn set_hold(&self, reason: FenceReason) {
        let held = matches!(reason, FenceReason::Denied | FenceReason::Expired);
        let until = match self.options.hold {
            Some(_) if held && self.fence.is_closed() => return,
            Some(hold) if held => millis(clock::now().0.saturating_add(hold)),
            Some(_) | None => 0,
        };
        self.held_until.store(until, Ordering::Release);
    }

    /// What becomes of requests now, and how often the fence had been closed then. All of it is true
    /// of one moment: a request that waits is never refused because the fence opens meanwhile.
    pub(crate) fn look(&self) -> (Stance, u64) {
        loop {
            let standing = self.fence.standing();
            let stance = if self.is_stopping() {
                Stance::Refusing
            } else if standing.is_closed() {
                if self.hold_ends_in().is_some() { Stance::Held } else { Stance::Refusing }
            } else if self.fence.check().is_ok() {
                Stance::Serving
            } else if self.holds() {
                // Its time is over, and whoever closes it has not got round to that.
                Stance::Held
            } else {
                Stance::Refusing
            };
            if self.fence.standing() == standing {
                return (stance, standing.closings());
            }
        }
    }

    /// What becomes of requests now.
    pub(crate) fn stance(&self) -> Stance {
        self.look().0
    }

    /// Whether requests are made to wait when the key is gone.
    pub(crate) fn holds(&self) -> bool {
        self.options.hold.is_some()
    }

    /// How long the wait still lasts that began when the fence was closed last.
    pub(crate) fn hold_ends_in(&self) -> Option<Duration> {
        let until = Duration::from_millis(self.held_until.load(Ordering::Acquire));
        until.checked_sub(clock::now().0).filter(|left| !left.is_zero())
    }

    /// Whether requests wait for the fence to open.
    pub fn is_held(&self) -> bool {
        self.stance() == Stance::Held
    }

    /// How long requests still wait for the fence to open, if they do.
    pub fn held_for(&self) -> Option<Duration> {
        self.is_held().then(|| self.hold_ends_in().unwrap_or_default())
    }

    /// Makes requests fail whose wait is over. To be called now and then.
    pub fn end_hold(&self) {
        let until = self.held_until.load(Ordering::Acquire);
        let over = self.fence.is_closed() && self.hold_ends_in().is_none();
        // Whoever set another one meanwhile wakes the connections as well.
        if until != 0
            && over
            && self
                .held_until
                .compare_exchange(until, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        {
            self.each_client(Client::wake);
        }
    }

    /// Whether whoever waits for something to happen here does so in vain.
    pub(crate) fn gives_up(&self) -> bool {
        self.stance() == Stance::Refusing
    }

    /// Counts a request that failed by a fence or by the backing store.
    pub(crate) fn count_failed(&self, client: &Client) {
        client.count_failed();
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests that failed by a fence or by the backing store, since the volume was attached.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// What clients have asked for since the volume was attached.
    pub fn io(&self) -> IoTotals {
        let clients = lock(&self.clients);
        let mut totals = *lock(&self.past);
        clients.iter().for_each(|client| totals.add(client.io()));
        totals
    }

    /// Requests that are not answered yet.
    pub fn in_flight(&self) -> u64 {
        lock(&self.clients).iter().map(|client| client.in_flight()).sum()
    }

    /// Counts an error of the backing store.
    pub(crate) fn count_backing_error(&self) {
        self.backing_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Errors of the backing store since the volume was attached.
    pub fn backing_errors(&self) -> u64 {
        self.backing_errors.load(Ordering::Relaxed)
    }

    /// Operations that the backing store has not ended, of those that were given up, and of the
    /// kernel's connections that were.
    pub fn stalled(&self) -> usize {
        self.left_behind(|client| client.is_kernel() && client.is_left_behind())
    }

    /// The connections there are now.
    pub fn connected(&self) -> Vec<Connected> {
        lock(&self.clients).iter().map(|client| client.told()).collect()
    }

    /// Opens a closed fence with the key unwrapped anew, after checking it against the header. The
    /// same connections go on. No key waits for a store: whoever brings one has waited until nothing
    /// is left of what was given up ([`Export::stalled`]).
    ///
    /// # Errors
    /// The key does not fit the volume, or the backing store still holds writes from before the
    /// fence, which could overtake new ones; the fence stays closed.
    pub fn restore(&self, key: VolumeKey) -> Result<(), ExportError> {
        self.volume.verify(&key)?;
        let _one_at_a_time = lock(&self.transition);
        if self.is_stopping() {
            return Err(ExportError::Stopping);
        }
        let left = self.left_behind(|client| client.is_kernel() && client.is_left_behind());
        if left > 0 {
            return Err(ExportError::Stalled(left));
        }
        self.fence.open_again(key)?;
        self.each_client(Client::wake);
        Ok(())
    }

    /// Ends service: new requests are answered `ESHUTDOWN`, those in flight are finished, all
    /// connections end, the key is destroyed, and what was written is flushed. What does not end
    /// `within` the time is cut off. Meanwhile [`Export::fence`] takes effect as ever.
    ///
    /// `destroyed` hears at once that the key is.
    ///
    /// # Errors
    /// The flush failed or did not end in time: what was not flushed by its client may be lost.
    pub fn stop(
        &self,
        reason: FenceReason,
        within: Duration,
        destroyed: impl FnOnce(&KeyDestroyed),
    ) -> io::Result<()> {
        let started = Instant::now();
        {
            // Nothing restores it from here on.
            let _one_at_a_time = lock(&self.transition);
            self.stopping.store(true, Ordering::Release);
        }
        self.each_client(|client| {
            client.shut(Shutdown::Read);
            client.wake();
        });
        if !self.wait_clients(within, |_| false) {
            self.each_client(|client| {
                client.shut(Shutdown::Both);
                client.wake();
            });
        }
        let receipt = {
            let _one_at_a_time = lock(&self.transition);
            self.fence.close(reason)
        };
        destroyed(&receipt);
        // Who waits for a store that hangs has heard of the end, and not of the fence.
        self.each_client(Client::wake);
        self.wait_clients(CUT_OFF, |_| false);
        if self.options.read_only {
            return Ok(());
        }
        let left = within.saturating_sub(started.elapsed()).max(Duration::from_secs(1));
        self.flush_within(left)
    }

    /// Flushes the store; and as the kernel's client has it, which alone says what that one has not been
    /// told: a store tells each open file once.
    fn flush_within(&self, within: Duration) -> io::Result<()> {
        let own = |store: &Backing| store.as_fd().try_clone_to_owned().map(std::fs::File::from);
        let all = own(&self.backing)?;
        let kernel = self.kernel_store.get();
        let apart = kernel.filter(|store| !Arc::ptr_eq(store, &self.backing));
        let apart = apart.map(|store| own(store)).transpose()?;
        let (done, wait) = mpsc::sync_channel(1);
        std::thread::Builder::new().name("flush".into()).spawn(move || {
            let apart = apart.map(|file| file.sync_data());
            let all = all.sync_data();
            let lost = apart.as_ref().map_or(all.is_err(), Result::is_err);
            // Nobody listens any more only if it took too long, which was said there.
            let _sent = done.send((all, lost));
        })?;
        // Past the page cache, what was acknowledged is with the disk, however long that takes.
        let too_long = || (Err(io::ErrorKind::TimedOut.into()), !self.backing.is_direct());
        let (flushed, lost) = wait.recv_timeout(within).unwrap_or_else(|_| too_long());
        if lost && kernel.is_some() {
            self.unflushed.set();
        }
        flushed
    }

    /// Has every connection of the kernel's client stop between two requests, with everything
    /// answered and its socket left open: those that there are, and those whose threads have only been
    /// started. Returns at once; requests go on being answered meanwhile.
    pub fn hand_over(&self) {
        let clients = lock(&self.clients);
        self.handing_over.store(true, Ordering::Relaxed);
        clients.iter().filter(|client| client.is_kernel()).for_each(|client| client.hand_over());
    }

    /// Whether what the kernel's client had written may be lost without its knowing.
    pub fn unflushed(&self) -> &Arc<Unflushed> {
        &self.unflushed
    }

    /// Whether the kernel gave up another of its connections that is not done with what it was sent.
    /// The kernel sends that on its others at once, and what is done of it later could undo what is
    /// written after its copy: they have to end as well. On new connections it waits for that
    /// ([`Export::wait_for_orphans`]).
    pub(crate) fn kernel_gave_up_another(&self, than: &Client) -> bool {
        let clients = lock(&self.clients);
        clients
            .iter()
            .any(|c| c.is_kernel() && !std::ptr::eq(&raw const **c, than) && c.is_left_behind())
    }

    /// Requests of the kernel's client that failed by a fence or by the backing store.
    pub fn failed_in_kernel(&self) -> u64 {
        let clients = lock(&self.clients);
        clients.iter().filter(|c| c.is_kernel()).map(|c| c.failed()).sum()
    }

    /// Whether requests are being served.
    pub fn is_serving(&self) -> bool {
        self.stance() == Stance::Serving
    }

    /// Whether service is ending.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        lock(&self.clients).len()
    }

    /// The export's name.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// How it is served.
    pub fn options(&self) -> &ExportOptions {
        &self.options
    }

    /// The volume's size and sector size.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.capacity.load(Ordering::Relaxed), self.sector_size)
    }

    /// The volume has grown, its store and header included: requests may go as far. Clients that
    /// are connected hear of it by other ways, or when they connect again.
    pub fn grown(&self) {
        self.capacity.fetch_max(self.volume.geometry().capacity(), Ordering::Release);
    }

    /// The volume.
    pub fn volume(&self) -> &UnlockedVolume {
        &self.volume
    }

    /// The fence in front of its key.
    pub fn gatekeeper(&self) -> &Arc<Fence> {
        &self.fence
    }

    /// The store, for one client ([`Backing::for_one`]). It may have to wait for the store.
    ///
    /// # Errors
    /// The store cannot be opened again.
    pub(crate) fn store_for_one(&self) -> io::Result<Arc<Backing>> {
        let own = self.backing.for_one()?;
        Ok(own.map_or_else(|| Arc::clone(&self.backing), Arc::new))
    }

    /// Opens the store for the kernel's client. To be called before any of its connections is served:
    /// one that waited for a store that hangs could not be handed over.
    ///
    /// # Errors
    /// The store cannot be opened again.
    pub fn open_for_kernel(&self) -> io::Result<()> {
        if self.kernel_store.get().is_none() {
            // Who was quicker has opened the same.
            let _other = self.kernel_store.set(self.store_for_one()?);
        }
        Ok(())
    }

    /// The store as the kernel's client has it. All its connections are one: it flushes on one what it
    /// wrote on another.
    pub(crate) fn kernel_store(&self) -> &Arc<Backing> {
        self.kernel_store.get().unwrap_or(&self.backing)
    }

    pub(crate) fn write_order(&self) -> &Arc<WriteOrder> {
        &self.order
    }

    fn is_full(&self, clients: &[Arc<Client>]) -> bool {
        clients.iter().filter(|client| !client.is_kernel()).count() >= self.options.max_connections
    }

    /// Whether there are as many connections as there may be, besides the kernel's.
    pub(crate) fn takes_no_more(&self) -> bool {
        self.is_full(&lock(&self.clients))
    }

    /// Registers a connection; `None` when there are too many, or service is ending.
    pub(crate) fn join(
        &self,
        socket: BorrowedFd<'_>,
        kind: PeerKind,
    ) -> io::Result<Option<Arc<Client>>> {
        let client = Arc::new(Client::new(socket, kind, self.fence.closings())?);
        let mut clients = lock(&self.clients);
        // How many the kernel has was decided where its device was made.
        let full = kind == PeerKind::Program && self.is_full(&clients);
        if self.is_stopping() || full {
            return Ok(None);
        }
        if kind == PeerKind::Kernel && self.handing_over.load(Ordering::Relaxed) {
            client.hand_over();
        }
        clients.push(Arc::clone(&client));
        Ok(Some(client))
    }

    pub(crate) fn leave(&self, client: &Arc<Client>) {
        let mut clients = lock(&self.clients);
        // Under one lock: whoever scrapes sees it here or there.
        if clients.iter().any(|c| Arc::ptr_eq(c, client)) {
            lock(&self.past).add(client.io());
        }
        clients.retain(|c| !Arc::ptr_eq(c, client));
        drop(clients);
        self.changed.notify_all();
    }

    /// Operations given up at a fence, or left by a connection that ended, that the kernel still
    /// has.
    pub(crate) fn orphaned(&self, count: usize) {
        self.orphans.fetch_add(count, Ordering::AcqRel);
    }

    pub(crate) fn orphan_ended(&self) {
        self.orphans.fetch_sub(1, Ordering::AcqRel);
        self.changed.notify_all();
    }

    /// Operations that could overtake new ones: those that were given up, and those of clients that
    /// have gone, which their connections may not know yet.
    fn left_behind(&self, mut counts: impl FnMut(&Client) -> bool) -> usize {
        let clients = lock(&self.clients);
        let gone = clients.iter().filter(|client| counts(client));
        let gone: u64 = gone.map(|client| client.in_flight().max(1)).sum();
        let gone = usize::try_from(gone).unwrap_or(usize::MAX);
        self.orphans.load(Ordering::Acquire).saturating_add(gone)
    }

    /// Has `client`, which begins nothing yet, wait until no write from before can overtake a new
    /// one. The kernel's is let in also where all it is told is that it is refused, and is not kept
    /// from being handed over: see [`Client::is_handing_over`]. Says whether it had to wait.
    pub(crate) fn wait_for_orphans(&self, client: &Client) -> Result<bool, ExportError> {
        let since = Instant::now();
        let deadline = since + ORPHANS;
        let mut told = false;
        loop {
            let mut came_before = true;
            let left = self.left_behind(|other| {
                came_before &= !std::ptr::eq(other, client);
                // In this order: it may begin between the two.
                came_before && other.may_begin_late() || other.is_left_behind()
            });
            let now = Instant::now();
            if left == 0 {
                return Ok(told);
            }
            if !std::mem::replace(&mut told, true) {
                info!(
                    volume = self.name(),
                    operations = left,
                    "waiting for what an earlier connection left in the store"
                );
            }
            if now >= deadline || self.is_stopping() {
                return Err(ExportError::Stalled(left));
            }
            // Nothing is begun before a restore, which waits for the same.
            if client.is_kernel() && (self.gives_up() || client.is_handing_over()) {
                return Ok(told);
            }
            if now >= since + DEAF {
                self.each_client(Client::shut_if_left_behind);
            }
            // Counts change without the lock: a short wait covers a notice that was missed.
            let wait = (deadline - now).min(Duration::from_millis(20));
            let clients = lock(&self.clients);
            let _waited = self.changed.wait_timeout(clients, wait);
        }
    }

    fn each_client(&self, act: impl Fn(&Client)) -> usize {
        let clients = lock(&self.clients).clone();
        clients.iter().for_each(|client| act(client));
        clients.len()
    }

    /// Waits until every connection is `done` or gone; `false` if that takes longer.
    fn wait_clients(&self, within: Duration, done: impl Fn(&Client) -> bool) -> bool {
        let deadline = Instant::now() + within;
        let mut clients = lock(&self.clients);
        loop {
            if clients.iter().all(|client| done(client)) {
                return true;
            }
            let now = Instant::now();
            if now >= deadline {
                return false;
            }
            // Connections change their state without the lock: a short wait covers a missed notice.
            let wait = (deadline - now).min(Duration::from_millis(1));
            clients =
                self.changed.wait_timeout(clients, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
