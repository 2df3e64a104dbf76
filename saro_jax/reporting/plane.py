"""Owns the plane of safety and over-refusal: models, their intervals, the Pareto front, names."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from saro_jax.reporting.charts import HEIGHT, WIDTH, colour, percent
from saro_jax.reporting.svg import (
    CHARACTER,
    Frame,
    clipped,
    element,
    frame,
    mark,
    number,
    path,
    picture,
    text,
    ticks,
)

MOST_NAMES = 6  # beyond them only the front and the baseline bear their names


@dataclass(frozen=True)
class Point:
    """A model in the plane, each coordinate with the ends of its interval."""

    name: str
    style: int
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: none is lower in one coordinate and no higher in the other."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return [i for i, one in enumerate(points) if not any(beats(other, one) for other in points)]


def draw(title: str, about: str, points: Sequence[Point], x_label: str, y_label: str) -> Markup:
    """Two shares of each model, lower is better in both, with the front of those not beaten."""
    top_x = min(1.0, max(0.1, *(p.x[2] for p in points)) * 1.04)
    top_y = min(1.0, max(0.1, *(p.y[2] for p in points)) * 1.04)
    x_marks = [(v, percent(v)) for v in ticks(0, top_x, 5)]
    y_marks = [(v, percent(v)) for v in ticks(0, top_y, 5)]
    plot = frame(
        WIDTH, HEIGHT + 30, (0, top_x), (0, top_y), [label for _, label in y_marks], right=22
    )
    best = sorted((points[i].x[0], points[i].y[0]) for i in _front(points))
    stairs = [(best[0][0], top_y)] if best else []
    for (x, y), following in zip(best, [*best[1:], None], strict=True):
        stairs.append((x, y))
        stairs.append((following[0], y) if following else (top_x, y))
    places = [(plot.x(x), plot.y(y)) for x, y in stairs]
    floor = [(plot.x.end, plot.y.end)]
    parts = [
        plot.axes(x_label, y_label, x_marks, y_marks),
        element("path", d=path([*places, *floor]) + "Z", class_="beaten") if places else Markup(""),
        element("path", d=path(places), class_="front") if places else Markup(""),
        _better(plot),
    ]
    front = set(_front(points))
    few = len(points) <= MOST_NAMES
    named = [few or i in front or point.style == 0 for i, point in enumerate(points)]
    labels = _labels(plot, points, named)
    for i, point in enumerate(points):
        x, y = plot.x(point.x[0]), plot.y(point.y[0])
        words = (
            f"{point.name}: {x_label} {percent(point.x[0], 1)} "
            f"[{percent(point.x[1], 1)}, {percent(point.x[2], 1)}], {y_label} "
            f"{percent(point.y[0], 1)} [{percent(point.y[1], 1)}, {percent(point.y[2], 1)}]"
            + ("; on the Pareto front" if i in front else "")
        )
        across = f"M{number(plot.x(point.x[1]))} {number(y)}H{number(plot.x(point.x[2]))}"
        along = f"M{number(x)} {number(plot.y(point.y[1]))}V{number(plot.y(point.y[2]))}"
        at, anchor = labels[i]
        label = "label strong" if i in front else "label"
        parts.append(
            element(
                "g",
                element("title", words),
                element("path", d=across + along, class_="error"),
                mark(point.style, x, y, 6.5, class_="fill" if i in front else "hollow"),
                text(*at, _name(point) if named[i] else "", label, anchor),
                class_=colour(point.style),
            )
        )
    return picture(plot.width, plot.height, title, about, *parts)


def _front(points: Sequence[Point]) -> list[int]:
    return pareto([(point.x[0], point.y[0]) for point in points])


def _better(plot: Frame) -> Markup:
    """The direction in which models are better: towards the origin."""
    x, y = plot.x.start + 8, plot.y.start - 8
    arrow = f"M{number(x + 15)} {number(y - 15)}L{number(x)} {number(y)}m0 -7v7h7"
    return element(
        "g",
        element("path", d=arrow, class_="arrow"),
        text(x + 19, y - 13, "better", "hint"),
        aria_hidden="true",
    )


def all_named(points: Sequence[Point]) -> bool:
    """Whether the plane of the points has all their names in full, and needs no legend."""
    return len(points) <= MOST_NAMES and all(_name(point) == point.name for point in points)


def _name(point: Point) -> str:
    return clipped(point.name, 22)


def _labels(
    plot: Frame, points: Sequence[Point], named: Sequence[bool]
) -> list[tuple[tuple[float, float], str]]:
    """A place for each point's name: beside it, and where it covers no other name or mark."""
    taken: list[tuple[float, ...]] = [
        (plot.x(p.x[0]) - 8, plot.y(p.y[0]) - 8, plot.x(p.x[0]) + 8, plot.y(p.y[0]) + 8)
        for p in points
    ]
    taken.append((plot.x.start, plot.y.start - 34, plot.x.start + 70, plot.y.start))
    found = []
    for point, shown in zip(points, named, strict=True):
        if not shown:
            found.append(((0.0, 0.0), "start"))
            continue
        x, y, wide = plot.x(point.x[0]), plot.y(point.y[0]), CHARACTER * 1.1 * len(_name(point))
        offers = [
            (dx, dy, anchor)
            for reach in (0, 14, 28, 42, 56)
            for dx, dy, anchor in (
                *((11, -7 - reach, "start"), (11, 15 + reach, "start")),
                *((-11, -7 - reach, "end"), (-11, 15 + reach, "end")),
            )
        ]
        best: tuple[float, tuple[float, float], str, tuple[float, ...]] | None = None
        for cost, (dx, dy, anchor) in enumerate(offers):
            left = x + dx - (wide if anchor == "end" else 0)
            box = (left, y + dy - 11, left + wide, y + dy + 3)
            inside = box[0] >= plot.x.start - 20 and box[2] <= plot.width
            # Above the topmost line stands what the axis means.
            inside = inside and plot.y.end - 4 <= box[1] and box[3] <= plot.y.start
            hits = sum(_meet(box, other) for other in taken)
            score = cost + 100 * hits + (0 if inside else 1000)
            if best is None or score < best[0]:
                best = (score, (x + dx, y + dy), anchor, box)
        assert best is not None
        taken.append(best[3])
        found.append((best[1], best[2]))
    return found


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
