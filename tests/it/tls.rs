//! The HTTP listener with TLS, as curl sees it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use crate::metrics::value;
use crate::support::{Daemon, have, in_memory, output, run, until};

const TOKEN: &str = "0123456789abcdef";
const DAY: f64 = 86_400.0;

/// A certificate for this machine, its key, and the token.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(in_memory());
        files.write("token", TOKEN);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
        self.set_mode(name, 0o600);
    }

    fn set_mode(&self, name: &str, mode: u32) {
        std::fs::set_permissions(self.path(name), PermissionsExt::from_mode(mode)).unwrap();
    }

    /// A new pair in the place of the old, one file after the other.
    fn renew(&self, days: u32) {
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        openssl.args(["-nodes", "-subj", "/CN=localhost", "-days", &days.to_string()]);
        openssl.args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]);
        openssl.arg("-keyout").arg(self.path("new-key.pem"));
        run(openssl.arg("-out").arg(self.path("new.pem")).stderr(Stdio::null()));
        for (new, name) in [("new-key.pem", "key.pem"), ("new.pem", "certificate.pem")] {
            self.set_mode(new, 0o600);
            std::fs::rename(self.path(new), self.path(name)).unwrap();
        }
    }

    fn settings(&self) -> String {
        format!(
            "[http]\nlisten = \"127.0.0.1:0\"\ncertificate = \"{}\"\ncertificate_key = \"{}\"\n\
             token_file = \"{}\"\n[kms]\nregion = \"eu-central-1\"\n",
            self.path("certificate.pem").display(),
            self.path("key.pem").display(),
            self.path("token").display()
        )
    }
}

/// Where the daemon says that it serves.
fn port(daemon: &Daemon) -> u16 {
    daemon.says(" bound=127.0.0.1:");
    let log = daemon.log();
    let bound = log.split(" bound=127.0.0.1:").nth(1).unwrap();
    bound.split_whitespace().next().unwrap().parse().unwrap()
}

fn curl(authority: &Path, url: &str) -> Output {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "20", "--header"]);
    curl.arg(format!("Authorization: Bearer {TOKEN}")).arg("--cacert").arg(authority);
    output(curl.arg(url))
}

fn days_left(page: &str) -> f64 {
    let expires = value(page, "byokd_http_certificate_expiry_timestamp_seconds");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    (expires - now.as_secs_f64()) / DAY
}

#[test]
fn a_renewed_certificate_is_served_without_a_restart() {
    if !have(&["openssl", "curl"]) {
        return;
    }
    let files = Files::new();
    files.renew(2);
    let daemon = Daemon::configured(&files.settings());
    let port = port(&daemon);
    let url = format!("https://localhost:{port}/metrics");
    let page = || {
        let got = curl(&files.path("certificate.pem"), &url);
        let page = String::from_utf8(got.stdout).unwrap();
        got.status.success().then_some(page).ok_or(got.stderr)
    };
    let left = days_left(&page().unwrap());
    assert!((1.9..=2.0).contains(&left), "{left} days");
    let first = files.path("first.pem");
    std::fs::copy(files.path("certificate.pem"), &first).unwrap();
    // Who speaks no TLS gets nothing, and keeps nobody from being served.
    let plain = curl(&first, &format!("http://localhost:{port}/metrics"));
    assert!(!plain.status.success() && plain.stdout.is_empty(), "{plain:?}");
    let silent = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    assert!(page().is_ok(), "a client that says nothing keeps others waiting");
    drop(silent);

    files.renew(30);
    until("the new certificate is served", || page().is_ok());
    let left = days_left(&page().unwrap());
    assert!((29.9..=30.0).contains(&left), "{left} days");
    assert_eq!(curl(&first, &url).status.code(), Some(60), "the old one is served as well");

    // What is wrong is not taken, and said once.
    let good = files.path("good.pem");
    std::fs::copy(files.path("certificate.pem"), &good).unwrap();
    std::fs::copy(&first, files.path("certificate.pem")).unwrap();
    until("it is refused", || daemon.log().contains("the changed certificate is not taken"));
    assert!(curl(&good, &url).status.success(), "the one before goes on");
    std::fs::copy(&good, files.path("certificate.pem")).unwrap();
    until("it is served again", || daemon.log().matches("serving the renewed").count() > 1);
    assert_eq!(daemon.log().matches("is not taken").count(), 1, "it is said once");
}

#[test]
fn a_certificate_that_cannot_be_served_keeps_the_daemon_from_starting() {
    if !have(&["openssl"]) {
        return;
    }
    let files = Files::new();
    files.renew(2);
    let ends_with = |why: &str| {
        let settings = files.path("byokd.toml");
        let place = files.0.path().display();
        let more = format!(
            "control_socket = \"{place}/c.sock\"\nnbd_dir = \"{place}/nbd\"\n\
             volumes_dir = \"{place}/volumes.d\"\n{}[audit]\ndirectory = \"{place}/audit\"\n",
            files.settings()
        );
        std::fs::write(&settings, more).unwrap();
        let mut byokd = Command::new(env!("CARGO_BIN_EXE_byokd"));
        let mut byokd = crate::support::Running(
            byokd.arg("--config").arg(&settings).stderr(Stdio::piped()).spawn().unwrap(),
        );
        let status = byokd.ends("byokd gives up");
        let mut said = String::new();
        let mut words = byokd.0.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut words, &mut said).unwrap();
        assert!(!status.success() && said.contains(why), "{status}: {said}");
        assert!(said.contains("do:  Mend [http]"), "{said}");
    };
    files.set_mode("key.pem", 0o644);
    ends_with("everybody can read it");
    files.set_mode("key.pem", 0o600);
    files.write("certificate.pem", "no certificate\n");
    ends_with("certificate.pem");
    files.renew(2);
    std::fs::copy(files.path("key.pem"), files.path("old-key.pem")).unwrap();
    files.renew(2);
    std::fs::rename(files.path("old-key.pem"), files.path("key.pem")).unwrap();
    ends_with("cannot be used");
}
