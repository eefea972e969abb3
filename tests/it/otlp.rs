//! What a collector of OpenTelemetry's hears of a real daemon, and what becomes of a daemon whose
//! collector hangs.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use byokd::log;
use serde_json::Value;
use tracing_subscriber::filter::EnvFilter;

use crate::support::{Daemon, PATIENCE, Running, have, in_memory, nbdsh, run, until, unwrap_token};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// The Python that has what tests/install/collector.sh installs.
fn python() -> Option<PathBuf> {
    let tools = std::env::var_os("BYOKD_TEST_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools"),
        PathBuf::from,
    );
    if tools.join("collector/version").exists() {
        return Some(tools.join("collector/bin/python"));
    }
    let why = "needs tests/install/collector.sh; tests/run runs it";
    assert!(std::env::var_os("CI").is_none(), "{why}");
    println!("skipped: {why}");
    None
}

/// A collector that decodes what it gets: its URL, and the records.
fn collector(python: &Path) -> (Running, String, Receiver<Value>) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/otlp_collector.py");
    let mut command = Command::new(python);
    let mut child = command.arg(script).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let port: u16 = lines.next().unwrap().unwrap().parse().unwrap();
    let (tells, told) = channel();
    std::thread::spawn(move || {
        let records = lines.map_while(Result::ok);
        let records = records.map(|line| serde_json::from_str(&line).unwrap());
        records.map(|record| tells.send(record)).take_while(Result::is_ok).count()
    });
    (Running(child), format!("http://127.0.0.1:{port}"), told)
}

/// One that understands nothing, and answers as it is told: what came in each request.
fn answering(answers: Vec<&'static str>) -> (String, Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (tells, told) = channel();
    std::thread::spawn(move || {
        let mut answers = answers.into_iter();
        let mut last = "";
        for stream in listener.incoming() {
            last = answers.next().unwrap_or(last);
            let body = answer(stream.unwrap(), last);
            if tells.send(body).is_err() {
                return;
            }
        }
    });
    (url, told)
}

fn answer(stream: TcpStream, status: &str) -> Vec<u8> {
    let mut reader = BufReader::new(stream);
    let (mut length, mut line) = (0, String::new());
    while reader.read_line(&mut line).unwrap() > 2 {
        if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
            length = value.trim().parse().unwrap();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let mut stream = reader.into_inner();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    body
}

fn contains(bytes: &[u8], what: &str) -> bool {
    memchr::memmem::find(bytes, what.as_bytes()).is_some()
}

#[test]
fn a_denial_arrives_at_a_collector_with_its_volume_key_and_request() {
    let Some(python) = python() else { return };
    if !have(&["cryptsetup"]) {
        return;
    }
    let (_collector, url, told) = collector(&python);
    let dir = in_memory();
    let env = [
        (ENDPOINT, url.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20t-1"),
        ("BYOKD_LOG", "trace"),
    ];
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut daemon = Daemon::start_with(dir, env.to_vec());
    let key = daemon.key();
    daemon.create("v", "8M", &key);
    let mut token = Command::new("cryptsetup");
    let token = run(token.args(["token", "export", "--token-id", "0"]).arg(daemon.backing("v")));
    let secret = unwrap_token(&daemon, &token);
    daemon.ok(&["attach", "v"]);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");

    let denied = |record: &&Value| record["body"] == "a probe did not succeed";
    let mut heard = Vec::new();
    until("the denial is told", || {
        heard.extend(told.try_iter());
        heard.iter().any(|record| denied(&record))
    });
    let denial = heard.iter().find(denied).unwrap();
    let attributes = &denial["attributes"];
    let verbatim = format!("{key} is disabled.");
    for (name, value) in [
        ("volume", "v"),
        ("key", &key),
        ("code", "DisabledException"),
        ("kms_message", &verbatim),
        ("code.file.path", "src/keeper/keeping/probing.rs"),
    ] {
        assert_eq!(attributes[name], value, "{denial}");
    }
    assert_eq!((&denial["severity"], &denial["number"]), (&"WARN".into(), &13.into()), "{denial}");
    assert!(denial["time"].as_u64().unwrap() > 0, "{denial}");
    assert_eq!(denial["resource"]["service.name"], "byokd", "{denial}");
    assert_eq!(denial["resource"]["service.version"], env!("CARGO_PKG_VERSION"), "{denial}");
    assert_eq!(denial["token"], "Bearer t-1");
    // The log has the same, and the request id joins both to CloudTrail.
    let request = attributes["request_id"].as_str().unwrap();
    let line = daemon.log();
    let line = line.lines().find(|line| line.contains("a probe did not succeed")).unwrap();
    for (name, value) in attributes.as_object().unwrap() {
        let ours = !name.starts_with("code.");
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        assert!(!ours || line.contains(&text), "{name}={value} in {line}");
    }
    assert!(line.contains(request), "{line}");

    let what_is_left = Instant::now();
    assert!(daemon.terminate().success());
    assert!(what_is_left.elapsed() < Duration::from_secs(20), "{:?}", what_is_left.elapsed());
    until("the last line is told", || {
        heard.extend(told.try_iter());
        let last = daemon.log();
        let last = last.lines().rfind(|line| line.contains(" INFO ")).unwrap_or_default();
        heard.iter().any(|record| {
            record["severity"] == "INFO" && last.contains(record["body"].as_str().unwrap())
        })
    });
    let all = heard.iter().map(Value::to_string).collect::<String>() + &daemon.log();
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    for shape in [hex, format!("{secret:?}"), "t-1".to_owned()] {
        let told_here = shape == "t-1";
        assert_eq!(all.contains(&shape), told_here && all.contains("Bearer t-1"), "{shape}");
    }
    assert!(!daemon.log().contains("Bearer t-1"), "the collector's token was said");
}

#[test]
fn a_collector_that_hangs_holds_neither_a_fence_nor_a_stop_back() {
    if !have(&["nbdsh"]) {
        return;
    }
    // Connections wait for ever in its queue.
    let hangs = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", hangs.local_addr().unwrap());
    let mut daemon = Daemon::configured_with(
        &format!("[log]\notlp_endpoint = \"{url}\"\n[kms]\nregion = \"eu-central-1\"\n"),
        Vec::new(),
    );
    until("the collector is told to be out of reach", || {
        daemon.log().contains("the collector takes no log lines")
    });
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("the collector takes no log lines")).unwrap();
    assert!(line.contains(&url) && line.contains("no answer within 3 s"), "{line}");
    let begun = Instant::now();
    assert!(daemon.terminate().success());
    // A second for the collector; the rest is for machines with much to do.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

    let dir = in_memory();
    let daemon = Daemon::start_with(dir, vec![(ENDPOINT.to_owned(), url)]);
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "h.pwrite(bytes(4096), 0)");
    let begun = Instant::now();
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the volume is served again", || daemon.state("v") == "serving");
}

