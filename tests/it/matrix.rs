//! What each answer of KMS leads to: the table of docs/REVOCATION.md, observed in a daemon that meets
//! all of it at once, on volumes with a key each.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use byokd::key::lease::Verdict;
use byokd::kms::dev::{Fault, FaultKind};
use jiff::Timestamp;
use serde_json::Value;
use tempfile::TempDir;

use crate::customer::Customer;
use crate::metrics::get;
use crate::support::{Daemon, PATIENCE, in_memory, run};

/// A fault, and what a probe that meets it has to say.
pub(crate) struct Row {
    /// In docs/REVOCATION.md.
    pub(crate) input: &'static str,
    pub(crate) fault: Fault,
    pub(crate) verdict: Verdict,
    pub(crate) code: &'static str,
}

fn row(input: &'static str, fault: Fault, verdict: Verdict, code: &'static str) -> Row {
    Row { input, fault, verdict, code }
}

pub(crate) fn matrix() -> Vec<Row> {
    use Verdict::{Allowed, Credentials, Denied, Mismatch, Unavailable};
    let html = |status| Fault { status: Some(status), ..Fault::new(FaultKind::Html) };
    let state = |word: &str| Fault {
        state: Some(serde_json::from_value(word.into()).unwrap()),
        ..Fault::new(FaultKind::KeyState)
    };
    let says = |code: &str| Fault::error(400, code, "");
    let invalid = |message| Fault::error(400, "KMSInvalidStateException", message).on(&["Decrypt"]);
    let stall = Duration::from_secs(30);
    vec![
        // The customer's will.
        row(
            "access denied by a policy",
            says("AccessDeniedException"),
            Denied,
            "AccessDeniedException",
        ),
        row("the key is disabled", says("DisabledException"), Denied, "DisabledException"),
        row("the key is gone", says("NotFoundException"), Denied, "NotFoundException"),
        row(
            "the grant is revoked",
            says("InvalidGrantTokenException"),
            Denied,
            "InvalidGrantTokenException",
        ),
        row(
            "the key waits for its deletion",
            state("PendingDeletion"),
            Denied,
            "KMSInvalidStateException",
        ),
        row(
            "its replica waits for deletion",
            state("PendingReplicaDeletion"),
            Denied,
            "KMSInvalidStateException",
        ),
        row("its material was deleted", state("PendingImport"), Denied, "KMSInvalidStateException"),
        row(
            "its key store is disconnected",
            state("Unavailable"),
            Denied,
            "KMSInvalidStateException",
        ),
        row(
            "the external key is disabled",
            invalid("The external key is not enabled"),
            Denied,
            "KMSInvalidStateException",
        ),
        row(
            "the external key is gone",
            invalid("KMS could not find the external key"),
            Denied,
            "KMSInvalidStateException",
        ),
        row(
            "the external key manager refuses",
            invalid("The external key store proxy denied access to the operation"),
            Denied,
            "KMSInvalidStateException",
        ),
        row(
            "denied and allowed by turns, while a change spreads through KMS",
            Fault::new(FaultKind::Alternate),
            Denied,
            "AccessDeniedException",
        ),
        // KMS's own trouble.
        row("throttled", Fault::new(FaultKind::Throttle), Unavailable, "ThrottlingException"),
        row(
            "throttled by the account's limit",
            says("RequestLimitExceeded"),
            Unavailable,
            "RequestLimitExceeded",
        ),
        row(
            "an internal error",
            Fault::error(500, "KMSInternalException", ""),
            Unavailable,
            "KMSInternalException",
        ),
        row(
            "a dependency's time-out",
            Fault::error(500, "DependencyTimeoutException", ""),
            Unavailable,
            "DependencyTimeoutException",
        ),
        row(
            "the key is not available for a moment",
            Fault::error(500, "KeyUnavailableException", ""),
            Unavailable,
            "KeyUnavailableException",
        ),
        row("503", Fault::error(503, "ServiceUnavailable", ""), Unavailable, "ServiceUnavailable"),
        row(
            "the external key store does not answer in time",
            invalid("The external key store proxy did not respond in time"),
            Unavailable,
            "KMSInvalidStateException",
        ),
        row(
            "the external key store is unhealthy",
            invalid("All external key managers are unhealthy"),
            Unavailable,
            "KMSInvalidStateException",
        ),
        row("the key is being made", state("Creating"), Unavailable, "KMSInvalidStateException"),
        row(
            "an error that nobody knows, with status 403",
            Fault::error(403, "BrandNewException", "?"),
            Unavailable,
            "BrandNewException",
        ),
        // Trouble on the way.
        row(
            "no answer for 30 s",
            Fault::new(FaultKind::Timeout).lasting(stall),
            Unavailable,
            "Timeout",
        ),
        row(
            "an answer after 30 s",
            Fault::new(FaultKind::Latency).lasting(stall),
            Unavailable,
            "Timeout",
        ),
        row("an answer that drips", Fault::new(FaultKind::Drip), Unavailable, "Timeout"),
        row("a reset instead of an answer", Fault::new(FaultKind::Reset), Unavailable, "Reset"),
        row(
            "a reset in the middle of an answer",
            Fault::new(FaultKind::ResetMidBody),
            Unavailable,
            "Reset",
        ),
        row("200 with garbage", Fault::new(FaultKind::Garbage), Unavailable, "GarbledAnswer"),
        row("200 with nothing", Fault::new(FaultKind::Empty200), Unavailable, "EmptyAnswer"),
        row("a page of HTML with status 403", html(403), Unavailable, "NoErrorCode"),
        row("a page of HTML with status 502", html(502), Unavailable, "NoErrorCode"),
        row("500 without an error code", Fault::new(FaultKind::Http), Unavailable, "NoErrorCode"),
        // Our own trouble.
        row(
            "our credentials have expired",
            says("ExpiredTokenException"),
            Credentials,
            "ExpiredTokenException",
        ),
        row(
            "our credentials are unknown",
            says("UnrecognizedClientException"),
            Credentials,
            "UnrecognizedClientException",
        ),
        row(
            "our signature is refused twice",
            says("InvalidSignatureException"),
            Credentials,
            "InvalidSignatureException",
        ),
        // A clock that is wrong is measured and made up for.
        row(
            "our clock is 15 minutes off",
            Fault { seconds: Some(900), ..Fault::new(FaultKind::ClockSkew) },
            Allowed,
            "",
        ),
        // An answer for another volume.
        row(
            "200 with another plaintext",
            Fault::new(FaultKind::WrongPlaintext),
            Mismatch,
            "OtherPlaintext",
        ),
        row("200 for another key", Fault::new(FaultKind::WrongKeyArn), Mismatch, "OtherKey"),
        row(
            "the blob is not the key's",
            says("InvalidCiphertextException"),
            Mismatch,
            "InvalidCiphertextException",
        ),
        row(
            "the blob is another key's",
            says("IncorrectKeyException"),
            Mismatch,
            "IncorrectKeyException",
        ),
        row(
            "the key is for something else",
            says("InvalidKeyUsageException"),
            Mismatch,
            "InvalidKeyUsageException",
        ),
    ]
}

