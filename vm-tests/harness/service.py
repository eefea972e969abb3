"""byokd under systemd, its units where a package puts them, and a volume `v` with a kernel device."""

import json

from .case import expect

LINK = "/dev/byokd/v"


def served(case, size="192M", definition="", backing="/var/lib/byokd/v.img", **how):
    """A guest under systemd with byokd installed as its units have it, and a volume `v` that is not attached."""
    kms = case.kms()
    key = kms.key()
    guest = case.prepared(install, systemd=True, **how)
    settings(guest, kms)
    guest.run("systemctl start byokd")
    if backing.startswith("/dev/"):
        guest.run(f"chown byokd {backing}")
    guest.run(f"byokctl volume create v --backing {backing} --size {size} --key {key} --purpose zeebe")
    define(guest, definition)
    return guest, kms, key


def settings(guest, kms):
    guest.put("/etc/byokd/byokd.toml", f"""\
volumes_dir = "/etc/byokd/volumes.d"

[kms]
region = "eu-central-1"
endpoint = "http://10.0.2.2:{kms.port}"

[lease]
probe_interval = "1s"
""")
    guest.put("/etc/byokd/credentials.d/aws", "[default]\naws_access_key_id = test\naws_secret_access_key = test\n", mode=0o600)


def install(guest):
    """The programs and units where a package puts them."""
    guest.run("""
        cp /payload/byokd /payload/byokctl /payload/byokd-kernel /usr/bin/
        cd /payload/systemd
        cp byokd.service byokd-attach@.service byokd-kernel.service byokd-kernel.socket /etc/systemd/system/
        cp 60-byokd.rules /etc/udev/rules.d/
        install -D -m 644 byokd.sysusers /etc/sysusers.d/byokd.conf
        install -D -m 644 byokd.tmpfiles /etc/tmpfiles.d/byokd.conf
        install -D -m 644 byokd.modules-load /etc/modules-load.d/byokd.conf
        modprobe nbd
        udevadm control --reload
        systemd-sysusers; systemd-tmpfiles --create byokd.conf
        systemctl daemon-reload""")
    # The kernel tells of a task that hangs for so long.
    guest.run("sysctl -q kernel.hung_task_timeout_secs=20")


def record_syncs(guest, directory="/mnt/syncs"):
    """Writes and syncs until it is stopped; `check_syncs` wants to see all that was acknowledged. Emulated,
    it waits between two: it would have the processor to itself."""
    pause = 0.2 if guest.accelerator == "tcg" else 0
    return guest.start(f"exec /payload/sync-load {directory} /run/syncs {pause}")


def check_syncs(guest, directory="/mnt/syncs"):
    return guest.run(f"/payload/sync-load --check {directory} /run/syncs")


def define(guest, more, name="v"):
    guest.run(f"cat >>/etc/byokd/volumes.d/{name}.toml <<'EOF'\n{more}\nEOF")


def device(guest):
    return volume(guest)["device"]


def volume(guest):
    return json.loads(guest.run("byokctl --json volume show v"))


def load(guest, seconds):
    """Writes with checksums that are read back, with a sync now and then; it must not see one error. Between bursts it
    leaves the processors to others, which under emulation have little enough."""
    return guest.start(f"""fio --name=load --filename=/mnt/file --size=24M --rw=randwrite --bs=4k-32k --ioengine=libaio \
        --iodepth=8 --direct=1 --fsync=16 --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based \
        --thinktime=300ms --thinktime_blocks=32 \
        --runtime={seconds} --output-format=json --error_dump=0""")


# 30 writes more are acknowledged than when it first looked.
GOES_ON = """
    read -r _ _ _ _ now _ </sys/block/nbd0/stat
    [ -e /run/then ] || echo $now >/run/then
    [ $now -ge $(($(cat /run/then) + 30)) ] && rm /run/then"""


def goes_on(guest, after=":"):
    """Runs these commands, and waits until writes are acknowledged again, and not only those from before."""
    guest.run_until(after, "writes go on", GOES_ON)


def end_load(guest, running):
    """Ends what `record_syncs` and `load` began, which goes on until then, and looks at what fio says of it."""
    goes_on(guest)
    # Only fio's parent is told: one of its jobs that is interrupted while it waits for completions may wait for ever
    # (fio 3.33, 3 of 120 times on a plain disk).
    # Whoever is in a sync holds the mount until that is done.
    guest.run_until("pkill -f [s]ync-load; pkill -INT --oldest -x fio", "the syncs end", "! pgrep -f [s]ync-load >/dev/null")
    status, said = running.wait()
    expect('"error" : 0' in said and "verify:" not in said, f"fio ended with {status}: {said[-3000:]}")


def another_daemon_serves(guest, how):
    """Ends the daemon so, and waits until the one that comes after it serves."""
    pid = "$(systemctl show -p MainPID --value byokd)"
    guest.run_until(f"before={pid}\n{how}", "the new daemon serves", f"""pid={pid}; [ "$pid" != $before ] && [ "$pid" != 0 ] &&
        byokctl status v | grep -q serving""")
