//! A daemon of a test's own, and the tools that look at it. Everything ends with its owner, also
//! when a test fails.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;
use tempfile::TempDir;

/// How long anything that should happen may take before the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon in a directory of its own.
pub(crate) struct Daemon {
    pub(crate) dir: TempDir,
    child: Child,
    mode: Mode,
    env: Vec<(String, String)>,
}

/// How it is run.
#[derive(Clone, Copy)]
enum Mode {
    /// `byokd --dev`.
    Dev,
    /// With `byokd.toml` in its directory.
    Configured,
    /// As [`Mode::Dev`], at every level, where standard error leads to a journal whose socket is in
    /// its directory.
    Journaled,
}

/// Puts directory `$0` where journald has its socket, and says what systemd says.
pub(crate) const JOURNALED: &str = "mount -t tmpfs none /run; mkdir /run/systemd; ln -s \"$0\" /run/systemd/journal; \
    export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec \"$@\"";

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

impl Daemon {
    /// In memory: fast, and no test fills a disk.
    pub(crate) fn start() -> Self {
        Self::start_in(in_memory())
    }

    /// On the disk that holds the target directory: `O_DIRECT` and the ring.
    pub(crate) fn start_on_disk() -> Self {
        Self::start_in(on_disk())
    }

    pub(crate) fn start_in(dir: TempDir) -> Self {
        Self::start_with(dir, Vec::new())
    }

    /// With more in its environment.
    pub(crate) fn start_with(dir: TempDir, env: Vec<(String, String)>) -> Self {
        Self::run(dir, Mode::Dev, env)
    }

    /// With a journal: `dir` has a `socket`.
    pub(crate) fn journaled(dir: TempDir) -> Self {
        Self::run(dir, Mode::Journaled, Vec::new())
    }

    /// As in production, in memory, with these settings besides where things go.
    pub(crate) fn configured(settings: &str) -> Self {
        Self::configured_with(settings, Vec::new())
    }

    /// The same with more in its environment.
    pub(crate) fn configured_with(settings: &str, env: Vec<(String, String)>) -> Self {
        Self::configured_in(in_memory(), settings, env)
    }

    /// The same in that directory.
    pub(crate) fn configured_in(dir: TempDir, settings: &str, env: Vec<(String, String)>) -> Self {
        let place = dir.path().display();
        let audit = if settings.contains("[audit]") {
            String::new()
        } else {
            format!("[audit]\ndirectory = \"{place}/audit\"\n")
        };
        let text = format!(
            "volumes_dir = \"{place}/volumes.d\"\ncontrol_socket = \"{place}/byokd.sock\"\n\
             nbd_dir = \"{place}/nbd\"\n{settings}\n{audit}"
        );
        std::fs::write(dir.path().join("byokd.toml"), text).expect("settings are written");
        Self::run(dir, Mode::Configured, env)
    }

    fn run(dir: TempDir, mode: Mode, env: Vec<(String, String)>) -> Self {
        let child = spawn(dir.path(), mode, &env);
        let mut daemon = Self { dir, child, mode, env };
        daemon.wait_ready();
        daemon
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_ready(&mut self) {
        let socket = self.socket();
        until("the daemon listens", || {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                panic!("the daemon ended with {status}: {}", self.log());
            }
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
    }

    /// Ends it as a crash would, and starts it again on the same directory.
    pub(crate) fn crash_and_restart(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
        self.child = spawn(self.dir.path(), self.mode, &self.env);
        self.wait_ready();
    }

    /// Asks it to stop, and says how it ended.
    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().expect("kill").success());
        until("the daemon stops", || self.child.try_wait().expect("our own child").is_some());
        self.child.wait().expect("our own child")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("byokd.sock")
    }

    pub(crate) fn log(&self) -> String {
        let path = self.dir.path().join("log");
        // A test may have put a pipe there.
        let is_file = path.is_file();
        if is_file { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() }
    }

    /// Waits until the log has these words: a thread of the daemon writes it.
    pub(crate) fn says(&self, words: &str) {
        until(&format!("the log has `{words}`"), || self.log().contains(words));
    }

    pub(crate) fn backing(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.img"))
    }

    /// The NBD URI of an attached volume.
    pub(crate) fn uri(&self, name: &str) -> String {
        let socket = self.dir.path().join("nbd").join(format!("{name}.sock"));
        format!("nbd+unix:///{name}?socket={}", socket.display())
    }

    /// Runs byokctl: its exit code and its JSON answer.
    pub(crate) fn ctl(&self, args: &[&str]) -> (i32, Value) {
        let output = Command::new(env!("CARGO_BIN_EXE_byokctl"))
            .arg("--socket")
            .arg(self.socket())
            .arg("--json")
            .args(args)
            .env("BYOKD_STATE_DIR", self.dir.path())
            .output()
            .expect("byokctl runs");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let value = serde_json::from_str(text.trim()).unwrap_or(Value::Null);
        (output.status.code().expect("an exit code"), value)
    }

    /// Runs byokctl, which has to succeed.
    pub(crate) fn ok(&self, args: &[&str]) -> Value {
        let (code, answer) = self.ctl(args);
        assert_eq!(code, 0, "byokctl {args:?}: {answer}\n{}", self.log());
        answer
    }

    /// A new key's ARN.
    pub(crate) fn key(&self) -> String {
        let answer = self.ok(&["dev", "key", "create"]);
        answer["key_arn"].as_str().expect("an ARN").to_owned()
    }

    /// A new volume, attached.
    pub(crate) fn volume(&self, name: &str, size: &str, key: &str) {
        self.create(name, size, key);
        self.ok(&["attach", name]);
    }