/// The outage allowance: time for two probes that are not answered, several times over.
const ALLOWANCE: Duration = Duration::from_secs(15);

/// A daemon, and a volume with a key of its own for each row.
struct Stage {
    daemon: Daemon,
    socket: std::path::PathBuf,
    volumes: Vec<(Row, String)>,
    _place: TempDir,
}

/// What the first two probes of a volume met that met a fault.
struct Met {
    first: Value,
    states: [String; 2],
}

impl Stage {
    fn new(customer: &Customer, rows: Vec<Row>) -> Self {
        let place = in_memory();
        let socket = place.path().join("http.sock");
        // It probes when it is told to, and when it has to make certain.
        let lease =
            format!("probe_interval = \"1h\"\nfail_closed_after = \"{}s\"\n", ALLOWANCE.as_secs());
        let http = format!("[http]\nsocket = \"{}\"\n", socket.display());
        let daemon = Daemon::configured(&(http + &customer.settings("", &lease)));
        let volumes = rows.into_iter().enumerate().map(|(number, row)| {
            let (name, key) = (format!("v{number}"), customer.another_key().to_string());
            daemon.volume(&name, "1M", &key);
            (Row { fault: Fault { key: Some(key), ..row.fault }, ..row }, name)
        });
        let volumes = volumes.collect();
        Self { daemon, socket, volumes, _place: place }
    }

    fn recheck(&self, name: &str) -> Value {
        self.daemon.ok(&["key", "recheck", name])["volumes"][0]["lease"].take()
    }

    /// Every volume meets its fault.
    fn meet(&self, customer: &Customer) -> BTreeMap<&str, Met> {
        std::thread::scope(|scope| {
            let meet = |row: &Row, name: &str| {
                assert_eq!(self.recheck(name)["state"], "held", "before it");
                customer.kms.inject(row.fault.clone());
                let first = self.recheck(name);
                let second = self.recheck(name);
                let states = self.states(name);
                if second["state"] == "held" {
                    // And so it goes on.
                    (0..6).for_each(|_| drop(self.recheck(name)));
                }
                Met { first, states }
            };
            let meeting: Vec<_> = self
                .volumes
                .iter()
                .map(|(row, name)| (name.as_str(), scope.spawn(move || meet(row, name))))
                .collect();
            meeting.into_iter().map(|(name, met)| (name, met.join().unwrap())).collect()
        })
    }

