//! The daemon's side of the helper: one call, within a time limit.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Ask, KernelError, KernelErrorClass, Told, passing};
use crate::exit::ExitCode;

/// The way to the helper.
#[derive(Clone, Debug)]
pub struct KernelClient {
    socket: PathBuf,
}

impl KernelClient {
    /// The helper that listens at `socket`.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Asks, with `sockets` along, and waits for the answer. The helper has closed the sockets when
    /// this returns; those the kernel took are open there.
    ///
    /// # Errors
    /// What the helper says; that there is none; that it does not answer `within` the time, and
    /// then whatever was asked may still be done.
    pub fn ask(
        &self,
        ask: &Ask,
        sockets: Vec<OwnedFd>,
        within: Duration,
    ) -> Result<Told, KernelError> {
        let stream = UnixStream::connect(&self.socket).map_err(|e| no_helper(&self.socket, &e))?;
        let lost = |error: io::Error| {
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
                return slow(within);
            }
            KernelError::new(
                ExitCode::Failed,
                format!("byokd-kernel gave no answer: {error}"),
                "See its log (journalctl -u byokd-kernel).",
            )
        };
        stream.set_read_timeout(Some(within)).map_err(lost)?;
        stream.set_write_timeout(Some(within)).map_err(lost)?;
        let line = serde_json::to_string(ask).map_err(|e| lost(e.into()))?;
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        passing::send(&stream, &line, &fds).map_err(lost)?;
        drop(fds);
        drop(sockets);
        let (line, _none) = passing::receive(&stream).map_err(lost)?;
        let told = serde_json::from_str(&line).map_err(|e| lost(e.into()))?;
        if let Told::Failed(error) = told { Err(error) } else { Ok(told) }
    }
}

fn no_helper(socket: &Path, error: &io::Error) -> KernelError {
    let why =
        format!("kernel devices need the helper byokd-kernel at {}: {error}", socket.display());
    let remedy = if error.kind() == io::ErrorKind::PermissionDenied {
        "Let byokd-kernel run with --user, naming the daemon's user."
    } else {
        "Start it (systemctl enable --now byokd-kernel.socket), or mend kernel_socket in byokd.toml."
    };
    KernelError::new(ExitCode::WrongState, why, remedy).of(KernelErrorClass::NoHelper)
}

fn slow(within: Duration) -> KernelError {
    let why = format!("the kernel has not done it within {} s", within.as_secs_f64());
    KernelError::new(ExitCode::Failed, why, "See the kernel's log (dmesg).")
        .of(KernelErrorClass::Slow)
}
