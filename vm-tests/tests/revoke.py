"""A key taken away under load: errors in time, nothing hangs, no plaintext and no key left in the machine's
memory, and all that was acknowledged is there when the key is back."""

import hashlib
import json
import time
from datetime import datetime

from benches.parts.scan import round_keys
from harness.case import expect, volume_key
from harness.service import LINK, check_syncs, record_syncs, served, volume

# The probe interval and two seconds, which is what is promised; and for emulation beside another guest.
BOUND = 3
EMULATED = 12
# Reads a file through a mapping, and keeps it.
MAP = """exec python3 -c '
import mmap, signal
file = open("/mnt/canary", "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
file.close()
sum(mapped[::4096])
open("/run/mapped", "w")
signal.pause()'"""


def on_ext4_all_is_gone_with_those_who_map_it(case):
    guest, kms, key, needles = under_load(case, "ext4", 'end = "processes"')
    running = [guest.start(MAP), record_syncs(guest)]
    purged(guest, kms, key, running)
    for one in running:
        status, _ = one.wait(timeout=60)
        expect(status != 0, "it saw no error")
    expect_in_memory(guest, needles, set())
    comes_back(guest, kms, key, "fsck.ext4 -p /dev/byokd/v")
    guest.shut_down()


def on_xfs_who_maps_it_is_named_and_it_is_gone_with_them(case):
    guest, kms, key, needles = under_load(case, "xfs", "")
    holder = guest.start(MAP)
    running = record_syncs(guest)
    purged(guest, kms, key, [running])
    status, said = running.wait(timeout=60)
    expect(status == 1 and "Input/output error" in said, f"no error: {status} {said[-500:]}")
    expect(not holder.ended(), "nobody was to be ended")
    said = guest.run("byokctl status v")
    expect("python3" in said and "still-mapped" in said, f"who maps it is not named: {said}")
    # What it has mapped is still there, and nothing else of it.
    expect_in_memory(guest, needles, {"canary"})
    guest.run("pkill -f [i]mport.mmap")
    holder.wait()
    guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    expect_in_memory(guest, needles, set())
    comes_back(guest, kms, key, "true")
    guest.shut_down()


def with_all_options_groups_mounts_and_the_device_go_as_well(case):
    """By a daemon and a helper that are confined as their units say."""
    definition = '[purge]\nstep_timeout = "60s"\nend = "groups"\nunmount = true\ndisconnect = true'
    guest, kms, key = served(case, definition=definition)
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt && head -c 1M /dev/urandom >/mnt/canary")
    guest.put("/run/pod", f"sleep infinity &\n{MAP}\n")
    # One of a pod's two processes maps a file; who has the mount in a namespace of its own uses nothing of it.
    guest.run("""systemd-run -q --unit=pod bash /run/pod
        systemd-run -q --unit=elsewhere unshare --mount --propagation private sleep infinity
        systemd-run -q --unit=bystander sleep infinity""")
    syncs = record_syncs(guest)
    guest.until("the load is under way", "[ -e /run/mapped ] && [ \"$(wc -l </run/syncs)\" -gt 20 ]")
    there = "nsenter --mount --target $(systemctl show -p MainPID --value elsewhere) findmnt /mnt"
    guest.run(there)
    kms.disable(key)
    guest.until("the device is gone", "[ ! -e /sys/block/nbd0/pid ] && ! findmnt /mnt")
    expect(syncs.wait(timeout=60)[0] != 0, "the load saw no error")
    guest.run("! systemctl is-active pod && systemctl is-active bystander elsewhere")
    status, said = guest.attempt(there)
    expect(status != 0, f"it is mounted elsewhere: {said}")
    status, said = guest.attempt("byokctl attach v --device auto")
    expect(status != 0 and "is disabled" in said, f"attached without its key: {said}")
    kms.enable(key)
    guest.run(f"byokctl attach v --device auto && {{ fsck.ext4 -p {LINK}; [ $? -le 1 ]; }} && mount {LINK} /mnt")
    case.say(check_syncs(guest).strip())
    guest.run("umount /mnt && udevadm settle && byokctl detach v")
    expect("blocked for more than" not in guest.dmesg(), "a task hung")
    guest.shut_down()


