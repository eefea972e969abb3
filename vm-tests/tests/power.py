"""The power goes, of a machine whose disk has a volatile cache: what was acknowledged as synced is there."""

import time

from harness.case import expect, plain, start_byokd
from harness.disk import ServedDisk
from harness.waiting import wait_for

ATTACH = """
    mkdir -p /run/byokd-kernel
    setsid /payload/byokd-kernel --listen /run/byokd-kernel/kernel.sock >>/run/byokd-kernel.log 2>&1 </dev/null &
    until [ -S /run/byokd-kernel/kernel.sock ]; do sleep 0.1; done
    /payload/byokctl attach v --device /dev/nbd0"""
# Its records leave the guest as they are acknowledged, each before the next one begins.
LOAD = "exec /payload/sync-load /mnt/{directory} /dev/$(cd /sys/class/virtio-ports && grep -l records */name | cut -d/ -f1)"


def what_was_acknowledged_survives_power_cuts_under_sync_load(case):
    kms = case.kms()
    key = kms.key()
    disk = ServedDisk(case, 256 << 20, volatile=True)
    guest = definition = records = None
    acknowledged = 0
    cuts = case.times(3, 20)
    for cut in range(cuts + 1):
        disk.turn_on()
        if cut == cuts:
            # The last time it really boots; until then, a machine that has knows nothing of the disk.
            guest = case.guest("booted", disks=[disk.drive]).boot()
            plain(guest)
        else:
            guest = guest.restore() if guest else case.prepared(plain, disks=[disk.drive])
            records = guest.place / "records"
        if definition:
            guest.put("/etc/byokd/volumes.d/v.toml", definition)
        start_byokd(guest, kms)
        if definition is None:
            guest.run(f"/payload/byokctl volume create v --backing /dev/vdc --size 0 --key {key} --purpose zeebe")
            definition = guest.run("cat /etc/byokd/volumes.d/v.toml")
            guest.run(ATTACH + "&& mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt")
        else:
            # The journal is replayed, and then there is nothing to mend.
            guest.run(ATTACH + "&& mount /dev/nbd0 /mnt && umount /mnt && fsck.ext4 -fn /dev/nbd0 && mount /dev/nbd0 /mnt")
            guest.put("/run/records", records.read_bytes())
            said = guest.run(f"/payload/sync-load --check /mnt/{cut - 1} /run/records && rm -r /mnt/{cut - 1}")
            case.say(f"cut {cut}: {said.strip()}")
            acknowledged += int(said.split()[0])
        guest.clean_dmesg(allowed=("recovery complete",))
        if cut == cuts:
            break
        records.write_bytes(b"")
        running = guest.start(LOAD.format(directory=cut))
        # The header is written meanwhile, too.
        guest.start("while /payload/byokctl key rewrap v; do :; done")
        wait_for(lambda: records.read_bytes().count(b"\n") > 20, "syncs under way")
        time.sleep(case.random.random() * 3)
        expect(not running.ended(), "the load ended by itself")
        disk.cut_power()
        guest.cut_power()
    expect(acknowledged >= cuts * 20, f"only {acknowledged} syncs were acknowledged")


what_was_acknowledged_survives_power_cuts_under_sync_load.time_limit = 1500
