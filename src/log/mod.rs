//! What the programs say of themselves: lines of text on standard error, or, where that leads to the
//! journal, entries with fields that can be searched. Either way a line that repeats is left out
//! after a while and counted.
//!
//! Both programs call [`start`], first of all. A thread writes, so that nobody waits for whoever does
//! not read. No secret comes here: the types that hold one cannot
//! be printed, and what libraries say at trace, whole answers of KMS among it, is never written.

mod journal;
mod limit;
mod queue;
mod text;

use std::io::{self, IsTerminal};
use std::time::Duration;

use tracing::Level;
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::log::journal::Journal;
use crate::log::text::{Limited, StandardError};

/// How long the last lines may take.
const LAST: Duration = Duration::from_secs(1);

/// The log; dropped, it waits for the last lines to be written, for a bounded time.
#[must_use = "the last lines are lost without it"]
pub struct Log(Box<dyn Fn()>);

impl Drop for Log {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Writes from now on what `filter` lets pass, under the name of `program`.
///
/// # Errors
/// There is no thread for it.
pub fn start(filter: EnvFilter, program: &'static str) -> io::Result<Log> {
    // At trace, the libraries would write whole answers of KMS, volume keys included.
    let no_secrets = filter_fn(|event| {
        *event.level() != Level::TRACE || event.target().split("::").next() == Some("byokd")
    });
    let filter = FilterExt::and(filter, no_secrets);
    if let Some(journal) = Journal::of_standard_error(program) {
        let entries = journal.entries();
        tracing_subscriber::registry().with(journal.with_filter(filter)).init();
        return Ok(Log(Box::new(move || entries.flush(LAST))));
    }
    let queue = StandardError::start()?;
    let writer = queue.clone();
    let lines = fmt::layer()
        .with_writer(move || writer.clone())
        .with_ansi(io::stderr().is_terminal())
        .event_format(Limited::default());
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();
    Ok(Log(Box::new(move || queue.flush(LAST))))
}
