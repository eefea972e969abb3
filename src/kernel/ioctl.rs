//! The two ioctls that a purge takes.

#![expect(unsafe_code, reason = "ioctls have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod raw {
    // `_IOR('X', 125, __u32)`: the same number on ext4, xfs, f2fs and others.
    nix::ioctl_read!(goingdown, b'X', 125, u32);
    // `_IO(0x12, 97)`
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
}

/// `*_GOING_FLAGS_NOLOGFLUSH`: nothing is written on the way down, as nothing could be.
const NO_LOG_FLUSH: u32 = 2;

/// Shuts down the file system that `file` lies on: from then on every access to it fails.
pub(super) fn shut_down_file_system(file: &File) -> io::Result<()> {
    let mut flags = NO_LOG_FLUSH;
    // SAFETY: the kernel reads one `u32` at the address, which is valid for the whole call; the
    // descriptor is open as long as `file` is borrowed.
    unsafe { raw::goingdown(file.as_raw_fd(), &raw mut flags) }?;
    Ok(())
}

/// Writes back and drops what is cached of a block device.
pub(super) fn flush_buffers(device: &File) -> io::Result<()> {
    // SAFETY: the call takes no memory; the descriptor is open as long as `device` is borrowed.
    unsafe { raw::blkflsbuf(device.as_raw_fd()) }?;
    Ok(())
}
