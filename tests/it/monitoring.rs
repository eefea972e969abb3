//! What `monitoring/` ships: alerts that fire, and only those, on what a daemon really said; a
//! dashboard whose queries find something; and a real Prometheus that hears of a denial in time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use byokd::key::lease::{FenceReason, Verdict};
use byokd::kms::dev::{Fault, FaultKind};
use serde_json::Value;
use tempfile::TempDir;

use crate::customer::Customer;
use crate::metrics::{address, get, scrape, value};
use crate::support::{Daemon, Running, have, in_memory, nbdsh, output, run, until};

const RULES: [&str; 2] = ["monitoring/alerts.yml", "monitoring/slo.yml"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rules() -> String {
    RULES.map(|file| std::fs::read_to_string(root().join(file)).unwrap()).concat()
}

/// What follows `key` in the rules, wherever it stands.
fn said<'a>(rules: &'a str, key: &str) -> Vec<&'a str> {
    rules.lines().filter_map(|line| line.trim().strip_prefix(key)).map(str::trim).collect()
}

#[test]
fn every_alert_has_a_runbook_and_every_runbook_an_alert() {
    let text = rules();
    let alerts = said(&text, "- alert:");
    assert!(alerts.len() > 10, "{alerts:?}");
    let runbooks = said(&text, "runbook_url:");
    let wanted: Vec<_> = alerts.iter().map(|alert| format!("docs/runbooks/{alert}.md")).collect();
    assert_eq!(runbooks, wanted);
    let there: BTreeSet<_> = std::fs::read_dir(root().join("docs/runbooks"))
        .unwrap()
        .map(|entry| format!("docs/runbooks/{}", entry.unwrap().file_name().display()))
        .collect();
    assert_eq!(there, wanted.into_iter().collect());
    for runbook in there {
        let text = std::fs::read_to_string(root().join(&runbook)).unwrap();
        for part in ["## What to look at\n", "## What to do\n"] {
            assert!(text.contains(part), "{runbook} says nothing under {part}");
        }
    }
}

#[test]
fn every_alert_that_the_log_names_is_one_of_the_rules() {
    let text = rules();
    let alerts = said(&text, "- alert:");
    for verdict in [Verdict::Denied, Verdict::Unavailable, Verdict::Credentials, Verdict::Mismatch]
    {
        let alert = verdict.alert().unwrap();
        assert!(alerts.contains(&alert), "{verdict:?}: no rule {alert}");
    }
    for reason in FenceReason::ALL {
        let alert = reason.alert();
        assert!(alert.is_none_or(|alert| alerts.contains(&alert)), "{reason:?}: no rule");
    }
}

