#!/usr/bin/env python3
"""Loads a real RocksDB with synced writes and checkpoints, and acknowledges what is safe.

Options as Zeebe's state has them (small keys, 32 KiB blocks, 8 MiB files, checkpoints), but with the write-ahead log
on and synced, so that each batch is a promise, and so is each checkpoint. Runs in the environment that `workloads/fetch` made.

    rocksdb_writer.py append DIR ACKS SEED CHECKPOINT_EVERY     seconds
    rocksdb_writer.py verify DIR ACKS SEED CHECKPOINT_EVERY

Beside ACKS, off the device, are ACKS.checkpoints, what became of each checkpoint, and ACKS.logs/, RocksDB's own logs.
"""

import hashlib
import os
import pathlib
import random
import shutil
import struct
import sys
import time

from rocksdict import AccessType, BlockBasedOptions, Checkpoint, Options, Rdict, WriteBatch, WriteOptions

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from parts import acks


def key(seed, number):
    """Scattered, so that compaction has work; 24 bytes like Zeebe's."""
    return hashlib.blake2b(struct.pack("<QQ", seed, number), digest_size=24).digest()


def value(seed, number):
    digest = hashlib.blake2b(struct.pack("<QQ", number, seed)).digest()
    return struct.pack("<Q", number) + (digest * 16)[: 32 + digest[0] * 3]


def options():
    blocks = BlockBasedOptions()
    blocks.set_block_size(32 << 10)
    o = Options(raw_mode=True)
    o.set_block_based_table_factory(blocks)
    o.set_db_log_dir(f"{log}.logs")
    o.create_if_missing(True)
    o.set_write_buffer_size(4 << 20)
    o.set_target_file_size_base(8 << 20)
    o.set_max_background_jobs(2)
    o.set_paranoid_checks(True)
    return o


class Checkpoints:
    """The log of checkpoints: "made NAME UPTO" when one is there for good, "gone NAME" before it is touched again."""

    def __init__(self, path):
        self.file = os.open(f"{path}.checkpoints", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def made(self, name, upto):
        os.write(self.file, f"made {name} {upto}\n".encode())

    def gone(self, name):
        os.write(self.file, f"gone {name}\n".encode())


def promised_checkpoints(path):
    """Which there have to be, and the counter of each."""
    path, there = pathlib.Path(f"{path}.checkpoints"), {}
    for what, name, *upto in (line.split() for line in (path.read_text().splitlines() if path.exists() else [])):
        there.pop(name, None)
        if what == "made":
            there[name] = int(upto[0])
    return there


def append(directory, every):
    database, acknowledge, checkpoints = Rdict(str(directory / "db"), options()), acks.AckLog(log), Checkpoints(log)
    synced = WriteOptions()
    synced.sync = True
    number = next_number(database)
    choose, checkpoint, count = random.Random(seed + number), time.monotonic(), 0
    while True:
        size, begun = choose.choice((1, 4, 16, 64)), time.monotonic()
        batch = WriteBatch(raw_mode=True)
        for n in range(number, number + size):
            batch.put(key(seed, n), value(seed, n))
        batch.put(b"next", struct.pack("<Q", number + size))
        database.write(batch, synced)
        acknowledge.acknowledged(number, size, begun)
        number += size
        if begun - checkpoint > every:
            # Zeebe's snapshots; two are kept. RocksDB makes one under another name and renames it when it is whole;
            # an old one loses its name before its files, so that whatever bears the name is whole.
            taken, old = directory / f"checkpoint-{count % 2}", directory / "old"
            shutil.rmtree(old, ignore_errors=True)
            checkpoints.gone(taken.name)
            if taken.exists():
                taken.rename(old)
            # What a crash left of one that was being made.
            shutil.rmtree(f"{taken}.tmp", ignore_errors=True)
            Checkpoint(database).create_checkpoint(str(taken))
            checkpoints.made(taken.name, number)
            checkpoint, count = begun, count + 1


def next_number(database):
    return struct.unpack("<Q", database.get(b"next") or struct.pack("<Q", 1))[0]


def contents(database):
    """What a database holds, in one pass: how many good records, the numbers that were found, and up to which it counted."""
    found, bad, total = set(), 0, 0
    for k, v in database.items():
        total += 1
        if k == b"next":
            continue
        number = struct.unpack_from("<Q", v)[0] if len(v) >= 8 else 0
        if k == key(seed, number) and v == value(seed, number):
            found.add(number)
        else:
            bad += 1
    return found, bad, next_number(database)


def verify(directory):
    """Every acknowledged record is there as it was written, in the database and, up to its counter, in each checkpoint, of
    which none that was made is missing; what is there besides reads without a fault."""
    database, promised = Rdict(str(directory / "db"), options()), acks.records(log)
    found, bad, upto = contents(database)
    database.close()
    lost = sorted(promised - found)
    whole = not bad and found == set(range(1, upto))
    made = promised_checkpoints(log)
    taken = [path for path in (directory / "checkpoint-0", directory / "checkpoint-1") if path.exists() or path.name in made]
    broken = [fault for path in taken if (fault := fault_of(path, made.get(path.name, 1)))]
    print(f"{len(promised)} acknowledged, {len(lost)} lost or changed {lost[:5]}, {len(found)} in all, {'as' if whole else 'NOT as'} the counter says; "
          f"{len(made)} checkpoints made and {len(taken)} there, {'; '.join(broken) or 'each whole'}")
    sys.exit(0 if not lost and whole and not broken else 1)


def fault_of(checkpoint, made_at):
    """What is wrong with a checkpoint: it has to hold all records up to its counter, as they were written, and no more; and
    the counter is not behind where it was made."""
    try:
        database = Rdict(str(checkpoint), options(), access_type=AccessType.read_only())
        found, bad, upto = contents(database)
        database.close()
    except Exception as error:
        return f"{checkpoint.name} cannot be read: {error}"
    if upto < made_at:
        return f"{checkpoint.name} counts to {upto} and was made at {made_at}"
    if bad or found != set(range(1, upto)):
        return f"{checkpoint.name} has {len(found)} records where {upto - 1} were counted, and {bad} changed"
    return None


command, directory, log, seed, every = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
if command == "append":
    append(directory, every)
else:
    verify(directory)
