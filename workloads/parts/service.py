"""byokd with its development KMS, as the stories use it."""

import json
import os
import urllib.request

from .shell import BINARIES, Failure, Process, outcome, until


class Byokd:
    """A daemon with a state directory of its own; it may be killed and started again."""

    environment = {}
    # What the definitions of all volumes have besides.
    settings = {}

    def __init__(self, stack, state, log, options=("--probe-interval", "1s"), prefix=()):
        self.stack, self.state, self.log, self.options, self.prefix = stack, state, log, options, prefix
        self.start()

    def start(self):
        (self.state / "byokd.sock").unlink(missing_ok=True)
        self.process = Process(self.stack, [*self.prefix, *self.command()], self.log, env={**os.environ, **self.environment})
        until("byokd answers", lambda: self.process.ended() or self.call("status")[0] == 0)
        if self.process.ended():
            raise Failure(f"byokd ended with {self.process.child.returncode}; {self.log} says why")

    def command(self):
        return [BINARIES / "byokd", "--dev", "--state-dir", self.state, *self.options]

    def call(self, *args):
        """A command of byokctl: its exit code and its answer."""
        env = {**os.environ, "BYOKD_STATE_DIR": str(self.state), "BYOKD_SOCKET": str(self.state / "byokd.sock")}
        code, said, errors = outcome(BINARIES / "byokctl", "--json", *args, env=env, seconds=60)
        return code, json.loads(said) if said.startswith("{") else {"why": said + errors}

    def ctl(self, *args):
        code, answer = self.call(*args)
        if code:
            raise Failure(f"byokctl {' '.join(map(str, args))} ended with {code}: {answer}")
        return answer

    def key(self):
        return self.ctl("dev", "key", "create")["key_arn"]

    def create(self, name, backing, size, key, purpose):
        self.ctl("volume", "create", name, "--backing", backing, "--size", size, "--key", key, "--purpose", purpose)
        for setting, value in self.settings.items():
            self.define(name, setting, value)

    def define(self, name, key, value):
        """Gives a setting in the definition of a volume that is not attached another value."""
        path = self.state / "volumes.d" / f"{name}.toml"
        others = [line for line in path.read_text().splitlines() if not line.startswith(f"{key} =")]
        path.write_text("\n".join([f"{key} = {json.dumps(value)}", *others]) + "\n")

    def volume(self, name):
        return self.ctl("status", name)["volumes"][0]

    def uri(self, name):
        return f"nbd+unix:///{name}?socket={self.state}/nbd/{name}.sock"

    def fault(self, **fault):
        """Sets a fault of the development KMS."""
        self._kms("POST", json.dumps(fault).encode())

    def clear_faults(self):
        self._kms("DELETE", None)

    def _kms(self, method, body):
        endpoint = (self.state / "kms-endpoint").read_text().strip()
        request = urllib.request.Request(f"{endpoint}/_dev/faults", method=method, data=body)
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    def cpu_seconds(self):
        fields = open(f"/proc/{self.process.child.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def most_resident_mib(self):
        status = open(f"/proc/{self.process.child.pid}/status").read()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
