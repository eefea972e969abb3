"""Volumes as /dev/nbdX: attached by byokd-kernel, over restarts and crashes, and revoked."""

import pathlib
import time

from harness.case import expect
from harness.disk import ServedDisk
from harness.service import (LINK, another_daemon_serves, check_syncs, define, device, end_load, goes_on, load,
                             record_syncs, served, volume)

# What the kernel says of a connection that it gives up and of requests that it sends again.
TIMED_OUT = "Connection timed out, retrying"
# `request_timeout` where stalls are measured, in seconds, and what they may be beyond what systemd and the kernel take,
# in milliseconds; emulated beside other guests, three times that.
PATIENCE = 10
UPTIME = "cut -d' ' -f1 /proc/uptime"
BEYOND = 2000
# What a restart takes at most while a store hangs, in milliseconds.
RESTART_BESIDE_A_HANG = 60_000
# What Debian's package does before it is removed.
PRERM = pathlib.Path(__file__).parents[2] / "packaging/debian/prerm"


def a_volume_is_attached_used_and_detached(case):
    guest, _, _ = served(case, size="448M")
    guest.run("byokctl attach v --device auto")
    guest.run(f"test -b {LINK} && test $(cat /sys/block/nbd0/queue/rotational) = 0")
    expect(guest.run("cat /sys/block/nbd0/queue/logical_block_size").strip() == "4096", "blocks of 4096 bytes")
    uuid = volume(guest)["uuid"]
    expect(guest.run("cat /sys/block/nbd0/backend").strip() == uuid, "the backend identifier is the volume's uuid")
    for file_system in ("ext4", "xfs"):
        guest.run(f"mkfs.{file_system} -q {'-f' if file_system == 'xfs' else '-F'} {LINK} && mount {LINK} /mnt")
        load(guest, 5).succeeds()
        guest.run("rm /mnt/file && sync && fstrim -v /mnt")
        status, said = guest.attempt("byokctl detach v")
        expect(status == 5 and "mounted on /mnt" in said, f"detached while mounted: {status} {said}")
        guest.run("umount /mnt")
    guest.run(f"printf ',200M\\n,\\n' | sfdisk -q {LINK} && udevadm settle && test -b {LINK}-part1 -a -b {LINK}-part2")
    guest.run(f"mkfs.ext4 -q {LINK}-part2 && mount {LINK}-part2 /mnt && echo there >/mnt/file && umount /mnt")
    status, said = guest.attempt(f"exec 3<{LINK}; byokctl detach v")
    expect(status == 5 and "opened by" in said, f"detached while open: {said}")
    guest.run(f"byokctl detach v && udevadm settle && test ! -e {LINK}")
    guest.run(f"byokctl attach v --device /dev/nbd5 --read-only && test $(cat /sys/block/nbd5/ro) = 1 && udevadm settle")
    guest.run(f"mount -o ro {LINK}-part2 /mnt && grep there /mnt/file && umount /mnt && byokctl detach v")
    guest.clean_dmesg()


def a_volume_grows_while_it_is_mounted(case):
    guest, _, _ = served(case, size="384M")
    guest.run("byokctl attach v --device auto")
    for file_system, grow, size in (("ext4 -F", f"resize2fs {LINK}", 448), ("xfs -f", "xfs_growfs /mnt", 512)):
        guest.run(f"mkfs.{file_system} -q {LINK} && mount {LINK} /mnt && echo there >/mnt/before")
        running = load(guest, 8)
        blocks = int(guest.run("stat -f -c %b /mnt"))
        guest.run(f"byokctl volume resize v --size {size}M && {grow}")
        expect(int(guest.run(f"blockdev --getsize64 {LINK}")) == size << 20, "the device has grown")
        expect(int(guest.run("stat -f -c %b /mnt")) > blocks, "the file system has grown")
        running.succeeds()
        # Over a restart as well.
        guest.run("systemctl restart byokd && grep there /mnt/before && umount /mnt")
    status, said = guest.attempt("byokctl volume resize v --size 64M")
    expect(status == 2 and "only grows" in said, said)
    guest.run("udevadm settle; byokctl detach v && byokctl volume resize v --size 576M && byokctl attach v --device auto")
    expect(int(guest.run(f"blockdev --getsize64 {LINK}")) == 576 << 20, "grown while detached")
    guest.clean_dmesg()


