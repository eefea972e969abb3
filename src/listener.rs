//! Unix and TCP sockets: made with the right owner and mode, and who may connect.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use tokio::net::unix::UCred;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::export::ExportTable;
use crate::nbd::serve;
use crate::nbd::stream::NbdStream;

/// Connections of one socket at a time that are not yet counted by an export: in their handshake,
/// or waiting for what an earlier one left. The next ones wait to be accepted. Chosen far above what
/// honest clients need at once, who are through in milliseconds, and far below what the process has
/// of threads and descriptors, which other volumes and KMS need too.
const NEWCOMERS: usize = 512;

/// Mode of every socket: owner and group.
const SOCKET_MODE: u32 = 0o660;

/// Whose a unix socket is, and who may connect to it: root, our own user, its owner, and members of
/// its group. The mode says the same to the kernel; the peer's credentials say who it really was.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    owner: Option<Uid>,
    group: Option<Gid>,
}

impl Peers {
    /// The user `owner` and members of `group`, where named, besides root and ourselves.
    ///
    /// # Errors
    /// There is no such user or group.
    pub fn of(owner: Option<&str>, group: Option<&str>) -> io::Result<Self> {
        let missing = |what, name| {
            io::Error::new(io::ErrorKind::NotFound, format!("there is no {what} `{name}`"))
        };
        let owner = match owner {
            Some(name) => Some(User::from_name(name)?.ok_or_else(|| missing("user", name))?.uid),
            None => None,
        };
        let group = match group {
            Some(name) => Some(Group::from_name(name)?.ok_or_else(|| missing("group", name))?.gid),
            None => None,
        };
        Ok(Self { owner, group })
    }

    /// Whether this peer may connect.
    #[must_use]
    pub fn may(&self, peer: &UCred) -> bool {
        let uid = Uid::from_raw(peer.uid());
        if uid.is_root() || uid == nix::unistd::geteuid() || self.owner == Some(uid) {
            return true;
        }
        let Some(group) = self.group else { return false };
        peer.gid() == group.as_raw() || is_member(uid, group)
    }
}

fn is_member(uid: Uid, group: Gid) -> bool {
    let Ok(Some(user)) = User::from_uid(uid) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group))
}

/// A unix socket that goes from the file system when it is dropped.
pub struct BoundSocket {
    path: PathBuf,
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // It may have been removed by hand.
        let _removed = std::fs::remove_file(&self.path);
    }
}

/// Makes a unix socket at `path`, in the place of one that a dead daemon left.
///
/// # Errors
/// It cannot be made there.
pub fn bind(path: &Path, peers: &Peers) -> io::Result<(UnixListener, BoundSocket)> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let socket = BoundSocket { path: path.to_owned() };
    // Ours alone until here, by the umask.
    nix::unistd::chown(path, peers.owner, peers.group)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok((listener, socket))
}

/// A task that accepts connections; dropping it ends it and removes its socket.
pub struct Listener {
    task: JoinHandle<()>,
    _socket: Option<BoundSocket>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listener {
    /// Serves NBD on a unix socket.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn nbd_unix(path: &Path, peers: Peers, table: ExportTable) -> io::Result<Self> {
        let (listener, socket) = bind(path, &peers)?;
        let places = Arc::new(Semaphore::new(NEWCOMERS));
        let task = tokio::spawn(async move {
            loop {
                let place = Arc::clone(&places).acquire_owned().await;
                match accept(&listener, &peers).await {
                    Ok(Some(stream)) => hand_over(NbdStream::Unix(stream), &table, place),
                    Ok(None) => {}
                    Err(error) => pause_after(&error).await,
                }
            }
        });
        Ok(Self { task, _socket: Some(socket) })
    }

    /// Serves NBD on a TCP address of this machine.
    ///
    /// # Errors
    /// The address is not loopback, or cannot be listened on.
    pub async fn nbd_tcp(address: SocketAddr, table: ExportTable) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            let text = format!("{address} is not a loopback address");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let listener = TcpListener::bind(address).await?;
        info!(address = %listener.local_addr()?, "NBD over TCP, without TLS, for this machine only");
        let places = Arc::new(Semaphore::new(NEWCOMERS));
        let task = tokio::spawn(async move {
            loop {
                let place = Arc::clone(&places).acquire_owned().await;
                let accepted = listener.accept().await;
                match accepted.and_then(|(stream, _)| stream.into_std()) {
                    Ok(stream) => match stream.set_nonblocking(false) {
                        Ok(()) => hand_over(NbdStream::Tcp(stream), &table, place),
                        Err(error) => pause_after(&error).await,
                    },
                    Err(error) => pause_after(&error).await,
                }
            }
        });
        Ok(Self { task, _socket: None })
    }
}

async fn accept(
    listener: &UnixListener,
    peers: &Peers,
) -> io::Result<Option<std::os::unix::net::UnixStream>> {
    let (stream, _) = listener.accept().await?;
    let peer = stream.peer_cred()?;
    if !peers.may(&peer) {
        warn!(
            uid = peer.uid(),
            gid = peer.gid(),
            pid = peer.pid(),
            "connection refused: not a member of our group"
        );
        return Ok(None);
    }
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(Some(stream))
}

/// Its `place` is free again when an export counts it, or it has gone.
fn hand_over(stream: NbdStream, table: &ExportTable, place: impl Send + 'static) {
    if let Err(error) = serve(stream, table.clone(), place) {
        warn!(%error, "connection dropped: no thread for it");
    }
}

/// Out of descriptors or memory: accepting again at once would only spin.
async fn pause_after(error: &io::Error) {
    warn!(%error, "cannot accept a connection");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}
