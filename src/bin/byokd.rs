//! The daemon: arguments, then [`byokd::daemon`], then an exit code.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode as Code;

use byokd::config::{self, Seconds};
use byokd::daemon::{self, Setup};
use byokd::exit::ExitCode;
use byokd::harden::harden;
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Serves AES-256-XTS encrypted NBD volumes whose keys the customer's AWS KMS key unwraps.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Configuration file.
    #[arg(long, default_value = "/etc/byokd/byokd.toml", conflicts_with = "dev")]
    config: PathBuf,
    /// For trials: an embedded KMS, no configuration, everything under --state-dir.
    #[arg(long, requires = "state_dir")]
    dev: bool,
    /// With --dev: where keys, sockets and definitions go.
    #[arg(long, requires = "dev")]
    state_dir: Option<PathBuf>,
    /// With --dev: time between probes.
    #[arg(long, requires = "dev", default_value = "10s")]
    probe_interval: Seconds,
    /// What to log: error, warn, info, debug, trace, or a filter per module.
    #[arg(long, env = "BYOKD_LOG", default_value = "info,aws=warn")]
    log: EnvFilter,
}

fn main() -> Code {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(args.log)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    if let Err(error) = harden() {
        return fail(
            ExitCode::Failed,
            &error,
            "Run it with a systemd unit or shell that allows it.",
        );
    }
    let setup = match (args.dev, args.state_dir) {
        (true, Some(dir)) => match std::path::absolute(&dir) {
            Ok(dir) => Setup::dev(&dir, args.probe_interval.0),
            Err(error) => return fail(ExitCode::Usage, &error, "Name a --state-dir."),
        },
        _ => match config::load(&args.config) {
            Ok(config) => Setup::from_config(config),
            Err(errors) => return fail(ExitCode::Usage, &errors, "Mend the lines named above."),
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build();
    match runtime.map(|runtime| runtime.block_on(daemon::run(setup))) {
        Ok(Ok(())) => ExitCode::Ok.into(),
        Ok(Err(error)) => fail(error.exit(), &error, error.remedy()),
        Err(error) => fail(ExitCode::Failed, &error, "Free memory or raise the limit of threads."),
    }
}

#[expect(clippy::print_stderr, reason = "the last words of a daemon that could not start")]
fn fail(exit: ExitCode, why: &dyn std::fmt::Display, remedy: &str) -> Code {
    eprintln!("byokd: cannot start\n  why: {why}\n  do:  {remedy}");
    exit.into()
}
