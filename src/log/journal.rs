//! Entries of systemd's journal, by its native protocol: a datagram of fields, each with its length.
//!
//! The text of an entry is the whole line, as it would be on a terminal, so that `journalctl` shows
//! what there is to know; each field of it stands in a field `BYOKD_*` as well, so that
//! `journalctl BYOKD_VOLUME=zeebe-0` finds it. (tracing-journald has the fields, but its text is
//! without them.)

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::panic::PanicHookInfo;
use std::path::PathBuf;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::log::limit::{Limit, line};
use crate::log::queue::{Queue, Sink, lost};
use crate::log::words;

const SOCKET: &str = "/run/systemd/journal/socket";

/// The longest value of a field, and the longest text.
const LONGEST: usize = 8 << 10;

/// The longest fields together, beside the text: about half of what the kernel takes as a datagram.
const FIELDS: usize = 96 << 10;

/// Has entries written to the journal.
pub(super) struct Journal {
    entries: Queue<Sent>,
    program: &'static str,
    limit: Limit,
}

/// An entry, and the line that is written where the journal does not take it.
pub(super) struct Sent {
    entry: Vec<u8>,
    line: String,
}

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        &self.entry
    }
}

struct Socket {
    socket: UnixDatagram,
    to: PathBuf,
    program: &'static str,
    /// Without the lock of the standard library's: what hangs here hangs nobody else.
    error: File,
}

impl Socket {
    fn new(to: PathBuf, program: &'static str) -> io::Result<Self> {
        let error = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Ok(Self { socket: UnixDatagram::unbound()?, to, program, error })
    }
}

impl Sink for Socket {
    type Line = Sent;

