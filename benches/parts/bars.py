"""Ratios as an SVG of bars: byokd beside each peer, workload by workload."""

from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 960, 190, 90, 64, 14, 18
COLOURS = {"nbdkit": "#1f6fb4", "nbdkit-luks": "#c4512d", "qemu-luks": "#3a8f47", "nbdkit-null": "#7a7a7a", "direct": "#7a4fa3"}


def bars(title, rows, most=4.0):
    """`rows`: workload to {peer: (median, lowest, highest)} of byokd's rate divided by the peer's."""
    peers = [p for p in COLOURS if any(p in ratios for ratios in rows.values())]
    height = TOP + sum(len(r) * BAR + GAP for r in rows.values()) + 10
    x = lambda v: LEFT + (WIDTH - LEFT - RIGHT) * min(v, most) / most
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{height}" fill="white"/><text x="10" y="22" font-size="15">{escape(title)}</text>']
    for n, peer in enumerate(peers):
        out.append(f'<rect x="{10 + 150 * n}" y="34" width="12" height="12" fill="{COLOURS[peer]}"/>'
                   f'<text x="{28 + 150 * n}" y="45">÷ {peer}</text>')
    y = TOP
    for workload, ratios in rows.items():
        out.append(f'<text x="{LEFT - 8}" y="{y + len(ratios) * BAR / 2 + 4:.0f}" text-anchor="end">{escape(workload)}</text>')
        for peer in [p for p in peers if p in ratios]:
            middle, low, high = ratios[peer]
            out.append(f'<rect x="{LEFT}" y="{y}" width="{x(middle) - LEFT:.1f}" height="{BAR - 2}" fill="{COLOURS[peer]}"/>'
                       f'<path d="M{x(low):.1f} {y + BAR / 2 - 1}H{x(high):.1f}" stroke="black"/>'
                       f'<text x="{max(x(middle), x(high)) + 5:.1f}" y="{y + BAR - 3}">{middle:.2f}</text>')
            y += BAR
        y += GAP
    out.append(f'<path d="M{x(1):.1f} {TOP - 6}V{y - GAP + 4}" stroke="#444" stroke-dasharray="4 3"/>')
    return "\n".join(out) + "\n</svg>\n"
