//! What `byokctl` prints: words for people, or JSON for programs.

#![expect(clippy::print_stderr, reason = "printing is what this module is for")]

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::audit::record::Record;
use crate::cli::lines::{Lines, line};
use crate::cli::volumes::{self, Room};
use crate::control::{Answer, ControlError, Reloaded};
use crate::exit::ExitCode;
use crate::key::wrapped::KeyArn;
use crate::units::word;

/// Prints a line for people.
macro_rules! say {
    ($($text:tt)*) => {
        print(&format!("{}\n", line(format_args!($($text)*))))
    };
}

/// Prints a line for people on standard error.
macro_rules! say_aside {
    ($($text:tt)*) => {
        eprintln!("{}", line(format_args!($($text)*)))
    };
}

/// Where and how to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// For people, or `json`.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// One line, for people only.
    pub fn line(&self, text: &str) {
        if !self.json {
            say!("{text}");
        }
    }

    /// Waits for something, and says so where someone watches once it takes long.
    pub fn patiently<T: Send>(&self, wait: impl FnOnce() -> T + Send) -> T {
        if self.json || !std::io::stderr().is_terminal() {
            return wait();
        }
        std::thread::scope(|scope| {
            let (done, waiting) = mpsc::channel::<()>();
            scope.spawn(move || {
                let mut seconds = 0;
                while let Err(RecvTimeoutError::Timeout) = waiting.recv_timeout(A_SECOND) {
                    seconds += 1;
                    eprint!("\rwaiting for the daemon: {seconds} s ");
                }
                if seconds > 0 {
                    eprintln!();
                }
            });
            let answer = wait();
            drop(done);
            answer
        })
    }

    /// A line for people and programs alike, as it stands.
    pub fn verbatim(&self, text: &str) {
        print(&format!("{text}\n"));
    }

    /// Lines, for people only.
    pub(super) fn lines(&self, lines: &Lines) {
        if !self.json {
            print(&lines.text());
        }
    }

    /// Lines in place of all that the terminal shows, for people only.
    pub(super) fn screen(&self, lines: &Lines) {
        if !self.json {
            // Home, and what was there before is cleared: nothing flickers.
            print(&format!("\x1b[H\x1b[J{}", lines.text()));
        }
    }

    /// Records as they come, one a line.
    pub fn records(&self, records: &[Record]) {
        for one in records {
            match serde_json::to_string(one) {
                Ok(text) if self.json => print(&format!("{text}\n")),
                _ => say!("{}", record(one)),
            }
        }
    }

    /// Words beside what is printed.
    pub fn aside(&self, text: &str) {
        say_aside!("{text}");
    }

    /// A value, for programs only.
    pub fn value(&self, value: &impl Serialize) {
        if self.json
            && let Ok(text) = serde_json::to_string(value)
        {
            print(&format!("{text}\n"));
        }
    }

    /// An error: what, why, what to do.
    pub fn error(&self, error: &ControlError) {
        self.value(&Answer::Error(error.clone()));
        if !self.json {
            say_aside!("error: cannot {}", error.what);
            let mut why = vec![error.why.as_str()];
            // Files of settings may be wrong in many places. No words of KMS come this way.
            if error.exit == ExitCode::Usage {
                why = error.why.lines().collect();
            }
            for (place, why) in why.into_iter().enumerate() {
                say_aside!("{} {why}", if place == 0 { "  why:" } else { "      " });
            }
            say_aside!("  do:  {}", error.remedy);
        }
    }

    /// A key policy; where it goes is said beside it.
    pub fn key_policy(&self, arn: &KeyArn, policy: &Value) {
        if let Ok(text) = serde_json::to_string_pretty(policy) {
            print(&format!("{text}\n"));
        }
        if !self.json {
            say_aside!("Add these statements to the key policy of {arn}.");
            say_aside!("Removing them, or disabling the key, takes every volume under it away.");
        }
    }

    /// An answer of the daemon.
    pub fn answer(&self, answer: &Answer) {
        self.value(answer);
        if self.json {
            return;
        }
        match answer {
            Answer::Version { version, api } => say!("byokd {version}, API {api}"),
            Answer::Done => say!("done"),
            Answer::Volume(volume) => self.lines(&volumes::detail(volume)),
            Answer::Volumes { volumes, problems } => {
                let room = Room { height: usize::MAX, ..room() };
                self.lines(&volumes::status(volumes, problems, room));
            }
            Answer::Reloaded(reloaded) => self::reloaded(reloaded),
            Answer::AuditRecords { records } => self.records(records),
            Answer::AuditHead(status) => {
                say!("{}", status.written);
                if let Some(failing) = &status.failing {
                    say!("PROBLEM since {}: {}", failing.since, failing.why);
                }
            }
            Answer::KeyCheck { steps } => {
                for step in steps {
                    let mark = if step.ok { "ok    " } else { "FAILED" };
                    say!("{mark}  {:<10} {}", step.step, step.detail);
                    if let Some(remedy) = &step.remedy {
                        say!("        do: {remedy}");
                    }
                }
            }
            Answer::Error(error) => self.error(error),
        }
    }
}

fn reloaded(reloaded: &Reloaded) {
    let Reloaded { added, removed, changed, at_next_attach, at_restart } = reloaded;
    let lines = [
        ("new", added),
        ("gone", removed),
        ("changed", changed),
        ("changed, takes effect when attached anew", at_next_attach),
        ("settings that take effect at the next start", at_restart),
    ];
    if lines.iter().all(|(_, names)| names.is_empty()) {
        say!("nothing has changed");
    }
    for (what, names) in lines.into_iter().filter(|(_, names)| !names.is_empty()) {
        say!("{what}: {}", names.join(", "));
    }
}

/// The terminal's room, or as much as is wanted.
pub(super) fn room() -> Room {
    let terminal =
        if std::io::stdout().is_terminal() { terminal_size::terminal_size() } else { None };
    terminal.map_or(Room::ENDLESS, |(width, height)| Room {
        width: width.0.into(),
        height: height.0.into(),
    })
}

/// Prints what is visible already, or is for programs.
fn print(text: &str) {
    // Whoever reads may have had enough (`byokctl status | head -1`): that is no error.
    let _taken = std::io::stdout().write_all(text.as_bytes());
}

const A_SECOND: Duration = Duration::from_secs(1);

/// A record on one line: when, its number, what, of which volume, and the rest by name.
fn record(record: &Record) -> String {
    let mut line = format!(
        "{}  {:>6}  {:<14}  {:<12}",
        record.time,
        record.seq,
        word(record.event.event),
        record.event.volume.as_deref().unwrap_or("-")
    );
    let Ok(Value::Object(members)) = serde_json::to_value(&record.event) else { return line };
    for (name, value) in &members {
        // Told already, or the same in every record of a volume.
        if matches!(
            name.as_str(),
            "event" | "volume" | "uuid" | "context" | "calls" | "key" | "signature" | "signer"
        ) {
            continue;
        }
        if let Value::Object(inner) = value {
            for (name, value) in inner {
                line.push_str(&format!("  {name}={}", plain(value)));
            }
        } else {
            line.push_str(&format!("  {name}={}", plain(value)));
        }
    }
    line
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
