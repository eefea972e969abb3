//! How soon a thread gets a processor that others want, how long it keeps it, and how much of it.

#![expect(unsafe_code, reason = "no crate sets a thread's slice")]

use std::io;
use std::sync::OnceLock;
use std::thread;

use nix::libc;

/// The shortest that Linux takes, in nanoseconds.
const SLICE: u64 = 100_000;

/// How much nicer a thread is that stands back: two thirds of the weight (`sched_prio_to_weight`).
const STEP: i32 = 2;

/// The nicest that there is.
const NICEST: i32 = 19;

/// What `struct sched_attr` was in its first version, in bytes.
const SIZE: u32 = 48;

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

/// The calling thread gets two thirds of what it got before of a processor that others want as well; until
/// it comes [forward](come_forward). Only where that is allowed: `RLIMIT_NICE` or `CAP_SYS_NICE`.
///
/// # Errors
/// It could not come forward again, or the thread's attributes cannot be set; it stays as it is.
pub fn stand_back() -> io::Result<()> {
    static RETURNS: OnceLock<bool> = OnceLock::new();
    let returns = RETURNS.get_or_init(|| {
        let there_and_back = || renice(STEP).and_then(|()| renice(-STEP)).is_ok();
        thread::Builder::new()
            .spawn(there_and_back)
            .is_ok_and(|thread| thread.join().unwrap_or(false))
    });
    if *returns { renice(STEP) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Takes [`stand_back`] back.
///
/// # Errors
/// The thread's attributes cannot be set.
pub fn come_forward() -> io::Result<()> {
    renice(-STEP)
}

fn renice(by: i32) -> io::Result<()> {
    let mut attributes = attributes()?;
    attributes.sched_nice += by;
    if !is_fair(&attributes) || attributes.sched_nice > NICEST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    set(&attributes)
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

    #[test]
    fn who_stands_back_comes_forward_again_or_does_not_stand_back_at_all() {
        let (before, stood, back, after) = apart(|| {
            shorten().unwrap();
            let before = attributes().unwrap();
            let stood = stand_back();
            let back = attributes().unwrap();
            if stood.is_ok() {
                come_forward().unwrap();
            }
            (before, stood, back, attributes().unwrap())
        });
        let by = if stood.is_ok() { STEP } else { 0 };
        assert_eq!(back.sched_nice, before.sched_nice + by);
        assert_eq!(after.sched_nice, before.sched_nice);
        assert_eq!(
            (back.sched_runtime, after.sched_runtime),
            (before.sched_runtime, before.sched_runtime)
        );
        // Whoever is root may.
        assert!(stood.is_ok() || !nix::unistd::geteuid().is_root(), "{stood:?}");
    }
}
