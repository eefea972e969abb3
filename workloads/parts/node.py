"""A second node: a daemon with its own configuration, state directory and network, asking the first one's KMS."""

import os
import sys

from .service import Byokd
from .shell import BINARIES, ROOT, Process, does, run, until


class Node(Byokd):
    environment = {"AWS_ACCESS_KEY_ID": "dev", "AWS_SECRET_ACCESS_KEY": "dev"}

    def __init__(self, stack, state, first, log):
        state.mkdir()
        (state / "volumes.d").mkdir()
        name = f"byokd-{os.getpid()}"
        run("ip", "netns", "add", name)
        stack.callback(lambda: does("ip", "netns", "delete", name))
        inside = ("ip", "netns", "exec", name)
        run(*inside, "ip", "link", "set", "lo", "up")
        self.endpoint = relay(stack, state, inside, (first.state / "kms-endpoint").read_text().strip(), log)
        (state / "byokd.toml").write_text(f'''volumes_dir = "{state}/volumes.d"
control_socket = "{state}/byokd.sock"
nbd_dir = "{state}/nbd"

[kms]
region = "eu-central-1"
endpoint = "{self.endpoint}"

[lease]
probe_interval = "1s"
''')
        super().__init__(stack, state, log, prefix=inside)

    def command(self):
        return [BINARIES / "byokd", "--config", self.state / "byokd.toml"]

    def know(self, name, backing):
        """A volume that was made elsewhere."""
        (self.state / "volumes.d" / f"{name}.toml").write_text(f'backing = "{backing}"\n')
        for setting, value in self.settings.items():
            self.define(name, setting, value)


def relay(stack, state, inside, endpoint, log):
    """The development KMS serves its own loopback only; this is the way to it from another network."""
    between, port = state / "kms.sock", endpoint.rsplit(":", 1)[1]
    script = ROOT / "workloads" / "parts" / "relay.py"
    Process(stack, [sys.executable, script, "unix", between, "tcp", port], log)
    until("the relay listens", between.exists)
    # The network is new, so the same port is free there.
    Process(stack, [*inside, sys.executable, script, "tcp", port, "unix", between], log)
    return endpoint
