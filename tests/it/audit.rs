//! The audit trail of a real daemon: what is in it, what is done to it, and a disk that is full.

use std::process::Command;

use byokd::audit::chain::seal;
use byokd::audit::record::{Event, Kind, Record};
use serde_json::Value;

use crate::metrics::{address, scrape, value};
use crate::mounts::{Mount, can_mount};
use crate::support::{Daemon, have, output, run, until};

const DISCREPANCY: i32 = 6;

/// All records on disk, by byokctl.
pub(crate) fn records(daemon: &Daemon) -> Vec<Value> {
    let dir = daemon.dir.path().join("audit");
    let text = run(Command::new(env!("CARGO_BIN_EXE_byokctl"))
        .args(["audit", "export", "--dir"])
        .arg(dir));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The kinds of a volume's records, without routine.
fn kinds(records: &[Value], volume: &str) -> Vec<String> {
    let of_volume = records.iter().filter(|record| record["volume"] == volume);
    of_volume.map(|record| record["event"].as_str().unwrap().to_owned()).collect()
}

/// How many keys of a volume came, and how many were destroyed.
pub(crate) fn keys(daemon: &Daemon, volume: &str) -> (usize, usize) {
    let kinds = kinds(&records(daemon), volume);
    let count = |wanted| kinds.iter().filter(|kind| *kind == wanted).count();
    (count("unwrap"), count("key-destroyed"))
}

#[test]
fn the_life_of_a_volume_is_in_the_trail() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the volume is back", || daemon.state("v") == "serving");
    daemon.ok(&["key", "suspend", "v"]);
    daemon.ok(&["key", "resume", "v"]);
    until("the volume is back", || daemon.state("v") == "serving");
    daemon.ok(&["detach", "v"]);
    assert!(daemon.terminate().success());
    let all = records(&daemon);
    let kinds = kinds(&all, "v");
    // In this order, whatever comes between.
    let mut rest = kinds.iter();
    for wanted in [
        "request",
        "create",
        "config-change",
        "answer",
        "request",
        "config-load",
        "unwrap",
        "attach",
        "answer",
        "denial",
        "fence",
        "key-destroyed",
        "unwrap",
        "restore",
        "request",
        "fence",
        "key-destroyed",
        "answer",
        "request",
        "answer",
        "restore",
        "request",
        "key-destroyed",
        "detach",
        "answer",
    ] {
        assert!(rest.any(|kind| kind == wanted), "{wanted} in {kinds:?}");
    }
    let first = |kind: &str| all.iter().find(|record| record["event"] == kind).unwrap();
    let denial = first("denial");
    assert_eq!(denial["code"], "DisabledException");
    assert_eq!(denial["verdict"], "denied");
    assert_eq!(denial["key"], key.as_str());
    assert_eq!(denial["context"]["byokd:volume-uuid"], denial["uuid"]);
    assert_eq!(first("fence")["reason"], "denied");
    let asked = first("request");
    assert_eq!(asked["by"]["uid"], nix::unistd::getuid().as_raw());
    assert_eq!(asked["by"]["program"], "byokctl");
    assert!(asked["by"]["pid"].as_i64().unwrap() > 1);
    assert_eq!(first("answer")["of"], asked["seq"]);
    assert_eq!(all.last().unwrap()["event"], "daemon-stop");
    for kind in ["unwrap", "denial"] {
        let id = first(kind)["request_id"].as_str().unwrap();
        let called = |record: &Value| {
            let calls = record["calls"].as_array().into_iter().flatten();
            calls.into_iter().any(|call| call["request_id"] == id)
        };
        assert!(all.iter().any(called), "{kind}: its call is noted");
    }
}

