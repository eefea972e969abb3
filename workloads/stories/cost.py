"""a. What encryption costs: the same program on the same kind of disk, served in clear by nbdkit, by nbdkit's LUKS
filter, and by byokd; and on the disk's own file by a loop device. In turn, round after round, a fresh file system each time.

Compared are ratios of one round, of records acknowledged a second and of p99. There is no bound to pass: a machine that
others use proves nothing in one minute. What passes or fails is that each program loses nothing anywhere."""

import contextlib
import statistics

from parts import acks
from parts.disk import FileSystem, LoopDisk, NbdDisk
from parts.peers import nbdkit
from parts.service import Byokd

from .setting import go_on_for, scratch_directory

DISKS = ["plain", "nbdkit", "nbdkit-luks", "byokd"]


def story(stack, report, make_program, seed, quick):
    rounds, seconds = (1, 3) if quick else (3, 10)
    scratch = scratch_directory(stack)
    byokd = Byokd(stack, scratch / "byokd", report.directory / "byokd.log")
    key = byokd.key()
    found, series = {name: [] for name in DISKS}, {}
    for turn in range(rounds):
        for at in range(len(DISKS)):
            name = DISKS[(turn + at) % len(DISKS)]
            report.event(f"{name}, round {turn + 1}")
            with contextlib.ExitStack() as inner:
                disk = open_disk(inner, name, report, scratch, byokd, key, make_program)
                rows = measure(inner, report, scratch, disk, name, make_program, seed, seconds)
            if name == "byokd":
                byokd.ctl("detach", "v")
                byokd.ctl("volume", "forget", "v")
            for image in scratch.glob("*.img"):
                image.unlink()
            found[name].append(acks.summary(rows))
            series.setdefault(name, []).extend(rows)
    compare(report, found)
    return series


def open_disk(stack, name, report, scratch, byokd, key, program):
    size = program.volume_mib << 20
    if name == "plain":
        return LoopDisk(stack, scratch / "plain.img", size)
    if name == "byokd":
        byokd.create("v", scratch / "byokd.img", f"{program.volume_mib}M", key, program.purpose)
        byokd.ctl("attach", "v")
        uri = byokd.uri("v")
    else:
        uri = nbdkit(stack, name, scratch, size, report.directory / f"{name}.log")
    return NbdDisk(stack, uri, scratch / "nbd")


def measure(stack, report, scratch, disk, name, make_program, seed, seconds):
    program = make_program(stack, report.directory, seed)
    files = FileSystem(stack, disk, scratch / "mnt", make=True)
    program.start(files.directory)
    program.load()
    going = go_on_for(program, seconds)
    report.check(f"{name}: the load runs", going)
    program.halt()
    whole, said = program.verify(files.directory)
    report.check(f"{name}: {said}", whole)
    program.stop()
    rows = acks.read(program.acks)
    report.load(name, rows)
    files.unmount()
    disk.close()
    return rows


def compare(report, found):
    for name in DISKS[:-1]:
        rate = sorted(ours["rate"] / theirs["rate"] for ours, theirs in zip(found["byokd"], found[name]))
        tail = sorted(ours["p99"] / theirs["p99"] for ours, theirs in zip(found["byokd"], found[name]))
        report.numbers[f"byokd to {name}"] = dict(rate=rate, p99=tail)
        report.say(f"            byokd to {name}: throughput {statistics.median(rate):.2f} ({rate[0]:.2f} to {rate[-1]:.2f}), "
                   f"p99 {statistics.median(tail):.2f} ({tail[0]:.2f} to {tail[-1]:.2f})")
