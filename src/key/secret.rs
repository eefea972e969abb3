//! Memory for secrets: locked, never swapped, not in core dumps, not inherited by a fork, wiped.
//!
//! [`SecretBytes`] holds one secret, [`SecretArena`] the many small allocations that a cipher
//! makes for its key schedules. Both live in pages of their own: `memfd_secret` where the kernel
//! gives it (then not even the kernel maps them), otherwise anonymous pages under `mlock`; both
//! with `MADV_DONTDUMP` and `MADV_DONTFORK`. Memory that cannot be locked is refused, not used.

#![expect(unsafe_code, reason = "mapping, locking and wiping pages of our own")]

use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::libc;
use nix::sys::mman::{
    MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap,
};
use nix::unistd::ftruncate;
use thiserror::Error;
use zeroize::Zeroize;

use crate::registers;

/// The kernel did not give locked memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("cannot {step} {bytes} bytes of memory for keys: {errno}; raise LimitMEMLOCK (ulimit -l)")]
pub struct SecretMemoryError {
    step: &'static str,
    bytes: usize,
    errno: nix::errno::Errno,
}

/// The pages of one mapping.
struct SecretPages {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned, nothing about it is tied to a thread.
unsafe impl Send for SecretPages {}
// SAFETY: shared access only reads, unless through SecretArena, which hands out disjoint parts.
unsafe impl Sync for SecretPages {}

/// Whether `memfd_secret` may be used. It keeps a machine from hibernating, and nobody outside can
/// read such pages, not even to prove that a key is gone.
static USE_MEMFD_SECRET: AtomicBool = AtomicBool::new(true);

/// Chooses plain locked pages over `memfd_secret` for all secrets made from now on.
pub fn use_locked_pages_only() {
    USE_MEMFD_SECRET.store(false, Ordering::Relaxed);
}

impl SecretPages {
    fn new(bytes: usize) -> Result<Self, SecretMemoryError> {
        let page = page_size();
        let len = bytes.div_ceil(page).max(1) * page;
        let fail = |step| move |errno| SecretMemoryError { step, bytes: len, errno };
        let size = NonZeroUsize::new(len).ok_or(SecretMemoryError {
            step: "map",
            bytes: len,
            errno: nix::errno::Errno::EINVAL,
        })?;
        let mapped =
            USE_MEMFD_SECRET.load(Ordering::Relaxed).then(|| Self::map_secret(size)).flatten();
        let pages = match mapped {
            Some(base) => Self { base, len },
            None => {
                let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
                // SAFETY: a new private mapping at an address of the kernel's choice.
                let base = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_PRIVATE) }
                    .map_err(fail("map"))?
                    .cast();
                let pages = Self { base, len };
                // SAFETY: the range is the mapping just made.
                unsafe { mlock(base.cast(), len) }.map_err(fail("lock"))?;
                pages
            }
        };
        for advice in [MmapAdvise::MADV_DONTDUMP, MmapAdvise::MADV_DONTFORK] {
            // SAFETY: the range is the mapping just made; neither advice changes its contents.
            unsafe { madvise(pages.base.cast(), len, advice) }.map_err(fail("protect"))?;
        }
        Ok(pages)
    }

    /// Pages that only this process can reach; `None` where the kernel does not offer them.
    fn map_secret(size: NonZeroUsize) -> Option<NonNull<u8>> {
        // SAFETY: the call takes one flag word and no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        ftruncate(&fd, i64::try_from(size.get()).ok()?).ok()?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of our own descriptor at an address of the kernel's choice.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &fd, 0) };
        base.ok().map(NonNull::cast)
    }

    fn wipe(&mut self) {
        // SAFETY: the mapping is ours, readable and writable over its whole length, and `&mut self`
        // means that nobody reads it now.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }.zeroize();
    }
}

impl Drop for SecretPages {
    fn drop(&mut self) {
        self.wipe();
        // SAFETY: the mapping is ours and ends here; no reference into it outlives self.
        let unmapped = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "our own mapping can be unmapped");
    }
}

fn page_size() -> usize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(4096)
}

/// `N` secret bytes in pages of their own. No `Debug`, `Clone` or `PartialEq`, on purpose.
pub struct SecretBytes<const N: usize>(SecretPages);

