"""Owns the parts of a chart: elements of SVG with their text escaped, scales, axes, marks, legends.

Colours are classes (`s0`, `s1`, ...) that the page's style sheet fills in for light and dark; a
series has its own mark and dash as well, so that colour is never alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8  # classes s0 to s7; s0 is the baseline's
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 3", "12 4", "6 2 2 2")
CHARACTER = 6.4  # mean width of a character of an axis' text, in the units of the chart


def element(name: str, *inner: str, **attributes: str | float | None) -> Markup:
    """<name ...>inner</name>; text that is no Markup is escaped, `_` in names stands for `-`."""
    parts = [
        Markup(' {}="{}"').format(
            "class" if key == "class_" else key if key == "viewBox" else key.replace("_", "-"),
            number(value) if isinstance(value, float) else value,
        )
        for key, value in attributes.items()
        if value is not None
    ]
    body = Markup("").join(escape(one) for one in inner)
    tag = Markup(name)
    opened = Markup("<{}{}").format(tag, Markup("").join(parts))
    return opened + (Markup(">{}</{}>").format(body, tag) if inner else Markup("/>"))


def number(value: float) -> str:
    """A coordinate, in tenths."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def short(value: float) -> str:
    """A number as people read it on an axis: three significant digits, a true minus."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.3g}M"
    elif size >= 1e4:
        text = f"{value / 1e3:.3g}k"
    elif size < 1e-3:
        text = f"{value:.0e}".replace("e-0", "e-")
    else:
        text = f"{value:.3g}" if size < 100 else f"{value:.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) from within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, number)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


@dataclass(frozen=True)
class Scale:
    """From values [low, high] to places [start, end] of the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def padded(values: Sequence[float], least: float = 1e-9) -> tuple[float, float]:
    """Bounds around finite values with some room; (0, 1) without any."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    room = max((high - low) * 0.06, least, abs(high) * 0.02 if high == low else 0.0)
    return low - room, high + room


def mark(style: int, x: float, y: float, size: float = 4.5, **attributes: str | None) -> Markup:
    """One of eight marks, told apart without colour; the ninth style's differs from the first's."""
    r, shape = size, (style + style // COLOURS) % 8
    if shape == 0:
        return element("circle", cx=x, cy=y, r=r, **attributes)
    return element("path", d=outline(shape, x, y, r), **attributes)


def outline(shape: int, x: float, y: float, r: float) -> str:
    """The path of a mark around (x, y)."""

    def polygon(*points: tuple[float, float]) -> str:
        return "M" + "L".join(f"{number(x + a * r)} {number(y + b * r)}" for a, b in points) + "Z"

    shapes = (
        ((-0.5, -0.9), (0.5, -0.9), (0.9, 0), (0.5, 0.9), (-0.5, 0.9), (-0.9, 0)),
        ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
        (
            *((-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4)),
            *((0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4)),
        ),
        ((-1.1, -1.1), (0, -0.45), (1.1, -1.1), (0.45, 0), (1.1, 1.1), (0, 0.45), (-1.1, 1.1)),
        ((-1.2, -0.5), (1.2, -0.5), (1.2, 0.5), (-1.2, 0.5)),
    )
    return polygon(*shapes[shape % 8])


def text(x: float, y: float, words: str, class_: str = "tick", anchor: str = "start") -> Markup:
    """A line of text; anchor is start, middle or end."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


@dataclass(frozen=True)
class Frame:
    """A plot's place in its picture, with the scales of both axes (y grows upwards)."""

    width: float
    height: float
    x: Scale
    y: Scale

    def axes(
        self,
        x_label: str,
        y_label: str,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
    ) -> Markup:
        """Grid lines, tick labels and the names of the axes."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = []
        for value, label in y_ticks:
            at = self.y(value)
            parts.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
            parts.append(text(left - 7, at + 4, label, anchor="end"))
        for value, label in x_ticks:
            at = self.x(value)
            parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(text(at, bottom + 18, label, anchor="middle"))
        parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        parts.append(text((left + right) / 2, bottom + 36, x_label, "name", "middle"))
        parts.append(text(0, top - 12, y_label, "name"))
        return element("g", *parts, aria_hidden="true")


def frame(
    width: float,
    height: float,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    y_labels: Sequence[str],
    *,
    right: float = 12,
    top: float = 30,
) -> Frame:
    """A frame whose left margin holds the labels of the y axis."""
    left = 14 + CHARACTER * max((len(label) for label in y_labels), default=2)
    return Frame(
        width, height, Scale(*x_range, left, width - right), Scale(*y_range, height - 44, top)
    )


def picture(width: float, height: float, title: str, about: str, *inner: str) -> Markup:
    """The whole chart: its title is read out by screen readers, `about` says what it shows."""
    return element(
        "svg",
        element("title", title),
        element("desc", about),
        *inner,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=f"{title}. {about}",
        preserveAspectRatio="xMidYMid meet",
    )


def clipped(words: str, most: int) -> str:
    """Text of at most so many characters."""
    return words if len(words) <= most else words[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def path(points: Sequence[tuple[float, float]]) -> str:
    """A line through points, as the `d` of a path."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
