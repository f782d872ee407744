"""Charts as SVG that stands in a page, takes on its colours in light and dark, and needs no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 46
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")


@dataclass(frozen=True)
class Point:
    """A point, with an interval of y, or of x too, if it has one, and what is shown when a mouse rests on it."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    title: str = ""
    left: float = math.nan
    right: float = math.nan


@dataclass(frozen=True)
class Series:
    """Points of one colour. Lines join them unless they are a cloud; a band shows intervals.

    Of a line with a ``title`` its points are not shown.
    """

    name: str
    colour: str
    points: Sequence[Point]
    dashed: bool = False
    cloud: bool = False
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis: label, the values at its ends, and where it has ticks with which text."""

    label: str
    start: float
    end: float
    ticks: dict[float, str] = field(default_factory=dict)
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0 at the start, 1 at the end."""
        if self.logarithmic:
            value, start, end = (math.log(max(v, 1e-12)) for v in (value, self.start, self.end))
        else:
            start, end = self.start, self.end
        return (value - start) / ((end - start) or 1)


def percent_axis(label: str) -> Axis:
    """From 0 to 100 %."""
    return Axis(label, 0, 100, {float(value): str(value) for value in range(0, 101, 20)})


def axis_around(label: str, values: Iterable[float], logarithmic: bool = False) -> Axis:
    """An axis on which these values lie, with round ticks."""
    known = [value for value in values if math.isfinite(value)] or [1.0]
    smallest, largest = min(known), max(known)
    if logarithmic:
        start, end = (10 ** math.floor(math.log10(max(smallest, 1))), 10 ** math.ceil(math.log10(max(largest, 2))))
        powers = range(round(math.log10(start)), round(math.log10(end)) + 1)
        return Axis(label, start, end, {10.0**power: f"{10**power:,}" for power in powers}, True)
    step = 10 ** math.floor(math.log10((largest - min(smallest, 0)) or 1))
    step = step / 2 if (largest - min(smallest, 0)) / step < 4 else step
    end = math.ceil(largest / step) * step or 1.0
    count = round(end / step)
    return Axis(label, 0.0, end, {step * i: f"{step * i:g}" for i in range(count + 1)})


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], legend: bool = True) -> Markup:
    """Lines and clouds over two axes."""
    parts = [*_frame(x, y), *(piece for one in series for piece in _draw(one, x, y))]
    picture = Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{title}"><title>{title}</title>{parts}</svg>'
    ).format(w=WIDTH, h=HEIGHT, title=title, parts=Markup("").join(parts))
    return picture + (_legend(series) if legend else Markup(""))


def _frame(x: Axis, y: Axis) -> list[Markup]:
    found = []
    for value, text in y.ticks.items():
        height = _down(y, value)
        found.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, WIDTH - RIGHT, _short(height), _short(height)))  # fmt: skip
        found.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT - 7, _short(height + 4), text))  # fmt: skip
    for value, text in x.ticks.items():
        where = _short(_across(x, value))
        found.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            where, HEIGHT - BOTTOM + 18, text))  # fmt: skip
    found.append(Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label))  # fmt: skip
    middle = (TOP + HEIGHT - BOTTOM) / 2
    found.append(Markup('<text class="label" transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>')
                 .format(middle, y.label))  # fmt: skip
    return found


def _draw(series: Series, x: Axis, y: Axis) -> list[Markup]:
    points = [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]
    found = []
    band = [point for point in points if math.isfinite(point.low) and math.isfinite(point.high)]
    if len(band) > 1 and not series.cloud:
        edge = [(p.x, p.high) for p in band] + [(p.x, p.low) for p in reversed(band)]
        found.append(Markup('<polygon points="{}" fill="{}" opacity="0.15"/>').format(
            _path(edge, x, y), series.colour))  # fmt: skip
    if len(points) > 1 and not series.cloud:
        dash = Markup(' stroke-dasharray="6 5"') if series.dashed else ""
        name = Markup("<title>{}</title>").format(series.title) if series.title else ""
        found.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2.5"{}>{}</polyline>').format(
            _path([(p.x, p.y) for p in points], x, y), series.colour, dash, name))  # fmt: skip
    for point in [] if series.title else points:
        across, down = _short(_across(x, point.x)), _short(_down(y, point.y))
        if math.isfinite(point.low) and (series.cloud or len(points) == 1):
            found.append(Markup('<line x1="{0}" x2="{0}" y1="{1}" y2="{2}" stroke="{3}" stroke-width="1.5"/>').format(
                across, _short(_down(y, point.low)), _short(_down(y, point.high)), series.colour))  # fmt: skip
        if math.isfinite(point.left):
            found.append(Markup('<line x1="{1}" x2="{2}" y1="{0}" y2="{0}" stroke="{3}" stroke-width="1.5"/>').format(
                down, _short(_across(x, point.left)), _short(_across(x, point.right)), series.colour))  # fmt: skip
        # Rings in a cloud: where they overlap each can still be seen.
        look = 'r="3.5" fill-opacity="0.25" stroke="{}" stroke-width="1.5"' if series.cloud else 'r="4.5" opacity="{}"'
        found.append(Markup('<circle cx="{}" cy="{}" fill="{}" {}><title>{}</title></circle>').format(
            across, down, series.colour, Markup(look).format(series.colour if series.cloud else series.opacity),
            point.title or f"{series.name}: {point.y:.1f}"))  # fmt: skip
    return found


def _legend(series: Sequence[Series]) -> Markup:
    entries = []
    for one in series:
        if one.name:
            style = "dashed" if one.dashed else "solid"
            mark = Markup('<i class="dot" style="background:{}"></i>') if one.cloud else Markup(
                f'<i style="border-top:3px {style} {{}}"></i>')  # fmt: skip
            entries.append(Markup("<span>{}{}</span>").format(mark.format(one.colour), escape(one.name)))
    return Markup('<div class="legend">{}</div>').format(Markup("").join(entries))


def _across(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _down(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _path(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{_short(_across(x, a))},{_short(_down(y, b))}" for a, b in points)


def _short(number: float) -> float:
    return round(number, 2)
