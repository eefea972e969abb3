//! Where the key is: a daemon's whole memory is read from outside, by root, and searched for the
//! volume key, its halves, all round keys that AES-256 expands from them, the key in base64 as KMS
//! sends it, and a plaintext. All of it has to be found while the key is in use, or the search
//! proves nothing; none of it afterwards.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::Instant;

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use byokd::kms::dev::{Fault, FaultKind};
use tempfile::TempDir;

use crate::backing::HangingDisk;
use crate::customer::Customer;
use crate::metrics::{get, value};
use crate::mounts::{LoopDevice, can_mount};
use crate::raw::{FLUSH, READ, Raw, TRIM, WRITE, request};
use crate::support::{
    Daemon, PATIENCE, Running, have, in_memory, nbdsh, on_disk, python_nbd, run, until,
};

/// Whether the memory of other processes can be read here.
fn can_scan() -> bool {
    if !have(&["nbdsh", "cryptsetup"]) {
        return false;
    }
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "reading another process's memory needs root");
    println!("skipped: reading another process's memory needs root");
    false
}

/// AES-256's round keys from the third on (the first two are the key), by FIPS 197, section 5.2.
fn round_keys(key: &[u8]) -> Vec<[u8; 16]> {
    let substitute = substitution();
    let sub = |word: [u8; 4]| word.map(|byte| substitute[usize::from(byte)]);
    let mut words: Vec<[u8; 4]> = key.chunks(4).map(|word| word.try_into().unwrap()).collect();
    let mut round = 1u8;
    while words.len() < 60 {
        let mut word = words[words.len() - 1];
        if words.len().is_multiple_of(8) {
            word.rotate_left(1);
            word = sub(word);
            word[0] ^= round;
            round <<= 1;
        } else if words.len() % 8 == 4 {
            word = sub(word);
        }
        let before = words[words.len() - 8];
        words.push(std::array::from_fn(|n| word[n] ^ before[n]));
    }
    words[8..].chunks(4).map(|four| four.concat().try_into().unwrap()).collect()
}

/// The S-box: the inverse in GF(2^8), then the affine map (FIPS 197, section 5.1.1).
fn substitution() -> [u8; 256] {
    let times = |mut a: u8, mut b: u8| {
        let mut product = 0;
        while b > 0 {
            product ^= if b & 1 == 1 { a } else { 0 };
            a = a << 1 ^ if a & 0x80 == 0 { 0 } else { 0x1b };
            b >>= 1;
        }
        product
    };
    std::array::from_fn(|n| {
        let n = u8::try_from(n).unwrap();
        let inverse = (0..=255).find(|m| times(n, *m) == 1).unwrap_or(0);
        (0..5).fold(0x63, |sum, turn| sum ^ inverse.rotate_left(turn))
    })
}

#[test]
fn the_round_keys_that_are_searched_for_are_those_of_aes() {
    // FIPS 197, appendix A.3: the first and the last word that are expanded.
    let key = [
        0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77,
        0x81, 0x1f, 0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14,
        0xdf, 0xf4,
    ];
    let keys = round_keys(&key);
    assert_eq!(keys.len(), 13);
    assert_eq!(keys[0][..4], [0x9b, 0xa3, 0x54, 0x11]);
    assert_eq!(keys[12][12..], [0x70, 0x6c, 0x63, 0x1e]);
    // And the cipher agrees that it is a key.
    let mut block = aes::Block::default();
    aes::Aes256::new_from_slice(&key).unwrap().encrypt_block(&mut block);
    assert_ne!(block, aes::Block::default());
}

/// What is searched for.
struct Needles(BTreeMap<&'static str, Vec<Vec<u8>>>);

/// The plaintext of the tests: random, so that nothing else can be like it.
const PLAIN: usize = 64;

impl Needles {
    fn new(key: &[u8], plain: &[u8]) -> Self {
        let (data, tweak) = key.split_at(32);
        let rounds = |half| round_keys(half).into_iter().map(|key| key.to_vec()).collect();
        let in_base64 = BASE64_STANDARD.encode(key);
        Self(BTreeMap::from([
            // Any 16 bytes of a half are enough to betray it.
            ("key", key.chunks(16).map(<[u8]>::to_vec).collect()),
            ("data round keys", rounds(data)),
            ("tweak round keys", rounds(tweak)),
            // Encoded three bytes at a time, so also its middle is found wherever it lies.
            (
                "key in base64",
                vec![in_base64.as_bytes()[..32].to_vec(), in_base64.as_bytes()[40..72].to_vec()],
            ),
            ("plaintext", plain.chunks(16).map(<[u8]>::to_vec).collect()),
        ]))
    }

    /// What is found in the memory of `pid`.
    fn found(&self, pid: u32) -> Vec<&'static str> {
        let mut found = Vec::new();
        each_mapping(pid, |bytes| found.extend(self.within(&bytes)));
        found.sort_unstable();
        found.dedup();
        found
    }

    /// What is found in these bytes.
    fn within(&self, bytes: &[u8]) -> Vec<&'static str> {
        let is_there = |needles: &Vec<Vec<u8>>| {
            needles.iter().any(|n| memchr::memmem::find(bytes, n).is_some())
        };
        self.0.iter().filter(|(_, needles)| is_there(needles)).map(|(what, _)| *what).collect()
    }
}

