//! Volumes: made, attached, refused, and opened by others.

use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use byokd::kms::dev::{Fault, FaultKind};
use serde_json::Value;

use crate::customer::Customer;
use crate::mounts::{Mount, can_mount};
use crate::support::{Daemon, Running, have, in_memory, nbdsh, output, run, until, unwrap_token};

const DENIED: i32 = 3;
const WRONG_STATE: i32 = 5;

fn why(answer: &Value) -> &str {
    answer["why"].as_str().unwrap_or_default()
}

fn create<'a>(name: &'a str, backing: &'a str, key: &'a str) -> Vec<&'a str> {
    vec![
        "volume",
        "create",
        name,
        "--backing",
        backing,
        "--size",
        "8M",
        "--key",
        key,
        "--purpose",
        "backup",
    ]
}

#[test]
fn a_volume_lives_from_create_to_forget() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    assert_eq!(daemon.state("v"), "detached");
    daemon.ok(&["attach", "v"]);
    assert_eq!(daemon.state("v"), "serving");
    let (code, answer) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, WRONG_STATE, "a second attach is refused: {answer}");
    assert_eq!(daemon.ctl(&["volume", "forget", "v"]).0, WRONG_STATE);
    daemon.ok(&["detach", "v"]);
    assert_eq!(daemon.ctl(&["detach", "v"]).0, WRONG_STATE);
    daemon.ok(&["volume", "forget", "v"]);
    assert_eq!(daemon.ctl(&["volume", "show", "v"]).0, WRONG_STATE);
    assert!(daemon.backing("v").exists(), "forgetting keeps the data");
}

#[test]
fn a_key_that_may_not_be_used_makes_no_volume_and_attaches_none() {
    let daemon = Daemon::start();
    let key = daemon.key();
    let backing = daemon.backing("v");
    let backing = backing.to_str().unwrap();
    daemon.ok(&["dev", "key", "disable", &key]);
    let (code, answer) = daemon.ctl(&create("v", backing, &key));
    assert_eq!(code, DENIED, "{answer}");
    assert!(!daemon.backing("v").exists(), "no half-made volume is left");
    let unknown = format!("{}0", &key[..key.len() - 1]);
    assert_eq!(daemon.ctl(&create("v", backing, &unknown)).0, DENIED);
    let elsewhere = key.replace("eu-central-1", "us-east-1");
    let (code, answer) = daemon.ctl(&create("v", backing, &elsewhere));
    assert_ne!(code, 0);
    assert!(why(&answer).contains("WrongRegion"), "{answer}");
    assert!(!daemon.backing("v").exists());
    daemon.ok(&["dev", "key", "enable", &key]);
    daemon.ok(&create("v", backing, &key));
    daemon.ok(&["dev", "key", "disable", &key]);
    let (code, answer) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, DENIED, "{answer}");
    assert_eq!(daemon.state("v"), "detached");
    daemon.ok(&["dev", "key", "enable", &key]);
    daemon.ok(&["attach", "v"]);
}

