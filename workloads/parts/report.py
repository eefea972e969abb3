"""What a story found: told while it runs, kept as text and a chart, and judged."""

import json
import time

from . import acks
from .chart import chart


class Report:
    def __init__(self, directory, story, program, seed):
        self.directory, self.title = directory, f"{story}, {program}, seed {seed}"
        directory.mkdir(parents=True, exist_ok=True)
        self.begun = time.monotonic()
        self.text, self.events, self.failed, self.numbers, self.unit = [], [], [], {}, "records/s"
        self.say(f"# {self.title}")

    def say(self, line):
        print(line, flush=True)
        self.text.append(line)

    def event(self, text):
        """Something happened now; it is marked in the chart."""
        now = time.monotonic()
        self.events.append((now, text))
        self.say(f"{now - self.begun:7.1f} s  {text}")
        return now

    def check(self, what, so):
        self.say(f"{'ok  ' if so else 'BAD '}       {what}")
        if not so:
            self.failed.append(what)

    def number(self, name, value, unit):
        self.numbers[name] = value
        self.say(f"            {name}: {value:.3g} {unit}")

    def load(self, name, rows):
        s = acks.summary(rows)
        self.numbers[f"load {name}"] = s
        self.say(f"            {name}: {s['records']} records acknowledged, {s['rate']:.0f}/s, p50 {s['p50']:.2f} ms, p99 {s['p99']:.2f} ms, longest {s['longest']:.0f} ms")

    def log_lines(self, name, lines):
        """The first and the last words of a program's own log about what befell it."""
        self.say(f"            what {name} says: {len(lines)} lines")
        for line in lines if len(lines) < 7 else [*lines[:3], "...", *lines[-3:]]:
            self.say(f"              | {line[:180]}")

    def finish(self, series):
        (self.directory / "chart.svg").write_text(chart(self.title, series, self.events, self.unit))
        (self.directory / "numbers.json").write_text(json.dumps(self.numbers, indent=1))
        verdict = "PASSED" if not self.failed else f"FAILED: {'; '.join(self.failed)}"
        self.say(f"VERDICT {self.title}: {verdict}")
        (self.directory / "report.txt").write_text("\n".join(self.text) + "\n")
        return not self.failed