def wrong_devices_are_refused_and_leave_nothing(case):
    guest, _, _ = served(case)
    status, said = guest.attempt("byokctl attach v --device /dev/sda")
    expect(status == 2 and "/dev/nbdN" in said, said)
    guest.run("""truncate -s 8M /tmp/x; nbdkit -U /tmp/x.sock file /tmp/x
        udevadm settle; nbd-client -unix /tmp/x.sock /dev/nbd0""")
    status, said = guest.attempt("byokctl attach v --device /dev/nbd0")
    expect(status == 5 and "in use" in said, said)
    expect(volume(guest)["state"] == "detached", "left detached")
    guest.run("byokctl attach v --device auto")
    expect(device(guest)["path"] == "/dev/nbd1", "the first free one")
    guest.run("byokctl detach v && udevadm settle && nbd-client -d /dev/nbd0 && udevadm settle")
    guest.run("systemctl stop byokd-kernel.socket byokd-kernel.service")
    status, said = guest.attempt("byokctl attach v --device auto")
    expect(status == 5 and "byokd-kernel.socket" in said, said)
    guest.run("systemctl start byokd-kernel.socket; udevadm settle; modprobe -r nbd")
    status, said = guest.attempt("byokctl attach v --device auto")
    expect(status == 5 and "modprobe nbd" in said, said)
    guest.run("modprobe nbd && byokctl attach v --device auto")
    # Somebody disconnects it by hand.
    guest.run("udevadm settle; nbd-client -d /dev/nbd0")
    guest.until("that is noticed", "byokctl status v | grep -q 'disconnected by someone else'")
    expect(volume(guest)["state"] == "detached", "a clean state")
    guest.run("udevadm settle; byokctl attach v --device auto && byokctl detach v")
    # Not refused, but it may not do well.
    stalls = "journalctl -q -u byokd | grep 'several connections may stall on this kernel'"
    guest.run(f"udevadm settle; ! {stalls} && byokctl attach v --device auto --connections 2")
    guest.until("it is warned of", stalls)


# What byokd asks, asked by somebody who has become its user.
ASK = """runuser -u byokd -- python3 -c '
import json, socket, sys
ask = json.loads(sys.argv[1]) | {"index": 0, "volume": open("/sys/block/nbd0/backend").read().strip()}
helper = socket.socket(socket.AF_UNIX)
helper.connect("/run/byokd-kernel/kernel.sock")
helper.sendall(json.dumps(ask).encode() + b"\\n")
print(helper.makefile().readline())'"""
ASKS = ('{"ask": "disconnect"}', '{"ask": "reconfigure", "size": null}', '{"ask": "holders", "mapped": true}',
        '{"ask": "damaged"}', '{"ask": "purge", "step": "shut-down"}', '{"ask": "purge", "step": "end-groups"}')


