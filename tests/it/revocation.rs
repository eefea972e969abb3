//! Taking the key away and giving it back: for a key, for one volume, by hand, and when it is not
//! the customer who denies. The customer's side is played by the development KMS.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use byokd::key::wrapped::KeyArn;
use byokd::kms::dev::{DEV_REGION, Fault, FaultKind};
use jiff::Timestamp;
use serde_json::Value;

use crate::audit::records;
use crate::customer::Customer;
use crate::kms::BadWay;
use crate::support::{Daemon, Running, have, nbdsh, until};

/// From the change at KMS to the fence: the probe interval, and 2 s. The first denied answer comes
/// after the change, so this is more than is promised.
const BOUND: Duration = Duration::from_secs(3);

fn lease(daemon: &Daemon, name: &str) -> Value {
    daemon.status(name)["lease"].take()
}

fn never_fenced(daemon: &Daemon, name: &str) {
    let lease = lease(daemon, name);
    assert!(lease["fence_ms"].is_null(), "{name} was never fenced: {lease}");
}

fn all(daemon: &Daemon, names: &[String], state: &str) -> bool {
    let status = daemon.ok(&["status"]);
    let volumes = status["volumes"].as_array().unwrap();
    names.iter().all(|name| volumes.iter().any(|v| v["name"] == **name && v["state"] == state))
}

fn volumes(daemon: &Daemon, count: usize, key: &str) -> Vec<String> {
    let names: Vec<_> = (0..count).map(|n| format!("v{n}")).collect();
    names.iter().for_each(|name| daemon.volume(name, "1M", key));
    names
}

#[test]
fn one_volume_of_a_key_is_fenced_alone_if_it_alone_is_denied() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    let names = volumes(&daemon, 3, customer.key.as_str());
    let one = daemon.ok(&["volume", "show", "v1"])["uuid"].as_str().unwrap().to_owned();
    let probes = || customer.kms.requests().len();
    customer.deny_volume(&one);
    until("the volume is fenced", || daemon.state("v1") == "fenced");
    let before = probes();
    until("the others were probed again", || probes() > before + 6);
    for name in ["v0", "v2"] {
        assert_eq!(daemon.state(name), "serving");
        never_fenced(&daemon, name);
    }
    customer.allow_all();
    until("all are served", || all(&daemon, &names, "serving"));
}

#[test]
fn a_denial_of_one_is_heard_by_all_volumes_of_the_key_at_once() {
    let customer = Customer::new();
    // Left alone, the second volume would not be probed before the test is long over.
    let daemon = customer.daemon_with("", "probe_interval = \"1h\"\n");
    let names = volumes(&daemon, 2, customer.key.as_str());
    customer.set_enabled(false);
    let denied = Instant::now();
    daemon.ok(&["key", "recheck", "v0"]);
    until("both are fenced", || all(&daemon, &names, "fenced"));
    assert!(denied.elapsed() < BOUND, "{:?}", denied.elapsed());
}

#[test]
fn volumes_that_take_turns_ask_once_an_interval_and_are_fenced_together() {
    let customer = Customer::new();
    let daemon = customer.daemon_with("probe_each_up_to = 2\n", "probe_interval = \"1s\"\n");
    let names = volumes(&daemon, 8, customer.key.as_str());
    let probes = || customer.kms.requests().len();
    let (before, began) = (probes(), Instant::now());
    until("the volumes took their turns", || probes() >= before + 5);
    let took = began.elapsed();
    assert!(took > Duration::from_secs(3), "five probes of eight volumes in {took:?}");
    assert!(all(&daemon, &names, "serving"));
    customer.set_enabled(false);
    let denied = Instant::now();
    until("all are fenced", || all(&daemon, &names, "fenced"));
    assert!(denied.elapsed() < BOUND, "{:?}", denied.elapsed());
    customer.set_enabled(true);
    until("all are served", || all(&daemon, &names, "serving"));
}