    fn write(&mut self, Sent { entry, line }: Sent) {
        if self.socket.send_to(&entry, &self.to).is_err() {
            // Also when the journal is being restarted: what is written here waits for it.
            let _lost = self.error.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn lost(&mut self, count: u64) {
        let text = lost(count);
        self.write(Entry::default().sent(Level::ERROR, self.program, &text));
    }
}

impl Journal {
    /// The journal, if standard error leads there: systemd says so in `JOURNAL_STREAM`, which
    /// whatever was started with another standard error has as well.
    pub(super) fn of_standard_error(program: &'static str) -> Option<Self> {
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        let error = File::from(io::stderr().as_fd().try_clone_to_owned().ok()?);
        let error = error.metadata().ok()?;
        (stream == format!("{}:{}", error.dev(), error.ino())).then_some(())?;
        Self::at(SOCKET.into(), program).ok()
    }

    fn at(to: PathBuf, program: &'static str) -> io::Result<Self> {
        let socket = Socket::new(to, program)?;
        // The journal drops an empty entry; without a journal there is an error.
        socket.socket.send_to(&[], &socket.to)?;
        let entries = Queue::start(socket)?;
        Ok(Self { entries, program, limit: Limit::default() })
    }

    pub(super) fn entries(&self) -> Queue<Sent> {
        self.entries.clone()
    }

    fn send(&self, entry: Entry, level: Level, text: &str) {
        self.entries.put(entry.sent(level, self.program, text));
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let passage = self.limit.pass(event);
        for left_out in passage.left_out {
            self.send(Entry::default(), left_out.level, &left_out.to_string());
        }
        if passage.written {
            let meta = event.metadata();
            let mut entry = Entry::default().with("TARGET", meta.target());
            if let (Some(file), Some(line)) = (meta.file(), meta.line()) {
                entry = entry.with("CODE_FILE", file).with("CODE_LINE", &line.to_string());
            }
            event.record(&mut entry);
            self.send(entry, *meta.level(), &line(event));
        }
    }
}

fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// The entry of a process that panics.
pub(super) fn panicked(program: &str, panic: &PanicHookInfo<'_>) -> Sent {
    let mut entry = Entry::default().with("TARGET", program);
    if let Some(at) = panic.location() {
        entry = entry.with("CODE_FILE", at.file()).with("CODE_LINE", &at.line().to_string());
    }
    entry.sent(Level::ERROR, program, &words(panic))
}

fn cut(value: &str) -> &str {
    &value[..value.floor_char_boundary(LONGEST)]
}

/// An entry in the making.
#[derive(Default)]
struct Entry(Vec<u8>);

impl Entry {
    fn with(mut self, name: &str, value: &str) -> Self {
        self.put(name, value);
        self
    }

    fn sent(self, level: Level, program: &str, text: &str) -> Sent {
        let text = cut(text);
        let entry = self
            .with("MESSAGE", text)
            .with("PRIORITY", &priority(level).to_string())
            .with("SYSLOG_IDENTIFIER", program);
        Sent { entry: entry.0, line: format!("<{}>{text}", priority(level)) }
    }

    fn put(&mut self, name: &str, value: &str) {
        let value = cut(value).as_bytes();
        self.0.extend([name.as_bytes(), b"\n"].concat());
        self.0.extend((value.len() as u64).to_le_bytes());
        self.0.extend([value, b"\n"].concat());
    }

    fn put_field(&mut self, field: &Field, value: &str) {
        // The text has it already; and what the log crate says of itself is no field of ours.
        let wanted = field.name() != "message" && !field.name().starts_with("log.");
        // An entry that is too long would be in the journal without any.
        if wanted && self.0.len() + cut(value).len() <= FIELDS {
            let name = field.name().to_uppercase().replace(|c| !char::is_alphanumeric(c), "_");
            self.put(&format!("BYOKD_{name}"), value);
        }
    }
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put_field(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put_field(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use tracing::{error, warn};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// The fields of the next entry, read as journald reads them; of one that is empty none.
    fn next(journald: &UnixDatagram) -> BTreeMap<String, String> {
        let mut datagram = vec![0; 1 << 20];
        let length = journald.recv(&mut datagram).unwrap();
        fields(&datagram[..length])
    }

    /// The fields of each entry up to the one that is empty.
    fn read(journald: &UnixDatagram) -> Vec<BTreeMap<String, String>> {
        let next = || Some(next(journald)).filter(|entry| !entry.is_empty());
        std::iter::from_fn(next).collect()
    }

    fn fields(mut rest: &[u8]) -> BTreeMap<String, String> {
        let mut fields = BTreeMap::new();
        while !rest.is_empty() {
            let (name, value) = rest.split_at(rest.iter().position(|b| *b == b'\n').unwrap());
            let length = u64::from_le_bytes(value[1..9].try_into().unwrap());
            let (value, after) = value[9..].split_at(usize::try_from(length).unwrap());
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            assert!(fields.insert(text(name), text(value)).is_none(), "each field once");
            rest = after.strip_prefix(b"\n").unwrap();
        }
        fields
    }

    #[test]
    fn an_entry_has_the_whole_line_and_its_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(path.clone(), "byokd").unwrap();
        assert_eq!(journald.recv(&mut [0]).unwrap(), 0, "only to see that it is there");
        let entries = journal.entries();
        let all = tracing_subscriber::registry().with(journal);
        // A thread of its own: the kernel keeps few datagrams that nobody reads.
        let reads = std::thread::spawn(move || read(&journald));
        tracing::subscriber::with_default(all, || {
            warn!(
                volume = "v",
                request_id = Some("r-1"),
                code = None::<&str>,
                n = 3,
                "denied:\nby KMS"
            );
            error!(why = "ä".repeat(LONGEST), "too long");
            for _ in 0..30 {
                warn!("again");
            }
        });
        entries.flush(Duration::from_secs(30));
        UnixDatagram::unbound().unwrap().send_to(&[], &path).unwrap();
        let entries = reads.join().unwrap();
        assert_eq!(entries.len(), 22, "what repeats is left out");
        let entry = &entries[0];
        let wanted = [
            ("BYOKD_N", "3"),
            ("BYOKD_REQUEST_ID", "r-1"),
            ("BYOKD_VOLUME", "v"),
            ("CODE_FILE", file!()),
            ("MESSAGE", "denied:\nby KMS volume=\"v\" request_id=\"r-1\" n=3"),
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "byokd"),
            ("TARGET", module_path!()),
        ];
        for (name, value) in wanted {
            assert_eq!(entry[name], value, "{entry:?}");
        }
        assert_eq!(entry.len(), wanted.len() + 1, "and its line of code: {entry:?}");
        assert_eq!(entries[1]["BYOKD_WHY"].len(), LONGEST);
        assert_eq!(entries[1]["PRIORITY"], "3");
    }

    #[test]
    fn lines_that_were_lost_are_counted_in_the_journal_and_long_ones_get_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let mut socket = Socket::new(path.clone(), "byokd").unwrap();
        socket.lost(3);
        let journal = Journal::at(path.clone(), "byokd").unwrap();
        assert_eq!(next(&journald)["MESSAGE"], lost(3));
        assert_eq!(journald.recv(&mut [0]).unwrap(), 0, "only to see that it is there");
        let entries = journal.entries();
        let all = tracing_subscriber::registry().with(journal);
        let x = "x".repeat(LONGEST);
        tracing::subscriber::with_default(all, || {
            let text = "y".repeat(1 << 21);
            warn!(
                a = x,
                b = x,
                c = x,
                d = x,
                e = x,
                f = x,
                g = x,
                h = x,
                i = x,
                j = x,
                k = x,
                "{text}"
            );
            warn!(
                a = x,
                b = x,
                c = x,
                d = x,
                e = x,
                f = x,
                g = x,
                h = x,
                i = x,
                j = x,
                k = x,
                l = x,
                m = x,
                ""
            );
        });
        entries.flush(Duration::from_secs(30));
        UnixDatagram::unbound().unwrap().send_to(&[], &path).unwrap();
        let entries = read(&journald);
        assert_eq!(entries[0]["MESSAGE"].len(), LONGEST);
        let fields = entries[1].values().map(String::len).sum::<usize>();
        assert!((LONGEST..FIELDS + 2 * LONGEST).contains(&fields), "{fields}");
    }

    #[test]
    fn without_a_journal_there_is_none() {
        assert!(Journal::at("/nonexistent/socket".into(), "byokd").is_err());
    }
}
