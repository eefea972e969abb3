"""Programs that serve others: a process, and clients of it that load it."""

import http.client
import json
import threading
import time

from parts import acks
from parts.shell import Failure, until


class Server:
    """A server with an HTTP interface, and `CLIENTS` threads of load on it."""

    volume_mib, tools, patience, stops_within = 4096, [], 5, 10
    # Words of lines that are no complaint though they look like one.
    harmless = ()
    clients = 4
    start_within = 120

    def __init__(self, stack, report_dir, seed):
        self.stack, self.report_dir, self.seed = stack, report_dir, seed
        self.acks, self.log = report_dir / f"{self.name}.acks", report_dir / f"{self.name}.log"
        self.acks.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        self.ending, self.errors, self.threads = threading.Event(), [], []
        self.lock, self.next = threading.Lock(), 1
        self.process, self.overlooked = None, 0

    def start(self, data):
        self.data = data
        self.process = self.launch(data)
        until(f"{self.name} serves", lambda: self.process.ended() or self.ready(), self.start_within)
        if self.process.ended():
            raise Failure(f"{self.name} ended with {self.process.child.returncode} at start: {self.complaints()[-3:]}")

    def load(self):
        self.ending.clear()
        self.errors.clear()
        log = acks.AckLog(self.acks)
        self.threads = [threading.Thread(target=self._client, args=(log,), daemon=True) for _ in range(self.clients)]
        for thread in self.threads:
            thread.start()
        begun = time.monotonic()
        until(f"{self.name} acknowledges", lambda: self.errors or acks.last_time(self.acks) > begun)
        if self.errors:
            raise Failure(f"{self.name}'s load failed at once: {self.errors[0]}")

    def _client(self, log):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            while not self.ending.is_set():
                with self.lock:
                    first, self.next = self.next, self.next + self.batch
                begun = time.monotonic()
                self.write(connection, first)
                log.acknowledged(first, self.batch, begun)
        except (OSError, http.client.HTTPException, Failure) as error:
            if not self.ending.is_set():
                self.errors.append(f"{type(error).__name__}: {error}"[:300])
        finally:
            connection.close()

    def request(self, method, path, body=None, connection=None, kind="application/json"):
        """One request; its answer as JSON. Anything but success is a Failure."""
        own = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            own.request(method, path, body, {"Content-Type": kind})
            answer = own.getresponse()
            text = answer.read().decode()
            if answer.status >= 300:
                raise Failure(f"{method} {path}: {answer.status} {text[:300]}")
            return json.loads(text) if text else {}
        finally:
            if own is not connection:
                own.close()

    def stopped(self):
        return self.process.ended() or bool(self.errors)

    def load_ended(self):
        return not any(thread.is_alive() for thread in self.threads)

    def halt(self):
        self.ending.set()
        self._join()
        if self.errors:
            raise Failure(f"{self.name}'s load failed: {self.errors[0]}")

    def stop(self):
        self.process.stop()

    def kill(self):
        self.ending.set()
        self.process.kill()
        self._join()
        self.errors.clear()
        self.overlooked = len(self._lines())

    def _join(self):
        for thread in self.threads:
            thread.join(120)
        if not self.load_ended():
            raise Failure(f"{self.name}: clients hang, though none waits longer than a minute for an answer")

    def complaints(self):
        """What its own log says, and then what its clients heard."""
        lines = self._lines()[self.overlooked:]
        return [line for line in lines if any(word in line for word in self.trouble) and not any(word in line for word in self.harmless)] + self.errors

    def _lines(self):
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
