//! Lines of text, with the count of those that were left out.

use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::time::Duration;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::log::limit::Limit;
use crate::log::queue::{Queue, Sink, lost};
use crate::visible::visible;

/// The longest line: what many fields of many errors come to. Whoever sends more fills no memory.
const LONGEST: usize = 64 << 10;

/// Standard error, behind a queue.
#[derive(Clone)]
pub(super) struct StandardError(Queue<Vec<u8>>);

impl StandardError {
    pub(super) fn start() -> io::Result<Self> {
        // Without the lock of the standard library's: what hangs here hangs nobody else.
        let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Ok(Self(Queue::start(Lines(file))?))
    }

    /// The line of a process that panics.
    pub(super) fn last(&self, words: &str, within: Duration) {
        if let Some(line) = error_line(words) {
            self.0.last(cut(line.into_bytes()), within);
        }
    }

    pub(super) fn flush(&self, within: Duration) {
        self.0.flush(within);
    }
}

impl io::Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(cut(line.to_vec()));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Lines(File);

impl Sink for Lines {
    type Line = Vec<u8>;

    fn write(&mut self, line: Vec<u8>) {
        // There is nobody left to tell.
        let _lost = self.0.write_all(&line);
    }

    fn lost(&mut self, count: u64) {
        if let Some(line) = error_line(&lost(count)) {
            self.write(line.into_bytes());
        }
    }
}

/// A line that is no event.
fn error_line(words: &str) -> Option<String> {
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time)).ok()?;
    Some(format!("{time} ERROR {words}\n"))
}

/// A line of bearable length.
fn cut(mut line: Vec<u8>) -> Vec<u8> {
    if line.len() > LONGEST {
        let begins_char = |at: &usize| line[*at] & 0xc0 != 0x80;
        let end = (0..=LONGEST).rev().find(begins_char).unwrap_or(LONGEST);
        line.truncate(end);
        line.extend_from_slice("… (cut)\n".as_bytes());
    }
    line
}

/// The usual format, for lines that pass the limit.
pub(super) struct Limited {
    line: Format<Full>,
    limit: Limit,
    colours: bool,
}

impl Limited {
    /// With the colours of a terminal, or without.
    pub(super) fn new(colours: bool) -> Self {
        let line = Format::default().with_target(false).with_ansi(false);
        Self { line, limit: Limit::default(), colours }
    }
}

impl<S, N> FormatEvent<S, N> for Limited
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let passage = self.limit.pass(event);
        for left_out in passage.left_out {
            SystemTime.format_time(&mut writer)?;
            writeln!(writer, " {:>5} {left_out}", left_out.level)?;
        }
        if !passage.written {
            return Ok(());
        }
        let mut line = String::new();
        self.line.format_event(context, Writer::new(&mut line), event)?;
        let shown = visible(line.trim_end_matches('\n'));
        let level = event.metadata().level();
        // The first such word is ours.
        match shown.split_once(level.as_str()) {
            Some((time, rest)) if self.colours => {
                let colour = colour(*level);
                writeln!(writer, "{time}\u{1b}[{colour}m{level}\u{1b}[0m{rest}")
            }
            _ => writeln!(writer, "{shown}"),
        }
    }
}

/// As terminals number them: red, yellow, green, blue.
fn colour(level: Level) -> u8 {
    match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG | Level::TRACE => 34,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing::{debug, warn};
    use tracing_subscriber::fmt;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        assert_eq!(cut(b"short\n".to_vec()), b"short\n");
        let long = cut(format!("a{}\n", "ä".repeat(LONGEST)).into_bytes());
        let long = String::from_utf8(long).unwrap();
        assert!(long.ends_with("ä… (cut)\n") && long.len() < LONGEST + 20, "{}", long.len());
    }

    #[test]
    fn what_anybody_says_is_one_line_that_no_terminal_acts_upon() {
        for ansi in [false, true] {
            let (written, lines) = (Lines::default(), Limited::new(ansi));
            let into = written.clone();
            let layer = fmt::layer().with_ansi(ansi).with_writer(move || into.clone());
            let all = tracing_subscriber::registry().with(layer.event_format(lines));
            let said = "no\u{1b}[2J\n2026-03-01T12:00:00Z  INFO all is well\r\u{202e}";
            tracing::subscriber::with_default(all, || warn!(error = %said, said, "{said}"));
            let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 1, "{text}");
            let colours = text.matches('\u{1b}').count();
            assert_eq!(colours, if ansi { 2 } else { 0 }, "its own alone: {text:?}");
            assert!(!text.contains("\u{1b}[2J") && !text.contains(['\r', '\u{202e}']), "{text:?}");
            assert_eq!(text.matches(r"\n2026-03-01").count(), 3, "{text:?}");
            assert_eq!(text.contains("\u{1b}[33mWARN\u{1b}[0m"), ansi, "{text:?}");
        }
    }

    #[test]
    fn a_storm_of_one_volume_takes_no_line_from_another() {
        let (written, lines) = (Lines::default(), Limited::new(false));
        let into = written.clone();
        let layer = fmt::layer().with_ansi(false).with_writer(move || into.clone());
        let all = tracing_subscriber::registry().with(layer.event_format(lines));
        tracing::subscriber::with_default(all, || {
            for offset in 0..1000 {
                let volume = if offset == 999 { "other" } else { "v" };
                warn!(volume, offset, "the backing store failed; trying again");
                if offset < 30 {
                    debug!("whoever asks for this sees all");
                }
            }
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let count = |what: &str| text.lines().filter(|line| line.contains(what)).count();
        assert_eq!(count("trying again volume=\"v\""), 20, "{text}");
        assert_eq!(count("trying again volume=\"other\" offset=999"), 1, "{text}");
        assert_eq!(count("DEBUG whoever asks"), 30, "{text}");
        assert_eq!(text.lines().count(), 51, "{text}");
    }
}