/// Shows all memory of `pid` that can be read, a mapping at a time.
fn each_mapping(pid: u32, mut show: impl FnMut(Vec<u8>)) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut scanned = 0u64;
    for line in
        maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|p| p.starts_with('r')))
    {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let (from, to) = (number(from), number(to));
        if line.ends_with("[vvar]")
            || line.ends_with("[vvar_vclock]")
            || line.ends_with("[vsyscall]")
        {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // The ring's own pages are the kernel's.
        let mut at = 0;
        while at < bytes.len() {
            match memory.read_at(&mut bytes[at..], from + at as u64) {
                Ok(0) | Err(_) => at += 4096,
                Ok(n) => at += n,
            }
        }
        scanned += bytes.len() as u64;
        show(bytes);
    }
    assert!(scanned > 1 << 20, "only {scanned} bytes were readable");
}

/// A TLS end in front of KMS.
struct TlsFront {
    _process: Running,
    dir: TempDir,
}

impl TlsFront {
    fn new(customer: &Customer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls_front.py");
        let process = Command::new("/usr/bin/python3")
            .arg(script)
            .arg(dir.path())
            .arg(customer.kms.address().port().to_string())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let front = Self { _process: Running(process), dir };
        until("the TLS end listens", || front.dir.path().join("port").exists());
        front
    }

    fn endpoint(&self) -> String {
        let port = std::fs::read_to_string(self.dir.path().join("port")).unwrap();
        format!("https://localhost:{port}")
    }

    fn environment(&self) -> Vec<(String, String)> {
        let ca = self.dir.path().join("ca.pem");
        vec![("SSL_CERT_FILE".to_owned(), ca.to_str().unwrap().to_owned())]
    }
}

/// A daemon whose key memory can be read by root, under a KMS behind TLS, a volume, and what to
/// search for.
struct Scene {
    customer: Customer,
    daemon: Daemon,
    needles: Needles,
    plain: Vec<u8>,
    front: TlsFront,
}

impl Scene {
    fn new() -> Self {
        Self::made_in(in_memory())
    }

    /// With its volume in that directory.
    fn made_in(dir: TempDir) -> Self {
        let customer = Customer::new();
        let front = TlsFront::new(&customer);
        let settings = customer.settings("", "probe_interval = \"1s\"\n");
        let settings = settings.replace(customer.kms.endpoint(), &front.endpoint());
        let http = front.dir.path().join("http");
        let settings = format!(
            "secret_memory = \"locked\"\nmax_connections = 64\n\
             [http]\nsocket = \"{}\"\n{settings}",
            http.display()
        );
        let daemon = Daemon::configured_in(dir, &settings, front.environment());
        daemon.create("v", "8M", customer.key.as_str());
        let key = customer.volume_key(&daemon.backing("v"));
        let mut plain = vec![0; PLAIN];
        aws_lc_rs::rand::fill(&mut plain).unwrap();
        let needles = Needles::new(&key, &plain);
        Self { customer, daemon, needles, plain, front }
    }

    /// With its volume attached, whose requests wait for the key.
    fn holding() -> Self {
        let scene = Self::new();
        scene.daemon.define("v", "on_denial = \"hold\"\nhold_for = \"10m\"");
        scene.daemon.ok(&["attach", "v"]);
        scene
    }

    /// With a volume `w` on a disk that can be made to hang, and its key to search for. The disk goes
    /// first, for the daemon could not end without it.
    fn on_a_disk_that_can_hang() -> (Self, HangingDisk) {
        let mut scene = Self::new();
        let disk = HangingDisk::new();
        disk.define(&scene.daemon, "w", scene.customer.key.as_str());
        scene.needles = Needles::new(&scene.customer.volume_key(&disk.path()), &scene.plain);
        scene.daemon.ok(&["attach", "w"]);
        (scene, disk)
    }

    fn metrics(&self) -> String {
        let http = UnixStream::connect(self.front.dir.path().join("http")).unwrap();
        get(http, "/metrics", "Host: localhost\r\n").1
    }

