"""etcd: a Raft log that is synced before anything is acknowledged, and a state beside it (bbolt), as a broker has them.

At its start it checks its log by the checksums in it. The check of its state against other nodes' has nobody to ask here;
that the state is whole is told by what comes out of it."""

import base64
import hashlib
import json
import socket

from parts import acks
from parts.shell import FETCHED, Failure, Process

from .server import Server


class Raft(Server):
    name, purpose = "raft", "zeebe"
    batch, clients = 1, 8
    snapshot_every = 5000
    trouble = ('"level":"error"', '"level":"fatal"', '"level":"panic"', "panic:")

    def launch(self, data):
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, peer = one.getsockname()[1], other.getsockname()[1]
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{peer}"
        command = [FETCHED / "etcd", "--name", "n", "--data-dir", data / "raft", "--listen-client-urls", client, "--advertise-client-urls", client,
                   "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"n={peer}",
                   # Often, so that snapshots and the cutting of the log are under load as well.
                   "--snapshot-count", str(self.snapshot_every), "--quota-backend-bytes", str(2 << 30), "--log-level", "warn"]
        return Process(self.stack, command, self.log)

    def hasten(self):
        self.snapshot_every = 200

    def ready(self):
        try:
            return self.request("GET", "/health").get("health") == "true"
        except (OSError, Failure, ValueError):
            return False

    def value(self, number):
        digest = hashlib.blake2b(f"{self.seed} {number}".encode()).digest()
        return digest * (4 + digest[0] % 28)

    def write(self, connection, first):
        body = json.dumps({"key": encode(b"k%012d" % first), "value": encode(self.value(first))})
        self.request("POST", "/v3/kv/put", body, connection)

    def verify(self, _data):
        promised, found, key = acks.records(self.acks), {}, b"k"
        while True:
            body = json.dumps({"key": encode(key), "range_end": encode(b"l"), "limit": 2000})
            answer = self.request("POST", "/v3/kv/range", body)
            for pair in answer.get("kvs", []):
                key = base64.b64decode(pair["key"])
                found[int(key[1:])] = base64.b64decode(pair["value"])
            if not answer.get("more"):
                break
            key += b"\0"
        wrong = [n for n in promised if found.get(n) != self.value(n)]
        bad = [n for n in found if n not in promised and found[n] != self.value(n)]
        return not wrong and not bad, f"{len(promised)} acknowledged, {len(wrong)} lost or changed {wrong[:5]}, {len(found)} keys in all, {len(bad)} of them damaged"


def encode(data):
    return base64.b64encode(data).decode()