/// What was scraped, and for how many intervals of 15 s it is what Prometheus got.
type Story<'a> = &'a [(&'a str, usize)];

const INTERVAL: usize = 15;

/// An alert that fires, and for which volume.
type Firing = (&'static str, &'static str);

/// The stories' series, and what is to be so at their ends.
#[derive(Default)]
struct Tests(String);

impl Tests {
    /// At the end of the story exactly these alerts fire, and these expressions are 1.
    fn add(&mut self, name: &str, story: Story<'_>, firing: &[Firing], so: &[&str]) {
        let mut series: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut length = 0;
        for (page, times) in story {
            for (sample, value) in samples(page) {
                let values = series.entry(sample).or_insert_with(|| vec!["_".to_owned(); length]);
                values.resize(length, "_".to_owned());
                values.extend(std::iter::repeat_n(value.to_owned(), *times));
            }
            length += times;
            for values in series.values_mut().filter(|values| values.len() < length) {
                // As Prometheus does when a series is not on the page any more.
                values.push("stale".to_owned());
                values.resize(length, "_".to_owned());
            }
        }
        let text = &mut self.0;
        writeln!(text, "  - name: {name}\n    interval: {INTERVAL}s\n    input_series:").unwrap();
        for (sample, values) in series {
            writeln!(text, "      - series: '{sample}'\n        values: '{}'", values.join(" "))
                .unwrap();
        }
        writeln!(text, "    promql_expr_test:").unwrap();
        let at = (length - 1) * INTERVAL;
        let mut expect = |expr: &str, samples: &[(String, usize)]| {
            writeln!(text, "      - expr: '{expr}'\n        eval_time: {at}s").unwrap();
            writeln!(text, "        exp_samples:").unwrap();
            for (labels, value) in samples {
                writeln!(text, "          - labels: '{labels}'\n            value: {value}")
                    .unwrap();
            }
        };
        let all = "count by (alertname, volume) (ALERTS{alertstate=\"firing\"})";
        let firing: Vec<_> = firing
            .iter()
            .map(|(alert, volume)| {
                let volume = if volume.is_empty() {
                    String::new()
                } else {
                    format!(", volume=\"{volume}\"")
                };
                (format!("{{alertname=\"{alert}\"{volume}}}"), 1)
            })
            .collect();
        expect(all, &firing);
        for expr in so {
            expect(expr, &[("{job=\"byokd\"}".to_owned(), 1)]);
        }
    }

    fn run(self) {
        let dir = in_memory();
        let files = RULES.map(|file| format!("  - {}\n", root().join(file).display())).concat();
        let text =
            format!("rule_files:\n{files}evaluation_interval: {INTERVAL}s\ntests:\n{}", self.0);
        let file = dir.path().join("tests.yml");
        std::fs::write(&file, &text).unwrap();
        let ended = output(Command::new("promtool").args(["test", "rules"]).arg(&file));
        let words = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
        assert!(ended.status.success(), "{words}");
    }
}

/// Our samples on a page, with the labels that Prometheus adds, and their values.
fn samples(page: &str) -> impl Iterator<Item = (String, &str)> {
    let ours = page.lines().filter(|line| line.starts_with("byokd_") || line.starts_with("up"));
    ours.map(|line| {
        let (sample, value) = line.rsplit_once(' ').unwrap();
        let target = "job=\"byokd\",instance=\"node\"";
        let sample = match sample.split_once('{') {
            Some((name, labels)) => format!("{name}{{{target},{labels}"),
            None => format!("{sample}{{{target}}}"),
        };
        (sample, value)
    })
}

/// A page on which the samples that begin so have another value.
fn altered(page: &str, begins: &[&str], value: &str) -> String {
    let mut hit = BTreeSet::new();
    let line = |line: &str| match begins.iter().find(|begins| line.starts_with(**begins)) {
        Some(begins) => {
            hit.insert(*begins);
            format!("{} {value}\n", line.rsplit_once(' ').unwrap().0)
        }
        None => format!("{line}\n"),
    };
    let text: String = page.lines().map(line).collect();
    assert_eq!(hit.len(), begins.len(), "{begins:?}");
    text
}

/// A daemon as in production that serves metrics on a socket.
struct Scene {
    customer: Customer,
    daemon: Daemon,
    place: TempDir,
}

impl Scene {
    fn new() -> Self {
        let customer = Customer::new();
        let place = in_memory();
        let socket = place.path().join("http.sock");
        let settings = customer.settings("", "probe_interval = \"1s\"\n");
        let settings = format!("[http]\nsocket = \"{}\"\n{settings}", socket.display());
        let daemon = Daemon::configured(&settings);
        Self { customer, daemon, place }
    }

    fn page(&self) -> String {
        let socket = UnixStream::connect(self.place.path().join("http.sock")).unwrap();
        let (status, page) = get(socket, "/metrics", "Host: localhost\r\n");
        assert_eq!(status, 200, "{page}");
        page
    }

    /// The first page on which all these samples are so.
    fn page_when(&self, what: &str, so: &[(&str, f64)]) -> String {
        let mut page = String::new();
        until(what, || {
            page = self.page();
            so.iter().all(|(sample, wanted)| (value(&page, sample) - wanted).abs() < 0.001)
        });
        page
    }

    /// The first page on which this counter is further than on that one.
    fn page_after(&self, before: &str, sample: &str) -> String {
        let mut page = String::new();
        until(sample, || {
            page = self.page();
            value(&page, sample) > value(before, sample)
        });
        page
    }
}

const V: &str = "byokd_volume_state{volume=\"v\",state=\"serving\"}";
const SERVING: [(&str, f64); 3] = [
    (V, 1.0),
    ("byokd_volume_state{volume=\"short\",state=\"serving\"}", 1.0),
    ("byokd_volume_state{volume=\"tight\",state=\"serving\"}", 1.0),
];
/// `v` may be without KMS for an hour, `tight` for 10 minutes, `short` for 4 s.
const TROUBLED: [(&str, f64); 3] = [
    ("byokd_volume_state{volume=\"v\",state=\"unverified\"}", 1.0),
    ("byokd_key_lease_state{volume=\"short\",state=\"expired\"}", 1.0),
    ("byokd_volume_state{volume=\"tight\",state=\"unverified\"}", 1.0),
];
const DENIED: [(&str, f64); 3] = [
    ("byokd_key_lease_state{volume=\"v\",state=\"revoked\"}", 1.0),
    ("byokd_key_lease_state{volume=\"short\",state=\"revoked\"}", 1.0),
    ("byokd_key_lease_state{volume=\"tight\",state=\"revoked\"}", 1.0),
];

/// Some pages are told one after the other, as if for minutes each; what the daemon did between two
/// of them took seconds.
#[test]
fn each_alert_fires_on_what_a_daemon_said_and_no_other_does() {
    if !have(&["promtool", "nbdsh"]) {
        return;
    }
    for file in RULES {
        run(Command::new("promtool").args(["check", "rules"]).arg(root().join(file)));
    }
    let mut scene = Scene::new();
    let key = scene.customer.key.as_str().to_owned();
    let (daemon, kms) = (&scene.daemon, &scene.customer.kms);
    for (name, lease) in [("v", "1h"), ("tight", "10m"), ("short", "4s")] {
        daemon.create(name, "1M", &key);
        daemon.define(name, &format!("[lease]\nfail_closed_after = \"{lease}\""));
    }
    daemon.create("header", "1M", &key);
    let unwanted = scene.customer.another_key();
    daemon.create("wanted", "1M", unwanted.as_str());
    daemon.define("wanted", "attach = \"auto\"");
    for name in ["v", "tight", "short"] {
        daemon.ok(&["attach", name]);
    }
    let mut tests = Tests::default();
    let healthy = scene.page_when("all are served", &SERVING);
    tests.add("healthy", &[(&healthy, 32)], &[], &[]);

    // KMS out of reach, then byokd's own credentials.
    let mut before = healthy.clone();
    let mut told = Vec::new();
    for (fault, outcome, alert) in [
        (Fault::new(FaultKind::Throttle), "unavailable", "KmsUnreachable"),
        (Fault::error(400, "ExpiredTokenException", "x"), "credentials", "OwnCredentialsFailing"),
    ] {
        kms.inject(fault);
        let first = scene.page_when(alert, &TROUBLED);
        let probes = format!("byokd_key_probes_total{{volume=\"short\",outcome=\"{outcome}\"}}");
        let probes = [&probes, &probes.replace("short", "tight"), &probes.replace("short", "v")];
        let then =
            probes.iter().fold(first.clone(), |page, probes| scene.page_after(&page, probes));
        let firing: &[Firing] = &[
            (alert, "short"),
            (alert, "tight"),
            (alert, "v"),
            ("FalseFence", "short"),
            ("KeyLeaseExpiring", "tight"),
            ("VolumeFenced", "short"),
        ];
        let story: Story<'_> = &[(&before, 8), (&first, 8), (&then, 16)];
        let so = ["byokd:false_fences:increase30d > bool 0"];
        tests.add(alert, story, firing, &so);
        kms.clear_faults();
        let after = scene.page_when("all are served again", &SERVING);
        told.push((std::mem::replace(&mut before, after), first, then));
    }
    // One after the other, soon: what is over is not told of what is so now.
    let [(_, silent, still), (served, ours, still_ours)] = &told[..] else { panic!("two faults") };
    let firing: &[Firing] = &[
        ("FalseFence", "short"),
        ("KeyLeaseExpiring", "tight"),
        ("OwnCredentialsFailing", "short"),
        ("OwnCredentialsFailing", "tight"),
        ("OwnCredentialsFailing", "v"),
        ("VolumeFenced", "short"),
    ];
    let recovered: Story<'_> =
        &[(&healthy, 4), (silent, 1), (still, 8), (served, 3), (ours, 1), (still_ours, 7)];
    tests.add("credentials soon after an outage", recovered, firing, &[]);
    let turned: Story<'_> = &[(&healthy, 4), (silent, 2), (ours, 1), (still_ours, 7)];
    tests.add("an outage that turns out to be our own", turned, firing, &[]);
    let last = still_ours.lines().filter(|line| line.starts_with("byokd_key_last_probe_outcome{"));
    let last: Vec<_> = last.filter(|line| line.ends_with(" 1")).collect();
    assert!(
        last.len() == 3 && last.iter().all(|line| line.contains("\"credentials\"")),
        "{last:?}"
    );

    // The customer takes the key away.
    scene.customer.set_enabled(false);
    let denied = scene.page_when("all are fenced", &DENIED);
    let mut firing: Vec<Firing> = vec![
        ("KeyDenied", "short"),
        ("KeyDenied", "tight"),
        ("KeyDenied", "v"),
        ("VolumeFenced", "short"),
        ("VolumeFenced", "tight"),
        ("VolumeFenced", "v"),
    ];
    let so = ["byokd:fenced_within_bound:ratio30d == bool 1"];
    tests.add("KeyDenied", &[(&before, 8), (&denied, 16)], &firing, &so);
    // No daemon of ours is late: the same page, as if it had been.
    let late = altered(&denied, &["byokd_key_late_fences_total{volume=\"v\"}"], "1");
    firing.insert(0, ("FenceSlow", "v"));
    let so = ["byokd:fenced_within_bound:ratio30d < bool 0.7"];
    tests.add("FenceSlow", &[(&before, 8), (&late, 16)], &firing, &so);
    scene.customer.set_enabled(true);
    let before = scene.page_when("all are served after the denial", &SERVING);

    // A store that lost its end.
    File::options().write(true).open(daemon.backing("v")).unwrap().set_len(16 << 20).unwrap();
    nbdsh(
        &daemon.uri("v"),
        "try:\n    h.pread(4096, 0)\n    assert False, 'read what is not there'\n\
         except nbd.Error as e:\n    assert e.errno == 'EIO', e",
    );
    let broken =
        scene.page_when("the error is told", &[("byokd_backing_errors_total{volume=\"v\"}", 1.0)]);
    tests.add("BackingErrors", &[(&before, 8), (&broken, 8)], &[("BackingErrors", "v")], &[]);

    // A header with one damaged copy.
    let mut store = std::fs::read(daemon.backing("header")).unwrap();
    store[4096..5000].fill(0xff);
    std::fs::write(daemon.backing("header"), store).unwrap();
    daemon.ok(&["attach", "header"]);
    let degraded = scene.page_when(
        "the repair is told",
        &[("byokd_volume_header_degraded{volume=\"header\"}", 1.0)],
    );
    tests.add(
        "HeaderDegraded",
        &[(&broken, 32), (&degraded, 8)],
        &[("HeaderDegraded", "header")],
        &[],
    );

    // What is not to be had from a daemon that is well, on its page.
    let stuck = altered(&before, &["byokd_audit_failing", "byokd_audit_changed"], "1");
    let stuck = altered(&stuck, &["byokd_ready"], "0");
    let stuck = altered(&stuck, &["byokd_backing_stalled_operations{volume=\"tight\"}"], "1");
    // Of three days after promtool's beginning.
    let certificate = ["byokd_http_certificate_expiry_timestamp_seconds"];
    let stuck = altered(&stuck, &certificate, "259200");
    let stuck = altered(&stuck, &["byokd_key_probe_age_seconds{volume=\"v\"}"], "60");
    let firing: &[Firing] = &[
        ("AuditTrailChanged", ""),
        ("AuditTrailFailing", ""),
        ("BackingStalled", "tight"),
        ("ByokdNotReady", ""),
        ("CertificateExpiring", ""),
        ("ProbeStalled", "v"),
    ];
    tests.add("stuck", &[(&before, 8), (&stuck, 32)], firing, &[]);
    tests.add("ByokdDown", &[("up 1\n", 8), ("up 0\n", 8)], &[("ByokdDown", "")], &[]);

    // A volume that should be there after a start, whose key is denied.
    scene.customer.set_key_enabled(&unwanted, false);
    scene.daemon.crash_and_restart();
    let tried = "byokd_volume_attaches_total{volume=\"wanted\",outcome=\"key_denied\"}";
    let mut missing = String::new();
    until("it is tried in vain", || {
        missing = scene.page();
        value(&missing, tried) > 0.0
    });
    tests.add(
        "VolumeNotAttached",
        &[(&before, 8), (&missing, 16)],
        &[("VolumeNotAttached", "wanted")],
        &[],
    );

    let told = tests.0.clone();
    tests.run();
    for alert in said(&rules(), "- alert:") {
        assert!(told.contains(&format!("alertname=\"{alert}\"")), "nothing fires {alert}");
    }
}

/// A Prometheus of the test's own that scrapes one daemon every second.
struct Prometheus {
    _running: Running,
    address: String,
    _dir: TempDir,
}

impl Prometheus {
    fn of(daemon: &str) -> Self {
        let dir = in_memory();
        let files = RULES.map(|file| format!("  - {}\n", root().join(file).display())).concat();
        let settings = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files:\n{files}\
             scrape_configs:\n  - job_name: byokd\n    static_configs: [{{targets: [\"{daemon}\"]}}]\n"
        );
        std::fs::write(dir.path().join("prometheus.yml"), settings).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={free}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let prometheus = Self { _running: Running(process), address: free.to_string(), _dir: dir };
        until("Prometheus answers", || TcpStream::connect(free).is_ok());
        prometheus
    }

    /// The samples that an expression has now: their labels and values.
    fn query(&self, expr: &str) -> Vec<Value> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let path = format!("/api/v1/query?query={}", encoded(expr));
        // By HTTP/1.0 the answer comes in one piece.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        // While it starts it says so.
        if head.contains(" 503 ") {
            return Vec::new();
        }
        let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"));
        assert_eq!(body["status"], "success", "{expr}: {body}");
        body["data"]["result"].as_array().unwrap().clone()
    }

    fn is_so(&self, expr: &str) -> bool {
        !self.query(expr).is_empty()
    }
}

fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        write!(encoded, "%{byte:02X}").unwrap();
        encoded
    })
}

#[test]
fn prometheus_fires_an_alert_in_time_after_a_denial_and_ends_it() {
    if !have(&["prometheus", "nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let prometheus = Prometheus::of(&address(&daemon));
    until("the volume is seen", || prometheus.is_so("byokd_volume_state{state=\"serving\"} == 1"));
    assert!(!prometheus.is_so("ALERTS"), "{:?}", prometheus.query("ALERTS"));
    let denied = Instant::now();
    daemon.ok(&["dev", "key", "disable", &key]);
    let fires =
        |alert: &str| format!("ALERTS{{alertname=\"{alert}\",alertstate=\"firing\",volume=\"v\"}}");
    until("the alert fires", || prometheus.is_so(&fires("KeyDenied")));
    let took = denied.elapsed();
    println!("an alert {took:?} after a denial, with probes, scrapes and rules every second");
    // A probe a second and a tenth after the denial at the latest, the fence 2 s after that, a
    // scrape, a rule; and as much again for a busy machine.
    assert!(took < Duration::from_secs(10), "{took:?}");
    until("the fence is told", || prometheus.is_so(&fires("VolumeFenced")));
    let alerts = prometheus.query("ALERTS{alertname=\"KeyDenied\"}");
    assert_eq!(alerts[0]["metric"]["key_arn"], key.as_str(), "{alerts:?}");
    daemon.ok(&["dev", "key", "enable", &key]);
    until("the alerts end", || !prometheus.is_so("ALERTS"));
}

/// Everything that the dashboard asks Prometheus.
fn queries(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_query_of_the_dashboard_finds_something() {
    if !have(&["prometheus", "nbdsh"]) {
        return;
    }
    let dashboard = std::fs::read(root().join("monitoring/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_slice(&dashboard).unwrap();
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let page = address(&daemon);
    let prometheus = Prometheus::of(&page);
    // Prometheus sees how a counter grows only from its second scrape on.
    until("a scrape", || prometheus.is_so("byokd_volume_state"));
    nbdsh(&daemon.uri("v"), "h.pwrite(bytes(8192), 0)\nh.pread(4096, 0)\nh.flush()");
    daemon.ok(&["dev", "key", "disable", &key]);
    until("a fence", || daemon.state("v") == "fenced");
    let mut queries: Vec<String> = queries(&dashboard)
        .iter()
        .map(|expr| {
            let expr = expr.replace("$__rate_interval", "1m").replace("$job", ".*");
            expr.replace("$instance", ".*").replace("$volume", ".*")
        })
        .collect();
    assert!(queries.len() > 30, "{queries:?}");
    assert!(queries.iter().all(|query| !query.contains('$')), "{queries:?}");
    let total = queries.len();
    until("every query finds something", || {
        queries.retain(|query| prometheus.query(query).is_empty());
        if !queries.is_empty() {
            println!("of {total} find nothing yet: {queries:#?}");
        }
        queries.is_empty()
    });
    // What is asked about the data was asked of numbers, not of zeroes.
    let writes = "byokd_io_request_duration_seconds_count{operation=\"write\"}";
    assert_eq!(prometheus.query(writes)[0]["value"][1], "1");
    assert!(scrape(&page).contains("byokd_volume_state"));
}

/// Where the rules and the dashboard are named, they are there.
#[test]
fn what_the_document_names_is_shipped() {
    let document = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    for file in RULES.into_iter().chain(["monitoring/dashboard.json"]) {
        assert!(document.contains(file), "docs/metrics.md does not name {file}");
        assert!(PathBuf::from(root()).join(file).is_file());
    }
}