    /// Requests of a volume that are taken and not answered.
    fn in_flight(&self, name: &str) -> f64 {
        value(&self.metrics(), &format!("byokd_io_in_flight{{volume=\"{name}\"}}"))
    }

    /// Reads and writes of a volume that are answered.
    fn requests(&self, name: &str) -> f64 {
        let page = self.metrics();
        let of = |operation| {
            let labels = format!("{{volume=\"{name}\",operation=\"{operation}\"}}");
            value(&page, &format!("byokd_io_request_duration_seconds_count{labels}"))
        };
        of("read") + of("write")
    }

    fn found(&self) -> Vec<&'static str> {
        self.needles.found(self.daemon.pid())
    }

    /// A client in the middle of a write: its header and half of its data are sent.
    fn half_a_write(&self) -> Raw {
        let mut client = Raw::connected(&self.daemon.dir.path().join("nbd/v.sock"), "v");
        client.send(&request(0, WRITE, 1, 0, 1 << 20));
        client.send(&self.plain.repeat((1 << 19) / PLAIN));
        client
    }

    /// Writes and reads through all the ways there are: whole sectors, parts, large and small.
    fn work(&self) {
        let plain: String = self.plain.iter().map(|byte| format!("{byte:02x}")).collect();
        nbdsh(
            &self.daemon.uri("v"),
            &format!(
                "p = bytes.fromhex('{plain}')\n\
                 h.pwrite(p * 16384, 0)\nh.pwrite(p, 1 << 21)\nh.pwrite(p * 64, (1 << 21) + 777)\n\
                 h.flush()\n\
                 assert h.pread(1 << 20, 0) == p * 16384\nassert h.pread(100, 3)\n\
                 assert h.pread_structured(1 << 20, 0, lambda *a: 0)"
            ),
        );
    }
}

const IN_USE: [&str; 4] = ["data round keys", "key", "plaintext", "tweak round keys"];

#[test]
fn the_key_and_all_plaintext_are_gone_after_a_fence_and_back_when_it_is() {
    if !can_scan() {
        return;
    }
    let scene = Scene::new();
    assert!(scene.found().is_empty(), "made, not attached: {:?}", scene.found());
    scene.daemon.ok(&["attach", "v"]);
    for _ in 0..3 {
        scene.work();
        let client = scene.half_a_write();
        until("the half of a write is there", || scene.found() == IN_USE);
        scene.customer.set_enabled(false);
        until("the volume is fenced", || scene.daemon.state("v") == "fenced");
        assert!(scene.found().is_empty(), "fenced: {:?}", scene.found());
        drop(client);
        scene.customer.set_enabled(true);
        until("it is served again", || scene.daemon.state("v") == "serving");
    }
    scene.work();
    assert!(scene.found().contains(&"key"), "served again, so the key is there");
}

#[test]
fn a_volume_whose_requests_wait_holds_no_key_and_nothing_decrypted() {
    if !can_scan() {
        return;
    }
    let scene = Scene::holding();
    scene.work();
    // A client that takes none of the reply to a large read, and one that waits for its reply.
    let socket = scene.daemon.dir.path().join("nbd/v.sock");
    let mut greedy = Raw::connected(&socket, "v");
    greedy.send(&request(0, READ, 1, 0, 8 << 20));
    let mut waiting = Raw::connected(&socket, "v");
    until("decrypted data is there", || scene.found() == IN_USE);
    scene.customer.set_enabled(false);
    until("the volume is fenced", || scene.daemon.state("v") == "fenced");
    waiting.send(&request(0, READ, 2, 0, 1 << 20));
    assert!(scene.found().is_empty(), "held: {:?}", scene.found());
    scene.customer.set_enabled(true);
    assert_eq!(waiting.simple_reply(2), 0);
    assert!(waiting.take_vec(1 << 20).chunks(PLAIN).all(|chunk| chunk == scene.plain));
}

/// Reads and writes pieces of 1 MiB, several at a time, until one is refused.
fn stream(scene: &Scene) {
    let data = scene.plain.repeat((1 << 20) / PLAIN);
    let mut client = Raw::connected(&scene.daemon.dir.path().join("nbd/v.sock"), "v");
    let (mut refused, started) = (false, Instant::now());
    while !refused {
        assert!(started.elapsed() < PATIENCE, "nothing was refused");
        for n in 0..4 {
            client.send(&request(0, WRITE, n, n << 20, 1 << 20));
            client.send(&data);
        }
        refused |= errors(&mut client, 4).iter().any(|error| *error != 0);
        (0..4).for_each(|n| client.send(&request(0, READ, n, n << 20, 1 << 20)));
        for _ in 0..4 {
            match client.any_reply() {
                (_, 0) => assert!(client.take_vec(1 << 20) == data),
                _ => refused = true,
            }
        }
    }
}

