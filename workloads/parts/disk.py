"""An NBD export as a mounted ext4, on a machine without a kernel NBD client: `nbdfuse` shows the export as a
file, a loop device makes it a disk."""

import os
import pathlib

from .shell import Failure, Process, does, outcome, run, until, wait


class NbdDisk:
    """An export as a block device."""

    def __init__(self, stack, uri, directory, loop_options=()):
        self.stack, self.uri, self.directory, self.loop_options = stack, uri, directory, loop_options
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
        wait(self.process.child)

    def anew(self):
        """Closed, and opened without what memory knew of it."""
        self.close()
        return NbdDisk(self.stack, self.uri, self.directory, self.loop_options)

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
        self.stack, self.file = stack, file
        self.device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
        stack.callback(self.close)

    def anew(self):
        self.close()
        return LoopDisk(self.stack, self.file)

    def close(self):
        if self.device:
            does("losetup", "-d", self.device)
            self.device = None


class FileSystem:
    """ext4 on a disk, mounted."""

    def __init__(self, stack, disk, directory, make=False):
        self.stack, self.disk, self.directory = stack, disk, directory
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


def check(device):
    """The whole file system is checked and nothing changed: whether there is nothing to mend, and what e2fsck says."""
    code, said, _ = outcome("e2fsck", "-fn", device)
    return code == 0, "e2fsck finds nothing to mend" if code == 0 else f"e2fsck ended with {code}: {said.strip()}"
