//! `byokctl`: arguments in, one call to the daemon, words out.

pub mod args;
pub mod audit;
mod audit_words;
pub mod demo;
pub mod dev_keys;
pub mod key_policy;
mod lines;
pub mod nbd_client;
pub mod output;
pub mod volumes;
pub mod watch;

use std::path::{Path, PathBuf};

use crate::cli::args::{Command, KeyCommand, VolumeCommand};
use crate::cli::output::Output;
use crate::control::client::Client;
use crate::control::{Answer, ControlError, Request, VolumeCreate};
use crate::exit::ExitCode;

/// The control socket of an installed daemon.
const SOCKET: &str = "/run/byokd/byokd.sock";

/// Does what was asked for.
///
/// # Errors
/// Why it could not be done.
pub fn run(
    command: Command,
    socket: Option<PathBuf>,
    out: &Output,
) -> Result<ExitCode, ControlError> {
    let socket = socket.unwrap_or_else(|| SOCKET.into());
    match command {
        Command::Demo => demo::run(out),
        Command::ServeDev { state_dir, probe_interval } => {
            demo::serve(&state_dir, probe_interval.0)
        }
        Command::Dev { command } => dev_keys::run(command, out),
        Command::Audit { command } => audit::run(command, &socket, out),
        Command::Key { command: KeyCommand::Policy(policy) } => {
            out.key_policy(&policy.arn, &key_policy::statement(&policy));
            Ok(ExitCode::Ok)
        }
        Command::Key { command: KeyCommand::Check { arn, role } } => {
            let role = role.role();
            let answer = ask(&socket, &Request::KeyCheck { arn, role }, out)?;
            out.answer(&answer);
            let Answer::KeyCheck { steps } = answer else { return Ok(ExitCode::Failed) };
            let failed = steps.iter().find_map(|step| step.verdict);
            Ok(failed.map_or(ExitCode::Ok, ExitCode::from))
        }
        Command::Key { command: KeyCommand::Suspend { name } } => {
            tell(&socket, &Request::KeySuspend { name }, out)
        }
        Command::Key { command: KeyCommand::Resume { name } } => {
            tell(&socket, &Request::KeyResume { name }, out)
        }
        Command::Key { command: KeyCommand::Rewrap { name, key } } => {
            tell(&socket, &Request::KeyRewrap { name, key }, out)
        }
        Command::Key { command: KeyCommand::Recheck { target } } => {
            tell(&socket, &Request::KeyRecheck { target }, out)
        }
        Command::Attach { name, read_only, device, connections } => {
            let request = Request::Attach { name, read_only, device, connections };
            tell(&socket, &request, out)
        }
        Command::Detach { name, force } => tell(&socket, &Request::Detach { name, force }, out),
        Command::Reload => tell(&socket, &Request::Reload, out),
        Command::Status { name, watch: None } => tell(&socket, &Request::Status { name }, out),
        Command::Status { name, watch: Some(every) } => {
            watch::watch(&socket, &Request::Status { name }, every.0, out)
        }
        Command::Volume { command } => match command {
            VolumeCommand::Create(create) => {
                let backing = std::path::absolute(&create.backing).map_err(|e| ControlError {
                    exit: ExitCode::Usage,
                    what: format!("create volume {}", create.name),
                    why: e.to_string(),
                    remedy: "Give --backing as a path.".to_owned(),
                })?;
                let request = Request::VolumeCreate(VolumeCreate {
                    name: create.name,
                    backing,
                    size: create.size.0,
                    key: create.key,
                    purpose: create.purpose,
                    role: create.role.role(),
                    context: create.context.into_iter().collect(),
                    sector_size: create.sector_size,
                    force: create.force,
                    preallocate: create.preallocate,
                });
                tell(&socket, &request, out)
            }
            VolumeCommand::List => tell(&socket, &Request::VolumeList, out),
            VolumeCommand::Show { name } => tell(&socket, &Request::VolumeShow { name }, out),
            VolumeCommand::Resize { name, size } => {
                tell(&socket, &Request::VolumeResize { name, size: size.0 }, out)
            }
            VolumeCommand::Forget { name } => tell(&socket, &Request::VolumeForget { name }, out),
        },
    }
}

fn ask(socket: &Path, request: &Request, out: &Output) -> Result<Answer, ControlError> {
    let mut client = Client::connect(socket)?;
    out.patiently(|| client.ask(request))
}

fn tell(socket: &Path, request: &Request, out: &Output) -> Result<ExitCode, ControlError> {
    let answer = ask(socket, request, out)?;
    out.answer(&answer);
    Ok(ExitCode::Ok)
}
