//! An NBD client that says what it is told to, right or wrong, byte by byte (NBD `proto.md`).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::support::PATIENCE;

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_ABORT: u32 = 2;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED: u32 = 8;
pub(crate) const OPT_SET_META: u32 = 10;
pub(crate) const OPT_EXTENDED: u32 = 11;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
pub(crate) const REP_ERR_INVALID: u32 = 1 << 31 | 3;
pub(crate) const REP_ERR_UNKNOWN: u32 = 1 << 31 | 6;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const BLOCK_STATUS: u16 = 7;
pub(crate) const WRITE_ZEROES: u16 = 6;

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// An option as it goes over the wire.
pub(crate) fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("short");
    [&IHAVEOPT.to_be_bytes()[..], &code.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// The payload of `GO` and `INFO` for an export, asking for nothing.
pub(crate) fn named(name: &str) -> Vec<u8> {
    let len = u32::try_from(name.len()).expect("short");
    [&len.to_be_bytes()[..], name.as_bytes(), &[0, 0]].concat()
}

/// A request with a 28-byte header.
pub(crate) fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    [
        &REQUEST_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

/// A request with an extended, 32-byte header.
pub(crate) fn extended(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    [
        &EXTENDED_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

/// A connection. Waiting for more than [`PATIENCE`] is an error.
pub(crate) struct Raw(UnixStream);

impl Raw {
    /// Over a connection that is past the handshake.
    pub(crate) fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Connects, and takes the greeting; nothing is sent yet.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        let mut raw = Self::over(stream);
        let greeting = raw.take::<18>().unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        raw
    }

    /// The same, and with the flags of a fixed newstyle client without zeroes sent.
    pub(crate) fn negotiating(socket: &Path) -> Self {
        let mut raw = Self::greeted(socket);
        raw.send(&3u32.to_be_bytes());
        raw
    }

    /// Through the handshake, with simple replies.
    pub(crate) fn connected(socket: &Path, export: &str) -> Self {
        let mut raw = Self::negotiating(socket);
        assert_eq!(raw.ask(OPT_GO, &named(export)), REP_ACK);
        raw
    }

    /// The same connection, for another thread.
    pub(crate) fn duplicate(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }

    /// Ends it in both directions, whoever else has it.
    pub(crate) fn shut(&self) {
        self.0.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Sends no more, and would still take replies.
    pub(crate) fn sends_no_more(&self) {
        self.0.shutdown(std::net::Shutdown::Write).unwrap();
    }

    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the server takes it");
    }

    pub(crate) fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn take_vec(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).expect("the server sends it");
        bytes
    }

    /// The type of one reply to an option, its data dropped.
    pub(crate) fn option_reply(&mut self, option: u32) -> u32 {
        let head = self.take::<20>().expect("a reply to the option");
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!(head[..8], REPLY_MAGIC.to_be_bytes());
        assert_eq!(word(8), option);
        self.take_vec(word(16) as usize);
        word(12)
    }

    /// Sends an option; the type of its last reply.
    pub(crate) fn ask(&mut self, code: u32, data: &[u8]) -> u32 {
        self.send(&option(code, data));
        loop {
            let reply = self.option_reply(code);
            if reply == REP_ACK || reply & (1 << 31) != 0 {
                return reply;
            }
        }
    }

    /// The error of a simple reply to `cookie`; 0 is success.
    pub(crate) fn simple_reply(&mut self, cookie: u64) -> u32 {
        let head = self.take::<16>().expect("a reply to the request");
        assert_eq!(head[..4], SIMPLE_MAGIC.to_be_bytes(), "in sync");
        assert_eq!(head[8..], cookie.to_be_bytes());
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    }

    /// The cookie and the error of the next simple reply.
    pub(crate) fn any_reply(&mut self) -> (u64, u32) {
        let head = self.take::<16>().expect("a reply");
        assert_eq!(head[..4], SIMPLE_MAGIC.to_be_bytes(), "in sync");
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        (cookie, u32::from_be_bytes(head[4..8].try_into().unwrap()))
    }

    /// Sends a request without payload; its error.
    pub(crate) fn command(&mut self, flags: u16, command: u16, offset: u64, len: u32) -> u32 {
        let cookie = offset ^ u64::from(len) << 32 ^ u64::from(command);
        self.send(&request(flags, command, cookie, offset, len));
        self.simple_reply(cookie)
    }

    /// Sends a write; its error.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let len = u32::try_from(data.len()).expect("short");
        self.send(&request(0, WRITE, offset, offset, len));
        self.send(data);
        self.simple_reply(offset)
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.send(&request(0, READ, offset, offset, len));
        assert_eq!(self.simple_reply(offset), 0);
        self.take_vec(len as usize)
    }

    /// The error in a single-chunk extended reply to `cookie`; 0 is success.
    pub(crate) fn extended_reply(&mut self, cookie: u64) -> u32 {
        let head = self.take::<32>().expect("a reply to the request");
        assert_eq!(head[..4], EXTENDED_REPLY_MAGIC.to_be_bytes(), "in sync");
        assert_eq!(head[8..16], cookie.to_be_bytes());
        let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
        let len = u64::from_be_bytes(head[24..].try_into().unwrap());
        let payload = self.take_vec(usize::try_from(len).unwrap());
        if kind & (1 << 15) == 0 { 0 } else { u32::from_be_bytes(payload[..4].try_into().unwrap()) }
    }

    /// Whether the server has closed the connection, which it is given time to do.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}
