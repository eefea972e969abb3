//! The NBD server: fixed newstyle, one thread per connection, and a second one while it moves large
//! pieces.
//!
//! What is spoken, of NBD's `proto.md`:
//!
//! | part | spoken |
//! |---|---|
//! | options | `EXPORT_NAME`, `GO`, `INFO`, `LIST`, `ABORT`, `STRUCTURED_REPLY`, `EXTENDED_HEADERS`, `LIST_META_CONTEXT`, `SET_META_CONTEXT`; others are answered `ERR_UNSUP` |
//! | information | `EXPORT`, `NAME`, `DESCRIPTION`, `BLOCK_SIZE` (1, 4096, 64 MiB) |
//! | commands | `READ` (`DF`), `WRITE`, `DISC`, `FLUSH`, `TRIM`, `CACHE`, `WRITE_ZEROES` (`NO_HOLE`, `FAST_ZERO`), `BLOCK_STATUS` (`REQ_ONE`); `FUA` on writes |
//! | contexts | `base:allocation`; a hole is never said to read as zeroes |
//! | replies | simple, structured, extended |
//!
//! [`serve`] is called by the listener for each accepted connection; [`kernel`] serves the kernel's
//! client on a socketpair, without a handshake, and [`stand_in`] holds its place without a key.

pub mod handshake;
pub mod kernel;
pub mod stand_in;
pub mod stream;
pub mod transmission;
pub mod wire;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{debug, info, warn};

use crate::export::{Client, Export, ExportTable, PeerKind};
use crate::nbd::handshake::{
    ExportFacts, Exports, GREETING, Handshake, HandshakeError, MAX_OPTION_DATA, MAX_OPTION_DRAIN,
    Negotiated, Next, OPTION_HEADER_LEN, OptionHeader, Refusal,
};
use crate::nbd::stream::NbdStream;
use crate::nbd::transmission::{MAX_REQUEST, Modes, Transmission, TransmissionError};
use crate::turns;

/// How long a client may take for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection's thread holds no large values on its stack.
const STACK: usize = 256 << 10;

/// How a connection failed.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// During the handshake, by the client's words.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// During the handshake, by the socket.
    #[error("handshake: {0}")]
    Io(#[from] io::Error),
    /// The client took too long.
    #[error("the handshake took longer than {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Slow,
    /// The export took no more connections, or was stopping, between handshake and service.
    #[error("export {0} takes no connection now")]
    Refused(String),
    /// During transmission.
    #[error(transparent)]
    Transmission(#[from] TransmissionError),
}

/// Serves one connection on a thread of its own; returns at once. `place`, which it takes among
/// those who shake hands, is dropped when an export counts it.
///
/// # Errors
/// No thread could be started; the connection is dropped.
pub fn serve(stream: NbdStream, table: ExportTable, place: impl Send + 'static) -> io::Result<()> {
    let body = move || match converse(stream, &table, place) {
        Ok(()) => debug!("connection closed"),
        Err(error @ ConnectionError::Transmission(TransmissionError::Io(_))) => {
            debug!(%error, "connection lost");
        }
        Err(error) => info!(%error, "connection closed"),
    };
    thread("nbd", body)
}

/// Starts a connection's thread. What many of them serve has to be quick, whatever the others move.
fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let body = move || {
        if let Err(error) = turns::shorten() {
            debug!(%error, "its turns stay as long as others'");
        }
        // Found out now, it delays nobody's data.
        turns::may_stand_back();
        body();
    };
    std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(body)?;
    Ok(())
}

