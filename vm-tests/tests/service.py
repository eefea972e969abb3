"""byokd as systemd runs it: its units, a boot with volumes in fstab, and every way to end but a clean one."""

import json

from harness.case import expect
from harness.service import LINK, another_daemon_serves, check_syncs, end_load, goes_on, load, record_syncs, served, volume


def the_units_are_sound_and_the_daemon_is_confined(case):
    guest, _, _ = served(case)
    said = guest.run("""systemd-analyze verify --man=no /etc/systemd/system/byokd.service \
        /etc/systemd/system/byokd-kernel.service /etc/systemd/system/byokd-kernel.socket byokd-attach@v.service""")
    expect(said.strip() == "", f"systemd-analyze verify: {said}")
    # In tenths: 2.0. It exits with an error above that.
    said = guest.run("systemd-analyze security --no-pager --offline=true --threshold=20 /etc/systemd/system/byokd.service | tail -1")
    case.say(said.strip())
    # And what runs is as the unit says: a user of its own, no capability, no new one, a filter.
    status = guest.run("cat /proc/$(systemctl show -p MainPID --value byokd)/status")
    facts = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    user = guest.run("id -u byokd").strip()
    expect(set(facts["Uid"].split()) == {user}, f"runs as {facts['Uid']}")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        expect(int(facts[name], 16) == 0, f"{name} is {facts[name]}")
    # Whose secrets are root's.
    status, _ = guest.attempt("setpriv --reuid byokd --clear-groups cat /etc/byokd/credentials.d/aws")
    expect(status != 0, "the daemon's user reads root's files")
    expect(facts["NoNewPrivs"].strip() == "1" and facts["Seccomp"].strip() == "2", "no_new_privs and a filter")
    # For all that, who moves much may stand back for others, and come forward again: a first connection finds out.
    guest.run("byokctl attach v --device auto && byokctl detach v")
    said = "journalctl -b -u byokd | grep -q 'will not stand back for others'"
    expect(guest.attempt(said)[0] != 0, "who stands back could not come forward")
    guest.put("/etc/systemd/system/byokd.service.d/nice.conf", "[Service]\nLimitNICE=1\n")
    guest.run("systemctl daemon-reload && systemctl restart byokd && byokctl attach v --device auto && byokctl detach v")
    guest.run(said)


MOUNT_UNIT = f"""\
[Unit]
Requires=byokd-attach@v.service
After=byokd-attach@v.service
[Mount]
What={LINK}-part2
Where=/more
Options=_netdev
[Install]
WantedBy=remote-fs.target
"""


def volumes_in_fstab_are_there_after_a_reboot(case):
    guest, _, key = served(case, definition='device = "auto"')
    guest.put("/etc/systemd/system/more.mount", MOUNT_UNIT)
    # Another is mounted by hand, of which systemd knows nothing beforehand.
    guest.run(f"byokctl volume create w --backing /var/lib/byokd/w.img --size 64M --key {key} --purpose zeebe")
    guest.run(f"""
        sed -i 's/^attach = .*/attach = "auto"/' /etc/byokd/volumes.d/v.toml
        mkdir -p /var/log/journal; journalctl --flush
        systemctl enable -q byokd byokd-kernel.socket
        systemctl restart byokd; udevadm wait --timeout=60 {LINK}
        printf ',96M\\n,\\n' | sfdisk -q {LINK}; udevadm wait --settle --timeout=60 {LINK}-part1 {LINK}-part2
        mkfs.ext4 -q {LINK}-part1; mkfs.ext4 -q {LINK}-part2; mkdir -p /data /more
        echo "{LINK}-part1 /data ext4 _netdev,x-systemd.requires=byokd-attach@v.service 0 2" >/etc/fstab
        systemctl daemon-reload; systemctl enable -q more.mount
        systemctl start data.mount more.mount; findmnt /data; findmnt /more
        echo one >/data/file; echo two >/more/file
        byokctl attach w --device auto && mkfs.ext4 -q /dev/byokd/w && mkdir /by-hand""")
    for turn in range(case.times(1, 2)):
        guest.run(f"mount /dev/byokd/w /by-hand && echo {turn} >/by-hand/file")
        guest.reboot()
        guest.until("both are mounted", "findmnt /data >/dev/null && findmnt /more >/dev/null")
        guest.run("grep one /data/file && grep two /more/file")
        guest.run("systemctl is-active byokd byokd-attach@v data.mount more.mount")
        said = guest.run(f"byokctl attach w --device auto && mount /dev/byokd/w /by-hand && cat /by-hand/file && umount /by-hand")
        expect(said.endswith(f"{turn}\n"), f"it is not what was written: {said}")
        # They had been unmounted before the daemon went, and detached.
        expect("recovery complete" not in guest.dmesg(), "a journal had to be replayed")
        said = guest.run("journalctl -b -1 --no-pager -u byokd -u byokd-attach@v")
        expect('device disconnected volume="v"' in said and "ailed" not in said, f"the shutdown: {said[-3000:]}")
        # A restart is none of what is mounted.
        guest.run("""before=$(systemctl show -p ActiveEnterTimestampMonotonic data.mount)
            systemctl restart byokd && sync -f /data && findmnt /data &&
            [ "$before" = "$(systemctl show -p ActiveEnterTimestampMonotonic data.mount)" ]""")
        guest.clean_dmesg()


