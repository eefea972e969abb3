//! The handshake of a connection, fixed newstyle, as a state machine without a socket.
//!
//! Source: NBD `proto.md`, "Fixed newstyle negotiation" and "Option types". The server greets
//! ([`GREETING`]), the client sends its flags ([`Handshake::new`]), then options, one at a time
//! ([`Handshake::option`]), until one of them begins the transmission phase or ends the connection.
//!
//! ```text
//!   greeting -> client flags -> option* -> GO | EXPORT_NAME -> Transmission
//!                                     \--> ABORT, or nonsense -> closed
//! ```

#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use thiserror::Error;

use crate::nbd::wire::ReplyStyle;

/// `NBDMAGIC`, `IHAVEOPT`, and the flags fixed newstyle and no zeroes.
pub const GREETING: [u8; 18] = *b"NBDMAGICIHAVEOPT\x00\x03";

/// Bytes of an option's header.
pub const OPTION_HEADER_LEN: usize = 16;

/// The longest option data that is read. A name has at most 4096 bytes, and a list of meta contexts
/// is a name and a few queries; what is longer is not meant seriously, and drained.
pub const MAX_OPTION_DATA: u32 = 32 << 10;

/// An option with more data than this ends the connection.
pub const MAX_OPTION_DRAIN: u32 = 1 << 20;

/// How many options one handshake may have.
pub const MAX_OPTIONS: usize = 256;

/// The longest name or query string, from the specification.
const MAX_STRING: usize = 4096;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
const REP_ERR_POLICY: u32 = 0x8000_0002;
const REP_ERR_INVALID: u32 = 0x8000_0003;
const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
const REP_ERR_SHUTDOWN: u32 = 0x8000_0007;
const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

const FLAG_HAS_FLAGS: u16 = 1 << 0;
const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_SEND_FLUSH: u16 = 1 << 2;
const FLAG_SEND_FUA: u16 = 1 << 3;
const FLAG_SEND_TRIM: u16 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
const FLAG_SEND_DF: u16 = 1 << 7;
const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
const FLAG_SEND_CACHE: u16 = 1 << 10;
const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// The one meta context there is, and its id.
const BASE_ALLOCATION: &[u8] = b"base:allocation";
const BASE_ALLOCATION_ID: u32 = 1;

/// Block sizes advertised: any byte may be addressed; anything but multiples of 4096 costs a
/// read-modify-write.
const MIN_BLOCK: u32 = 1;
const PREFERRED_BLOCK: u32 = 4096;

/// What a client is told of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// Its name.
    pub name: String,
    /// Words about it.
    pub description: String,
    /// Its size in bytes.
    pub size: u64,
    /// It takes no writes.
    pub read_only: bool,
    /// It takes trims.
    pub trim: bool,
    /// The largest request it takes, in bytes.
    pub max_block: u32,
}

/// Why an export cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is none of that name.
    Unknown,
    /// There is one, but it may not be used now: fenced, or too many connections.
    Policy(String),
    /// The server, or the export, is stopping.
    Stopping,
}

/// Where the handshake looks exports up.
pub trait Exports {
    /// Every name, in order.
    fn names(&self) -> Vec<String>;
    /// The export of that name; the empty name is the default.
    ///
    /// # Errors
    /// It cannot be had.
    fn find(&self, name: &str) -> Result<ExportFacts, Refusal>;
}

/// The handshake cannot go on; the connection is closed without more words.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HandshakeError {
    /// The client set flags that do not exist.
    #[error("the client's flags {0:#x} are not known")]
    Flags(u32),
    /// No option where one should start.
    #[error("the client sent something that is not an option")]
    BadMagic,
    /// Option data beyond all measure.
    #[error("the client sent an option with {0} bytes of data")]
    TooBig(u32),
    /// More options than anyone needs.
    #[error("the client sent more than {MAX_OPTIONS} options")]
    TooMany,
    /// `EXPORT_NAME` has no way to refuse.
    #[error("the client asked for export {0:?} in a way that can only be refused by hanging up")]
    NoSuchExport(String),
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export's name.
    pub export: String,
    /// Which replies.
    pub style: ReplyStyle,
    /// The id of `base:allocation`, if it was selected for this export.
    pub base_allocation: Option<u32>,
}

/// What follows an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option.
    Option,
    /// The transmission phase.
    Transmission(Negotiated),
    /// The client has said goodbye.
    Closed,
}

/// An option's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    number: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, HandshakeError> {
        let mut reader = Reader(bytes);
        match (reader.u64(), reader.u32(), reader.u32()) {
            (Some(OPTION_MAGIC), Some(number), Some(len)) => Ok(Self { number, len }),
            _ => Err(HandshakeError::BadMagic),
        }
    }
}

