"""Pictures for a page: lines, dots, lanes, heat maps and bars, as SVG and CSS that fit any width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sparse_accel.reports.page import escape, percent, short

# The picture's own units; the browser stretches it to the width that there is, lines keep theirs.
_SIDE: Final = 1000.0
_NUM_COLOURS: Final = 6
# A line with more points than this is drawn through means of neighbours.
MOST_POINTS: Final = 400
# Cells darker than this have light text.
_DEEP: Final = 0.55
# Ticks of a logarithmic axis within a decade, by how many decades it spans.
_STEPS: Final = (1, 2, 5)


@dataclass(frozen=True)
class Line:
    """A named line, or several pieces of one. A faint one is broad, to be drawn under another."""

    name: str
    pieces: Sequence[Sequence[tuple[float, float]]]
    has_dots: bool = False
    is_faint: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a look of its own: moving or fixed."""

    start: float
    end: float
    look: str
    name: str


@dataclass(frozen=True)
class Dot:
    """A value, or a span of values, at place x; `title` appears where a mouse rests on it."""

    x: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, linear or logarithmic; `is_whole` is for what is counted in whole numbers."""

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high, at = (math.log10(number) if self.is_log else number for number in (self.low, self.high, value))
        return (at - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers on the axis."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [step * 10.0**decade for decade in decades for step in _STEPS]
            coarse = [10.0**decade for decade in decades[:: max(1, len(decades) // count)]]
            inside = [[tick for tick in ticks if self.low <= tick <= self.high] for ticks in (coarse, fine)]
            return inside[0] if len(inside[0]) > 2 else inside[1]
        step = _round_step((self.high - self.low) / count)
        if self.is_whole and step != int(step):
            step = float(math.ceil(step))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= step * (1 - 1e-9))


def axis_of(values: Sequence[float], *, from_zero: bool = False, is_log: bool = False) -> Axis:
    """An axis that holds all values, with a little air."""
    low, high = min(values), max(values)
    if is_log:
        low, high = (low, high) if low < high else (low / 2, high * 2)
        return Axis(low / 1.15, high * 1.15, True)
    low = min(low, 0.0) if from_zero else low
    air = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    # What is never negative has no axis below zero.
    return Axis(low - air if low < 0 else max(0.0, low - air) if not from_zero else low, high + air)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    x_range: tuple[float, float] | None = None,
    from_zero: bool = True,
    is_whole: bool = False,
    bands: Sequence[Band] = (),
) -> str:
    """Lines over a common axis; nothing where there is no point. Values that are not finite are left out."""
    drawn = [replace(line, pieces=[kept for piece in line.pieces if (kept := _finite(piece))]) for line in lines]
    drawn = [line for line in drawn if line.pieces]
    points = [point for line in drawn for piece in line.pieces for point in piece]
    if not points:
        return ""
    xs = [x for x, _ in points]
    low, high = x_range or (min(xs), max(xs))
    across = Axis(low, high if high > low else low + 1, is_whole=is_whole)
    up = axis_of([y for _, y in points], from_zero=from_zero)
    inside = "".join(_band(band, across) for band in bands)
    inside += _grid(up)
    for index, line in enumerate(drawn):
        look = f"k{index % _NUM_COLOURS}"
        for piece in line.pieces:
            inside += _path(_thinned(piece), across, up, f"{look} faint" if line.is_faint else look, line.name)
            if line.has_dots or len(piece) == 1:
                inside += "".join(
                    _dot(across.share(x), up.share(y), look, f"{line.name}: {short(y)} at {x_name} {short(x)}")
                    for x, y in piece
                )
    legend = [(f"k{index % _NUM_COLOURS}", "", line.name) for index, line in enumerate(drawn)]
    legend += [(look, "box", name) for look, name in dict.fromkeys((band.look, band.name) for band in bands)]
    return _figure(title, legend if len(legend) > 1 else [], inside, across, up, x_name, y_name)


def dot_chart(
    title: str, groups: Mapping[str, Sequence[Dot]], *, x_ticks: Sequence[tuple[float, str]], x_name: str, y_name: str
) -> str:
    """Dots of several groups over places on the x axis, by a logarithmic scale; a span is a line between its ends."""
    dots = [dot for group in groups.values() for dot in group if dot.low > 0]
    if not dots:
        return ""
    across = Axis(min(dot.x for dot in dots) - 0.5, max(dot.x for dot in dots) + 0.5)
    up = axis_of([value for dot in dots for value in (dot.low, dot.high)], is_log=True)
    inside = _grid(up)
    for index, group in enumerate(groups.values()):
        look = f"k{index % _NUM_COLOURS}"
        for dot in group:
            if dot.low <= 0:
                continue
            x, low, high = across.share(dot.x), up.share(dot.low), up.share(dot.high)
            if high > low:
                inside += f'<path class="span {look}" d="M{_x(x)} {_y(low)}V{_y(high)}"/>'
            inside += _dot(x, (low + high) / 2, look, dot.title)
    legend = [(f"k{index % _NUM_COLOURS}", "dot", name) for index, name in enumerate(groups)]
    return _figure(title, legend, inside, across, up, x_name, y_name, x_ticks=x_ticks)


def lanes(rows: Sequence[tuple[str, Sequence[tuple[float, float, str, str]]]], end: float, x_name: str) -> str:
    """Bars from 0 to `end`: of each row its name, and start, end, look and words of its bars."""
    across = Axis(0.0, end)
    body = ""
    for name, bars in rows:
        spans = ""
        for start, stop, look, words in bars:
            left, width = across.share(start), across.share(stop) - across.share(start)
            title = escape(f"{name}: {words}, {x_name} {short(start)} to {short(stop)}")
            spans += (
                f'<span class="{look}" style="left:{left:.4%};width:{width:.4%}" title="{title}">{escape(words)}</span>'
            )
        body += f'<div class="lane-name">{escape(name)}</div><div class="lane">{spans}</div>'
    return f'<div class="chart">{body}{_x_axis(across, _ticks_of(across), x_name)}</div>' if rows else ""


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], shares: Mapping[tuple[str, str], tuple[float, str]]
) -> str:
    """A cell for each row and column: its share in [0, 1], and what appears where a mouse rests on it."""
    has_rows = any(rows)
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in columns)
    body = ""
    for row in rows:
        cells = "".join(_cell(shares.get((row, column))) for column in columns)
        name = f"<th>{escape(row)}</th>" if has_rows else ""
        body += f"<tr>{name}{cells}</tr>"
    corner = "<th>layer</th>" if has_rows else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<div class="wide"><table class="heat"><thead><tr>{corner}{head}</tr></thead><tbody>{body}</tbody></table></div></figure>'
    )


def heat_scale(name: str) -> str:
    """What the colours of heat maps mean."""
    return f'<div class="scale">{escape(name)}: 0% <i></i> 100%</div>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Bars from the same edge: name, value, and the value in words."""
    most = max((value for _, value, _ in rows), default=0.0)
    body = "".join(
        f'<div class="label">{escape(name)}</div><div class="track"><div class="bar" '
        f'style="width:{value / most if most else 0:.2%}"></div></div><div class="n">{escape(words)}</div>'
        for name, value, words in rows
    )
    return f'<div class="bars">{body}</div>' if rows else ""