def a_reload_takes_what_is_right_and_names_what_is_wrong(case):
    guest, _, _ = served(case)
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt && echo there >/mnt/file")
    before = guest.run("systemctl show -p MainPID --value byokd").strip()
    guest.run("cp /etc/byokd/volumes.d/v.toml /run/good; echo 'trimm = false' >>/etc/byokd/volumes.d/v.toml")
    status, _ = guest.attempt("systemctl reload byokd")
    expect(status != 0, "a wrong definition was taken")
    said = guest.run("journalctl -b --no-pager -u byokd")
    expect("v.toml" in said and "trimm" in said, f"the journal does not say what is wrong: {said[-2000:]}")
    # Real journald takes each line with its fields.
    entries = [json.loads(line) for line in guest.run("journalctl -b --no-pager -o json -u byokd BYOKD_VOLUME=v").splitlines()]
    attached = [entry for entry in entries if entry["MESSAGE"].startswith('attached volume="v"')]
    expect(len(attached) == 1 and attached[0]["PRIORITY"] == "6" and attached[0]["BYOKD_REQUEST_ID"], f"no such entry: {entries}")
    guest.run("""cp /run/good /etc/byokd/volumes.d/v.toml
        sed 's/^uuid = .*//; s/v.img/w.img/' /run/good >/etc/byokd/volumes.d/w.toml
        echo 'connections = 1' >>/etc/byokd/volumes.d/v.toml; systemctl reload byokd""")
    guest.run("byokctl status v | grep -q 'at next attach' && byokctl status w")
    # By a signal as well.
    guest.run("rm /etc/byokd/volumes.d/w.toml; systemctl kill -s HUP byokd")
    guest.until("the signal is heard", "! byokctl status w 2>/dev/null")
    expect(guest.run("systemctl show -p MainPID --value byokd").strip() == before, "the daemon goes on")
    guest.run("grep there /mnt/file && umount /mnt && udevadm settle && byokctl detach v")
    guest.clean_dmesg()


def what_a_definition_says_since_waits_for_the_next_attach_over_restarts(case):
    guest, kms, _ = served(case, definition='request_timeout = "6s"\ndead_timeout = "90s"')
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    syncs, running = record_syncs(guest), load(guest, 100000)
    guest.run("""sed -i 's/^read_only = .*/read_only = true/; s/^trim = .*/trim = false/' /etc/byokd/volumes.d/v.toml
        systemctl reload byokd""")

    def waits():
        waiting = volume(guest)["at_next_attach"]
        expect(sorted(waiting) == ["read_only", "trim"], f"at next attach: {waiting}")

    waits()
    for how in ("systemctl restart byokd", "systemctl kill -s KILL byokd"):
        goes_on(guest)
        another_daemon_serves(guest, how)
        goes_on(guest)
        # Its blocks can still be given back.
        guest.run("fstrim /mnt")
        expect(not running.ended() and not syncs.ended(), f"the load ended: {how}")
        waits()
    # An operator who wants it otherwise is refused, and it goes on as it was.
    kms.fault(fault="reset")
    guest.run("systemctl restart byokd")
    guest.until("it waits for KMS", "byokctl status v | grep -q 'wait for the key'")
    waits()
    status, said = guest.attempt("byokctl attach v --read-only")
    expect(status == 5 and "can be written to" in said, f"{status} {said}")
    kms.no_faults()
    guest.until("it serves", "byokctl status v | grep -q serving")
    end_load(guest, running)
    guest.run(f"umount /mnt && udevadm settle && fsck.ext4 -fn {LINK} && byokctl detach v && byokctl attach v --device auto")
    guest.run(f"device=$(basename $(readlink -f {LINK})) && test $(cat /sys/block/$device/ro) = 1 && mount -o ro {LINK} /mnt")
    expect(volume(guest)["at_next_attach"] == [], "this was the next attach")
    case.say(check_syncs(guest).strip())
    # As one that was made without trim is told from one with it.
    guest.run("""umount /mnt; udevadm settle; byokctl detach v
        sed -i 's/^read_only = .*/read_only = false/' /etc/byokd/volumes.d/v.toml; byokctl attach v --device auto
        sed -i 's/^trim = .*/trim = true/' /etc/byokd/volumes.d/v.toml && systemctl restart byokd""")
    expect(volume(guest)["at_next_attach"] == ["trim"], "the device takes no trim")
    guest.run("udevadm settle && byokctl detach v")
    guest.clean_dmesg(allowed=("Connection timed out, retrying",))