/// The state between options.
#[derive(Debug)]
pub struct Handshake {
    no_zeroes: bool,
    style: ReplyStyle,
    /// The export name for which `base:allocation` was selected.
    context_for: Option<String>,
    options: usize,
}

impl Handshake {
    /// Begins with the client's flags.
    ///
    /// # Errors
    /// There are flags among them that do not exist.
    pub fn new(client_flags: u32) -> Result<Self, HandshakeError> {
        if client_flags & !3 != 0 {
            return Err(HandshakeError::Flags(client_flags));
        }
        Ok(Self {
            no_zeroes: client_flags & 2 != 0,
            style: ReplyStyle::Simple,
            context_for: None,
            options: 0,
        })
    }

    /// An option whose data is too long to be read. The caller has drained it.
    ///
    /// # Errors
    /// It was too long even for that, or there were too many options.
    pub fn oversized(&mut self, header: OptionHeader) -> Result<Vec<u8>, HandshakeError> {
        self.count()?;
        if header.len > MAX_OPTION_DRAIN || header.number == OPT_EXPORT_NAME {
            return Err(HandshakeError::TooBig(header.len));
        }
        let mut out = Vec::new();
        reply(&mut out, header.number, REP_ERR_TOO_BIG, b"the option's data is too long");
        Ok(out)
    }

    fn count(&mut self) -> Result<(), HandshakeError> {
        self.options = self.options.saturating_add(1);
        if self.options > MAX_OPTIONS { Err(HandshakeError::TooMany) } else { Ok(()) }
    }

    /// An option with its data: what to send, and what follows.
    ///
    /// # Errors
    /// The connection has to be closed.
    pub fn option(
        &mut self,
        header: OptionHeader,
        data: &[u8],
        exports: &impl Exports,
    ) -> Result<(Vec<u8>, Next), HandshakeError> {
        self.count()?;
        let mut out = Vec::new();
        let option = header.number;
        let mut next = Next::Option;
        match option {
            OPT_EXPORT_NAME => return self.export_name(data, exports),
            OPT_ABORT => {
                reply(&mut out, option, REP_ACK, b"");
                next = Next::Closed;
            }
            OPT_LIST => list(&mut out, data, exports),
            OPT_INFO | OPT_GO => next = self.info_or_go(&mut out, option, data, exports),
            OPT_STRUCTURED_REPLY if !data.is_empty() => no_data(&mut out, option),
            OPT_STRUCTURED_REPLY => {
                if self.style == ReplyStyle::Extended {
                    reply(&mut out, option, REP_ERR_INVALID, b"extended headers are in use");
                } else {
                    self.style = ReplyStyle::Structured;
                    reply(&mut out, option, REP_ACK, b"");
                }
            }
            OPT_EXTENDED_HEADERS if !data.is_empty() => no_data(&mut out, option),
            OPT_EXTENDED_HEADERS => {
                self.style = ReplyStyle::Extended;
                self.context_for = None;
                reply(&mut out, option, REP_ACK, b"");
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                self.meta_context(&mut out, option, data, exports);
            }
            _ => reply(&mut out, option, REP_ERR_UNSUP, b"the option is not supported"),
        }
        Ok((out, next))
    }

    fn flags(&self, facts: &ExportFacts) -> u16 {
        let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE;
        if self.style != ReplyStyle::Simple {
            flags |= FLAG_SEND_DF;
        }
        if facts.read_only {
            return flags | FLAG_READ_ONLY;
        }
        flags |= FLAG_SEND_FUA | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
        if facts.trim { flags | FLAG_SEND_TRIM } else { flags }
    }

