"""Parts of charts: escaped elements, round ticks, scales, marks that differ."""

from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from saro_jax.reporting import svg


def test_text_and_attributes_are_escaped_and_markup_is_not():
    evil = '"><script>alert(1)</script>'
    made = svg.element("g", evil, Markup("<b/>"), aria_label=evil, stroke_width=2.0)
    tree = ElementTree.fromstring(made)
    assert tree.text == evil
    assert tree.attrib == {"aria-label": evil, "stroke-width": "2"}
    assert [child.tag for child in tree] == ["b"]


def test_an_attribute_of_none_is_left_out_and_viewbox_keeps_its_case():
    assert svg.element("svg", viewBox="0 0 1 1", class_=None) == '<svg viewBox="0 0 1 1"/>'


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-90, -60, [-90, -80, -70, -60]),
        (0.4, 1.0, [0.4, 0.6, 0.8, 1.0]),
        (3, 3, [3]),
        (0, 12, [0, 2.5, 5, 7.5, 10]),
    ],
)
def test_ticks_are_round_and_within(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_a_scale_goes_from_end_to_end_and_takes_a_single_value():
    scale = svg.Scale(2, 6, 100, 0)
    assert [scale(v) for v in (2, 3, 6)] == [100, 75, 0]
    assert svg.Scale(1, 1, 5, 9)(1) == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-2.5, "−2.5"), (123.4, "123"), (12345, "12.3k"), (2e6, "2M"), (2e-5, "2e−5")],
)
def test_short_numbers(value, text):
    assert svg.short(value) == text


def test_padded_leaves_room_and_ignores_what_is_not_finite():
    low, high = svg.padded([1.0, 2.0, float("nan"), float("inf")])
    assert low == pytest.approx(0.94) and high == pytest.approx(2.06)
    low, high = svg.padded([5.0])
    assert low < 5.0 < high
    assert svg.padded([]) == (0.0, 1.0)


def test_eight_marks_are_eight_shapes():
    assert len({str(svg.mark(shape, 0, 0)) for shape in range(8)}) == 8
