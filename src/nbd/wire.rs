//! Requests and replies of the transmission phase: bytes in, values out, values in, bytes out.
//!
//! Source: NBD `proto.md`, "Transmission phase", "Structured reply chunk message" and "Extended
//! headers". All integers are big-endian.

#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use thiserror::Error;

/// Magic of a request with a 32-bit length.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a request under extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply's chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of a structured reply's chunk under extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a request with a 32-bit length.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a request under extended headers.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// The longest head of a reply: an extended chunk header and an offset.
pub const MAX_REPLY_HEAD: usize = 40;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`.
    Write,
    /// `NBD_CMD_DISC`.
    Disconnect,
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_CACHE`.
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus,
    /// A number the specification had no name for when this was written.
    Unknown(u16),
}

impl From<u16> for Command {
    fn from(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }
}

/// `NBD_CMD_FLAG_FUA`.
pub const FLAG_FUA: u16 = 1 << 0;
/// `NBD_CMD_FLAG_NO_HOLE`.
pub const FLAG_NO_HOLE: u16 = 1 << 1;
/// `NBD_CMD_FLAG_DF`.
pub const FLAG_DF: u16 = 1 << 2;
/// `NBD_CMD_FLAG_REQ_ONE`.
pub const FLAG_REQ_ONE: u16 = 1 << 3;
/// `NBD_CMD_FLAG_FAST_ZERO`.
pub const FLAG_FAST_ZERO: u16 = 1 << 4;
/// `NBD_CMD_FLAG_PAYLOAD_LEN`.
pub const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// One request, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// What is asked.
    pub command: Command,
    /// The client's name for it, given back in the reply.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u64,
}

/// What came is not a request: there is no way to find the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the client sent {0:#010x} where a request should start")]
pub struct BadMagic(pub u32);

impl Request {
    /// The request at the start of `bytes`, and how long it is; `None` when it is not all there.
    ///
    /// # Errors
    /// There is no request.
    pub fn parse(bytes: &[u8], extended: bool) -> Result<Option<(Self, usize)>, BadMagic> {
        let (magic, size) = if extended {
            (EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST_LEN)
        } else {
            (REQUEST_MAGIC, REQUEST_LEN)
        };
        let Some((found, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
        let found = u32::from_be_bytes(*found);
        if found != magic {
            return Err(BadMagic(found));
        }
        Ok(Self::fields(rest, extended).map(|request| (request, size)))
    }

    fn fields(bytes: &[u8], extended: bool) -> Option<Self> {
        let (flags, bytes) = bytes.split_first_chunk()?;
        let (command, bytes) = bytes.split_first_chunk()?;
        let (cookie, bytes) = bytes.split_first_chunk()?;
        let (offset, bytes) = bytes.split_first_chunk()?;
        let len = if extended {
            u64::from_be_bytes(*bytes.first_chunk()?)
        } else {
            u64::from(u32::from_be_bytes(*bytes.first_chunk()?))
        };
        Some(Self {
            flags: u16::from_be_bytes(*flags),
            command: u16::from_be_bytes(*command).into(),
            cookie: u64::from_be_bytes(*cookie),
            offset: u64::from_be_bytes(*offset),
            len,
        })
    }

    /// How many bytes of payload follow it.
    #[must_use]
    pub fn payload(&self, extended: bool) -> u64 {
        let said = extended && self.flags & FLAG_PAYLOAD_LEN != 0;
        if said || self.command == Command::Write { self.len } else { 0 }
    }
}

/// What a request can end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// Not permitted: fenced, or read-only.
    Perm,
    /// The backing store failed.
    Io,
    /// No memory for it now.
    NoMem,
    /// Malformed, or outside the export.
    Inval,
    /// A write past the end.
    NoSpc,
    /// Too much for one reply chunk.
    Overflow,
    /// Not supported in this way.
    NotSup,
    /// The server is stopping.
    Shutdown,
}

impl Errno {
    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }
}

/// Which replies were negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyStyle {
    /// Simple replies only.
    Simple,
    /// Structured replies.
    Structured,
    /// Structured replies under extended headers.
    Extended,
}

const CHUNK_DONE: u16 = 1;
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_BLOCK_STATUS_EXT: u16 = 6;
const TYPE_ERROR: u16 = 0x8001;

/// Whether a chunk is the last of its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// More will follow.
    More,
    /// The reply is complete.
    Done,
}

/// The head of a reply: what stands before the data, in a fixed place, so that it needs no memory.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; MAX_REPLY_HEAD],
    len: usize,
}

impl Head {
    const EMPTY: Self = Self { bytes: [0; MAX_REPLY_HEAD], len: 0 };

    /// No head: what follows belongs to a reply that has begun.
    #[must_use]
    pub fn nothing() -> Self {
        Self::EMPTY
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        let end = self.len.saturating_add(bytes.len());
        if let Some(to) = self.bytes.get_mut(self.len..end) {
            to.copy_from_slice(bytes);
            self.len = end;
        }
        self
    }

