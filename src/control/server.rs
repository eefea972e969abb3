//! The control socket: who may ask, one JSON line in, one out.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::audit::record::Peer;
use crate::control::{Answer, ControlError, Request};
use crate::daemon::Daemon;
use crate::exit::ExitCode;
use crate::listener::{BoundSocket, Peers, bind};
use crate::progress::Part;

/// The longest request.
const MAX_REQUEST: u64 = 1 << 20;

/// How often the task is heard of, and within what time it must be.
const TICK: Duration = Duration::from_secs(5);
const BOUND: Duration = Duration::from_secs(15);

/// The task that answers; dropping it ends it and removes its socket.
pub struct ControlServer {
    task: JoinHandle<()>,
    _socket: BoundSocket,
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ControlServer {
    /// Answers requests at `path`; `part` says that it does.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(path: &Path, peers: Peers, daemon: Arc<Daemon>, part: Part) -> io::Result<Self> {
        let (listener, socket) = bind(path, &peers)?;
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(TICK);
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = tick.tick() => {
                        part.goes_on(BOUND);
                        continue;
                    }
                };
                match accepted {
                    Ok((stream, _)) => {
                        let (peers, daemon) = (peers.clone(), Arc::clone(&daemon));
                        tokio::spawn(async move {
                            if let Err(error) = Box::pin(converse(stream, &peers, &daemon)).await {
                                debug!(%error, "control connection ended");
                            }
                        });
                    }
                    Err(error) => {
                        warn!(%error, "cannot accept a control connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(Self { task, _socket: socket })
    }
}

async fn converse(stream: UnixStream, peers: &Peers, daemon: &Arc<Daemon>) -> io::Result<()> {
    let peer = stream.peer_cred()?;
    let (read, mut write) = stream.into_split();
    if !peers.may(&peer) {
        warn!(uid = peer.uid(), gid = peer.gid(), "control connection refused");
        let answer = refuse(
            "use the control socket",
            format!("uid {} is neither root nor in the daemon's group", peer.uid()),
            "Run byokctl as root, or join the group that `group` names in byokd.toml.",
        );
        return send(&mut write, &answer).await;
    }
    let mut read = BufReader::new(read);
    let mut line = String::new();
    loop {
        line.clear();
        let got = (&mut read).take(MAX_REQUEST).read_line(&mut line).await?;
        if got == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str::<Request>(&line) {
            Ok(request) => Box::pin(daemon.answer(request, who(&peer))).await,
            Err(error) => refuse(
                "read the request",
                error.to_string(),
                "Use a byokctl of the daemon's version.",
            ),
        };
        send(&mut write, &answer).await?;
        if !line.ends_with('\n') {
            // Too long, or cut off: there is no way to find the next one.
            return Ok(());
        }
    }
}

/// Who is at the other end, as far as the kernel tells.
fn who(peer: &UCred) -> Peer {
    let program = peer.pid().and_then(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some(name.trim().to_owned())
    });
    Peer { uid: peer.uid(), gid: peer.gid(), pid: peer.pid(), program }
}

fn refuse(what: &str, why: String, remedy: &str) -> Answer {
    Answer::Error(ControlError {
        exit: ExitCode::Usage,
        what: what.to_owned(),
        why,
        remedy: remedy.to_owned(),
    })
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    write.write_all(&line).await
}
