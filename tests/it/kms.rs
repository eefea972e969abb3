//! Every fault between byokd and KMS, through the real SDK: what it means, and that nothing but a
//! denial takes a volume away. The customer's side is played by the development KMS.

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use aws_sdk_kms::types::{KeySpec, KeyUsageType};
use byokd::key::lease::Verdict;
use byokd::kms::dev::{DEV_REGION, Fault, FaultKind};
use serde_json::Value;

use crate::customer::Customer;
use crate::support::{Daemon, have, nbdsh, output, until};

/// A fault, and what a probe that meets it has to say.
fn matrix() -> Vec<(Fault, Verdict, &'static str)> {
    use Verdict::{Allowed, Credentials, Denied, Mismatch, Unavailable};
    let html = |status| Fault { status: Some(status), ..Fault::new(FaultKind::Html) };
    let state = |word: &str| Fault {
        state: Some(serde_json::from_value(word.into()).unwrap()),
        ..Fault::new(FaultKind::KeyState)
    };
    let invalid = |message| Fault::error(400, "KMSInvalidStateException", message).on(&["Decrypt"]);
    let stall = Duration::from_secs(30);
    vec![
        // The customer's will.
        (Fault::error(400, "AccessDeniedException", "no"), Denied, "AccessDeniedException"),
        (Fault::error(400, "DisabledException", "off"), Denied, "DisabledException"),
        (Fault::error(400, "NotFoundException", "gone"), Denied, "NotFoundException"),
        (
            Fault::error(400, "InvalidGrantTokenException", "x"),
            Denied,
            "InvalidGrantTokenException",
        ),
        (state("PendingDeletion"), Denied, "KMSInvalidStateException"),
        (state("PendingImport"), Denied, "KMSInvalidStateException"),
        (invalid("The external key is not enabled"), Denied, "KMSInvalidStateException"),
        (Fault::new(FaultKind::Alternate), Denied, "AccessDeniedException"),
        // KMS's own trouble.
        (Fault::new(FaultKind::Throttle), Unavailable, "ThrottlingException"),
        (Fault::error(500, "KMSInternalException", ""), Unavailable, "KMSInternalException"),
        (
            Fault::error(500, "DependencyTimeoutException", ""),
            Unavailable,
            "DependencyTimeoutException",
        ),
        (Fault::error(503, "ServiceUnavailable", ""), Unavailable, "ServiceUnavailable"),
        (invalid("The proxy did not respond in time"), Unavailable, "KMSInvalidStateException"),
        (state("Creating"), Unavailable, "KMSInvalidStateException"),
        // An error that nobody knows decides nothing, whatever its status.
        (Fault::error(403, "BrandNewException", "?"), Unavailable, "BrandNewException"),
        // Trouble on the way.
        (Fault::new(FaultKind::Timeout).lasting(stall), Unavailable, "Timeout"),
        (Fault::new(FaultKind::Latency).lasting(stall), Unavailable, "Timeout"),
        (Fault::new(FaultKind::Drip), Unavailable, "Timeout"),
        (Fault::new(FaultKind::Reset), Unavailable, "Reset"),
        (Fault::new(FaultKind::ResetMidBody), Unavailable, "Reset"),
        (Fault::new(FaultKind::Garbage), Unavailable, "GarbledAnswer"),
        (Fault::new(FaultKind::Empty200), Unavailable, "EmptyAnswer"),
        (html(403), Unavailable, "NoErrorCode"),
        (html(502), Unavailable, "NoErrorCode"),
        (Fault::new(FaultKind::Http), Unavailable, "NoErrorCode"),
        // Our own trouble.
        (Fault::error(400, "ExpiredTokenException", ""), Credentials, "ExpiredTokenException"),
        (
            Fault::error(400, "UnrecognizedClientException", ""),
            Credentials,
            "UnrecognizedClientException",
        ),
        (
            Fault::error(400, "InvalidSignatureException", ""),
            Credentials,
            "InvalidSignatureException",
        ),
        // A clock that is wrong is measured and made up for.
        (Fault { seconds: Some(900), ..Fault::new(FaultKind::ClockSkew) }, Allowed, ""),
        // An answer for another volume.
        (Fault::new(FaultKind::WrongPlaintext), Mismatch, "OtherPlaintext"),
        (Fault::new(FaultKind::WrongKeyArn), Mismatch, "OtherKey"),
        (
            Fault::error(400, "InvalidCiphertextException", ""),
            Mismatch,
            "InvalidCiphertextException",
        ),
        (Fault::error(400, "IncorrectKeyException", ""), Mismatch, "IncorrectKeyException"),
    ]
}

#[test]
fn every_fault_has_its_verdict_and_ends_within_the_limit() {
    let customer = Customer::new();
    let client = customer.client_at(customer.kms.endpoint());
    let canary = customer.canary(&client);
    let mut wrong = Vec::new();
    for (fault, verdict, code) in matrix() {
        let what = format!("{fault:?}");
        customer.kms.inject(fault);
        let began = std::time::Instant::now();
        let said = customer.probe(&client, &canary);
        let took = began.elapsed();
        customer.kms.clear_faults();
        if said != (verdict, code.to_owned()) || took > Duration::from_secs(2) {
            wrong.push(format!("{what}: {said:?} after {took:?}"));
        }
        let after = customer.probe(&client, &canary);
        if after.0 != Verdict::Allowed {
            wrong.push(format!("after {what}: {after:?}"));
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

/// What KMS said last, by its code.
fn evidence(daemon: &Daemon) -> String {
    let answer = daemon.ok(&["status", "v"]);
    answer["volumes"][0]["lease"]["evidence"]["code"].as_str().unwrap_or_default().to_owned()
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
    let lease = &daemon.ok(&["status", "v"])["volumes"][0]["lease"];
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
        let answer = daemon.ok(&["status", "v"]);
        let lease = &answer["volumes"][0]["lease"];
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
