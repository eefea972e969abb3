"""c. KMS is out of reach for minutes under load, in one way after another: the program notices nothing."""

from parts import acks
from parts.shell import until

from .setting import Setting, go_on_for

FAULTS = [dict(fault="timeout"), dict(fault="reset"), dict(fault="throttle"), dict(fault="http", status=503), dict(fault="html", status=403)]


def story(stack, report, make_program, seed, quick):
    s = Setting(stack, report, make_program, seed)
    s.begin()
    go_on_for(report, "the load runs", s.program, 3)
    for fault in FAULTS:
        s.byokd.fault(**fault)
        report.event(f"KMS: {fault['fault']}")
        go_on_for(report, f"{fault['fault']}: the load notices nothing", s.program, 3 if quick else 30)
        volume = s.byokd.volume("v")
        report.check(f"{fault['fault']}: {volume['state']}, {volume['failed_requests']} requests failed",
                     volume["state"] in ("serving", "unverified") and volume["failed_requests"] == 0)
        s.byokd.clear_faults()
    report.event("KMS is back")
    until("KMS has allowed the key again", lambda: s.byokd.volume("v")["state"] == "serving")
    go_on_for(report, "the load runs on", s.program, 3)
    series = s.conclude()
    load, patience = acks.summary(series[s.program.name]), s.program.patience
    report.check(f"the longest wait for an acknowledgement was {load['longest'] / 1000:.1f} s, and {load['silence']:.1f} s without any, within {patience} s",
                 max(load["longest"] / 1000, load["silence"]) <= patience)
    return series
