//! What people are shown on a terminal: nobody's words act upon it, what is wrong is on it, and an
//! operator's failure is in the log as well.

use std::process::Command;

use byokd::kms::dev::{Fault, FaultKind};

use crate::customer::Customer;
use crate::support::{Daemon, have, output, until};

/// What a terminal would act upon, and what turns text around or begins a line.
const SAID: &str = "no\u{1b}[2J\u{1b}[H3 volumes: 3 serving\nzeebe-0  serving  \u{9b}31m\r\u{202e}\u{2066}\u{200b}\u{2028}x";

/// All that byokctl prints for people.
fn shown(daemon: &Daemon, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_byokctl"));
    let ended = output(command.arg("--socket").arg(daemon.socket()).args(args));
    String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap()
}

fn is_harmless(text: &str) {
    let hidden =
        |c: char| (c.is_control() && c != '\n') || "\u{202e}\u{2066}\u{200b}\u{2028}".contains(c);
    assert!(!text.contains(hidden), "{text:?}");
    assert!(!text.lines().any(|line| line.starts_with("zeebe-0")), "a line is forged: {text}");
    assert!(text.contains(r"no\u{1b}[2J\u{1b}[H3 volumes: 3 serving\nzeebe-0"), "{text}");
}

#[test]
fn nothing_that_kms_says_acts_upon_a_terminal_or_forges_a_line() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    let key = customer.key.as_str();
    daemon.volume("v", "1M", key);
    daemon.volume("w", "1M", key);
    daemon.create("x", "1M", key);
    let fault = Fault::error(400, "AccessDeniedException", SAID)
        .on(&["Decrypt", "GenerateDataKeyWithoutPlaintext"]);
    customer.kms.inject(fault);
    until("both are fenced", || ["v", "w"].iter().all(|v| daemon.state(v) == "fenced"));
    is_harmless(&shown(&daemon, &["attach", "x"]));
    for args in [
        &["status"][..],
        &["status", "v"],
        &["status", "x"],
        &["volume", "list"],
        &["volume", "show", "v"],
        &["key", "recheck", "v"],
        &["key", "check", key],
        &["audit", "tail"],
    ] {
        println!("{args:?}");
        is_harmless(&shown(&daemon, args));
    }
    let backing = daemon.backing("y").display().to_string();
    let context = format!("tenant={SAID}");
    let create = ["volume", "create", "y", "--backing", &backing, "--size", "1M", "--key", key];
    is_harmless(&shown(
        &daemon,
        &[&create[..], &["--purpose", "zeebe", "--context", &context]].concat(),
    ));
    // The log is read on terminals too.
    is_harmless(&daemon.log());
    let lines = daemon.log().lines().filter(|line| !line.starts_with("20")).count();
    assert_eq!(lines, 0, "{}", daemon.log());
}

#[test]
fn an_attach_that_fails_is_in_the_log_once_for_each_that_an_operator_asked_for() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "1M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    for times in 1..=2 {
        assert_eq!(daemon.ctl(&["attach", "v"]).0, 3, "key denied");
        let of_it = |log: &str| log.lines().filter(|line| line.contains("not attached")).count();
        until("it is told", || of_it(&daemon.log()) >= times);
        let log = daemon.log();
        assert_eq!(of_it(&log), times, "{log}");
        let line = log.lines().rfind(|line| line.contains("not attached")).unwrap();
        for part in [
            "WARN",
            "volume=\"v\"",
            "DisabledException",
            "request id",
            "remedy=\"the customer disabled",
        ] {
            assert!(line.contains(part), "{line}");
        }
    }
}