    /// Adds to the definition of a volume that is not attached.
    pub(crate) fn define(&self, name: &str, more: &str) {
        let path = self.dir.path().join("volumes.d").join(format!("{name}.toml"));
        let text = std::fs::read_to_string(&path).expect("its definition");
        let kept = text.lines().filter(|line| {
            let key = line.split(" = ").next().unwrap_or_default();
            !more.lines().any(|new| new.split(" = ").next() == Some(key) && !key.is_empty())
        });
        let text = kept.chain(more.lines()).map(|line| format!("{line}\n")).collect::<String>();
        std::fs::write(&path, text).expect("it is written");
    }

    pub(crate) fn create(&self, name: &str, size: &str, key: &str) {
        let (code, answer) = self.try_create(name, &self.backing(name), size, key, "zeebe");
        assert_eq!(code, 0, "create {name}: {answer}");
    }

    /// Makes a volume as it is told to; the exit code and the answer.
    pub(crate) fn try_create(
        &self,
        name: &str,
        backing: &Path,
        size: &str,
        key: &str,
        purpose: &str,
    ) -> (i32, Value) {
        let backing = backing.to_str().expect("UTF-8");
        let where_to = ["volume", "create", name, "--backing", backing];
        self.ctl(&[&where_to[..], &["--size", size, "--key", key, "--purpose", purpose]].concat())
    }

    /// All that is said of a volume.
    pub(crate) fn status(&self, name: &str) -> Value {
        self.ok(&["status", name])["volumes"][0].take()
    }

    /// The word for a volume's state.
    pub(crate) fn state(&self, name: &str) -> String {
        self.status(name)["state"].as_str().expect("a state").to_owned()
    }
}

/// A process that ends with its owner.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// Waits for its end; fails the test when it hangs.
    pub(crate) fn ends(&mut self, what: &str) -> std::process::ExitStatus {
        until(what, || self.0.try_wait().expect("our own child").is_some());
        self.0.wait().expect("our own child")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.0.kill();
        let _ended = self.0.wait();
    }
}

fn spawn(dir: &Path, mode: Mode, env: &[(String, String)]) -> Child {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))
        .expect("a log file");
    let byokd = env!("CARGO_BIN_EXE_byokd");
    let mut command = match mode {
        Mode::Dev | Mode::Configured => Command::new(byokd),
        Mode::Journaled => {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-euc", JOURNALED]).arg(dir).arg(byokd);
            command.env("BYOKD_LOG", "trace");
            command
        }
    };
    match mode {
        Mode::Dev | Mode::Journaled => {
            command.args(["--dev", "--probe-interval", "1s", "--state-dir"]).arg(dir)
        }
        Mode::Configured => command
            .arg("--config")
            .arg(dir.join("byokd.toml"))
            // Whatever is never to be said must not be said at any level.
            .env("BYOKD_LOG", "trace")
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test"),
    };
    command.envs(env.iter().cloned());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("byokd starts")
}

/// A directory in memory, where stores answer at once.
pub(crate) fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory in memory")
}

/// A directory on the disk that holds the target directory.
pub(crate) fn on_disk() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory on disk")
}

/// Waits until something is so; fails the test when it is not in time.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited {} s in vain: {what}", PATIENCE.as_secs());
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Whether the tools are there. Where they are not, a test is skipped on a person's machine, and
/// fails in CI.
pub(crate) fn have(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|tool| find(tool).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    let why = format!("needs {missing:?}; tests/run installs them");
    assert!(std::env::var_os("CI").is_none(), "{why}");
    println!("skipped: {why}");
    false
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut places: Vec<_> = std::env::split_paths(&path).collect();
    places.push("/usr/sbin".into());
    places.into_iter().map(|place| place.join(tool)).find(|file| file.exists())
}

/// Runs a tool, which has to succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a tool.
pub(crate) fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// nbdsh, by the Python that Debian's bindings belong to.
pub(crate) fn python_nbd() -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-m", "nbd"]);
    command
}

/// Runs nbdsh with a script on a connected handle `h`.
pub(crate) fn nbdsh(uri: &str, script: &str) -> String {
    run(python_nbd().args(["-u", uri, "-c", script]))
}

/// Runs nbdsh with a script that connects its handle `h` itself.
pub(crate) fn nbdsh_unconnected(script: &str) -> String {
    run(python_nbd().args(["-c", script]))
}

/// The volume key in a token, in JSON.
pub(crate) fn unwrap_token(daemon: &Daemon, token: &str) -> Vec<u8> {
    unwrap_blob(daemon, &serde_json::from_str(token).unwrap(), "ciphertext_blob")
}

/// The plaintext of a token's blob, by AWS's own wire protocol.
pub(crate) fn unwrap_blob(daemon: &Daemon, token: &Value, blob: &str) -> Vec<u8> {
    let endpoint = std::fs::read_to_string(daemon.dir.path().join("kms-endpoint")).unwrap();
    let blob = token[blob].as_str().unwrap();
    let context: std::collections::HashMap<String, String> =
        serde_json::from_value(token["encryption_context"].clone()).unwrap();
    let config = aws_sdk_kms::Config::builder()
        .behavior_version(aws_config::BehaviorVersion::latest())
        .region(aws_config::Region::new("eu-central-1"))
        .endpoint_url(endpoint.trim())
        .credentials_provider(aws_sdk_kms::config::Credentials::new("a", "b", None, None, "test"))
        .build();
    let client = aws_sdk_kms::Client::from_conf(config);
    let decrypt = client
        .decrypt()
        .ciphertext_blob(aws_sdk_kms::primitives::Blob::new(BASE64_STANDARD.decode(blob).unwrap()))
        .set_encryption_context(Some(context));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(decrypt.send()).unwrap();
    answer.plaintext.unwrap().into_inner()
}
