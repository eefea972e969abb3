//! What the daemon records of itself and of those who ask it for something.

use std::sync::Arc;

use tracing::{error, info};

use crate::audit::record::{Event, Kind, Peer};
use crate::audit::{Audit, OnFailure};
use crate::config::{ConfigError, VolumeConfig};
use crate::control::{Answer, Problem, Request};
use crate::daemon::refusals::{Answered, by_panic, refused};
use crate::daemon::{Daemon, Setup};
use crate::exit::ExitCode;
use crate::keeper::threads::apart;
use crate::kms::CheckStep;
use crate::kms::aws::AwsKms;

/// A request that was recorded.
pub(super) struct Asked {
    seq: Option<u64>,
    request: String,
    volume: Option<String>,
}

/// The daemon starts, with these settings, and asks this KMS.
pub(super) fn start(
    audit: &Audit,
    setup: &Setup,
    kms: &AwsKms,
    volumes: &[(String, VolumeConfig)],
    skipped: &[ConfigError],
) {
    let pid = std::process::id().to_string();
    let whose = match kms.endpoint() {
        _ if setup.dev_state.is_some() => "development",
        Some(_) => "another endpoint",
        None => "AWS",
    };
    info!(kms = whose, region = kms.region(), endpoint = kms.endpoint(), "KMS is asked there");
    if kms.is_cleartext() {
        error!(
            endpoint = kms.endpoint(),
            "KMS is asked without TLS over a network: whoever is on the way can read the keys of \
             volumes and answer for the customer"
        );
    }
    let mut start = Event::new(Kind::DaemonStart)
        .detail("version", env!("CARGO_PKG_VERSION"))
        .detail("pid", &pid)
        .detail("kms", whose)
        .detail("region", kms.region());
    if let Some(endpoint) = kms.endpoint() {
        start = start.detail("endpoint", endpoint);
    }
    audit.record(audit.after(start));
    let mut load = Event::new(Kind::ConfigLoad).detail("volumes", &volumes.len().to_string());
    if let Some((file, hash)) = &setup.file {
        load = load.detail("file", &file.display().to_string()).detail("sha256", &hash.to_string());
    }
    audit.record(load);
    for error in skipped {
        let file = error.file.display().to_string();
        error!(file, line = error.line, why = error.what, "definition skipped: it cannot be read");
        let event = Event::new(Kind::ConfigLoad).detail("file", &file);
        audit.record(event.failed(ExitCode::Usage, &error.to_string()));
    }
}

/// How trying a key ended, as the command line says it too.
fn checked(event: Event, steps: &[CheckStep]) -> Event {
    let failed = steps.iter().find_map(|step| Some((step, step.verdict?)));
    match failed {
        Some((step, verdict)) => {
            event.failed(ExitCode::from(verdict), &format!("{}: {}", step.step, step.detail))
        }
        None => Event { exit: Some(ExitCode::Ok), ..event },
    }
}

impl Daemon {
    /// Records who asks for what, if it is more than a look. It waits for nothing: a suspension
    /// must not.
    pub(super) fn asked(&self, request: &Request, by: Peer) -> Option<Asked> {
        if request.only_looks() {
            return None;
        }
        let mut arguments = serde_json::to_value(request).ok()?;
        let members = arguments.as_object_mut()?;
        let request = members.remove("request")?.as_str()?.to_owned();
        // It is no secret, and nobody's business.
        if let Some(role) = members.get_mut("role").and_then(|role| role.as_object_mut()) {
            role.remove("external_id");
        }
        let name = |member: &str| members.get(member)?.as_str().map(str::to_owned);
        let volume = name("name").or_else(|| name("target"));
        let mut event = Event::new(Kind::Request).detail("arguments", &arguments.to_string());
        event.by = Some(by);
        event.request = Some(request.clone());
        event.volume.clone_from(&volume);
        Some(Asked { seq: self.audit.record(event), request, volume })
    }

    /// Records what became of it.
    pub(super) fn answered(&self, asked: Option<Asked>, answered: &Answered<Answer>) {
        let Some(asked) = asked else { return };
        let mut event = Event::new(Kind::Answer);
        event.of = asked.seq;
        event.request = Some(asked.request);
        event.volume = asked.volume;
        event = match answered {
            Ok(Answer::KeyCheck { steps }) => checked(event, steps),
            Ok(_) => Event { exit: Some(ExitCode::Ok), ..event },
            Err(error) => event.failed(error.exit, &error.why),
        };
        self.audit.record(event);
    }

    /// What is wrong with the trail.
    pub(super) fn audit_problems(&self) -> Vec<Problem> {
        let status = self.audit.status();
        let effect = match status.on_failure {
            OnFailure::RefuseAttach => "no volume is attached or made until it can be",
            OnFailure::Continue => "everything goes on, as configured",
        };
        let failing = status.failing.map(|failing| Problem {
            at: failing.since,
            why: format!("the audit trail cannot be written ({}): {effect}", failing.why),
            remedy: format!("Make room in {} or mend its disk.", status.directory.display()),
        });
        let changed = status.changed.map(|changed| Problem {
            at: changed.since,
            why: format!("something else changed the audit trail: {}", changed.why),
            remedy: "Run `byokctl audit verify`, and find out who can write there.".to_owned(),
        });
        failing.into_iter().chain(changed).collect()
    }

    /// What is wrong with the way to KMS.
    pub(super) fn kms_problem(&self) -> Option<Problem> {
        let endpoint = self.kms.endpoint().filter(|_| self.kms.is_cleartext())?;
        Some(Problem {
            at: self.started.clone(),
            why: format!(
                "KMS is asked without TLS over a network, at {endpoint}: whoever is on the way can \
                 read the keys of volumes and answer for the customer"
            ),
            remedy: "Give an https:// address as endpoint under [kms].".to_owned(),
        })
    }

    /// Records what is about to happen, before it does; refuses if that cannot be recorded and the
    /// settings say so.
    pub(super) async fn first_record(&self, what: &str, event: Event) -> Answered<()> {
        let audit = Arc::clone(&self.audit);
        let recorded = apart("audit-wait", move || audit.durable(event)).await;
        recorded.map_err(|e| by_panic(what, e))?.map_err(|e| {
            refused(
                ExitCode::Failed,
                what,
                e,
                "Make room or mend the disk, or set on_failure = \"continue\" under [audit].",
            )
        })
    }
}
