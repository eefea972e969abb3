"""d. byokd is restarted and crashes under load: the program notices nothing but latency.

nbdfuse does not come back to a server that went away, so nbdkit's retry filter stands between: it connects anew and
sends again what was not answered, as the kernel's client does in vm-tests."""

import random
import re

from parts import acks
from parts.disk import NbdDisk
from parts.shell import Process, until

from .setting import Setting, go_on_for

# The filter waits a second between attempts; a start takes about one.
LONGEST_MS = 15_000


class Patient(Setting):
    """A setting whose client waits for a server that is gone."""

    def open_disk(self):
        socket = self.scratch / "patient.sock"
        socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-U", socket, "--filter=retry", "nbd", f"uri={self.byokd.uri('v')}", "retries=20", "retry-delay=1",
                   "retry-exponential=no"]
        between = Process(self.stack, command, self.report.directory / "retry.log")
        until("nbdkit listens", lambda: socket.exists() or between.ended())
        return NbdDisk(self.stack, f"nbd+unix:///?socket={socket}", self.scratch / "nbd")


def story(stack, report, make_program, seed, quick):
    choose = random.Random(seed)
    s = Patient(stack, report, make_program, seed)
    definition = s.byokd.state / "volumes.d" / "v.toml"
    definition.write_text(re.sub('^attach = .*$', 'attach = "auto"', definition.read_text(), flags=re.MULTILINE))
    s.begin()
    for turn in range(1, (2 if quick else 5) + 1):
        for name in ("restart", "crash"):
            go_on_for(report, f"round {turn}: the load runs until the {name}", s.program, choose.uniform(1.5, 3 if quick else 8))
            report.event(f"{name} {turn}")
            if name == "restart":
                s.byokd.process.stop()
            else:
                s.byokd.process.kill()
            s.byokd.start()
            until("the volume is served again", lambda: s.byokd.volume("v")["state"] == "serving")
            report.event("served again")
            before = acks.last_time(s.program.acks)
            until("the load goes on", lambda: s.program.stopped() or acks.last_time(s.program.acks) > before, 30)
            report.check(f"round {turn}: the load goes on after the {name}", not s.program.stopped())
    go_on_for(report, "the load runs on", s.program, 3)
    series = s.conclude()
    longest = acks.summary(series[s.program.name])["longest"]
    report.check(f"the longest wait for an acknowledgement was {longest / 1000:.1f} s, within {LONGEST_MS / 1000:.0f} s", longest <= LONGEST_MS)
    return series
