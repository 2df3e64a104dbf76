"""Owns the charts of a report: pure functions of numbers to SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from saro_jax.reporting.svg import (
    CHARACTER,
    COLOURS,
    DASHES,
    Frame,
    clipped,
    element,
    frame,
    mark,
    number,
    outline,
    padded,
    path,
    picture,
    short,
    text,
    ticks,
)

WIDTH, HEIGHT = 350, 265  # about what a chart has on the page, so that text keeps its size
MOST_POINTS = 160  # of a line; more are averaged in groups
MOST_MARKS = 26  # of a line: beyond them marks and titles of single points are left out


@dataclass(frozen=True)
class Series:
    """A line, with a band around it where there are intervals; `style` is its colour and mark."""

    name: str
    style: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, in a row of its own; without `name` it shares the last one's.

    `sure`: the interval leaves out the reference value, and the mark is filled.
    """

    name: str
    style: int
    value: float
    low: float
    high: float
    title: str
    sure: bool = True


@dataclass(frozen=True)
class Bar:
    """A bar of two parts, and what is written at its end."""

    name: str
    style: int
    parts: tuple[float, float]
    note: str
    title: str


def colour(style: int) -> str:
    """The class of a style."""
    return f"s{style % COLOURS}"


def percent(value: float, digits: int = 0) -> str:
    """A share in percent."""
    return f"{100 * value:.{digits}f}\N{NARROW NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def legend(names: Sequence[tuple[str, int]], lines: bool = False, dashes: bool = True) -> Markup:
    """Names with their marks, as a list below a chart."""
    items = []
    for name, style in names:
        dash = (dashes and DASHES[style % len(DASHES)]) or None
        sample = [mark(style, 13, 7, class_="fill")]
        if lines:
            sample.insert(
                0, element("path", d="M1 7L25 7", class_="line", stroke_dasharray=dash or "none")
            )
        key = element(
            "svg", *sample, viewBox="0 0 26 14", class_=f"key {colour(style)}", aria_hidden="true"
        )
        items.append(element("li", key, name))
    return element("ul", *items, class_="legend") if items else Markup("")


def lines(
    title: str,
    about: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    shares: bool = False,
    reference: float | None = None,
    x_names: Sequence[str] = (),
) -> Markup:
    """Lines over a common axis; `reference` draws a level, `shares` writes percent.

    x_names: what stands at 0, 1, ... of the x axis instead of numbers.
    """
    shown = [_thinned(one) for one in series]
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    ys += [y for one in shown for pair in one.band for y in pair]
    ys += [reference] if reference is not None else []
    low, high = y_range or padded(ys)
    x_low, x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    say = percent if shares else short
    y_marks = [(v, say(v)) for v in ticks(low, high, 5)]
    whole = all(float(x).is_integer() for x in xs)
    x_marks = [(v, short(v)) for v in ticks(x_low, x_high, 5) if not whole or float(v).is_integer()]
    if x_names:
        x_marks = [(float(i), name) for i, name in enumerate(x_names)]
    plot = frame(WIDTH, HEIGHT, (x_low, x_high), (low, high), [label for _, label in y_marks])
    parts = [plot.axes(x_label, y_label, x_marks, y_marks)]
    if reference is not None:
        at = plot.y(reference)
        parts.append(
            element("line", x1=plot.x.start, x2=plot.x.end, y1=at, y2=at, class_="reference")
        )
    for one in shown:
        if one.band:
            upper = [
                (plot.x(x), plot.y(b[1])) for (x, _), b in zip(one.points, one.band, strict=True)
            ]
            lower = [
                (plot.x(x), plot.y(b[0])) for (x, _), b in zip(one.points, one.band, strict=True)
            ]
            parts.append(
                element(
                    "path",
                    d=path([*upper, *reversed(lower)]) + "Z",
                    class_=f"band {colour(one.style)}",
                )
            )
    for one in shown:
        parts.append(_line(plot, one, say, x_label))
    return picture(plot.width, plot.height, title, about, *parts)


