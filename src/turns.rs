//! How soon a thread gets a processor that others want, how long it keeps it, and how much of it.

#![expect(unsafe_code, reason = "no crate sets a thread's slice")]

use std::io::{self, ErrorKind};
use std::sync::{LazyLock, OnceLock};
use std::thread;

use nix::libc;
use tracing::info;

/// The shortest that Linux takes, in nanoseconds.
const SLICE: u64 = 100_000;

/// How much nicer a thread is that stands back: two thirds of the weight (`sched_prio_to_weight`).
const STEP: i32 = 2;

/// The nicest that there is.
const NICEST: i32 = 19;

/// What `struct sched_attr` was in its first version, in bytes.
const SIZE: u32 = 48;

/// Processors that there are for this process, as found when it is asked for first: finding out reads
/// files.
pub fn processors() -> usize {
    static FOUND: LazyLock<usize> =
        LazyLock::new(|| thread::available_parallelism().map_or(1, |found| found.get()));
    *FOUND
}

/// Gives the calling thread short turns, which come soon: a flush is not to wait until threads that move
/// bulk data have had their own. It gets no more of a processor than before. Linux has it since
/// 6.12 (`Documentation/scheduler/sched-eevdf.rst`: a thread of `SCHED_OTHER` asks for its slice by
/// `sched_setattr`); before, this changes nothing.
///
/// # Errors
/// The thread's attributes cannot be read or set; it goes on with those it has.
pub fn shorten() -> io::Result<()> {
    let mut attributes = attributes()?;
    if is_fair(&attributes) {
        attributes.sched_runtime = SLICE;
        set(&attributes)?;
    }
    Ok(())
}

/// A thread stands back; whoever has this may take it back, in the same thread.
#[derive(Debug)]
pub struct Back {
    /// How nice it was before.
    nice: i32,
}

/// The calling thread has two thirds of its weight where others want the same processor, until it comes
/// [forward](Back::come_forward). So have threads that it starts meanwhile, the kernel's for its ring
/// among them.
///
/// # Errors
/// It [could not](may_stand_back) come forward again, or the thread's attributes cannot be set; it
/// stays as it is.
pub fn stand_back() -> io::Result<Back> {
    if may_stand_back() { step_back() } else { Err(ErrorKind::PermissionDenied.into()) }
}

/// Whether a thread that stands back may come forward again (`RLIMIT_NICE`, `CAP_SYS_NICE`). The first
/// call finds out, and says so if not.
pub fn may_stand_back() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(comes_back)
}

/// Tried in a thread that has nothing else to do.
fn comes_back() -> bool {
    let there_and_back = || step_back().and_then(Back::come_forward);
    let tried = thread::Builder::new().spawn(there_and_back).and_then(|thread| {
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that tried it panicked")))
    });
    if let Err(error) = &tried {
        info!(%error, "connections that move much will not stand back for others; RLIMIT_NICE of 20 lets them");
    }
    tried.is_ok()
}

fn step_back() -> io::Result<Back> {
    let mut attributes = attributes()?;
    let nice = attributes.sched_nice;
    if !is_fair(&attributes) || nice > NICEST - STEP {
        return Err(ErrorKind::InvalidInput.into());
    }
    attributes.sched_nice += STEP;
    set(&attributes)?;
    Ok(Back { nice })
}

impl Back {
    /// The thread is as nice as it was before.
    ///
    /// # Errors
    /// That is not allowed any more, or its attributes cannot be read.
    pub fn come_forward(self) -> io::Result<()> {
        let mut attributes = attributes()?;
        attributes.sched_nice = self.nice;
        set(&attributes)
    }
}

/// Whether it shares processors by weight; what runs in real time does not.
fn is_fair(attributes: &libc::sched_attr) -> bool {
    [libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&attributes.sched_policy.cast_signed())
}

fn set(attributes: &libc::sched_attr) -> io::Result<()> {
    // SAFETY: the kernel reads as much as `size` says, and that is there for the whole call.
    done(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attributes, 0) })
}

/// Those of the calling thread.
fn attributes() -> io::Result<libc::sched_attr> {
    let mut attributes = libc::sched_attr {
        size: SIZE,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel writes `SIZE` bytes at most, which the structure has.
    done(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0) })?;
    Ok(attributes)
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread of its own says.
    fn apart<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(body).join().unwrap()
    }

    #[test]
    fn turns_are_short_where_the_kernel_can_and_nothing_else_changes() {
        let (before, after) = apart(|| {
            let before = attributes().unwrap();
            shorten().unwrap();
            (before, attributes().unwrap())
        });
        // A kernel that cannot says nothing of a slice.
        let slice = if before.sched_runtime == 0 { 0 } else { SLICE };
        assert_eq!(after.sched_runtime, slice);
        assert_eq!(
            (after.sched_policy, after.sched_nice),
            (before.sched_policy, before.sched_nice)
        );
        assert_eq!(after.sched_flags, before.sched_flags);
    }

    /// Whether a thread of this process may become less nice again: `CAP_SYS_NICE`, or the limit.
    fn may_return() -> bool {
        const CAP_SYS_NICE: u32 = 23;
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max nice priority")).unwrap();
        let limit: i32 = limit.split_whitespace().next().unwrap().parse().unwrap_or(40);
        let nice = attributes().unwrap().sched_nice;
        nice <= NICEST - STEP && (effective >> CAP_SYS_NICE & 1 == 1 || limit >= 20 - nice)
    }

    #[test]
    fn who_stands_back_comes_forward_again_or_does_not_stand_back_at_all() {
        let (before, stood, back, after) = apart(|| {
            shorten().unwrap();
            let before = attributes().unwrap();
            let stood = stand_back();
            let back = attributes().unwrap();
            let stood = stood.map(Back::come_forward);
            (before, stood, back, attributes().unwrap())
        });
        let by = if may_return() { STEP } else { 0 };
        assert_eq!(stood.is_ok(), may_return(), "{stood:?}");
        assert!(!matches!(stood, Ok(Err(_))), "{stood:?}");
        assert_eq!(back.sched_nice, before.sched_nice + by);
        assert_eq!(after.sched_nice, before.sched_nice);
        let slice = before.sched_runtime;
        assert_eq!((back.sched_runtime, after.sched_runtime), (slice, slice));
    }
}
