"""Owns the tables of a report: one table, written as HTML by the page, as Markdown and as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro_jax.reporting.charts import percent

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
# A spreadsheet takes a cell that begins so for a formula (OWASP, CSV injection).
FORMULA = re.compile(r"^[=+\-@\t\r\n]|^[\uff1d\uff0b\uff0d\uff20]")
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a value, smaller lines below it, and a class for its colours.

    tone: better, worse, even, or h0 to h9 in a heat map. badge: a word that stands out beside it.
    """

    text: str
    below: tuple[str, ...] = ()
    tone: str = ""
    badge: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first `heads` columns head its rows; numbers stand to the right."""

    key: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    heads: int = 1
    left: frozenset[int] = frozenset()  # columns besides the heads that hold words
    note: str = ""
    fold: bool = False  # shown when asked for
    heat: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and, as Markup, its legend."""

    svg: Any
    title: str
    caption: str = ""
    legend: Any = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page: figures stand before tables."""

    key: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    empty: str = ""  # what is missing, and how it is made


@dataclass(frozen=True)
class Sheet:
    """A CSV file: columns, and rows of plain values."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def cells(*values: Any) -> list[Cell]:
    """Plain values as cells."""
    return [one if isinstance(one, Cell) else Cell(str(one)) for one in values]


def p_value(p: float) -> str:
    """A p value with two significant digits, down to 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, a true minus."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("+-")


def between(low: float, high: float, score: bool = False) -> str:
    """An interval of shares in percent, or of scores."""
    if score:
        return f"[{low:.2f}, {high:.2f}]".replace("-", MINUS)
    return f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", MINUS)


def share(value: float, score: bool = False) -> str:
    """A share in percent, or a score."""
    return f"{value:.2f}".replace("-", MINUS) if score else percent(value, 1)


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, its text escaped; smaller lines of a cell are its lines."""
    words = table.left | set(range(table.heads))
    lines = [
        "| " + " | ".join(escaped(name) for name in table.columns) + " |",
        "|" + "|".join("---" if i in words else "---:" for i in range(len(table.columns))) + "|",
    ]
    for row in table.rows:
        said = [(one.text + (f" ({one.badge})" if one.badge else ""), *one.below) for one in row]
        shown = ["<br>".join(escaped(part) for part in parts if part) for parts in said]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def spreadsheet(sheet: Sheet) -> str:
    """The sheet as CSV (RFC 4180); text that a spreadsheet would take for a formula gets a ' first.

    Numbers are written as numbers, negative ones too; None is an empty cell.
    """
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(sheet.columns)
    for row in sheet.rows:
        writer.writerow([_plain(value) for value in row])
    return file.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if FORMULA.match(value) else value
    if isinstance(value, Sequence):
        return _plain(" | ".join(str(one) for one in value))
    if isinstance(value, Mapping):
        return _plain("; ".join(f"{key}: {one}" for key, one in value.items()))
    return value


def sheet_of(name: str, parts: Iterable[Any]) -> Sheet | None:
    """A sheet of records of one class, one column a field; None without any."""
    parts = list(parts)
    if not parts:
        return None
    columns = list(type(parts[0]).model_fields)
    return Sheet(name, columns, [[getattr(one, c) for c in columns] for one in parts])