#[test]
fn the_end_of_each_key_is_recorded_once() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "1M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    // It has no key any more.
    daemon.ok(&["key", "suspend", "v"]);
    daemon.ok(&["detach", "v"]);
    assert_eq!(keys(&daemon, "v"), (1, 1));
    daemon.ok(&["key", "resume", "v"]);
    daemon.ok(&["dev", "key", "enable", &key]);
    // The key comes, and the attach fails after that.
    let socket = daemon.dir.path().join("nbd/v.sock");
    std::fs::create_dir(&socket).unwrap();
    let (code, answer) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 1, "{answer}");
    assert_eq!(keys(&daemon, "v"), (2, 2));
    std::fs::remove_dir(&socket).unwrap();
    daemon.ok(&["attach", "v"]);
    daemon.ok(&["key", "suspend", "v"]);
    assert!(daemon.terminate().success());
    assert_eq!(keys(&daemon, "v"), (3, 3));
}

#[test]
fn what_is_done_to_a_trail_is_found_against_the_running_daemon() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "1M", &key);
    let intact = daemon.ok(&["audit", "verify"]);
    assert_eq!(intact["intact"], true, "{intact}");
    let head = daemon.ok(&["audit", "head"])["written"].clone();
    let place = format!("{}:{}", head["seq"], head["hash"].as_str().unwrap());
    let file = daemon.dir.path().join("audit/audit-000000000001.jsonl");
    let path = file.to_str().unwrap();
    let good = std::fs::read_to_string(&file).unwrap();
    let wrong = |args: &[&str]| {
        let (code, answer) = daemon.ctl(args);
        assert_eq!(code, DISCREPANCY, "{answer}");
        answer["findings"][0].clone()
    };
    // An edit.
    std::fs::write(&file, good.replacen("\"volume\":\"v\"", "\"volume\":\"w\"", 1)).unwrap();
    let finding = wrong(&["audit", "verify"]);
    assert_eq!(finding["wrong"], "changed");
    let line = good.lines().position(|line| line.contains("\"volume\":\"v\"")).unwrap() + 1;
    assert_eq!(finding["line"], line);
    assert_eq!(wrong(&["audit", "verify", path])["line"], line, "without the daemon too");
    // The last record taken away: only the daemon, or whoever noted the head, knows.
    let cut = good.trim_end().rsplit_once('\n').unwrap().0;
    std::fs::write(&file, format!("{cut}\n")).unwrap();
    assert_eq!(wrong(&["audit", "verify"])["wrong"], "truncated");
    assert_eq!(wrong(&["audit", "verify", path, "--expect", &place])["wrong"], "truncated");
    let (code, answer) = daemon.ctl(&["audit", "verify", path]);
    assert_eq!(code, 0, "{answer}");
    // And the whole file.
    std::fs::remove_file(&file).unwrap();
    assert_eq!(wrong(&["audit", "verify"])["wrong"], "truncated");
    std::fs::write(&file, good).unwrap();
    daemon.ok(&["audit", "verify"]);
}

/// A line that follows the last one, its hash right: what anybody can make who can write there.
fn forged(text: &str) -> String {
    let mut record: Record = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    (record.seq, record.prev) = (record.seq + 1, record.hash);
    record.event = Event::new(Kind::Restore).volume("forged");
    seal(&mut record) + "\n"
}

#[test]
fn what_is_added_to_a_live_trail_is_found_told_and_not_written_over() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.create("v", "1M", &key);
    daemon.ok(&["audit", "verify"]);
    let head = daemon.ok(&["audit", "head"])["written"].clone();
    let file = daemon.dir.path().join("audit/audit-000000000001.jsonl");
    let good = std::fs::read_to_string(&file).unwrap();
    let wrong = || {
        let (code, report) = daemon.ctl(&["audit", "verify"]);
        assert_eq!(code, DISCREPANCY, "{report:#}");
        report
    };
    for (end, word) in [("{\"seq\":", "torn"), ("\0\0\0", "torn"), ("junk", "changed")] {
        std::fs::write(&file, format!("{good}{end}")).unwrap();
        assert_eq!(wrong()["findings"][0]["wrong"], word, "{end:?}");
    }
    let with_forged = good.clone() + &forged(&good);
    std::fs::write(&file, &with_forged).unwrap();
    let report = wrong();
    assert_eq!(report["findings"][0]["wrong"], "added", "{report:#}");
    assert_eq!(report["last"], head, "what was forged is no head");
    // The next record comes after it, and says so.
    daemon.ok(&["reload"]);
    until("it is told", || daemon.ok(&["status"])["problems"][0]["why"].is_string());
    daemon.says("something else changed the audit trail");
    assert!(value(&scrape(&address(&daemon)), "byokd_audit_changed") > 0.0);
    let report = wrong();
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 1, "{report:#}");
    assert_eq!(findings[0]["wrong"], "added");
    assert_eq!(findings[0]["line"], good.lines().count() + 1);
    assert_eq!(report["last"], daemon.ok(&["audit", "head"])["written"]);
    assert!(std::fs::read_to_string(&file).unwrap().starts_with(&with_forged));
    let told = records(&daemon).into_iter().find(|record| record["event"] == "foreign-change");
    assert_eq!(told.unwrap()["foreign"]["bytes"], forged(&good).len());
}

