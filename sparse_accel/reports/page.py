"""The frame of a page and its plain parts: one file, no script, nothing from elsewhere, readable in light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Final

# Nothing is loaded and nothing runs, whatever a name in the data tries.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE: Final = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1b1f24; --muted: #5b6470; --line: #d9dee5;
  --heat: 33 102 172; --bar: #4a86c5; --good: #1a7f37; --bad: #c0392b;
  --c0: #1f6fb4; --c1: #c65102; --c2: #18834f; --c3: #8e4ea8; --c4: #a67c00; --c5: #b03a6a;
  --zeros: #c9d1da; --moving: #fbd0a0; --fixed: #f2a36b; --teacher: #b5dfb8; --on-lane: #1b1f24; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1d2126; --text: #e6e9ed; --muted: #9aa4af; --line: #363c44;
    --heat: 74 144 217; --bar: #4a86c5; --good: #57c26f; --bad: #ff7b6b;
    --c0: #6cb2f2; --c1: #f59457; --c2: #5cc48d; --c3: #c795dd; --c4: #dcb84a; --c5: #ec87ad;
    --zeros: #4a525c; --moving: #8a5a2b; --fixed: #a8521b; --teacher: #2f6b3d; --on-lane: #f1f3f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 10px; }
h3 { font-size: .95rem; margin: 18px 0 6px; }
p { margin: 6px 0; max-width: 78ch; }
.muted { color: var(--muted); font-size: .86rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 14px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 14px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; min-width: 0; }
.tile b { display: block; font-size: 1.22rem; overflow-wrap: anywhere; }
.tile span { color: var(--muted); font-size: .8rem; }
.wide { overflow-x: auto; max-width: 100%; }
.tall { max-height: 420px; overflow: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
.tall thead th { position: sticky; top: 0; background: var(--card); }
td.n, th.n { text-align: right; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 7em; }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
pre { margin: 0; padding: 10px; background: var(--page); border-radius: 6px; overflow-x: auto; font-size: .8rem; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--muted); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 8px 28px; }
.columns > * { min-width: 0; }
figure { margin: 0 0 8px; }
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .82rem; color: var(--muted); margin: 2px 0 4px; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
.legend i:not(.box) { background: currentColor; }
.legend i.box { height: 11px; border-radius: 2px; }
.legend i.dot { width: 8px; height: 8px; border-radius: 50%; }
.k0 { color: var(--c0); } .k1 { color: var(--c1); } .k2 { color: var(--c2); }
.k3 { color: var(--c3); } .k4 { color: var(--c4); } .k5 { color: var(--c5); }
.chart { display: grid; grid-template-columns: 5.4rem 1fr; font-size: .78rem; color: var(--muted); }
.chart .unit { grid-column: 1 / 3; padding-left: 5.4rem; }
.chart .y { position: relative; } .chart .x { position: relative; grid-column: 2; height: 1.5em; }
.chart .y span { position: absolute; right: 7px; transform: translateY(50%); white-space: nowrap; }
.chart .x span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.chart .x span.first { transform: none; } .chart .x span.last { transform: translateX(-100%); }
.chart .x i { position: absolute; top: -1px; height: 4px; border-left: 1px solid var(--muted); }
.chart .of { grid-column: 2; text-align: center; }
.chart svg { display: block; width: 100%; height: 200px; overflow: visible; border-left: 1px solid var(--muted);
  border-bottom: 1px solid var(--muted); }
svg path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
svg path.grid { stroke: var(--line); stroke-width: 1; } svg path.dot { stroke-width: 6.5; stroke-linecap: round; }
svg path.faint { stroke-width: 7; opacity: .35; } svg path.span { stroke-width: 1.4; }
svg rect.moving { fill: var(--moving); opacity: .38; } svg rect.fixed { fill: var(--fixed); opacity: .38; }
.lane-name { align-self: center; text-align: right; padding-right: 7px; }
.lane { position: relative; height: 26px; margin: 2px 0; border-left: 1px solid var(--muted); }
.lane span { position: absolute; top: 0; bottom: 0; border-radius: 4px; color: var(--on-lane); padding: 3px 6px; overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis; font-size: .78rem; }
.zeros { background: var(--zeros); } .moving { background: var(--moving); } .fixed { background: var(--fixed); }
.teacher { background: var(--teacher); }
.maps { display: flex; flex-wrap: wrap; gap: 6px 30px; } .maps figure { min-width: 0; max-width: 100%; }
table.heat { border-collapse: separate; border-spacing: 2px; }
table.heat th { border: 0; padding: 2px 6px; font-weight: 500; } table.heat thead th { text-align: center; vertical-align: bottom; }
table.heat thead th { max-width: 8.5em; } table.heat tbody th { text-align: right; vertical-align: middle; }
table.heat td { border: 0; padding: 5px 6px; text-align: center; min-width: 58px; border-radius: 3px;
  box-shadow: inset 0 0 0 1px var(--line); vertical-align: middle; }
table.heat td.deep { color: #fff; } table.heat td.none { color: var(--muted); }
.scale { display: flex; align-items: center; gap: 6px; font-size: .78rem; color: var(--muted); margin: 4px 0 14px; }
.scale i { width: 130px; height: 10px; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / 1)); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 10px; align-items: center; font-size: .86rem; }
.bars .bar { background: var(--bar); height: 15px; border-radius: 3px; min-width: 2px; }
.bars .n { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 560px) { main { padding: 12px 8px 32px; } section { padding: 12px 10px; } .chart { grid-template-columns: 4.6rem 1fr; }
  .chart .unit { padding-left: 4.6rem; } .chart svg { height: 170px; }
  .bars { grid-template-columns: 1fr max-content; grid-auto-flow: dense; } .bars .track { grid-column: 1 / 3; }
  .bars .label { grid-column: 1; } .bars .n { grid-column: 2; } }
"""


