//! The operator's tool: arguments, then [`byokd::cli`], then an exit code.

use std::process::ExitCode;

use byokd::cli;
use byokd::cli::args::Args;
use byokd::cli::output::Output;
use clap::Parser;

fn main() -> ExitCode {
    let args = Args::parse();
    let out = Output::new(args.json);
    match cli::run(args.command, args.socket, &out) {
        Ok(exit) => exit.into(),
        Err(error) => {
            out.error(&error);
            error.exit.into()
        }
    }
}
