//! What README.md tells people to do works as it stands there.

use std::path::Path;
use std::process::Command;

use crate::support::{Daemon, have, in_memory, run};

const README: &str = include_str!("../../README.md");

/// The blocks of a section that are marked as shell commands to run.
fn commands(section: &str) -> String {
    let start = README.find(&format!("\n## {section}\n")).expect("the section");
    let text = &README[start + 4..];
    let text = text.find("\n## ").map_or(text, |end| &text[..end]);
    let blocks = text.split("```sh\n").skip(1);
    let commands: Vec<_> = blocks.filter_map(|block| block.split("```").next()).collect();
    assert!(!commands.is_empty(), "{section} has commands");
    commands.concat()
}

/// A shell that stops at the first command that fails, with our programs on its path. Whatever it
/// has left running ends with it.
fn shell(script: &str) -> Command {
    let programs = Path::new(env!("CARGO_BIN_EXE_byokctl")).parent().expect("a directory");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("bash");
    shell
        .args(["-euo", "pipefail", "-c"])
        .arg(format!("trap 'kill $(jobs -p) 2>/dev/null || :; wait' EXIT\n{script}"))
        .env("PATH", format!("{}:/usr/bin:/usr/sbin:{path}", programs.display()));
    shell
}

#[test]
fn the_first_command_shows_it_working() {
    assert!(README.contains("\n    cargo run --release -- demo\n"));
    let said = run(Command::new(env!("CARGO_BIN_EXE_byokctl")).arg("demo"));
    for word in ["no word of it", "EPERM", "the data is back", "removed"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn the_second_command_is_there() {
    assert!(README.contains("\n    tests/run\n"));
    run(Command::new("bash").args(["-n", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/run")]));
}

#[test]
fn the_trial_by_hand_works() {
    if !have(&["nbdinfo", "nbdsh", "cryptsetup"]) {
        return;
    }
    let dir = in_memory();
    let said = run(shell(&commands("Try it by hand")).current_dir(dir.path()));
    for word in ["b'hello'", "FENCED", "DisabledException", "serving", "byokd-aws-kms"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn the_way_to_production_works() {
    let daemon = Daemon::start();
    let key = daemon.key();
    let place = daemon.dir.path().to_str().unwrap();
    let script = commands("To production").replace("/var/lib/byokd", place);
    let said = run(shell(&script)
        .env("BYOKD_SOCKET", daemon.socket())
        .env("KEY", &key)
        .env("ROLE", "arn:aws:iam::111122223333:role/byokd-node"));
    for word in ["kms:EncryptionContext:byokd:volume-uuid", "ok", "tenant=acme", "serving"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn the_default_settings_say_what_the_defaults_are() {
    use byokd::config::{Config, load};
    use byokd::key::lease::LeasePolicy;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/byokd.toml");
    let config = load(Path::new(path)).unwrap();
    assert_eq!(config.lease.policy(LeasePolicy::default()), LeasePolicy::default());
    assert_eq!(Config { lease: Config::default().lease, ..config }, Config::default());
    // What is commented out would be understood as well.
    let text = std::fs::read_to_string(path).unwrap();
    let all: String = text
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line))
        .filter(|line| !line.starts_with("fips"))
        .fold(String::new(), |all, line| all + line + "\n");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("byokd.toml");
    std::fs::write(&file, all).unwrap();
    let config = load(&file).unwrap();
    assert!(config.owner.is_some() && config.nbd_group.is_some() && config.tcp_listen.is_some());
    assert!(config.kms.endpoint.is_some() && config.kms.profile.is_some());
}