#[test]
fn a_start_says_which_kms_is_asked_and_what_goes_in_the_clear() {
    for (endpoint, in_the_clear) in
        [("http://127.0.0.1:9", false), ("https://192.0.2.1", false), ("http://192.0.2.1:9", true)]
    {
        let daemon = Daemon::configured(&format!(
            "[kms]\nregion = \"eu-central-1\"\nendpoint = \"{endpoint}\"\n"
        ));
        let problems = daemon.ok(&["status"])["problems"].take();
        let told = problems[0]["why"].as_str().is_some_and(|why| why.contains("without TLS"));
        assert_eq!(told, in_the_clear, "{endpoint}: {problems}");
        daemon.says("KMS is asked there");
        daemon.says(endpoint);
        assert_eq!(daemon.log().contains("without TLS"), in_the_clear);
        let tail = daemon.ok(&["audit", "head"])["directory"].clone();
        let text = run(Command::new(env!("CARGO_BIN_EXE_byokctl"))
            .args(["audit", "export", "--dir"])
            .arg(tail.as_str().unwrap()));
        let start: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
        assert_eq!(start["event"], "daemon-start", "{text}");
        assert_eq!(start["detail"]["endpoint"], endpoint);
        assert_eq!(start["detail"]["region"], "eu-central-1");
        assert_eq!(start["detail"]["kms"], "another endpoint");
    }
}

#[test]
fn a_key_check_that_fails_is_recorded_as_the_command_line_ends() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.ok(&["key", "check", &key]);
    daemon.ok(&["dev", "key", "disable", &key]);
    assert_eq!(daemon.ctl(&["key", "check", &key]).0, 3);
    let ended = || {
        let all = records(&daemon);
        let answers = all.iter().filter(|record| record["request"] == "key-check");
        answers.filter(|record| record["event"] == "answer").cloned().collect::<Vec<_>>()
    };
    until("both are recorded", || ended().len() == 2);
    let ended = ended();
    assert_eq!((&ended[0]["exit"], &ended[1]["exit"]), (&"ok".into(), &"key_denied".into()));
    assert!(ended[1]["why"].as_str().unwrap().contains("enabled"), "{}", ended[1]);
}

#[test]
fn a_crash_leaves_a_trail_that_goes_on() {
    let mut daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "1M", &key);
    daemon.crash_and_restart();
    daemon.ok(&["attach", "v"]);
    let report = daemon.ok(&["audit", "verify"]);
    assert_eq!(report["intact"], true, "{report}");
    let all = records(&daemon);
    let starts = all.iter().filter(|record| record["event"] == "daemon-start").count();
    let stops = all.iter().filter(|record| record["event"] == "daemon-stop").count();
    assert_eq!((starts, stops), (2, 0));
    let start = all.iter().rfind(|record| record["event"] == "daemon-start").unwrap();
    assert_eq!(start["detail"]["run-before-stopped"], "not in order");
    let before = &all[all.iter().position(|record| record == start).unwrap() - 1];
    let after = format!("{}:{}", before["seq"], before["hash"].as_str().unwrap());
    assert_eq!(start["detail"]["after"], after);
    assert_eq!(start["detail"]["unsigned"], format!("1 to {}", before["seq"]));
    assert_eq!(report["after_crash"], serde_json::json!([start["seq"]]));
    daemon.says("the run before did not stop in order");
    // What was before is still there for whoever looks at the running daemon.
    let answer = daemon.ok(&["audit", "tail", "--volume", "v", "-n", "1000"]);
    assert_eq!(answer, Value::Null, "one object a line");
    let tail = run(Command::new(env!("CARGO_BIN_EXE_byokctl"))
        .arg("--socket")
        .arg(daemon.socket())
        .args(["audit", "tail", "--volume", "v", "-n", "1000"]));
    assert_eq!(tail.matches("  attach  ").count(), 2, "{tail}");
}

