//! What a node does after a fence: dirty and cached plaintext of local mounts is not byokd's, but
//! somebody has to deal with it. An ordered list of programs, each with a time limit.
//!
//! The fence never waits for any of it. A restored volume ends what is left of the plan.

use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::audit::Audit;
use crate::audit::record::Event;
use crate::export::Export;
use crate::keeper::threads::apart;
use crate::key::lease::FenceReason;
use crate::units::word;

/// One program to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanStep {
    /// The program, by its absolute path, and its arguments.
    pub run: Vec<String>,
    /// When it is killed.
    pub timeout: Duration,
}

/// Runs the steps one after the other, whatever becomes of each. Dropped, it kills the program
/// that is running, and what that has started.
pub(super) async fn carry_out(
    steps: Vec<PlanStep>,
    facts: Vec<(&'static str, String)>,
    audit: Arc<Audit>,
    event: Event,
) {
    for PlanStep { run, timeout: limit } in steps {
        let Some((program, arguments)) = run.split_first() else { continue };
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(facts.iter().cloned()).env("PATH", PATH);
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        // Starting a program waits for the file system that it lies on, which may be the one that
        // hangs: not on a thread that keeps keys, nor on one that others need.
        let ends = async {
            let start = STARTING.acquire().await.map_err(io::Error::other)?;
            let runtime = Handle::current();
            let started = apart("on-fence", move || {
                let _until_it_runs = start;
                let _its_end_is_heard_there = runtime.enter();
                command.spawn().map(Running)
            });
            started.await??.0.wait().await
        };
        let ended = timeout(limit, ends).await;
        let how = match &ended {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => format!("cannot be run: {error}"),
            Err(_) => "killed, out of time".to_owned(),
        };
        audit.record(event.clone().detail("program", program).detail("ended", &how));
        match ended {
            Ok(Ok(status)) if status.success() => info!(program, "on_fence: done"),
            Ok(Ok(status)) => warn!(program, %status, "on_fence: failed"),
            Ok(Err(error)) => warn!(program, %error, "on_fence: cannot be run"),
            Err(_) => {
                warn!(program, seconds = limit.as_secs_f64(), "on_fence: killed, out of time")
            }
        }
    }
}

/// A program, and what it starts. Dropped before the program has ended, all of them are killed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Only until its end is known is the number its own.
        let id = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id
            && let Err(errno) = killpg(Pid::from_raw(id), Signal::SIGKILL)
        {
            warn!(%errno, "on_fence: a program cannot be killed");
        }
    }
}

/// Programs that are being started, at most: what hangs in that keeps its thread.
static STARTING: Semaphore = Semaphore::const_new(128);

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a program is told of the volume, in its environment.
pub(super) fn facts(export: &Export, reason: FenceReason) -> Vec<(&'static str, String)> {
    let header = export.volume().header();
    let wrapped = &header.token().wrapped;
    let purpose = wrapped.context.purpose().map(|p| p.to_string()).unwrap_or_default();
    let held = export.held_for().unwrap_or_default().as_secs();
    vec![
        ("BYOKD_VOLUME", export.name().to_owned()),
        ("BYOKD_UUID", header.uuid().to_string()),
        ("BYOKD_PURPOSE", purpose),
        ("BYOKD_KEY_ARN", wrapped.key_arn.to_string()),
        ("BYOKD_REASON", word(reason)),
        ("BYOKD_HELD_FOR", held.to_string()),
    ]
}
