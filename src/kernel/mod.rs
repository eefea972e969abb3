//! Volumes as `/dev/nbdX`: what the kernel's NBD client is asked, and by whom.
//!
//! Attaching a device takes `CAP_SYS_ADMIN`, which the daemon does not have. A small helper,
//! `byokd-kernel`, has it: it never sees a key, listens on a unix socket for root and the daemon's
//! user alone, and does just what [`Ask`] says. Descriptors travel with a request: the kernel's ends
//! of socketpairs whose other ends the daemon keeps. One request a connection, one JSON line each
//! way; whoever asked gives up by closing the connection, so nothing that hangs in the kernel holds
//! the daemon up.
//!
//! | file | what it is |
//! |---|---|
//! | `args.rs` | the helper's command line |
//! | `server.rs` | the helper: who may ask, what is done |
//! | `client.rs` | the daemon's side, each call within a time limit |
//! | `passing.rs` | a line with descriptors over a unix socket |
//! | `netlink.rs` | generic netlink, family `nbd` |
//! | `sysfs.rs` | which devices there are and whose they are |
//! | `records.rs` | which devices the helper made, by its own word |
//! | `noted.rs` | the names of volumes, for udev |
//! | `mounts.rs` | the mounts of what lies on a device, each told from every other |
//! | `holders.rs` | who has a device mounted, open or mapped |
//! | `purge.rs` | what is done about plaintext that the node caches |
//! | `ioctl.rs` | the two ioctls that takes |
//! | `tests.rs` | holders and purges of loop devices |

pub mod args;
pub mod client;
mod holders;
mod ioctl;
mod mounts;
mod netlink;
pub mod noted;
mod passing;
mod purge;
pub mod records;
pub mod server;
pub mod sysfs;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::exit::ExitCode;

/// Where the helper listens unless a setting says otherwise.
pub const SOCKET: &str = "/run/byokd-kernel/kernel.sock";

/// The longest line of the protocol.
const MAX_LINE: usize = 1 << 20;

/// Most connections of one device; each is a descriptor that travels.
pub const MAX_CONNECTIONS: usize = 16;

/// How long the helper waits for udev to name a device, or to look at one. Whoever asks for that has to
/// wait longer: what the kernel did at once is not to look as if it had not.
pub const NAMING: Duration = Duration::from_secs(3);

/// What the helper is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// Makes a device of the sockets that come along: answered with [`Told::Device`].
    Connect(Connect),
    /// Gives a device that is there sockets for those that died, if there are any along:
    /// answered with [`Told::Done`]. The kernel says yes even if it takes none; then they are
    /// closed when the answer comes. Without sockets and size nothing is changed, but asked whether
    /// it is still connected.
    Reconfigure {
        /// Which.
        index: u32,
        /// Whose it has to be.
        volume: Uuid,
        /// Bytes it has from now on.
        size: Option<u64>,
    },
    /// Takes a device away: answered with [`Told::Done`].
    Disconnect {
        /// Which.
        index: u32,
        /// Whose it has to be.
        volume: Uuid,
    },
    /// Who has a device mounted or open, or its files mapped: answered with [`Told::Holders`].
    Holders {
        /// Which.
        index: u32,
        /// Whose it has to be, if it is anybody's.
        volume: Uuid,
        /// Files of file systems on it that are mapped, as well. Asked after a fence: what udev
        /// looks at just then is not waited for.
        mapped: bool,
    },
    /// Which mounted file systems of a device do not work any more: answered with
    /// [`Told::Purged`], those that do in `what`, the others in `failed`; each as device and mount
    /// point.
    Damaged {
        /// Which.
        index: u32,
        /// Whose it has to be, if it is anybody's.
        volume: Uuid,
    },
    /// One step against cached plaintext: answered with [`Told::Purged`].
    Purge {
        /// Which device.
        index: u32,
        /// Whose it has to be, if it is anybody's.
        volume: Uuid,
        /// What to do.
        step: PurgeStep,
    },
}

/// A device to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// Which number; the first free one if absent.
    pub index: Option<u32>,
    /// The uuid of the volume, which becomes the backend identifier.
    pub volume: Uuid,
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// Nobody may write.
    pub read_only: bool,
    /// Blocks may be given back.
    pub trim: bool,
    /// Seconds after which the kernel sends a request again over a new connection.
    pub request_timeout: u64,
    /// Seconds for which requests wait when no connection is left.
    pub dead_timeout: u64,
}

/// One step against plaintext that the node caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PurgeStep {
    /// Shuts down every file system on the device: its cached files cannot be read any more.
    ShutDown,
    /// Ends the processes that have it mounted, open or mapped.
    EndProcesses,
    /// Ends the control groups of those processes.
    EndGroups,
    /// Unmounts it, in every mount namespace, as soon as nobody uses it.
    Unmount,
    /// Writes back and drops what is cached of the device itself.
    FlushDevice,
    /// Drops clean cached pages of the whole node.
    DropCaches,
}

/// What the helper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "told", rename_all = "kebab-case")]
pub enum Told {
    /// It is done.
    Done,
    /// The device's number.
    Device {
        /// N of `/dev/nbdN`.
        index: u32,
    },
    /// Who holds the device.
    Holders {
        /// All of them.
        holders: Vec<Holder>,
    },
    /// What a step did.
    Purged {
        /// What was worked on, and what became of it.
        what: Vec<String>,
        /// What could not be done.
        failed: Vec<String>,
    },
    /// It could not be done.
    Failed(KernelError),
}

/// Someone who has a device in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// How.
    pub by: HeldBy,
    /// A mount point, a device, or a file.
    pub what: String,
    /// The process, if it is one.
    pub pid: Option<i32>,
    /// Its program.
    pub program: Option<String>,
}

/// How a device is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeldBy {
    /// A file system on it is mounted.
    Mount,
    /// It is swap space.
    Swap,
    /// Another block device is made of it.
    Device,
    /// A process has it open.
    Process,
    /// A process has a file on it mapped.
    Mapping,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let program = self.program.as_deref().unwrap_or("a process");
        let pid = self.pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        match self.by {
            HeldBy::Mount if self.pid.is_some() => {
                write!(f, "mounted on {} for {program}{pid}", self.what)
            }
            HeldBy::Mount => write!(f, "mounted on {}", self.what),
            HeldBy::Swap => write!(f, "{} is swap space", self.what),
            HeldBy::Device => write!(f, "part of {}", self.what),
            HeldBy::Process => write!(f, "{} opened by {program}{pid}", self.what),
            HeldBy::Mapping => write!(f, "{} mapped by {program}{pid}", self.what),
        }
    }
}

/// Why the kernel, or the helper, did not do it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{why}")]
pub struct KernelError {
    /// What a command ends with.
    pub exit: ExitCode,
    /// What a caller tells apart.
    pub class: KernelErrorClass,
    /// Why it failed.
    pub why: String,
    /// What to do about it.
    pub remedy: String,
}

/// What a caller tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelErrorClass {
    /// Nobody listens at the helper's socket.
    NoHelper,
    /// There is no answer within the time limit.
    Slow,
    /// There is no such device any more, or it is somebody else's.
    NotOurs,
    /// It was disconnected, and whoever has it mounted or open keeps it from going.
    Disconnected,
    /// Anything else.
    Other,
}

impl KernelError {
    pub(crate) fn new(exit: ExitCode, why: impl Into<String>, remedy: impl Into<String>) -> Self {
        let class = KernelErrorClass::Other;
        Self { exit, class, why: why.into(), remedy: remedy.into() }
    }

    fn of(self, class: KernelErrorClass) -> Self {
        Self { class, ..self }
    }
}
