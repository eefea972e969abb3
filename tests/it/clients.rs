//! libnbd, qemu and fio against a volume in service.

use std::process::Command;

use crate::support::{Daemon, have, nbdsh, nbdsh_unconnected, python_nbd, run, until};

#[test]
fn nbdinfo_sees_what_is_promised() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.volume("v", "64M", &daemon.key());
    let info = run(Command::new("nbdinfo").args(["--json", &daemon.uri("v")]));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 64 << 20, "capacity asked for is capacity served");
    for can in ["flush", "fua", "trim", "zero", "multi_conn", "df", "cache", "fast_zero"] {
        assert_eq!(export[format!("can_{can}")], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 64 << 20);
    assert_eq!(export["contexts"][0], "base:allocation");
}

#[test]
fn fio_verifies_what_it_wrote_in_many_sizes_over_many_connections() {
    if !have(&["fio"]) {
        return;
    }
    for daemon in [Daemon::start(), Daemon::start_on_disk()] {
        daemon.volume("v", "256M", &daemon.key());
        let jobs =
            |name: &str, offset: &str, extra: &str| format!("[{name}]\noffset={offset}\n{extra}\n");
        let file = daemon.dir.path().join("verify.fio");
        let text = format!(
            "[global]\nioengine=nbd\nuri={}\nsize=48m\nrw=randwrite\niodepth=16\nverify=crc32c\nverify_fatal=1\n{}{}{}{}",
            daemon.uri("v"),
            jobs("pages", "0", "bs=4k"),
            jobs("mixed", "64m", "bsrange=4k-1m"),
            jobs("unaligned", "128m", "bsrange=512-256k\nblockalign=512"),
            jobs("small", "192m", "bs=512\nsize=2m"),
        );
        std::fs::write(&file, text).unwrap();
        // It leaves its state in the directory it runs in.
        run(Command::new("fio").arg(&file).current_dir(daemon.dir.path()));
    }
}

