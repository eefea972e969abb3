//! What the programs say of themselves: lines of text on standard error, or, where that leads to the
//! journal, entries with fields that can be searched. Either way a line that repeats is left out
//! after a while and counted.
//!
//! Both programs call [`start`], first of all. No secret comes here: the types that hold one cannot
//! be printed, and what libraries say at trace, whole answers of KMS among it, is never written.

mod journal;
mod limit;
mod text;

use std::io::{self, IsTerminal};

use tracing::Level;
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::log::journal::Journal;
use crate::log::text::Limited;

/// Writes from now on what `filter` lets pass, under the name of `program`.
pub fn start(filter: EnvFilter, program: &'static str) {
    // At trace, the libraries would write whole answers of KMS, volume keys included.
    let no_secrets = filter_fn(|event| {
        *event.level() != Level::TRACE || event.target().split("::").next() == Some("byokd")
    });
    let filter = FilterExt::and(filter, no_secrets);
    match Journal::of_standard_error(program) {
        Some(journal) => tracing_subscriber::registry().with(journal.with_filter(filter)).init(),
        None => {
            let lines = fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal())
                .event_format(Limited::default());
            tracing_subscriber::registry().with(lines.with_filter(filter)).init();
        }
    }
}