#[test]
fn nothing_is_left_of_large_pieces_that_a_fence_met_on_their_way() {
    if !can_scan() {
        return;
    }
    for dir in [in_memory(), on_disk()] {
        streams_into_fences(&Scene::made_in(dir));
    }
}

/// Five times.
fn streams_into_fences(scene: &Scene) {
    scene.daemon.ok(&["attach", "v"]);
    for _ in 0..5 {
        std::thread::scope(|scope| {
            scope.spawn(|| stream(scene));
            until("data is on its way", || scene.requests("v") > 100.0 && scene.found() == IN_USE);
            scene.customer.set_enabled(false);
            until("the volume is fenced", || scene.daemon.state("v") == "fenced");
        });
        assert!(scene.found().is_empty(), "fenced: {:?}", scene.found());
        scene.customer.set_enabled(true);
        until("it is served again", || scene.daemon.state("v") == "serving");
    }
}

#[test]
fn nothing_decrypted_of_large_pieces_waits_for_the_key() {
    /// Not all of a size, so that they lie where larger ones were.
    const LENGTHS: [u32; 4] = [1 << 20, 640 << 10, 1 << 20, 704 << 10];
    if !can_scan() {
        return;
    }
    let scene = Scene::holding();
    let data = scene.plain.repeat((1 << 20) / PLAIN);
    let mut client = Raw::connected(&scene.daemon.dir.path().join("nbd/v.sock"), "v");
    for n in 0..4 {
        assert_eq!(client.write(n << 20, &data), 0);
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (n, len) in (0..).zip(LENGTHS) {
                    client.send(&request(0, READ, n, n << 20, len));
                }
                for _ in 0..4 {
                    let (n, error) = client.any_reply();
                    let len = LENGTHS[usize::try_from(n).unwrap()] as usize;
                    assert_eq!(error, 0);
                    assert!(client.take_vec(len) == data[..len]);
                }
            }
        });
        let held = std::panic::catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..5 {
                until("data is on its way", || scene.found() == IN_USE);
                scene.customer.set_enabled(false);
                until("the volume is fenced", || scene.daemon.state("v") == "fenced");
                assert!(scene.found().is_empty(), "held: {:?}", scene.found());
                scene.customer.set_enabled(true);
                until("it is served again", || scene.daemon.state("v") == "serving");
            }
        }));
        scene.customer.set_enabled(true);
        over.store(true, Ordering::Relaxed);
        reads.join().unwrap();
        held.unwrap();
    });
}

#[test]
fn the_key_is_gone_after_a_detach_and_after_an_attach_that_failed() {
    if !can_scan() {
        return;
    }
    let scene = Scene::new();
    scene.daemon.ok(&["attach", "v"]);
    scene.work();
    let client = scene.half_a_write();
    until("the half of a write is there", || scene.found() == IN_USE);
    scene.daemon.ok(&["detach", "v"]);
    assert!(scene.found().is_empty(), "detached: {:?}", scene.found());
    drop(client);
    // It fails after the key was unwrapped.
    let socket = scene.daemon.dir.path().join("nbd/v.sock");
    std::fs::create_dir(&socket).unwrap();
    std::fs::write(socket.join("in the way"), "").unwrap();
    let (code, refused) = scene.daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 1, "{refused}");
    assert!(scene.found().is_empty(), "failed: {:?}", scene.found());
    std::fs::remove_dir_all(&socket).unwrap();
    // And before.
    scene.customer.kms.inject(Fault::error(400, "AccessDeniedException", "no"));
    let (code, refused) = scene.daemon.ctl(&["attach", "v"]);
    assert_eq!(code, 3, "{refused}");
    assert!(scene.found().is_empty(), "denied: {:?}", scene.found());
}

