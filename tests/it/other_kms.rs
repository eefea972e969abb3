//! The main job under key services that others wrote: local-kms and ministack speak AWS KMS's
//! protocol as their authors understand it.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aws_sdk_kms::Client;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::{Daemon, nbdsh, until};

const REGION: &str = "eu-central-1";

/// Where tests/install/kms.sh puts them.
fn tool(name: &str) -> Option<PathBuf> {
    let tools = std::env::var_os("BYOKD_TEST_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools"),
        PathBuf::from,
    );
    let tool = tools.join(name);
    if tool.exists() {
        return Some(tool);
    }
    let why = format!("needs {}; tests/run installs it", tool.display());
    assert!(std::env::var_os("CI").is_none(), "{why}");
    println!("skipped: {why}");
    None
}

/// A key service on loopback that ends with its owner.
struct OtherKms {
    child: Child,
    endpoint: String,
    runtime: Runtime,
    client: Client,
    _dir: TempDir,
}

impl Drop for OtherKms {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

impl OtherKms {
    fn start(program: &Path, settings: impl FnOnce(&mut Command, u16, &Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut command = Command::new(program);
        settings(&mut command, port, dir.path());
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        until("the key service listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let endpoint = format!("http://127.0.0.1:{port}");
        let config = aws_sdk_kms::Config::builder()
            .behavior_version(aws_config::BehaviorVersion::latest())
            .region(aws_config::Region::new(REGION))
            .endpoint_url(&endpoint)
            .credentials_provider(aws_sdk_kms::config::Credentials::new(
                "test", "test", None, None, "test",
            ))
            .build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { child, endpoint, runtime, client: Client::from_conf(config), _dir: dir }
    }

    fn create_key(&self) -> String {
        let made = self.runtime.block_on(self.client.create_key().send()).unwrap();
        made.key_metadata().unwrap().arn().unwrap().to_owned()
    }

    fn set_enabled(&self, key: &str, enabled: bool) {
        self.runtime.block_on(async {
            if enabled {
                self.client.enable_key().key_id(key).send().await.unwrap();
            } else {
                self.client.disable_key().key_id(key).send().await.unwrap();
            }
        });
    }

    fn daemon(&self) -> Daemon {
        Daemon::configured(&format!(
            "[kms]\nregion = \"{REGION}\"\nendpoint = \"{}\"\n[lease]\nprobe_interval = \"1s\"\n",
            self.endpoint
        ))
    }
}

fn the_key_rules_the_volume(kms: &OtherKms) {
    let daemon = kms.daemon();
    let key = kms.create_key();
    daemon.volume("v", "8M", &key);
    let read = "assert h.pread(12, 100) == b'acknowledged'";
    nbdsh(&daemon.uri("v"), &format!("h.pwrite(b'acknowledged', 100); h.flush(); {read}"));
    kms.set_enabled(&key, false);
    let disabled = Instant::now();
    until("the volume is fenced", || daemon.state("v") == "fenced");
    let took = disabled.elapsed();
    assert!(took < Duration::from_millis(3300), "within the interval and 2 s: {took:?}");
    let (code, answer) = daemon.ctl(&["key", "check", &key]);
    assert_eq!(code, 3, "{answer}");
    kms.set_enabled(&key, true);
    until("the volume is served again", || daemon.state("v") == "serving");
    nbdsh(&daemon.uri("v"), read);
    daemon.ok(&["detach", "v"]);
    kms.set_enabled(&key, false);
    assert_eq!(daemon.ctl(&["attach", "v"]).0, 3, "a disabled key attaches nothing");
    kms.set_enabled(&key, true);
    daemon.ok(&["attach", "v"]);
    nbdsh(&daemon.uri("v"), read);
}

fn a_volume_moves_to_another_key(kms: &OtherKms) {
    let daemon = kms.daemon();
    let key = kms.create_key();
    daemon.volume("v", "8M", &key);
    let read = "assert h.pread(12, 100) == b'acknowledged'";
    nbdsh(&daemon.uri("v"), &format!("h.pwrite(b'acknowledged', 100); h.flush(); {read}"));
    let other = kms.create_key();
    daemon.ok(&["key", "rewrap", "v", "--key", &other]);
    kms.set_enabled(&key, false);
    daemon.ok(&["key", "recheck", "v"]);
    daemon.ok(&["key", "recheck", "v"]);
    assert_eq!(daemon.state("v"), "serving", "the old key is not needed any more");
    kms.set_enabled(&other, false);
    until("the volume is fenced by its new key", || daemon.state("v") == "fenced");
    kms.set_enabled(&other, true);
    until("the volume is served under its new key", || daemon.state("v") == "serving");
    nbdsh(&daemon.uri("v"), read);
}

fn local_kms(program: &Path) -> OtherKms {
    OtherKms::start(program, |command, port, dir| {
        command
            .env("PORT", port.to_string())
            .env("KMS_DATA_PATH", dir)
            .env("KMS_REGION", REGION)
            .env("KMS_ACCOUNT_ID", "111122223333");
    })
}

#[test]
fn local_kms_rules_a_volume() {
    let Some(program) = tool("local-kms") else { return };
    the_key_rules_the_volume(&local_kms(&program));
}

// ministack has no ReEncrypt.
#[test]
fn local_kms_rewraps_a_volume() {
    let Some(program) = tool("local-kms") else { return };
    a_volume_moves_to_another_key(&local_kms(&program));
}

#[test]
fn ministack_rules_a_volume() {
    let Some(program) = tool("ministack/bin/ministack") else { return };
    the_key_rules_the_volume(&OtherKms::start(&program, |command, port, _| {
        command
            .env("GATEWAY_PORT", port.to_string())
            .env("BIND_HOST", "127.0.0.1")
            .env("IOT_MTLS_ENABLED", "0")
            .env("MINISTACK_REGION", REGION)
            .env("AUTH", "true");
    }));
}
