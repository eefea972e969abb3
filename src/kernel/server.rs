//! The helper: who may ask, and what is done.
//!
//! A thread for each connection and one request on each, so that a call that hangs in the kernel
//! holds up nobody but itself. What `Ask` names is all that can be done, on NBD devices alone.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::{Uid, User};
use tracing::{info, warn};

use super::records::{Record, Records, still_held};
use super::{
    Ask, Connect, KernelError, KernelErrorClass, MAX_CONNECTIONS, NAMING, Told, holders, netlink,
    passing, purge, sysfs,
};
use crate::exit::ExitCode;

/// How long a request may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(5);

/// Requests at a time. Those beyond are refused: that many hang, and more would not help.
const MOST_AT_A_TIME: usize = 64;

static AT_A_TIME: AtomicUsize = AtomicUsize::new(0);

/// The helper's socket, and whom it serves besides root.
pub struct Helper {
    listener: UnixListener,
    user: Option<Uid>,
    records: Arc<Records>,
    /// Removed at the end, unless systemd made it.
    path: Option<PathBuf>,
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It may have been removed by hand.
            let _removed = std::fs::remove_file(path);
        }
    }
}

impl Helper {
    /// Serves root and `user` on a socket that somebody else made.
    ///
    /// # Errors
    /// There is no such user.
    pub fn on(socket: OwnedFd, user: Option<&str>, records: Records) -> io::Result<Self> {
        let (user, records) = (user.map(uid_of).transpose()?, Arc::new(records));
        Ok(Self { listener: socket.into(), user, records, path: None })
    }

    /// Serves root and `user` at `path`.
    ///
    /// # Errors
    /// There is no such user, or the socket cannot be made.
    pub fn at(path: &Path, user: Option<&str>, records: Records) -> io::Result<Self> {
        let user = user.map(uid_of).transpose()?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        nix::unistd::chown(path, user, None)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let records = Arc::new(records);
        Ok(Self { listener, user, records, path: Some(path.to_owned()) })
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn run(&self) -> io::Result<()> {
        info!(version = env!("CARGO_PKG_VERSION"), "ready");
        for stream in self.listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => return Err(error),
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    continue;
                }
            };
            let (user, records) = (self.user, Arc::clone(&self.records));
            let thread = std::thread::Builder::new().name("request".into());
            let started = thread.spawn(move || {
                if let Err(error) = converse(&stream, user, &records) {
                    warn!(%error, "request cut off");
                }
            });
            if let Err(error) = started {
                warn!(%error, "connection dropped: no thread for it");
            }
        }
        Ok(())
    }
}

fn uid_of(name: &str) -> io::Result<Uid> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("there is no user `{name}`"));
    Ok(User::from_name(name)?.ok_or_else(missing)?.uid)
}

/// One of the few that may be under way.
struct Turn;