#[test]
fn a_key_that_was_made_does_not_wait_for_a_store_that_hangs() {
    if !can_scan() || !can_mount(&["nbdkit"]) {
        return;
    }
    let mut scene = Scene::new();
    let disk = HangingDisk::new();
    let device = LoopDevice::new(&disk.path(), &[]);
    // KMS makes the key at the second attempt, seconds after the first: the store is chosen then.
    scene.customer.kms.inject(Fault::new(FaultKind::Timeout).on(&["GenerateDataKey"]).times(1));
    let asked = scene.customer.kms.requests().len();
    let mut create = Command::new(env!("CARGO_BIN_EXE_byokctl"));
    create.arg("--socket").arg(scene.daemon.socket());
    create.args(["volume", "create", "w", "--backing", device.path(), "--size", "8M"]);
    create.args(["--purpose", "zeebe", "--key", scene.customer.key.as_str()]);
    let create = create.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let mut create = Running(create);
    until("KMS is asked for a key", || scene.customer.kms.requests().len() > asked);
    disk.signal("-STOP");
    let trail = scene.daemon.dir.path().join("audit/audit-000000000001.jsonl");
    until("the volume is about to be written", || {
        let trail = std::fs::read_to_string(&trail).unwrap();
        let is_it = |line: &str| {
            ["\"event\":\"create\"", "\"volume\":\"w\""].iter().all(|w| line.contains(w))
        };
        trail.lines().any(is_it)
    });
    let mut memory = Vec::new();
    each_mapping(scene.daemon.pid(), |bytes| memory.push(bytes));
    assert!(create.0.try_wait().unwrap().is_none(), "the store hangs");
    disk.signal("-CONT");
    assert!(create.ends("the volume is made").success());
    let key = scene.customer.volume_key(Path::new(device.path()));
    scene.needles = Needles::new(&key, &scene.plain);
    let found: Vec<_> = memory.iter().flat_map(|bytes| scene.needles.within(bytes)).collect();
    assert!(found.is_empty(), "{found:?}");
    scene.daemon.ok(&["attach", "w"]);
    assert!(scene.found().contains(&"key"), "it is the key that was searched for");
    scene.daemon.ok(&["detach", "w"]);
}

/// What is found in a core of `pid` that root makes by force, with gdb.
fn found_in_core(scene: &Scene) -> Vec<&'static str> {
    let dir = in_memory();
    let pid = scene.daemon.pid();
    run(Command::new("gcore").arg("-o").arg(dir.path().join("core")).arg(pid.to_string()));
    let core = std::fs::read(dir.path().join(format!("core.{pid}"))).unwrap();
    // The daemon's name for itself, in writable memory: the core holds what a core holds.
    assert!(memchr::memmem::find(&core, b"byokd.toml").is_some(), "the core is one");
    scene.needles.within(&core)
}

#[test]
fn nothing_secret_is_in_a_core_made_by_force() {
    if !can_scan() || !have(&["gcore"]) {
        return;
    }
    let scene = Scene::new();
    scene.daemon.ok(&["attach", "v"]);
    scene.work();
    let client = scene.half_a_write();
    until("the half of a write is there", || scene.found() == IN_USE);
    assert!(found_in_core(&scene).is_empty(), "in use: {:?}", found_in_core(&scene));
    assert_eq!(scene.found(), IN_USE, "it was there to be found");
    scene.customer.set_enabled(false);
    until("the volume is fenced", || scene.daemon.state("v") == "fenced");
    assert!(found_in_core(&scene).is_empty(), "fenced: {:?}", found_in_core(&scene));
    drop(client);
}

#[test]
fn a_rewrap_leaves_no_key_behind() {
    if !can_scan() {
        return;
    }
    let scene = Scene::new();
    let other = scene.customer.another_key();
    scene.daemon.ok(&["key", "rewrap", "v", "--key", other.as_str()]);
    assert!(scene.found().is_empty(), "rewrapped, detached: {:?}", scene.found());
    // It fails after the volume key was unwrapped.
    let mut foreign = Fault::new(FaultKind::WrongPlaintext).on(&["Decrypt"]);
    foreign.skip = 1;
    scene.customer.kms.inject(foreign);
    let (code, refused) = scene.daemon.ctl(&["key", "rewrap", "v"]);
    assert_eq!(code, 1, "{refused}");
    assert!(scene.found().is_empty(), "refused: {:?}", scene.found());
    scene.customer.kms.clear_faults();
    scene.daemon.ok(&["attach", "v"]);
    scene.work();
    let client = scene.half_a_write();
    until("the half of a write is there", || scene.found() == IN_USE);
    scene.daemon.ok(&["key", "rewrap", "v", "--key", scene.customer.key.as_str()]);
    scene.daemon.ok(&["detach", "v"]);
    assert!(scene.found().is_empty(), "rewrapped, then detached: {:?}", scene.found());
    drop(client);
}

