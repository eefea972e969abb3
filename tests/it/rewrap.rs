//! Another wrapping for a volume's key: after a rotation, or under another key, attached or not. The
//! customer's side is played by the development KMS.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use byokd::key::wrapped::KeyArn;
use byokd::kms::dev::{Fault, FaultKind};
use serde_json::Value;

use crate::customer::Customer;
use crate::support::{Daemon, have, nbdsh, output, python_nbd, run, until};

/// The token in the header of a volume, attached or not: `cryptsetup` would wait for the lock.
fn token(daemon: &Daemon, name: &str) -> Value {
    let mut text = vec![0; 12 << 10];
    File::open(daemon.backing(name)).unwrap().read_exact_at(&mut text, 4096).unwrap();
    let end = text.iter().position(|byte| *byte == 0).unwrap();
    serde_json::from_slice::<Value>(&text[..end]).unwrap()["tokens"]["0"].take()
}

/// The volume key of a volume, attached or not, as anybody with `kms:Decrypt` gets it.
fn volume_key(customer: &Customer, daemon: &Daemon) -> Vec<u8> {
    let copy = daemon.dir.path().join("copy");
    std::fs::copy(daemon.backing("v"), &copy).unwrap();
    customer.volume_key(&copy)
}

fn rewrap(daemon: &Daemon, name: &str, key: &KeyArn) -> Value {
    daemon.ok(&["key", "rewrap", name, "--key", key.as_str()])
}

/// Waits until this many more probes were answered.
fn after_probes(customer: &Customer, count: usize) {
    let before = customer.kms.requests().len();
    until("it was probed", || customer.kms.requests().len() >= before + count);
}

#[test]
fn a_volume_moves_to_another_key_while_it_is_used_and_the_old_key_is_not_needed_any_more() {
    if !have(&["nbdsh", "cryptsetup"]) {
        return;
    }
    let customer = Customer::new();
    let other = customer.another_key();
    let daemon = customer.daemon();
    daemon.volume("v", "8M", customer.key.as_str());
    let before = daemon.status("v");
    let secret = volume_key(&customer, &daemon);
    let (working, stop) = (daemon.dir.path().join("working"), daemon.dir.path().join("stop"));
    // A client that has no error until it is told to stop.
    let script = format!(
        "import pathlib\nn = 0\nwhile not pathlib.Path('{}').exists():\n    \
         n = (n + 1) % 251\n    h.pwrite(bytes([n]) * 70000, n * 4096 + 5)\n    h.flush()\n    \
         assert h.pread(70000, n * 4096 + 5) == bytes([n]) * 70000\n    \
         pathlib.Path('{}').touch()\n",
        stop.display(),
        working.display()
    );
    let mut client = python_nbd();
    client.args(["-u", &daemon.uri("v"), "-c", &script]);
    std::thread::scope(|scope| {
        let client = scope.spawn(move || run(&mut client));
        until("the client works", || working.exists());
        let answer = rewrap(&daemon, "v", &other);
        assert_eq!(answer["key"], other.as_str());
        let next = before["header_seqid"].as_u64().unwrap() + 1;
        assert_eq!(answer["header_seqid"], next);
        customer.set_enabled(false);
        after_probes(&customer, 4);
        assert_eq!(daemon.state("v"), "serving");
        assert!(daemon.status("v")["lease"]["fence_ms"].is_null());
        std::fs::write(&stop, "").unwrap();
        client.join().unwrap();
    });
    assert_eq!(volume_key(&customer, &daemon), secret, "the same volume key");
    customer.set_key_enabled(&other, false);
    until("the new key rules it", || daemon.state("v") == "fenced");
    let (code, refused) = daemon.ctl(&["key", "rewrap", "v"]);
    assert_eq!(code, 5, "{refused}");
    customer.set_key_enabled(&other, true);
    until("it is served under the new key", || daemon.state("v") == "serving");
    nbdsh(&daemon.uri("v"), "h.pwrite(b'k' * 4096, 0)\nh.flush()");
    daemon.ok(&["detach", "v"]);
    daemon.ok(&["attach", "v"]);
    nbdsh(&daemon.uri("v"), "assert h.pread(4096, 0) == b'k' * 4096");
}

#[test]
fn a_rewrap_under_the_same_key_renews_what_a_rotation_left_behind() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.create("v", "1M", customer.key.as_str());
    let secret = volume_key(&customer, &daemon);
    let old = token(&daemon, "v");
    let rotate = customer.console.rotate_key_on_demand().key_id(customer.key.as_str());
    customer.runtime.block_on(rotate.send()).unwrap();
    for attached in [false, true] {
        let answer = daemon.ok(&["key", "rewrap", "v"]);
        assert_eq!(answer["key"], customer.key.as_str());
        let new = token(&daemon, "v");
        for blob in ["ciphertext_blob", "canary_blob", "canary_sha256", "header_mac"] {
            assert_ne!(new[blob], old[blob], "{blob} is remade");
        }
        assert_eq!(new["encryption_context"], old["encryption_context"]);
        assert_eq!(volume_key(&customer, &daemon), secret);
        if !attached {
            daemon.ok(&["attach", "v"]);
        }
    }
    after_probes(&customer, 2);
    assert_eq!(daemon.state("v"), "serving");
}

