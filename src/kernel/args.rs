//! The command line of `byokd-kernel`.

use std::path::PathBuf;

use clap::Parser;
use tracing_subscriber::EnvFilter;

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
    /// What to log: error, warn, info, debug, trace, or a filter per module.
    #[arg(long, env = "BYOKD_LOG", default_value = "info,neli=warn")]
    pub log: EnvFilter,
}
