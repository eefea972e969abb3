//! The service manager: what it is told, and the descriptors that it keeps (sd_notify(3),
//! sd_listen_fds(3), systemd.service(5)).
//!
//! Without systemd there is nobody to tell, and everything here does nothing. Written with `nix`:
//! the crates for it either reach no abstract socket or need `unsafe` of their callers.

mod store;

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::SendTimeout;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, setsockopt,
    socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::time::ClockId;
use tracing::{error, info, warn};

use crate::progress::Progress;

pub use store::{FdNameError, PassedFds};

/// How long systemd may take to receive a message before that is an error.
const PATIENCE: i64 = 5;

/// What the process was started with.
#[derive(Default)]
pub struct Systemd {
    /// Who is told.
    pub notifier: Notifier,
    /// What the descriptor store kept.
    pub passed: PassedFds,
    /// How often systemd wants to hear that all is well.
    pub watchdog: Option<Duration>,
}

impl Systemd {
    /// From the environment. To be called before there are threads.
    #[must_use]
    pub fn from_env() -> Self {
        let notifier = match Notifier::from_env() {
            Ok(notifier) => notifier,
            Err(error) => {
                warn!(%error, "NOTIFY_SOCKET cannot be used: systemd will be told nothing");
                Notifier::default()
            }
        };
        let variable = |name| std::env::var(name).ok();
        let watchdog = watchdog(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"));
        Self { notifier, passed: PassedFds::from_env(), watchdog }
    }
}

/// The interval in `WATCHDOG_USEC`, if it is for this process.
fn watchdog(usec: Option<String>, pid: Option<String>) -> Option<Duration> {
    let ours = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    let usec = usec.filter(|_| ours)?.parse().ok().filter(|usec| *usec > 0)?;
    Some(Duration::from_micros(usec))
}

/// A way to tell systemd how the service is.
#[derive(Clone, Default)]
pub struct Notifier(Option<Arc<Socket>>);

struct Socket {
    fd: OwnedFd,
    to: UnixAddr,
}

impl Notifier {
    fn from_env() -> io::Result<Self> {
        match std::env::var_os("NOTIFY_SOCKET") {
            Some(name) if !name.is_empty() => Self::to(&name),
            _ => Ok(Self::default()),
        }
    }

    /// Tells whoever listens at `name`: an absolute path, or `@` and an abstract name.
    ///
    /// # Errors
    /// It is neither, or there is no socket to be had.
    pub fn to(name: &OsStr) -> io::Result<Self> {
        let to = match name.as_bytes().split_first() {
            Some((b'@', name)) => UnixAddr::new_abstract(name)?,
            Some((b'/', _)) => UnixAddr::new(name)?,
            _ => {
                let why = "it is neither an absolute path nor an abstract name";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        setsockopt(&fd, SendTimeout, &TimeVal::seconds(PATIENCE))?;
        Ok(Self(Some(Arc::new(Socket { fd, to }))))
    }

    /// Whether there is somebody to tell.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.0.is_some()
    }

    /// The service is up.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\n{}", status_line(status)));
    }

    /// How the service is, in words for people.
    pub fn status(&self, status: &str) {
        self.tell(&status_line(status));
    }

    /// The service is ending.
    pub fn stopping(&self, status: &str) {
        self.tell(&format!("STOPPING=1\n{}", status_line(status)));
    }

    /// Settings are being read again; [`Notifier::ready`] says that this is over.
    pub fn reloading(&self) {
        // Since version 253 systemd wants to know when this was said.
        let now = ClockId::CLOCK_MONOTONIC.now().map(|now| Duration::from(now).as_micros());
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.unwrap_or_default()));
    }

    /// All is well.
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// What ends or starts now may take this much longer than the unit allows.
    pub fn extend_timeout(&self, by: Duration) {
        self.tell(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros()));
    }

    fn tell(&self, message: &str) {
        if let Err(error) = self.send(message, &[]) {
            warn!(%error, "systemd was not told: {message}");
        }
    }

    fn send(&self, message: &str, fds: &[RawFd]) -> io::Result<()> {
        let Some(socket) = &self.0 else { return Ok(()) };
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let bytes = [IoSlice::new(message.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg(socket.fd.as_raw_fd(), &bytes, rights, flags, Some(&socket.to))?;
        Ok(())
    }
}

/// A message has a line for each thing said.
fn status_line(status: &str) -> String {
    format!("STATUS={}", status.replace(['\n', '\r'], " "))
}

/// Tells systemd that all is well, while it is; ends when it is dropped.
pub struct Watchdog {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Tells it at half of `interval`, as long as no part of `progress` is overdue: else systemd
    /// ends this process, whose keys end with it, and starts a new one. A thread of its own, so that
    /// a runtime that stands still is noticed rather than taking its watch along.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn start(notifier: Notifier, interval: Duration, progress: Progress) -> io::Result<Self> {
        let (end, ended) = channel();
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || watch(&notifier, interval / 2, &progress, &ended))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It cannot end but by that.
            let _ended = thread.join();
        }
    }
}

fn watch(notifier: &Notifier, every: Duration, progress: &Progress, ended: &Receiver<()>) {
    let mut late = Vec::new();
    loop {
        let overdue = progress.overdue(Instant::now());
        if overdue.is_empty() {
            if !late.is_empty() {
                info!("what stood still goes on: the watchdog hears again that all is well");
            }
            notifier.alive();
        } else if overdue != late {
            let parts = overdue.join(", ");
            // First this: who stands still may be writing to the log.
            notifier.status(&format!("standing still, systemd will restart it: {parts}"));
            error!(parts, "standing still: the watchdog is not told that all is well");
        }
        late = overdue;
        match ended.recv_timeout(every) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_for_another_process_or_of_no_time_is_none() {
        let us = std::process::id().to_string();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(watchdog(text("3000000"), Some(us)), Some(Duration::from_secs(3)));
        assert_eq!(watchdog(text("3000000"), None), Some(Duration::from_secs(3)));
        assert_eq!(watchdog(text("3000000"), text("1")), None);
        assert_eq!(watchdog(text("0"), None), None);
        assert_eq!(watchdog(text("soon"), None), None);
        assert_eq!(watchdog(None, None), None);
    }

    #[test]
    fn words_for_people_cannot_say_more_than_one_thing() {
        assert_eq!(status_line("a\nREADY=1"), "STATUS=a READY=1");
    }

    #[test]
    fn without_systemd_nothing_is_told_and_nothing_fails() {
        let notifier = Notifier::default();
        assert!(!notifier.is_active());
        notifier.ready("well");
        notifier.alive();
        let file = tempfile::tempfile().unwrap();
        assert!(!notifier.store_fd("byokd", &file).unwrap(), "nobody keeps it");
        notifier.settle(Duration::ZERO).unwrap();
    }
}