#[test]
fn a_volume_that_moved_is_denied_with_its_new_key_and_not_with_its_old_siblings() {
    let customer = Customer::new();
    let other = customer.another_key();
    // Left alone, none would be probed before the test is long over.
    let daemon = customer.daemon_with("", "probe_interval = \"1h\"\n");
    for name in ["old0", "old1", "moved", "new"] {
        let key = if name == "new" { &other } else { &customer.key };
        daemon.volume(name, "1M", key.as_str());
    }
    rewrap(&daemon, "moved", &other);
    customer.set_enabled(false);
    daemon.ok(&["key", "recheck", "old0"]);
    until("the old siblings are fenced", || daemon.state("old1") == "fenced");
    for name in ["moved", "new"] {
        assert!(daemon.status(name)["lease"]["evidence"].is_null(), "{name} was not denied");
        assert_eq!(daemon.state(name), "serving");
    }
    customer.set_key_enabled(&other, false);
    daemon.ok(&["key", "recheck", "new"]);
    until("the new sibling's denial is heard", || daemon.state("moved") == "fenced");
}

#[test]
fn a_rewrap_that_is_refused_changes_nothing() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let customer = Customer::new();
    let other = customer.another_key();
    let daemon = customer.daemon();
    daemon.volume("v", "1M", customer.key.as_str());
    let before = token(&daemon, "v");
    let refuse = |key: &str, exit: i32, words: &str| {
        let (code, refused) = daemon.ctl(&["key", "rewrap", "v", "--key", key]);
        assert_eq!(code, exit, "{refused}");
        assert!(refused["why"].as_str().unwrap().contains(words), "{words}: {refused}");
        assert_eq!(token(&daemon, "v"), before);
    };
    // The new key may not be used.
    customer.set_key_enabled(&other, false);
    refuse(other.as_str(), 3, other.as_str());
    customer.set_key_enabled(&other, true);
    let elsewhere = other.as_str().replace("eu-central-1", "us-east-1");
    refuse(&elsewhere, 1, "us-east-1");
    // KMS fails, or answers what proves nothing, at each of its steps.
    for operation in ["ReEncrypt", "GenerateDataKey", "Decrypt"] {
        for kind in [FaultKind::WrongKeyArn, FaultKind::Garbage] {
            // A probe of the service that goes on may meet it first; never two in a row.
            customer.kms.inject(Fault::new(kind).on(&[operation]));
            let (code, refused) = daemon.ctl(&["key", "rewrap", "v", "--key", other.as_str()]);
            customer.kms.clear_faults();
            assert!([1, 4].contains(&code), "{operation} {kind:?}: {refused}");
            assert_eq!(token(&daemon, "v"), before);
        }
    }
    after_probes(&customer, 2);
    assert_eq!(daemon.state("v"), "serving");
    daemon.ok(&["key", "suspend", "v"]);
    refuse(other.as_str(), 5, "suspended");
    daemon.ok(&["key", "resume", "v"]);
    daemon.ok(&["detach", "v"]);
    // The old key may not be used.
    customer.set_enabled(false);
    refuse(other.as_str(), 3, customer.key.as_str());
    customer.set_enabled(true);
    daemon.ok(&["attach", "v", "--read-only"]);
    refuse(other.as_str(), 5, "read-only");
    daemon.ok(&["detach", "v"]);
    // A key that answers for the volume key, and is not it.
    let mut foreign = Fault::new(FaultKind::WrongPlaintext).on(&["Decrypt"]);
    foreign.skip = 1;
    customer.kms.inject(foreign);
    refuse(other.as_str(), 1, "key");
    customer.kms.clear_faults();
    rewrap(&daemon, "v", &other);
    assert_ne!(token(&daemon, "v"), before);
}

#[test]
fn the_policy_that_is_printed_for_a_rewrap_is_enough_and_without_it_it_is_refused() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    let key = customer.key.as_str();
    daemon.create("v", "1M", key);
    let policy = |more: &[&str]| {
        let printed = output(
            Command::new(env!("CARGO_BIN_EXE_byokctl"))
                .args(["key", "policy", key, "--purpose", "zeebe", "--principal"])
                .arg("arn:aws:iam::111122223333:role/storage")
                .args(more),
        );
        customer.put_policy(&String::from_utf8(printed.stdout).unwrap());
    };
    policy(&[]);
    let (code, refused) = daemon.ctl(&["key", "rewrap", "v"]);
    assert_eq!(code, 3, "{refused}");
    assert!(refused["remedy"].as_str().unwrap().contains("--rewrap"), "{refused}");
    daemon.ok(&["attach", "v"]);
    policy(&["--rewrap"]);
    daemon.ok(&["key", "rewrap", "v"]);
}

#[test]
fn a_daemon_killed_in_the_middle_of_rewraps_leaves_a_volume_that_opens() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let customer = Customer::new();
    let other = customer.another_key();
    let mut daemon = customer.daemon();
    daemon.create("v", "1M", customer.key.as_str());
    let secret = volume_key(&customer, &daemon);
    for round in 0..6u64 {
        daemon.ok(&["attach", "v"]);
        let socket = daemon.dir.path().join("byokd.sock");
        let (there, back) = (other.to_string(), customer.key.to_string());
        let rewraps = std::thread::spawn(move || {
            // Until the daemon is gone.
            let mut done = 0u32;
            for key in [there, back].iter().cycle() {
                let mut rewrap = Command::new(env!("CARGO_BIN_EXE_byokctl"));
                rewrap.args(["key", "rewrap", "v", "--key", key]).arg("--socket").arg(&socket);
                if !output(&mut rewrap).status.success() {
                    return done;
                }
                done += 1;
            }
            done
        });
        let first = daemon.status("v")["header_seqid"].as_u64().unwrap();
        until("a rewrap is done", || {
            daemon.status("v")["header_seqid"].as_u64().is_some_and(|now| now > first + round % 3)
        });
        std::thread::park_timeout(Duration::from_millis(7 * round));
        daemon.crash_and_restart();
        // The last one may have been written and not answered.
        assert!(u64::from(rewraps.join().unwrap()) >= round % 3);
        assert_eq!(volume_key(&customer, &daemon), secret);
    }
    daemon.ok(&["attach", "v"]);
}
