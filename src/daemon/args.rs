//! The command line of `byokd`.

use std::path::PathBuf;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::config::Seconds;

/// Serves AES-256-XTS encrypted NBD volumes whose keys the customer's AWS KMS key unwraps.
#[derive(Parser)]
#[command(name = "byokd", version)]
pub struct Args {
    /// Configuration file.
    #[arg(long, default_value = "/etc/byokd/byokd.toml", conflicts_with = "dev")]
    pub config: PathBuf,
    /// Reads the settings and all definitions, says what is wrong with them, and ends: 0 if nothing
    /// is, else 2.
    #[arg(long, conflicts_with = "dev")]
    pub check: bool,
    /// For trials: an embedded KMS, no configuration, everything under --state-dir.
    #[arg(long, requires = "state_dir")]
    pub dev: bool,
    /// With --dev: where keys, sockets and definitions go.
    #[arg(long, requires = "dev")]
    pub state_dir: Option<PathBuf>,
    /// With --dev: time between probes.
    #[arg(long, requires = "dev", default_value = "10s")]
    pub probe_interval: Seconds,
    /// With --dev: the port of 127.0.0.1 for metrics, JSON API and console; any free one without,
    /// and the file http-endpoint under --state-dir says which.
    #[arg(long, requires = "dev", default_value_t = 0)]
    pub http_port: u16,
    /// What to log: error, warn, info, debug, trace, or a filter per module; trace of libraries,
    /// which shows secrets, is never written.
    #[arg(long, env = "BYOKD_LOG", default_value = "info,aws=warn")]
    pub log: EnvFilter,
}
