//! The fence: the one place where the data's way meets the key's way.
//!
//! A [`Fence`] keeps a volume's key. Each connection has a [`Gate`] of its own, with a keyed cipher
//! behind it; [`Gate::enter`] gives a [`Pass`] for one synchronous call of the cipher. Closing the
//! fence takes the cipher out of every gate and destroys the key and all round keys; since a pass
//! never lives across a system call, closing waits for microseconds of arithmetic, never for a disk
//! or a peer, and a connection whose backing store hangs cannot hold the key back.
//!
//! ```text
//!   open ──close()──> closed ──open_again(key)──> open
//!                        └── every enter() is refused with the FenceReason
//! ```
//!
//! Besides, the fence knows until when the lease lasts if nothing more is heard
//! ([`Fence::serve_until`]), and is as good as closed after that: a machine that slept serves
//! nothing when it wakes, before anybody has had the time to close the fence.
//!
//! The lock in a gate is its connection's own. Nobody else takes it but the one who closes, so on
//! the data path it is an uncontended exchange on a private cache line.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use thiserror::Error;

use crate::buffer::{Buffer, Ciphertext, Plaintext};
use crate::clock;
use crate::crypt::awslc::Xts;
use crate::crypt::{CryptError, Engine};
use crate::key::VolumeKey;
use crate::key::lease::{FenceReason, Moment};
use crate::key::secret::SecretArena;
use crate::units::{SectorRange, millis};

/// The fence is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the volume is fenced: {}", .0.explain())]
pub struct Fenced(pub FenceReason);

/// Why a gate gives no pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EnterError {
    /// The fence is closed.
    #[error(transparent)]
    Fenced(#[from] Fenced),
    /// The fence is open, but this gate could not set up its cipher.
    #[error(transparent)]
    Crypt(#[from] CryptError),
}

/// The receipt of a closed fence: made only where the key, and every cipher keyed with it, has been
/// dropped and wiped.
#[derive(Debug)]
#[must_use = "it is the proof that the key is gone"]
pub struct KeyDestroyed {
    first: bool,
}

impl KeyDestroyed {
    /// Whether this is the closing that destroyed it; it had gone already with the others. Of all
    /// receipts for one key one says so, whoever closes the fence at the same time.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.first
    }
}

struct Custody {
    key: VolumeKey,
    arena: Arc<SecretArena>,
    /// Ciphers of gates that are gone, for gates to come: contexts are never freed one by one.
    spare: Vec<Xts>,
}

/// How the fence stands at one moment: a count of its closings and openings, and why it is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Odd while it is closed.
    turns: u64,
    reason: FenceReason,
}

impl Standing {
    const OPEN: Self = Self { turns: 0, reason: FenceReason::Stopping };

    fn of(word: u64) -> Self {
        let reason = usize::try_from(word & REASON).ok().and_then(|i| FenceReason::ALL.get(i));
        Self {
            turns: word >> REASON_BITS,
            reason: reason.copied().unwrap_or(FenceReason::Stopping),
        }
    }

    fn word(self) -> u64 {
        let index = FenceReason::ALL.iter().position(|r| *r == self.reason).unwrap_or_default();
        self.turns << REASON_BITS | index as u64
    }

    fn closed(self, reason: FenceReason) -> Self {
        Self { turns: self.turns | 1, reason }
    }

    fn opened(self) -> Self {
        Self { turns: self.turns.next_multiple_of(2), ..self }
    }

    /// Whether it has been closed, not whether its time is over.
    pub(crate) fn is_closed(self) -> bool {
        self.turns % 2 == 1
    }

    /// How often it has been closed.
    pub(crate) fn closings(self) -> u64 {
        self.turns.div_ceil(2)
    }
}

const REASON_BITS: u32 = 8;
const REASON: u64 = (1 << REASON_BITS) - 1;

/// The lease has no end of its own.
const FOR_EVER: u64 = u64::MAX;

