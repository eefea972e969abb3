//! Holds the place of a volume whose key is not here: on a socket of the kernel's client it leaves
//! requests where they are, or answers them with errors, until the volume is served.
//!
//! It has no key and looks at no payload. It leaves between two requests, so that whoever serves
//! the volume goes on with the same socket.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use nix::errno::Errno as SystemErrno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::debug;

use crate::nbd::stream::NbdStream;
use crate::nbd::thread;
use crate::nbd::transmission::Ending;
use crate::nbd::wire::{Command, Errno, Head, REQUEST_LEN, ReplyStyle, Request};

/// How long the rest of a request, or the taking of a reply, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is done with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mode {
    Wait = 0,
    Refuse = 1,
    Leave = 2,
}

/// A thread that holds a place; it goes on when this is dropped, until it is told to leave or the
/// other end closes.
pub struct StandIn(Arc<Told>);

struct Told {
    mode: AtomicU8,
    waker: EventFd,
}

impl StandIn {
    /// Starts by leaving requests where they are. `ended` hears how it ended.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        stream: UnixStream,
        ended: impl FnOnce(Option<Ending>) + Send + 'static,
    ) -> io::Result<Self> {
        let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let told = Arc::new(Told { mode: AtomicU8::new(Mode::Wait as u8), waker });
        let heard = Arc::clone(&told);
        let body = move || {
            let ending = stand(&NbdStream::Unix(stream), &heard);
            debug!(?ending, "no longer standing in");
            ended(ending.ok());
        };
        thread("stand-in", body)?;
        Ok(Self(told))
    }

    /// Answers requests with errors from now on.
    pub fn refuse(&self) {
        self.tell(Mode::Refuse);
    }

    /// Leaves requests where they are from now on.
    pub fn wait(&self) {
        self.tell(Mode::Wait);
    }

    /// Ends it between two requests.
    pub fn leave(&self) {
        self.tell(Mode::Leave);
    }

    fn tell(&self, mode: Mode) {
        self.0.mode.store(mode as u8, Ordering::SeqCst);
        // It fails only when the counter is full, and then it is awake already.
        let _woken = self.0.waker.write(1);
    }
}

impl Told {
    fn mode(&self) -> Mode {
        match self.mode.load(Ordering::SeqCst) {
            0 => Mode::Wait,
            1 => Mode::Refuse,
            _ => Mode::Leave,
        }
    }
}

fn stand(stream: &NbdStream, told: &Told) -> io::Result<Ending> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    loop {
        let mode = told.mode();
        if mode == Mode::Leave {
            return Ok(Ending::HandedOver);
        }
        // Without any flag only the end of the connection is told.
        let wanted = if mode == Mode::Refuse { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(stream.as_fd(), wanted),
            PollFd::new(told.waker.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(SystemErrno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [socket, waker] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if !waker.is_empty() {
            let _count = told.waker.read();
            continue;
        }
        if socket.is_empty() {
            continue;
        }
        match mode {
            Mode::Refuse => {
                if let Some(ending) = refuse_one(stream)? {
                    return Ok(ending);
                }
            }
            // What was sent before the end says whether the device was disconnected.
            Mode::Wait | Mode::Leave => return last_words(stream),
        }
    }
}

/// Receives one request and refuses it; how the connection ended, if it did.
fn refuse_one(stream: &NbdStream) -> io::Result<Option<Ending>> {
    let mut header = [0; REQUEST_LEN];
    if !receive(stream, &mut header)? {
        return Ok(Some(Ending::Closed));
    }
    let parsed = Request::parse(&header, false);
    let (request, _) = parsed.ok().flatten().ok_or(io::ErrorKind::InvalidData)?;
    if request.command == Command::Disconnect {
        return Ok(Some(Ending::Disconnected));
    }
    let mut left = request.payload(false);
    // Plaintext: it is not kept.
    let mut scratch = zeroize::Zeroizing::new([0; 4096]);
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(scratch.len());
        if !receive(stream, &mut scratch[..now])? {
            return Ok(Some(Ending::Closed));
        }
        left -= now as u64;
    }
    let head = Head::error(ReplyStyle::Simple, &request, Errno::Perm);
    stream.write_all(head.bytes())?;
    Ok(None)
}

/// The other end has closed: looks through what it had sent for a disconnect.
fn last_words(stream: &NbdStream) -> io::Result<Ending> {
    loop {
        match refuse_one(stream) {
            Ok(Some(ending)) => return Ok(ending),
            Ok(None) => {}
            // It does not hear the refusals; what it sent is still read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives exactly `to`; `false` when the connection ended before its first byte.
fn receive(stream: &NbdStream, to: &mut [u8]) -> io::Result<bool> {
    let mut got = 0;
    while got < to.len() {
        match stream.read(&mut to[got..])? {
            0 if got == 0 => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => got += n,
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::mpsc;

    use super::*;

    fn request(command: u16, cookie: u64, len: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(0u64.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    fn standing() -> (UnixStream, UnixStream, StandIn, mpsc::Receiver<Option<Ending>>) {
        let (kernel, ours) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(PATIENCE)).unwrap();
        let (tell, ended) = mpsc::channel();
        let kept = ours.try_clone().unwrap();
        let stand_in = StandIn::start(ours, move |ending| tell.send(ending).unwrap()).unwrap();
        (kernel, kept, stand_in, ended)
    }

    fn refusal(kernel: &mut UnixStream) -> (u32, u64) {
        let mut reply = [0; 16];
        kernel.read_exact(&mut reply).unwrap();
        let errno = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        (errno, u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }

    #[test]
    fn requests_wait_until_they_are_refused_and_the_socket_is_left_between_two() {
        let (mut kernel, mut kept, stand_in, ended) = standing();
        kernel.write_all(&request(1, 7, 8192)).unwrap();
        kernel.write_all(&[9; 8192]).unwrap();
        kernel.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(kernel.read(&mut [0; 16]).is_err(), "nothing is answered yet");
        kernel.set_read_timeout(Some(PATIENCE)).unwrap();
        stand_in.refuse();
        assert_eq!(refusal(&mut kernel), (1, 7));
        kernel.write_all(&request(0, 8, 4096)).unwrap();
        assert_eq!(refusal(&mut kernel), (1, 8));
        stand_in.leave();
        assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), Some(Ending::HandedOver));
        kernel.write_all(&request(0, 9, 4096)).unwrap();
        let mut next = [0; REQUEST_LEN];
        kept.read_exact(&mut next).unwrap();
        assert_eq!(next.to_vec(), request(0, 9, 4096), "what comes is for the next");
    }

    #[test]
    fn a_disconnect_and_an_end_are_told_apart_while_requests_wait() {
        let (mut kernel, _kept, _stand_in, ended) = standing();
        kernel.write_all(&request(0, 1, 4096)).unwrap();
        kernel.write_all(&request(2, 2, 0)).unwrap();
        kernel.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), Some(Ending::Disconnected));
        let (kernel, _kept, _stand_in, ended) = standing();
        drop(kernel);
        assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), Some(Ending::Closed));
    }
}