/// More than may wait.
const LINES: usize = 1000;

/// What a process of a test's own does.
#[test]
fn says_what_it_is_told_to() {
    let Ok(what) = std::env::var("BYOKD_TEST_SAYS") else { return };
    let lines = log::start(EnvFilter::new("trace"), "byokd").unwrap();
    lines.export(None).unwrap();
    let begun = Instant::now();
    match what.as_str() {
        "a line" => tracing::warn!(volume = "v", "one line"),
        "two lines" => {
            tracing::warn!("one line");
            until("the first is told", || Path::new("told").exists());
            tracing::warn!("another line");
        }
        "many lines" => {
            let long = "x".repeat(1 << 20);
            (0..LINES).for_each(|n| tracing::debug!(n, long, "one of many"));
        }
        _ => panic!("{what}"),
    }
    let said = begun.elapsed();
    let begun = Instant::now();
    drop(lines);
    let waited = begun.elapsed();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let memory: u64 = memory.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    let told = format!("{} {} {memory}", said.as_millis(), waited.as_millis());
    std::fs::write("took", told).unwrap();
}

/// What a process has come to.
struct Said {
    log: String,
    /// How long it took to say it.
    took: Duration,
    /// How long it waited at the end.
    waited: Duration,
    /// The most memory that it had, in KiB.
    memory: u64,
}

/// Has a process say something, and waits for its end.
fn says(what: &str, url: &str) -> Said {
    says_while(what, url, |_| ())
}

/// The same, and does something in its directory meanwhile.
fn says_while(what: &str, url: &str, meanwhile: impl FnOnce(&Path)) -> Said {
    let dir = tempfile::tempdir().unwrap();
    let log = File::create(dir.path().join("log")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "otlp::says_what_it_is_told_to"]).current_dir(dir.path());
    command.env("BYOKD_TEST_SAYS", what).env(ENDPOINT, url);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let mut child = Running(child);
    meanwhile(dir.path());
    let ended = child.ends("what it says");
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(ended.success(), "{log}");
    let told = std::fs::read_to_string(dir.path().join("took")).unwrap();
    let numbers: Vec<u64> = told.split(' ').map(|number| number.parse().unwrap()).collect();
    let [took, waited] = [numbers[0], numbers[1]].map(Duration::from_millis);
    Said { log, took, waited, memory: numbers[2] }
}

#[test]
fn what_the_exporter_itself_says_is_not_exported() {
    let (url, told) = answering(vec!["200 OK"]);
    let mut first = Vec::new();
    let Said { log, .. } = says_while("two lines", &url, |dir| {
        first = told.recv_timeout(PATIENCE).unwrap();
        std::fs::write(dir.join("told"), "").unwrap();
    });
    assert!(log.contains("DEBUG connecting to"), "the libraries below speak at this level: {log}");
    let requests: Vec<_> = told.try_iter().collect();
    assert!(contains(&first, "one line") && !contains(&first, "connecting to"));
    assert_eq!(requests.len(), 1, "nothing else was said");
    assert!(contains(&requests[0], "another line") && !contains(&requests[0], "connecting to"));
}

#[test]
fn a_collector_that_cannot_take_a_batch_gets_it_again() {
    let (url, told) = answering(vec!["503 Service Unavailable", "200 OK"]);
    let Said { log, .. } = says("a line", &url);
    let requests: Vec<_> = told.try_iter().collect();
    assert_eq!(requests.len(), 2, "{log}");
    assert!(requests.iter().all(|request| contains(request, "one line")));
    assert!(!log.contains("takes no log lines"), "{log}");
}

#[test]
fn what_a_collector_refuses_is_said_once() {
    let (url, told) = answering(vec!["401 Unauthorized"]);
    let Said { log, .. } = says("many lines", &url);
    assert!(told.try_iter().count() >= 2, "several batches");
    let said = log.lines().filter(|line| line.contains("the collector takes no log lines"));
    let said: Vec<_> = said.collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("401") && said[0].contains(&url), "{said:?}");
}

#[test]
fn lines_that_no_collector_takes_cost_neither_time_nor_memory_without_end() {
    let hangs = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", hangs.local_addr().unwrap());
    let Said { log, took, waited, memory } = says("many lines", &url);
    // A gigabyte was said; each line was cut, and most were dropped.
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert!(memory < 100 << 10, "{memory} KiB");
    // A second for the collector, and one for the lines on standard error.
    assert!(waited < Duration::from_millis(3500), "{waited:?}");
    assert!(log.contains("one of many"), "the log has them");
}
