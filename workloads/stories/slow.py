"""h. What is left of a program's speed on a disk that takes its time (parts/slow.py): the same program on it with nothing
between, through nbdkit in clear, and through byokd, past the page cache and by way of it (`direct = "off"`, as nbdkit
goes), for delays from none to some milliseconds.

The way to ext4 is nbdfuse and a loop device in the two latter, and another time beneath. That costs as much as byokd, so
byokd is to be compared with nbdkit. Reported, not judged; what passes or fails is that nothing is lost. byokd's own memory
and processor time, from attaching to the end of the load, are for sizing a node."""

import contextlib

from parts import acks
from parts.disk import LoopDisk, NbdDisk
from parts.peers import serve_clear
from parts.service import Byokd
from parts.slow import SlowDisk, prove_that_it_is_slow

from .cost import load_on
from .setting import scratch_directory

WAYS = ["plain", "nbdkit", "byokd", "byokd-cached"]


def story(stack, report, make_program, seed, quick):
    delays, seconds = ((1,), 3) if quick else ((0, 1, 2, 5), 15)
    scratch, series, found = scratch_directory(stack), {}, {}
    for ms in delays:
        for name in WAYS:
            label = f"{name}, {ms} ms"
            report.event(label)
            with contextlib.ExitStack() as inner:
                disk, server = open_disk(inner, name, ms, report, scratch, make_program)
                begun = server.cpu_seconds() if server else 0
                loaded = load_on(inner, report, scratch, disk, label, make_program, seed, seconds)
                found[label] = acks.summary(loaded.rows)
                if server:
                    tell_use(report, label, server, server.cpu_seconds() - begun, found[label])
                loaded.prove_whole()
                if server:
                    # While its disk is still there.
                    server.ctl("detach", "v")
                    server.process.stop()
            series[label] = loaded.rows
        theirs = found[f"nbdkit, {ms} ms"]
        for name in WAYS[2:]:
            ours = found[f"{name}, {ms} ms"]
            report.number(f"{name} to nbdkit, {ms} ms: throughput", ours["rate"] / theirs["rate"], "")
            report.number(f"{name} to nbdkit, {ms} ms: p99", ours["p99"] / theirs["p99"], "")
    return series


def tell_use(report, label, server, cpu_seconds, load):
    report.number(f"{label}: processor time for 1,000 records", cpu_seconds * 1000 / max(load["records"], 1), "s")
    report.number(f"{label}: of a core, while it lasted", cpu_seconds * load["rate"] / max(load["records"], 1), "")
    report.number(f"{label}: resident at most", server.most_resident_mib(), "MiB")


def open_disk(stack, name, ms, report, scratch, program):
    """The disk, and byokd if that serves it."""
    # A little more than the volume, for its header.
    slow = SlowDisk(stack, scratch, program.volume_mib + 64, ms, report.directory / "slow.log")
    beneath = LoopDisk(stack, slow.file)
    if ms:
        report.number(f"{name}, {ms} ms: the disk by itself", prove_that_it_is_slow(beneath.device), "reads/s")
    if name == "plain":
        return beneath, None
    if name == "nbdkit":
        uri = serve_clear(stack, name, scratch, beneath.device, report.directory / f"{name}.log")
        return NbdDisk(stack, uri, scratch / "nbd"), None
    byokd = Byokd(stack, scratch / f"{name}-{ms}", report.directory / f"{name}.log")
    byokd.create("v", beneath.device, "0", byokd.key(), program.purpose)
    if name == "byokd-cached":
        byokd.define("v", "direct", "off")
    byokd.ctl("attach", "v")
    return NbdDisk(stack, byokd.uri("v"), scratch / "nbd"), byokd
