//! Every fault between byokd and KMS, through the real SDK: what it means, and that nothing but a
//! denial takes a volume away. The customer's side is played by the development KMS.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_sdk_kms::types::{KeySpec, KeyUsageType};
use byokd::key::lease::{Connection, KeyLease, LeasePolicy, Moment, Step, Verdict};
use byokd::key::wrapped::Canary;
use byokd::kms::aws::{AwsKms, AwsSettings};
use byokd::kms::dev::{DEV_REGION, Fault, FaultKind};
use byokd::kms::{KeyService as _, Observer, Operation};
use serde_json::Value;

use crate::customer::Customer;
use crate::matrix::{Row, matrix};
use crate::support::{Daemon, have, in_memory, nbdsh, output, until};

/// How long a probe may take here, and what a busy machine may add.
const LIMIT: Duration = Duration::from_millis(500 + 250);

/// Every fault through the real SDK.
#[test]
fn every_fault_has_its_verdict_and_ends_within_the_limit() {
    let customer = Customer::new();
    let client = customer.client_at(customer.kms.endpoint());
    let canary = customer.canary(&client);
    let mut wrong = Vec::new();
    for Row { input, fault, verdict, code } in matrix() {
        customer.kms.inject(fault);
        let began = std::time::Instant::now();
        let said = customer.probe(&client, &canary);
        let took = began.elapsed();
        if said != (verdict, code.to_owned()) || took > LIMIT {
            wrong.push(format!("{input}: {said:?} after {took:?}"));
        }
        customer.kms.clear_faults();
        let after = customer.probe(&client, &canary);
        if after.0 != Verdict::Allowed {
            wrong.push(format!("after {input}: {after:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
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
    damaged: Arc<std::sync::atomic::AtomicU32>,
}

impl BadWay {
    fn new(to: std::net::SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let damaged = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let (share, mut state) = (Arc::clone(&damaged), seed);
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
                let (_, mut answer) = Self::ask(to, client.as_ref().unwrap());
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

    /// The one request of a connection, and the answer to it.
    pub(crate) fn ask(to: std::net::SocketAddr, mut client: &TcpStream) -> (String, Vec<u8>) {
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
                _ if n == 0 => return (text, Vec::new()),
                _ => {}
            }
        }
        let close =
            String::from_utf8_lossy(&request).replacen("\r\n", "\r\nconnection: close\r\n", 1);
        server.write_all(close.as_bytes()).unwrap();
        let mut answer = Vec::new();
        server.read_to_end(&mut answer).unwrap();
        (close, answer)
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
            let (_, answer) = BadWay::ask(to, &client);
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

#[test]
fn a_key_state_that_comes_a_second_time_decides_nothing() {
    let customer = Customer::new();
    let canary = customer.canary(&customer.client_at(customer.kms.endpoint()));
    let recorded = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = recorded.local_addr().unwrap();
    let to = customer.kms.address();
    std::thread::spawn(move || {
        let mut state: Option<Vec<u8>> = None;
        for client in recorded.incoming() {
            let mut client = client.unwrap();
            let (request, answer) = BadWay::ask(to, &client);
            let describes = request.contains("DescribeKey");
            let answer = if describes { state.get_or_insert(answer) } else { &answer };
            // The client may have given up.
            let _sent = client.write_all(answer);
        }
    });
    let client = customer.client_at(&format!("http://{address}"));
    let pending = serde_json::from_value("PendingDeletion".into()).unwrap();
    customer.kms.inject(Fault { state: Some(pending), ..Fault::new(FaultKind::KeyState) });
    assert_eq!(customer.probe(&client, &canary).0, Verdict::Denied);
    customer.kms.clear_faults();
    let slow_store = "The external key store proxy did not respond in time";
    customer.kms.inject(Fault::error(400, "KMSInvalidStateException", slow_store).on(&["Decrypt"]));
    let again = customer.probe(&client, &canary);
    assert_eq!(again, (Verdict::Unavailable, "KMSInvalidStateException".to_owned()));
}

#[test]
fn a_probe_ends_within_its_limit_with_all_that_it_led_to_and_keeps_what_it_heard() {
    let customer = Customer::new();
    let client = customer.client_at(customer.kms.endpoint());
    let canary = customer.canary(&client);
    let late = Fault::new(FaultKind::Latency).lasting(Duration::from_millis(300)).on(&["Decrypt"]);
    let hangs = Fault::new(FaultKind::Timeout).lasting(Duration::from_secs(30));
    let invalid = |message| Fault::error(400, "KMSInvalidStateException", message).on(&["Decrypt"]);
    let refused = Fault::error(400, "InvalidSignatureException", "").times(1);
    for (what, faults, verdict, code) in [
        // The message says it alone.
        (
            "a key that waits for its deletion",
            vec![invalid("the key is pending deletion."), hangs.clone().on(&["DescribeKey"])],
            Verdict::Denied,
            "KMSInvalidStateException",
        ),
        (
            "a key whose state nobody tells",
            vec![invalid("something else"), hangs.clone().on(&["DescribeKey"])],
            Verdict::Unavailable,
            "KMSInvalidStateException",
        ),
        (
            "a signature that is refused, and then no answer",
            vec![refused, Fault { skip: 1, ..hangs }],
            Verdict::Credentials,
            "InvalidSignatureException",
        ),
    ] {
        customer.kms.inject(late.clone());
        faults.into_iter().for_each(|fault| customer.kms.inject(fault));
        let began = std::time::Instant::now();
        let said = customer.probe(&client, &canary);
        let took = began.elapsed();
        assert_eq!(said, (verdict, code.to_owned()), "{what}");
        assert!(took < LIMIT, "{what}: {took:?}");
        customer.kms.clear_faults();
    }
}

#[test]
fn what_a_witness_said_before_a_question_was_sent_is_no_testimony_about_its_answer() {
    let customer = Customer::new();
    let witness = customer.another_key();
    let settings = AwsSettings { witness: Some(witness), ..customer.client_settings() };
    let client = customer.runtime.block_on(AwsKms::connect(settings)).unwrap();
    let canary = customer.canary(&client);
    let context = canary.wrapped.context.clone();
    customer.runtime.block_on(async {
        let made = client.make_key(&customer.key, &context).await.unwrap();
        // Now that a call has succeeded, the witness is made ready.
        client.unwrap_key(&made.wrapped).await.unwrap();
    });
    let all = || Fault::error(400, "AccessDeniedException", "").on(&["Decrypt"]);
    customer.kms.inject(all());
    until("it is ready", || customer.probe(&client, &canary).0 == Verdict::Credentials);
    customer.kms.clear_faults();
    let customers = || Fault { key: Some(customer.key.to_string()), ..all() };
    // By turns, each right after the other.
    for (fault, verdict) in [
        (customers(), Verdict::Denied),
        (all(), Verdict::Credentials),
        (customers(), Verdict::Denied),
    ] {
        customer.kms.inject(fault);
        assert_eq!(customer.probe(&client, &canary).0, verdict);
        customer.kms.clear_faults();
    }
}

#[test]
fn a_request_whose_answer_nobody_waits_for_any_more_is_told_all_the_same() {
    let customer = Customer::new();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&calls);
    let observer: Observer = Arc::new(move |call| told.lock().unwrap().push(call));
    let settings = AwsSettings { observer: Some(observer), ..customer.client_settings() };
    let client = customer.runtime.block_on(AwsKms::connect(settings)).unwrap();
    let canary = customer.canary(&client);
    calls.lock().unwrap().clear();
    customer.kms.inject(Fault::new(FaultKind::Timeout).on(&["Decrypt"]));
    let before = customer.kms.requests().len();
    let (kms, asked) = (client.clone(), canary.clone());
    let probe = customer.runtime.spawn(async move { kms.probe(&asked, Connection::Pooled).await });
    until("it is under way", || customer.kms.requests().len() > before);
    probe.abort();
    until("it is told", || !calls.lock().unwrap().is_empty());
    customer.kms.clear_faults();
    assert_eq!(customer.probe(&client, &canary).0, Verdict::Allowed);
    let calls = calls.lock().unwrap();
    let told: Vec<_> = calls.iter().map(|call| (call.operation, call.error.as_deref())).collect();
    let decrypt = Operation::Decrypt;
    assert_eq!(told, [(decrypt, Some("NoAnswer")), (decrypt, None)], "each once");
    assert_eq!(calls[0].context.as_ref(), Some(&canary.wrapped.context));
    assert!(calls[0].request_id.is_none() && calls[1].request_id.is_some());
}

#[test]
fn no_key_waits_for_the_witness() {
    let customer = Customer::new();
    let witness = customer.another_key();
    let settings = AwsSettings { witness: Some(witness.clone()), ..customer.client_settings() };
    let limit = settings.operation_timeout;
    let client = customer.runtime.block_on(AwsKms::connect(settings)).unwrap();
    let context = customer.canary(&client).wrapped.context;
    let made = customer.runtime.block_on(client.make_key(&customer.key, &context)).unwrap();
    let stalls = Fault::new(FaultKind::Timeout).on(&["GenerateDataKey"]);
    customer.kms.inject(Fault { key: Some(witness.to_string()), ..stalls });
    let began = std::time::Instant::now();
    // Nor do those that follow.
    for _ in 0..8 {
        customer.runtime.block_on(client.unwrap_key(&made.wrapped)).unwrap();
    }
    let took = began.elapsed();
    assert!(took < limit, "{took:?}");
    until("the witness is asked", || {
        let mut keys = customer.kms.requests().into_iter().filter_map(|request| request.key);
        keys.any(|key| witness.as_str().ends_with(&key))
    });
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
    let (code, answer) = daemon.try_create("w", &daemon.backing("w"), "8M", key, "backup");
    assert_eq!(code, 3, "a purpose that the customer did not allow: {answer}");
    let encrypt =
        customer.console.encrypt().key_id(key).plaintext(aws_sdk_kms::primitives::Blob::new("x"));
    customer.runtime.block_on(encrypt.send()).unwrap_err();
}

#[test]
fn without_ca_certificates_the_daemon_says_so_at_its_start_and_needs_none_for_plain_http() {
    let dir = in_memory();
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
    let elsewhere = in_memory();
    let daemon = Daemon::start_with(elsewhere, env.to_vec());
    daemon.volume("v", "1M", &daemon.key());
    assert_eq!(daemon.state("v"), "serving", "{}", daemon.log());
}
