//! Buffers: page-aligned, pooled per connection, and typed by what is in them.
//!
//! A [`Buffer`] is owned by one request at a time and travels with it. [`Plaintext`] and
//! [`Ciphertext`] say which side of the cipher its bytes are on: the store takes and gives only
//! ciphertext, the NBD side only plaintext, and [`crate::fence::Pass`] alone turns one into the
//! other. Plaintext is wiped before its memory is used for nothing: [`Pool::wipe`] runs before its
//! connection waits, and dropping a buffer wipes it.
//!
//! The pages are left out of core dumps and forks, and locked where `RLIMIT_MEMLOCK` allows.

#![expect(unsafe_code, reason = "mapping pages of our own, aligned for O_DIRECT")]

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Once;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use tracing::warn;

/// The largest buffer: what one request, or one part of a larger one, holds. Chosen as the size at
/// which the cost of a system call no longer shows while some of it still fits in a core's cache.
pub const MAX_BUFFER: usize = 1 << 20;

/// The smallest mapping: a page.
const MIN_BUFFER: usize = 4096;

/// Bytes of a mapping of our own, always initialised, aligned to a page.
pub struct Buffer {
    base: NonNull<u8>,
    capacity: usize,
    len: usize,
    /// How far from its start plaintext may reach that has not been wiped.
    dirty: usize,
}

// SAFETY: the mapping is owned and nothing about it is tied to a thread.
unsafe impl Send for Buffer {}

impl Buffer {
    fn map(capacity: usize) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(capacity).ok_or(Errno::EINVAL)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_PRIVATE) }?.cast();
        let buffer = Self { base, capacity, len: capacity, dirty: 0 };
        for advice in [MmapAdvise::MADV_DONTDUMP, MmapAdvise::MADV_DONTFORK] {
            // SAFETY: the range is the mapping just made; neither advice changes its contents.
            unsafe { madvise(base.cast(), capacity, advice) }?;
        }
        // SAFETY: the range is the mapping just made.
        if let Err(errno) = unsafe { mlock(base.cast(), capacity) } {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| {
                warn!(%errno, "I/O buffers are not locked in memory: raise LimitMEMLOCK, or make sure there is no unencrypted swap");
            });
        }
        Ok(buffer)
    }

    /// A buffer of `len` bytes, all zero, that belongs to no pool.
    ///
    /// # Errors
    /// The kernel has no memory.
    pub fn zeroed(len: usize) -> Result<Self, Errno> {
        let mut buffer = Self::map(len.max(1).next_multiple_of(MIN_BUFFER))?;
        buffer.len = len;
        Ok(buffer)
    }

    /// How many bytes are in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no bytes are in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes in use.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has capacity >= len bytes, initialised by the kernel, and only
        // `&mut self` writes to them.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The bytes in use, to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Where it starts, for a ring that keeps the buffer while the kernel uses it.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Wipes what plaintext it may still hold from before.
    pub(crate) fn wipe(&mut self) {
        self.wipe_from(0);
    }

    /// Wipes what plaintext may lie behind the bytes in use.
    fn wipe_behind(&mut self) {
        self.wipe_from(self.len);
    }

    fn wipe_from(&mut self, start: usize) {
        if self.dirty <= start {
            return;
        }
        let len = std::mem::replace(&mut self.len, self.dirty);
        // Plain stores, which are far quicker than volatile ones; whoever looks sees them.
        std::hint::black_box(&mut self.bytes_mut()[start..]).fill(0);
        std::hint::black_box(self.bytes());
        (self.len, self.dirty) = (len, start);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.wipe();
        // SAFETY: the mapping is ours and ends here; no reference into it outlives self.
        let unmapped = unsafe { munmap(self.base.cast(), self.capacity) };
        debug_assert!(unmapped.is_ok(), "our own mapping can be unmapped");
    }
}

/// A buffer whose bytes are in the clear.
pub struct Plaintext(Buffer);

impl Plaintext {
    /// Says that `buffer` now holds plaintext.
    #[must_use]
    pub fn new(mut buffer: Buffer) -> Self {
        buffer.dirty = buffer.dirty.max(buffer.len);
        Self(buffer)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// The bytes, to write to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }

    /// For the cipher, which overwrites it.
    pub(crate) fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.0
    }

    /// Only for the cipher, when it has overwritten every byte with ciphertext.
    pub(crate) fn sealed(mut self) -> Ciphertext {
        // Beyond it there may be more from before.
        if self.0.dirty <= self.0.len {
            self.0.dirty = 0;
        }
        Ciphertext(self.0)
    }
}

/// A buffer whose bytes are encrypted, or that a read of encrypted bytes will fill.
pub struct Ciphertext(Buffer);

impl Ciphertext {
    /// Says that `buffer` holds ciphertext, or is about to.
    #[must_use]
    pub fn new(buffer: Buffer) -> Self {
        Self(buffer)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// The bytes, for the store to read into.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }

    /// Where it starts, for a ring that keeps the buffer while the kernel uses it.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    /// Wipes what plaintext from before may lie behind the bytes.
    pub(crate) fn wipe_behind(&mut self) {
        self.0.wipe_behind();
    }

    /// Wipes what plaintext from before may be left, in the place of the bytes as well: for a read
    /// that failed.
    pub(crate) fn wipe(&mut self) {
        self.0.wipe();
    }

    /// The buffer, for decrypting in place or for reuse.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        self.0
    }
}

