//! Settings and definitions are read anew: all that is right at once, or nothing.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::metrics::{address, scrape, value};
use crate::support::{Daemon, have, nbdsh, output, run, until};

const USAGE: i32 = 2;
const WRONG_STATE: i32 = 5;

fn put(daemon: &Daemon, name: &str, text: &str) {
    let path = daemon.dir.path().join("volumes.d").join(format!("{name}.toml"));
    std::fs::write(path, text).unwrap();
}

fn names(daemon: &Daemon) -> Vec<String> {
    let listed = daemon.ok(&["volume", "list"]);
    let volumes = listed["volumes"].as_array().unwrap();
    volumes.iter().map(|v| v["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn definitions_are_read_anew_without_disturbing_a_volume_in_service() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("used", "1M", &key);
    for name in ["idle", "auto", "gone"] {
        daemon.create(name, "1M", &key);
    }
    let read_anew = || daemon.ok(&["reload"]);
    let nothing = read_anew();
    for member in ["added", "removed", "changed", "at_next_attach", "at_restart"] {
        assert_eq!(nothing[member], json!([]), "{nothing}");
    }
    daemon.define("used", "read_only = true");
    daemon.define("idle", "trim = false");
    daemon.define("auto", "attach = \"auto\"");
    std::fs::remove_file(daemon.dir.path().join("volumes.d/gone.toml")).unwrap();
    put(&daemon, "byhand", &format!("backing = \"{}\"\n", daemon.backing("gone").display()));
    let told = read_anew();
    assert_eq!(told["added"], json!(["byhand"]));
    assert_eq!(told["removed"], json!(["gone"]));
    assert_eq!(told["changed"], json!(["auto", "idle"]));
    assert_eq!(told["at_next_attach"], json!(["used"]));
    assert_eq!(names(&daemon), ["auto", "byhand", "idle", "used"]);
    until("it is attached, as its definition says now", || daemon.state("auto") == "serving");
    // It is as it was attached.
    assert_eq!(daemon.status("used")["at_next_attach"], json!(["read_only"]));
    nbdsh(&daemon.uri("used"), "h.pwrite(b'w' * 4096, 0)");
    daemon.ok(&["detach", "used"]);
    let attached = daemon.ok(&["attach", "used"]);
    assert_eq!((&attached["read_only"], &attached["at_next_attach"]), (&json!(true), &json!([])));
}

#[test]
fn a_reload_with_an_error_names_file_and_line_and_changes_nothing() {
    let daemon = Daemon::start();
    put(&daemon, "good", "backing = \"/nowhere/good.img\"\n");
    put(&daemon, "bad", "backing = \"/nowhere/bad.img\"\n\ntrimm = true\n");
    let (code, refused) = daemon.ctl(&["reload"]);
    assert_eq!(code, USAGE, "{refused}");
    let why = refused["why"].as_str().unwrap();
    assert!(why.contains("bad.toml:3: unknown key `trimm`"), "{why}");
    assert_eq!(names(&daemon), Vec::<String>::new(), "not even what is right");
    put(&daemon, "bad", "backing = \"/nowhere/bad.img\"\n");
    let hang_up = || run(Command::new("kill").args(["-HUP", &daemon.pid().to_string()]));
    hang_up();
    until("SIGHUP does the same", || names(&daemon) == ["bad", "good"]);
}

#[test]
fn settings_that_wait_for_the_next_start_are_said_in_the_status() {
    let daemon = Daemon::configured("max_connections = 7\n[kms]\nregion = \"eu-central-1\"");
    let file = daemon.dir.path().join("byokd.toml");
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, before.replace("max_connections = 7", "max_connections = 8")).unwrap();
    assert_eq!(daemon.ok(&["reload"])["at_restart"], json!(["max_connections"]));
    let problems = daemon.ok(&["status"])["problems"].take();
    assert!(problems[0]["why"].as_str().unwrap().contains("max_connections"), "{problems}");
    std::fs::write(&file, before).unwrap();
    daemon.ok(&["reload"]);
    assert_eq!(daemon.ok(&["status"])["problems"], Value::Null, "they are as they were");
}

#[test]
fn a_definition_that_cannot_be_read_at_a_start_costs_its_own_volume_alone() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    for name in ["v", "w"] {
        daemon.create(name, "1M", &key);
        daemon.define(name, "attach = \"auto\"");
    }
    let whole = std::fs::read(daemon.dir.path().join("volumes.d/w.toml")).unwrap();
    put(&daemon, "w", "backing = \"/half");
    daemon.crash_and_restart();
    until("the other one is served", || daemon.state("v") == "serving");
    assert_eq!(names(&daemon), ["v"]);
    let problems = daemon.ok(&["status"])["problems"].take();
    assert!(problems[0]["why"].as_str().unwrap().contains("w.toml:1: "), "{problems}");
    daemon.says("ERROR definition skipped: it cannot be read");
    let (code, refused) = daemon.ctl(&["status", "w"]);
    assert_eq!(code, USAGE, "{refused}");
    put(&daemon, "w", std::str::from_utf8(&whole).unwrap());
    assert_eq!(daemon.ok(&["reload"])["added"], json!(["w"]));
    assert_eq!(daemon.ok(&["status"])["problems"], Value::Null, "it is mended");
    until("it is served as well", || daemon.state("w") == "serving");
}

