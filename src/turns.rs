//! How long a thread keeps a processor that others wait for.

#![expect(unsafe_code, reason = "no crate sets a thread's slice")]

use std::io;

use nix::libc;

/// The shortest that Linux takes, in nanoseconds.
const SLICE: u64 = 100_000;

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
    let policy = attributes.sched_policy.cast_signed();
    if policy == libc::SCHED_OTHER || policy == libc::SCHED_BATCH {
        attributes.sched_runtime = SLICE;
        // SAFETY: the kernel reads as much as `size` says, and that is there for the whole call.
        done(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })?;
    }
    Ok(())
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

    #[test]
    fn turns_are_short_where_the_kernel_can_and_nothing_else_changes() {
        let told = std::thread::spawn(|| {
            let before = attributes().unwrap();
            shorten().unwrap();
            (before, attributes().unwrap())
        });
        let (before, after) = told.join().unwrap();
        // A kernel that cannot says nothing of a slice.
        let slice = if before.sched_runtime == 0 { 0 } else { SLICE };
        assert_eq!(after.sched_runtime, slice);
        assert_eq!(
            (after.sched_policy, after.sched_nice),
            (before.sched_policy, before.sched_nice)
        );
        assert_eq!(after.sched_flags, before.sched_flags);
    }
}
