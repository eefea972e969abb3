//! The command line of `byokd-kernel`.

use std::path::PathBuf;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

/// Attaches volumes as /dev/nbdX for byokd, which may not do that itself. It never sees a key.
#[derive(Parser)]
#[command(name = "byokd-kernel", version)]
pub struct Args {
    /// Where to listen, if systemd passes no socket.
    #[arg(long, default_value = super::SOCKET)]
    pub listen: PathBuf,
    /// The daemon's user, who may ask besides root.
    #[arg(long)]
    pub user: Option<String>,
    /// Print the name that byokd noted for the volume of this uuid, and do nothing else: for udev's rule.
    #[arg(long, value_name = "UUID", conflicts_with_all = ["listen", "user"])]
    pub name_of: Option<Uuid>,
    /// Record the devices of volumes that a version without records attached, and do nothing else: once, at an upgrade from one.
    #[arg(long, conflicts_with_all = ["listen", "user", "name_of"])]
    pub adopt: bool,
    /// Where byokd notes the names of volumes that have a device: for --name-of and --adopt.
    #[arg(long, value_name = "DIR", default_value = "/run/byokd/devices")]
    pub notes: PathBuf,
    /// Where to record which devices were attached: of root, and nobody else may write to it.
    #[arg(long, value_name = "DIR", default_value = super::records::RECORDS)]
    pub records: PathBuf,
    /// What to log: error, warn, info, debug, trace, or a filter per module.
    #[arg(long, env = "BYOKD_LOG", default_value = "info,neli=warn")]
    pub log: EnvFilter,
}
