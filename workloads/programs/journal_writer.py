#!/usr/bin/env python3
"""Writes a journal exactly as Zeebe's raft journal writes its own (8.3 to 8.5), and acknowledges what is safe.

Mapped segments, filled with zeroes in 4 KiB writes before use; for each commit an msync of the whole mapping, then
one O_DSYNC write of 256 bytes with the last flushed index. Goes on after the last whole record that it finds.

    journal_writer.py append DIR ACKS SEED SEGMENT_MIB
    journal_writer.py verify DIR ACKS SEED SEGMENT_MIB
"""

import hashlib
import mmap
import os
import pathlib
import random
import struct
import sys
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from parts import acks

# Length, CRC-32 of the body, index.
HEAD = struct.Struct("<IIQ")


def body(seed, index):
    """The record of an index: 200 to 1800 bytes, like a batch of Zeebe's records, and told by its index alone."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index)).digest()
    return (digest * 29)[: 200 + digest[0] * 6 + digest[1] % 71]


class Journal:
    def __init__(self, directory, seed, segment_bytes):
        self.directory, self.seed, self.segment_bytes = directory, seed, segment_bytes
        directory.mkdir(exist_ok=True)
        self.meta = os.open(directory / "meta", os.O_RDWR | os.O_CREAT | os.O_DSYNC, 0o644)
        self.number, self.at, self.index = scan(directory, seed)
        self.map = self.segment(self.number)

    def segment(self, number):
        file = os.open(self.directory / f"segment-{number}.log", os.O_RDWR | os.O_CREAT, 0o644)
        for at in range(os.fstat(file).st_size, self.segment_bytes, 4096):
            os.pwrite(file, bytes(4096), at)
        mapped = mmap.mmap(file, self.segment_bytes)
        os.close(file)
        entry = os.open(self.directory, os.O_RDONLY)
        os.fsync(entry)
        os.close(entry)
        return mapped

    def append(self):
        record = body(self.seed, self.index + 1)
        if self.at + HEAD.size + len(record) + 4 > self.segment_bytes:
            self.map.flush()
            self.map.close()
            self.number, self.at = self.number + 1, 0
            self.map = self.segment(self.number)
        self.index += 1
        start = self.at + HEAD.size
        self.map[start:start + len(record)] = record
        self.map[self.at:start] = HEAD.pack(len(record), zlib.crc32(record), self.index)
        self.at = start + len(record)

    def commit(self):
        self.map.flush()
        os.pwrite(self.meta, struct.pack("<Q", self.index).ljust(256, b"\0"), 0)


def scan(directory, seed):
    """The segment, offset and index after the last whole record."""
    number, at, index = 0, 0, 0
    while (path := directory / f"segment-{number}.log").exists():
        data, at = path.read_bytes(), 0
        while at + HEAD.size <= len(data):
            length, crc, found = HEAD.unpack_from(data, at)
            record = data[at + HEAD.size:at + HEAD.size + length]
            if length == 0 or found != index + 1 or zlib.crc32(record) != crc or record != body(seed, found):
                break
            at, index = at + HEAD.size + length, found
        if not (directory / f"segment-{number + 1}.log").exists():
            break
        # A later segment that no record got into follows one that is full.
        number += 1
    return number, at, index


def append(directory, log, seed, segment_bytes):
    journal, log = Journal(directory, seed, segment_bytes), acks.AckLog(log)
    # Group commit: while one flush is under way, so many records arrive.
    choose = random.Random(seed + journal.index)
    while True:
        first, begun = journal.index + 1, time.monotonic()
        for _ in range(choose.choice((1, 1, 2, 4, 8))):
            journal.append()
        journal.commit()
        log.acknowledged(first, journal.index + 1 - first, begun)


def verify(directory, log, seed):
    last = max(acks.records(log), default=0)
    _, _, index = scan(directory, seed)
    flushed = struct.unpack("<Q", os.pread(os.open(directory / "meta", os.O_RDONLY), 8, 0).ljust(8, b"\0"))[0] if last else 0
    print(f"acknowledged up to {last}, readable up to {index}, the meta store says {flushed}")
    sys.exit(0 if index >= last and index >= flushed >= last else 1)


command, directory, log, seed, segment = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
if command == "append":
    append(directory, log, seed, segment << 20)
else:
    verify(directory, log, seed)
