//! Every metric of ours. `docs/metrics.md` is made from this table, and a test compares them.

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It goes up and down.
    Gauge,
    /// It only goes up.
    Counter,
    /// Durations, counted by bounds.
    Histogram,
}

/// One metric.
#[derive(Debug)]
pub struct Described {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What it says.
    pub help: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
}

/// `docs/metrics.md`'s table.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from("| metric | kind | labels | meaning |\n|---|---|---|---|\n");
    for metric in ALL {
        let kind = match metric.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
        };
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let (name, help) = (metric.name, metric.help);
        text.push_str(&format!("| `{name}` | {kind} | {} | {help} |\n", labels.join(", ")));
    }
    text
}

/// Defines the metrics, and [`ALL`] in the order in which they stand here.
macro_rules! metrics {
    ($($NAME:ident = $kind:ident $name:literal $labels:tt $help:literal)*) => {
        $(
            #[doc = $help]
            pub static $NAME: Described =
                Described { name: $name, kind: Kind::$kind, help: $help, labels: &$labels };
        )*

        /// All of them, in the order of `docs/metrics.md`.
        pub static ALL: &[&Described] = &[$(&$NAME),*];
    };
}

metrics! {
    BUILD_INFO = Gauge "byokd_build_info" ["version"]
        "The program that runs; always 1."
    CONFIG_HASH = Gauge "byokd_config_hash" []
        "The first 12 hex digits of the SHA-256 of byokd.toml as it was read at the start, as a number; 0 without one."
    CERTIFICATE_EXPIRY = Gauge "byokd_http_certificate_expiry_timestamp_seconds" []
        "When the certificate ends that /metrics is served with; 0 without TLS."
    READY = Gauge "byokd_ready" []
        "Whether /readyz says that the daemon is ready."
    VOLUME_INFO = Gauge "byokd_volume_info" ["volume", "purpose", "key_arn"]
        "An attached volume: what it is for, and the KMS key that wraps its key; always 1."
    VOLUME_STATE = Gauge "byokd_volume_state" ["volume", "state"]
        "The state of a volume: 1 for the state it is in, 0 for the others."
    VOLUME_WANTED = Gauge "byokd_volume_wanted" ["volume"]
        "Whether the volume's definition says that it is to be attached by itself."
    VOLUME_SIZE = Gauge "byokd_volume_size_bytes" ["volume"]
        "Bytes that clients may use."
    VOLUME_CONNECTIONS = Gauge "byokd_volume_connections" ["volume"]
        "Clients connected."
    VOLUME_ATTACHES = Counter "byokd_volume_attaches_total" ["volume", "outcome"]
        "Attempts to attach the volume, by outcome."
    VOLUME_FENCES = Counter "byokd_volume_fences_total" ["volume", "reason"]
        "Times the volume was fenced, by reason."
    VOLUME_RESTORES = Counter "byokd_volume_restores_total" ["volume", "outcome"]
        "Times a fenced volume was to be served again, by outcome."
    HEADER_SEQID = Gauge "byokd_volume_header_seqid" ["volume"]
        "The header's sequence number, one higher after each change."
    HEADER_DEGRADED = Gauge "byokd_volume_header_degraded" ["volume"]
        "Whether one copy of the header was damaged when the volume was attached."
    KEY_CREATED = Gauge "byokd_volume_key_created_timestamp_seconds" ["volume"]
        "When the volume key was made."
    KEY_LEASE_STATE = Gauge "byokd_key_lease_state" ["volume", "state"]
        "The state of the lease on the volume's key: 1 for the state it is in, 0 for the others."
    KEY_LEASE_REMAINING = Gauge "byokd_key_lease_remaining_seconds" ["volume"]
        "Time until the volume is fenced if nothing more is heard of KMS; absent if that never happens, 0 while it is fenced."
    KEY_VERIFIED_AGE = Gauge "byokd_key_verified_age_seconds" ["volume"]
        "Time since KMS last allowed the key."
    KEY_OUTAGE = Counter "byokd_key_outage_seconds_total" ["volume"]
        "Time during which KMS gave no verdict on the key."
    KEY_PROBES = Counter "byokd_key_probes_total" ["volume", "outcome"]
        "Probes of the volume's key, by what the answer meant."
    KEY_LAST_PROBE = Gauge "byokd_key_last_probe_outcome" ["volume", "outcome"]
        "What the last answer meant, to a probe of the volume's key or to one of a volume under the same key: 1 for that, 0 for the others."
    KEY_PROBE_AGE = Gauge "byokd_key_probe_age_seconds" ["volume"]
        "Time since the last probe of the volume began, or what a volume under the same key heard."
    KEY_PROBE_INTERVAL = Gauge "byokd_key_probe_interval_seconds" ["volume"]
        "Time between two probes of the volume's key, give or take a tenth."
    KEY_HEARS_WITHIN = Gauge "byokd_key_denial_heard_within_seconds" ["volume", "taken"]
        "Time within which a denial is first heard, the node's pace included, by what is taken away: the key, or only this volume."
    KEY_DENIAL_TO_FENCE = Histogram "byokd_key_denial_to_fence_seconds" ["volume"]
        "Time from the first denied answer of KMS to the key's destruction."
    KEY_LATE_FENCES = Counter "byokd_key_late_fences_total" ["volume"]
        "Times the key was destroyed later than promised: the probe interval and 2 s after the first denied answer of KMS."
    KMS_REQUESTS = Counter "byokd_kms_requests_total" ["operation", "outcome"]
        "Requests to KMS, by operation and what the answer meant."
    KMS_DURATION = Histogram "byokd_kms_request_duration_seconds" ["operation"]
        "Time that KMS took to answer, or not to."
    KMS_PROBE_RATE = Gauge "byokd_kms_probes_per_second" []
        "Regular probes of the whole node in a second, as its volumes are now."
    KMS_PROBE_LIMIT = Gauge "byokd_kms_probes_per_second_limit" []
        "Probes that the node sends in a second at most."
    IO_OPERATIONS = Counter "byokd_io_operations_total" ["volume", "operation"]
        "Requests of clients since the volume was attached, by operation."
    IO_BYTES = Counter "byokd_io_bytes_total" ["volume", "operation"]
        "Bytes that clients asked to read, write, trim or zero since the volume was attached."
    IO_FAILED = Counter "byokd_io_failed_requests_total" ["volume", "operation"]
        "Requests that failed by a fence or by the backing store since the volume was attached."
    IO_FAILED_BYTES = Counter "byokd_io_failed_bytes_total" ["volume", "operation"]
        "Bytes that those were about; what was served is the difference to byokd_io_bytes_total."
    IO_DURATION = Histogram "byokd_io_request_duration_seconds" ["volume", "operation"]
        "Time from a request's arrival to its reply being sent, since the volume was attached."
    IO_IN_FLIGHT = Gauge "byokd_io_in_flight" ["volume"]
        "Requests that are not answered yet."
    CIPHER_SECONDS = Counter "byokd_cipher_seconds_total" ["volume"]
        "Time in the cipher since the volume was attached, estimated from every 16th call."
    BACKING_ERRORS = Counter "byokd_backing_errors_total" ["volume"]
        "Errors of the backing store that a client was told, since the volume was attached."
    BACKING_STALLED = Gauge "byokd_backing_stalled_operations" ["volume"]
        "Operations that were given up at a fence and that the backing store has not ended."
    REQUEST_MEMORY = Gauge "byokd_request_memory_bytes" []
        "Memory in use for requests in flight, of all connections."
    REQUEST_MEMORY_LIMIT = Gauge "byokd_request_memory_limit_bytes" []
        "Memory that requests in flight may use."
    AUDIT_HEAD = Gauge "byokd_audit_head_seq" []
        "Number of the last record of the audit trail."
    AUDIT_WRITTEN = Gauge "byokd_audit_written_seq" []
        "Number of the last record of the audit trail that is on stable storage."
    AUDIT_FAILING = Gauge "byokd_audit_failing" []
        "Whether the audit trail cannot be written."
    AUDIT_FAILURES = Counter "byokd_audit_write_failures_total" []
        "Failed tries to write the audit trail."
    AUDIT_CHANGED = Gauge "byokd_audit_changed" []
        "Whether something else changed the files of the audit trail since byokd started."
    AUDIT_LOST = Counter "byokd_audit_lost_events_total" []
        "Events that the audit trail could not record."
}
