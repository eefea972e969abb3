//! The kernel's own client, on our end of a socketpair: transmission without a handshake, with
//! simple replies, which are all it knows.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tracing::{debug, info};

use crate::export::{Export, ExportTable, PeerKind};
use crate::nbd::stream::NbdStream;
use crate::nbd::transmission::{Ending, Modes, Transmission, TransmissionError};
use crate::nbd::wire::ReplyStyle;
use crate::nbd::{ConnectionError, Member, thread};

/// Serves it on a thread of its own, after [`Export::open_for_kernel`]; returns at once. `ended` hears how it ended, after the last
/// thing this connection had in the backing store.
///
/// # Errors
/// No thread could be started.
pub fn serve(
    stream: UnixStream,
    export: Arc<Export>,
    table: &ExportTable,
    ended: impl FnOnce(Option<Ending>) + Send + 'static,
) -> io::Result<()> {
    let table = table.clone();
    let body = move || {
        let ending = match transmit(stream, &export, &table) {
            Ok(ending) => {
                debug!(volume = export.name(), ?ending, "kernel connection ended");
                Some(ending)
            }
            Err(ConnectionError::Transmission(TransmissionError::Io(error))) => {
                debug!(volume = export.name(), %error, "kernel connection lost");
                None
            }
            Err(error) => {
                info!(volume = export.name(), %error, "kernel connection closed");
                None
            }
        };
        ended(ending);
    };
    thread("nbd-kernel", body)
}

fn transmit(
    stream: UnixStream,
    export: &Arc<Export>,
    table: &ExportTable,
) -> Result<Ending, ConnectionError> {
    let refused = || ConnectionError::Refused(export.name().to_owned());
    // It may come from a daemon before this one, with limits of its own.
    stream.set_read_timeout(None)?;
    let stream = NbdStream::Unix(stream);
    let client = export.join(stream.as_fd(), PeerKind::Kernel)?.ok_or_else(refused)?;
    let member = Member { export: Arc::clone(export), client: Arc::clone(&client) };
    // A write of a connection from before could overtake its own copy, which the kernel sends again.
    export.wait_for_orphans(&client).map_err(|_| refused())?;
    let store = Arc::clone(export.kernel_store());
    let modes = Modes { style: ReplyStyle::Simple, base_allocation: None };
    let budget = Arc::clone(table.budget());
    let mut transmission =
        Transmission::new(stream, Arc::clone(export), client, store, budget, modes);
    let result = transmission.run();
    drop(transmission);
    drop(member);
    Ok(result?)
}
