"""An NBD export as a mounted ext4, on a machine without a kernel NBD client: `nbdfuse` shows the export as a
file, a loop device makes it a disk."""

import os
import pathlib

from .shell import Failure, Process, does, run, until


class NbdDisk:
    """An export as a block device."""

    def __init__(self, stack, uri, directory, loop_options=()):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.device = None
        self.process = Process(stack, ["nbdfuse", directory / "disk", uri], directory.with_suffix(".nbdfuse.log"))
        stack.callback(self.crash)
        until("nbdfuse shows the export", lambda: self.process.ended() or (directory / "disk").exists())
        if self.process.ended():
            raise Failure(f"nbdfuse ended: {self.process.log.read_text()}")
        self.device = run("losetup", "--find", "--show", *loop_options, directory / "disk").strip()

    def close(self):
        """In peace, with everything flushed."""
        run("losetup", "-d", self.device)
        self._until_let_go()
        run("fusermount3", "-u", self.directory)
        self.process.child.wait(60)

    def crash(self):
        """Kills the client and takes the pieces away; what it had not sent yet is lost. Does no harm twice."""
        self.process.kill()
        if self.device:
            does("losetup", "-d", self.device)
            self._until_let_go()
        does("fusermount3", "-u", "-z", self.directory)

    def _until_let_go(self):
        device, self.device = self.device, None
        backing = f"/sys/block/{pathlib.Path(device).name}/loop/backing_file"

        def free():
            # The number may be another's by now.
            return not os.path.exists(backing) or str(self.directory) not in open(backing).read()

        until(f"{device} is let go of", free)


class LoopDisk:
    """A file as a block device, with nothing between; a new one of that size, if it is named."""

    def __init__(self, stack, file, size=None):
        if size:
            with open(file, "wb") as out:
                out.truncate(size)
        self.device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
        stack.callback(self.close)

    def close(self):
        if self.device:
            does("losetup", "-d", self.device)
            self.device = None


class FileSystem:
    """ext4 on a disk, mounted."""

    def __init__(self, stack, disk, directory, make=False):
        self.disk, self.directory = disk, directory
        directory.mkdir(parents=True, exist_ok=True)
        if make:
            run("mkfs.ext4", "-q", "-E", "nodiscard", disk.device)
        run("mount", disk.device, directory)
        stack.callback(self.abandon)
        self.mounted = True

    def unmount(self):
        """Nothing may hold it any more, nothing may hang in it."""
        if not does("umount", self.directory, seconds=120):
            raise Failure(f"{self.directory} cannot be unmounted: something holds it, or hangs in it")
        self.mounted = False

    def abandon(self):
        if self.mounted:
            # What is dirty fails against a dead disk, so this ends; lazily if a program still stands in it.
            does("umount", self.directory) or does("umount", "-l", self.directory)
            self.mounted = False


def recover(device):
    """What a machine does after a crash and nothing more: the journal is replayed."""
    code = os.waitstatus_to_exitcode(os.system(f"e2fsck -p {device} >/dev/null 2>&1"))
    if code not in (0, 1):
        raise Failure(f"e2fsck -p {device} ended with {code}: more than a journal to replay")


def is_clean(device):
    """The whole file system is checked, and nothing may be changed."""
    return does("e2fsck", "-fn", device, seconds=300)
