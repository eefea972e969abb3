//! `byokctl demo`: everything byokd is for, in a temporary directory, in under a minute.

use std::fmt::Display;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tracing_subscriber::EnvFilter;

use crate::cli::dev_keys::DevKeys;
use crate::cli::nbd_client::NbdClient;
use crate::cli::output::Output;
use crate::control::client::Client;
use crate::control::{Answer, ControlError, Request, VolumeCreate};
use crate::daemon::{Setup, run as run_daemon};
use crate::exit::ExitCode;
use crate::harden::harden;
use crate::key::wrapped::{KeyArn, Purpose};
use crate::systemd::Systemd;
use crate::units::SectorSize;

/// What is written: easy to find in a file that is not encrypted.
const LINE: &str = "Camunda process data that nobody but its owner may read. ";
/// How much of it.
const WRITTEN: usize = 4 << 20;
/// The volume's size.
const SIZE: u64 = 64 << 20;
/// How long any step may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// `EPERM` on the wire.
const EPERM: u32 = 1;

fn failed(what: &str, why: impl Display) -> ControlError {
    ControlError {
        exit: ExitCode::Failed,
        what: what.to_owned(),
        why: why.to_string(),
        remedy: "See the words above; if byokd is at fault, report it with them.".to_owned(),
    }
}

/// A daemon of our own in a directory of its own; both go with it.
struct Trial {
    dir: PathBuf,
    daemon: Child,
}

impl Drop for Trial {
    fn drop(&mut self) {
        let pid = i32::try_from(self.daemon.id()).map(Pid::from_raw);
        // It may have ended already; then there is nothing to stop.
        let stopped = pid.is_ok_and(|pid| kill(pid, Signal::SIGTERM).is_ok());
        if !stopped || self.daemon.wait().is_err() {
            let _killed = self.daemon.kill();
        }
        let _removed = std::fs::remove_dir_all(&self.dir);
    }
}

impl Trial {
    fn start() -> Result<Self, ControlError> {
        let what = "start a daemon for the demonstration";
        let template = std::env::temp_dir().join("byokd-demo-XXXXXX");
        let dir = nix::unistd::mkdtemp(&template).map_err(|e| failed(what, e))?;
        let own = std::env::current_exe().map_err(|e| failed(what, e))?;
        let log = std::fs::File::create(dir.join("byokd.log")).map_err(|e| failed(what, e))?;
        let daemon = Command::new(own)
            .arg("serve-dev")
            .arg("--state-dir")
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C in the terminal is for us; we stop the daemon.
            .process_group(0)
            .spawn()
            .map_err(|e| failed(what, e))?;
        let mut trial = Self { dir, daemon };
        let socket = trial.socket();
        wait_for(what, || {
            if let Ok(Some(status)) = trial.daemon.try_wait() {
                let log = std::fs::read_to_string(trial.dir.join("byokd.log"));
                let why = format!("it ended with {status}: {}", log.unwrap_or_default());
                return Some(Err(failed(what, why)));
            }
            Client::connect(&socket).ok().map(|_| Ok(()))
        })??;
        Ok(trial)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("byokd.sock")
    }

    fn ask(&self, request: &Request) -> Result<Answer, ControlError> {
        Client::connect(&self.socket())?.ask(request)
    }
}

/// Asks again and again until there is an answer.
fn wait_for<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> Result<T, ControlError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = answer() {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            return Err(failed(what, format!("nothing happened for {} s", PATIENCE.as_secs())));
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn contains(path: &Path, needle: &[u8]) -> io::Result<bool> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes.windows(needle.len()).any(|window| window == needle))
}

/// The daemon of the demonstration, in this same program.
///
/// # Errors
/// It could not start.
pub fn serve(state_dir: &Path, probe_interval: Duration) -> Result<ExitCode, ControlError> {
    let what = "run the development daemon";
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new("info,aws=warn"))
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    harden().map_err(|e| failed(what, e))?;
    let dir = std::path::absolute(state_dir).map_err(|e| failed(what, e))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| failed(what, e))?;
    runtime
        .block_on(run_daemon(Setup::dev(&dir, probe_interval, 0), Systemd::default()))
        .map_err(|e| failed(what, e))?;
    Ok(ExitCode::Ok)
}