#[test]
fn a_volume_that_is_tried_is_tried_no_more_often_for_reloads_that_change_it() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "1M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    let address = address(&daemon);
    let denied = || {
        let page = scrape(&address);
        let sample = "byokd_kms_requests_total{operation=\"Decrypt\",outcome=\"denied\"}";
        if page.contains(sample) { value(&page, sample) } else { 0.0 }
    };
    let another = || {
        let before = denied();
        until("KMS is asked again", || denied() > before);
    };
    for connections in 1..=4 {
        until("no try is under way", || daemon.state("v") == "detached");
        daemon.define("v", &format!("attach = \"auto\"\nconnections = {connections}"));
        let before = denied();
        assert_eq!(daemon.ok(&["reload"])["changed"], json!(["v"]));
        until("it is tried at once", || denied() > before);
    }
    // What confirms the first denial comes soon.
    another();
    let began = Instant::now();
    another();
    another();
    let took = began.elapsed();
    assert!(took > Duration::from_secs(8), "three tries in {took:?}, one each 5 s");
}

#[test]
fn a_check_tells_all_that_is_wrong_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("byokd.toml");
    let check = || {
        let mut byokd = Command::new(env!("CARGO_BIN_EXE_byokd"));
        let checked = output(byokd.arg("--check").arg("--config").arg(&file));
        let text = [checked.stdout, checked.stderr].concat();
        (checked.status.code(), String::from_utf8(text).unwrap())
    };
    let nbd = dir.path().join("nbd");
    std::fs::write(&file, format!("volumes_dir = \"v\"\nnbd_dir = \"{}\"\n", nbd.display()))
        .unwrap();
    std::fs::create_dir(dir.path().join("v")).unwrap();
    std::fs::write(dir.path().join("v/well.toml"), "backing = \"/x\"\n").unwrap();
    let (code, text) = check();
    assert_eq!((code, text.contains("no errors; 1 volumes")), (Some(0), true), "{text}");
    std::fs::write(dir.path().join("v/a.toml"), "backing = \"/half").unwrap();
    std::fs::write(dir.path().join("v/b.toml"), "backing = \"/x\"\ntrimm = true\n").unwrap();
    let (code, text) = check();
    assert_eq!(code, Some(USAGE), "{text}");
    assert!(text.contains("a.toml:1: ") && text.contains("b.toml:2: "), "{text}");
    std::fs::write(&file, "volumes_dri = \"v\"\n").unwrap();
    assert_eq!(check().0, Some(USAGE));
    assert!(!nbd.exists(), "it only looks");
}

#[test]
fn a_definition_means_one_volume_whatever_lies_at_its_path() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("one", "1M", &key);
    daemon.create("other", "1M", &key);
    std::fs::copy(daemon.backing("other"), daemon.backing("one")).unwrap();
    let (code, refused) = daemon.ctl(&["attach", "one"]);
    assert_eq!(code, WRONG_STATE, "{refused}");
    assert!(refused["why"].as_str().unwrap().contains("its definition means volume"), "{refused}");
    let (code, refused) = daemon.ctl(&["volume", "resize", "one", "--size", "2M"]);
    assert_eq!(code, WRONG_STATE, "{refused}");
    daemon.ok(&["attach", "other"]);
}