#[test]
fn a_stopping_daemon_holds_no_key_of_a_volume_that_has_ended() {
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let mut scene = Scene::new();
    // It goes before the daemon, which could not end without it.
    let disk = HangingDisk::new();
    scene.daemon.ok(&["attach", "v"]);
    scene.work();
    disk.attach(&scene.daemon, "w", scene.customer.key.as_str());
    // A request that hangs in its store keeps the other volume, and the daemon, from ending.
    let mut hanging = Raw::connected(&scene.daemon.dir.path().join("nbd/w.sock"), "w");
    disk.signal("-STOP");
    hanging.send(&request(0, READ, 1, 4 << 20, 4096));
    let _client = scene.half_a_write();
    until("the half of a write is there", || scene.found() == IN_USE);
    let pid = scene.daemon.pid();
    run(Command::new("kill").arg(pid.to_string()));
    until("one volume has ended", || scene.daemon.log().contains("detached: flushed"));
    assert!(scene.found().is_empty(), "stopping: {:?}", scene.found());
    disk.signal("-CONT");
    assert!(scene.daemon.terminate().success());
}

/// Errors of the next `count` replies, in whatever order they come.
fn errors(client: &mut Raw, count: usize) -> Vec<u32> {
    let error = |_| {
        let head = client.take::<16>().expect("a reply");
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    };
    (0..count).map(error).collect()
}

#[test]
fn nothing_in_the_clear_waits_for_a_store_that_hangs() {
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let (scene, disk) = Scene::on_a_disk_that_can_hang();
    let data = scene.plain.repeat(64);
    let write = |cookie, at| [request(0, WRITE, cookie, at, 4096), data.clone()].concat();
    // Parts of sectors, alone and behind whatever hangs in the store before them.
    let asked = [
        vec![write(1, 777)],
        vec![write(1, 1 << 20), write(2, (1 << 20) + 777)],
        vec![request(0, TRIM, 1, 2 << 20, 1 << 20), write(2, 777 + (3 << 20))],
        vec![request(0, READ, 1, 4 << 20, 2 << 20), write(2, 777 + (4 << 20))],
        vec![request(0, FLUSH, 1, 0, 0), write(2, 777 + (5 << 20))],
        vec![write(1, 777 + (6 << 20)), write(2, 6 << 20)],
    ];
    disk.signal("-STOP");
    let socket = scene.daemon.dir.path().join("nbd/w.sock");
    let mut clients: Vec<_> = asked
        .iter()
        .map(|requests| {
            let mut client = Raw::connected(&socket, "w");
            client.send(&requests.concat());
            client
        })
        .collect();
    // One that waits behind another's part of a sector is received and not begun.
    until("requests hang", || scene.in_flight("w") >= 10.0);
    until("their data is there", || scene.found().contains(&"plaintext"));
    assert!(scene.found().contains(&"key"));
    scene.customer.set_enabled(false);
    until("the volume is fenced", || scene.daemon.state("w") == "fenced");
    assert!(scene.found().is_empty(), "fenced, and the store hangs: {:?}", scene.found());
    for (client, requests) in clients.iter_mut().zip(&asked) {
        assert_eq!(errors(client, requests.len()), vec![1; requests.len()], "EPERM");
    }
    disk.signal("-CONT");
    scene.customer.set_enabled(true);
    until("it is served again", || scene.daemon.state("w") == "serving");
    for client in &mut clients {
        assert_eq!(client.write(12345, b"as before"), 0);
        assert_eq!(client.read(12345, 9), b"as before");
    }
}

/// More reads at a time than a connection's ring takes, and a large write in the middle of them.
#[test]
fn a_large_piece_that_finds_a_store_full_and_hanging_is_given_up_with_the_rest() {
    /// What a ring of 128 takes besides what is watched.
    const FULL: u32 = 125;
    const MORE: usize = 10;
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let (scene, disk) = Scene::on_a_disk_that_can_hang();
    let data = scene.plain.repeat((1 << 20) / PLAIN);
    let reads = |from: u32| (u64::from(from)..).map(|n| request(0, READ, n, n << 12, 4096));
    disk.signal("-STOP");
    let mut client = Raw::connected(&scene.daemon.dir.path().join("nbd/w.sock"), "w");
    for read in reads(0).take(usize::try_from(FULL).unwrap()) {
        client.send(&read);
    }
    until("the ring is full", || scene.in_flight("w") >= f64::from(FULL));
    client.send(&[request(0, WRITE, FULL.into(), 4 << 20, 1 << 20), data.clone()].concat());
    client.send(&reads(FULL + 1).take(MORE).collect::<Vec<_>>().concat());
    // With one processor nothing more is looked at before it can be written.
    let taken = FULL + if available_parallelism().unwrap().get() > 1 { 2 } else { 1 };
    until("it has been encrypted elsewhere, or waits", || scene.in_flight("w") >= f64::from(taken));
    scene.customer.set_enabled(false);
    until("the volume is fenced", || scene.daemon.state("w") == "fenced");
    assert!(scene.found().is_empty(), "fenced, and the store hangs: {:?}", scene.found());
    let all = usize::try_from(FULL).unwrap() + 1 + MORE;
    assert_eq!(errors(&mut client, all), vec![1; all], "EPERM");
    disk.signal("-CONT");
    scene.customer.set_enabled(true);
    until("it is served again", || scene.daemon.state("w") == "serving");
    assert_eq!(client.write(4 << 20, &data), 0);
    assert!(client.read(4 << 20, 1 << 20) == data);
}

