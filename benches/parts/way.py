"""The way to KMS, as bad as it is told to be: a proxy that harms single exchanges byte by byte."""

import collections
import re
import socket
import struct
import threading
import time

HARMS = ("cut", "cut-request", "delay", "flip", "flip-request", "replay", "drip", "reset", "garbage", "split")
DENIALS = (b"AccessDeniedException", b"DisabledException", b"KMSInvalidStateException", b"NotFoundException")


class Way:
    """Listens on a port of its own and passes requests on to KMS. `harm` is the share of exchanges that are
    harmed; while `down`, every connection is reset."""

    def __init__(self, kms_port, random):
        self.kms_port, self.random = kms_port, random
        self.harm, self.down = 0.0, False
        self.lock = threading.Lock()
        self.counts = {}
        self.denied = {}
        self.allowed = {}
        self.kept = []
        self.exchanges = collections.deque(maxlen=400)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.listen, daemon=True).start()

    def first_denial(self, volume, since):
        """When the first answer that denied this volume's canary or key was delivered unharmed."""
        with self.lock:
            return min((at for at in self.denied.get(volume, []) if at >= since), default=None)

    def tale(self, volume, since):
        """What went on for this volume, a line for each exchange: when, what was done to it, and what was told to KMS's client."""
        with self.lock:
            return [f"{asked - since:.3f} to {done - since:.3f} s: {harm or 'unharmed'}, {said or 'no answer'}"
                    for asked, done, uuid, harm, said in self.exchanges if uuid == volume and done >= since]

    def longest_without(self, volume, since):
        """The longest time that this volume was without an unharmed success, of those that had not ended by `since`. A
        success counts from when it was asked for."""
        with self.lock:
            asked = [*self.allowed.get(volume, []), time.monotonic()]
        return max((b - a for a, b in zip(asked, asked[1:]) if b >= since), default=0.0)

    def forget(self):
        """Nothing is replayed that a daemon heard which has ended: a new one does not know what came before it."""
        with self.lock:
            self.kept.clear()

    def listen(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        client.settimeout(60)
        try:
            while True:
                if self.down:
                    return reset(client)
                request = message(client)
                if not request or not self.exchange(client, request):
                    return
        except OSError:
            pass
        finally:
            client.close()

    def exchange(self, client, request):
        """One request and its answer. Says whether the connection goes on."""
        if self.down:
            reset(client)
            return False
        with self.lock:
            harm = self.random.choice(HARMS) if self.random.random() < self.harm else None
            place, pause = self.random.random(), self.random.uniform(0.05, 4)
            old = self.random.choice(self.kept) if self.kept else b""
            asked = time.monotonic()
            self.counts[harm or "unharmed"] = self.counts.get(harm or "unharmed", 0) + 1
        said = "cut off"
        try:
            said = self.pass_on(client, request, harm, place, pause, old, asked)
            return bool(said)
        finally:
            with self.lock:
                self.exchanges.append((asked, time.monotonic(), volume_of(request), harm, said))

    def pass_on(self, client, request, harm, place, pause, old, asked):
        """The same, harmed so. Says what was told; nothing if the connection ends with it."""
        if harm == "reset":
            reset(client)
            return ""
        if harm == "garbage":
            client.sendall(bytes(int(place * 251 + n * 7) % 256 for n in range(300)))
            return ""
        if harm == "replay" and old:
            client.sendall(old)
            return "replayed"
        if harm == "flip-request":
            request = flipped(request, place)
        if harm == "cut-request":
            request = request[: int(place * len(request))]
        answer = self.ask(request)
        if not answer:
            return ""
        if harm == "cut":
            client.sendall(answer[: int(place * len(answer))])
            return ""
        if harm == "delay":
            time.sleep(pause)
        if harm == "flip":
            answer = flipped(answer, place)
        if harm == "drip":
            for n in range(len(answer)):
                client.sendall(answer[n : n + 1])
                time.sleep(0.02)
        elif harm == "split":
            for n in range(0, len(answer), 7):
                client.sendall(answer[n : n + 7])
        else:
            client.sendall(answer)
        if harm in (None, "split", "replay"):
            return self.remember(request, answer, asked)
        return "answered"

    def remember(self, request, answer, asked):
        """Notes an answer that was delivered unharmed; says what it told."""
        volume = volume_of(request)
        with self.lock:
            self.kept = self.kept[-50:] + [answer]
            if volume and b"TrentService.Decrypt" in request and any(word in answer for word in DENIALS):
                self.denied.setdefault(volume, []).append(time.monotonic())
                return "denied"
            if volume and b'"Plaintext"' in answer:
                self.allowed[volume] = self.allowed.get(volume, [])[-50:] + [asked]
        return "answered"

    def ask(self, request):
        with socket.create_connection(("127.0.0.1", self.kms_port), timeout=5) as kms:
            kms.settimeout(5)
            kms.sendall(request)
            return message(kms)


def volume_of(request):
    """The uuid of the volume that a request is for."""
    volume = re.search(rb'"byokd:volume-uuid":\s*"([^"]+)"', request)
    return volume and volume[1].decode()


def message(connection):
    """The bytes of one HTTP message, as far as they come."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return data
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length:\s*(\d+)", head)
        while length and len(body) < int(length[1]):
            more = connection.recv(65536)
            if not more:
                break
            body += more
        return head + b"\r\n\r\n" + body
    except TimeoutError:
        return data


def flipped(data, place):
    at = int(place * len(data))
    return data[:at] + bytes([data[at] ^ 1 << int(place * 8 * len(data)) % 8]) + data[at + 1 :]


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
