//! The daemon: arguments, then [`byokd::daemon`], then an exit code.

use std::alloc::System;
use std::path::Path;
use std::process::ExitCode as Code;
use std::time::Duration;

use byokd::config;
use byokd::daemon::args::Args;
use byokd::daemon::{self, Setup};
use byokd::exit::ExitCode;
use byokd::harden::harden;
use byokd::systemd::Systemd;
use byokd::{log, registers};
use clap::Parser;
use zeroizing_alloc::ZeroAlloc;

/// Whatever is freed is wiped: the libraries below hold answers of KMS in memory of their own.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> Code {
    let args = Args::parse();
    if args.check {
        return check(&args.config);
    }
    let lines = match log::start(args.log, "byokd") {
        Ok(lines) => lines,
        Err(error) => return fail(ExitCode::Failed, &error, NO_THREAD),
    };
    let systemd = Systemd::from_env();
    if let Err(error) = harden() {
        return fail(
            ExitCode::Failed,
            &error,
            "Run it with a systemd unit or shell that allows it.",
        );
    }
    let setup = match (args.dev, args.state_dir) {
        (true, Some(dir)) => match std::path::absolute(&dir) {
            Ok(dir) => Setup::dev(&dir, args.probe_interval.0, args.http_port),
            Err(error) => return fail(ExitCode::Usage, &error, "Name a --state-dir."),
        },
        _ => match config::load_with_hash(&args.config) {
            Ok((config, hash)) => Setup::from_config(config, Some((args.config, hash))),
            Err(errors) => return fail(ExitCode::Usage, &errors, "Mend the lines named above."),
        },
    };
    if let Err(error) = lines.export(setup.config.log.otlp_endpoint.as_deref()) {
        return fail(ExitCode::Usage, &error, "Name the URL of a collector, or none.");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        // Answers of KMS pass through them.
        .on_thread_park(registers::wipe)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(ExitCode::Failed, &error, NO_THREAD),
    };
    let ended = runtime.block_on(daemon::run(setup, systemd));
    // Threads that a store or a name server keeps waiting may never end.
    runtime.shutdown_timeout(LAST);
    match ended {
        Ok(()) => ExitCode::Ok.into(),
        Err(error) => fail(error.exit(), &error, error.remedy()),
    }
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "whoever checks reads it")]
fn check(file: &Path) -> Code {
    match config::check(file) {
        Ok(count) => {
            println!("{}: no errors; {count} volumes defined", file.display());
            ExitCode::Ok.into()
        }
        Err(errors) => {
            eprintln!("{errors}");
            ExitCode::Usage.into()
        }
    }
}

/// How long what is still under way at the end may take to notice.
const LAST: Duration = Duration::from_secs(1);

const NO_THREAD: &str = "Free memory or raise the limit of threads.";

#[expect(clippy::print_stderr, reason = "the last words of a daemon that could not start")]
fn fail(exit: ExitCode, why: &dyn std::fmt::Display, remedy: &str) -> Code {
    eprintln!("byokd: cannot start\n  why: {why}\n  do:  {remedy}");
    exit.into()
}
