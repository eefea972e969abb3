"""i. What encryption costs each part of a program: a profile (../profiles) on the same kinds of disk as in the story `cost`, in
the same turns. Between what is laid out, the load, and the verification, the file system is mounted anew and memory forgets
the disk: what is read comes from there.

Reported, not judged; what passes or fails is that everything flushed is there and the file system is clean."""

from parts.disk import FileSystem
from parts.shell import Failure

from .setting import mounted_anew, scratch_directory
from .turns import compare, in_turn

FIGURES = {"throughput": "rate", "p50": "p50", "p99": "p99", "beside it": "beside", "checkpoint": "checkpoint"}


def story(stack, report, make_profile, seed, quick):
    rounds, seconds, mib = (1, 1, 16) if quick else (5, 10, 256)
    scratch, series = scratch_directory(stack), {}
    report.unit = make_profile.unit

    def measure(inner, disk, name):
        profile = make_profile(report.directory, seed)
        files = FileSystem(inner, disk, scratch / "mnt", make=True)
        profile.lay(files.directory, mib)
        files = mounted_anew(report, f"{name}, laid out", files, scratch)
        found, rows = profile.run(files.directory, seconds)
        if not found["rate"]:
            raise Failure(f"{name}: {profile.name} did nothing")
        series.setdefault(name, []).extend(rows)
        report.numbers.setdefault(name, []).append(found)
        report.say(f"            {name}: {told(found, profile)}")
        files = mounted_anew(report, f"{name}, after the load", files, scratch)
        whole, said = profile.verify(files.directory)
        report.check(f"{name}: {said}", whole)
        files.unmount()
        files.disk.close()
        return found

    found = in_turn(stack, report, scratch, make_profile, rounds, measure)
    compare(report, found, {words: key for words, key in FIGURES.items() if key in found["byokd"][0]})
    return series


def told(found, profile):
    words = f"{found['rate']:.0f} {profile.unit}"
    if profile.timed:
        words += f"; {', '.join(profile.timed)}: p50 {found['p50']:.3g} ms, p99 {found['p99']:.3g} ms"
    if "beside" in found:
        words += f"; beside it {found['beside']:.0f} MiB/s"
    if "checkpoint" in found:
        words += f"; a checkpoint {found['checkpoint']:.0f} ms"
    return words
