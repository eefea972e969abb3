"""c. KMS is out of reach for minutes under load, in one way after another: the program notices nothing."""

from parts import acks
from parts.shell import until

from .setting import Setting, go_on_for

FAULTS = [dict(fault="timeout"), dict(fault="reset"), dict(fault="throttle"), dict(fault="http", status=503), dict(fault="html", status=403)]
# Interval of the probes, their variation, and the longest that one waits for an answer.
NOTICED_WITHIN = 10


def story(stack, report, make_program, seed, quick):
    s = Setting(stack, report, make_program, seed)
    s.begin()
    go_on_for(report, "the load runs", s.program, 3)
    for fault, seconds in zip(FAULTS, [3] * 5 if quick else [180, 30, 30, 30, 30]):
        name = fault["fault"]
        s.byokd.fault(**fault)
        report.event(f"KMS: {name}")
        # A fault that does not reach byokd would be none to go on under.
        until(f"byokd is without a verdict: {name}", lambda: s.byokd.volume("v")["state"] == "unverified", NOTICED_WITHIN)
        go_on_for(report, f"{name}: the load notices nothing", s.program, seconds)
        volume = s.byokd.volume("v")
        report.check(f"{name}: {volume['state']}, {volume['failed_requests']} requests failed",
                     volume["state"] == "unverified" and volume["failed_requests"] == 0)
        s.byokd.clear_faults()
        report.event("KMS is back")
        until("KMS has allowed the key again", lambda: s.byokd.volume("v")["state"] == "serving", NOTICED_WITHIN)
    go_on_for(report, "the load runs on", s.program, 3)
    series = s.conclude()
    load, patience = acks.summary(series[s.program.name]), s.program.patience
    report.check(f"the longest wait for an acknowledgement was {load['longest'] / 1000:.1f} s, and {load['silence']:.1f} s without any, within {patience} s",
                 max(load["longest"] / 1000, load["silence"]) <= patience)
    return series