/// Shows it all.
///
/// # Errors
/// A step did not do what it should.
pub fn run(out: &Output) -> Result<ExitCode, ControlError> {
    out.line(
        "byokd in a minute: a volume under a customer's key, the key taken away, and given back.",
    );
    out.line("");
    let trial = Trial::start()?;
    out.line(&format!("1. A daemon with a development KMS runs in {}", trial.dir.display()));

    let keys = DevKeys::open(&trial.dir)?;
    let arn: KeyArn = keys.create()?.parse().map_err(|e| failed("make a key", e))?;
    out.line(&format!("2. The customer's key        {arn}"));

    let backing = trial.dir.join("volume.img");
    trial.ask(&Request::VolumeCreate(VolumeCreate {
        role: None,
        name: "demo".to_owned(),
        backing: backing.clone(),
        size: SIZE,
        key: arn.clone(),
        purpose: Purpose::Zeebe,
        context: [("cluster".to_owned(), "demo".to_owned())].into(),
        sector_size: SectorSize::B4096,
        force: false,
        preallocate: false,
    }))?;
    trial.ask(&Request::Attach {
        name: "demo".to_owned(),
        read_only: false,
        device: None,
        connections: None,
    })?;
    let socket = trial.dir.join("nbd/demo.sock");
    out.line(&format!("3. A LUKS2 volume of 64 MiB   {}", backing.display()));
    out.line(&format!("   served over NBD at         {}", socket.display()));

    let io = |what: &'static str| move |e: io::Error| failed(what, e);
    let refused = |what: &'static str| move |errno: u32| failed(what, format!("errno {errno}"));
    let text: Vec<u8> = LINE.bytes().cycle().take(WRITTEN).collect();
    let mut client = NbdClient::connect(&socket).map_err(io("connect to the volume"))?;
    let mut back = vec![0; WRITTEN];
    let started = Instant::now();
    client.write(0, &text).map_err(io("write"))?.map_err(refused("write"))?;
    client.flush().map_err(io("flush"))?.map_err(refused("flush"))?;
    client.read(0, &mut back).map_err(io("read"))?.map_err(refused("read"))?;
    if back != text {
        return Err(failed("read back what was written", "it differs"));
    }
    let millis = started.elapsed().as_millis();
    out.line(&format!("4. Wrote 4 MiB, flushed, read them back: the same, in {millis} ms"));
    if contains(&backing, LINE.as_bytes()).map_err(io("read the backing file"))? {
        return Err(failed("find no plaintext in the backing file", "it is there"));
    }
    out.line("   The backing file holds no word of it.");

    keys.set_enabled(&arn, false)?;
    let started = Instant::now();
    let errno = wait_for("see the volume fenced", || match client.read(0, &mut back) {
        Ok(Ok(())) => None,
        Ok(Err(errno)) => Some(Ok(errno)),
        Err(error) => Some(Err(failed("read", error))),
    })??;
    let seconds = started.elapsed().as_secs_f64();
    if errno != EPERM {
        return Err(failed("see the volume fenced", format!("errno {errno} instead of EPERM")));
    }
    out.line(&format!(
        "5. The customer disables the key: {seconds:.1} s later every read fails with EPERM,"
    ));
    out.line("   and the volume's key is destroyed in memory. The connection stays open.");

    keys.set_enabled(&arn, true)?;
    let started = Instant::now();
    wait_for("see the volume served again", || match client.read(0, &mut back) {
        Ok(Ok(())) => Some(Ok(())),
        Ok(Err(_)) => None,
        Err(error) => Some(Err(failed("read", error))),
    })??;
    if back != text {
        return Err(failed("read back what was written", "it differs after the key came back"));
    }
    let seconds = started.elapsed().as_secs_f64();
    out.line(&format!(
        "6. The customer enables the key: {seconds:.1} s later the data is back, the same bytes,"
    ));
    out.line("   on the same connection.");
    trial.ask(&Request::Detach { name: "demo".to_owned(), force: false })?;
    drop(trial);
    out.line("7. Detached, stopped, removed.");
    out.line("");
    out.line("The daemon asked KMS once a second here; in production the default is every 10 s.");
    Ok(ExitCode::Ok)
}