def devices_of_others_are_left_alone_and_those_from_before_are_adopted(case):
    records = "/run/byokd-kernel/devices"
    guest, _, _ = served(case)
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    expect(guest.run(f"cat {records}/0").split() == [volume(guest)["uuid"]], "what is recorded")
    guest.run(f"! runuser -u byokd -- ls {records}")
    guest.put("/run/prerm", PRERM.read_text())
    status, said = guest.attempt("sh /run/prerm remove")
    expect(status == 1 and "byokctl detach" in said, f"the package is removed from under it: {status} {said}")
    # Without its record it is as any device of others that has a uuid: everybody can read that.
    guest.run(f"rm {records}/0")
    for ask in ASKS:
        said = guest.run(f"{ASK} '{ask}'")
        expect("not-ours" in said, f"{ask}: {said}")
    guest.run("echo there >/mnt/file && sync && grep there /mnt/file")
    # As an upgrade from a version without records finds it.
    guest.run(f"rm -r {records}; systemctl kill -s KILL byokd")
    guest.until("its connections wait for that", "journalctl -q -u byokd | grep -q 'byokd-kernel --adopt'")
    guest.run("byokd-kernel --adopt")
    guest.until("it serves", "byokctl status v | grep -q serving")
    guest.run(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct && echo on >>/mnt/file && sync && umount /mnt")
    guest.run(f"udevadm settle; byokctl detach v && byokctl attach v --device auto && [ $(ls {records}) = 0 ] && byokctl detach v")
    guest.clean_dmesg()
    guest.run(f"byokctl attach v --device auto && rm {records}/0 && sh /run/prerm remove && ! systemctl is-active byokd byokd-kernel")


def what_is_left_of_a_disconnected_device_is_not_served_again(case):
    guest, kms, key = served(case, definition="[purge]\ndisconnect = true")
    mount = f"byokctl attach v --device auto && {{ fsck.ext4 -p {LINK}; [ $? -le 1 ]; }} && mount {LINK} /mnt && grep there /mnt/file"
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt && echo there >/mnt/file && sync")
    guest.run("byokctl detach v --force")
    is_left_alone(guest)
    for again in ("systemctl restart byokd", "systemctl kill -s KILL byokd", "systemctl stop byokd byokd-kernel.service && systemctl start byokd"):
        guest.run_until(f"before=$(systemctl show -p MainPID --value byokd)\n{again}", "there is another daemon",
                        "[ $(systemctl show -p MainPID --value byokd) != $before ] && byokctl status v >/dev/null 2>&1")
        is_left_alone(guest)
    guest.run(f"umount /mnt && udevadm settle && {mount}")
    # By somebody else.
    guest.run("nbd-client -d /dev/nbd0")
    guest.until("that is noticed", "byokctl status v | grep -q 'disconnected by someone else'")
    guest.until("what to do is said", "byokctl status v | grep -q 'Unmount /dev/nbd0'")
    is_left_alone(guest)
    guest.run(f"umount /mnt && udevadm settle && {mount}")
    # By somebody else while no byokd is there: the kernel tells.
    guest.run("systemctl stop byokd; nbd-client -d /dev/nbd0; systemctl start byokd")
    is_left_alone(guest)
    guest.run(f"umount /mnt && udevadm settle && {mount}")
    # By the purge, as configured.
    kms.disable(key)
    guest.until("it is disconnected", "byokctl status v | grep -q 'disconnected after the fence'")
    kms.enable(key)
    is_left_alone(guest)
    guest.run(f"umount /mnt && udevadm settle && {mount} && umount /mnt && udevadm settle && byokctl detach v")
    # Nobody is there who could disconnect it.
    guest.run(f"{mount} && systemctl stop byokd-kernel.socket byokd-kernel.service && byokctl detach v --force")
    guest.run("systemctl start byokd-kernel.socket && systemctl restart byokd")
    is_left_alone(guest)
    guest.run(f"umount /mnt && udevadm settle && {mount} && umount /mnt && udevadm settle && byokctl detach v")
    expect("blocked for more than" not in guest.dmesg(), "a task hung")


def is_left_alone(guest):
    for how in ("", " --device auto"):
        status, said = guest.attempt(f"byokctl attach v{how}", timeout=60)
        expect(status == 5 and "still held" in said and "mounted on /mnt" in said, f"not refused: {status} {said}")
    expect(volume(guest)["state"] == "detached", "it is served")
    status, said = guest.attempt("timeout 20 dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct")
    expect(status == 1, f"somebody answers: {status} {said}")


def restarts_and_crashes_under_load_cost_no_error(case):
    # What was under way at a crash waits for this; a slow guest needs some of it as well.
    guest, _, _ = served(case, definition='request_timeout = "6s"')
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    times = case.times(3, 20)
    syncs, running = record_syncs(guest), load(guest, 100000)
    goes_on(guest)
    for how in ("systemctl restart byokd", "systemctl kill -s KILL byokd"):
        for _ in range(times):
            # Whoever acknowledges writes after that is the next daemon.
            goes_on(guest, f"sleep {case.random.random() * 2:.2f}; {how}")
            expect(not running.ended() and not syncs.ended(), "the load ended")
    restarts = guest.run("systemctl show -p NRestarts --value byokd").strip()
    expect(restarts == str(times), f"systemd started it {restarts} times after a crash")
    end_load(guest, running)
    guest.run("umount /mnt && udevadm settle && byokctl detach v && byokctl attach v --device auto")
    guest.run(f"fsck.ext4 -fn {LINK} && mount {LINK} /mnt")
    case.say(check_syncs(guest).strip())
    guest.run("umount /mnt && udevadm settle && byokctl detach v")
    guest.clean_dmesg(allowed=(TIMED_OUT,))


def a_denied_key_is_errors_at_once_until_it_is_back(case):
    for file_system in ("ext4", "xfs"):
        case.say(file_system)
        # A request under way when the daemon is stopped is repeated after that time.
        guest, kms, key = served(case, size="384M", name=file_system, definition='request_timeout = "6s"')
        guest.run(f"byokctl attach v --device auto && mkfs.{file_system} -q {LINK} && mount {LINK} /mnt")
        guest.run("echo canary >/mnt/acknowledged && sync && cat /mnt/acknowledged")
        kms.disable(key)
        guest.until("the volume is fenced and purged", "byokctl status v | grep -q 'purge.*drop-caches'")
        status, said = guest.attempt("timeout 20 cat /mnt/acknowledged")
        expect(status == 1 and "error" in said, f"the cached file is still read: {status} {said}")
        # Denied at a restart: errors, on a live socket.
        guest.run("systemctl restart byokd")
        guest.until("the device refuses", "byokctl status v | grep -q 'answered with errors'")
        status, said = guest.attempt(f"timeout 5 dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct")
        expect(status == 1 and "Input/output error" in said, said)
        kms.enable(key)
        guest.until("it serves again", "byokctl status v | grep -q serving")
        guest.run(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct")
        guest.run(f"umount /mnt && mount {LINK} /mnt && grep canary /mnt/acknowledged")
        # Denied while there was no daemon to hear of it: the next one purges.
        guest.run("systemctl stop byokd")
        kms.disable(key)
        guest.run("cat /mnt/acknowledged && systemctl start byokd")
        guest.until("the volume is purged", "byokctl status v | grep -q 'purge.*drop-caches'")
        status, said = guest.attempt("timeout 20 cat /mnt/acknowledged")
        expect(status == 1 and "error" in said, f"the cached file is still read after a start: {status} {said}")
        kms.enable(key)
        guest.until("it serves again", "byokctl status v | grep -q serving")
        guest.run(f"umount /mnt && mount {LINK} /mnt && grep canary /mnt/acknowledged && umount /mnt")
        guest.run("udevadm settle; byokctl detach v")
        expect("blocked for more than" not in guest.dmesg(), "a task hung")
        guest.shut_down()


def a_denial_outlives_the_daemon_while_kms_is_away(case):
    guest, kms, key = served(case, definition='request_timeout = "6s"')
    direct = f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct"
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt && echo canary >/mnt/file && sync")
    kms.disable(key)
    guest.until("errors", f"! {direct} 2>/dev/null")
    kms.fault(fault="reset")
    for how in ("systemctl restart byokd", "systemctl kill -s KILL byokd"):
        guest.run_until(f"before=$(systemctl show -p MainPID --value byokd)\n{how}", "there is another daemon",
                        "[ $(systemctl show -p MainPID --value byokd) != $before ] && byokctl status v >/dev/null 2>&1")
        status, said = guest.attempt(f"timeout 5 {direct}")
        expect(status == 1 and "Input/output error" in said, f"not refused at once: {status} {said}")
        guest.until("the purge is complete", "byokctl status v | grep -q still-mapped")
        for step in ("shut-down", "flush-device", "drop-caches"):
            expect(step in guest.run("byokctl status v"), f"without {step}")
        status, said = guest.attempt("timeout 20 cat /mnt/file")
        expect(status == 1 and "error" in said, f"the cached file is still read: {status} {said}")
    kms.no_faults()
    kms.enable(key)
    guest.until("it serves again", "byokctl status v | grep -q serving")
    guest.run(f"umount /mnt && {{ fsck.ext4 -p {LINK}; [ $? -le 1 ]; }} && mount {LINK} /mnt && grep canary /mnt/file")
    # Nor does it outlive its end: trouble of KMS is just that again.
    kms.fault(fault="reset")
    guest.run("systemctl restart byokd")
    guest.until("it waits", "byokctl status v | grep -q 'wait for the key'")
    kms.no_faults()
    guest.until("it serves", "byokctl status v | grep -q serving")
    guest.run("grep canary /mnt/file && umount /mnt && udevadm settle && byokctl detach v")
    expect("blocked for more than" not in guest.dmesg(), "a task hung")


def requests_wait_for_kms_within_the_allowance(case):
    guest, kms, _ = served(case, definition='request_timeout = "3s"\n[lease]\nfail_closed_after = "40s"')
    guest.run("byokctl attach v --device auto")
    kms.fault(fault="reset")
    guest.run("systemctl kill -s KILL byokd")
    reading = guest.start(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct")
    guest.until("it waits", "byokctl status v 2>/dev/null | grep -q 'wait for the key'")
    expect(not reading.ended(), "a request did not wait")
    kms.no_faults()
    reading.succeeds()
    guest.until("it serves", "byokctl status v | grep -q serving")
    kms.fault(fault="reset")
    guest.run("systemctl kill -s KILL byokd")
    begun = time.monotonic()
    status, said = guest.attempt(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct", timeout=200)
    took = time.monotonic() - begun
    expect(status == 1 and "Input/output error" in said, said)
    # Neither at once nor because the kernel gave up waiting for a daemon.
    expect(35 < took < 75, f"a read failed after {took:.0f} s of an allowance of 40")
    kms.no_faults()
    guest.until("it serves", "byokctl status v | grep -q serving")
    # Slow: requests wait as long as it takes, and none fails.
    kms.fault(fault="latency", ms=1500)
    for how in ("systemctl restart byokd", "systemctl kill -s KILL byokd"):
        guest.run(how)
        guest.run(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct")
        guest.until("it serves", "byokctl status v 2>/dev/null | grep -q serving")


def several_connections_outlive_restarts_and_crashes(case):
    # Before 6.12 more than one connection may stall.
    guest, _, _ = served(case, kernel="6.12", cpus=2, definition='connections = 2\nrequest_timeout = "6s"')
    expect(guest.release.startswith("6.12"), guest.release)
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    expect("connections  2" in guest.run("byokctl status v"), "two connections")
    guest.run("! journalctl -q -u byokd | grep 'may stall'")
    syncs, running = record_syncs(guest), load(guest, 100000)
    for how in ("systemctl restart byokd", "systemctl kill -s KILL byokd") * case.times(1, 5):
        goes_on(guest)
        another_daemon_serves(guest, how)
        expect(not running.ended() and not syncs.ended(), "the load ended")
    end_load(guest, running)
    guest.run(f"umount /mnt && udevadm settle && fsck.ext4 -fn {LINK} && mount {LINK} /mnt")
    case.say(check_syncs(guest).strip())
    guest.clean_dmesg(allowed=(TIMED_OUT,))


def stalls_have_their_bounds(case):
    disk = ServedDisk(case, 128 << 20)
    disk.turn_on()
    guest, _, key = served(case, backing="/dev/vdc", size="0", definition=f'request_timeout = "{PATIENCE}s"', disks=[disk.drive])
    # It is meant to hang.
    guest.run("sysctl -q kernel.hung_task_timeout_secs=120")
    ways = ("systemctl restart byokd", "systemctl kill -s KILL byokd")
    beyond = BEYOND if case.accelerator == "kvm" else 3 * BEYOND
    # What systemd takes by itself, without a volume.
    alone = {how: max(up - begun for begun, _, up in (restarted(guest, how) for _ in range(3))) for how in ways}
    guest.run(f"byokctl volume create w --backing /var/lib/byokd/w.img --size 16M --key {key} --purpose zeebe")
    define(guest, f'request_timeout = "{PATIENCE}s"', "w")
    guest.run("byokctl attach v --device auto && byokctl attach w --device auto")
    probes = start_probes(guest)
    restarts = []
    for how in ways * case.times(1, 3):
        goes_on(guest)
        restarts.append((how, *restarted(guest, how)))
        guest.until("it serves", "[ $(byokctl status | grep -c serving) -ge 2 ]")
        if "KILL" in how:
            # What was under way is sent again by then, and met by nothing else.
            guest.run(f"sleep {PATIENCE + 5}")
    goes_on(guest)
    # A slow store does not look dead.
    told = guest.dmesg().count(TIMED_OUT)
    hangs_from = uptime(guest)
    disk.hang(PATIENCE * 0.6)
    goes_on(guest)
    expect(guest.dmesg().count(TIMED_OUT) == told, "a slow store was taken for a dead server")
    # A store that hangs for longer does, and that costs no error either.
    disk.hang(PATIENCE * 2.5)
    goes_on(guest)
    expect(guest.dmesg().count(TIMED_OUT) > told, "the store hung, and nobody noticed")
    writes = end_probes(guest, probes)
    for how, begun, done, up in restarts:
        crash, allowed = "KILL" in how, alone[how] + beyond
        stalled = [(begin, end) for name in "vw" for begin, end in writes[name] if begin < up and end > begun]
        new = max((end - begun for begin, end in stalled if begin >= done or not crash), default=0)
        under_way = max((end - begin for begin, end in stalled if begin < done), default=0)
        case.say(f"{how}: alone {alone[how]:.0f} ms, now {up - begun:.0f}; writes until {new:.0f} ms after it, those under way for {under_way} ms")
        expect(new <= allowed, f"writes waited {new:.0f} ms of {allowed:.0f}: {how}")
        allowed = max(allowed, PATIENCE * 1000 + beyond) if crash else allowed
        expect(under_way <= allowed, f"writes under way waited {under_way} ms of {allowed:.0f}: {how}")
    # A store that hangs is nothing to other volumes.
    longest = max(end - begin for begin, end in writes["w"] if begin > hangs_from)
    case.say(f"the other volume's longest write while the store hung: {longest} ms")
    expect(longest <= beyond, f"a write waited {longest} ms for another volume's store")
    guest.run("udevadm settle && byokctl detach v && byokctl detach w")
    guest.clean_dmesg(allowed=(TIMED_OUT,))


def a_restart_while_a_store_hangs_costs_other_volumes_no_error(case):
    disk = ServedDisk(case, 128 << 20)
    disk.turn_on()
    guest, _, key = served(case, backing="/dev/vdc", size="0", disks=[disk.drive])
    # It is meant to hang.
    guest.run("sysctl -q kernel.hung_task_timeout_secs=300")
    guest.run(f"byokctl volume create w --backing /var/lib/byokd/w.img --size 16M --key {key} --purpose zeebe")
    guest.run("byokctl attach v --device auto && byokctl attach w --device auto")
    probes = start_probes(guest)
    goes_on(guest)
    disk.stop()
    # The old daemon's last flush hangs, and keeps its process.
    guest.run("sleep 1; systemctl restart --no-block byokd")
    guest.until("the other volume is served", """byokctl status w 2>/dev/null | grep -q serving &&
        [ "$(systemctl show -p SubState --value byokd)" = running ]""")
    disk.go_on()
    goes_on(guest)
    for name, writes in end_probes(guest, probes).items():
        longest = max(end - begin for begin, end in writes)
        case.say(f"{name}: the longest write {longest} ms")
        expect(longest < RESTART_BESIDE_A_HANG, f"a write to {name} waited {longest} ms")
    guest.run("udevadm settle && byokctl detach v && byokctl detach w")
    guest.clean_dmesg(allowed=(TIMED_OUT,))


def the_kernel_hears_of_a_flush_that_failed_at_a_restart(case):
    disk = case.disk("v", 128 << 20)
    guest, _, _ = served(case, backing="/dev/vdc", size="0", disks=[f"file={disk},format=raw"])
    becomes = 'echo "0 $(blockdev --getsz /dev/vdc) {}" | dmsetup load d && dmsetup suspend --noflush --nolockfs d && dmsetup resume d'
    # A disk that fails for a while, beneath the same volume.
    guest.run(f"""echo "0 $(blockdev --getsz /dev/vdc) linear /dev/vdc 0" | dmsetup create d; udevadm settle
        sed -i 's|/dev/vdc|/dev/mapper/d|; s|^direct = .*|direct = "off"|' /etc/byokd/volumes.d/v.toml
        chown byokd $(realpath /dev/mapper/d)""")
    guest.run(f"byokctl attach v --device auto && dd if=/dev/zero of={LINK} bs=4k count=8 oflag=direct status=none")
    guest.run(becomes.format("error"))
    guest.run("systemctl restart byokd")
    guest.run(becomes.format("linear /dev/vdc 0"))
    guest.until("it serves", "byokctl status v | grep -q serving", timeout=60)
    status, said = guest.attempt(f"sync {LINK}")
    expect(status != 0 and "Input/output error" in said, f"what was lost is durable: {status} {said}")
    guest.run(f"dd if=/dev/zero of={LINK} bs=4k count=8 oflag=direct conv=fsync status=none && byokctl detach v")


def start_probes(guest):
    """Writes to the devices of `v` and `w`, one after another, each with its times."""
    return {name: guest.start(f"exec /payload/stall-probe /dev/byokd/{name} /run/probe-{name}") for name in "vw"}


def end_probes(guest, probes):
    """When each write began and ended, in milliseconds since the boot, by volume. None may have failed."""
    guest.run("pkill -TERM -f [s]tall-probe")
    writes = {}
    for name, probe in probes.items():
        status, said = probe.wait(timeout=60)
        expect(status == 0, f"a write failed: {said[-500:]}")
        writes[name] = [tuple(map(int, line.split())) for line in guest.run(f"cat /run/probe-{name}").splitlines()]
    return writes


def restarted(guest, how):
    """When it was ended so, when that was done, and when there was another one, in milliseconds since the boot."""
    pid = "$(systemctl show -p MainPID --value byokd)"
    said = guest.run_until(f"before={pid}\n{UPTIME}\n{how}\n{UPTIME}", "there is another daemon",
                           f"""pid={pid}; [ "$pid" != $before ] && [ "$pid" != 0 ] && systemctl is-active -q byokd""")
    begun, done = (float(word) * 1000 for word in said.split())
    return begun, done, int(guest.run("systemctl show --value -p ActiveEnterTimestampMonotonic byokd")) / 1000


def uptime(guest):
    return float(guest.run(UPTIME)) * 1000


def connections_outlive_a_stop_that_cannot_wait_for_an_attach(case):
    guest, kms, _ = served(case)
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt && echo there >/mnt/file && sync")
    kms.fault(fault="reset")
    guest.run("systemctl restart byokd")
    said = "journalctl -q -u byokd _PID=$(systemctl show -p MainPID --value byokd)"
    guest.until("it tries again in 5 s", f"{said} | grep -q 'not attached yet'")
    kms.no_faults()
    kms.fault(fault="timeout", ms=60000)
    attaching = guest.start("byokctl attach v")
    guest.until("an operator's attach waits for KMS", "byokctl --json volume show v | grep -Eq '\"state\": ?\"attaching\"'")
    guest.run("systemctl restart byokd")
    attaching.wait(timeout=60)
    expect("not waited for" in guest.run("journalctl -q -u byokd"), "the stop did not give the volume up")
    kms.no_faults()
    guest.until("it serves", "byokctl status v | grep -q serving")
    guest.run(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct && echo on >>/mnt/file && sync && grep there /mnt/file && umount /mnt")
    expect("took a new connection" not in guest.run("journalctl -q -u byokd"), "a connection was lost")
    guest.clean_dmesg()


def a_forced_detach_ends_whatever_hangs(case):
    disk = ServedDisk(case, 128 << 20)
    disk.turn_on()
    guest, _, _ = served(case, backing="/dev/vdc", size="0", definition='request_timeout = "30s"', disks=[disk.drive])
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    running = load(guest, 100000)
    goes_on(guest)
    disk.stop()
    guest.run("sleep 1; timeout 60 byokctl detach v --force || [ $? -ne 124 ]")
    status, _ = running.wait(timeout=60)
    expect(status != 0, "fio saw errors")
    guest.run("timeout 60 umount /mnt")
    disk.go_on()
    guest.until("the device is free", "byokctl attach v --device /dev/nbd0 2>/dev/null")
    guest.run(f"mount {LINK} /mnt && umount /mnt && udevadm settle && byokctl detach v")
    expect("blocked for more than" not in guest.dmesg(), "a task hung")


def a_busy_udev_is_no_kernel_that_does_not_let_go(case):
    guest, _, _ = served(case)
    guest.run("byokctl attach v --device auto && udevadm settle && udevadm control --stop-exec-queue")
    guest.run("byokctl detach v && [ ! -e /sys/block/nbd0/backend ]", timeout=60)
    said = guest.run("journalctl -q -u byokd")
    expect("device disconnected" in said, "it is not said")
    expect("does not let go" not in said and "may be left" not in said, "a false alarm")
    guest.run(f"udevadm control --start-exec-queue && udevadm settle && [ ! -e {LINK} ]")


restarts_and_crashes_under_load_cost_no_error.time_limit = 700
a_denied_key_is_errors_at_once_until_it_is_back.time_limit = 600
stalls_have_their_bounds.time_limit = 900