/// A volume's key behind a gate per connection.
pub struct Fence {
    /// A [`Standing`] in one word, so that one look sees all of it; it changes under `custody`'s lock.
    standing: AtomicU64,
    /// Milliseconds since boot, or [`FOR_EVER`].
    until: AtomicU64,
    custody: Mutex<Option<Custody>>,
    gates: Mutex<Vec<Weak<Slot>>>,
}

/// A gate's cipher; alone on its cache line.
#[repr(align(128))]
#[derive(Default)]
struct Slot(Mutex<Option<Xts>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic ends the process (panic = "abort"); in tests the data is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fence {
    /// An open fence around `key`.
    ///
    /// # Errors
    /// The key cannot be used, or there is no secret memory: told now rather than to the first
    /// connection.
    pub fn open(key: VolumeKey) -> Result<Arc<Self>, CryptError> {
        Ok(Arc::new(Self {
            standing: AtomicU64::new(Standing::OPEN.word()),
            until: AtomicU64::new(FOR_EVER),
            custody: Mutex::new(Some(Custody::new(key)?)),
            gates: Mutex::default(),
        }))
    }

    /// A gate for one connection.
    pub fn gate(self: &Arc<Self>) -> Gate {
        let slot = Arc::new(Slot::default());
        let mut gates = lock(&self.gates);
        gates.retain(|g| g.strong_count() > 0);
        gates.push(Arc::downgrade(&slot));
        Gate { fence: Arc::clone(self), slot }
    }

    /// Ends service at `until` if the fence has not been closed by then; `None`: never.
    pub fn serve_until(&self, until: Option<Moment>) {
        let until = until.map_or(FOR_EVER, |until| millis(until.0));
        self.until.store(until, Ordering::Release);
    }

    /// `Err` if the lease has run out and nobody has closed the fence yet.
    #[inline]
    fn check_time(&self) -> Result<(), Fenced> {
        let until = self.until.load(Ordering::Acquire);
        if until != FOR_EVER && millis(clock::now().0) > until {
            return Err(Fenced(FenceReason::Expired));
        }
        Ok(())
    }

    /// `Err` with the reason if the fence is closed. The proof is [`Gate::enter`].
    ///
    /// # Errors
    /// The fence is closed.
    #[inline]
    pub fn check(&self) -> Result<(), Fenced> {
        let standing = self.standing();
        if standing.is_closed() { Err(Fenced(standing.reason)) } else { self.check_time() }
    }

    /// How it stands.
    pub(crate) fn standing(&self) -> Standing {
        Standing::of(self.standing.load(Ordering::Acquire))
    }

    /// Whether it has been closed, not whether its time is over.
    pub fn is_closed(&self) -> bool {
        self.standing().is_closed()
    }

    /// How often it has been closed, so that a connection notices one it slept through.
    pub fn closings(&self) -> u64 {
        self.standing().closings()
    }

    /// Closes the fence and destroys the key: every later [`Gate::enter`] is refused, and when this
    /// returns no copy of the key or its round keys is left. Waits for at most the cipher calls that
    /// have begun. Closing a closed fence changes its reason only.
    pub fn close(&self, reason: FenceReason) -> KeyDestroyed {
        let mut custody = lock(&self.custody);
        self.standing.store(self.standing().closed(reason).word(), Ordering::Release);
        // From here no gate can be keyed; one that is just being keyed still holds its slot's lock.
        let key = custody.take();
        let first = key.is_some();
        drop(key);
        drop(custody);
        let gates: Vec<_> = lock(&self.gates).iter().filter_map(Weak::upgrade).collect();
        for slot in gates {
            drop(lock(&slot.0).take());
        }
        KeyDestroyed { first }
    }

    /// Opens a closed fence with the key unwrapped anew. The caller has checked the key against the
    /// header. Gates key themselves at their next [`Gate::enter`].
    ///
    /// # Errors
    /// The key cannot be used, or there is no secret memory; the fence stays closed.
    pub fn open_again(&self, key: VolumeKey) -> Result<(), CryptError> {
        let new = Custody::new(key)?;
        let mut custody = lock(&self.custody);
        *custody = Some(new);
        self.standing.store(self.standing().opened().word(), Ordering::Release);
        Ok(())
    }
}

impl Custody {
    fn new(key: VolumeKey) -> Result<Self, CryptError> {
        let arena = Arc::new(SecretArena::new());
        let spare = vec![Xts::new(&key, &arena)?];
        Ok(Self { key, arena, spare })
    }
}

/// One connection's way to the cipher.
pub struct Gate {
    fence: Arc<Fence>,
    slot: Arc<Slot>,
}

/// Permission for one call of the cipher. It must not live across an await or a system call.
pub struct Pass<'a> {
    cipher: MutexGuard<'a, Option<Xts>>,
}

