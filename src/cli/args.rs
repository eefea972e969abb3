//! The command line of `byokctl`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand};
use jiff::Timestamp;

use crate::audit::verify::Anchor;
use crate::config::Seconds;
use crate::key::wrapped::{KeyArn, Purpose, Role};
use crate::units::{SectorSize, Size};

/// Operates byokd: volumes, their keys, and trials.
#[derive(Parser)]
#[command(name = "byokctl", version, arg_required_else_help = true)]
pub struct Args {
    /// The daemon's control socket [default: /run/byokd/byokd.sock].
    #[arg(long, global = true, env = "BYOKD_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Answer in JSON, one object.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Subcommand)]
pub enum Command {
    /// Show all of it in a minute: a key, a volume, the fence, and back. Needs nothing installed.
    Demo,
    /// Make, list, show and forget volumes.
    Volume {
        /// Which of these.
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// Unlock a volume and serve it.
    Attach {
        /// The volume's name.
        name: String,
        /// Refuse writes.
        #[arg(long)]
        read_only: bool,
        /// As a device of the kernel: `auto` for the first free one, or /dev/nbdN.
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
        /// Connections of that device.
        #[arg(long, value_name = "N")]
        connections: Option<usize>,
    },
    /// Stop serving a volume: drain, flush, destroy the key in memory.
    Detach {
        /// The volume's name.
        name: String,
        /// Take its kernel device away whoever uses it, and whatever hangs.
        #[arg(long)]
        force: bool,
    },
    /// Read the settings and the definitions anew.
    Reload,
    /// Say how volumes and their keys are.
    Status {
        /// Only this volume.
        name: Option<String>,
        /// Go on saying it, this often, until interrupted.
        #[arg(
            long,
            short,
            value_name = "TIME",
            num_args = 0..=1,
            require_equals = true,
            default_missing_value = "1s"
        )]
        watch: Option<Seconds>,
    },
    /// Look at a customer's key.
    Key {
        /// Which of these.
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Look at the audit trail, check it, hold it against CloudTrail.
    Audit {
        /// Which of these.
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// The development KMS of `byokd --dev`.
    Dev {
        /// Which of these.
        #[command(subcommand)]
        command: DevCommand,
    },
    /// The daemon that `demo` starts.
    #[command(hide = true)]
    ServeDev {
        /// Where everything goes.
        #[arg(long)]
        state_dir: PathBuf,
        /// Time between probes.
        #[arg(long, default_value = "1s")]
        probe_interval: Seconds,
    },
}

/// `byokctl volume`.
#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Make a volume under a customer's key.
    Create(Box<CreateArgs>),
    /// List all volumes.
    List,
    /// Show everything known of one.
    Show {
        /// Its name.
        name: String,
    },
    /// Make a volume larger, also while it is in use.
    Resize {
        /// Its name.
        name: String,
        /// Bytes a client may use from then on, like 20G.
        #[arg(long)]
        size: Size,
    },
    /// Drop a volume's definition; its data stays.
    Forget {
        /// Its name.
        name: String,
    },
}

/// `byokctl volume create`.
#[derive(clap::Args)]
pub struct CreateArgs {
    /// Its name, also of its NBD export.
    pub name: String,
    /// The file (made if it is not there) or block device that holds the ciphertext.
    #[arg(long)]
    pub backing: PathBuf,
    /// Bytes a client may use, like 10G; the header comes on top. 0 is all of a block device.
    #[arg(long)]
    pub size: Size,
    /// ARN of the customer's KMS key.
    #[arg(long)]
    pub key: KeyArn,
    /// What the volume is for; part of the encryption context.
    #[arg(long)]
    pub purpose: Purpose,
    /// As whom to use the key.
    #[command(flatten)]
    pub role: RoleArgs,
    /// KEY=VALUE to add to the encryption context; stands in clear in CloudTrail.
    #[arg(long, value_parser = context_pair)]
    pub context: Vec<(String, String)>,
    /// 4096 or 512.
    #[arg(long, default_value = "4096", value_parser = sector_size)]
    pub sector_size: SectorSize,
    /// Format over data that is there.
    #[arg(long)]
    pub force: bool,
    /// Allocate all blocks now.
    #[arg(long)]
    pub preallocate: bool,
}

/// A role to assume for a key, if it is not the daemon's own.
#[derive(clap::Args)]
pub struct RoleArgs {
    /// ARN of a role to assume for the key, for example in the customer's account.
    #[arg(long, value_name = "ARN")]
    role_arn: Option<String>,
    /// The external id that the role's trust policy asks for.
    #[arg(long, value_name = "ID", requires = "role_arn")]
    external_id: Option<String>,
}

impl RoleArgs {
    /// The role, if one is named.
    #[must_use]
    pub fn role(self) -> Option<Role> {
        Some(Role { arn: self.role_arn?, external_id: self.external_id })
    }
}

/// `byokctl key`.
#[derive(Subcommand)]
pub enum KeyCommand {
    /// Try a key step by step and say what works.
    Check {
        /// The key.
        arn: KeyArn,
        /// As whom to ask.
        #[command(flatten)]
        role: RoleArgs,
    },
    /// Print the least policy that the customer's key needs.
    Policy(PolicyArgs),
    /// Fence a volume by hand and keep it so, also over a restart of the daemon.
    Suspend {
        /// The volume's name.
        name: String,
    },
    /// Take a suspension back: the volume is served again when KMS allows it.
    Resume {
        /// The volume's name.
        name: String,
    },
    /// Wrap a volume's key anew, after a rotation or to move it to another KMS key.
    Rewrap {
        /// The volume's name.
        name: String,
        /// ARN of the KMS key to move to; without it, the one that it has.
        #[arg(long)]
        key: Option<KeyArn>,
    },
    /// Ask KMS now instead of when it is due, and act upon the answer.
    Recheck {
        /// A volume's name, or a key's ARN for all attached volumes under it.
        target: String,
    },
}

/// `byokctl key policy`.
#[derive(clap::Args)]
pub struct PolicyArgs {
    /// The key.
    pub arn: KeyArn,
    /// ARN of the role that byokd uses.
    #[arg(long)]
    pub principal: String,
    /// Allow only volumes of this purpose.
    #[arg(long)]
    pub purpose: Option<Purpose>,
    /// Allow rewrapping as well, from and to this key.
    #[arg(long)]
    pub rewrap: bool,
}

/// `byokctl audit`.
#[derive(Subcommand)]
pub enum AuditCommand {
    /// Check that no record was changed, removed, added or moved.
    Verify {
        /// Which files.
        #[command(flatten)]
        files: TrailArgs,
        /// SEQ:HASH that was noted elsewhere and has to be in it; may be repeated.
        #[arg(long, value_name = "SEQ:HASH")]
        expect: Vec<Anchor>,
        /// The public key that checkpoints have to be signed with: hex, or a PEM file.
        #[arg(long, value_name = "KEY")]
        public_key: Option<String>,
        /// Earlier files lie elsewhere.
        #[arg(long)]
        partial: bool,
    },
    /// Show the latest records of a running daemon.
    Tail {
        /// Go on as new ones come.
        #[arg(short, long)]
        follow: bool,
        /// Only this volume's.
        #[arg(long)]
        volume: Option<String>,
        /// How many.
        #[arg(short = 'n', long, default_value = "20")]
        last: usize,
    },
    /// Print records as they stand in the trail, one a line.
    Export {
        /// Which files.
        #[command(flatten)]
        files: TrailArgs,
        /// From this time (RFC 3339) or number on.
        #[arg(long, value_name = "TIME|SEQ")]
        from: Option<Place>,
        /// Up to this time or number.
        #[arg(long, value_name = "TIME|SEQ")]
        to: Option<Place>,
        /// Only this volume's.
        #[arg(long)]
        volume: Option<String>,
    },
    /// Hold the trail against an export of the customer's CloudTrail events.
    Reconcile {
        /// The export: files of CloudTrail, also gzipped, or answers of `lookup-events`.
        #[arg(required = true, value_name = "CLOUDTRAIL.json")]
        exports: Vec<PathBuf>,
        /// The directory of the trail; without it, that of the running daemon.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// ARN of a role or user that is byokd's, besides those that are found; may be repeated.
        #[arg(long, value_name = "ARN")]
        principal: Vec<String>,
    },
    /// Print the last record's SEQ:HASH, to be kept elsewhere.
    Head,
}

/// Which files of a trail.
#[derive(clap::Args)]
pub struct TrailArgs {
    /// Files; without any, all of the trail's directory.
    pub files: Vec<PathBuf>,
    /// The directory of a trail; without it, that of the running daemon.
    #[arg(long, value_name = "DIR", conflicts_with = "files")]
    pub dir: Option<PathBuf>,
}

/// A place in a trail: a time or a record's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// RFC 3339.
    Time(Timestamp),
    /// A record.
    Seq(u64),
}

