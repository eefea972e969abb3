"""What most stories stand on: a daemon, a key, a volume with ext4, and a program on it."""

import os
import pathlib
import tempfile
import time

from parts import acks
from parts.disk import FileSystem, NbdDisk, check
from parts.service import Byokd
from parts.shell import TARGET


class Setting:
    """One program on one encrypted volume; everything goes when `stack` unwinds."""

    def __init__(self, stack, report, make_program, seed, backing=None):
        self.stack, self.report = stack, report
        self.scratch = scratch_directory(stack)
        self.program = make_program(stack, report.directory, seed)
        self.byokd = Byokd(stack, self.scratch / "byokd", report.directory / "byokd.log")
        self.key = self.byokd.key()
        size = "0" if backing else f"{self.program.volume_mib}M"
        self.byokd.create("v", backing or self.scratch / "v.img", size, self.key, self.program.purpose)
        self.byokd.ctl("attach", "v")
        self.files = None

    @property
    def data(self):
        return self.scratch / "mnt"

    @property
    def disk(self):
        return self.files.disk

    def open_disk(self):
        return NbdDisk(self.stack, self.byokd.uri("v"), self.scratch / "nbd")

    def mount(self, when):
        """As a machine does after a crash, and nothing more: mounting replays ext4's journal. Then there is nothing to mend."""
        disk = self.open_disk()
        FileSystem(self.stack, disk, self.data).unmount()
        nothing_to_mend(self.report, when, disk)
        self.files = FileSystem(self.stack, disk, self.data)

    def unmount(self):
        self.files.unmount()
        self.disk.close()

    def begin(self):
        """A fresh file system with the program under load on it."""
        self.files = FileSystem(self.stack, self.open_disk(), self.data, make=True)
        self.program.start(self.data)
        self.program.load()
        self.report.event("load begins")

    def everything_is_there(self, when):
        whole, said = self.program.verify(self.data)
        self.report.check(f"{when}: {said}", whole)

    def no_complaints(self, when):
        """Since the program was last killed."""
        complaints = self.program.complaints()
        self.report.check(f"{when}: {self.program.name}'s own log tells of {'trouble' if complaints else 'no trouble'}", not complaints)
        if complaints:
            self.report.log_lines(self.program.name, complaints)

    def conclude(self):
        """Ends the load, looks for everything on the disk, not in what memory knows of it, and gives the story's series."""
        self.program.halt()
        self.program.stop()
        rows = acks.read(self.program.acks)
        self.report.load(self.program.name, rows)
        self.unmount()
        self.mount("at the end")
        self.program.start(self.data)
        self.everything_is_there("at the end")
        self.program.stop()
        self.no_complaints("at the end")
        self.files.unmount()
        nothing_to_mend(self.report, "after all", self.disk)
        self.disk.close()
        return {self.program.name: rows}


def nothing_to_mend(report, when, disk):
    whole, said = check(disk.device)
    report.check(f"{when}: {said}", whole)


def mounted_anew(report, when, files, scratch):
    """The file system without what memory knows of it, be it here or in a server that has its file in the page cache."""
    files.unmount()
    disk = files.disk.anew()
    nothing_to_mend(report, when, disk)
    for image in [*scratch.glob("*.img"), *scratch.glob("nbd/disk")]:
        file = os.open(image, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return FileSystem(files.stack, disk, files.directory)


def scratch_directory(stack):
    """On the disk that holds the build, so that byokd uses O_DIRECT; not in memory."""
    place = TARGET / "workloads"
    place.mkdir(parents=True, exist_ok=True)
    # Whoever runs a program as another user has to be able to walk through.
    directory = tempfile.TemporaryDirectory(prefix="work-", dir=place, ignore_cleanup_errors=True)
    path = stack.enter_context(directory)
    os.chmod(path, 0o755)
    return pathlib.Path(path)


def go_on_for(report, what, program, seconds):
    """Lets the load run on, until something was acknowledged after that time. Whatever stops it is a finding, and so is a
    silence that is longer than the program's patience: of a disk that hangs, a program says nothing."""
    begun = time.monotonic()
    last = begun
    why = ""
    while last <= begun + seconds and not why:
        time.sleep(0.05)
        silent = time.monotonic() - last
        if program.stopped():
            why = ": it has stopped"
        elif silent > program.patience:
            why = f": nothing was acknowledged for {silent:.1f} s"
        last = max(last, acks.last_time(program.acks))
    report.check(f"{what}{why}", not why)
