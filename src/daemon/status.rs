//! What the daemon says of its volumes. Nothing here waits for KMS or holds a volume's lock while
//! a disk is read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::attachment::purge::Done;
use crate::attachment::{Attachment, Requests};
use crate::clock::now;
use crate::control::{
    ClientStatus, DeviceRequests, DeviceStatus, IoStatus, LeaseStatus, Problem, PurgeStatus,
    VolumeState, VolumeStatus,
};
use crate::daemon::look::look_at;
use crate::daemon::{Attached, Keyed, Now, Service, Volume};
use crate::export::Connected;
use crate::keeper::KeyReport;
use crate::key::lease::LeaseWord;
use crate::kms::trouble::{Trouble, trouble};
use crate::luks2::Header;
use crate::metrics::io::OperationTotals;
use crate::units::{SectorSize, millis, rfc3339, word};

/// How long headers are waited for: a disk that is busy gives one in that time.
const PATIENCE: Duration = Duration::from_secs(2);

/// Everything known of a volume.
pub(super) async fn status(name: &str, volume: &Arc<Volume>) -> VolumeStatus {
    let one = vec![(name.to_owned(), Arc::clone(volume))];
    match each(one).await.pop() {
        Some(status) => status,
        None => volume.with(|now| known(name, now)),
    }
}

/// Everything known of these, with headers as they are now; a store that hangs keeps nobody waiting.
pub(super) async fn each(volumes: Vec<(String, Arc<Volume>)>) -> Vec<VolumeStatus> {
    look_at(volumes, Duration::ZERO, PATIENCE).await
}

/// Whether its header is in memory.
pub(super) fn has_header(status: &VolumeStatus) -> bool {
    status.uuid.is_some()
}

/// What is in memory.
pub(super) fn known(name: &str, now: &Now) -> VolumeStatus {
    let mut status = VolumeStatus {
        name: name.to_owned(),
        state: state(&now.service),
        uuid: None,
        purpose: None,
        size: None,
        sector_size: None,
        backing: now.config.backing.clone(),
        key: None,
        context: None,
        header_seqid: None,
        header_note: None,
        read_only: now.config.read_only,
        uri: None,
        connections: 0,
        clients: Vec::new(),
        failed_requests: 0,
        device: now.device.as_ref().map(|attachment| device(name, attachment)),
        io: BTreeMap::new(),
        lease: None,
        problem: now.problem.clone(),
        at_next_attach: now.at_next_attach.iter().map(|key| (*key).to_owned()).collect(),
        headline: String::new(),
        trouble: None,
    };
    match &now.service {
        Service::Attached(attached) => in_service(&mut status, attached),
        Service::Attaching(Some(Keyed { export, .. }))
        | Service::Detaching(Keyed { export, .. }) => {
            describe_header(&mut status, &export.volume().header());
            status.header_note = export.volume().recovery();
            status.read_only = export.options().read_only;
        }
        Service::Attaching(None) | Service::Detached => {}
    }
    // While it is tried again it is still not served, and for the same reason.
    if let (VolumeState::Detached | VolumeState::Attaching, Some(problem)) =
        (status.state, &status.problem)
    {
        status.trouble = Some(not_attached(problem));
    }
    status.headline = headline(&status);
    status
}

/// Whether a volume is served, and if not, why.
pub(super) fn state(service: &Service) -> VolumeState {
    match service {
        Service::Detached => VolumeState::Detached,
        Service::Attaching(_) => VolumeState::Attaching,
        Service::Detaching(_) => VolumeState::Detaching,
        Service::Attached(attached) => state_by(&attached.keeper.report()),
    }
}

fn state_by(report: &KeyReport) -> VolumeState {
    match (report.serves, report.state) {
        (false, _) => VolumeState::Fenced,
        (true, LeaseWord::Unverified) => VolumeState::Unverified,
        (true, _) => VolumeState::Serving,
    }
}

/// How a volume is, in a few words.
fn headline(status: &VolumeStatus) -> String {
    if let Some(trouble) = &status.trouble {
        return trouble.cause.clone();
    }
    let words = match status.state {
        VolumeState::Detached => "not attached; byokd holds no key of it",
        VolumeState::Attaching => "KMS is being asked for its key",
        VolumeState::Detaching => "requests in flight end, then its key is destroyed in memory",
        VolumeState::Serving | VolumeState::Unverified => "served; KMS allows its key",
        // There is always trouble then.
        VolumeState::Fenced => "fenced",
    };
    words.to_owned()
}

fn not_attached(problem: &Problem) -> Trouble {
    Trouble {
        cause: "the volume could not be attached".to_owned(),
        evidence: format!("{} ({})", problem.why, problem.at),
        effect: "nobody can use the volume".to_owned(),
        remedy: problem.remedy.clone(),
    }
}

