//! The console of a real daemon in a real Chromium.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::metrics::address;
use crate::support::{Daemon, have, in_memory, nbdsh, run, until};

/// The Python that has what tests/install/browser.sh installs.
pub(crate) fn python() -> Option<PathBuf> {
    let tools = std::env::var_os("BYOKD_TEST_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools"),
        PathBuf::from,
    );
    let python = tools.join("browser/bin/python");
    if tools.join("browser/version").exists() {
        return Some(python);
    }
    let why = format!("needs {}; tests/run installs it", python.display());
    assert!(std::env::var_os("CI").is_none(), "{why}");
    println!("skipped: {why}");
    None
}

/// Runs a part of tests/console.py, which looks with a browser.
fn look(part: &str, url: &str, daemon: &Daemon, more: &[&str]) {
    let Some(python) = python() else { return };
    run(Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/console.py"))
        .args([part, url])
        .args(more)
        .env("BYOKCTL", env!("CARGO_BIN_EXE_byokctl"))
        .env("BYOKD_SOCKET", daemon.socket())
        .env("BYOKD_STATE_DIR", daemon.dir.path())
        .env("BYOKD_PID", daemon.pid().to_string()));
}

#[test]
fn a_denial_is_seen_in_the_console_and_so_is_its_end() {
    if !have(&["chromium", "chromedriver", "nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let url = format!("http://{}/", address(&daemon));
    let (key, other) = (daemon.key(), daemon.key());
    daemon.volume("zeebe-0", "8M", &key);
    daemon.volume("zeebe-1", "8M", &other);
    daemon.create("zeebe-2", "8M", &other);
    daemon.volume("zeebe-3", "8M", &key);
    nbdsh(&daemon.uri("zeebe-0"), "h.pwrite(bytes(8192), 0)\nh.pread(4096, 0)");
    look("denial", &url, &daemon, &[&key, &daemon.uri("zeebe-0")]);
}

#[test]
fn the_console_asks_for_the_token_and_shows_nothing_without_it() {
    if !have(&["chromium", "chromedriver"]) {
        return;
    }
    let place = in_memory();
    let token = place.path().join("token");
    std::fs::write(&token, "0123456789abcdef\n").unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let settings = format!(
        "[http]\nlisten = \"127.0.0.1:0\"\ntoken_file = \"{}\"\n[kms]\nregion = \"eu-central-1\"\n",
        token.display()
    );
    let daemon = Daemon::configured(&settings);
    let mut bound = String::new();
    until("it says where it listens", || {
        let log = daemon.log();
        let after = log.split("bound=127.0.0.1:").nth(1).unwrap_or_default();
        bound = after.chars().take_while(char::is_ascii_digit).collect();
        !bound.is_empty()
    });
    look("token", &format!("http://127.0.0.1:{bound}/"), &daemon, &["0123456789abcdef"]);
}