fn converse(
    stream: NbdStream,
    table: &ExportTable,
    place: impl Send,
) -> Result<(), ConnectionError> {
    let Some(negotiated) = shake_hands(&stream, table)? else { return Ok(()) };
    let Some(export) = table.find(&negotiated.export) else {
        return Err(ConnectionError::Refused(negotiated.export));
    };
    // Counted from here on, while it waits too.
    let Some(client) = export.join(stream.as_fd(), PeerKind::Program)? else {
        return Err(ConnectionError::Refused(negotiated.export));
    };
    let member = Member { export: Arc::clone(&export), client: Arc::clone(&client) };
    drop(place);
    let waited = export.wait_for_orphans(&client).map_err(|error| {
        warn!(volume = export.name(), %error, "connection refused");
        ConnectionError::Refused(negotiated.export)
    })?;
    // Nobody is told what becomes of what it sent, and those who came later wait for it.
    if waited && client.has_hung_up() {
        return Ok(());
    }
    let store = export.store_for_one()?;
    client.begins();
    stream.set_read_timeout(None)?;
    let modes = Modes { style: negotiated.style, base_allocation: negotiated.base_allocation };
    let budget = Arc::clone(table.budget());
    let mut transmission = Transmission::new(stream, export, client, store, budget, modes);
    let result = transmission.run();
    drop(transmission);
    drop(member);
    let _left = result?;
    Ok(())
}

/// A connection's entry in its export, for as long as it lives.
struct Member {
    export: Arc<Export>,
    client: Arc<Client>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.export.leave(&self.client);
    }
}

/// Negotiates; `None` when the client left politely.
fn shake_hands(
    stream: &NbdStream,
    table: &ExportTable,
) -> Result<Option<Negotiated>, ConnectionError> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.write_all(&GREETING)?;
    let mut flags = [0; 4];
    read_exact(stream, &mut flags, deadline)?;
    let mut handshake = Handshake::new(u32::from_be_bytes(flags))?;
    let mut data = Vec::new();
    loop {
        let mut header = [0; OPTION_HEADER_LEN];
        read_exact(stream, &mut header, deadline)?;
        let header = OptionHeader::parse(&header)?;
        if header.len > MAX_OPTION_DATA {
            drain(stream, header.len.min(MAX_OPTION_DRAIN), deadline)?;
            stream.write_all(&handshake.oversized(header)?)?;
            continue;
        }
        data.resize(usize::try_from(header.len).unwrap_or_default(), 0);
        read_exact(stream, &mut data, deadline)?;
        let (out, next) = handshake.option(header, &data, &Served(table))?;
        stream.write_all(&out)?;
        match next {
            Next::Option => {}
            Next::Transmission(negotiated) => return Ok(Some(negotiated)),
            Next::Closed => return Ok(None),
        }
    }
}

fn read_exact(stream: &NbdStream, to: &mut [u8], deadline: Instant) -> Result<(), ConnectionError> {
    let mut got = 0;
    while got < to.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ConnectionError::Slow);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut to[got..]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn drain(stream: &NbdStream, len: u32, deadline: Instant) -> Result<(), ConnectionError> {
    let mut left = usize::try_from(len).unwrap_or_default();
    let mut scratch = [0; 4096];
    while left > 0 {
        let now = left.min(scratch.len());
        read_exact(stream, &mut scratch[..now], deadline)?;
        left -= now;
    }
    Ok(())
}

/// A table as the handshake sees it.
struct Served<'a>(&'a ExportTable);

impl Exports for Served<'_> {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn find(&self, name: &str) -> Result<ExportFacts, Refusal> {
        let export = self.0.find(name).ok_or(Refusal::Unknown)?;
        if export.is_stopping() {
            return Err(Refusal::Stopping);
        }
        // Where requests are held, so are those of who comes now.
        if export.gives_up()
            && let Err(fenced) = export.gatekeeper().check()
        {
            return Err(Refusal::Policy(fenced.to_string()));
        }
        let options = export.options();
        if export.takes_no_more() {
            let most = options.max_connections;
            return Err(Refusal::Policy(format!("the export has its {most} connections already")));
        }
        Ok(ExportFacts {
            name: export.name().to_owned(),
            description: options.description.clone(),
            size: export.geometry().capacity(),
            read_only: options.read_only,
            trim: options.trim,
            max_block: u32::try_from(MAX_REQUEST).unwrap_or(u32::MAX),
        })
    }
}