def escape(text: object) -> str:
    """Text as HTML shows it, also inside an attribute."""
    return html.escape(str(text))


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A whole document of these parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="muted">{escape(subtitle)}</p>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A card with a heading; nothing where it would be empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """What matters most: a name and a value each."""
    shown = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b></div>' for name, value in facts
    )
    return f'<div class="tiles">{shown}</div>'


def paragraph(text: str, look: str = "") -> str:
    """A sentence; `look` is muted, good, bad or nothing."""
    return f'<p class="{look}">{escape(text)}</p>' if look else f"<p>{escape(text)}</p>"


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    num_words: int = 1,
    is_tall: bool = False,
    total: bool = False,
) -> str:
    """A table whose columns after the first `num_words` are numbers; a tall one scrolls by itself. `total` sets the last row
    apart."""

    def cell(tag: str, index: int, text: str) -> str:
        look = ' class="n"' if index >= num_words else ' class="name"' if index == 0 and tag == "td" else ""
        return f"<{tag}{look}>{escape(text)}</{tag}>"

    body = ["".join(cell("td", index, text) for index, text in enumerate(row)) for row in rows]
    looks = ["" for _ in body]
    if total and body:
        looks[-1] = ' class="total"'
    head = "".join(cell("th", index, text) for index, text in enumerate(headings))
    lines = "".join(f"<tr{look}>{line}</tr>" for look, line in zip(looks, body, strict=True))
    headed = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    look = "wide tall" if is_tall else "wide"
    return f'<div class="{look}"><table>{headed}<tbody>{lines}</tbody></table></div>'


def details(summary: str, *parts: str) -> str:
    """What is folded away until somebody asks for it."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def code(text: str, *, wraps: bool = False) -> str:
    """Text as a program wrote it."""
    look = ' class="wrap"' if wraps else ""
    return f"<pre{look}>{escape(text)}</pre>"


def columns(*parts: str) -> str:
    """Parts beside each other, where the page is wide enough."""
    shown = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div class="columns">{shown}</div>' if shown else ""


def percent(share: float) -> str:
    """A share as people read it.

    >>> percent(0.9), percent(0.12345), percent(0.00001)
    ('90.0%', '12.3%', '0.0%')
    """
    return f"{share:.1%}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits.

    >>> size(437_900_000), size(12_300), size(12)
    ('438 MB', '12.3 kB', '12 bytes')
    """
    for unit, count in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= count:
            return f"{num_bytes / count:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def short(value: float) -> str:
    """A number in at most about six characters.

    >>> short(0.000175), short(0.5), short(12345.0), short(0.0), short(2.0), short(1234567.0)
    ('1.75e-4', '0.5', '12,345', '0', '2', '1.23e6')
    """
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
