#!/usr/bin/env python3
"""Loads a real RocksDB with synced writes and checkpoints, and acknowledges what is safe.

Options as Zeebe's state has them (small keys, 32 KiB blocks, 8 MiB files, checkpoints), but with the write-ahead log
on and synced, so that each batch is a promise. Runs in the environment that `workloads/fetch` made.

    rocksdb_writer.py append DIR ACKS SEED
    rocksdb_writer.py verify DIR ACKS SEED
"""

import hashlib
import pathlib
import random
import shutil
import struct
import sys
import time

from rocksdict import Checkpoint, Options, Rdict, WriteBatch, WriteOptions

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from parts import acks

CHECKPOINT_EVERY = 5.0


def key(seed, number):
    """Scattered, so that compaction has work; 24 bytes like Zeebe's."""
    return hashlib.blake2b(struct.pack("<QQ", seed, number), digest_size=24).digest()


def value(seed, number):
    digest = hashlib.blake2b(struct.pack("<QQ", number, seed)).digest()
    return struct.pack("<Q", number) + (digest * 16)[: 32 + digest[0] * 3]


def options():
    o = Options(raw_mode=True)
    o.create_if_missing(True)
    o.set_write_buffer_size(4 << 20)
    o.set_target_file_size_base(8 << 20)
    o.set_max_background_jobs(2)
    o.set_paranoid_checks(True)
    return o


def append(directory, log, seed):
    database, log = Rdict(str(directory / "db"), options()), acks.AckLog(log)
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
        log.acknowledged(number, size, begun)
        number += size
        if begun - checkpoint > CHECKPOINT_EVERY:
            # Zeebe's snapshots; two are kept.
            taken = directory / f"checkpoint-{count % 2}"
            shutil.rmtree(taken, ignore_errors=True)
            Checkpoint(database).create_checkpoint(str(taken))
            checkpoint, count = begun, count + 1


def next_number(database):
    return struct.unpack("<Q", database.get(b"next") or struct.pack("<Q", 1))[0]


def verify(directory, log, seed):
    """Every acknowledged record is there as it was written; what is there besides reads without a fault."""
    database, promised = Rdict(str(directory / "db"), options()), sorted(acks.records(log))
    wrong = [n for n in promised if database.get(key(seed, n)) != value(seed, n)]
    total = sum(1 for _ in database.items())
    whole = total == next_number(database)  # records, and the counter beside them
    print(f"{len(promised)} acknowledged, {len(wrong)} lost or changed {wrong[:5]}, {total} keys in all, {'as' if whole else 'NOT as'} the counter says")
    database.close()
    sys.exit(0 if not wrong and whole else 1)


command, directory, log, seed = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), int(sys.argv[4])
(append if command == "append" else verify)(directory, log, seed)