# --- parts ------------------------------------------------------------------------------------------------------------


def _figure(
    title: str,
    legend: Sequence[tuple[str, str, str]],
    inside: str,
    across: Axis,
    up: Axis,
    x_name: str,
    y_name: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    names = "".join(f'<span><i class="{shape} {look}"></i>{escape(name)}</span>' for look, shape, name in legend)
    heights = "".join(f'<span style="bottom:{up.share(tick):.3%}">{short(tick)}</span>' for tick in up.ticks())
    label = escape(f"{title}: {y_name} over {x_name}")
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        + (f'<div class="legend">{names}</div>' if names else "")
        + f'<div class="chart"><div class="unit">{escape(y_name)}</div><div class="y">{heights}</div>'
        f'<svg viewBox="0 0 {_SIDE:.0f} {_SIDE:.0f}" preserveAspectRatio="none" role="img" aria-label="{label}">{inside}</svg>'
        f"{_x_axis(across, x_ticks if x_ticks is not None else _ticks_of(across), x_name)}</div></figure>"
    )


def _x_axis(across: Axis, ticks: Sequence[tuple[float, str]], name: str) -> str:
    shown = ""
    for value, text in ticks:
        share = across.share(value)
        look = ' class="first"' if share < 0.02 else ' class="last"' if share > 0.98 else ""
        shown += f'<i style="left:{share:.3%}"></i><span{look} style="left:{share:.3%}">{escape(text)}</span>'
    return f'<div class="x">{shown}</div><div class="of">{escape(name)}</div>'


def _ticks_of(axis: Axis) -> list[tuple[float, str]]:
    return [(tick, short(tick)) for tick in axis.ticks()]


def _grid(up: Axis) -> str:
    return "".join(f'<path class="grid" d="M0 {_y(up.share(tick))}H{_SIDE:.0f}"/>' for tick in up.ticks())


def _band(band: Band, across: Axis) -> str:
    start, end = (min(1.0, max(0.0, across.share(x))) for x in (band.start, band.end))
    return f'<rect class="{band.look}" x="{_x(start)}" y="0" width="{(end - start) * _SIDE:.1f}" height="{_SIDE:.0f}"/>'


def _path(points: Sequence[tuple[float, float]], across: Axis, up: Axis, look: str, name: str) -> str:
    places = "L".join(f"{_x(across.share(x))} {_y(up.share(y))}" for x, y in points)
    return f'<path class="{look}" d="M{places}"><title>{escape(name)}</title></path>'


def _dot(x: float, y: float, look: str, title: str) -> str:
    # A line of no length with round ends: it stays round however the picture is stretched.
    return f'<path class="dot {look}" d="M{_x(x)} {_y(y)}h0"><title>{escape(title)}</title></path>'


def _x(share: float) -> str:
    return f"{share * _SIDE:.1f}"


def _y(share: float) -> str:
    return f"{(1 - share) * _SIDE:.1f}"


def _cell(found: tuple[float, str] | None) -> str:
    if found is None:
        return '<td class="none">·</td>'
    share, title = found
    deep = ' class="deep"' if share > _DEEP else ""
    return f'<td{deep} style="background:rgb(var(--heat) / {share:.3f})" title="{escape(title)}">{percent(share)}</td>'


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MOST_POINTS points: means of as many neighbours each; the ends stay."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[0], *_means(points[1:-1], -(-len(points) // MOST_POINTS)), points[-1]]


def _means(points: Sequence[tuple[float, float]], size: int) -> Iterator[tuple[float, float]]:
    for start in range(0, len(points), size):
        group = points[start : start + size]
        yield sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)
