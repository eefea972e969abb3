//! The clock that leases are kept by.

use std::time::Duration;

use nix::time::ClockId;

use crate::key::lease::Moment;

/// Now, on the clock that goes on while the machine sleeps and that nobody sets
/// (`CLOCK_BOOTTIME`). Some 30 ns, without a system call.
///
/// # Panics
/// The kernel is older than 2.6.39 and has no such clock.
#[must_use]
pub fn now() -> Moment {
    let time = ClockId::CLOCK_BOOTTIME.now().expect("the kernel has a boot clock since 2.6.39");
    Moment(Duration::from(time))
}
