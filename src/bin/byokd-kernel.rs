//! The helper that may attach kernel devices: arguments, then [`byokd::kernel::server`].

use std::os::fd::OwnedFd;
use std::process::ExitCode as Code;

use byokd::config::is_volume_name;
use byokd::exit::ExitCode;
use byokd::kernel::args::Args;
use byokd::kernel::noted::name_of;
use byokd::kernel::records::Records;
use byokd::kernel::server::Helper;
use byokd::log;
use clap::Parser;

fn main() -> Code {
    let args = Args::parse();
    if let Some(uuid) = args.name_of {
        return tell(name_of(&args.notes, uuid, is_volume_name));
    }
    let records = Records::new(args.records);
    if args.adopt {
        return match records.adopt(&args.notes, is_volume_name) {
            Ok((ours, others)) => adopted(&ours, &others),
            Err(error) => fail(&error),
        };
    }
    let _log = match log::start(args.log, "byokd-kernel") {
        Ok(log) => log,
        Err(error) => return fail(&error),
    };
    let helper = match passed_socket() {
        Some(socket) => Helper::on(socket, args.user.as_deref(), records),
        None => Helper::at(&args.listen, args.user.as_deref(), records),
    };
    match helper.and_then(|helper| helper.run()) {
        Ok(()) => ExitCode::Ok.into(),
        Err(error) => fail(&error),
    }
}

#[expect(clippy::print_stdout, reason = "udev reads it there")]
fn tell(name: std::io::Result<String>) -> Code {
    // Without a name there is no link.
    let Ok(name) = name else { return ExitCode::Failed.into() };
    println!("{name}");
    ExitCode::Ok.into()
}

#[expect(clippy::print_stdout, reason = "whoever adopts wants to see what")]
fn adopted(ours: &[u32], others: &[u32]) -> Code {
    for index in ours {
        println!("adopted /dev/nbd{index}");
    }
    for index in others {
        println!(
            "left /dev/nbd{index} alone: byokd has noted no name of its volume. If it is byokd's, let byokd run first"
        );
    }
    ExitCode::Ok.into()
}

/// The socket that systemd listens on for us, if it does.
fn passed_socket() -> Option<OwnedFd> {
    let mut passed = listenfd::ListenFd::from_env();
    passed.take_unix_listener(0).ok().flatten().map(OwnedFd::from)
}

#[expect(clippy::print_stderr, reason = "the last words of a helper that could not start")]
fn fail(error: &std::io::Error) -> Code {
    eprintln!("byokd-kernel: cannot start\n  why: {error}\n  do:  Check --listen and --user.");
    ExitCode::Failed.into()
}
