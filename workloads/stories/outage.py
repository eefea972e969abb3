"""c. KMS is out of reach for minutes under load, in one way after another: the program notices nothing."""

from parts.shell import until

from .setting import Setting, go_on_for

FAULTS = [dict(fault="timeout"), dict(fault="reset"), dict(fault="throttle"), dict(fault="http", status=503), dict(fault="html", status=403)]


def story(stack, report, make_program, seed, quick):
    s = Setting(stack, report, make_program, seed)
    s.begin()
    report.check("the load runs", go_on_for(s.program, 3))
    for fault in FAULTS:
        s.byokd.fault(**fault)
        report.event(f"KMS: {fault['fault']}")
        report.check(f"{fault['fault']}: the load notices nothing", go_on_for(s.program, 3 if quick else 30))
        volume = s.byokd.volume("v")
        report.check(f"{fault['fault']}: {volume['state']}, {volume['failed_requests']} requests failed",
                     volume["state"] in ("serving", "unverified") and volume["failed_requests"] == 0)
        s.byokd.clear_faults()
    report.event("KMS is back")
    until("KMS has allowed the key again", lambda: s.byokd.volume("v")["state"] == "serving")
    report.check("the load runs on", go_on_for(s.program, 3))
    return s.conclude()