#[test]
fn nbdcopy_and_qemu_agree_on_the_bytes() {
    if !have(&["nbdcopy", "qemu-img", "qemu-io"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.volume("v", "32M", &daemon.key());
    let dir = daemon.dir.path();
    let (source, back) = (dir.join("source"), dir.join("back"));
    let bytes: Vec<u8> =
        (0..32u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&source, &bytes).unwrap();
    run(Command::new("nbdcopy").arg(&source).arg(daemon.uri("v")));
    run(Command::new("nbdcopy").arg(daemon.uri("v")).arg(&back));
    assert!(std::fs::read(&back).unwrap() == bytes);
    run(Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", "raw"])
        .arg(&source)
        .arg(daemon.uri("v")));
    let script = ["write -P 0x5a 4097 70000", "read -P 0x5a 4097 70000", "flush"];
    let mut qemu_io = Command::new("qemu-io");
    for line in script {
        qemu_io.args(["-c", line]);
    }
    let said = run(qemu_io.args(["-f", "raw", &daemon.uri("v")]));
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn the_backing_file_holds_no_plaintext() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.volume("v", "8M", &daemon.key());
    nbdsh(&daemon.uri("v"), "h.pwrite(b'a customer secret' * 1024, 4096)\nh.flush()");
    let bytes = std::fs::read(daemon.backing("v")).unwrap();
    assert!(!bytes.windows(17).any(|w| w == b"a customer secret"));
}

#[test]
fn every_command_does_what_the_protocol_says() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.volume("v", "8M", &daemon.key());
    nbdsh(
        &daemon.uri("v"),
        r"
import errno
def refused(number, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == errno.errorcode[number], error.errno
    else:
        raise AssertionError('not refused')
h.set_strict_mode(0)
size = h.get_size()
h.pwrite(b'x' * 100000, 12345)
assert h.pread(100000, 12345) == b'x' * 100000
h.zero(5000, 20000)
assert h.pread(5000, 20000) == bytes(5000), 'zeroes read back as zeroes'
assert h.pread(1, 19999) == b'x' and h.pread(1, 25000) == b'x'
h.zero(1 << 20, 2 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(1 << 20, 2 << 20) == bytes(1 << 20)
refused(errno.ENOTSUP, lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO))
h.trim(1 << 20, 2 << 20)
h.cache(4096, 0)
h.flush()
h.pwrite(b'y' * 4096, size - 4096, nbd.CMD_FLAG_FUA)
assert h.pread(4096, size - 4096, nbd.CMD_FLAG_DF) == b'y' * 4096
assert h.pread(4 << 20, 0)[12345:12346] == b'x', 'larger than one buffer'
refused(errno.ENOSPC, lambda: h.pwrite(b'z' * 4096, size - 100))
refused(errno.EINVAL, lambda: h.pread(4096, size - 100))
refused(errno.EINVAL, lambda: h.trim(4096, size))
",
    );
    let uri = daemon.uri("v");
    run(python_nbd().args([
        "-c",
        &format!(
            r"
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri('{uri}')
seen = []
h.block_status(h.get_size(), 0, lambda name, offset, entries, error: seen.extend(entries))
assert sum(seen[0::2]) == h.get_size(), seen
assert all(flags in (0, nbd.STATE_HOLE) for flags in seen[1::2]), 'no hole reads as zero'
assert nbd.STATE_HOLE in seen[1::2]
"
        ),
    ]));
}

#[test]
fn a_read_only_volume_takes_no_writes() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    daemon.create("v", "8M", &daemon.key());
    daemon.ok(&["attach", "v", "--read-only"]);
    nbdsh(
        &daemon.uri("v"),
        r"
assert h.is_read_only()
h.set_strict_mode(0)
try:
    h.pwrite(b'x' * 4096, 0)
except nbd.Error as error:
    assert error.errno == 'EPERM', error.errno
else:
    raise AssertionError('not refused')
h.pread(4096, 0)
",
    );
}

#[test]
fn a_denied_key_fences_and_a_restored_one_serves_on_the_same_connection() {
    if !have(&["nbdsh"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let ctl = env!("CARGO_BIN_EXE_byokctl");
    let dir = daemon.dir.path().display();
    for (take, give) in [("disable", "enable"), ("deny", "allow"), ("delete", "restore")] {
        nbdsh(
            &daemon.uri("v"),
            &format!(
                r"
import subprocess, time
def key(word):
    subprocess.run(['{ctl}', '--json', 'dev', 'key', '--state-dir', '{dir}', word, '{key}'], check=True, stdout=subprocess.DEVNULL)
def works():
    try:
        return h.pread(4096, 0) == b'm' * 4096
    except nbd.Error as error:
        assert error.errno == 'EPERM', error
        return False
h.pwrite(b'm' * 4096, 0)
h.flush()
key('{take}')
start = time.monotonic()
while works():
    assert time.monotonic() < start + 3.3, 'fenced within the probe interval and 2 s'
key('{give}')
start = time.monotonic()
while not works():
    assert time.monotonic() < start + 30, 'served again'
"
            ),
        );
        assert_eq!(daemon.state("v"), "serving");
    }
}

/// After the header of a simple reply there is no way to report an error, so it may go out only
/// once all data is there; the kernel's client speaks nothing else.
#[test]
fn a_fence_that_closes_during_large_simple_reads_breaks_no_connection() {
    if !have(&["nbdsh"]) {
        return;
    }
    for daemon in [Daemon::start(), Daemon::start_on_disk()] {
        let key = daemon.key();
        daemon.volume("v", "32M", &key);
        let ctl = env!("CARGO_BIN_EXE_byokctl");
        let dir = daemon.dir.path().display();
        nbdsh_unconnected(&format!(
            r"
import subprocess, time
def key(word):
    subprocess.run(['{ctl}', '--json', 'dev', 'key', '--state-dir', '{dir}', word, '{key}'], check=True, stdout=subprocess.DEVNULL)
h.set_request_structured_replies(False)
h.connect_uri('{uri}')
assert not h.get_structured_replies_negotiated()
data = bytes(i * 7 % 251 for i in range(1 << 16)) * 400
h.pwrite(data, 1000)
def works():
    try:
        assert h.pread(len(data), 1000) == data
        return True
    except nbd.Error as error:
        assert error.errno == 'EPERM', error
        return False
for _ in range(2):
    key('disable')
    start = time.monotonic()
    while works():
        assert time.monotonic() < start + 3.3, 'fenced within the probe interval and 2 s'
    key('enable')
    start = time.monotonic()
    while not works():
        assert time.monotonic() < start + 30, 'served again'
",
            uri = daemon.uri("v")
        ));
    }
}

#[test]
fn a_client_that_comes_while_the_volume_is_fenced_is_told_why() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("fenced", || daemon.state("v") == "fenced");
    let refused = crate::support::output(
        Command::new("nbdinfo").arg(daemon.uri("v")).env("LIBNBD_DEBUG", "1"),
    );
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("KMS denied"), "{said}");
}