def a_purge_waits_for_the_end_of_the_hold_and_is_in_the_audit_trail(case):
    guest, kms, key = served(case)
    guest.run("""sed -i 's/^on_denial = .*/on_denial = "hold"\\nhold_for = "15s"/' /etc/byokd/volumes.d/v.toml""")
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt && echo there >/mnt/file && sync -f /mnt")
    kms.disable(key)
    guest.until("it is fenced", "byokctl --json volume show v | grep -Eq '\"state\": ?\"fenced\"'")
    waiting = guest.start(f"dd if={LINK} of=/dev/null bs=4k count=1 iflag=direct")
    guest.run("grep there /mnt/file && ! journalctl -q -u byokd | grep 'purge of cached plaintext'")
    expect(not waiting.ended(), "a request did not wait")
    guest.until("the purge is done", "byokctl status v | grep -q still-mapped", timeout=90)
    expect(waiting.wait(timeout=60)[0] != 0, "a request was answered without the key")
    trail = [json.loads(line) for line in guest.run("byokctl audit export --volume v").splitlines()]
    steps = [record["detail"]["step"] for record in trail if record["event"] == "purge"]
    expect(steps[0] == "mapped" and steps[-1] == "still-mapped" and len(steps) > 3, f"steps: {steps}")
    first = {kind: next(record["time"] for record in trail if record["event"] == kind) for kind in ("fence", "purge")}
    held = datetime.fromisoformat(first["purge"]) - datetime.fromisoformat(first["fence"])
    expect(held.total_seconds() >= 14, f"held for {held}")
    status, _ = guest.attempt("cat /mnt/file")
    expect(status != 0, "the file system is still there")
    kms.enable(key)
    guest.until("it serves again", "byokctl status v | grep -q serving")
    # Who has it mounted is told what to do about it, and that does.
    guest.until("the damage is seen", "byokctl --json volume show v | grep -q 'umount /mnt'")
    (recover,) = volume(guest)["device"]["recover"]
    guest.run(f"{recover} && grep there /mnt/file && umount /mnt && udevadm settle && byokctl detach v")
    guest.run("byokctl audit verify")
    expect("blocked for more than" not in guest.dmesg(), "a task hung")


def under_load(case, file_system, purge):
    """A volume with a canary on it, in use. Free memory is wiped, as docs/operations.md tells those who need it."""
    disk = case.disk("v", 400 << 20)
    # Under emulation the kernel may take half a minute to drop what it has cached.
    definition = f'[purge]\nstep_timeout = "60s"\n{purge}'
    guest, kms, key = served(case, definition=definition, backing="/dev/vdc", size="0", memory=640, cpus=2,
                             disks=[f"file={disk},format=raw"], append="init_on_free=1")
    # udev is not kept from the disk under the volume, nor whoever waits for udev.
    guest.run(f"byokctl attach v --device auto && udevadm trigger /dev/vdc && udevadm settle --timeout=60 && mkfs.{file_system} -q {LINK} && mount {LINK} /mnt")
    # The guest makes it, so that it comes by no other way.
    seed = case.random.randbytes(8).hex()
    guest.run(f"""python3 -c 'import hashlib; canary = hashlib.sha512(b"{seed}").digest()
open("/mnt/canary", "wb").write(canary * 16384)' && sync && cat /mnt/canary | wc -c""")
    canary = hashlib.sha512(seed.encode()).digest()
    # Not the key in base64: here, KMS is asked without TLS, so that it lies in the kernel's network buffers.
    master = volume_key(disk, kms)
    needles = {"key": [master[at:at + 16] for at in range(0, 64, 16)],
               "round keys": some_round_keys(master[:32]) + some_round_keys(master[32:]), "canary": [canary]}
    # The search finds what is there.
    expect_in_memory(guest, needles, set(needles))
    return guest, kms, key, needles


def purged(guest, kms, key, running):
    """Denies the key under load, sees errors in time, and waits for the purge."""
    guest.until("the load is under way", "[ -e /run/mapped ] && [ \"$(wc -l </run/syncs)\" -gt 20 ]")
    expect(not any(one.ended() for one in running), "the load ended by itself")
    begun = time.monotonic()
    kms.disable(key)
    guest.until("errors", "! dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null")
    took = time.monotonic() - begun
    bound = BOUND + (EMULATED if guest.accelerator == "tcg" else 0)
    expect(took < bound, f"errors only {took:.1f} s of {bound} after the key was disabled")
    guest.until("the purge is done", "byokctl status v | grep -q still-mapped")


def comes_back(guest, kms, key, repair):
    kms.enable(key)
    guest.until("it serves again", "byokctl status v | grep -q serving")
    guest.run(f"umount /mnt && {{ {repair}; [ $? -le 1 ]; }} && mount {LINK} /mnt")
    print(check_syncs(guest).strip(), flush=True)
    guest.run("umount /mnt && udevadm settle && byokctl detach v")
    expect("blocked for more than" not in guest.dmesg(), "a task hung")


def some_round_keys(key):
    """Some of AES-256's 15 round keys; the first two are the key."""
    return [round_keys(key)[number] for number in (2, 8, 14)]


def expect_in_memory(guest, needles, wanted):
    """These of the needles are in the guest's memory, and no others."""
    dump = guest.memory_dump()
    seen = {}
    overlap = b""
    with open(dump, "rb") as file:
        while piece := file.read(16 << 20):
            at = file.tell() - len(piece) - len(overlap)
            piece = overlap + piece
            for name, all_of_it in needles.items():
                places = [piece.find(needle) for needle in all_of_it]
                seen.setdefault(name, []).extend(hex(at + place) for place in places if place >= 0)
            overlap = piece[-64:]
    seen = {name: places for name, places in seen.items() if places}
    expect(set(seen) == wanted, f"in the memory at: {seen}; expected: {wanted}")
    dump.unlink()


on_ext4_all_is_gone_with_those_who_map_it.time_limit = 900
on_xfs_who_maps_it_is_named_and_it_is_gone_with_them.time_limit = 900