    fn chunk(style: ReplyStyle, chunk: Chunk, kind: u16, request: &Request, len: u64) -> Self {
        let flags = match chunk {
            Chunk::More => 0,
            Chunk::Done => CHUNK_DONE,
        };
        let head = |magic: u32| {
            Self::EMPTY
                .put(&magic.to_be_bytes())
                .put(&flags.to_be_bytes())
                .put(&kind.to_be_bytes())
                .put(&request.cookie.to_be_bytes())
        };
        if style == ReplyStyle::Extended {
            head(EXTENDED_REPLY_MAGIC).put(&request.offset.to_be_bytes()).put(&len.to_be_bytes())
        } else {
            // What fits a chunk of a structured reply is at most 64 MiB and some.
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            head(STRUCTURED_REPLY_MAGIC).put(&len.to_be_bytes())
        }
    }

    fn simple(request: &Request, error: u32) -> Self {
        Self::EMPTY
            .put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(&error.to_be_bytes())
            .put(&request.cookie.to_be_bytes())
    }

    /// The whole reply to a request that was done and has no data to give.
    #[must_use]
    pub fn done(style: ReplyStyle, request: &Request) -> Self {
        match style {
            ReplyStyle::Extended => Self::chunk(style, Chunk::Done, TYPE_NONE, request, 0),
            // A structured reply is only owed to reads and block status.
            ReplyStyle::Simple | ReplyStyle::Structured => Self::simple(request, 0),
        }
    }

    /// The whole reply, or the last chunk, of a request that failed.
    #[must_use]
    pub fn error(style: ReplyStyle, request: &Request, errno: Errno) -> Self {
        let chunked = match style {
            ReplyStyle::Simple => false,
            ReplyStyle::Structured => {
                matches!(request.command, Command::Read | Command::BlockStatus)
            }
            ReplyStyle::Extended => true,
        };
        if chunked {
            Self::chunk(style, Chunk::Done, TYPE_ERROR, request, 6)
                .put(&errno.number().to_be_bytes())
                .put(&0u16.to_be_bytes())
        } else {
            Self::simple(request, errno.number())
        }
    }

    /// What stands before `len` bytes read at `offset`.
    #[must_use]
    pub fn data(style: ReplyStyle, chunk: Chunk, request: &Request, offset: u64, len: u64) -> Self {
        if style == ReplyStyle::Simple {
            return Self::simple(request, 0);
        }
        Self::chunk(style, chunk, TYPE_OFFSET_DATA, request, len.saturating_add(8))
            .put(&offset.to_be_bytes())
    }

    /// The last chunk of a reply whose data went before it.
    #[must_use]
    pub fn end(style: ReplyStyle, request: &Request) -> Self {
        Self::chunk(style, Chunk::Done, TYPE_NONE, request, 0)
    }
}

/// `NBD_STATE_HOLE`: not allocated. `NBD_STATE_ZERO` is never said: a hole in ciphertext does not
/// read as zeroes.
const STATE_HOLE: u32 = 1;

/// The whole reply to `NBD_CMD_BLOCK_STATUS` for `base:allocation`: runs of (length in bytes,
/// allocated).
#[must_use]
pub fn block_status(
    style: ReplyStyle,
    request: &Request,
    context: u32,
    runs: &[(u64, bool)],
) -> Vec<u8> {
    let state = |allocated: bool| if allocated { 0 } else { STATE_HOLE };
    let mut body = context.to_be_bytes().to_vec();
    let kind = if style == ReplyStyle::Extended {
        let count = u32::try_from(runs.len()).unwrap_or(u32::MAX);
        body.extend(count.to_be_bytes());
        for (len, allocated) in runs {
            body.extend(len.to_be_bytes());
            body.extend(u64::from(state(*allocated)).to_be_bytes());
        }
        TYPE_BLOCK_STATUS_EXT
    } else {
        for (len, allocated) in runs {
            body.extend(u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
            body.extend(state(*allocated).to_be_bytes());
        }
        TYPE_BLOCK_STATUS
    };
    let head = Head::chunk(style, Chunk::Done, kind, request, body.len() as u64);
    [head.bytes(), &body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request =
        Request { flags: 1, command: Command::Read, cookie: 7, offset: 8192, len: 4096 };

    #[test]
    fn a_request_is_read_as_the_specification_lays_it_out() {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 1, 0, 0];
        bytes.extend(7u64.to_be_bytes());
        bytes.extend(8192u64.to_be_bytes());
        bytes.extend(4096u32.to_be_bytes());
        assert_eq!(Request::parse(&bytes, false), Ok(Some((REQUEST, 28))));
        assert_eq!(Request::parse(&bytes[..27], false), Ok(None));
        assert_eq!(Request::parse(&bytes, true), Err(BadMagic(REQUEST_MAGIC)));
    }

    #[test]
    fn replies_are_laid_out_as_the_specification_says() {
        let simple = Head::error(ReplyStyle::Simple, &REQUEST, Errno::Perm);
        assert_eq!(simple.bytes(), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7]);
        let data = Head::data(ReplyStyle::Structured, Chunk::Done, &REQUEST, 8192, 4096);
        assert_eq!(data.bytes().len(), 28);
        assert_eq!(data.bytes()[16..20], 4104u32.to_be_bytes());
        let data = Head::data(ReplyStyle::Extended, Chunk::Done, &REQUEST, 8192, 4096);
        assert_eq!(data.bytes().len(), 40);
        assert_eq!(data.bytes()[24..32], 4104u64.to_be_bytes());
        let status = block_status(ReplyStyle::Structured, &REQUEST, 3, &[(4096, false)]);
        assert_eq!(status[20..], [0, 0, 0, 3, 0, 0, 0x10, 0, 0, 0, 0, 1]);
    }
}
