"""What most stories stand on: a daemon, a key, a volume with ext4, and a program on it."""

import os
import pathlib
import tempfile
import time

from parts import acks
from parts.disk import FileSystem, NbdDisk, is_clean, recover
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
        self.disk = self.files = None

    @property
    def data(self):
        return self.scratch / "mnt"

    def mount(self, make=False):
        self.disk = NbdDisk(self.stack, self.byokd.uri("v"), self.scratch / "nbd")
        if not make:
            recover(self.disk.device)
        self.files = FileSystem(self.stack, self.disk, self.data, make)

    def unmount(self):
        self.files.unmount()
        self.disk.close()

    def begin(self):
        """A fresh file system with the program under load on it."""
        self.mount(make=True)
        self.program.start(self.data)
        self.program.load()
        self.report.event("load begins")

    def everything_is_there(self, when):
        whole, said = self.program.verify(self.data)
        self.report.check(f"{when}: {said}", whole)

    def conclude(self):
        """Ends the load, looks for everything, and gives the story's series."""
        self.program.halt()
        self.everything_is_there("at the end")
        self.program.stop()
        self.file_system_is_clean("at the end")
        rows = acks.read(self.program.acks)
        self.report.load(self.program.name, rows)
        return {self.program.name: rows}

    def file_system_is_clean(self, when):
        self.files.unmount()
        self.report.check(f"{when}: e2fsck finds nothing to mend", is_clean(self.disk.device))
        self.disk.close()


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
