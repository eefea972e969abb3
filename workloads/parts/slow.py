"""A disk that takes its time, as those that are hired do: nbdkit with a delay for each request and a bound for all
bytes, shown as a file by nbdfuse over one connection, of which nbdkit serves THREADS x MS requests at a time: 3,000 a
second at most whatever the delay, and less of small ones by way of FUSE (`prove_that_it_is_slow` tells). 125 MB a
second each way, of which two seconds' worth may come at once. What AWS gives a gp3 volume is that, with delays of half
a millisecond to a few. A flush takes nothing: like EBS, it has no cache that could be lost. With no delay there is no
bound either: a disk in memory."""

import json

from .shell import Failure, Process, does, run, until

# Requests a second, in thousands: one each millisecond for each thread.
THREADS = 3
BITS_PER_SECOND = "1000M"


# What it may do more than that, measured for a second. Less is for the report: a busy machine makes any disk slower.
MOST = 1.15


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
        self.client = Process(stack, ["nbdfuse", "-C", "1", self.file, f"nbd+unix:///?socket={socket}"], log)
        stack.callback(self.close)
        until("the disk is there", lambda: self.client.ended() or self.file.exists())
        if self.client.ended():
            raise Failure(f"nbdfuse ended: {log.read_text()}")

    def close(self):
        does("fusermount3", "-u", "-z", self.directory)


def prove_that_it_is_slow(device):
    """Reads at random, 64 at a time, get no more than the disk is said to give. How many a second."""
    said = run("fio", "--name=proof", f"--filename={device}", "--rw=randread", "--bs=4k", "--iodepth=64", "--direct=1",
               "--ioengine=libaio", "--time_based", "--runtime=1", "--output-format=json")
    rate = json.loads(said)["jobs"][0]["read"]["iops"]
    if rate > THREADS * 1000 * MOST:
        raise Failure(f"a disk of {THREADS * 1000} requests a second does {rate:.0f}")
    return rate
