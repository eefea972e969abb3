"""e. A volume moves from node A to node B: two daemons in network namespaces of their own, each with its state directory,
and one KMS between them. The program goes on where it stopped; both nodes at once are refused."""

from parts.node import Node

from .setting import Setting, go_on_for


def story(stack, report, make_program, seed, quick):
    s = Setting(stack, report, make_program, seed)
    seconds = 3 if quick else 20
    there = Node(stack, s.scratch / "node-b", s.byokd, report.directory / "byokd-b.log")
    there.know("v", s.scratch / "v.img")
    s.begin()
    go_on_for(report, "the load runs on node A", s.program, seconds)
    code, answer = there.call("attach", "v")
    report.check(f"node B is refused while A serves: {answer.get('why')}", (code, told(answer)) == (5, True))
    go_on_for(report, "the load on node A notices nothing of that", s.program, 2)
    s.program.halt()
    s.program.stop()
    s.unmount()
    s.byokd.ctl("detach", "v")
    here, s.byokd = s.byokd, there
    there.ctl("attach", "v")
    report.event("the volume is on node B")
    code, answer = here.call("attach", "v")
    report.check(f"node A is refused while B serves: {answer.get('why')}", (code, told(answer)) == (5, True))
    s.mount("on node B")
    s.program.start(s.data)
    s.everything_is_there("on node B")
    s.program.load()
    report.event("load goes on")
    go_on_for(report, "the load runs on node B", s.program, seconds)
    return s.conclude()


def told(answer):
    """Whether the refusal is for this reason, and says so."""
    return "v.img is in use: another daemon" in answer.get("why", "")
