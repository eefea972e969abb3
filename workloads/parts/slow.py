"""A disk that takes its time, as those that are hired do: nbdkit with a delay for each request and a bound for all
bytes, shown as a file by nbdfuse. It serves THREADS x MS requests at a time, so 3,000 a second whatever the delay;
125 MB a second. What AWS gives a gp3 volume is that, with delays of half a millisecond to a few."""

from .shell import Failure, Process, does, until

# Requests a second, in thousands: one each millisecond for each thread.
THREADS = 3
BITS_PER_SECOND = "1000M"


class SlowDisk:
    """In memory: nothing but the delay is measured."""

    def __init__(self, stack, scratch, mib, ms, log):
        socket, self.directory = scratch / "slow.sock", scratch / "slow"
        limits = [f"rdelay={ms}ms", f"wdelay={ms}ms", f"rate={BITS_PER_SECOND}"] if ms else []
        filters = ["--filter=delay", "--filter=rate", f"--threads={THREADS * ms}"] if ms else []
        socket.unlink(missing_ok=True)
        server = Process(stack, ["nbdkit", "-f", "-U", socket, *filters, "memory", f"{mib}M", *limits], log)
        until("nbdkit listens", lambda: socket.exists() or server.ended())
        self.directory.mkdir(exist_ok=True)
        self.file = self.directory / "disk"
        self.client = Process(stack, ["nbdfuse", self.file, f"nbd+unix:///?socket={socket}"], log)
        stack.callback(self.close)
        until("the disk is there", lambda: self.client.ended() or self.file.exists())
        if self.client.ended():
            raise Failure(f"nbdfuse ended: {log.read_text()}")

    def close(self):
        does("fusermount3", "-u", "-z", self.directory)