impl FromStr for Place {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(seq) = text.parse() {
            return Ok(Self::Seq(seq));
        }
        text.parse().map(Self::Time).map_err(|_| {
            format!("`{text}` is neither a number nor a time like 2026-03-01T12:00:00Z")
        })
    }
}

/// `byokctl dev`.
#[derive(Subcommand)]
pub enum DevCommand {
    /// Keys of the development KMS.
    Key {
        /// Where `byokd --dev` keeps its state.
        #[arg(long, global = true, env = "BYOKD_STATE_DIR")]
        state_dir: Option<PathBuf>,
        /// What to do with them.
        #[command(subcommand)]
        command: DevKeyCommand,
    },
}

/// `byokctl dev key`.
#[derive(Subcommand)]
pub enum DevKeyCommand {
    /// Make a key and print its ARN.
    Create,
    /// List keys with their states.
    List,
    /// Disable a key: what a customer does to take it away at once.
    Disable {
        /// The key.
        arn: KeyArn,
    },
    /// Enable a disabled key.
    Enable {
        /// The key.
        arn: KeyArn,
    },
    /// Deny its use by its policy.
    Deny {
        /// The key.
        arn: KeyArn,
    },
    /// Allow its use by its policy again.
    Allow {
        /// The key.
        arn: KeyArn,
    },
    /// Schedule its deletion.
    Delete {
        /// The key.
        arn: KeyArn,
    },
    /// Cancel its deletion, and enable it.
    Restore {
        /// The key.
        arn: KeyArn,
    },
}

fn context_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}

fn sector_size(text: &str) -> Result<SectorSize, String> {
    let bytes: u32 = text.parse().map_err(|_| "4096 or 512".to_owned())?;
    SectorSize::try_from(bytes).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
