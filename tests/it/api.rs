//! The JSON API of a real daemon, held against its own description.

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::metrics::{Guarded, address, ask};
use crate::support::{Daemon, nbdsh, until};

/// A GET of the API: its status and JSON.
fn json_of(address: &str, path: &str) -> (u16, Value) {
    let (status, body) = ask(address, path);
    let value = serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"));
    (status, value)
}

/// An answer that is held against the description.
fn answer(address: &str, path: &str) -> Value {
    let (status, body) = json_of(address, path);
    json!({"path": path, "status": status, "body": body})
}

#[test]
fn every_answer_is_as_the_openapi_description_says() {
    let Some(python) = crate::console::python() else { return };
    let daemon = Daemon::start();
    let address = address(&daemon);
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "h.pwrite(bytes(8192), 0)\nh.pread(4096, 0)");
    daemon.create("detached", "8M", &key);
    let mut answers = vec![answer(&address, "/api/v1/volumes")];
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    assert_eq!(daemon.ctl(&["attach", "detached"]).0, 3, "KMS denies it");
    for path in [
        "/api/v1/volumes",
        "/api/v1/volumes/v",
        "/api/v1/volumes/detached",
        "/api/v1/volumes/unknown",
        "/api/v1/events",
        "/api/v1/events?last=1000",
        "/api/v1/events?volume=v&since=1&last=5",
        "/api/v1/events?last=0",
    ] {
        answers.push(answer(&address, path));
    }
    let (status, description) = json_of(&address, "/api/v1/openapi.json");
    assert_eq!(status, 200);
    let check = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openapi_answers.py");
    let mut checks = std::process::Command::new(python)
        .arg(check)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let given = json!({"description": description, "answers": answers}).to_string();
    checks.stdin.take().unwrap().write_all(given.as_bytes()).unwrap();
    let checked = checks.wait_with_output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let used: Value = serde_json::from_slice(&checked.stdout).unwrap();
    assert_eq!(used, json!(["Events", "NoAnswer", "OneVolume", "Volumes"]));
}

#[test]
fn a_denial_is_told_in_the_same_words_everywhere() {
    let daemon = Daemon::start();
    let address = address(&daemon);
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    let volume = || json_of(&address, "/api/v1/volumes/v").1["volume"].take();
    until("the volume is fenced", || volume()["state"] == "fenced");
    let mut recorded = Value::Null;
    until("its fence is in the trail", || {
        let events = json_of(&address, "/api/v1/events?volume=v").1["events"].take();
        let fence = events.as_array().unwrap().iter().find(|e| e["record"]["event"] == "fence");
        recorded = fence.map(|event| event["record"].clone()).unwrap_or_default();
        recorded != Value::Null
    });
    let (api, control) = (volume(), daemon.status("v"));
    assert_eq!(api["headline"], api["trouble"]["cause"]);
    let shown = std::process::Command::new(env!("CARGO_BIN_EXE_byokctl"))
        .arg("--socket")
        .arg(daemon.socket())
        .args(["status", "v"])
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    for part in ["cause", "effect", "remedy"] {
        let words = api["trouble"][part].as_str().unwrap();
        assert_eq!(control["trouble"][part], words, "control API");
        assert_eq!(recorded[part], words, "audit trail");
        assert!(shown.contains(words), "byokctl shows the {part}: {shown}");
        daemon.says(words);
    }
    let said = &api["lease"]["evidence"];
    let evidence = control["trouble"]["evidence"].as_str().unwrap();
    for part in ["code", "message", "request_id"] {
        let said = said[part].as_str().unwrap();
        assert!(evidence.contains(said), "{evidence} has the {part}");
    }
    // The record of the fence names the answer that fenced, and the log has the same.
    let of_denial = |part: &str| {
        let said = recorded[part].as_str().unwrap_or_else(|| panic!("{part} in {recorded}"));
        let log = daemon.log();
        let fenced = log.lines().find(|line| line.contains("fenced: the key is destroyed"));
        assert!(fenced.unwrap().contains(said), "{fenced:?} has the {part}");
        said.to_owned()
    };
    assert_eq!(of_denial("code"), said["code"]);
    assert_eq!(of_denial("message"), said["message"]);
    let id = of_denial("request_id");
    assert_eq!(recorded["verdict"], "denied");
    let called = |record: &Value| {
        let calls = record["calls"].as_array().into_iter().flatten();
        calls.into_iter().any(|call| call["request_id"] == id.as_str())
    };
    until("that request to KMS is in the trail", || {
        crate::audit::records(&daemon).iter().any(called)
    });
}

#[test]
fn a_dead_disk_keeps_nobody_waiting_who_looks() {
    let daemon = Daemon::start();
    let address = address(&daemon);
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let (_, whole) = json_of(&address, "/api/v1/volumes/v");
    assert_eq!(whole["volume"]["key"], key, "the header of a detached volume is read");
    // Reading from a pipe that nobody writes to ends as soon as reading from a disk that is gone.
    let backing = daemon.backing("gone");
    nix::unistd::mkfifo(&backing, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let definition = daemon.dir.path().join("volumes.d/gone.toml");
    std::fs::write(definition, format!("backing = \"{}\"\n", backing.display())).unwrap();
    daemon.ok(&["reload"]);
    for _ in 0..2 {
        let (status, gone) = json_of(&address, "/api/v1/volumes/gone");
        assert_eq!((status, &gone["volume"]["key"]), (200, &Value::Null));
    }
    // So that the thread which reads can end.
    drop(std::fs::File::options().read(true).write(true).open(&backing).unwrap());
}

#[test]
fn the_api_is_read_only_and_asks_for_the_token_but_the_page_does_not() {
    let (guarded, right) = (Guarded::start(), Guarded::TOKEN);
    let status = |path: &str, headers: &str| guarded.ask(path, headers);
    for path in ["/api/v1/volumes", "/api/v1/volumes/v", "/api/v1/events", "/api/v1/other"] {
        assert_eq!(status(path, ""), 401, "{path}");
    }
    assert_eq!(status("/api/v1/volumes", right), 200);
    assert_eq!(status("/api/v1/volumes/v", right), 404);
    assert_eq!(status("/api/v1/events?last=0", right), 400);
    for path in ["/", "/console.js", "/console.css", "/icon.svg", "/api/v1/openapi.json"] {
        assert_eq!(status(path, ""), 200, "{path}");
    }
    let mut stream = guarded.connect();
    let wrong =
        format!("POST /api/v1/volumes HTTP/1.1\r\nHost: x\r\n{right}Connection: close\r\n\r\n");
    stream.write_all(wrong.as_bytes()).unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
}
