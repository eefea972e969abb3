//! `byokctl status --watch`: the same, again and again, in place on a terminal.

use std::io::{IsTerminal, stdout};
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::cli::output::Output;
use crate::cli::volumes;
use crate::control::client::Client;
use crate::control::{Answer, ControlError, Request};
use crate::exit::ExitCode;
use crate::units::rfc3339;

/// The least time between two looks.
const LEAST: Duration = Duration::from_millis(100);

/// Shows the answers to `request`, until somebody interrupts it. A daemon that does not answer is
/// shown as well, and asked again.
///
/// # Errors
/// The first answer is an error, such as that there is no such volume.
pub(super) fn watch(
    socket: &Path,
    request: &Request,
    every: Duration,
    out: &Output,
) -> Result<ExitCode, ControlError> {
    let mut answer = ask(socket, request);
    if let Err(error) = answer {
        return Err(error);
    }
    let in_place = stdout().is_terminal();
    let (mut shown, mut heard) = (String::new(), Instant::now());
    loop {
        let text = match &answer {
            Ok(Answer::Volumes { volumes, problems }) => {
                heard = Instant::now();
                volumes::status(volumes, problems)
            }
            Ok(_) => String::new(),
            Err(error) => {
                let silent = heard.elapsed().as_secs();
                let (what, why, remedy) = (&error.what, &error.why, &error.remedy);
                format!(
                    "NO ANSWER for {silent} s: cannot {what}: {why}\n  do: {remedy}\n\
                     How volumes are is not known.\n"
                )
            }
        };
        if let Ok(answer) = &answer {
            out.value(answer);
        }
        let now = rfc3339(Timestamp::now());
        if in_place {
            // Home, and what was there before is cleared: nothing flickers.
            out.line(&format!("\x1b[H\x1b[J{now}\n{}", text.trim_end()));
        } else if text != shown {
            out.line(&format!("{now}\n{text}"));
        }
        shown = text;
        std::thread::park_timeout(every.max(LEAST));
        answer = ask(socket, request);
    }
}

fn ask(socket: &Path, request: &Request) -> Result<Answer, ControlError> {
    Client::connect(socket)?.ask(request)
}
