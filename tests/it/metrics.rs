//! Metrics and health of a real daemon, over HTTP as Prometheus asks for them.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use byokd::metrics::table;
use tempfile::TempDir;

use crate::support::{Daemon, have, in_memory, nbdsh, until};

/// The status and body of a GET over an open connection.
pub(crate) fn get(mut stream: impl Read + Write, path: &str, headers: &str) -> (u16, String) {
    write!(stream, "GET {path} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Where a development daemon serves HTTP.
pub(crate) fn address(daemon: &Daemon) -> String {
    let path = daemon.dir.path().join("http-endpoint");
    let mut url = String::new();
    until("the address is told", || {
        url = std::fs::read_to_string(&path).unwrap_or_default();
        url.ends_with('\n')
    });
    url.trim().strip_prefix("http://").unwrap().to_owned()
}

pub(crate) fn ask(address: &str, path: &str) -> (u16, String) {
    get(TcpStream::connect(address).unwrap(), path, &format!("Host: {address}\r\n"))
}

pub(crate) fn scrape(address: &str) -> String {
    let (status, page) = ask(address, "/metrics");
    assert_eq!(status, 200, "{page}");
    page
}

/// A sample's value, by its name and labels as they stand on the page.
pub(crate) fn value(page: &str, sample: &str) -> f64 {
    let of_sample = |line: &str| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok();
    page.lines().find_map(of_sample).unwrap_or_else(|| panic!("no {sample} in {page}"))
}

/// The names of metrics of ours that are on a page.
fn told(page: &str) -> BTreeSet<&str> {
    let names = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    names.filter(|name| name.starts_with("byokd_")).collect()
}

fn promtool_finds_nothing(page: &str) {
    if !have(&["promtool"]) {
        return;
    }
    let mut check = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    check.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let said = check.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    // What the library tells of the process bears the names that all its users' have.
    assert!(said.status.success() && words.trim().is_empty(), "{words}");
}

#[test]
fn a_denial_is_seen_by_prometheus_and_so_is_its_end() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let address = address(&daemon);
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    nbdsh(&daemon.uri("v"), "h.pwrite(bytes(8192), 0)\nh.pread(4096, 0)\nh.pread(4096, 4096)");
    let state = |page: &str, state: &str| {
        value(page, &format!("byokd_volume_state{{volume=\"v\",state=\"{state}\"}}"))
    };
    let page = scrape(&address);
    promtool_finds_nothing(&page);
    assert_eq!((state(&page, "serving"), state(&page, "fenced")), (1.0, 0.0));
    let io = |what: &str, operation: &str| {
        value(&page, &format!("byokd_io_{what}{{volume=\"v\",operation=\"{operation}\"}}"))
    };
    assert_eq!((io("operations_total", "read"), io("bytes_total", "read")), (2.0, 8192.0));
    assert_eq!((io("operations_total", "write"), io("bytes_total", "write")), (1.0, 8192.0));
    assert_eq!(
        (io("failed_requests_total", "read"), io("failed_requests_total", "write")),
        (0.0, 0.0)
    );
    assert_eq!(io("request_duration_seconds_count", "read"), 2.0, "each answer was timed");
    assert!(io("request_duration_seconds_sum", "write") > 0.0);
    assert!(value(&page, "byokd_cipher_seconds_total{volume=\"v\"}") > 0.0);
    assert_eq!(value(&page, "byokd_io_in_flight{volume=\"v\"}"), 0.0);
    for taken in ["key", "volume"] {
        let within =
            format!("byokd_key_denial_heard_within_seconds{{volume=\"v\",taken=\"{taken}\"}}");
        assert_eq!(value(&page, &within), 1.1, "one probe a second, give or take a tenth");
    }
    assert_eq!(value(&page, "byokd_kms_probes_per_second"), 1.0);
    assert!(value(&page, "byokd_key_lease_remaining_seconds{volume=\"v\"}") > 3500.0);
    assert_eq!(value(&page, "byokd_key_denial_to_fence_seconds_count{volume=\"v\"}"), 0.0);

    daemon.ok(&["dev", "key", "disable", &key]);
    let mut page = String::new();
    until("the fence is told", || {
        page = scrape(&address);
        state(&page, "fenced") == 1.0
    });
    promtool_finds_nothing(&page);
    assert_eq!(state(&page, "serving"), 0.0);
    assert_eq!(value(&page, "byokd_volume_fences_total{volume=\"v\",reason=\"denied\"}"), 1.0);
    assert_eq!(value(&page, "byokd_key_denial_to_fence_seconds_count{volume=\"v\"}"), 1.0);
    assert_eq!(
        value(&page, "byokd_key_denial_to_fence_seconds_bucket{volume=\"v\",le=\"2\"}"),
        1.0
    );
    assert_eq!(value(&page, "byokd_key_lease_remaining_seconds{volume=\"v\"}"), 0.0);
    assert!(
        value(&page, "byokd_kms_requests_total{operation=\"Decrypt\",outcome=\"denied\"}") >= 2.0
    );
    for health in ["/livez", "/readyz"] {
        assert_eq!(ask(&address, health), (200, "ok\n".to_owned()), "{health}");
    }
    let trouble = daemon.status("v")["trouble"].clone();
    for part in ["cause", "effect", "remedy"] {
        // As the status does.
        daemon.says(trouble[part].as_str().unwrap());
    }

    daemon.ok(&["dev", "key", "enable", &key]);
    let restores =
        |page: &str| value(page, "byokd_volume_restores_total{volume=\"v\",outcome=\"ok\"}");
    // Requests are served a moment before that is counted.
    until("its end is told", || {
        page = scrape(&address);
        state(&page, "serving") == 1.0 && restores(&page) > 0.0
    });
    assert_eq!(restores(&page), 1.0);
    // A volume that is forgotten leaves no series.
    daemon.ok(&["detach", "v"]);
    daemon.ok(&["volume", "forget", "v"]);
    assert!(!scrape(&address).contains("volume=\"v\""));
}

/// A daemon that listens for HTTP on a socket, and answers who has the token.
pub(crate) struct Guarded {
    socket: PathBuf,
    _daemon: Daemon,
    _place: TempDir,
}

impl Guarded {
    /// The header of who has it.
    pub(crate) const TOKEN: &str = "Authorization: Bearer 0123456789abcdef\r\n";

    pub(crate) fn start() -> Self {
        let place = in_memory();
        let (token, socket) = (place.path().join("token"), place.path().join("http.sock"));
        std::fs::write(&token, "0123456789abcdef\n").unwrap();
        std::fs::set_permissions(&token, Permissions::from_mode(0o600)).unwrap();
        let daemon = Daemon::configured(&format!(
            "[http]\nsocket = \"{}\"\ntoken_file = \"{}\"\n[kms]\nregion = \"eu-central-1\"\n",
            socket.display(),
            token.display()
        ));
        until("the socket is there", || UnixStream::connect(&socket).is_ok());
        Self { socket, _daemon: daemon, _place: place }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// The status of what is answered.
    pub(crate) fn ask(&self, path: &str, headers: &str) -> u16 {
        get(self.connect(), path, &format!("Host: byokd\r\n{headers}")).0
    }
}

#[test]
fn every_metric_is_described() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let page = scrape(&address(&daemon));
    let described: BTreeSet<_> = table::ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(told(&page), described);
    let document = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let document = std::fs::read_to_string(document).unwrap();
    let wanted = table::markdown();
    assert!(document.contains(&wanted), "put this into docs/metrics.md:\n{wanted}");
}

#[test]
fn only_who_may_see_metrics_is_shown_them() {
    let daemon = Daemon::start();
    let address = address(&daemon);
    let connect = || TcpStream::connect(&address).unwrap();
    assert_eq!(get(connect(), "/metrics", "Host: evil.example\r\n").0, 421);
    assert_eq!(ask(&address, "/other").0, 404);

    let guarded = Guarded::start();
    assert_eq!(guarded.ask("/metrics", ""), 401);
    assert_eq!(guarded.ask("/metrics", "Authorization: Bearer 0123456789abcdee\r\n"), 401);
    assert_eq!(guarded.ask("/metrics", Guarded::TOKEN), 200);
    assert_eq!(guarded.ask("/livez", ""), 200);
}