/// What the customer would find in CloudTrail.
fn cloudtrail(daemon: &Daemon) -> String {
    let endpoint = std::fs::read_to_string(daemon.dir.path().join("kms-endpoint")).unwrap();
    run(Command::new("curl").args(["-fsS", &format!("{}/_dev/cloudtrail", endpoint.trim())]))
}

#[test]
fn the_trail_agrees_with_cloudtrail_and_what_one_lacks_is_told() {
    if !have(&["curl"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "1M", &key);
    daemon.ok(&["key", "check", &key]);
    daemon.ok(&["key", "recheck", "v"]);
    daemon.ok(&["key", "rewrap", "v"]);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the volume is back", || daemon.state("v") == "serving");
    daemon.ok(&["detach", "v"]);
    // Calls of one key are gathered for minutes; what is stopped in order is written.
    let export = cloudtrail(&daemon);
    let mut daemon = daemon;
    assert!(daemon.terminate().success());
    let trail = daemon.dir.path().join("audit");
    let file = daemon.dir.path().join("cloudtrail.json");
    let reconcile = |export: &Value| {
        std::fs::write(&file, export.to_string()).unwrap();
        let dir = trail.to_str().unwrap();
        daemon.ctl(&["audit", "reconcile", file.to_str().unwrap(), "--dir", dir])
    };
    let export: Value = serde_json::from_str(&export).unwrap();
    let (code, found) = reconcile(&export);
    assert_eq!(code, 0, "{found:#}");
    let matched = found["matched"].as_u64().unwrap();
    assert!(matched > 10, "{found:#}");
    // Nothing says nothing.
    for empty in ["{\"Records\":[]}", "[]"] {
        let (code, found) = reconcile(&serde_json::from_str(empty).unwrap());
        assert_eq!((code, &found["agrees"]), (DISCREPANCY, &Value::Bool(false)), "{found:#}");
    }
    std::fs::write(&file, "").unwrap();
    let told = output(
        Command::new(env!("CARGO_BIN_EXE_byokctl"))
            .args(["audit", "reconcile"])
            .arg(&file)
            .arg("--dir")
            .arg(&trail),
    );
    assert_eq!(told.status.code(), Some(DISCREPANCY));
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("NOTHING WAS COMPARED"), "{told}");
    let done: Vec<_> = found["administration"].as_array().unwrap().iter().collect();
    assert!(done.iter().any(|event| event["operation"] == "DisableKey"), "{found:#}");

    // One that the trail lacks, one that CloudTrail lacks, and a stranger.
    let ours = |event: &Value| event["eventName"] == "Decrypt" && event["errorCode"].is_null();
    let records = export["Records"].as_array().unwrap();
    let at = records.iter().position(ours).unwrap();
    let mut more = export.clone();
    let mut unknown = records[at].clone();
    unknown["requestID"] = "11111111-1111-4111-8111-111111111111".into();
    let mut stranger = unknown.clone();
    stranger["requestID"] = "22222222-2222-4222-8222-222222222222".into();
    stranger["userIdentity"]["arn"] = "arn:aws:iam::1:user/stranger".into();
    more["Records"].as_array_mut().unwrap().extend([unknown, stranger]);
    let (code, found) = reconcile(&more);
    assert_eq!(code, DISCREPANCY, "{found:#}");
    assert_eq!(found["missing_in_trail"].as_array().unwrap().len(), 1);
    assert_eq!(found["others"]["arn:aws:iam::1:user/stranger"], 1);
    let mut fewer = export.clone();
    let taken = fewer["Records"].as_array_mut().unwrap().remove(at);
    let (code, found) = reconcile(&fewer);
    assert_eq!(code, DISCREPANCY, "{found:#}");
    assert_eq!(found["missing_in_cloudtrail"][0]["request_id"], taken["requestID"]);
}