/// One connection's buffers, by size class, most recently used first: a recycled buffer is still
/// in the core's cache.
#[derive(Default)]
pub struct Pool {
    classes: [Vec<Buffer>; CLASSES],
    dirty: bool,
}

/// One class per power of two from a page to [`MAX_BUFFER`].
const CLASSES: usize = (MAX_BUFFER / MIN_BUFFER).ilog2() as usize + 1;

fn class_of(len: usize) -> usize {
    len.div_ceil(MIN_BUFFER).max(1).next_power_of_two().ilog2() as usize
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer of `len` bytes, at most [`MAX_BUFFER`]; what is in it is unspecified.
    ///
    /// # Errors
    /// The kernel has no memory.
    pub fn take(&mut self, len: usize) -> Result<Buffer, Errno> {
        let class = class_of(len);
        let free = self.classes.get_mut(class).ok_or(Errno::EINVAL)?;
        let mut buffer = match free.pop() {
            Some(buffer) => buffer,
            None => Buffer::map(MIN_BUFFER << class)?,
        };
        buffer.len = len;
        Ok(buffer)
    }

    /// The same, with no plaintext from before in it: for whatever may have to wait.
    ///
    /// # Errors
    /// The kernel has no memory.
    pub fn take_clean(&mut self, len: usize) -> Result<Buffer, Errno> {
        let mut buffer = self.take(len)?;
        buffer.wipe();
        Ok(buffer)
    }

    /// Takes a buffer back, to be used again.
    pub fn give(&mut self, buffer: Buffer) {
        self.dirty |= buffer.dirty > 0;
        if let Some(free) = self.classes.get_mut(class_of(buffer.capacity)) {
            free.push(buffer);
        }
    }

    /// Takes back plaintext.
    pub fn give_plaintext(&mut self, plaintext: Plaintext) {
        self.give(plaintext.0);
    }

    /// Takes back ciphertext.
    pub fn give_ciphertext(&mut self, ciphertext: Ciphertext) {
        self.give(ciphertext.0);
    }

    /// Wipes whatever plaintext lies in it. Called before its connection waits for anyone.
    pub fn wipe(&mut self) {
        if self.dirty {
            self.classes.iter_mut().flatten().for_each(Buffer::wipe);
            self.dirty = false;
        }
    }

    /// Gives all memory back to the system: for a connection that has been idle for a while.
    pub fn trim(&mut self) {
        self.wipe();
        self.classes = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool with one buffer, of 8192 bytes, which held plaintext.
    fn with_plaintext_in_it() -> Pool {
        let mut pool = Pool::new();
        let mut plain = Plaintext::new(pool.take(8192).unwrap());
        plain.bytes_mut().fill(0xaa);
        pool.give_plaintext(plain);
        pool
    }

    #[test]
    fn buffers_are_aligned_for_direct_io_and_reused() {
        let mut pool = Pool::new();
        for len in [1, 512, 4096, 4097, 65536, MAX_BUFFER] {
            let buffer = pool.take(len).unwrap();
            let address = buffer.base.as_ptr().addr();
            assert_eq!((buffer.len(), address % 4096), (len, 0));
            pool.give(buffer);
            assert_eq!(pool.take(len).unwrap().base.as_ptr().addr(), address);
        }
        assert!(pool.take(MAX_BUFFER + 1).is_err());
    }

    #[test]
    fn what_lies_behind_a_shorter_use_is_wiped_too() {
        let mut pool = with_plaintext_in_it();
        // The same memory, used for less, and encrypted.
        let mut shorter = Plaintext::new(pool.take(5000).unwrap());
        shorter.bytes_mut().fill(0xbb);
        pool.give_ciphertext(shorter.sealed());
        pool.wipe();
        let buffer = pool.take(8192).unwrap();
        assert!(buffer.bytes()[5000..].iter().all(|b| *b == 0));
        let mut plain = Plaintext::new(buffer);
        plain.bytes_mut().fill(0xcc);
        pool.give_plaintext(plain);
        let clean = pool.take_clean(5000).unwrap();
        pool.give(clean);
        assert!(pool.take(8192).unwrap().bytes().iter().all(|b| *b == 0));
    }

    #[test]
    fn what_lies_behind_ciphertext_is_wiped_and_the_ciphertext_stays() {
        let mut pool = with_plaintext_in_it();
        let mut data = Ciphertext::new(pool.take(5000).unwrap());
        data.bytes_mut().fill(0xbb);
        data.wipe_behind();
        assert_eq!(data.bytes(), [0xbb; 5000]);
        pool.give_ciphertext(data);
        let all = pool.take(8192).unwrap();
        assert!(all.bytes()[5000..].iter().all(|b| *b == 0));
    }

    #[test]
    fn plaintext_given_back_is_gone_after_a_wipe() {
        let mut pool = with_plaintext_in_it();
        pool.wipe();
        assert!(pool.take(8192).unwrap().bytes().iter().all(|b| *b == 0));
    }
}
