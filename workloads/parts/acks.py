"""The log of what a program has acknowledged. It lies off the device, one line for each acknowledgement:

    TIME FIRST COUNT LATENCY     seconds of CLOCK_MONOTONIC, the first record and how many, milliseconds
"""

import os
import time


class AckLog:
    """For the side that loads. One write for a line, so that a crash leaves whole lines."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def acknowledged(self, first, count, begun):
        now = time.monotonic()
        os.write(self.file, f"{now:.6f} {first} {count} {(now - begun) * 1000:.3f}\n".encode())


def read(path):
    """All of it: tuples of time, first, count, latency."""
    if not path.exists():
        return []
    with open(path) as lines:
        rows = [line.split() for line in lines]
    return [(float(t), int(first), int(count), float(latency)) for t, first, count, latency in rows]


def records(path):
    """The numbers of all records acknowledged."""
    return {n for _, first, count, _ in read(path) for n in range(first, first + count)}


def last_time(path):
    """When the latest acknowledgement came; 0 if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 200))
            lines = file.read().split(b"\n")
            return float(lines[-2].split()[0]) if len(lines) > 1 else 0.0
    except FileNotFoundError:
        return 0.0


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def summary(rows):
    """Records a second, latency, and the longest time without any, between the first and the last acknowledgement."""
    if len(rows) < 2:
        return dict(records=sum(r[2] for r in rows), rate=0.0, **dict.fromkeys(("p50", "p99", "longest", "silence"), float("nan")))
    latencies = [r[3] for r in rows]
    count = sum(r[2] for r in rows)
    times = sorted(r[0] for r in rows)
    return dict(records=count, rate=count / max(times[-1] - times[0], 1e-6), p50=percentile(latencies, 0.5), p99=percentile(latencies, 0.99),
                longest=max(latencies), silence=max(after - before for before, after in zip(times, times[1:])))