fn in_service(status: &mut VolumeStatus, attached: &Attached) {
    let report = attached.keeper.report();
    let unlocked = attached.export.volume();
    describe_header(status, &unlocked.header());
    status.header_note = unlocked.recovery();
    status.read_only = attached.export.options().read_only;
    status.clients = attached.export.connected().into_iter().map(client).collect();
    status.connections = status.clients.len();
    status.failed_requests = attached.export.failed();
    status.io = attached.export.io().each().map(|(name, of)| (name.to_owned(), io(of))).collect();
    let (name, socket) = (&status.name, attached.socket.display());
    status.uri = Some(format!("nbd+unix:///{name}?socket={socket}"));
    status.state = state_by(&report);
    status.trouble = trouble(&status.name, report.state, report.evidence.as_ref());
    status.lease = Some(lease(report, attached.export.held_for()));
}

fn io(of: &OperationTotals) -> IoStatus {
    IoStatus {
        requests: of.requests,
        bytes: of.bytes,
        failed: of.failed,
        failed_bytes: of.failed_bytes,
    }
}

fn device(name: &str, attachment: &Attachment) -> DeviceStatus {
    let index = attachment.device().index;
    let state = attachment.state();
    let link = format!("/dev/byokd/{name}");
    let own = format!("nbd{index}");
    let damaged: Vec<_> = state
        .damaged
        .iter()
        .filter_map(|damaged| damaged.split_once(' '))
        .map(|(part, point)| {
            let from = match part.strip_prefix(&own).map(|rest| rest.strip_prefix('p')) {
                Some(Some(part)) => format!("{link}-part{part}"),
                Some(None) => link.clone(),
                // What lies on the device, by its own name: LVM, dm-crypt.
                None => format!("/dev/{part}"),
            };
            (point.to_owned(), format!("umount {point} && mount {from} {point}"))
        })
        .collect();
    DeviceStatus {
        path: format!("/dev/{own}"),
        link,
        requests: match state.requests {
            Requests::Served => DeviceRequests::Served,
            Requests::Wait => DeviceRequests::Wait,
            Requests::Refused => DeviceRequests::Refused,
        },
        kernel_connections: state.connections,
        recover: damaged.iter().map(|(_, command)| command.clone()).collect(),
        damaged_mounts: damaged.into_iter().map(|(point, _)| point).collect(),
        purge: state
            .purge
            .into_iter()
            .map(|Done { step, at, ok, detail }| PurgeStatus {
                step,
                at,
                done: ok,
                details: detail,
            })
            .collect(),
    }
}

/// What the header says.
pub(super) fn describe_header(status: &mut VolumeStatus, header: &Header) {
    let token = header.token();
    let sector_size: SectorSize = header.segment().sector_size;
    status.uuid = Some(header.uuid());
    status.purpose = token.wrapped.context.purpose();
    status.size = Some(token.capacity);
    status.sector_size = Some(sector_size);
    status.key = Some(token.wrapped.key_arn.clone());
    status.context = Some(token.wrapped.context.clone());
    status.header_seqid = Some(header.seqid());
}

fn client(connected: Connected) -> ClientStatus {
    // The kernel's own client.
    if connected.pid == Some(0) {
        let (program, failed_requests) = (Some("kernel".to_owned()), connected.failed);
        return ClientStatus { pid: connected.pid, program, failed_requests };
    }
    let program =
        connected.pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok());
    ClientStatus {
        pid: connected.pid,
        program: program.map(|name| name.trim().to_owned()),
        failed_requests: connected.failed,
    }
}

fn lease(report: KeyReport, held_for: Option<Duration>) -> LeaseStatus {
    LeaseStatus {
        state: word(report.state),
        since: rfc3339(report.since),
        last_success: Some(rfc3339(report.last_success)),
        allowance_left: report.allowance_left(now()).map(|left| left.as_secs()),
        held_for: held_for.map(|left| left.as_secs()),
        verdict: report.verdict,
        fence_reason: report.fenced_for,
        fence_ms: report.fenced_after.map(millis),
        remaining: report.remaining(now()).map(|left| left.as_secs()),
        evidence: report.evidence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VolumeConfig;

    #[test]
    fn a_volume_that_is_tried_again_goes_on_saying_why_it_is_not_served() {
        let volume = Volume::new(VolumeConfig::new("/nowhere".into()));
        let told = || volume.with(|now| known("v", now));
        volume.with(|now| now.service = Service::Attaching(None));
        assert_eq!(told().trouble, None, "nothing is wrong at the first try");
        let problem = |at: &str| {
            let (at, why, remedy) = (at.to_owned(), "KMS said no".to_owned(), "ask".to_owned());
            Some(Problem { at, why, remedy })
        };
        volume.with(|now| now.problem = problem("t"));
        for service in [Service::Attaching(None), Service::Detached] {
            volume.with(|now| now.service = service);
            let trouble = told().trouble.unwrap();
            assert_eq!(
                (trouble.evidence.as_str(), trouble.remedy.as_str()),
                ("KMS said no (t)", "ask")
            );
            assert_eq!(told().headline, trouble.cause);
        }
    }
}
