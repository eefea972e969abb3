//! AES-256-XTS by AWS-LC: the engine that serves.
//!
//! AWS-LC is in the program for TLS anyway and is some fifty times faster than the crates of
//! [`super::reference`]. The key is set once per context; each sector only sets its tweak.
//!
//! AWS-LC allocates its contexts, which hold the expanded round keys, itself. So that they lie in
//! [`SecretArena`] memory and nowhere else, its allocator is ours: while a context is being made,
//! allocations of that thread come from the arena; all others come from the C library. Whatever is
//! freed is wiped first. The hooks are set before `main`, because AWS-LC takes them only before it
//! has allocated anything that the other allocator would have to free.

#![expect(unsafe_code, reason = "calls into AWS-LC, and being its allocator")]

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_sys as lc;
use nix::libc;

use crate::crypt::{CryptError, Engine};
use crate::key::VolumeKey;
use crate::key::secret::{SecretArena, SecretMemoryError};
use crate::units::SectorSize;

/// A keyed AES-256-XTS engine for one thread at a time; its round keys lie in the arena.
pub struct Xts {
    encrypt: Context,
    decrypt: Context,
}

impl Xts {
    /// Keys an engine whose contexts lie in `arena`: first half data key, second half tweak key.
    ///
    /// # Errors
    /// The key's halves are equal, or there is no secret memory for the contexts.
    pub fn new(key: &VolumeKey, arena: &Arc<SecretArena>) -> Result<Self, CryptError> {
        Ok(Self {
            encrypt: Context::new(key, arena, Direction::Encrypt)?,
            decrypt: Context::new(key, arena, Direction::Decrypt)?,
        })
    }

    /// Whether its contexts lie in `arena`, that is, whether it belongs to that arena's key.
    #[must_use]
    pub fn is_in(&self, arena: &Arc<SecretArena>) -> bool {
        Arc::ptr_eq(&self.encrypt.arena, arena)
    }

    /// Encrypts `from` into `to`, of the same length: saves a copy where both exist.
    pub fn encrypt_to(&mut self, from: &[u8], to: &mut [u8], tweak: u64, sector: SectorSize) {
        assert_eq!(from.len(), to.len(), "input and output are the same sectors");
        let size = sector.bytes_usize();
        let mut number = tweak;
        for (from, to) in from.chunks_exact(size).zip(to.chunks_exact_mut(size)) {
            self.encrypt.unit(from.as_ptr(), to, number);
            number = number.wrapping_add(sector.tweak_step());
        }
    }
}

impl Engine for Xts {
    fn encrypt(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize) {
        self.encrypt.units(data, tweak, sector);
    }

    fn decrypt(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize) {
        self.decrypt.units(data, tweak, sector);
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

struct Context {
    raw: NonNull<lc::EVP_CIPHER_CTX>,
    /// Keeps the memory of `raw`; dropped after it.
    arena: Arc<SecretArena>,
}

// SAFETY: an EVP context is not tied to the thread that made it; `&mut self` on every use keeps it
// to one thread at a time.
unsafe impl Send for Context {}

impl Context {
    fn new(
        key: &VolumeKey,
        arena: &Arc<SecretArena>,
        direction: Direction,
    ) -> Result<Self, CryptError> {
        if !HOOKED.load(Ordering::Relaxed) {
            return Err(CryptError::MemoryNotOurs);
        }
        // AWS-LC's per-thread error state must exist before the arena serves allocations, or it
        // would be made in the arena and outlive it.
        // SAFETY: no arguments, no preconditions.
        unsafe { lc::ERR_clear_error() };
        let scope = ArenaScope::enter(arena);
        let no_memory = || scope.failure().map_or(CryptError::WeakKey, CryptError::Memory);
        // SAFETY: no arguments; null means that there was no memory.
        let raw = NonNull::new(unsafe { lc::EVP_CIPHER_CTX_new() }).ok_or_else(no_memory)?;
        let context = Self { raw, arena: Arc::clone(arena) };
        let enc = match direction {
            Direction::Encrypt => 1,
            Direction::Decrypt => 0,
        };
        // SAFETY: no arguments; the result is a static table.
        let cipher = unsafe { lc::EVP_aes_256_xts() };
        let zero_tweak = [0u8; 16];
        let set = key.expose(|key| {
            // SAFETY: the context is live and ours; the key has the 64 bytes and the tweak the 16
            // that AES-256-XTS reads; no engine is given.
            unsafe {
                lc::EVP_CipherInit_ex(
                    context.raw.as_ptr(),
                    cipher,
                    ptr::null_mut(),
                    key.as_ptr(),
                    zero_tweak.as_ptr(),
                    enc,
                )
            }
        });
        if set == 1 { Ok(context) } else { Err(no_memory()) }
    }

    fn units(&mut self, data: &mut [u8], tweak: u64, sector: SectorSize) {
        let mut number = tweak;
        for unit in data.chunks_exact_mut(sector.bytes_usize()) {
            let from = unit.as_ptr();
            self.unit(from, unit, number);
            number = number.wrapping_add(sector.tweak_step());
        }
    }

    /// One data unit, from `from` (which is `to` itself or as long and disjoint) into `to`.
    fn unit(&mut self, from: *const u8, to: &mut [u8], number: u64) {
        let tweak = u128::from(number).to_le_bytes();
        // SAFETY: the context is live, keyed and ours alone; a null cipher and key keep what is
        // set; the tweak has 16 bytes; -1 keeps the direction.
        let set = unsafe {
            lc::EVP_CipherInit_ex(
                self.raw.as_ptr(),
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                tweak.as_ptr(),
                -1,
            )
        };
        let len = c_int::try_from(to.len()).expect("a data unit has at most 4096 bytes");
        let mut written = 0;
        // SAFETY: `to` has `len` writable bytes and `from` as many readable ones, the same or
        // disjoint, which EVP allows; `written` is a live integer.
        let done = unsafe {
            lc::EVP_CipherUpdate(self.raw.as_ptr(), to.as_mut_ptr(), &raw mut written, from, len)
        };
        // Data that was not encrypted must never reach a disk, whatever the reason.
        assert!(
            set == 1 && done == 1 && written == len,
            "AES-256-XTS of a whole sector cannot fail"
        );
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context came from EVP_CIPHER_CTX_new and is freed once; it wipes itself, and
        // our `free` wipes again what it gives back.
        unsafe { lc::EVP_CIPHER_CTX_free(self.raw.as_ptr()) };
    }
}

// ---- AWS-LC's allocator ----

static HOOKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static ARENA: Cell<*const SecretArena> = const { Cell::new(ptr::null()) };
    static FAILURE: Cell<Option<SecretMemoryError>> = const { Cell::new(None) };
}

/// While it lives, AWS-LC's allocations on this thread come from an arena.
struct ArenaScope;

impl ArenaScope {
    fn enter(arena: &Arc<SecretArena>) -> Self {
        FAILURE.set(None);
        ARENA.set(Arc::as_ptr(arena));
        Self
    }

