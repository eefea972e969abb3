//! A small NBD client for the demonstration: one connection, simple replies, one request at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::nbd::handshake::GREETING;
use crate::nbd::wire::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC};

/// A connection in its transmission phase.
pub struct NbdClient {
    stream: UnixStream,
    cookie: u64,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

impl NbdClient {
    /// Connects to the only export of a socket.
    ///
    /// # Errors
    /// Nobody listens, or the server refuses.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting)?;
        // Our flags, then NBD_OPT_EXPORT_NAME (1) with an empty name.
        let mut words = 3u32.to_be_bytes().to_vec();
        words.extend(b"IHAVEOPT");
        words.extend(1u32.to_be_bytes());
        words.extend(0u32.to_be_bytes());
        stream.write_all(&words)?;
        let mut facts = [0; 10];
        stream.read_exact(&mut facts)?;
        Ok(Self { stream, cookie: 0 })
    }

    /// Sends a request; `Ok(Err(errno))` is the server's refusal.
    fn ask(
        &mut self,
        command: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> io::Result<Result<(), u32>> {
        self.cookie += 1;
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        let (magic, rest) = reply.split_first_chunk::<4>().ok_or(io::ErrorKind::InvalidData)?;
        let errno = rest.first_chunk::<4>().ok_or(io::ErrorKind::InvalidData)?;
        if u32::from_be_bytes(*magic) != SIMPLE_REPLY_MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        match u32::from_be_bytes(*errno) {
            0 => Ok(Ok(())),
            errno => Ok(Err(errno)),
        }
    }

    /// Reads into `to`.
    ///
    /// # Errors
    /// The connection broke; inside, the server's errno.
    pub fn read(&mut self, offset: u64, to: &mut [u8]) -> io::Result<Result<(), u32>> {
        let len = u32::try_from(to.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let answer = self.ask(READ, offset, len, &[])?;
        if answer.is_ok() {
            self.stream.read_exact(to)?;
        }
        Ok(answer)
    }

    /// Writes `from`.
    ///
    /// # Errors
    /// The connection broke; inside, the server's errno.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<Result<(), u32>> {
        let len = u32::try_from(from.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.ask(WRITE, offset, len, from)
    }

    /// Asks for everything to be on stable storage.
    ///
    /// # Errors
    /// The connection broke; inside, the server's errno.
    pub fn flush(&mut self) -> io::Result<Result<(), u32>> {
        self.ask(FLUSH, 0, 0, &[])
    }
}
