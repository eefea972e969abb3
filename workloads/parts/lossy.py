"""A disk that loses what was not flushed when its power fails: nbdkit with a write-back cache, which dies with it.

It is what a page cache beneath byokd would hide: killing processes loses nothing that was once written to a file."""

import os

import nbd

from .disk import NbdDisk
from .shell import Failure, Process, until


class LossyDisk:
    """A file behind a volatile cache, as a block device."""

    def __init__(self, stack, file, scratch, log):
        self.stack, self.file, self.scratch, self.log = stack, file, scratch, log
        self.power_on()

    def power_on(self):
        self.server, self.uri = serve(self.stack, self.file, self.scratch, self.log)
        self.disk = NbdDisk(self.stack, self.uri, self.scratch / "lossy", ["--direct-io=on"])

    @property
    def device(self):
        return self.disk.device

    def cut(self):
        """The power fails: at this moment, whatever is under way."""
        self.server.kill()

    def clear_away(self):
        self.disk.crash()


def serve(stack, file, scratch, log):
    socket = scratch / "lossy.sock"
    socket.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "-U", socket, "--filter=cache", "file", file, "cache=writeback"]
    server = Process(stack, command, log, env={**os.environ, "TMPDIR": str(scratch)})
    until("nbdkit listens", lambda: socket.exists() or server.ended())
    return server, f"nbd+unix:///?socket={socket}"


def prove_that_it_loses(stack, scratch, log):
    """A disk that loses nothing would prove nothing: what is flushed stays, what is not is gone."""
    file = scratch / "proof.img"
    with open(file, "wb") as out:
        out.truncate(16 << 20)
    server, uri = serve(stack, file, scratch, log)
    client = nbd.NBD()
    client.connect_uri(uri)
    client.pwrite(b"flushed!" * 512, 0)
    client.flush()
    client.pwrite(b"volatile" * 512, 1 << 20)
    server.kill()
    data = file.read_bytes()
    file.unlink()
    if data[:8] != b"flushed!" or b"volatile" in data:
        raise Failure("the disk with a volatile cache does not lose what was not flushed")
