"""A guest's disk that nbdkit serves on the host, so that it can do what disks do: lose what it has cached, and hang."""

import signal
import time

from . import process
from .waiting import wait_for


class ServedDisk:
    """With `volatile`, only what was flushed outlives its end."""

    def __init__(self, case, size, volatile=False):
        self.case, self.file = case, case.disk("v", size)
        self.socket = case.sockets / "disk"
        self.how = ["--filter=cache", "file", self.file, "cache=writeback"] if volatile else ["file", self.file]
        self.server = None

    @property
    def drive(self):
        return f"file=nbd+unix:///?socket={self.socket},format=raw"

    def turn_on(self):
        self.socket.unlink(missing_ok=True)
        self.server = self.case.start(["nbdkit", "-f", "-U", self.socket, *self.how])
        wait_for(self.socket.exists, "nbdkit listens", of=self.server)

    def cut_power(self):
        process.end(self.server)

    def stop(self):
        """From now on it answers nothing."""
        self.server.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.server.send_signal(signal.SIGCONT)

    def hang(self, seconds):
        """It answers nothing for so long."""
        self.stop()
        time.sleep(seconds)
        self.go_on()
