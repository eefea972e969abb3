"""Throughput over time as an SVG, with what happened marked in it."""

from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 400, 70, 20, 40, 110
COLOURS = ["#1f6fb4", "#c4512d", "#3a8f47", "#7a4fa3"]


def chart(title, series, events, unit):
    """`series`: name to a list of acknowledgements (parts/acks.py); `events`: list of (time, text)."""
    times = [r[0] for rows in series.values() for r in rows] + [t for t, _ in events]
    begin, end = (min(times), max(times)) if times else (0, 1)
    span = max(end - begin, 1.0)
    step = max(span / 200, 0.25)
    lines = {name: _rate(rows, begin, span, step) for name, rows in series.items()}
    top = max([v for line in lines.values() for _, v in line] + [1]) * 1.1
    x = lambda t: LEFT + (WIDTH - LEFT - RIGHT) * t / span
    y = lambda v: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * v / top
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>']
    for i in range(5):
        value = top * i / 4
        out.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>')
        out.append(f'<text x="{x(span * i / 4):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{span * i / 4:.0f} s</text>')
    for n, (name, line) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in line)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out.append(f'<text x="{WIDTH - RIGHT}" y="{TOP + 14 * n}" text-anchor="end" fill="{colour}">{escape(name)}, {unit}</text>')
    for n, (t, text) in enumerate(events):
        at = x(t - begin)
        low = HEIGHT - BOTTOM + 34 + 13 * (n % 6)
        anchor = "start" if at < WIDTH * 0.6 else "end"
        out.append(f'<path d="M{at:.1f} {TOP}V{low - 10}" stroke="#444" stroke-dasharray="4 3"/><text x="{at:.1f}" y="{low}" text-anchor="{anchor}">{escape(text)}</text>')
    return "\n".join(out) + "\n</svg>\n"


def _rate(rows, begin, span, step):
    bins = [0] * (int(span / step) + 1)
    for t, _, count, _ in rows:
        bins[int((t - begin) / step)] += count
    return [((i + 0.5) * step, count / step) for i, count in enumerate(bins) if (i + 0.5) * step <= span]
