//! `byokctl status --watch`: the same, again and again, in place on a terminal; elsewhere what has
//! changed.

use std::io::{IsTerminal, stdout};
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::cli::lines::Lines;
use crate::cli::output::{Output, room};
use crate::cli::volumes::{Room, Shown, status};
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
    let (mut shown, mut heard) = (Shown::default(), Instant::now());
    loop {
        if let Ok(answer) = &answer {
            heard = Instant::now();
            out.value(answer);
        }
        let mut lines = Lines::default();
        lines.push(rfc3339(Timestamp::now()));
        if in_place {
            // The cursor stands below.
            let all = room();
            let left = Room { height: all.height.saturating_sub(2), ..all };
            match &answer {
                Ok(Answer::Volumes { volumes, problems }) => {
                    lines.append(status(volumes, problems, left));
                }
                Ok(_) => {}
                Err(error) => lines.append(silence(error, heard.elapsed())),
            }
            out.screen(&lines);
        } else {
            let news = match &answer {
                Ok(Answer::Volumes { volumes, problems }) => shown.news(volumes, problems),
                Ok(_) => Lines::default(),
                Err(error) if shown.falls_silent(&error.why) => silence(error, heard.elapsed()),
                Err(_) => Lines::default(),
            };
            if !news.each().is_empty() {
                lines.append(news);
                lines.push("");
                out.lines(&lines);
            }
        }
        std::thread::park_timeout(every.max(LEAST));
        answer = ask(socket, request);
    }
}

fn silence(error: &ControlError, silent: Duration) -> Lines {
    let mut lines = Lines::default();
    let (what, why, silent) = (&error.what, &error.why, silent.as_secs());
    lines.push(format_args!("NO ANSWER for {silent} s: cannot {what}: {why}"));
    lines.push(format_args!("  do: {}", error.remedy));
    lines.push("How volumes are is not known.");
    lines
}

fn ask(socket: &Path, request: &Request) -> Result<Answer, ControlError> {
    Client::connect(socket)?.ask(request)
}