def a_definition_that_is_mended_brings_its_device_back(case):
    guest, kms, _ = served(case, definition='request_timeout = "6s"\ndead_timeout = "120s"')
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    guest.run("cp /etc/byokd/volumes.d/v.toml /run/good")
    syncs, running = record_syncs(guest), load(guest, 100000)
    # Told to read it, or asked for the volume.
    for how in ("byokctl reload", "byokctl attach v"):
        goes_on(guest)
        guest.run("echo 'trimm = false' >>/etc/byokd/volumes.d/v.toml && systemctl restart byokd")
        guest.until("it is skipped", "byokctl status | grep -q trimm")
        kms.fault(fault="reset")
        guest.run("cp /run/good /etc/byokd/volumes.d/v.toml")
        guest.attempt(how)
        # Whatever KMS says, its requests are heard.
        guest.until("they wait", "byokctl status v | grep -q 'wait for the key'")
        kms.no_faults()
        guest.until("it serves", "byokctl status v | grep -q serving")
        expect(not running.ended() and not syncs.ended(), f"the load ended: {how}")
    end_load(guest, running)
    guest.run(f"umount /mnt && udevadm settle && fsck.ext4 -fn {LINK} && mount {LINK} /mnt")
    case.say(check_syncs(guest).strip())
    guest.run("umount /mnt && udevadm settle && byokctl detach v")
    guest.clean_dmesg(allowed=("Connection timed out, retrying",))


def no_end_of_the_daemon_costs_what_is_mounted_an_error(case):
    guest, _, _ = served(case, definition='request_timeout = "6s"\ndead_timeout = "90s"')
    guest.put("/run/systemd/system/byokd.service.d/quick.conf", "[Service]\nWatchdogSec=4s\n")
    guest.run("systemctl daemon-reload && systemctl restart byokd")
    guest.run(f"byokctl attach v --device auto && mkfs.ext4 -q {LINK} && mount {LINK} /mnt")
    syncs, running = record_syncs(guest), load(guest, 100000)
    pid = "$(systemctl show -p MainPID --value byokd)"
    ends = {
        # It stands still: only the watchdog sees that.
        "watchdog": f"kill -STOP {pid}",
        # The kernel's choice, once the score is no longer what the unit gives it.
        "oom-kill": f"choom -n 1000 -p {pid} && sysctl -q kernel.sysrq=1 && echo f >/proc/sysrq-trigger",
        "signal": f"kill -ABRT {pid}",
        # With the volume mounted: requests wait for a start.
        "stop": "systemctl stop byokd && sleep 3 && systemctl start byokd",
    }
    for how, commands in ends.items():
        case.say(how)
        goes_on(guest)
        another_daemon_serves(guest, commands)
        expect(not running.ended() and not syncs.ended(), f"the load ended: {how}")
    said = guest.run("journalctl -b --no-pager -u byokd")
    for word in ("watchdog", "oom-kill", "status=6/ABRT"):
        expect(word in said, f"the journal does not say {word}")
    end_load(guest, running)
    guest.run(f"umount /mnt && udevadm settle && fsck.ext4 -fn {LINK} && mount {LINK} /mnt")
    case.say(check_syncs(guest).strip())
    # The kernel prints whose memory it looked for.
    guest.clean_dmesg(allowed=("Connection timed out, retrying", "Call Trace"))


no_end_of_the_daemon_costs_what_is_mounted_an_error.time_limit = 900
volumes_in_fstab_are_there_after_a_reboot.time_limit = 900