    fn export_name(
        &self,
        data: &[u8],
        exports: &impl Exports,
    ) -> Result<(Vec<u8>, Next), HandshakeError> {
        let name = String::from_utf8_lossy(data).into_owned();
        let facts = exports.find(&name).map_err(|_| HandshakeError::NoSuchExport(name.clone()))?;
        let mut out = facts.size.to_be_bytes().to_vec();
        out.extend(self.flags(&facts).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Ok((out, Next::Transmission(self.negotiated(&name, &facts))))
    }

    fn negotiated(&self, asked: &str, facts: &ExportFacts) -> Negotiated {
        let selected = self.context_for.as_deref() == Some(asked);
        Negotiated {
            export: facts.name.clone(),
            style: self.style,
            base_allocation: selected.then_some(BASE_ALLOCATION_ID),
        }
    }

    fn info_or_go(
        &mut self,
        out: &mut Vec<u8>,
        option: u32,
        data: &[u8],
        exports: &impl Exports,
    ) -> Next {
        let Some((name, wanted)) = info_request(data) else {
            reply(out, option, REP_ERR_INVALID, b"the option's data is malformed");
            return Next::Option;
        };
        let facts = match exports.find(&name) {
            Ok(facts) => facts,
            Err(refusal) => {
                refuse(out, option, &refusal);
                return Next::Option;
            }
        };
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend(facts.size.to_be_bytes());
        info.extend(self.flags(&facts).to_be_bytes());
        reply(out, option, REP_INFO, &info);
        // Block sizes are told to everyone: who ignores them is served all the same.
        let mut sizes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [MIN_BLOCK, PREFERRED_BLOCK, facts.max_block] {
            sizes.extend(size.to_be_bytes());
        }
        reply(out, option, REP_INFO, &sizes);
        for (kind, text) in [(INFO_NAME, &facts.name), (INFO_DESCRIPTION, &facts.description)] {
            if wanted.contains(&kind) {
                reply(out, option, REP_INFO, &[&kind.to_be_bytes(), text.as_bytes()].concat());
            }
        }
        reply(out, option, REP_ACK, b"");
        if option == OPT_GO {
            Next::Transmission(self.negotiated(&name, &facts))
        } else {
            Next::Option
        }
    }

    fn meta_context(
        &mut self,
        out: &mut Vec<u8>,
        option: u32,
        data: &[u8],
        exports: &impl Exports,
    ) {
        let sets = option == OPT_SET_META_CONTEXT;
        if sets {
            // A failed selection leaves none, not the one before.
            self.context_for = None;
        }
        if self.style == ReplyStyle::Simple && sets {
            return reply(out, option, REP_ERR_INVALID, b"negotiate structured replies first");
        }
        let Some((name, queries)) = meta_request(data) else {
            return reply(out, option, REP_ERR_INVALID, b"the option's data is malformed");
        };
        if let Err(refusal) = exports.find(&name) {
            return refuse(out, option, &refusal);
        }
        let lists_all = !sets && queries.is_empty();
        let matches = |query: &Vec<u8>| query == BASE_ALLOCATION || (!sets && query == b"base:");
        if lists_all || queries.iter().any(matches) {
            // The id means nothing in a list.
            let id = if sets { BASE_ALLOCATION_ID } else { 0 };
            let context = [&id.to_be_bytes()[..], BASE_ALLOCATION].concat();
            reply(out, option, REP_META_CONTEXT, &context);
            if sets {
                self.context_for = Some(name);
            }
        }
        reply(out, option, REP_ACK, b"");
    }
}

fn list(out: &mut Vec<u8>, data: &[u8], exports: &impl Exports) {
    if !data.is_empty() {
        return no_data(out, OPT_LIST);
    }
    for name in exports.names() {
        let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
        reply(out, OPT_LIST, REP_SERVER, &[&len.to_be_bytes(), name.as_bytes()].concat());
    }
    reply(out, OPT_LIST, REP_ACK, b"");
}

fn no_data(out: &mut Vec<u8>, option: u32) {
    reply(out, option, REP_ERR_INVALID, b"the option takes no data");
}

fn refuse(out: &mut Vec<u8>, option: u32, refusal: &Refusal) {
    match refusal {
        Refusal::Unknown => reply(out, option, REP_ERR_UNKNOWN, b"there is no such export"),
        Refusal::Policy(why) => reply(out, option, REP_ERR_POLICY, why.as_bytes()),
        Refusal::Stopping => reply(out, option, REP_ERR_SHUTDOWN, b"the server is stopping"),
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
}

/// The data of `INFO` and `GO`: a name and the kinds of information wanted.
fn info_request(data: &[u8]) -> Option<(String, Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u16()?;
    let wanted = (0..count).map(|_| reader.u16()).collect::<Option<Vec<_>>>()?;
    reader.0.is_empty().then_some((name, wanted))
}

/// The data of the meta context options: a name and queries.
fn meta_request(data: &[u8]) -> Option<(String, Vec<Vec<u8>>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(reader.counted()?.to_vec());
    }
    reader.0.is_empty().then_some((name, queries))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn chunk<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (chunk, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*chunk)
    }

    fn u16(&mut self) -> Option<u16> {
        self.chunk().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.chunk().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.chunk().map(u64::from_be_bytes)
    }