/// The start of the volume `w`, which its store answers from a cache when it hangs.
const CACHED: u32 = 2 << 20;

/// A volume `w` whose store hangs but for its start, where the plaintext is, and clients of it.
fn hanging_behind_its_start(clients: usize) -> (Scene, HangingDisk, Vec<Raw>) {
    let (scene, disk) = Scene::on_a_disk_that_can_hang();
    scene.daemon.ok(&["detach", "w"]);
    scene.daemon.define("w", "direct = \"off\"");
    scene.daemon.ok(&["attach", "w"]);
    let socket = scene.daemon.dir.path().join("nbd/w.sock");
    let mut clients: Vec<_> = (0..clients).map(|_| Raw::connected(&socket, "w")).collect();
    // Each has opened the store, which forgets what was cached before.
    assert!(clients.iter_mut().all(|client| client.read(0, 1).len() == 1));
    let data = scene.plain.repeat(CACHED as usize / PLAIN);
    assert_eq!(clients[0].write(0, &data), 0);
    assert!(clients[0].read(0, CACHED) == data);
    until("none is kept", || !scene.found().contains(&"plaintext"));
    disk.signal("-STOP");
    (scene, disk, clients)
}

/// A read that is answered as a whole, and is done in part when the store hangs.
fn half_a_read() -> Vec<u8> {
    request(0, READ, 1, 0, 6 << 20)
}

#[test]
fn nothing_in_the_clear_is_left_of_a_client_that_has_gone_while_the_store_hangs() {
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let (scene, disk, mut clients) = hanging_behind_its_start(1);
    clients[0].send(&half_a_read());
    until("half of it is decrypted", || scene.found().contains(&"plaintext"));
    // It says something that makes no sense, before something that is not looked at any more.
    let nonsense = [request(0, FLUSH, 2, 0, 0), vec![0x5a; 28], scene.plain.repeat(16)].concat();
    clients[0].send(&nonsense);
    until("it was received", || scene.in_flight("w") == 2.0);
    assert!(scene.found().contains(&"key"));
    scene.daemon.ok(&["key", "suspend", "w"]);
    assert!(scene.found().is_empty(), "fenced, and the store hangs: {:?}", scene.found());
    drop(clients);
    disk.signal("-CONT");
}

#[test]
fn nothing_in_the_clear_is_left_of_a_volume_that_was_detached_while_its_store_hangs() {
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let (scene, disk, mut clients) = hanging_behind_its_start(40);
    clients.iter_mut().for_each(|client| client.send(&half_a_read()));
    until("each is decrypted in part", || scene.in_flight("w") == 40.0);
    assert!(scene.found().contains(&"plaintext"));
    let (code, answer) = scene.daemon.ctl(&["detach", "w"]);
    assert_eq!(code, 1, "the last flush cannot be done: {answer}");
    assert!(scene.found().is_empty(), "detached, and the store hangs: {:?}", scene.found());
    drop(clients);
    disk.signal("-CONT");
}

/// Keeps eight requests of all sizes under way, and ends at the first that fails.
const BUSY: &str = "
import random
random.seed(7)
p = bytes.fromhex('{plain}')
for at in range(0, 8 << 20, 1 << 20): h.pwrite(p * 16384, at)
ended = []
flying = 0
def over(error):
    global flying
    flying -= 1
    if error.value: ended.append(error.value)
    return 1
