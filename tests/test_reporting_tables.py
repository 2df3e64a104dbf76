"""Tables as Markdown and CSV: nothing in them is taken for markup or for a formula."""

import csv
import io

import pytest

from saro_jax.evaluation.results import Agreement
from saro_jax.reporting import tables
from saro_jax.reporting.tables import Cell, Sheet, Table


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\uff1dA1"])
def test_text_that_is_a_formula_is_quoted(text):
    written = tables.spreadsheet(Sheet("s", ["a"], [[text]]))
    assert next(iter(list(csv.reader(io.StringIO(written, newline="")))[1])) == f"'{text}"


def test_numbers_and_plain_text_stay_as_they_are():
    row = [-0.5, 3, None, "a,b", 'say "x"\nnow', ("a", "b"), {"k": 1}]
    written = tables.spreadsheet(Sheet("s", list("abcdefg"), [row]))
    assert list(csv.reader(io.StringIO(written, newline="")))[1] == [
        *("-0.5", "3", "", "a,b", 'say "x"\nnow', "a | b", "k: 1")
    ]


def test_markdown_is_escaped_and_keeps_its_columns():
    cell = Cell("a|b<script>\n*x*", ("smaller <br>", "", "p = 1"), badge="weak")
    table = Table("k", "c", ["na|me", "n"], [[cell, Cell("1")]])
    lines = tables.markdown(table).splitlines()
    assert lines[1] == "|---|---:|"
    assert len(lines) == 3
    said = "a\\|b\\<script\\> \\*x\\* (weak)<br>smaller \\<br\\><br>p = 1"
    assert lines[2] == f"| {said} | 1 |"


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0002, "p < 0.001"), (0.0123, "p = 0.012"), (0.04999, "p = 0.05"), (1, "p = 1.00")],
)
def test_p_values(p, text):
    assert tables.p_value(p) == text


def test_signs():
    assert [tables.signed(v) for v in (1.25, -0.04, -3, 0)] == ["+1.2", "0.0", "−3.0", "0.0"]


def test_a_sheet_has_a_column_for_each_field():
    record = Agreement(
        judge_a="a", judge_b="b", about="refusal of answer", n=3, equal=0.5, kappa=None
    )
    sheet = tables.sheet_of("agreement", [record])
    assert sheet is not None and list(sheet.columns) == [
        "judge_a",
        "judge_b",
        "about",
        "n",
        "equal",
        "kappa",
    ]
    assert tables.sheet_of("agreement", []) is None
