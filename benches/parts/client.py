"""A client that writes, reads, and knows what may come back."""

import random
import threading
import time

import nbd

BLOCK = 4096
BLOCKS = 512


def trace(volume):
    """What is in every block of this volume, again and again."""
    return f"clear text of {volume}, "


def content(volume, block, version):
    word = f"{trace(volume)}{block} {version};".encode()
    return (word * (BLOCK // len(word) + 1))[:BLOCK]


class Client(threading.Thread):
    """One connection to one volume, opened anew when it is closed. Every 4 KiB block has the versions that it may
    hold: one after an acknowledged write, two after a write that failed or was cut off."""

    def __init__(self, name, uri, seed, judge):
        super().__init__(daemon=True, name=name)
        self.uri, self.judge, self.random = uri, judge, random.Random(seed)
        self.may_hold = [{0} for _ in range(BLOCKS)]
        self.version = 0
        self.last_success, self.began, self.operations, self.failed = time.monotonic(), None, 0, 0
        # Paused, it has no request under way.
        self.paused, self.is_paused, self.ended = threading.Event(), threading.Event(), False

    def run(self):
        while not self.ended:
            connection = nbd.NBD()
            try:
                connection.connect_uri(self.uri)
                self.converse(connection)
            except nbd.Error:
                # Refused while the volume is detached or fenced, or its daemon is gone.
                self.rest(0.05)

    def converse(self, connection):
        while not self.ended and not connection.aio_is_closed() and not connection.aio_is_dead():
            if self.paused.is_set():
                self.rest(0.02)
                continue
            first = self.random.randrange(BLOCKS)
            count = min(self.random.choice((1, 1, 2, 8, 64)), BLOCKS - first)
            self.began = time.monotonic()
            try:
                if self.random.random() < 0.5:
                    self.write(connection, first, count)
                else:
                    self.read(connection, first, count)
                self.last_success = time.monotonic()
                self.operations += 1
            except nbd.Error as error:
                self.failed += 1
                self.judge(self.name, error.errno or str(error), self.began, time.monotonic())
                time.sleep(0.02)
            finally:
                self.began = None
            time.sleep(self.random.uniform(0, 0.03))

    def rest(self, seconds):
        if self.paused.is_set():
            self.is_paused.set()
        time.sleep(seconds)

    def write(self, connection, first, count):
        self.version += 1
        data = b"".join(content(self.name, block, self.version) for block in range(first, first + count))
        for block in range(first, first + count):
            self.may_hold[block] = self.may_hold[block] | {self.version}
        connection.pwrite(data, first * BLOCK)
        for block in range(first, first + count):
            self.may_hold[block] = {self.version}

    def read(self, connection, first, count):
        data = connection.pread(count * BLOCK, first * BLOCK)
        for n in range(count):
            block = first + n
            found = data[n * BLOCK : (n + 1) * BLOCK]
            fits = {version for version in self.may_hold[block] if version == 0 or found == content(self.name, block, version)}
            if not fits:
                self.judge(self.name, "corrupt", block, bytes(found[:40]))
            elif 0 not in fits:
                # What was read once is there for good.
                self.may_hold[block] = fits