#[test]
fn an_operators_suspension_is_at_once_and_outlives_the_daemon() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let mut daemon = customer.daemon();
    daemon.volume("v", "1M", customer.key.as_str());
    let uri = daemon.uri("v");
    nbdsh(&uri, "h.pwrite(b's' * 4096, 0)\nh.flush()");
    // KMS is slow: nobody waits for it.
    let stall = Duration::from_secs(30);
    customer.kms.inject(Fault::new(FaultKind::Timeout).lasting(stall));
    let before = customer.kms.requests().len();
    until("a probe is under way", || customer.kms.requests().len() > before);
    let began = Instant::now();
    let answer = daemon.ok(&["key", "suspend", "v"]);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(
        (&answer["state"], &answer["lease"]["state"]),
        (&"fenced".into(), &"suspended".into())
    );
    customer.kms.clear_faults();
    let before = customer.kms.requests().len();
    until("KMS allowed it again and again", || customer.kms.requests().len() > before + 3);
    assert_eq!(daemon.state("v"), "fenced");
    daemon.crash_and_restart();
    let (code, refused) = daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 5, "{refused}");
    assert!(refused["remedy"].as_str().unwrap().contains("key resume v"), "{refused}");
    daemon.ok(&["key", "resume", "v"]);
    daemon.ok(&["attach", "v"]);
    daemon.ok(&["key", "suspend", "v"]);
    daemon.ok(&["key", "resume", "v"]);
    until("it is served", || daemon.state("v") == "serving");
    nbdsh(&uri, "assert h.pread(4096, 0) == b's' * 4096");
    let (code, refused) = daemon.ctl(&["key", "resume", "v"]);
    assert_eq!(code, 5, "{refused}");
}

#[test]
fn a_recheck_does_not_wait_for_the_interval() {
    let customer = Customer::new();
    let daemon = customer.daemon_with("", "probe_interval = \"1h\"\n");
    let names = volumes(&daemon, 2, customer.key.as_str());
    let answer = daemon.ok(&["key", "recheck", customer.key.as_str()]);
    assert_eq!(answer["volumes"].as_array().unwrap().len(), 2);
    customer.set_enabled(false);
    daemon.ok(&["key", "recheck", customer.key.as_str()]);
    until("they are fenced", || all(&daemon, &names, "fenced"));
    customer.set_enabled(true);
    daemon.ok(&["key", "recheck", customer.key.as_str()]);
    until("they are served", || all(&daemon, &names, "serving"));
    let (code, _) = daemon.ctl(&["key", "recheck", "nobody"]);
    assert_eq!(code, 5);
}

/// A way to KMS on which answers are held back.
struct SlowWay {
    address: SocketAddr,
    millis: Arc<AtomicU64>,
}

impl SlowWay {
    fn new(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, millis) = (listener.local_addr().unwrap(), Arc::<AtomicU64>::default());
        let held_back = Arc::clone(&millis);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, millis) = (client.unwrap(), Arc::clone(&held_back));
                std::thread::spawn(move || {
                    let (_, answer) = BadWay::ask(to, &client);
                    let due =
                        Instant::now() + Duration::from_millis(millis.load(Ordering::Relaxed));
                    while Instant::now() < due {
                        std::thread::park_timeout(due - Instant::now());
                    }
                    // The client may have given up.
                    let _sent = client.write_all(&answer);
                });
            }
        });
        Self { address, millis }
    }

    fn hold_back(&self, millis: u64) {
        self.millis.store(millis, Ordering::Relaxed);
    }

    /// byokd at the end of it, which probes by itself after the test is over.
    fn daemon(&self) -> Daemon {
        Daemon::configured(&format!(
            "[kms]\nregion = \"{DEV_REGION}\"\nendpoint = \"http://{}\"\n[lease]\nprobe_interval = \"1h\"\n",
            self.address
        ))
    }
}