impl Gate {
    /// Asks for a pass.
    ///
    /// # Errors
    /// The fence is closed, or the cipher could not be set up.
    #[inline]
    pub fn enter(&self) -> Result<Pass<'_>, EnterError> {
        let mut cipher = lock(&self.slot.0);
        // Who closes it may have to wait for this lock again and again.
        self.fence.check()?;
        if cipher.is_none() {
            *cipher = Some(self.key_cipher()?);
        }
        Ok(Pass { cipher })
    }

    /// The fence this gate is in.
    #[must_use]
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    #[cold]
    fn key_cipher(&self) -> Result<Xts, EnterError> {
        let mut custody = lock(&self.fence.custody);
        let Some(custody) = custody.as_mut() else {
            self.fence.check()?;
            return Err(Fenced(FenceReason::Stopping).into());
        };
        match custody.spare.pop() {
            Some(cipher) => Ok(cipher),
            None => Ok(Xts::new(&custody.key, &custody.arena)?),
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // Whoever closes the fence waits for the slot, until the cipher is where it belongs.
        let mut slot = lock(&self.slot.0);
        let Some(cipher) = slot.take() else { return };
        let mut custody = lock(&self.fence.custody);
        // If the fence has closed and opened since, the cipher is another key's and must not be
        // handed on.
        match custody.as_mut() {
            Some(custody) if cipher.is_in(&custody.arena) => custody.spare.push(cipher),
            Some(_) | None => drop(cipher),
        }
    }
}

