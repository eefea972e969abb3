//! Asks the daemon over its control socket: one request, one answer.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::control::{Answer, ControlError, Request};
use crate::exit::ExitCode;

/// A connection to the daemon.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or we may not connect.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let stream = UnixStream::connect(path).map_err(|error| {
            let kind = error.kind();
            let nobody = matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            let (why, remedy) = if nobody {
                (
                    format!("no byokd listens at {} ({error})", path.display()),
                    "Start byokd, or name its control socket with --socket.",
                )
            } else if kind == io::ErrorKind::PermissionDenied {
                (
                    format!("{}: {error}", path.display()),
                    "Run byokctl as root, or join the daemon's group.",
                )
            } else {
                (format!("{}: {error}", path.display()), "Check the path given by --socket.")
            };
            ControlError {
                exit: ExitCode::WrongState,
                what: "reach the daemon".to_owned(),
                why,
                remedy: remedy.to_owned(),
            }
        })?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// What the daemon says, or that it is gone.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, ControlError> {
        let lost = |why: String| ControlError {
            exit: ExitCode::Failed,
            what: "ask the daemon".to_owned(),
            why,
            remedy: "See the daemon's log (journalctl -u byokd).".to_owned(),
        };
        let mut line = serde_json::to_string(request).map_err(|e| lost(e.to_string()))?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|e| lost(e.to_string()))?;
        let mut answer = String::new();
        let got = self.stream.read_line(&mut answer).map_err(|e| lost(e.to_string()))?;
        if got == 0 {
            return Err(lost("it closed the connection without an answer".to_owned()));
        }
        let answer = serde_json::from_str(&answer).map_err(|e| lost(e.to_string()))?;
        if let Answer::Error(error) = answer { Err(error) } else { Ok(answer) }
    }
}