fn last_success(volume: &Value) -> Timestamp {
    volume["lease"]["last_success"].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_recheck_waits_for_an_answer_to_a_question_that_was_sent_after_it() {
    let customer = Customer::new();
    let way = SlowWay::new(customer.kms.address());
    let daemon = way.daemon();
    daemon.volume("v", "1M", customer.key.as_str());
    way.hold_back(1500);
    let before = customer.kms.requests().len();
    let recheck = || daemon.ok(&["key", "recheck", "v"])["volumes"][0].take();
    std::thread::scope(|scope| {
        let first = scope.spawn(recheck);
        until("KMS has allowed it", || customer.kms.requests().len() > before);
        customer.set_enabled(false);
        let changed = Timestamp::now();
        let second = recheck();
        assert_eq!(second["lease"]["evidence"]["code"], "DisabledException", "{second}");
        let first = first.join().unwrap();
        assert!(first["lease"]["evidence"].is_null(), "it was allowed: {first}");
        assert!(last_success(&first) < changed, "allowed before the change: {first}");
    });
}

#[test]
fn a_lease_counts_from_when_the_key_was_asked_for() {
    let customer = Customer::new();
    let way = SlowWay::new(customer.kms.address());
    let daemon = way.daemon();
    daemon.create("v", "1M", customer.key.as_str());
    way.hold_back(1500);
    let before = customer.kms.requests().len();
    std::thread::scope(|scope| {
        let attached = scope.spawn(|| daemon.ok(&["attach", "v"]));
        until("KMS has unwrapped it", || customer.kms.requests().len() > before);
        let unwrapped = Timestamp::now();
        attached.join().unwrap();
        assert!(last_success(&daemon.status("v")) < unwrapped, "{}", daemon.status("v"));
    });
}

#[test]
fn volumes_that_take_turns_come_back_together_however_many_they_are() {
    let customer = Customer::new();
    let daemon = customer.daemon_with("probe_each_up_to = 2\n", "probe_interval = \"1s\"\n");
    // A round of turns takes 24 s.
    let names = volumes(&daemon, 24, customer.key.as_str());
    let each =
        |command: &str| names.iter().for_each(|name| drop(daemon.ok(&["key", command, name])));
    each("suspend");
    // Each asks once, in vain.
    customer.kms.inject(Fault::new(FaultKind::Throttle));
    each("resume");
    customer.kms.clear_faults();
    let began = Instant::now();
    until("all are served", || all(&daemon, &names, "serving"));
    // The first is allowed within an interval and a tenth; then each asks twice.
    let took = began.elapsed();
    assert!(took < Duration::from_millis(1100 + 2000 + 240), "{took:?}");
}

#[test]
fn a_denial_that_the_witness_shares_takes_nothing_away() {
    let customer = Customer::new();
    let witness = customer.another_key();
    let daemon = customer
        .daemon_with(&format!("witness_key = \"{witness}\"\n"), "probe_interval = \"1s\"\n");
    daemon.volume("v", "1M", customer.key.as_str());
    until("the witness can speak", || daemon.log().contains("the witness key is ready"));
    // Our own role is broken: every key denies access.
    customer.kms.inject(Fault::error(400, "AccessDeniedException", "not authorized"));
    until("it is heard", || lease(&daemon, "v")["evidence"]["verdict"] == "credentials");
    let before = customer.kms.requests().len();
    until("it was probed again and again", || customer.kms.requests().len() > before + 5);
    assert_eq!(daemon.state("v"), "unverified");
    let lease_now = lease(&daemon, "v");
    assert!(lease_now["evidence"]["remedy"].as_str().unwrap().contains(witness.as_str()));
    never_fenced(&daemon, "v");
    customer.kms.clear_faults();
    until("the lease is held again", || daemon.state("v") == "serving");
    // The customer's key alone is denied: that is the customer's will.
    let uuid = daemon.ok(&["volume", "show", "v"])["uuid"].as_str().unwrap().to_owned();
    customer.deny_volume(&uuid);
    until("the volume is fenced", || daemon.state("v") == "fenced");
}

#[test]
fn a_witness_that_was_silent_once_costs_no_volume() {
    let customer = Customer::new();
    let witness = customer.another_key();
    let daemon = customer
        .daemon_with(&format!("witness_key = \"{witness}\"\n"), "probe_interval = \"1s\"\n");
    daemon.volume("v", "1M", customer.key.as_str());
    until("the witness can speak", || daemon.log().contains("the witness key is ready"));
    // Its first answer is none; then our own role is seen to be broken.
    let silent = Fault::new(FaultKind::Garbage).on(&["Decrypt"]).times(1);
    customer.kms.inject(Fault { key: Some(witness.to_string()), ..silent });
    customer.kms.inject(Fault::error(400, "AccessDeniedException", "not authorized"));
    until("it is suspected first", || daemon.log().contains("to=\"suspect\""));
    let before = customer.kms.requests().len();
    // For longer than an unconfirmed denial waits for to be believed.
    until("it was probed again and again", || customer.kms.requests().len() > before + 10);
    assert_eq!(daemon.state("v"), "unverified");
    never_fenced(&daemon, "v");
}

#[test]
fn what_is_asked_further_about_a_denial_makes_no_fence_late_though_nobody_answers() {
    let customer = Customer::new();
    let (witness, deleted) = (customer.another_key(), customer.another_key());
    let daemon = customer
        .daemon_with(&format!("witness_key = \"{witness}\"\n"), "probe_interval = \"1s\"\n");
    daemon.volume("refused", "1M", customer.key.as_str());
    daemon.volume("deleted", "1M", deleted.as_str());
    daemon.says("the witness key is ready");
    let silent = Fault::new(FaultKind::Timeout);
    customer.kms.inject(silent.clone().on(&["DescribeKey"]));
    customer.kms.inject(Fault { key: Some(witness.to_string()), ..silent.on(&["Decrypt"]) });
    let (id, denied) = (deleted.as_str(), Fault::error(400, "AccessDeniedException", "no"));
    customer.kms.inject(Fault { key: Some(customer.key.to_string()), ..denied });
    let deletion = customer.console.schedule_key_deletion().key_id(id);
    customer.runtime.block_on(deletion.send()).unwrap();
    for (name, key, asked_too, code) in [
        ("refused", &customer.key, ("Decrypt", &witness), "AccessDeniedException"),
        ("deleted", &deleted, ("DescribeKey", &deleted), "KMSInvalidStateException"),
    ] {
        until("it is fenced", || daemon.state(name) == "fenced");
        let lease = lease(&daemon, name);
        assert_eq!(lease["evidence"]["code"], code, "{lease}");
        let seen = customer.kms.requests();
        let about = |key: &KeyArn, what| {
            let id = key.as_str().rsplit('/').next().map(str::to_owned);
            seen.iter().filter(move |seen| seen.key == id && seen.operation == what)
        };
        let denied = about(key, "Decrypt").find(|seen| seen.error.is_some()).unwrap();
        let took = destroyed_at(&daemon, name) - denied.at_ms;
        assert!((0..3000).contains(&took), "{name}: {took} ms after KMS denied it");
        assert!(about(asked_too.1, asked_too.0).count() > 0, "{name}: it was asked further");
    }
}

/// When a volume's key was destroyed, in milliseconds since 1970, by the audit trail.
fn destroyed_at(daemon: &Daemon, name: &str) -> i64 {
    let is_it = |record: &Value| record["event"] == "key-destroyed" && record["volume"] == name;
    let mut at = None;
    until("it is recorded", || {
        at = records(daemon).into_iter().find(is_it);
        at.is_some()
    });
    at.unwrap()["time"].as_str().unwrap().parse::<Timestamp>().unwrap().as_millisecond()
}

/// fio, writing and verifying all it wrote, over four connections, in sizes and places of all
/// kinds, for at least ten seconds.
fn load(daemon: &Daemon) -> Running {
    let job =
        |name: &str, offset: &str, extra: &str| format!("[{name}]\noffset={offset}\n{extra}\n");
    let file = daemon.dir.path().join("load.fio");
    let text = format!(
        "[global]\nioengine=nbd\nuri={}\nsize=8m\nrw=randwrite\niodepth=16\nverify=crc32c\n\
         verify_fatal=1\nthread=1\ntime_based=1\nruntime=10\nrate_iops=2000\n{}{}{}{}",
        daemon.uri("v"),
        job("pages", "0", "bs=4k"),
        job("mixed", "16m", "bsrange=4k-1m\nrate_iops=200"),
        job("unaligned", "32m", "bsrange=512-256k\nblockalign=512\nrate_iops=200"),
        job("large", "48m", "bs=4m\niodepth=2\nrate_iops=20"),
    );
    std::fs::write(&file, text).unwrap();
    let log = std::fs::File::create(daemon.dir.path().join("fio.log")).unwrap();
    let child = Command::new("fio")
        .arg(&file)
        .current_dir(daemon.dir.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    Running(child)
}

#[test]
fn held_requests_go_on_when_the_key_comes_back_in_time() {
    if !have(&["fio"]) {
        return;
    }
    for place in ["/dev/shm", env!("CARGO_TARGET_TMPDIR")] {
        let customer = Customer::new();
        let daemon = customer.daemon();
        let dir = tempfile::tempdir_in(place).unwrap();
        let store = dir.path().join("v.img");
        let create = ["volume", "create", "v", "--size", "64M", "--purpose", "zeebe", "--key"];
        let mut create = create.to_vec();
        create.extend([customer.key.as_str(), "--backing", store.to_str().unwrap()]);
        daemon.ok(&create);
        daemon.define("v", "on_denial = \"hold\"\nhold_for = \"60s\"");
        daemon.ok(&["attach", "v"]);
        let mut client = load(&daemon);
        until("fio works", || daemon.status("v")["connections"] == 4);
        for _ in 0..2 {
            customer.set_enabled(false);
            until("the volume is fenced", || daemon.state("v") == "fenced");
            let lease = lease(&daemon, "v");
            assert!((1..60).contains(&lease["held_for"].as_u64().unwrap()), "{lease}");
            customer.set_enabled(true);
            until("the volume is served", || daemon.state("v") == "serving");
        }
        let ended = client.ends("fio has ended");
        let said = std::fs::read_to_string(daemon.dir.path().join("fio.log")).unwrap();
        assert!(ended.success(), "{said}");
        let status = daemon.status("v");
        assert_eq!(status["failed_requests"], 0, "{status}");
    }
}

#[test]
fn held_requests_fail_when_the_key_does_not_come_back_in_time() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.create("v", "8M", customer.key.as_str());
    daemon.define("v", "on_denial = \"hold\"\nhold_for = \"2s\"");
    daemon.ok(&["attach", "v"]);
    let (asked, told) = (daemon.dir.path().join("asked"), daemon.dir.path().join("told"));
    let script = format!(
        r"
import time, pathlib
h.pwrite(b'k' * 4096, 0)
pathlib.Path('{asked}').touch()
while True:
    try:
        began = time.monotonic()
        h.pwrite(b'l' * 4096, 8192)
        assert h.pread(4096, 0) == b'k' * 4096
    except nbd.Error as error:
        assert error.errno == 'EPERM', error
        break
waited = time.monotonic() - began
assert 0.5 < waited < 4, waited
pathlib.Path('{told}').touch()
while True:
    try:
        assert h.pread(4096, 0) == b'k' * 4096
        break
    except nbd.Error:
        time.sleep(0.01)
",
        asked = asked.display(),
        told = told.display()
    );
    let uri = daemon.uri("v");
    std::thread::scope(|scope| {
        let client = scope.spawn(move || nbdsh(&uri, &script));
        until("the client works", || asked.exists());
        customer.set_enabled(false);
        until("the client has failed", || told.exists());
        let status = daemon.status("v");
        assert_eq!(status["state"], "fenced");
        assert!(status["lease"]["held_for"].is_null(), "{status}");
        assert!(status["failed_requests"].as_u64().unwrap() > 0, "{status}");
        let clients = status["clients"].as_array().unwrap();
        assert!(clients[0]["program"].as_str().unwrap().starts_with("python"), "{status}");
        assert!(clients[0]["failed_requests"].as_u64().unwrap() > 0, "{status}");
        customer.set_enabled(true);
        client.join().unwrap();
    });
}

#[test]
fn a_held_volume_is_detached_without_waiting() {
    let customer = Customer::new();
    let mut daemon = customer.daemon();
    daemon.create("v", "8M", customer.key.as_str());
    daemon.define("v", "on_denial = \"hold\"\nhold_for = \"10m\"");
    daemon.ok(&["attach", "v"]);
    let mut client = crate::raw::Raw::connected(&daemon.dir.path().join("nbd/v.sock"), "v");
    customer.set_enabled(false);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    client.send(&crate::raw::request(0, crate::raw::READ, 7, 0, 4096));
    let began = Instant::now();
    daemon.ok(&["detach", "v"]);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(client.is_closed());
    assert!(daemon.terminate().success());
}

#[test]
fn what_is_to_be_done_after_a_fence_is_done_in_order_and_delays_nothing() {
    let customer = Customer::new();
    let daemon = customer.daemon();
    daemon.create("v", "1M", customer.key.as_str());
    let told = daemon.dir.path().join("told");
    let told_text = told.display();
    let started = daemon.dir.path().join("started");
    let started_text = started.display();
    daemon.define(
        "v",
        &format!(
            "[[on_fence]]\nrun = [\"/nonexistent\"]\n\
             [[on_fence]]\nrun = [\"/bin/sh\", \"-c\", \"sleep 600 & echo $! > {started_text}; wait\"]\n\
             timeout = \"1s\"\n\
             [[on_fence]]\nrun = [\"/bin/sh\", \"-c\", \"env > {told_text}.new; mv {told_text}.new {told_text}; exec sleep 600\"]"
        ),
    );
    daemon.ok(&["attach", "v"]);
    customer.set_enabled(false);
    until("the plan was carried out", || told.exists());
    let lease = lease(&daemon, "v");
    assert!(lease["fence_ms"].as_u64().unwrap() < 2000, "{lease}");
    let told = std::fs::read_to_string(told).unwrap();
    for fact in ["BYOKD_VOLUME=v", "BYOKD_REASON=denied", "BYOKD_PURPOSE=zeebe", "BYOKD_HELD_FOR=0"]
    {
        assert!(told.lines().any(|line| line == fact), "{fact} in {told}");
    }
    assert!(!told.contains("AWS_"), "nothing of the daemon's own: {told}");
    for words in ["on_fence: cannot be run", "on_fence: killed, out of time"] {
        daemon.says(words);
    }
    let started = std::fs::read_to_string(started).unwrap();
    let stat = format!("/proc/{}/stat", started.trim());
    // Whoever inherits it may leave its entry.
    let is_over = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
    until("what a program started is killed with it", is_over);
    customer.set_enabled(true);
    until("it is served", || daemon.state("v") == "serving");
    let pid = daemon.pid();
    until("what is left of the plan has ended", || {
        let tasks = format!("/proc/{pid}/task");
        std::fs::read_dir(tasks).unwrap().all(|task| {
            let children = task.unwrap().path().join("children");
            std::fs::read_to_string(children).is_ok_and(|pids| pids.trim().is_empty())
        })
    });
}

#[test]
fn under_load_a_detach_and_a_sigterm_end_in_time_and_lose_nothing_flushed() {
    if !have(&["fio", "nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let mut daemon = customer.daemon();
    daemon.volume("v", "80M", customer.key.as_str());
    let uri = daemon.uri("v");
    for (turn, stop) in [("detach", false), ("sigterm", true)] {
        nbdsh(&uri, &format!("h.pwrite(b'{turn}' * 8, 64 << 20)\nh.flush()"));
        // fio 3.33 does not end when its connections do: it is ended below.
        let client = load(&daemon);
        until("fio works", || daemon.status("v")["connections"] == 4);
        let began = Instant::now();
        if stop {
            assert!(daemon.terminate().success());
        } else {
            daemon.ok(&["detach", "v"]);
        }
        // What is in flight is finished, then the connections end.
        assert!(began.elapsed() < Duration::from_secs(5), "{turn}: {:?}", began.elapsed());
        drop(client);
        if stop {
            daemon.crash_and_restart();
        }
        daemon.ok(&["attach", "v"]);
        let len = 8 * turn.len();
        nbdsh(&uri, &format!("assert h.pread({len}, 64 << 20) == b'{turn}' * 8"));
    }
}
