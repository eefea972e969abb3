"""b. The customer denies the key in the middle of the load, and gives it back.

The program has to stop or see errors in bounded time with nothing hanging; after the key is back and the file system
mounted again, it starts, and every acknowledged record is there."""

import time

from parts import acks
from parts.shell import until

from .setting import Setting, go_on_for

# Interval of the probes, their variation and the promise of 2 s.
FENCED_WITHIN = 3.3
# What was written before needs no key any more; the way back to the program is short.
LATEST_ACK = 0.5
# Unmounting, and the end of the client: nothing waits for a key in that.
GONE_WITHIN = 30


def story(stack, report, make_program, seed, quick):
    s = Setting(stack, report, make_program, seed)
    s.begin()
    go_on_for(report, "the load runs while the key is allowed", s.program, 5 if quick else 40)
    ways = [("disable", "enable"), ("deny", "allow")]
    # The long form knows both, the short one that of its seed.
    for way in [ways[1 - seed % 2]] if quick else ways:
        deny_and_allow(s, report, way)
        go_on_for(report, "the load runs again", s.program, 3 if quick else 30)
    return s.conclude()


def deny_and_allow(s, report, way):
    denied = report.event(f"key: {way[0]}")
    s.byokd.ctl("dev", "key", way[0], s.key)
    until("the volume is fenced", lambda: s.byokd.volume("v")["state"] == "fenced")
    fenced = report.event("fenced")
    report.check(f"fenced {fenced - denied:.2f} s after the change, within {FENCED_WITHIN} s", fenced - denied <= FENCED_WITHIN)
    until(f"{s.program.name} stops or sees errors", s.program.stopped, 120)
    report.number("from the change to the program's end or first error", time.monotonic() - denied, "s")
    until(f"everyone who waited for {s.program.name} sees an error", s.program.load_ended, 120)
    ended = report.event(f"{s.program.name}'s load has ended") - denied
    report.check(f"nothing of the load hangs: all of it ended {ended:.2f} s after the change, within {s.program.stops_within} s", ended <= s.program.stops_within)
    last = acks.last_time(s.program.acks) - fenced
    report.check(f"the last acknowledgement came {last:.2f} s after the fence, not later than {LATEST_ACK} s", last <= LATEST_ACK)
    report.log_lines(s.program.name, s.program.complaints())
    s.program.kill()
    begun = time.monotonic()
    s.unmount()
    gone = report.event("unmounted") - begun
    report.check(f"nothing hangs: file system, disk and client went in {gone:.1f} s, within {GONE_WITHIN} s", gone <= GONE_WITHIN)
    s.byokd.ctl("dev", "key", way[1], s.key)
    report.event(f"key: {way[1]}")
    until("the volume is served again", lambda: s.byokd.volume("v")["state"] == "serving")
    report.event("served again")
    s.mount("after the key came back")
    s.program.start(s.data)
    s.everything_is_there("after the key came back")
    s.program.load()
    report.event("load goes on")
