"""a. What encryption costs: the same program on the same kind of disk, served in clear by nbdkit, by nbdkit's LUKS
filter, and by byokd; and on the disk's own file by a loop device. In turn, round after round, a fresh file system each time.

Compared are ratios of one round, of records acknowledged a second and of p99. There is no bound to pass: a machine that
others use proves nothing in one minute. What passes or fails is that each program loses nothing anywhere."""

import dataclasses
import pathlib

from parts import acks
from parts.disk import FileSystem

from .setting import go_on_for, mounted_anew, scratch_directory
from .turns import compare, in_turn


def story(stack, report, make_program, seed, quick):
    rounds, seconds = (1, 3) if quick else (3, 10)
    scratch, series = scratch_directory(stack), {}

    def load(inner, disk, name):
        rows = measure(inner, report, scratch, disk, name, make_program, seed, seconds)
        series.setdefault(name, []).extend(rows)
        return acks.summary(rows)

    found = in_turn(stack, report, scratch, make_program, rounds, load)
    compare(report, found, {"throughput": "rate", "p99": "p99"})
    return series


def measure(stack, report, scratch, disk, name, make_program, seed, seconds):
    loaded = load_on(stack, report, scratch, disk, name, make_program, seed, seconds)
    loaded.prove_whole()
    return loaded.rows


def load_on(stack, report, scratch, disk, name, make_program, seed, seconds):
    """A new file system with a program on it that has had its load, and is stopped."""
    program = make_program(stack, report.directory, seed)
    files = FileSystem(stack, disk, scratch / "mnt", make=True)
    program.start(files.directory)
    program.load()
    go_on_for(report, f"{name}: the load runs", program, seconds)
    program.halt()
    program.stop()
    rows = acks.read(program.acks)
    report.load(name, rows)
    return Loaded(report, scratch, name, program, files, rows)


@dataclasses.dataclass
class Loaded:
    """What a load has left on a disk."""

    report: object
    scratch: pathlib.Path
    name: str
    program: object
    files: FileSystem
    rows: list

    def prove_whole(self):
        """Looks for everything that was acknowledged, and puts the disk away."""
        files = mounted_anew(self.report, self.name, self.files, self.scratch)
        self.program.start(files.directory)
        whole, said = self.program.verify(files.directory)
        self.report.check(f"{self.name}: {said}", whole)
        self.program.stop()
        files.unmount()
        files.disk.close()
