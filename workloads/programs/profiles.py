"""Profiles: loads of fio and db_bench with the sizes and the pattern of one part of a program, from ../profiles. All answer to
the same words:

    lay(data, mib)      lays out what the load finds; `mib` is about how much
    run(data, seconds)  the load: (rate, p50 and p99 as a dictionary, throughput as acknowledgements)
    verify(data)        whether what was written and flushed is there, and what says so
"""

import json
import os
import re
import time

from parts.shell import ROOT, Failure, outcome, run

PROFILES = ROOT / "workloads" / "profiles"
MIB = 1 << 20


class Fio:
    """A job file: `lay-JOB` sections come first, then the jobs, then a `check-JOB` for each that wrote. The first of `jobs` is
    the one whose throughput counts; of which job and what the latency is, `timed` says."""
    volume_mib, tools = 4096, ["fio"]
    lays, checks, timed = (), (), None

    def __init__(self, report_dir, seed):
        self.report_dir, self.sizes = report_dir, {"SEED": seed}

    def lay(self, data, mib):
        self.sizes |= {"MIB": mib, "QUARTER": mib // 4}
        if self.lays:
            self._fio(data, self.lays)

    def run(self, data, seconds):
        log = self.report_dir / self.name
        # fio goes on in a log that is there.
        for old in self.report_dir.glob(f"{self.name}_*.log"):
            old.unlink()
        jobs = self._fio(data, self.jobs, RUNTIME=seconds, LOG=log)
        for name, job in jobs.items():
            self.sizes[f"{name}_BYTES".upper().replace("-", "_")] = job["write"]["io_bytes"]
        counted = max((jobs[self.jobs[0]][side] for side in ("read", "write")), key=lambda side: side["io_bytes"])
        found = dict(rate=counted["bw_bytes"] / MIB if self.unit == "MiB/s" else counted["iops"])
        if self.timed:
            job, side = self.timed
            latency = jobs[job][side]["lat_ns" if side == "sync" else "clat_ns"]["percentile"]
            found |= dict(p50=latency["50.000000"] / 1e6, p99=latency["99.000000"] / 1e6)
        beside = [jobs[name][side]["bw_bytes"] / MIB for name in self.jobs[1:] for side in ("read", "write")]
        if sum(beside):
            found["beside"] = sum(beside)
        return found, evenly(counted, time.monotonic()) if self.unit == "MiB/s" else logged(log)

    def verify(self, data):
        if not self.checks:
            return True, "each block that was read was as it had been written"
        try:
            jobs = self._fio(data, [f"check-{name}" for name in self.checks])
        except Failure as failure:
            return False, str(failure)
        read = sum(job["read"]["io_bytes"] for job in jobs.values())
        wanted = sum(self.sizes[f"{name}_BYTES".upper().replace("-", "_")] for name in self.checks)
        return read == wanted > 0, f"{read} of {wanted} bytes are as they were written: {', '.join(self.checks)}"

    def _fio(self, data, sections, **sizes):
        """Runs these sections; what fio found, by job."""
        command = ["fio", "--output-format=json", *(f"--section={name}" for name in sections), PROFILES / self.file]
        env = {**os.environ, "DIR": str(data), **{name: str(value) for name, value in {**self.sizes, **sizes}.items()}}
        code, said, errors = outcome(*command, env=env)
        if code:
            why = [line for line in (errors + said).splitlines() if line.startswith(("crc32c:", "verify:", "fio:"))]
            raise Failure(f"fio, {self.file}, {' '.join(sections)} ended with {code}: {'; '.join(why[:2])}")
        return {job["jobname"]: job for job in json.loads(said[said.index("{"):])["jobs"]}


class Journal(Fio):
    name, purpose, file = "fio-journal", "zeebe", "journal.fio"
    jobs, checks, unit = ["journal"], ["journal"], "flushes/s"
    timed = ("journal", "sync")


class Merge(Fio):
    name, purpose, file = "fio-merge", "elasticsearch", "lucene-merge.fio"
    lays, jobs, checks, unit = ["lay-segments"], ["merge-write", "merge-read"], ["merge-write"], "MiB/s"
    timed = ("merge-read", "read")


class Search(Fio):
    name, purpose, file = "fio-search", "elasticsearch", "lucene-search.fio"
    lays, jobs, unit = ["lay-index"], ["search"], "reads/s"
    timed = ("search", "read")


class Snapshot(Fio):
    name, purpose, file = "fio-snapshot", "backup", "snapshot.fio"
    lays, jobs, checks, unit = ["lay-index"], ["snapshot", "index-read"], ["snapshot"], "MiB/s"


class Mixed(Fio):
    name, purpose, file = "fio-mixed", "zeebe", "mixed-node.fio"
    lays, jobs, unit = ["lay-segments", "lay-index"], ["journal", "translog", "merge-read", "merge-write", "search"], "flushes/s"
    checks = ["journal", "translog", "merge-write"]
    timed = ("journal", "sync")


def logged(log):
    """What fio logged of a rate, as acknowledgements: one for each tenth of a second."""
    ahead = time.time() - time.monotonic()
    lines = [[float(field) for field in line.split(",")] for line in open(f"{log}_iops.log")]
    return [(at / 1000 - ahead, 0, rate / 10, 0.0) for at, rate, *_ in lines]


def evenly(side, ended):
    """What was written, as acknowledgements spread over its time: before the sync, a log would tell the speed of memory."""
    seconds = side["runtime"] / 1000
    steps = int(seconds * 10) + 1
    return [(ended - seconds * (1 - n / steps), 0, side["io_bytes"] / MIB / steps, 0.0) for n in range(steps)]


class DbBench:
    """RocksDB with the options of Zeebe's state. db_bench knows no checkpoints; `ldb`, of the same package, takes one."""
    name, purpose, volume_mib, unit = "db_bench", "zeebe", 4096, "operations/s"
    tools = ["db_bench", "ldb"]
    timed = ("state", "write")

    def __init__(self, report_dir, seed):
        self.report_dir, self.seed = report_dir, seed

    def lay(self, data, mib):
        # A key and, on average, a value.
        self.records = mib * MIB // 324
        self._bench(data / "state", "fillrandom")

    def run(self, data, seconds):
        log = self.report_dir / "db_bench.csv"
        begun = time.monotonic()
        text = self._bench(data / "state", "readrandomwriterandom", "--use_existing_db=true", f"--duration={seconds}",
                           "--report_interval_seconds=1", f"--report_file={log}")
        ended = time.monotonic()
        run("ldb", f"--db={data / 'state'}", "checkpoint", f"--checkpoint_dir={data / 'checkpoint'}")
        checkpoint = time.monotonic() - ended
        self.keys = count(data / "state")
        p50, p99 = re.search(r"per write:.*?P50: (\S+) .*?P99: (\S+)", text, re.DOTALL).groups()
        found = dict(rate=float(re.search(r"micros/op (\d+) ops/sec", text)[1]), p50=float(p50) / 1e3, p99=float(p99) / 1e3, checkpoint=checkpoint * 1e3)
        rows = [line.split(",") for line in log.read_text().splitlines()[1:]]
        return found, [(begun + float(second), 0, int(operations), 0.0) for second, operations in rows]

    def verify(self, data):
        """Of the checkpoint: it is what Zeebe goes on from. It has its files in common with the state."""
        try:
            self._bench(data / "checkpoint", "verifychecksum,verifyfilechecksums", "--use_existing_db=true", "--readonly=true")
            keys = count(data / "checkpoint")
        except Failure as failure:
            return False, str(failure).splitlines()[-1]
        return keys == self.keys, f"{keys} of {self.keys} keys are in the checkpoint, each block and each file as its checksum says"

    def _bench(self, directory, benchmarks, *options):
        return run("db_bench", f"--flagfile={PROFILES / 'zeebe-state.flags'}", f"--db={directory}", f"--benchmarks={benchmarks}", f"--num={self.records}",
                   # About as many prefixes as Zeebe has column families (ZbColumnFamilies.java): a hundred.
                   f"--keys_per_prefix={self.records // 100}", f"--seed={self.seed}", *options)


def count(directory):
    return int(re.search(r"Keys in range: (\d+)", run("ldb", f"--db={directory}", "dump", "--count_only"))[1])


ALL = (Journal, Merge, Search, Snapshot, Mixed, DbBench)
