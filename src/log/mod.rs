//! What the programs say of themselves: lines of text on standard error, or, where that leads to the
//! journal, entries with fields that can be searched. What is said can go to an OpenTelemetry
//! collector as well. Either way a line that repeats is left out after a while and counted.
//!
//! Both programs call [`start`], first of all. A thread writes, so that nobody waits for whoever does
//! not read; whoever panics does so for a moment, so that the reason of an end is not lost with it.
//! No secret comes here: the types that hold one cannot be printed, and what libraries say at trace,
//! whole answers of KMS among it, is never written.

pub mod export;
mod journal;
mod limit;
#[cfg(not(feature = "otel"))]
mod no_otlp;
#[cfg(feature = "otel")]
mod otlp;
mod queue;
mod text;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::thread;
use std::time::Duration;

use tracing::{Level, warn};
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::log::export::{ExportError, collector, of_environment};
use crate::log::journal::Journal;
#[cfg(not(feature = "otel"))]
use crate::log::no_otlp::Records;
#[cfg(feature = "otel")]
use crate::log::otlp::Records;
use crate::log::text::{Limited, StandardError};

/// How long the last lines may take.
const LAST: Duration = Duration::from_secs(1);

/// The log; dropped, it waits for the last lines to be written, for a bounded time.
#[must_use = "the last lines are lost without it"]
pub struct Log {
    flush: Box<dyn Fn()>,
    records: Records,
}

impl Drop for Log {
    fn drop(&mut self) {
        self.records.stop(LAST);
        (self.flush)();
    }
}

impl Log {
    /// Exports what is said from now on to a collector: the one of the settings, else one that the
    /// environment names, else none.
    ///
    /// # Errors
    /// It is none, or the exporter does not start.
    pub fn export(&self, setting: Option<&str>) -> Result<(), ExportError> {
        let named = setting.map(collector);
        let Some(url) = named.or_else(|| of_environment(|name| std::env::var(name).ok())) else {
            return Ok(());
        };
        match url.and_then(|url| self.records.start(&url)) {
            // Whoever set the variable may have meant other programs.
            Err(error @ ExportError::NotBuilt) if setting.is_none() => {
                warn!("a variable names an OpenTelemetry collector, but {error}");
                Ok(())
            }
            other => other,
        }
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
    let records = Records::default();
    if let Some(journal) = Journal::of_standard_error(program) {
        let (entries, last) = (journal.entries(), journal.entries());
        on_panic(move |panic| last.last(journal::panicked(program, panic), LAST));
        let all = journal.and_then(records.clone());
        tracing_subscriber::registry().with(all.with_filter(filter)).init();
        return Ok(Log { flush: Box::new(move || entries.flush(LAST)), records });
    }
    let queue = StandardError::start()?;
    let (writer, last) = (queue.clone(), queue.clone());
    on_panic(move |panic| last.last(&words(panic), LAST));
    let ansi = io::stderr().is_terminal();
    let lines = fmt::layer()
        .with_writer(move || writer.clone())
        .with_ansi(ansi)
        .event_format(Limited::new(ansi));
    let all = lines.and_then(records.clone());
    tracing_subscriber::registry().with(all.with_filter(filter)).init();
    Ok(Log { flush: Box::new(move || queue.flush(LAST)), records })
}

/// Has panics said here, which may be the last that the process says.
fn on_panic(say: impl Fn(&PanicHookInfo<'_>) + Send + Sync + 'static) {
    std::panic::set_hook(Box::new(move |panic| {
        // The thread that writes would wait for itself, or for whoever does not read.
        if thread::current().name() != Some(queue::THREAD) {
            say(panic);
        }
    }));
}

/// What is said of a panic.
fn words(panic: &PanicHookInfo<'_>) -> String {
    let place = panic.location().map(|at| format!(" at {at}")).unwrap_or_default();
    let message = panic.payload_as_str().unwrap_or("for no reason that is text");
    let thread = thread::current();
    let words = format!("panicked{place}: {message} thread={:?}", thread.name().unwrap_or(""));
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        return format!("{words}\n{backtrace}");
    }
    words
}
