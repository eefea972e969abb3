//! Volumes grow, attached or not; over crashes, and for others who open them.

use std::process::Command;

use serde_json::Value;

use crate::support::{Daemon, have, nbdsh, run, unwrap_token};

const USAGE: i32 = 2;
const DENIED: i32 = 3;
const WRONG_STATE: i32 = 5;

fn resize(daemon: &Daemon, size: &str) -> (i32, Value) {
    daemon.ctl(&["volume", "resize", "v", "--size", size])
}

#[test]
fn a_volume_grows_attached_or_not_and_cryptsetup_still_opens_it() {
    if !have(&["nbdsh", "cryptsetup"]) {
        return;
    }
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "assert h.get_size() == 8 << 20\nh.pwrite(b'o' * 4096, 0)");
    let (code, answer) = resize(&daemon, "16M");
    assert_eq!((code, &answer["size"]), (0, &Value::from(16 << 20)), "{answer}");
    let at_the_end = "assert h.get_size() == 16 << 20\n\
                      h.pwrite(b'n' * 4096, (16 << 20) - 4096)\nh.flush()";
    nbdsh(&daemon.uri("v"), at_the_end);
    daemon.crash_and_restart();
    daemon.ok(&["attach", "v"]);
    let both = "assert h.pread(4096, 0) == b'o' * 4096\n\
                assert h.pread(4096, (16 << 20) - 4096) == b'n' * 4096";
    nbdsh(&daemon.uri("v"), both);
    daemon.ok(&["detach", "v"]);
    assert_eq!(resize(&daemon, "24M").0, 0, "{}", daemon.log());
    let backing = daemon.backing("v");
    let cryptsetup =
        |args: &[&str]| run(Command::new("/usr/sbin/cryptsetup").args(args).arg(&backing));
    let token = cryptsetup(&["token", "export", "--token-id", "0"]);
    let volume_key = daemon.dir.path().join("volume-key");
    std::fs::write(&volume_key, unwrap_token(&daemon, &token)).unwrap();
    let file = volume_key.to_str().unwrap();
    cryptsetup(&["open", "--test-passphrase", "--key-size", "512", "--volume-key-file", file]);
    daemon.ok(&["attach", "v"]);
    nbdsh(&daemon.uri("v"), &format!("assert h.get_size() == 24 << 20\n{both}"));
    let trail = run(Command::new(env!("CARGO_BIN_EXE_byokctl"))
        .arg("--socket")
        .arg(daemon.socket())
        .args(["audit", "tail", "--volume", "v"]));
    assert_eq!(trail.matches("  resize  ").count(), 2, "it is audited: {trail}");
}

#[test]
fn a_volume_gets_no_smaller_and_does_not_grow_without_its_key() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let before = std::fs::read(daemon.backing("v")).unwrap();
    let (code, answer) = resize(&daemon, "4M");
    assert_eq!(code, USAGE, "{answer}");
    assert!(answer["why"].as_str().unwrap().contains("only grows"), "{answer}");
    let (code, answer) = resize(&daemon, "16777217");
    assert_eq!(code, USAGE, "{answer}");
    daemon.ok(&["dev", "key", "disable", &key]);
    let (code, answer) = resize(&daemon, "16M");
    assert_eq!(code, DENIED, "{answer}");
    assert!(std::fs::read(daemon.backing("v")).unwrap() == before, "nothing has changed");
    daemon.ok(&["dev", "key", "enable", &key]);
    daemon.ok(&["attach", "v", "--read-only"]);
    assert_eq!(resize(&daemon, "16M").0, WRONG_STATE);
}