    fn counted(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok().filter(|len| *len <= MAX_STRING)?;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn string(&mut self) -> Option<String> {
        String::from_utf8(self.counted()?.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct One(Result<ExportFacts, Refusal>);

    impl Exports for One {
        fn names(&self) -> Vec<String> {
            vec!["zeebe-0".into()]
        }
        fn find(&self, name: &str) -> Result<ExportFacts, Refusal> {
            if name.is_empty() || name == "zeebe-0" {
                self.0.clone()
            } else {
                Err(Refusal::Unknown)
            }
        }
    }

    fn one() -> One {
        One(Ok(ExportFacts {
            name: "zeebe-0".into(),
            description: "words".into(),
            size: 1 << 30,
            read_only: false,
            trim: true,
            max_block: 64 << 20,
        }))
    }

    fn header(number: u32, data: &[u8]) -> OptionHeader {
        OptionHeader { number, len: u32::try_from(data.len()).unwrap() }
    }

    /// The kinds of replies in `out`, in order.
    fn kinds(mut out: &[u8]) -> Vec<u32> {
        let mut kinds = Vec::new();
        while !out.is_empty() {
            let mut reader = Reader(out);
            assert_eq!(reader.u64(), Some(REPLY_MAGIC));
            reader.u32().unwrap();
            kinds.push(reader.u32().unwrap());
            let len = reader.u32().unwrap() as usize;
            out = &reader.0[len..];
        }
        kinds
    }

    fn named(name: &str, rest: &[u8]) -> Vec<u8> {
        let len = u32::try_from(name.len()).unwrap();
        [&len.to_be_bytes(), name.as_bytes(), rest].concat()
    }

    #[test]
    fn go_tells_size_and_block_sizes_and_what_was_asked_for() {
        let mut handshake = Handshake::new(3).unwrap();
        let data = named("", &[0, 2, 0, 1, 0, 2]);
        let (out, next) = handshake.option(header(OPT_GO, &data), &data, &one()).unwrap();
        assert_eq!(kinds(&out), [REP_INFO, REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
        let Next::Transmission(negotiated) = next else { panic!("{next:?}") };
        assert_eq!(negotiated.export, "zeebe-0");
        assert_eq!(negotiated.style, ReplyStyle::Simple);
    }

    #[test]
    fn a_fenced_export_is_refused_with_the_reason() {
        let mut handshake = Handshake::new(3).unwrap();
        let data = named("zeebe-0", &[0, 0]);
        let fenced = One(Err(Refusal::Policy("the key was denied".into())));
        let (out, next) = handshake.option(header(OPT_GO, &data), &data, &fenced).unwrap();
        assert_eq!((kinds(&out), next), (vec![REP_ERR_POLICY], Next::Option));
        assert!(String::from_utf8_lossy(&out).contains("the key was denied"));
    }

    #[test]
    fn a_context_counts_only_for_the_export_it_was_set_for() {
        for (name, selected) in [("zeebe-0", true), ("", false)] {
            let mut handshake = Handshake::new(3).unwrap();
            handshake.option(header(OPT_STRUCTURED_REPLY, b""), b"", &one()).unwrap();
            let query = named("base:allocation", b"");
            let data = named("zeebe-0", &[&1u32.to_be_bytes()[..], &query].concat());
            let set = handshake.option(header(OPT_SET_META_CONTEXT, &data), &data, &one());
            assert_eq!(kinds(&set.unwrap().0), [REP_META_CONTEXT, REP_ACK]);
            let data = named(name, &[0, 0]);
            let (_, next) = handshake.option(header(OPT_GO, &data), &data, &one()).unwrap();
            let Next::Transmission(negotiated) = next else { panic!("{next:?}") };
            assert_eq!(negotiated.base_allocation.is_some(), selected, "{name}");
        }
    }

    #[test]
    fn what_is_unknown_malformed_or_too_long_is_answered_in_sync() {
        let mut handshake = Handshake::new(1).unwrap();
        let mut ask = |number, data: &[u8]| {
            kinds(&handshake.option(header(number, data), data, &one()).unwrap().0)
        };
        assert_eq!(ask(5, b""), [REP_ERR_UNSUP], "STARTTLS");
        assert_eq!(ask(4711, b"x"), [REP_ERR_UNSUP]);
        assert_eq!(ask(OPT_LIST, b"x"), [REP_ERR_INVALID]);
        assert_eq!(ask(OPT_GO, b"\0\0\0\x09zeebe"), [REP_ERR_INVALID]);
        assert_eq!(ask(OPT_GO, &named("nope", &[0, 0])), [REP_ERR_UNKNOWN]);
        assert_eq!(ask(OPT_INFO, &named("", &[0, 0, 7])), [REP_ERR_INVALID], "trailing garbage");
        assert_eq!(ask(OPT_SET_META_CONTEXT, &named("", &[0; 4])), [REP_ERR_INVALID]);
        assert_eq!(ask(OPT_LIST, b""), [REP_SERVER, REP_ACK]);
        let big = OptionHeader { number: OPT_GO, len: 100_000 };
        assert_eq!(kinds(&handshake.oversized(big).unwrap()), [REP_ERR_TOO_BIG]);
        let absurd = OptionHeader { number: OPT_GO, len: u32::MAX };
        assert_eq!(handshake.oversized(absurd), Err(HandshakeError::TooBig(u32::MAX)));
    }

    proptest! {
        #[test]
        fn no_option_whatever_panics(number in 0u32..13, data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut handshake = Handshake::new(3).unwrap();
            let _answer = handshake.option(header(number, &data), &data, &one());
        }
    }
}