#[test]
fn what_is_no_volume_of_ours_is_refused_and_left_alone() {
    if !have(&["mkfs.ext4", "cryptsetup"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let backing = daemon.backing("v");
    let good = std::fs::read(&backing).unwrap();
    let attach = || {
        let (code, answer) = daemon.ctl(&["attach", "v"]);
        assert_ne!(code, 0);
        why(&answer).to_owned()
    };
    std::fs::write(&backing, &good[..good.len() - 4096]).unwrap();
    assert!(attach().contains("cut off"));
    std::fs::write(&backing, &good[..9000]).unwrap();
    attach();
    std::fs::write(&backing, vec![0xa5; good.len()]).unwrap();
    assert!(attach().contains("no LUKS2 header"));
    run(Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&backing));
    assert!(attach().contains("no LUKS2 header"));
    let path = backing.to_str().unwrap();
    daemon.ok(&["volume", "forget", "v"]);
    let (code, answer) = daemon.ctl(&create("v", path, &key));
    assert_eq!(code, WRONG_STATE);
    assert!(why(&answer).contains("ext2/3/4"), "{answer}");
    // One damaged copy is repaired and reported.
    let mut damaged = good.clone();
    damaged[4096..5000].fill(0xff);
    std::fs::write(&backing, &damaged).unwrap();
    std::fs::write(daemon.dir.path().join("volumes.d/v.toml"), format!("backing = \"{path}\"\n"))
        .unwrap();
    let mut daemon = daemon;
    daemon.crash_and_restart();
    let answer = daemon.ok(&["attach", "v"]);
    assert!(answer["header_note"].as_str().unwrap().contains("repaired"), "{answer}");
    daemon.ok(&["detach", "v"]);
    assert!(
        std::fs::read(&backing).unwrap() == good || {
            // The repaired copy has a salt of its own.
            daemon.ok(&["volume", "show", "v"])["header_note"].is_null()
        }
    );
}

#[test]
fn a_full_file_system_leaves_no_half_made_volume() {
    if !can_mount(&[]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::tmpfs(dir.path(), "4m");
    let backing = dir.path().join("v.img");
    let mut args = create("v", backing.to_str().unwrap(), &key);
    args.push("--preallocate");
    let (code, answer) = daemon.ctl(&args);
    assert_ne!(code, 0);
    assert!(why(&answer).contains("space"), "{answer}");
    assert!(!backing.exists());
    drop(mount);
}

#[test]
fn cryptsetup_opens_our_volumes_and_we_open_what_it_made_of_them() {
    if !have(&["cryptsetup", "nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "h.pwrite(b'k' * 8192, 0)");
    daemon.ok(&["detach", "v"]);
    let backing = daemon.backing("v");
    let dir = daemon.dir.path();
    let cryptsetup =
        |args: &[&str]| run(Command::new("/usr/sbin/cryptsetup").args(args).arg(&backing));
    cryptsetup(&["isLuks", "--type", "luks2"]);
    let dump = cryptsetup(&["luksDump"]);
    assert!(dump.contains("byokd-aws-kms") && dump.contains("aes-xts-plain64"), "{dump}");
    // What a customer without byokd does: KMS Decrypt of the token's blob, then cryptsetup.
    let token = cryptsetup(&["token", "export", "--token-id", "0"]);
    let volume_key = dir.join("volume-key");
    std::fs::write(&volume_key, unwrap_token(&daemon, &token)).unwrap();
    let keyed = ["--key-size", "512", "--volume-key-file", volume_key.to_str().unwrap()];
    let mut open = vec!["open", "--test-passphrase"];
    open.extend(keyed);
    cryptsetup(&open);
    // A break-glass passphrase, added and removed, and a header backup restored.
    let passphrase = dir.join("passphrase");
    std::fs::write(&passphrase, "break the glass").unwrap();
    let mut add =
        vec!["luksAddKey", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    add.extend(keyed);
    run(Command::new("/usr/sbin/cryptsetup").args(&add).arg(&backing).arg(&passphrase));
    cryptsetup(&["open", "--test-passphrase", "--key-file", passphrase.to_str().unwrap()]);
    let attach_and_check = || {
        daemon.ok(&["attach", "v"]);
        nbdsh(&daemon.uri("v"), "assert h.pread(8192, 0) == b'k' * 8192");
        daemon.ok(&["detach", "v"]);
    };
    attach_and_check();
    let backup = dir.join("header-backup");
    cryptsetup(&["luksHeaderBackup", "--header-backup-file", backup.to_str().unwrap()]);
    run(Command::new("/usr/sbin/cryptsetup")
        .args(["luksKillSlot", "--batch-mode"])
        .arg(&backing)
        .arg("0"));
    attach_and_check();
    cryptsetup(&[
        "luksHeaderRestore",
        "--batch-mode",
        "--header-backup-file",
        backup.to_str().unwrap(),
    ]);
    attach_and_check();
}

#[test]
fn flushed_data_survives_a_crash_of_the_daemon() {
    if !have(&["nbdsh"]) {
        return;
    }
    let mut daemon = Daemon::start_on_disk();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "h.pwrite(b'd' * 65536, 4096)\nh.flush()");
    daemon.crash_and_restart();
    daemon.ok(&["attach", "v"]);
    nbdsh(&daemon.uri("v"), "assert h.pread(65536, 4096) == b'd' * 65536");
}

#[test]
fn sigterm_stops_cleanly_and_leaves_no_sockets() {
    if !have(&["nbdsh"]) {
        return;
    }
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "h.pwrite(b'd' * 65536, 4096)");
    assert!(daemon.terminate().success());
    assert!(!daemon.socket().exists());
    assert!(!daemon.dir.path().join("nbd/v.sock").exists());
    assert!(daemon.log().contains("the key is destroyed"), "{}", daemon.log());
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let daemon = Daemon::start();
    let second = output(
        Command::new(env!("CARGO_BIN_EXE_byokd"))
            .args(["--dev", "--state-dir"])
            .arg(daemon.dir.path()),
    );
    assert_eq!(second.status.code(), Some(WRONG_STATE));
}

#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "1M", &key);
    let command = format!(
        "set -o pipefail; {} --socket {} status v | head -c 1 >/dev/null",
        env!("CARGO_BIN_EXE_byokctl"),
        daemon.socket().display()
    );
    for _ in 0..20 {
        run(Command::new("bash").args(["-c", &command]));
    }
}

#[test]
fn a_daemon_that_may_open_no_more_files_says_so_and_what_to_do() {
    if !have(&["prlimit"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.create("v", "1M", &daemon.key());
    let pid = daemon.pid().to_string();
    run(Command::new("prlimit").args(["--pid", &pid, "--nofile=40:1024"]));
    let (code, refused) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 1, "{refused}");
    assert!(refused["remedy"].as_str().unwrap().contains("LimitNOFILE"), "{refused}");
    run(Command::new("prlimit").args(["--pid", &pid, "--nofile=1024:1024"]));
    daemon.ok(&["attach", "v"]);
}

#[test]
fn status_is_watched_until_the_daemon_is_gone() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let path = daemon.dir.path().join("watched");
    let watch = Command::new(env!("CARGO_BIN_EXE_byokctl"))
        .arg("--socket")
        .arg(daemon.socket())
        .args(["status", "--watch=200ms", "v"])
        .stdout(std::fs::File::create(&path).unwrap())
        .spawn()
        .unwrap();
    let _watch = Running(watch);
    let shown = |words: &str| std::fs::read_to_string(&path).unwrap().contains(words);
    until("the volume is shown", || shown("v: serving: served; KMS allows its key"));
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the fence is shown", || shown("v: FENCED: the customer's KMS key may not be used"));
    assert!(daemon.terminate().success());
    until("the silence is shown", || shown("NO ANSWER for "));
    assert!(shown("no byokd listens at"));
}

/// As long as nothing is heard of KMS, nothing happens to its lease: what is told of it goes on.
#[test]
fn what_is_left_of_the_allowance_is_as_it_is_when_it_is_asked_for() {
    let customer = Customer::new();
    let daemon = customer.daemon_with("", "probe_interval = \"1h\"\n");
    daemon.volume("v", "1M", customer.key.as_str());
    customer.kms.inject(Fault::new(FaultKind::Throttle));
    daemon.ok(&["key", "recheck", "v"]);
    let left = || {
        let lease = daemon.status("v")["lease"].take();
        let seconds = |member: &str| lease[member].as_u64().unwrap();
        (seconds("allowance_left"), seconds("remaining"))
    };
    let (_, first) = left();
    until("three seconds have gone", || {
        let (allowance, remaining) = left();
        // They are looked at one after the other.
        assert!(allowance.abs_diff(remaining) <= 1, "{allowance} of the allowance, {remaining}");
        remaining + 3 <= first
    });
}

#[test]
fn a_trial_serves_http_where_it_is_told_to() {
    let dir = in_memory();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut byokd = Command::new(env!("CARGO_BIN_EXE_byokd"));
    let port = free.port().to_string();
    let byokd = byokd.args(["--dev", "--http-port", &port, "--state-dir"]).arg(dir.path());
    let _trial = Running(byokd.stderr(Stdio::null()).spawn().unwrap());
    let endpoint = dir.path().join("http-endpoint");
    until("it says where", || endpoint.exists() && TcpStream::connect(free).is_ok());
    assert_eq!(std::fs::read_to_string(endpoint).unwrap().trim(), format!("http://{free}"));
}

#[test]
fn a_volume_that_cannot_be_attached_yet_is_detached_for_good() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    let (wanted, unwanted) = ("wanted", ["plainly", "byforce"]);
    let dir = daemon.dir.path().to_owned();
    let away = |name: &str| dir.join(format!("{name}.away"));
    for name in [&[wanted][..], &unwanted].concat() {
        daemon.create(name, "1M", &key);
        daemon.define(name, "attach = \"auto\"");
        std::fs::rename(daemon.backing(name), away(name)).unwrap();
    }
    daemon.crash_and_restart();
    let problem = |name: &str| daemon.status(name)["problem"].clone();
    for (name, detach) in unwanted.iter().zip([&["detach"][..], &["detach", "--force"]]) {
        until("it was tried", || !problem(name).is_null());
        daemon.ok(&[detach, &[name]].concat());
        assert!(problem(name).is_null(), "nobody wants it attached");
        let again = daemon.ctl(&[detach, &[name]].concat());
        assert_eq!(again.0, WRONG_STATE, "nothing is left to end: {}", again.1);
        std::fs::rename(away(name), daemon.backing(name)).unwrap();
    }
    std::fs::rename(away(wanted), daemon.backing(wanted)).unwrap();
    let back = Instant::now();
    until("the other one is served", || daemon.state(wanted) == "serving");
    until("each would have been tried again", || {
        for name in unwanted {
            assert_eq!(daemon.state(name), "detached", "{name}");
        }
        back.elapsed() > Duration::from_secs(6)
    });
}