impl Pass<'_> {
    /// Encrypts the sectors of `at`.
    ///
    /// # Panics
    /// `data` is not as long as `at`: then data would reach the wrong place on disk.
    #[inline]
    #[must_use]
    pub fn seal(mut self, mut data: Plaintext, at: SectorRange) -> Ciphertext {
        let buffer = data.buffer_mut();
        assert_eq!(buffer.len() as u64, at.len(), "the plaintext is exactly the sectors written");
        self.engine().encrypt(buffer.bytes_mut(), at.first_tweak(), at.sector_size());
        data.sealed()
    }

    /// Encrypts the sectors of `at` from where they were received into `buffer`: no copy between.
    ///
    /// # Panics
    /// The lengths differ.
    #[inline]
    #[must_use]
    pub fn seal_from(mut self, data: &[u8], mut buffer: Buffer, at: SectorRange) -> Ciphertext {
        assert_eq!(data.len() as u64, at.len(), "the plaintext is exactly the sectors written");
        let to = buffer.bytes_mut();
        self.engine().encrypt_to(data, to, at.first_tweak(), at.sector_size());
        Ciphertext::new(buffer)
    }

    /// Decrypts the sectors of `at`.
    ///
    /// # Panics
    /// `data` is not as long as `at`.
    #[inline]
    #[must_use]
    pub fn unseal(mut self, data: Ciphertext, at: SectorRange) -> Plaintext {
        let mut buffer = data.into_buffer();
        assert_eq!(buffer.len() as u64, at.len(), "the ciphertext is exactly the sectors read");
        self.engine().decrypt(buffer.bytes_mut(), at.first_tweak(), at.sector_size());
        Plaintext::new(buffer)
    }

    fn engine(&mut self) -> &mut Xts {
        self.cipher.as_mut().expect("enter put it there, and the guard has kept it since")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::buffer::Pool;
    use crate::key::secret::SecretMemoryError;
    use crate::units::{Geometry, SectorSize};

    fn key(byte: u8) -> VolumeKey {
        VolumeKey::init_with(|k| {
            k.fill(byte);
            k[0] ^= 0xff;
            Ok::<_, SecretMemoryError>(())
        })
        .unwrap()
    }

    #[test]
    fn a_closed_fence_gives_no_pass_and_says_why() {
        let fence = Fence::open(key(1)).unwrap();
        let gate = fence.gate();
        drop(gate.enter().unwrap());
        let _receipt = fence.close(FenceReason::Denied);
        let refused = gate.enter().err();
        assert_eq!(refused, Some(EnterError::Fenced(Fenced(FenceReason::Denied))));
        assert!(fence.gate().enter().is_err(), "a gate made later is refused too");
    }

    #[test]
    fn of_those_who_close_a_fence_at_once_one_has_destroyed_the_key() {
        let fence = Fence::open(key(1)).unwrap();
        for _ in 0..200 {
            let close = || fence.close(FenceReason::Denied).is_first();
            let (one, other) = std::thread::scope(|scope| {
                let other = scope.spawn(close);
                (close(), other.join().unwrap())
            });
            assert!(one != other);
            assert!(!close(), "it is closed already");
            fence.open_again(key(1)).unwrap();
        }
    }

    #[test]
    fn a_lease_that_has_run_out_ends_service_before_anybody_closes_the_fence() {
        let fence = Fence::open(key(1)).unwrap();
        let gate = fence.gate();
        drop(gate.enter().unwrap());
        fence.serve_until(Some(Moment(clock::now().0.saturating_sub(Duration::from_secs(1)))));
        let over = Fenced(FenceReason::Expired);
        assert!(matches!(gate.enter(), Err(EnterError::Fenced(fenced)) if fenced == over));
        assert_eq!(fence.check(), Err(over));
        fence.serve_until(Some(Moment(clock::now().0 + Duration::from_secs(60))));
        drop(gate.enter().unwrap());
        fence.serve_until(None);
        drop(gate.enter().unwrap());
    }

    #[test]
    fn a_reopened_fence_uses_the_new_key_on_the_old_gates() {
        let fence = Fence::open(key(1)).unwrap();
        let gate = fence.gate();
        let encrypt = || {
            let at = Geometry::new(4096, SectorSize::B512).sectors(0, 512).unwrap();
            let buffer = Pool::new().take(512).unwrap();
            gate.enter().unwrap().seal_from(&[0; 512], buffer, at).bytes().to_vec()
        };
        let before = encrypt();
        let _receipt = fence.close(FenceReason::Denied);
        fence.open_again(key(1)).unwrap();
        assert_eq!(encrypt(), before);
        let _receipt = fence.close(FenceReason::Denied);
        fence.open_again(key(2)).unwrap();
        assert_ne!(encrypt(), before);
    }

    #[test]
    fn closing_destroys_the_key_while_a_gate_is_busy_elsewhere() {
        let fence = Fence::open(key(1)).unwrap();
        let arena = Arc::downgrade(&lock(&fence.custody).as_ref().unwrap().arena);
        let gate = fence.gate();
        drop(gate.enter().unwrap());
        let _receipt = fence.close(FenceReason::Denied);
        assert!(arena.upgrade().is_none(), "nothing holds the round keys' memory any more");
        drop(gate);
    }

    #[test]
    fn a_gate_that_goes_while_the_fence_closes_keeps_no_round_keys() {
        for round in 0..2000 {
            let fence = Fence::open(key(1)).unwrap();
            let arena = Arc::downgrade(&lock(&fence.custody).as_ref().unwrap().arena);
            let gate = fence.gate();
            drop(gate.enter().unwrap());
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    drop(gate);
                });
                start.wait();
                let _receipt = fence.close(FenceReason::Denied);
                assert!(arena.upgrade().is_none(), "they outlive the fence in round {round}");
            });
        }
    }

    #[test]
    fn connections_that_come_and_go_do_not_use_up_secret_memory() {
        let fence = Fence::open(key(1)).unwrap();
        for _ in 0..1000 {
            let gate = fence.gate();
            drop(gate.enter().unwrap());
        }
        assert_eq!(lock(&fence.custody).as_ref().unwrap().spare.len(), 1);
    }
}