/// Twelve lines of eighty characters, of which byokctl knows.
#[test]
fn on_a_small_terminal_what_is_wrong_is_seen_and_the_rest_is_counted() {
    if !have(&["script", "timeout"]) {
        return;
    }
    let daemon = Daemon::start();
    let (key, other) = (daemon.key(), daemon.key());
    for n in 0..15 {
        daemon.create(&format!("a{n:02}"), "1M", &other);
    }
    daemon.volume("zz", "1M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("it is fenced", || daemon.state("zz") == "fenced");
    let ctl = env!("CARGO_BIN_EXE_byokctl");
    let socket = daemon.socket();
    let command = format!(
        "stty rows 12 cols 80; timeout 1 {ctl} --socket {} status --watch",
        socket.display()
    );
    let ended = output(Command::new("script").args(["-qec", &command, "/dev/null"]));
    let text = String::from_utf8(ended.stdout).unwrap();
    let screen = text.split("\u{1b}[H\u{1b}[J").nth(1).unwrap_or_else(|| panic!("{text:?}"));
    let lines: Vec<_> = screen.lines().collect();
    assert!(lines.len() < 12, "the cursor stands below: {screen}");
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{screen}");
    assert!(lines[3].starts_with("zz") && lines[3].contains("FENCED"), "{screen}");
    assert_eq!(
        lines.last(),
        Some(&"… and 9 more, for which there is no room: 9 detached"),
        "{screen}"
    );
}

#[test]
fn the_log_tells_a_fence_and_its_end_in_the_words_of_the_api() {
    let customer = Customer::new();
    let lease = "probe_interval = \"1s\"\nfail_closed_after = \"2s\"\n";
    let daemon = customer.daemon_with("", lease);
    daemon.volume("v", "1M", customer.key.as_str());
    customer.kms.inject(Fault::new(FaultKind::Throttle));
    until("its allowance is over", || daemon.state("v") == "fenced");
    let lease = daemon.status("v")["lease"].take();
    assert_eq!(
        (&lease["fence_reason"], &lease["verdict"]),
        (&"expired".into(), &"unavailable".into())
    );
    assert!(lease["fence_ms"].is_null(), "nobody denied it: {lease}");
    let told = shown(&daemon, &["status", "v"]);
    let last = "last fence   KMS could not be asked for longer than the outage allowance";
    assert!(told.contains(last), "{told}");
    customer.kms.clear_faults();
    daemon.says("KMS allows the key again: serving");
    let log = daemon.log();
    let line = |words: &str| log.lines().find(|line| line.contains(words)).unwrap();
    let fenced = line("fenced: the key is destroyed");
    assert!(fenced.contains("reason=\"expired\"") && !fenced.contains("millis="), "{fenced}");
    assert!(fenced.contains("alert=\"VolumeFenced\""), "{fenced}");
    let probe = line("a probe did not succeed");
    assert!(probe.contains("verdict=\"unavailable\" alert=\"KmsUnreachable\""), "{probe}");
    let changed = line("key lease changed");
    let words = "from=\"held\" to=\"unverified\" verdict=\"unavailable\"";
    assert!(changed.contains(words), "{changed}");
    let again = line("KMS allows the key again: serving");
    assert!(again.contains("request_id=\""), "{again}");
}

/// Without a terminal: nothing that only an id or a time is new of.
#[test]
fn whoever_watches_without_a_terminal_is_told_what_changes_once() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.volume("v", "1M", customer.key.as_str());
    daemon.volume("w", "1M", customer.key.as_str());
    let path = daemon.dir.path().join("watched");
    let mut watch = Command::new(env!("CARGO_BIN_EXE_byokctl"));
    let watch = watch.arg("--socket").arg(daemon.socket()).args(["status", "--watch=100ms"]);
    let watch = watch.stdout(std::fs::File::create(&path).unwrap()).spawn().unwrap();
    let _watch = crate::support::Running(watch);
    let told = || std::fs::read_to_string(&path).unwrap();
    until("all is shown", || told().contains("2 volumes: 2 serving"));
    customer.kms.inject(Fault::new(FaultKind::Throttle));
    let both = "2 volumes: 2 unverified (KMS gives no verdict)";
    until("no verdict is told of both", || told().contains(both));
    let before = told();
    let id = |daemon: &Daemon| daemon.status("v")["lease"]["evidence"]["request_id"].clone();
    let first = id(&daemon);
    until("KMS said it anew", || id(&daemon) != first);
    let second = id(&daemon);
    until("and again", || id(&daemon) != second);
    assert_eq!(told(), before, "nothing has changed");
    assert!(before.contains("fenced in 59 min"), "{before}");
}
