"""Elasticsearch, one node: documents in bulk, each bulk synced to the translog before it is acknowledged."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import socket
import time

from parts import acks
from parts.shell import FETCHED, Failure, Process, java_home, run, until, wait

from .server import Server

# Elasticsearch refuses to run as root.
USER = "nobody"


class Elastic(Server):
    name, purpose = "es", "elasticsearch"
    batch, clients = 50, 2
    start_within = 300
    # It collects garbage and merges.
    patience = 10
    # A node that cannot write its own state is no master any more, and a bulk waits a minute for one.
    stops_within = 75
    # Of the translog, into Lucene: as it comes.
    flush_at = "10gb"
    trouble = ("[ERROR]", "[WARN ]", "Exception", "SIGBUS", "fatal error")
    harmless = (
        # What a machine for production would have, and what it is asked to do here.
        "BootstrapChecks", "performing expensive diagnostic checks during shard startup",
        # Which snapshots it knows of is written into a state whose reader does not know that part.
        "Skipping unknown custom object with type registered_snapshots",
        # Two processors for everything: it took long. How long is too long, the story says.
        "JvmGcMonitorService", "timer thread slept for", "which is above the warn threshold")
    index = "load"

    def __init__(self, stack, report_dir, seed):
        super().__init__(stack, report_dir, seed)
        self.repository, self.doubtful = None, set()

    def launch(self, data):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, transport = one.getsockname()[1], other.getsockname()[1]
        home = data.parent / "es"
        shutil.rmtree(home, ignore_errors=True)
        # Of one version: fetching another one takes the place of it.
        complete = next(FETCHED.glob("elasticsearch-*/complete"), None)
        if complete is None:
            raise Failure("Elasticsearch is not there; workloads/fetch --full brings it")
        distribution = complete.parent
        print(distribution.name, flush=True)
        for part in ("bin", "lib", "modules"):
            home.mkdir(exist_ok=True)
            (home / part).symlink_to(distribution / part)
        shutil.copytree(distribution / "config", home / "config")
        for part in ("logs", "plugins", "tmp"):
            (home / part).mkdir()
        (data / "es").mkdir(exist_ok=True)
        settings = {
            "cluster.name": "workloads", "node.name": "n", "discovery.type": "single-node", "network.host": "127.0.0.1",
            "http.port": self.port, "transport.port": transport, "path.data": str(data / "es"), "path.logs": str(home / "logs"),
            "xpack.security.enabled": False,
            # Sized for disks of terabytes.
            "cluster.routing.allocation.disk.threshold_enabled": False,
        }
        if self.repository:
            settings["path.repo"] = str(self.repository)
        # JSON is YAML.
        (home / "config" / "elasticsearch.yml").write_text(json.dumps(settings))
        for place in (home, data / "es"):
            run("chown", "-R", f"{USER}:", place)
        env = {"PATH": os.environ["PATH"], "ES_JAVA_HOME": java_home(), "ES_PATH_CONF": str(home / "config"), "ES_TMPDIR": str(home / "tmp"),
               "ES_JAVA_OPTS": "-Xms512m -Xmx512m", "HOME": str(home)}
        # One process group, so that the launcher's JVM is not left behind when it is killed.
        return ProcessTree(self.stack, ["setpriv", f"--reuid={USER}", "--regid=nogroup", "--clear-groups", home / "bin" / "elasticsearch"], self.log,
                           env=env, cwd=home, start_new_session=True)

    def hasten(self):
        self.flush_at = "1mb"

    def ready(self):
        try:
            self.request("GET", "/_cluster/health?wait_for_status=yellow&timeout=1s")
        except (OSError, Failure, ValueError):
            return False
        return True

    def load(self):
        try:
            self.request("GET", f"/{self.index}")
        except Failure:
            settings = {"number_of_shards": 1, "number_of_replicas": 0, "index.translog.durability": "request", "refresh_interval": "1s",
                        # What Lucene wrote is checked by its checksums whenever the index is opened.
                        "index.shard.check_on_startup": "checksum", "index.translog.flush_threshold_size": self.flush_at}
            mappings = {"properties": {"n": {"type": "long"}, "hash": {"type": "keyword"}, "text": {"type": "text"}}}
            self.request("PUT", f"/{self.index}", json.dumps({"settings": settings, "mappings": mappings}))
        super().load()

    def document(self, number):
        choose = random.Random(self.seed << 40 | number)
        text = " ".join("w%d" % int(20000 * choose.random() ** 3) for _ in range(60))
        return {"n": number, "text": text, "hash": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}

    def write(self, connection, first):
        lines = []
        for n in range(first, first + self.batch):
            lines += [json.dumps({"index": {"_id": str(n)}}), json.dumps(self.document(n))]
        answer = self.request("POST", f"/{self.index}/_bulk", "\n".join(lines) + "\n", connection, "application/x-ndjson")
        if answer["errors"]:
            raise Failure(f"bulk: {next(i['index']['error'] for i in answer['items'] if 'error' in i['index'])}")

    def kill(self):
        """A disk may have failed before. When a sync of the translog fails, Elasticsearch closes it, and acknowledges whatever
        other bulk waits for a sync: "already closed" counts as synced (InternalEngine, the write of its translog's sync processor).
        So the last bulk of each client but one is no promise."""
        super().kill()
        last = acks.read(self.acks)[1 - self.clients:]
        self.doubtful |= {n for _, first, count, _ in last for n in range(first, first + count)}

    def verify(self, _data):
        """Every acknowledged document by its id and every word of it; then Lucene's own count, and searches."""
        self.request("GET", f"/_cluster/health/{self.index}?wait_for_status=green&timeout=120s")
        self.request("POST", f"/{self.index}/_refresh")
        promised, wrong, excused = sorted(acks.records(self.acks)), [], []
        for at in range(0, len(promised), 500):
            body = json.dumps({"ids": [str(n) for n in promised[at:at + 500]]})
            for n, found in zip(promised[at:at + 500], self.request("POST", f"/{self.index}/_mget", body)["docs"]):
                if not found.get("found") and n in self.doubtful:
                    excused.append(n)
                elif not found.get("found") or found["_source"] != self.document(n):
                    wrong.append(n)
        count = self.request("GET", f"/{self.index}/_count")["count"]
        query = {"size": 0, "query": {"range": {"n": {"gte": 0}}}}
        hits = self.request("POST", f"/{self.index}/_search?track_total_hits=true", json.dumps(query))["hits"]["total"]["value"]
        whole = not wrong and count + len(excused) >= len(promised) and hits == count
        said = f"{len(promised)} acknowledged, {len(wrong)} lost or changed {wrong[:5]}, {count} documents by count, {hits} by a search"
        return whole, said + (f"; and lost {len(excused)} that it acknowledged while its translog failed" if excused else "")


    # To a repository on another volume.

    def back_up_to(self, directory):
        self.repository = directory / "repository"
        self.repository.mkdir()
        run("chown", f"{USER}:", self.repository)

    def merge(self):
        """Into one segment; gives the seconds that it took."""
        begun = time.monotonic()
        self.request("POST", f"/{self.index}/_forcemerge?max_num_segments=1")
        return time.monotonic() - begun

    def back_up(self):
        self._register()
        begun = time.monotonic()
        answer = self.request("PUT", "/_snapshot/shelf/one?wait_for_completion=true", json.dumps({"indices": self.index}))
        if answer["snapshot"]["state"] != "SUCCESS":
            raise Failure(f"snapshot: {answer}")
        return time.monotonic() - begun

    def lose(self):
        self.request("DELETE", f"/{self.index}")

    def restore(self):
        self._register()
        begun = time.monotonic()
        answer = self.request("POST", "/_snapshot/shelf/one/_restore?wait_for_completion=true")
        if answer["snapshot"]["shards"]["failed"]:
            raise Failure(f"restore: {answer}")
        return time.monotonic() - begun

    def _register(self):
        """It is verified by writing to it."""
        repository = {"type": "fs", "settings": {"location": str(self.repository)}}
        self.request("PUT", "/_snapshot/shelf", json.dumps(repository))


class ProcessTree(Process):
    """A launcher and what it launched."""

    def kill(self):
        try:
            os.killpg(self.child.pid, 9)
        except ProcessLookupError:
            pass
        wait(self.child)
        # A killed process holds its files until it is gone, which its parent's end does not say.
        until("all of the process group are gone", lambda: not living(self.child.pid))

    def stop(self, seconds=60):
        code = super().stop(seconds)
        until("all of the process group are gone", lambda: not living(self.child.pid))
        return code


def living(group):
    """Threads of a process group that are more than a zombie: the first of a process may be one while others still end."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):
            # It has ended meanwhile.
            continue
        if int(member_of) == group and state not in "ZX":
            found.append(stat.parent.name)
    return found