/// Fills a file system to the last byte.
fn fill(dir: &std::path::Path) {
    let file = std::fs::File::create(dir.join("filler")).unwrap();
    let mut len = 1 << 20;
    let mut at = 0;
    while len > 0 {
        match std::os::unix::fs::FileExt::write_at(&file, &vec![1; len], at) {
            Ok(written) if written > 0 => at += u64::try_from(written).unwrap(),
            _ => len /= 2,
        }
    }
}

#[test]
fn a_full_disk_stops_attaching_as_configured_and_never_a_fence() {
    if !can_mount(&[]) {
        return;
    }
    for (on_failure, attaches) in [("refuse-attach", false), ("continue", true)] {
        let dir = tempfile::tempdir().unwrap();
        let mount = Mount::tmpfs(dir.path(), "256k");
        let trail = dir.path().join("audit");
        let kms = Daemon::start();
        let endpoint = std::fs::read_to_string(kms.dir.path().join("kms-endpoint")).unwrap();
        let key = kms.key();
        let daemon = Daemon::configured(&format!(
            "[kms]\nregion = \"eu-central-1\"\nendpoint = \"{}\"\n[lease]\nprobe_interval = \"1s\"\n\
             [audit]\ndirectory = \"{}\"\non_failure = \"{on_failure}\"\n",
            endpoint.trim(),
            trail.display()
        ));
        daemon.volume("v", "1M", &key);
        daemon.create("w", "1M", &key);
        fill(dir.path());
        // Whatever is recorded next does not fit.
        until("the daemon notices", || {
            daemon.ok(&["key", "recheck", "v"]);
            daemon.ok(&["status"])["problems"][0]["why"].is_string()
        });
        let (code, answer) = daemon.ctl(&["attach", "w"]);
        assert_eq!(code == 0, attaches, "{answer}");
        if !attaches {
            assert!(answer["why"].as_str().unwrap().contains("audit trail"), "{answer}");
        }
        daemon.says("AuditTrailFailing");
        kms.ok(&["dev", "key", "disable", &key]);
        until("the fence waits for no disk", || daemon.state("v") == "fenced");
        // With room again everything that waited is written.
        std::fs::remove_file(dir.path().join("filler")).unwrap();
        until("the trail is written again", || {
            daemon.ok(&["status"])["problems"].is_null()
                && daemon.ok(&["audit", "head"])["failing"].is_null()
        });
        let report = daemon.ok(&["audit", "verify"]);
        assert_eq!(report["intact"], true, "{report}");
        let text = run(Command::new(env!("CARGO_BIN_EXE_byokctl"))
            .args(["audit", "export", "--dir"])
            .arg(&trail));
        assert!(text.contains("\"event\":\"fence\""), "{text}");
        drop(daemon);
        drop(mount);
    }
}

#[test]
fn a_line_is_checked_by_sed_and_sha256sum_as_the_document_says() {
    let daemon = Daemon::start();
    let file = daemon.dir.path().join("audit/audit-000000000001.jsonl");
    until("something is recorded", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.lines().count() > 1)
    });
    let document = include_str!("../../docs/audit.md");
    let command = document.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let sum = output(Command::new("sh").args(["-c", command]).env("FILE", &file));
    let sum = String::from_utf8(sum.stdout).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let record: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    assert_eq!(sum.split(' ').next(), record["hash"].as_str());
}