def _line(plot: Frame, one: Series, say, x_label: str) -> Markup:
    places = [(plot.x(x), plot.y(y)) for x, y in one.points]
    inner = [element("title", one.name)]
    few = len(places) <= MOST_MARKS
    if len(places) > 1:
        inner.append(
            element(
                "path",
                d=path(places),
                class_="line",
                # Dashes make a noisy curve of many points hard to read; its marks tell it apart.
                stroke_dasharray=(few and DASHES[one.style % len(DASHES)]) or None,
            )
        )
    for (x, y), (at_x, at_y) in list(zip(one.points, places, strict=True)) if few else []:
        words = f"{one.name}, {x_label} {short(x)}: {say(y)}"
        inner.append(
            element("g", element("title", words), mark(one.style, at_x, at_y, 3.6, class_="fill"))
        )
    if not few:
        every = max(1, len(places) // 6)
        inner += [
            mark(one.style, *place, 3.4, class_="fill") for place in places[every // 2 :: every]
        ]
    return element("g", *inner, class_=colour(one.style))


def _thinned(one: Series) -> Series:
    """The series with means of neighbours where there are too many points to be seen."""
    points = [p for p in one.points if math.isfinite(p[1])]
    if len(points) <= MOST_POINTS or one.band:
        return Series(one.name, one.style, points, one.band)
    bounds = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    means = []
    for start, end in pairwise(bounds):
        group = points[start:end]
        x, y = (sum(p[axis] for p in group) / len(group) for axis in (0, 1))
        means.append((x, y))
    return Series(one.name, one.style, means)


def intervals(
    title: str,
    about: str,
    rows: Sequence[Interval],
    x_label: str,
    *,
    reference: float | None = 0.0,
    points: bool = False,
) -> Markup:
    """Values with their intervals, one below the other; `points` writes percentage points."""
    scale = 100.0 if points else 1.0
    ends = [v * scale for row in rows for v in (row.low, row.high, row.value)]
    ends += [reference * scale] if reference is not None else []
    low, high = padded(ends)
    height = 4.0 + sum(18 + 24 * bool(row.name) for row in rows) + 44
    marks = [(v, short(v)) for v in ticks(low, high, 5)]
    plot = frame(WIDTH, height, (low, high), (0, 1), [], top=14)
    parts = [plot.axes(x_label, "", marks, [])]
    if reference is not None:
        at = plot.x(reference * scale)
        parts.append(element("line", x1=at, x2=at, y1=4, y2=plot.y.start, class_="reference"))
    y = 4.0
    for row in rows:
        if row.name:
            parts.append(text(0, y + 15, clipped(row.name, 52), "label"))
            y += 24
        whisker = (
            f"M{number(plot.x(row.low * scale))} {number(y + 5)}H{number(plot.x(row.high * scale))}"
        )
        shape = mark(
            row.style,
            plot.x(row.value * scale),
            y + 5,
            5,
            class_="fill" if row.sure else "hollow",
        )
        parts.append(
            element(
                "g",
                element("title", row.title),
                element("path", d=whisker, class_="error"),
                shape,
                class_=colour(row.style),
            )
        )
        y += 18
    return picture(WIDTH, height, title, about, *parts)


def bars(
    title: str, about: str, groups: Sequence[tuple[str, Sequence[Bar]]], x_label: str
) -> Markup:
    """Bars of two parts (the second one paler) in groups."""
    most = max((sum(bar.parts) for _, members in groups for bar in members), default=1.0) or 1.0
    longest = max((len(bar.name) for _, members in groups for bar in members), default=0)
    note = max((len(bar.note) for _, members in groups for bar in members), default=0)
    left = min(14 + CHARACTER * 20, 14 + CHARACTER * longest)
    height = 18 + sum(24 + 20 * len(members) for _, members in groups) + 46
    plot = frame(WIDTH, height, (0, most), (0, 1), [], top=0)
    right = WIDTH - 14 - CHARACTER * note
    plot = Frame(WIDTH, height, type(plot.x)(0, most, left, right), plot.y)
    parts = [plot.axes(x_label, "", [(v, short(v)) for v in ticks(0, most, 4)], [])]
    y = 4.0
    for name, members in groups:
        y += 24
        parts.append(text(0, y - 6, name, "name strong"))
        for bar in members:
            start, middle = plot.x(0), plot.x(bar.parts[0])
            end = plot.x(sum(bar.parts))
            parts.append(
                element(
                    "g",
                    element("title", bar.title),
                    text(left - 9, y + 12, clipped(bar.name, 20), "tick ink", "end"),
                    element(
                        "rect", x=start, y=y + 2, width=middle - start, height=13.0, class_="fill"
                    ),
                    element(
                        "rect", x=middle, y=y + 2, width=end - middle, height=13.0, class_="pale"
                    ),
                    text(end + 6, y + 13, bar.note, "tick"),
                    class_=colour(bar.style),
                )
            )
            y += 20
    return picture(WIDTH, height, title, about, *parts)


def scatter(
    title: str, about: str, groups: Sequence[tuple[str, int, Sequence[tuple[float, float]]]]
) -> Markup:
    """Points of the plane by group; the axes have no numbers, for those of a map mean nothing."""
    xs = [x for _, _, points in groups for x, _ in points]
    ys = [y for _, _, points in groups for _, y in points]
    side = 340.0
    plot = frame(side, side, padded(xs), padded(ys), [])
    plot = Frame(
        side, side, type(plot.x)(*padded(xs), 8, side - 8), type(plot.y)(*padded(ys), side - 8, 8)
    )
    box = element("rect", x=0.5, y=0.5, width=side - 1, height=side - 1, rx=6.0, class_="box")
    drawn = [
        element(
            "path",
            element("title", f"{name}: {len(points)} prompts"),
            d="".join(outline(style, plot.x(x), plot.y(y), 3.4) for x, y in points),
            class_=f"{colour(style)} dots",
        )
        for name, style, points in groups
    ]
    return picture(side, side, title, about, box, *drawn)