impl Turn {
    fn take() -> Option<Self> {
        let turn = Self;
        (AT_A_TIME.fetch_add(1, Ordering::AcqRel) < MOST_AT_A_TIME).then_some(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        AT_A_TIME.fetch_sub(1, Ordering::AcqRel);
    }
}

fn converse(stream: &UnixStream, user: Option<Uid>, records: &Records) -> io::Result<()> {
    stream.set_read_timeout(Some(ARRIVAL))?;
    stream.set_write_timeout(Some(ARRIVAL))?;
    let peer = getsockopt(stream, PeerCredentials)?;
    let uid = Uid::from_raw(peer.uid());
    if !may(uid, user) {
        warn!(%uid, pid = peer.pid(), "refused: neither root nor the daemon's user");
        let why = format!("uid {uid} is neither root nor the daemon's user");
        let error = KernelError::new(ExitCode::WrongState, why, "Ask the daemon (byokctl).");
        return answer(stream, &Told::Failed(error));
    }
    let (line, sockets) = passing::receive(stream)?;
    let told = match (serde_json::from_str::<Ask>(&line), Turn::take()) {
        (Err(error), _) => Told::Failed(KernelError::new(
            ExitCode::Usage,
            error.to_string(),
            "Use byokd and byokd-kernel of one version.",
        )),
        (Ok(_), None) => Told::Failed(KernelError::new(
            ExitCode::Failed,
            format!("{MOST_AT_A_TIME} requests hang in the kernel"),
            "See the kernel's log (dmesg).",
        )),
        (Ok(ask), Some(_turn)) => carry_out(ask, sockets, records).unwrap_or_else(|error| {
            warn!(why = error.why, remedy = error.remedy, "not done");
            Told::Failed(error)
        }),
    };
    answer(stream, &told)
}

fn may(uid: Uid, user: Option<Uid>) -> bool {
    uid.is_root() || Some(uid) == user
}

fn answer(mut stream: &UnixStream, told: &Told) -> io::Result<()> {
    let mut line = serde_json::to_string(told)?;
    line.push('\n');
    stream.write_all(line.as_bytes())
}

/// Does what is asked, of a device that was made here. The sockets are closed when it returns: what
/// the kernel took, it keeps.
pub(super) fn carry_out(
    ask: Ask,
    sockets: Vec<OwnedFd>,
    records: &Records,
) -> Result<Told, KernelError> {
    if sockets.len() > MAX_CONNECTIONS {
        let why = format!("{} connections; at most {MAX_CONNECTIONS}", sockets.len());
        return Err(KernelError::new(ExitCode::Usage, why, "Use fewer connections."));
    }
    match ask {
        Ask::Connect(connect) => {
            let index = make(&connect, &sockets, records)?;
            drop(sockets);
            info!(device = format!("/dev/nbd{index}"), volume = %connect.volume, "connected");
            name(index);
            Ok(Told::Device { index })
        }
        Ask::Reconfigure { index, volume, size } => {
            let record = records.check(index, volume)?;
            if record.disconnected {
                return Err(still_held(index));
            }
            let asked = netlink::reconfigure(index, volume, size, &sockets);
            if sockets.is_empty() && size.is_none() {
                return asked.map(|()| Told::Done).map_err(|e| probed(index, record, records, e));
            }
            asked?;
            info!(device = format!("/dev/nbd{index}"), %volume, ?size, "reconfigured");
            Ok(Told::Done)
        }
        Ask::Disconnect { index, volume } => {
            let record = records.check(index, volume)?;
            take_away(index, record, records)?;
            info!(device = format!("/dev/nbd{index}"), %volume, "disconnected");
            name(index);
            Ok(Told::Done)
        }
        Ask::Holders { index, volume, mapped } => {
            records.check(index, volume)?;
            // What udev looks at for a moment is not in use. A purge does not wait for that.
            if !mapped {
                settle();
            }
            Ok(Told::Holders { holders: holders::holders(&sysfs::name(index), mapped) })
        }
        Ask::Damaged { index, volume } => {
            records.check(index, volume)?;
            Ok(purge::damaged(&sysfs::name(index)))
        }
        Ask::Purge { index, volume, step } => {
            records.check(index, volume)?;
            let told = purge::purge(&sysfs::name(index), step);
            info!(device = format!("/dev/nbd{index}"), %volume, ?step, ?told, "purged");
            Ok(told)
        }
    }
}

/// Makes a device and records it; one that cannot be recorded could never be taken away again.
fn make(connect: &Connect, sockets: &[OwnedFd], records: &Records) -> Result<u32, KernelError> {
    let index = netlink::connect(connect, sockets)?;
    if let Err(error) = records.made(index, connect.volume) {
        // Without connections it does no harm but to its number.
        let _undone = netlink::disconnect(index);
        let why = format!("/dev/nbd{index} cannot be recorded: {error}");
        return Err(KernelError::new(ExitCode::Failed, why, "Check /run/byokd-kernel."));
    }
    Ok(index)
}

/// Why a device that was made here takes nothing at all: who disconnected it was somebody else. Some
/// kernels would connect it again all the same (before 6.14, but for longterm ones with the fix).
fn probed(index: u32, record: Record, records: &Records, error: KernelError) -> KernelError {
    if error.class != KernelErrorClass::NotOurs {
        return error;
    }
    if let Err(error) = records.disconnected(index, Record { disconnected: true, ..record }) {
        warn!(device = format!("/dev/nbd{index}"), %error, "not recorded as disconnected");
    }
    still_held(index)
}

/// Has the kernel let go of a device. It is recorded before: whoever holds it may keep the kernel
/// from that for as long as he likes.
fn take_away(index: u32, record: Record, records: &Records) -> Result<(), KernelError> {
    let device = format!("/dev/nbd{index}");
    if let Err(error) = records.disconnected(index, Record { disconnected: true, ..record }) {
        warn!(device, %error, "disconnected without a record of that");
    }
    netlink::disconnect(index).inspect_err(|_| {
        if let Err(error) = records.disconnected(index, record) {
            warn!(device, %error, "recorded as disconnected, and is not");
        }
    })
}

/// Has udev look at the device again: when the kernel told it, the backend identifier was not set
/// yet, or not gone.
fn name(index: u32) {
    let dir = sysfs::dir(index);
    let limit = format!("--timeout={}", NAMING.as_secs());
    let told = std::fs::write(dir.join("uevent"), "change");
    if let Err(error) = told {
        warn!(device = %dir.display(), %error, "udev is not told of the device");
    }
    udevadm(&["settle", &limit]);
}

fn settle() {
    let limit = format!("--timeout={}", NAMING.as_secs());
    udevadm(&["settle", &limit]);
}

/// Where there is no udev, there is nothing to wait for.
fn udevadm(arguments: &[&str]) {
    let mut command = Command::new("udevadm");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _ended = command.status();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::client::KernelClient;
    use crate::kernel::{Connect, KernelErrorClass};
    use uuid::Uuid;

    #[test]
    fn root_and_the_daemons_user_may_ask_and_nobody_else() {
        let user = Uid::from_raw(990);
        assert!(may(Uid::from_raw(0), None));
        assert!(may(user, Some(user)));
        assert!(!may(user, None));
        assert!(!may(Uid::from_raw(991), Some(user)));
    }

    #[test]
    fn a_helper_that_is_not_there_is_said_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let client = KernelClient::new(dir.path().join("none.sock"));
        let ask = Ask::Holders { index: 0, volume: Uuid::nil(), mapped: false };
        let error = client.ask(&ask, Vec::new(), Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.class, KernelErrorClass::NoHelper);
        assert!(error.remedy.contains("byokd-kernel.socket"), "{}", error.remedy);
    }