    /// Why an allocation failed, if one did.
    #[expect(clippy::unused_self, reason = "asked only inside a scope")]
    fn failure(&self) -> Option<SecretMemoryError> {
        FAILURE.get()
    }
}

impl Drop for ArenaScope {
    fn drop(&mut self) {
        ARENA.set(ptr::null());
    }
}

/// Stands before every allocation, so that `free` and `realloc` know size and origin. Sixteen bytes
/// keep what follows aligned as malloc promises.
#[repr(C, align(16))]
struct Header {
    size: usize,
    origin: usize,
}

const FROM_C: usize = 0x636d_616c;
const FROM_ARENA: usize = 0x6172_656e;
const HEADER: usize = size_of::<Header>();

unsafe extern "C" fn allocate(size: usize, _: *const c_char, _: c_int) -> *mut c_void {
    let Some(whole) = size.checked_add(HEADER) else { return ptr::null_mut() };
    let arena = ARENA.get();
    let (base, origin) = if arena.is_null() {
        // SAFETY: malloc takes any size.
        (unsafe { libc::malloc(whole) }.cast::<u8>(), FROM_C)
    } else {
        // SAFETY: ARENA is set only by a scope that lives within a borrow of the arena's Arc.
        match unsafe { &*arena }.allocate(whole) {
            Ok(piece) => (piece.as_ptr(), FROM_ARENA),
            Err(error) => {
                FAILURE.set(Some(error));
                return ptr::null_mut();
            }
        }
    };
    if base.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: base has at least HEADER bytes and is aligned to 16.
    unsafe { base.cast::<Header>().write(Header { size, origin }) };
    // SAFETY: base has HEADER + size bytes.
    unsafe { base.add(HEADER) }.cast()
}

unsafe extern "C" fn release(data: *mut c_void, _: *const c_char, _: c_int) {
    if data.is_null() {
        return;
    }
    // SAFETY: AWS-LC frees only what `allocate` gave it, which has a header before it.
    let base = unsafe { data.cast::<u8>().sub(HEADER) };
    // SAFETY: as above; the header is initialised and aligned.
    let Header { size, origin } = unsafe { base.cast::<Header>().read() };
    // SAFETY: the allocation has `size` bytes after the header, and nobody uses them any more.
    unsafe { libc::explicit_bzero(data, size) };
    if origin == FROM_C {
        // SAFETY: base is what malloc gave, and is freed once.
        unsafe { libc::free(base.cast()) };
    }
    // What came from an arena stays there, wiped, until the arena goes with its key.
}

unsafe extern "C" fn reallocate(
    data: *mut c_void,
    size: usize,
    file: *const c_char,
    line: c_int,
) -> *mut c_void {
    // SAFETY: as for `allocate`.
    let new = unsafe { allocate(size, file, line) };
    if data.is_null() || new.is_null() {
        return new;
    }
    // SAFETY: AWS-LC reallocates only what `allocate` gave it, which has a header before it.
    let base = unsafe { data.cast::<u8>().sub(HEADER) };
    // SAFETY: as above; the header is initialised and aligned.
    let old = unsafe { base.cast::<Header>().read() }.size;
    // SAFETY: both allocations have at least the smaller of the two sizes, and are disjoint.
    unsafe { ptr::copy_nonoverlapping(data.cast::<u8>(), new.cast::<u8>(), old.min(size)) };
    // SAFETY: `data` is given up here and not used again.
    unsafe { release(data, file, line) };
    new
}

extern "C" fn hook() {
    // SAFETY: the three functions are an allocator of the kind AWS-LC asks for, and before `main`
    // it has not allocated anything yet; it refuses (0) if it were set already.
    let set =
        unsafe { lc::CRYPTO_set_mem_functions(Some(allocate), Some(reallocate), Some(release)) };
    HOOKED.store(set == 1, Ordering::Relaxed);
}

#[used]
// SAFETY: functions in .init_array run before `main`, one after another; `hook` needs nothing of
// Rust's runtime.
#[unsafe(link_section = ".init_array")]
static HOOK: extern "C" fn() = hook;
