//! Every fault between byokd and KMS, through the real SDK: what it means, and that nothing but a
//! denial takes a volume away. The customer's side is played by the development KMS.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use aws_sdk_kms::types::{KeySpec, KeyUsageType};
use byokd::key::lease::{KeyLease, LeasePolicy, LeaseWord, Moment, Step, Verdict};
use byokd::key::wrapped::Canary;
use byokd::kms::aws::AwsKms;
use byokd::kms::dev::{DEV_REGION, Fault, FaultKind};
use serde_json::Value;

use crate::customer::Customer;
use crate::support::{Daemon, have, nbdsh, output, until};

/// A fault, and what a probe that meets it has to say.
struct Row {
    /// In docs/REVOCATION.md.
    input: &'static str,
    fault: Fault,
    verdict: Verdict,
    code: &'static str,
}

fn row(input: &'static str, fault: Fault, verdict: Verdict, code: &'static str) -> Row {
    Row { input, fault, verdict, code }
}

fn matrix() -> Vec<Row> {
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

/// A word as JSON and the documents have it.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).unwrap().as_str().unwrap().to_owned()
}

/// Every fault through the real SDK, twice, into a lease: what the document's table says.
#[test]
fn every_fault_has_its_verdict_and_ends_within_the_limit() {
    let customer = Customer::new();
    let client = customer.client_at(customer.kms.endpoint());
    let canary = customer.canary(&client);
    let document = include_str!("../../docs/REVOCATION.md");
    let (mut wrong, mut lines) = (Vec::new(), Vec::new());
    for Row { input, fault, verdict, code } in matrix() {
        customer.kms.inject(fault);
        let mut lease = KeyLease::new(LeasePolicy::default(), Moment(Duration::ZERO));
        let mut states = Vec::new();
        for turn in 1..=2 {
            let began = std::time::Instant::now();
            let said = customer.probe(&client, &canary);
            let took = began.elapsed();
            if turn == 1 && said != (verdict, code.to_owned()) || took > Duration::from_secs(2) {
                wrong.push(format!("{input}: {said:?} after {took:?}"));
            }
            let at = Moment(Duration::from_secs(10 * turn));
            lease.observe(at, said.0, at);
            states.push(word(lease.state().word()));
        }
        if verdict == Verdict::Mismatch {
            for turn in 3..=6 {
                let at = Moment(Duration::from_secs(20 + turn));
                lease.observe(at, verdict, at);
            }
            assert_eq!(lease.state().word(), LeaseWord::Revoked);
        }
        customer.kms.clear_faults();
        let after = customer.probe(&client, &canary);
        if after.0 != Verdict::Allowed {
            wrong.push(format!("after {input}: {after:?}"));
        }
        let fenced = match (verdict, states[1].as_str()) {
            (Verdict::Denied, "revoked") => "within the interval + 2 s",
            (Verdict::Mismatch, _) => "with the sixth such answer in a row",
            (Verdict::Unavailable | Verdict::Credentials, _) => "when the allowance is over",
            _ => "never",
        };
        let said = if code.is_empty() { String::new() } else { format!("`{code}`") };
        let alert = verdict.alert().map(|alert| format!("`{alert}`")).unwrap_or_default();
        let line = format!(
            "| {input} | {said} | {} | {} | {} | {fenced} | {alert} |",
            word(verdict),
            states[0],
            states[1]
        );
        if !document.contains(&line) {
            lines.push(line);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(lines.is_empty(), "docs/REVOCATION.md does not say:\n{}", lines.join("\n"));
}

#[test]
fn an_endpoint_that_is_no_kms_is_no_verdict() {
    let customer = Customer::new();
    let client = customer.client_at(customer.kms.endpoint());
    let canary = customer.canary(&client);
    let at = |endpoint: String| customer.probe(&customer.client_at(&endpoint), &canary);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(at(format!("http://{nobody}")), (Verdict::Unavailable, "Connect".to_owned()));
    let plain = customer.kms.address();
    assert_eq!(at(format!("https://{plain}")), (Verdict::Unavailable, "Tls".to_owned()));
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = mute.local_addr().unwrap();
    assert_eq!(at(format!("http://{mute}")).0, Verdict::Unavailable);
    let (verdict, code) = at("http://kms.invalid".to_owned());
    // A resolver that does not answer at all is a timeout.
    assert!(
        verdict == Verdict::Unavailable && ["Dns", "Timeout"].contains(&code.as_str()),
        "{code}"
    );
}

/// A way to KMS that damages what passes: each connection's answer is cut, delayed, has a byte
/// flipped, is replaced by an earlier one, or passes.
pub(crate) struct BadWay {
    address: std::net::SocketAddr,
    /// Of a thousand answers, so many are damaged.
    damaged: std::sync::Arc<std::sync::atomic::AtomicU32>,
}

impl BadWay {
    fn new(to: std::net::SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let damaged = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        let (share, mut state) = (std::sync::Arc::clone(&damaged), seed);
        // It ends with the test's process.
        std::thread::spawn(move || {
            let mut earlier = Vec::new();
            for client in listener.incoming() {
                let mut random = |below: u64| {
                    // Any generator does; this one is splitmix64.
                    state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mut mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                    (mixed ^ mixed >> 31) % below
                };
                let mut answer = Self::ask(to, client.as_ref().unwrap());
                let share = u64::from(share.load(std::sync::atomic::Ordering::Relaxed));
                let sent = answer.clone();
                if random(1000) < share && !answer.is_empty() {
                    match random(4) {
                        0 => answer.truncate(usize::try_from(random(answer.len() as u64)).unwrap()),
                        1 => std::thread::park_timeout(Duration::from_millis(random(300))),
                        2 => {
                            let at = usize::try_from(random(answer.len() as u64)).unwrap();
                            answer[at] ^= 1 << random(7);
                        }
                        _ => answer.clone_from(&earlier),
                    }
                }
                if random(3) == 0 {
                    earlier = sent;
                }
                // The client may have given up.
                let _sent = client.unwrap().write_all(&answer);
            }
        });
        Self { address, damaged }
    }

    /// The answer to the one request of a connection.
    pub(crate) fn ask(to: std::net::SocketAddr, mut client: &TcpStream) -> Vec<u8> {
        let mut server = TcpStream::connect(to).unwrap();
        let mut request = Vec::new();
        let mut part = [0; 4096];
        loop {
            let n = client.read(&mut part).unwrap_or(0);
            request.extend_from_slice(&part[..n]);
            let text = String::from_utf8_lossy(&request).to_lowercase();
            let head = text.find("\r\n\r\n").map(|at| at + 4);
            let body = text.split("content-length: ").nth(1).and_then(|rest| {
                rest.split("\r\n").next().and_then(|len| len.parse::<usize>().ok())
            });
            match (head, body) {
                (Some(head), Some(body)) if request.len() >= head + body => break,
                _ if n == 0 => return Vec::new(),
                _ => {}
            }
        }
        let close =
            String::from_utf8_lossy(&request).replacen("\r\n", "\r\nconnection: close\r\n", 1);
        server.write_all(close.as_bytes()).unwrap();
        let mut answer = Vec::new();
        server.read_to_end(&mut answer).unwrap();
        answer
    }

    fn damage(&self, of_a_thousand: u32) {
        self.damaged.store(of_a_thousand, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A lease, kept over a bad way: how many probes until it fences, if it does.
fn probes_to_fence(
    customer: &Customer,
    client: &AwsKms,
    canary: &Canary,
    most: u64,
) -> Option<u64> {
    let mut now = Duration::ZERO;
    let mut lease = KeyLease::new(LeasePolicy::default(), Moment(now));
    (1..=most).find(|_| {
        now += lease.next_probe().0;
        let (verdict, _) = customer.probe(client, canary);
        lease.observe(Moment(now), verdict, Moment(now)) != Step::None || !lease.state().serves()
    })
}

#[test]
fn a_bad_way_to_kms_neither_fences_nor_hides_a_denial() {
    let customer = Customer::new();
    let canary = customer.canary(&customer.client_at(customer.kms.endpoint()));
    for seed in 0..4 {
        let way = BadWay::new(customer.kms.address(), seed);
        let client = customer.client_at(&format!("http://{}", way.address));
        way.damage(500);
        assert_eq!(probes_to_fence(&customer, &client, &canary, 150), None, "seed {seed}");
        customer.set_enabled(false);
        let probes = probes_to_fence(&customer, &client, &canary, 100);
        assert!(probes.is_some_and(|probes| probes < 30), "seed {seed}: {probes:?}");
        customer.set_enabled(true);
    }
}

#[test]
fn an_answer_that_comes_a_second_time_proves_nothing() {
    let customer = Customer::new();
    let client = customer.client_at(customer.kms.endpoint());
    let canary = customer.canary(&client);
    let recorded = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = recorded.local_addr().unwrap();
    let to = customer.kms.address();
    std::thread::spawn(move || {
        let mut first: Option<Vec<u8>> = None;
        for client in recorded.incoming() {
            let mut client = client.unwrap();
            let answer = BadWay::ask(to, &client);
            // The client may have given up.
            let _sent = client.write_all(first.get_or_insert(answer));
        }
    });
    let client = customer.client_at(&format!("http://{address}"));
    assert_eq!(customer.probe(&client, &canary).0, Verdict::Allowed);
    customer.set_enabled(false);
    let again = customer.probe(&client, &canary);
    assert_eq!(again, (Verdict::Unavailable, "ReplayedAnswer".to_owned()));
}

/// What KMS said last, by its code.
fn evidence(daemon: &Daemon) -> String {
    daemon.status("v")["lease"]["evidence"]["code"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn trouble_that_is_no_denial_takes_no_volume_away() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.volume("v", "8M", customer.key.as_str());
    let uri = daemon.uri("v");
    for (fault, verdict, code) in [
        (Fault::new(FaultKind::Throttle), "unverified", "ThrottlingException"),
        (Fault::new(FaultKind::ResetMidBody), "unverified", "Reset"),
        (Fault::error(400, "ExpiredTokenException", "x"), "unverified", "ExpiredTokenException"),
        (Fault { status: Some(502), ..Fault::new(FaultKind::Html) }, "unverified", "NoErrorCode"),
    ] {
        let before = customer.kms.requests().len();
        customer.kms.inject(fault);
        until(code, || evidence(&daemon) == code && daemon.state("v") == verdict);
        until("three probes have failed", || customer.kms.requests().len() >= before + 3);
        nbdsh(&uri, "h.pwrite(b'x' * 4096, 0); h.flush(); assert h.pread(1, 0) == b'x'");
        customer.kms.clear_faults();
        until("a success ends it", || daemon.state("v") == "serving");
    }
    let lease = &daemon.status("v")["lease"];
    assert!(lease["fence_ms"].is_null(), "never fenced: {lease}");
}

#[test]
fn one_denial_that_is_not_confirmed_takes_no_volume_away() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.volume("v", "8M", customer.key.as_str());
    customer.kms.inject(Fault::error(400, "AccessDeniedException", "stale").times(1));
    until("the denial is heard", || evidence(&daemon) == "AccessDeniedException");
    let held = || {
        let lease = &daemon.status("v")["lease"];
        assert!(lease["fence_ms"].is_null(), "never fenced: {lease}");
        lease["state"] == "held"
    };
    until("the lease is held again", held);
    nbdsh(&daemon.uri("v"), "h.pwrite(b'x' * 4096, 0); h.flush()");
}

#[test]
fn a_kms_that_cannot_be_asked_attaches_nothing_and_says_so() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.create("v", "8M", customer.key.as_str());
    customer.kms.inject(Fault::new(FaultKind::Throttle));
    let (code, answer) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 4, "{answer}");
    assert!(answer["why"].as_str().unwrap().contains("ThrottlingException"), "{answer}");
    let (code, answer) = daemon.ctl(&["key", "check", customer.key.as_str()]);
    assert_eq!(code, 4, "{answer}");
    customer.kms.clear_faults();
    // Another plaintext of the right length: the digest in the header knows better.
    customer.kms.inject(Fault::new(FaultKind::WrongPlaintext).on(&["Decrypt"]));
    let (code, answer) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 1, "{answer}");
    assert!(answer["why"].as_str().unwrap().contains("not this volume's key"), "{answer}");
    customer.kms.clear_faults();
    daemon.ok(&["attach", "v"]);
}

/// The steps of a key check: each step's name and whether it worked.
fn steps(answer: &Value) -> Vec<(String, bool)> {
    let steps = answer["steps"].as_array().unwrap();
    steps.iter().map(|s| (s["step"].as_str().unwrap().to_owned(), s["ok"] == true)).collect()
}

#[test]
fn key_check_says_which_step_fails_and_what_to_do() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    let check = |arn: &str| daemon.ctl(&["key", "check", arn]);
    let key = customer.key.as_str();
    let (code, answer) = check(key);
    assert_eq!(code, 0, "{answer}");
    let names: Vec<_> = steps(&answer).into_iter().map(|(name, _)| name).collect();
    let all = ["region", "exists", "enabled", "symmetric", "generate", "decrypt", "context"];
    assert_eq!(names, all);
    let refused = |arn: &str, exit: i32, step: &str| {
        let (code, answer) = check(arn);
        assert_eq!(code, exit, "{answer}");
        let steps = steps(&answer);
        let (last, before) = steps.split_last().unwrap();
        assert_eq!(*last, (step.to_owned(), false), "{answer}");
        assert!(before.iter().all(|(_, ok)| *ok), "{answer}");
        let failed = answer["steps"].as_array().unwrap().last().unwrap();
        assert!(failed["remedy"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    };
    refused(&key.replace(DEV_REGION, "us-east-1"), 1, "region");
    let unknown = format!("{}{}", &key[..key.len() - 4], "0000");
    refused(&unknown, 3, "exists");
    let disable = customer.console.disable_key().key_id(key);
    customer.runtime.block_on(disable.send()).unwrap();
    refused(key, 3, "enabled");
    let enable = customer.console.enable_key().key_id(key);
    customer.runtime.block_on(enable.send()).unwrap();
    let signing = customer
        .console
        .create_key()
        .key_spec(KeySpec::Rsa2048)
        .key_usage(KeyUsageType::SignVerify);
    let signing = customer.runtime.block_on(signing.send()).unwrap();
    refused(signing.key_metadata().unwrap().arn().unwrap(), 1, "symmetric");
    customer
        .kms
        .inject(Fault::error(400, "AccessDeniedException", "not for you").on(&["GenerateDataKey"]));
    refused(key, 3, "generate");
    customer.kms.clear_faults();
    customer.kms.inject(Fault::error(400, "AccessDeniedException", "not you").on(&["Decrypt"]));
    refused(key, 3, "decrypt");
}

#[test]
fn the_policy_that_is_printed_is_enough_and_no_more() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    let key = customer.key.as_str();
    let printed = output(
        Command::new(env!("CARGO_BIN_EXE_byokctl"))
            .args(["key", "policy", key, "--purpose", "zeebe", "--principal"])
            .arg("arn:aws:iam::111122223333:role/storage"),
    );
    customer.put_policy(&String::from_utf8(printed.stdout).unwrap());
    daemon.ok(&["key", "check", key]);
    daemon.volume("v", "8M", key);
    let probes = customer.kms.requests().len();
    until("it was probed twice", || customer.kms.requests().len() >= probes + 2);
    assert_eq!(daemon.state("v"), "serving");
    let backing = daemon.backing("w");
    let backing = backing.to_str().unwrap();
    let (code, answer) = daemon.ctl(&[
        "volume",
        "create",
        "w",
        "--backing",
        backing,
        "--size",
        "8M",
        "--key",
        key,
        "--purpose",
        "backup",
    ]);
    assert_eq!(code, 3, "a purpose that the customer did not allow: {answer}");
    let encrypt =
        customer.console.encrypt().key_id(key).plaintext(aws_sdk_kms::primitives::Blob::new("x"));
    customer.runtime.block_on(encrypt.send()).unwrap_err();
}

#[test]
fn without_ca_certificates_the_daemon_says_so_at_its_start_and_needs_none_for_plain_http() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (bundle, none) = (dir.path().join("empty.pem"), dir.path().join("none"));
    std::fs::write(&bundle, "").unwrap();
    let missing = [("SSL_CERT_FILE", &bundle), ("SSL_CERT_DIR", &none)];
    let place = dir.path().display();
    let settings = dir.path().join("byokd.toml");
    let text = format!(
        "volumes_dir = \"{place}/volumes.d\"\ncontrol_socket = \"{place}/byokd.sock\"\n\
         nbd_dir = \"{place}/nbd\"\n[kms]\nregion = \"eu-central-1\"\n\
         [audit]\ndirectory = \"{place}/audit\"\n"
    );
    std::fs::write(&settings, text).unwrap();
    let mut byokd = Command::new(env!("CARGO_BIN_EXE_byokd"));
    let ended = output(byokd.arg("--config").arg(&settings).envs(missing));
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("no CA certificates"), "{said}");
    assert!(said.contains("Install the package ca-certificates"), "{said}");
    let env = missing.map(|(name, path)| (name.to_owned(), path.display().to_string()));
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start_with(elsewhere, env.to_vec());
    daemon.volume("v", "1M", &daemon.key());
    assert_eq!(daemon.state("v"), "serving", "{}", daemon.log());
}