    #[test]
    fn a_helper_that_does_not_answer_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deaf.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let ask = Ask::Holders { index: 0, volume: Uuid::nil(), mapped: false };
        let limit = Duration::from_millis(50);
        let error = KernelClient::new(path).ask(&ask, Vec::new(), limit).unwrap_err();
        assert_eq!(error.class, KernelErrorClass::Slow);
    }

    #[test]
    fn sockets_the_kernel_did_not_take_are_closed_when_the_answer_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel.sock");
        let helper = Helper::at(&path, None, Records::new(dir.path().join("records"))).unwrap();
        std::thread::spawn(move || helper.run());
        let (ours, theirs) = UnixStream::pair().unwrap();
        // A device number that no kernel has.
        let connect = Connect {
            index: Some(u32::MAX),
            volume: Uuid::from_u128(1),
            size: 0,
            block_size: 4096,
            read_only: true,
            trim: false,
            request_timeout: 30,
            dead_timeout: 60,
        };
        let ask = Ask::Connect(connect);
        let client = KernelClient::new(path);
        let told = client.ask(&ask, vec![theirs.into()], Duration::from_secs(10));
        assert!(told.is_err(), "{told:?}");
        let mut byte = [0];
        ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(io::Read::read(&mut &ours, &mut byte).unwrap(), 0);
    }
}
