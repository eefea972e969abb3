"""The kinds of disk that byokd is compared with, in turn: what the stories `cost` and `profile` stand on."""

import contextlib
import statistics

from parts.disk import LoopDisk, NbdDisk
from parts.peers import nbdkit
from parts.service import Byokd

DISKS = ["plain", "nbdkit", "nbdkit-luks", "byokd"]


def in_turn(stack, report, scratch, program, rounds, measure):
    """Round after round, a new disk of each kind, another one first each time. What `measure(inner, disk, name)` gives,
    by kind of disk, one for each round."""
    byokd = Byokd(stack, scratch / "byokd", report.directory / "byokd.log")
    key = byokd.key()
    found = {name: [] for name in DISKS}
    for turn in range(rounds):
        for at in range(len(DISKS)):
            name = DISKS[(turn + at) % len(DISKS)]
            report.event(f"{name}, round {turn + 1}")
            with contextlib.ExitStack() as inner:
                disk = open_disk(inner, name, report, scratch, byokd, key, program)
                found[name].append(measure(inner, disk, name))
            if name == "byokd":
                byokd.ctl("detach", "v")
                byokd.ctl("volume", "forget", "v")
            for image in scratch.glob("*.img"):
                image.unlink()
    return found


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


def compare(report, found, figures):
    """byokd to each of the others, by ratios within one round. `figures`: what each is called, and its key."""
    for name in DISKS[:-1]:
        ratios, told = report.numbers.setdefault(f"byokd to {name}", {}), []
        for words, key in figures.items():
            ratios[key] = low_to_high = sorted(ours[key] / theirs[key] for ours, theirs in zip(found["byokd"], found[name]))
            told.append(f"{words} {statistics.median(low_to_high):.2f} ({low_to_high[0]:.2f} to {low_to_high[-1]:.2f})")
        report.say(f"            byokd to {name}: {', '.join(told)}")