while not ended:
    while flying < 8 and not ended:
        size = random.choice([4096, 65536, 300 << 10, 512 << 10, 1 << 20])
        at = random.randrange(0, (7 << 20) // 4096) * 4096
        flying += 1
        if random.random() < 0.5:
            h.aio_pread(nbd.Buffer(size), at, over)
        else:
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray((p * (size // 64 + 1))[:size])), at, over)
    h.poll(-1)
while flying: h.poll(-1)
assert set(ended) == {1}, ended
";

#[test]
fn nothing_in_the_clear_is_left_in_memory_that_was_used_before() {
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let (scene, disk) = Scene::on_a_disk_that_can_hang();
    let plain: String = scene.plain.iter().map(|byte| format!("{byte:02x}")).collect();
    let script = BUSY.replace("{plain}", &plain);
    let mut clients: Vec<_> = (0..3)
        .map(|_| {
            let mut client = python_nbd();
            client.args(["-u", &scene.daemon.uri("w"), "-c", &script]).stdin(Stdio::null());
            Running(client.spawn().unwrap())
        })
        .collect();
    until("all are busy", || scene.requests("w") > 500.0);
    // In the middle of it the store hangs, with requests of all kinds in it.
    disk.signal("-STOP");
    let mut before = 0.0;
    until("nothing goes on", || {
        let now = scene.requests("w");
        std::mem::replace(&mut before, now) == now && scene.in_flight("w") >= 6.0
    });
    scene.customer.set_enabled(false);
    until("the volume is fenced", || scene.daemon.state("w") == "fenced");
    assert!(scene.found().is_empty(), "fenced, and the store hangs: {:?}", scene.found());
    for client in &mut clients {
        assert!(client.ends("each request was refused").success());
    }
}

#[test]
fn a_write_that_is_refused_before_all_of_it_has_come_changes_nothing() {
    if !can_scan() || !can_mount(&["nbdsh", "nbdkit"]) {
        return;
    }
    let scene = Scene::new();
    let disk = HangingDisk::new();
    disk.attach(&scene.daemon, "w", scene.customer.key.as_str());
    let mut client = Raw::connected(&scene.daemon.dir.path().join("nbd/w.sock"), "w");
    assert_eq!(client.write(1 << 20, &[b'o'; 65536]), 0);
    // Whole sectors, and a part of one; something hangs in the store before them, or nothing does.
    for (hangs, offset) in [(true, 1 << 20), (true, (1 << 20) + 777), (false, 1 << 20)] {
        if hangs {
            disk.signal("-STOP");
            client.send(&request(0, READ, 1, 0, 4096));
        }
        client.send(&request(0, WRITE, 2, offset, 3000 + 4096));
        client.send(&[b'n'; 1000]);
        let asked = if hangs { 2.0 } else { 1.0 };
        until("it has come in part", || scene.in_flight("w") == asked);
        scene.customer.set_enabled(false);
        until("the volume is fenced", || scene.daemon.state("w") == "fenced");
        let answers = if hangs { 2 } else { 1 };
        assert_eq!(errors(&mut client, answers), vec![1; answers], "EPERM");
        disk.signal("-CONT");
        scene.customer.set_enabled(true);
        until("it is served again", || scene.daemon.state("w") == "serving");
        client.send(&[b'n'; 2000 + 4096]);
        assert!(client.read(1 << 20, 65536) == [b'o'; 65536], "as it was: {offset}");
    }
}

#[test]
fn each_thing_that_is_searched_for_is_found_where_it_is() {
    if !can_scan() {
        return;
    }
    let mut bytes = vec![0; 64 + PLAIN];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    // The search has in its own memory what it searches for.
    let found = Needles::new(&bytes[..64], &bytes[64..]).found(std::process::id());
    assert_eq!(found, ["data round keys", "key", "key in base64", "plaintext", "tweak round keys"]);
}

#[test]
fn the_key_is_in_no_log_environment_argument_answer_swap_or_core() {
    if !can_scan() {
        return;
    }
    let scene = Scene::new();
    scene.daemon.ok(&["attach", "v"]);
    scene.work();
    let pid = scene.daemon.pid();
    let mut said = scene.daemon.log().into_bytes();
    assert!(String::from_utf8_lossy(&said).contains("DEBUG"), "it logs all it can");
    for file in ["environ", "cmdline"] {
        said.extend(std::fs::read(format!("/proc/{pid}/{file}")).unwrap());
    }
    said.extend(scene.daemon.ok(&["status"]).to_string().into_bytes());
    let trail = scene.daemon.dir.path().join("audit/audit-000000000001.jsonl");
    let trail = std::fs::read(trail).unwrap();
    assert!(trail.windows(8).any(|word| word == b"\"attach\""), "the trail is read");
    said.extend(trail);
    for (what, needles) in &scene.needles.0 {
        for needle in needles {
            let hex: String = needle.iter().map(|byte| format!("{byte:02x}")).collect();
            for shape in [needle.clone(), hex.into_bytes(), format!("{needle:?}").into_bytes()] {
                assert!(memchr::memmem::find(&said, &shape).is_none(), "{what} was said");
            }
        }
    }
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let swapped: u64 = smaps
        .lines()
        .filter_map(|line| {
            line.strip_prefix("Swap:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        })
        .sum();
    assert_eq!(swapped, 0, "nothing is swapped");
    let heap = smaps.split("[heap]").nth(1).and_then(|rest| rest.split("VmFlags:").nth(1)).unwrap();
    assert!(heap.lines().next().unwrap().contains(" lo"), "the heap is locked: {heap}");
    let limit = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limit.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "no core dumps");
}
