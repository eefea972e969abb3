//! The bytes of one connection: a unix or TCP socket, blocking, with the few ways of reading and
//! writing that the transmission phase needs.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, sendmsg};

/// A client's socket.
#[derive(Debug)]
pub enum NbdStream {
    /// A unix socket.
    Unix(UnixStream),
    /// A TCP connection.
    Tcp(TcpStream),
}

/// Enough for a 1 MiB reply to leave in few pieces; the kernel caps it at its own limit.
const SOCKET_BUFFER: usize = 1 << 20;

impl NbdStream {
    /// Prepares it for requests and replies.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn tune(&self) -> io::Result<()> {
        if let Self::Tcp(tcp) = self {
            tcp.set_nodelay(true)?;
        }
        nix::sys::socket::setsockopt(self, nix::sys::socket::sockopt::SndBuf, &SOCKET_BUFFER)?;
        Ok(())
    }

    /// Limits how long one read may wait; `None` lifts the limit.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(unix) => unix.set_read_timeout(timeout),
            Self::Tcp(tcp) => tcp.set_read_timeout(timeout),
        }
    }

    /// Limits how long one write may wait; `None` lifts the limit.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(unix) => unix.set_write_timeout(timeout),
            Self::Tcp(tcp) => tcp.set_write_timeout(timeout),
        }
    }

    /// Reads what is there, waiting for at least a byte; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when the read timeout passed; or the connection is broken.
    pub fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        self.receive(to, MsgFlags::empty())
    }

    /// Reads what is there without waiting; `WouldBlock` when there is nothing.
    ///
    /// # Errors
    /// `WouldBlock`, or the connection is broken.
    pub fn try_read(&self, to: &mut [u8]) -> io::Result<usize> {
        self.receive(to, MsgFlags::MSG_DONTWAIT)
    }

    /// Whether a read would not wait: bytes are there, or the stream has ended or is broken.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn receive(&self, to: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        loop {
            match recv(self.as_fd().as_raw_fd(), to, flags) {
                Ok(n) => return Ok(n),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Writes all of `from`.
    ///
    /// # Errors
    /// The peer has gone, or takes nothing within the write timeout.
    pub fn write_all(&self, from: &[u8]) -> io::Result<()> {
        self.write_all_vectored(&mut [IoSlice::new(from)])
    }

    /// Writes all of `parts`, gathered; `parts` is used up.
    ///
    /// # Errors
    /// The peer has gone, or takes nothing within the write timeout.
    pub fn write_all_vectored(&self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        /// The kernel's limit of parts in one call.
        const MOST_PARTS: usize = 1024;
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let now = &parts[..parts.len().min(MOST_PARTS)];
            let fd = self.as_fd().as_raw_fd();
            match sendmsg::<()>(fd, now, &[], MsgFlags::MSG_NOSIGNAL, None) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut parts, n),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for NbdStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(unix) => unix.as_fd(),
            Self::Tcp(tcp) => tcp.as_fd(),
        }
    }
}
