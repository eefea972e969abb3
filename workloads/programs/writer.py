"""Programs that are their own load: the journals and RocksDB. One process appends until it is stopped."""

import shutil
import signal
import sys
import time

from parts import acks
from parts.shell import FETCHED, ROOT, Failure, Process, java_home, outcome, until

HERE = ROOT / "workloads" / "programs"


class Writer:
    volume_mib, tools, patience, stops_within = 4096, [], 5, 10
    script, python, arguments = None, sys.executable, ()

    def __init__(self, stack, report_dir, seed):
        self.stack, self.seed = stack, seed
        self.acks, self.log = report_dir / f"{self.name}.acks", report_dir / f"{self.name}.log"
        self.acks.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        self.process, self.overlooked = None, 0

    def command(self, verb, data):
        return [self.python, HERE / self.script, verb, data / self.name, self.acks, self.seed, *self.arguments]

    def hasten(self):
        self.arguments = self.often

    def start(self, data):
        (data / self.name).mkdir(exist_ok=True)
        self.data = data

    def load(self):
        self.process = Process(self.stack, self.command("append", self.data), self.log)
        begun = time.monotonic()
        until(f"{self.name} acknowledges", lambda: self.process.ended() or acks.last_time(self.acks) > begun)
        if self.process.ended():
            raise Failure(f"{self.name} ended before it acknowledged anything: {self.complaints()[-1:]}")

    def stopped(self):
        return self.process.ended()

    load_ended = stopped

    def halt(self):
        if self.process.ended():
            raise Failure(f"{self.name} ended by itself with {self.process.child.returncode}: {self.complaints()[-3:]}")
        self.process.kill()

    def stop(self):
        pass

    def kill(self):
        self.process.kill()
        self.overlooked = len(self._lines())

    def verify(self, data):
        code, said, errors = outcome(*self.command("verify", data))
        return code == 0, (said + errors).strip()

    def complaints(self):
        """All of its log: as long as all is well it says nothing."""
        code = self.process.child.returncode if self.process else None
        sigbus = ["ended by SIGBUS: a page of the mapped segment could not be had"] if code == -signal.SIGBUS else []
        return self._lines()[self.overlooked:] + sigbus

    def _lines(self):
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []


class Journal(Writer):
    """Zeebe's journal, as a generator. Its argument is the size of a segment."""
    name, purpose, script = "journal", "zeebe", "journal_writer.py"
    arguments, often = (128,), (4,)


class Atomix(Writer):
    """A Raft journal of Atomix, from which Zeebe's descends, in a JVM. Its argument is the size of a segment."""
    name, purpose = "atomix", "zeebe"
    arguments, often = (128,), (4,)

    def command(self, verb, data):
        place = FETCHED / "atomix"
        if not (place / "version").exists():
            raise Failure("Atomix is not there; workloads/fetch --full brings it")
        java = [f"{java_home()}/bin/java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:-CreateCoredumpOnCrash",
                f"-XX:ErrorFile={self.log}.crash-%p", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{place}:{place}/lib/*"]
        return [*java, "AtomixJournal", verb, data / self.name, self.acks, self.seed, *self.arguments]


class RocksDb(Writer):
    """RocksDB itself."""
    name, purpose, script = "rocksdb", "zeebe", "rocksdb_writer.py"
    python = FETCHED / "venv" / "bin" / "python"
    # Seconds from one checkpoint to the next.
    arguments, often = (5,), (1,)

    def __init__(self, stack, report_dir, seed):
        super().__init__(stack, report_dir, seed)
        self.own_logs = report_dir / "rocksdb.acks.logs"
        (report_dir / "rocksdb.acks.checkpoints").unlink(missing_ok=True)
        shutil.rmtree(self.own_logs, ignore_errors=True)

    def kill(self):
        super().kill()
        if self.own_logs.exists():
            self.own_logs.rename(f"{self.own_logs}.{time.monotonic():.0f}")

    def complaints(self):
        """And of RocksDB's own logs what is above the level of information."""
        lines = [line for log in self.own_logs.glob("*LOG*") for line in log.read_text(errors="replace").splitlines()]
        return super().complaints() + [line for line in lines if any(level in line for level in ("[WARN]", "[ERROR]", "[FATAL]"))]