    /// The states of the lease after the first and the second probe, as the trail has them.
    fn states(&self, name: &str) -> [String; 2] {
        let mut tail = Command::new(env!("CARGO_BIN_EXE_byokctl"));
        tail.arg("--socket").arg(self.daemon.socket()).arg("--json");
        let text = run(tail.args(["audit", "tail", "--last", "100", "--volume", name]));
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut to = records
            .filter(|record| record["event"] == "lease")
            .map(|record| record["to"].as_str().unwrap().to_owned());
        let first = to.next().unwrap_or_else(|| "held".to_owned());
        let second = to.next().unwrap_or_else(|| first.clone());
        [first, second]
    }

    /// The rows of the table, as they are so far.
    fn rows<'a>(&'a self, met: &'a BTreeMap<&str, Met>) -> Vec<(&'a str, String)> {
        let status = self.daemon.ok(&["status"]);
        let way = UnixStream::connect(&self.socket).unwrap();
        let (answered, page) = get(way, "/metrics", "Host: localhost\r\n");
        assert_eq!(answered, 200, "{page}");
        let log = self.daemon.log();
        let row = |(Row { input, .. }, name): &'a (Row, String)| {
            let Met { first, states } = &met[name.as_str()];
            let evidence = &first["evidence"];
            let (verdict, code) = match evidence["code"].as_str() {
                Some(code) => (evidence["verdict"].as_str().unwrap(), format!("`{code}`")),
                None => ("allowed", String::new()),
            };
            let volumes = status["volumes"].as_array().unwrap();
            let lease = &volumes.iter().find(|v| v["name"] == **name).unwrap()["lease"];
            let fenced = fenced(name, lease, &page);
            let alert = alert(name, &log);
            let [one, two] = states;
            let line =
                format!("| {input} | {code} | {verdict} | {one} | {two} | {fenced} | {alert} |");
            (*input, line)
        };
        self.volumes.iter().map(row).collect()
    }
}

/// When a volume was fenced, if it was.
fn fenced(name: &str, lease: &Value, page: &str) -> &'static str {
    let sample = |sample: String| page.lines().any(|line| line == sample);
    let by = |reason: &str| {
        sample(format!("byokd_volume_fences_total{{volume=\"{name}\",reason=\"{reason}\"}} 1"))
    };
    let since = |member: &str| lease[member].as_str().unwrap().parse::<Timestamp>().unwrap();
    if by("denied") && lease["fence_ms"].as_u64().is_some_and(|millis| millis < 2000) {
        "within the interval + 2 s"
    } else if by("expired")
        && since("since").duration_since(since("last_success")).unsigned_abs() >= ALLOWANCE
    {
        "when the allowance is over"
    } else if by("mismatch")
        && sample(format!("byokd_key_probes_total{{volume=\"{name}\",outcome=\"mismatch\"}} 6"))
    {
        "with the sixth such answer in a row"
    } else if lease["fence_ms"].is_null() {
        "never"
    } else {
        "late, or for no reason that is known"
    }
}

/// The alert that the log names for a volume.
fn alert(name: &str, log: &str) -> String {
    let of_volume = format!("volume=\"{name}\" ");
    let of_it = log.lines().filter(|line| line.contains(&of_volume));
    let mut told = of_it.filter_map(|line| line.split_once("alert=\"")?.1.split('"').next());
    let alert = told.next();
    alert.map(|alert| format!("`{alert}`")).unwrap_or_default()
}

/// The document's rows.
fn documented() -> Vec<&'static str> {
    let document = include_str!("../../docs/REVOCATION.md");
    let (_, table) = document.split_once("\n| what KMS does |").unwrap();
    table.lines().skip(2).take_while(|line| line.starts_with('|')).collect()
}

#[test]
fn the_table_of_what_each_answer_leads_to_is_what_a_daemon_does() {
    let customer = Customer::new();
    let order: Vec<_> = matrix().iter().map(|row| row.input).collect();
    // Whoever's clock is wrong for one key is wrong for all.
    let (skewed, others): (Vec<_>, Vec<_>) =
        matrix().into_iter().partition(|row| row.fault.fault == FaultKind::ClockSkew);
    let stages = [Stage::new(&customer, others), Stage::new(&customer, skewed)];
    let met: Vec<_> = stages.iter().map(|stage| stage.meet(&customer)).collect();
    let observed = || {
        let rows = stages.iter().zip(&met).flat_map(|(stage, met)| stage.rows(met));
        let mut rows: Vec<_> = rows.collect();
        rows.sort_by_key(|(input, _)| order.iter().position(|row| row == input));
        rows.into_iter().map(|(_, line)| line).collect::<Vec<_>>()
    };
    let documented = documented();
    let deadline = Instant::now() + ALLOWANCE + PATIENCE;
    let mut rows = observed();
    while rows != documented && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(200));
        rows = observed();
    }
    for row in documented.iter().filter(|row| !rows.iter().any(|line| line == **row)) {
        println!("docs/REVOCATION.md says what is not so: {row}");
    }
    assert!(rows == documented, "what is so:\n{}", rows.join("\n"));
}