impl<const N: usize> SecretBytes<N> {
    /// Makes a secret whose bytes `fill` writes in place, starting from zeroes.
    ///
    /// # Errors
    /// There is no locked memory, or `fill` failed; then the memory is wiped.
    pub fn init_with<E: From<SecretMemoryError>>(
        fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut secret = Self(SecretPages::new(N)?);
        let filled = fill(secret.bytes_mut());
        registers::wipe();
        filled?;
        Ok(secret)
    }

    fn bytes_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: the pages hold at least N bytes, zeroed by the kernel, and `&mut self` is
        // exclusive for as long as the reference lives.
        unsafe { self.0.base.cast().as_mut() }
    }

    /// Shows the bytes to `reader`.
    pub fn expose<T>(&self, reader: impl FnOnce(&[u8; N]) -> T) -> T {
        // SAFETY: the pages hold at least N initialised bytes, written only through `&mut self`.
        let read = reader(unsafe { self.0.base.cast().as_ref() });
        registers::wipe();
        read
    }
}

/// Chosen as the size of some 30 pairs of AES-256-XTS contexts: most volumes need one chunk.
const ARENA_CHUNK: usize = 64 << 10;

/// Secret memory handed out in pieces, wiped all at once.
///
/// It holds what a cipher library allocates for its key schedules. Pieces are not returned one by
/// one for reuse; the whole goes when the key goes.
#[derive(Default)]
pub struct SecretArena {
    chunks: Mutex<Vec<Chunk>>,
}

struct Chunk {
    pages: SecretPages,
    used: usize,
}

impl SecretArena {
    /// An arena without memory; the first allocation maps some.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `bytes` zeroed bytes, aligned to 64. They stay valid until the arena is dropped.
    ///
    /// # Errors
    /// There is no locked memory.
    pub fn allocate(&self, bytes: usize) -> Result<NonNull<u8>, SecretMemoryError> {
        let bytes = bytes.max(1).next_multiple_of(64);
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        if chunks.last().is_none_or(|c| c.pages.len - c.used < bytes) {
            chunks.push(Chunk { pages: SecretPages::new(bytes.max(ARENA_CHUNK))?, used: 0 });
        }
        let Some(chunk) = chunks.last_mut() else {
            return Err(SecretMemoryError { step: "map", bytes, errno: nix::errno::Errno::ENOMEM });
        };
        // SAFETY: used + bytes <= len, so the result points into the mapping.
        let piece = unsafe { chunk.pages.base.add(chunk.used) };
        chunk.used += bytes;
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_what_was_put_in() {
        let secret = SecretBytes::<64>::init_with(|b| {
            b.fill(7);
            Ok::<_, SecretMemoryError>(())
        })
        .expect("locked memory");
        assert_eq!(secret.expose(|b| *b), [7; 64]);
    }

    #[test]
    fn secret_pages_are_left_out_of_dumps_and_forks() {
        use_locked_pages_only();
        let pages = SecretPages::new(1).expect("locked memory");
        let address = pages.base.as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        // Neighbours with the same flags are one mapping, so ours may lie anywhere within one.
        let holds = |line: &&str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds = range.and_then(|(from, to)| {
                let number = |text| usize::from_str_radix(text, 16).ok();
                Some(number(from)?..number(to)?)
            });
            bounds.is_some_and(|bounds| bounds.contains(&address))
        };
        let mut lines = maps.lines();
        assert!(lines.by_ref().any(|line| holds(&line)), "our mapping is there");
        let flags = lines.find(|line| line.starts_with("VmFlags:")).expect("its flags");
        for flag in ["lo", "dd", "dc"] {
            assert!(flags.contains(flag), "{flag} is missing in {flags}");
        }
    }

    #[test]
    fn an_arena_gives_disjoint_aligned_pieces() {
        let arena = SecretArena::new();
        let a = arena.allocate(100).expect("locked memory").as_ptr().addr();
        let b = arena.allocate(100_000).expect("locked memory").as_ptr().addr();
        let c = arena.allocate(1).expect("locked memory").as_ptr().addr();
        assert!(a.is_multiple_of(64) && b.is_multiple_of(64) && c.is_multiple_of(64));
        assert!(a.abs_diff(b) >= 100 && b.abs_diff(c) >= 64);
    }
}
