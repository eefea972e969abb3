//! What is told to those who watch: metrics and health. From memory alone: neither KMS nor a disk
//! can keep a watcher waiting.

use std::sync::LazyLock;
use std::time::Instant;

use jiff::Timestamp;

use crate::audit::AuditStatus;
use crate::clock::now;
use crate::config::AttachWhen;
use crate::control::VolumeState;
use crate::daemon::status::state;
use crate::daemon::{Attached, Daemon, Now, Service};
use crate::key::lease::{LeaseWord, Verdict};
use crate::metrics::Page;
use crate::metrics::counters::VolumeCounters;
use crate::metrics::table;
use crate::units::word;

static VOLUME_STATES: LazyLock<[String; 6]> = LazyLock::new(|| VolumeState::ALL.map(word));
static VERDICTS: LazyLock<[String; 5]> = LazyLock::new(|| Verdict::ALL.map(word));
static LEASE_STATES: LazyLock<[String; 7]> = LazyLock::new(|| LeaseWord::ALL.map(word));

impl Daemon {
    /// What Prometheus is told.
    #[must_use]
    pub fn metrics(&self, certificate_expires: u64) -> String {
        let mut page = Page::default();
        page.put(&table::BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
        let hash = self.setup.file.as_ref().map_or(0, |(_, hash)| hash.number());
        page.count(&table::CONFIG_HASH, &[], hash);
        page.count(&table::CERTIFICATE_EXPIRY, &[], certificate_expires);
        page.put(&table::READY, &[], f64::from(u8::from(self.not_ready().is_empty())));
        for (operation, outcomes, times) in self.setup.kms.calls.each() {
            for (outcome, count) in outcomes.read() {
                page.count(&table::KMS_REQUESTS, &[operation, outcome], count);
            }
            page.durations(&table::KMS_DURATION, &[operation], &times.read());
        }
        page.put(&table::KMS_PROBE_RATE, &[], self.groups.probes_per_second());
        let most = u64::from(self.setup.plan.most_per_second);
        page.count(&table::KMS_PROBE_LIMIT, &[], most);
        let (used, limit) = self.table.request_memory();
        page.count(&table::REQUEST_MEMORY, &[], used as u64);
        page.count(&table::REQUEST_MEMORY_LIMIT, &[], limit as u64);
        audit(&mut page, &self.audit.status());
        let all = self.volumes().clone();
        for (name, volume) in &all {
            happened(&mut page, name, &volume.counters);
            volume.with(|now| known(&mut page, name, now));
        }
        page.text()
    }

    /// What keeps the daemon from being ready: volumes that are to be attached and were not tried.
    #[must_use]
    pub fn not_ready(&self) -> Vec<String> {
        if !*self.resumed.borrow() {
            return vec!["kernel devices are being looked for".to_owned()];
        }
        let all = self.volumes().clone();
        all.into_iter()
            .filter(|(_, volume)| volume.with(|now| now.awaited))
            .map(|(name, _)| format!("volume {name} was not tried yet"))
            .collect()
    }

    /// What shows that the daemon does not do its work any more: parts of it that stand still.
    #[must_use]
    pub fn not_alive(&self) -> Vec<String> {
        let overdue = self.progress.overdue(Instant::now());
        overdue.into_iter().map(|part| format!("{part} stands still")).collect()
    }
}

fn audit(page: &mut Page, status: &AuditStatus) {
    page.count(&table::AUDIT_HEAD, &[], status.head.seq);
    page.count(&table::AUDIT_WRITTEN, &[], status.written.seq);
    page.put(&table::AUDIT_FAILING, &[], f64::from(u8::from(status.failing.is_some())));
    page.count(&table::AUDIT_FAILURES, &[], status.failures);
    page.put(&table::AUDIT_CHANGED, &[], f64::from(u8::from(status.changed.is_some())));
    page.count(&table::AUDIT_LOST, &[], status.lost);
}

fn happened(page: &mut Page, name: &str, counters: &VolumeCounters) {
    for (outcome, count) in counters.attaches.read() {
        page.count(&table::VOLUME_ATTACHES, &[name, outcome], count);
    }
    for (reason, count) in counters.fences.read() {
        page.count(&table::VOLUME_FENCES, &[name, reason], count);
    }
    for (outcome, count) in counters.restores.read() {
        page.count(&table::VOLUME_RESTORES, &[name, outcome], count);
    }
    for (outcome, count) in counters.probes.read() {
        page.count(&table::KEY_PROBES, &[name, outcome], count);
    }
    page.put(&table::KEY_OUTAGE, &[name], counters.outage().as_secs_f64());
    page.durations(&table::KEY_DENIAL_TO_FENCE, &[name], &counters.denial_to_fence.read());
    page.count(&table::KEY_LATE_FENCES, &[name], counters.late_fences());
}

fn known(page: &mut Page, name: &str, now: &mut Now) {
    let wanted = now.config.attach == AttachWhen::Auto;
    page.put(&table::VOLUME_WANTED, &[name], f64::from(u8::from(wanted)));
    if let Service::Attached(attached) = &now.service {
        in_service(page, name, attached);
    }
    let state = word(state(&now.service));
    page.states(&table::VOLUME_STATE, &[name], &*VOLUME_STATES, &state);
}

fn in_service(page: &mut Page, name: &str, attached: &Attached) {
    let export = &attached.export;
    let header = export.volume().header();
    let wrapped = &header.token().wrapped;
    let purpose = wrapped.context.purpose().map_or("", |purpose| purpose.as_str());
    page.put(&table::VOLUME_INFO, &[name, purpose, wrapped.key_arn.as_str()], 1.0);
    page.count(&table::VOLUME_SIZE, &[name], export.geometry().capacity());
    page.count(&table::VOLUME_CONNECTIONS, &[name], export.connections() as u64);
    page.count(&table::HEADER_SEQID, &[name], header.seqid());
    let degraded = export.volume().recovery().is_some();
    page.put(&table::HEADER_DEGRADED, &[name], f64::from(u8::from(degraded)));
    if let Ok(created) = header.token().created.parse::<Timestamp>() {
        let seconds = u64::try_from(created.as_second()).unwrap_or_default();
        page.count(&table::KEY_CREATED, &[name], seconds);
    }
    let io = export.io();
    for (operation, totals) in io.each() {
        let labels = [name, operation];
        page.count(&table::IO_OPERATIONS, &labels, totals.requests);
        page.count(&table::IO_BYTES, &labels, totals.bytes);
        page.count(&table::IO_FAILED, &labels, totals.failed);
        page.count(&table::IO_FAILED_BYTES, &labels, totals.failed_bytes);
        page.durations(&table::IO_DURATION, &labels, &totals.took());
    }
    page.count(&table::IO_IN_FLIGHT, &[name], export.in_flight());
    page.put(&table::CIPHER_SECONDS, &[name], io.cipher().as_secs_f64());
    page.count(&table::BACKING_ERRORS, &[name], export.backing_errors());
    page.count(&table::BACKING_STALLED, &[name], export.stalled() as u64);
    lease(page, name, attached);
}

fn lease(page: &mut Page, name: &str, attached: &Attached) {
    let (report, now) = (attached.keeper.report(), now());
    page.states(&table::KEY_LEASE_STATE, &[name], &*LEASE_STATES, &word(report.state));
    page.states(&table::KEY_LAST_PROBE, &[name], &*VERDICTS, &word(report.verdict));
    if let Some(left) = report.remaining(now) {
        page.put(&table::KEY_LEASE_REMAINING, &[name], left.as_secs_f64());
    }
    page.put(&table::KEY_VERIFIED_AGE, &[name], now.since(report.verified).as_secs_f64());
    page.put(&table::KEY_PROBE_AGE, &[name], now.since(report.heard).as_secs_f64());
    page.put(&table::KEY_PROBE_INTERVAL, &[name], report.interval.as_secs_f64());
    for (taken, within) in
        [("key", report.hears_within.key), ("volume", report.hears_within.volume)]
    {
        page.put(&table::KEY_HEARS_WITHIN, &[name, taken], within.as_secs_f64());
    }
}
