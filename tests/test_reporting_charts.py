"""Charts are well-formed, say their numbers, and draw where the numbers are."""

from xml.etree import ElementTree

import pytest

from saro_jax.reporting import charts
from saro_jax.reporting.charts import Bar, Interval, Series


def titles(svg) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter("title")]


def test_lines_keep_the_mean_when_thinned_and_tell_few_points_singly():
    long = Series("loss", 1, [(float(i), i % 2) for i in range(1000)])
    thin = charts._thinned(long)
    assert len(thin.points) == charts.MOST_POINTS
    assert sum(y for _, y in thin.points) / len(thin.points) == pytest.approx(0.5, abs=0.02)
    few = Series("a<b", 2, [(0.0, 0.25), (1.0, 0.5)], [(0.2, 0.3), (0.4, 0.6)])
    drawn = charts.lines("T", "about", [few], "layer", "share", shares=True, reference=0.5)
    assert "a<b, layer 1: 50\u202f%" in titles(drawn)
    assert drawn.count('class="band s2"') == 1 and drawn.count('class="reference"') == 1


def test_lines_with_one_point_or_none_are_drawn():
    for points in ([], [(3.0, 0.1)], [(0.0, float("nan")), (1.0, 2.0)]):
        ElementTree.fromstring(charts.lines("T", "a", [Series("s", 0, points)], "x", "y"))


def test_intervals_fill_what_is_sure():
    rows = [
        Interval("one", 1, 0.1, 0.05, 0.15, "first"),
        Interval("", 2, 0.0, -0.1, 0.1, "second", False),
    ]
    drawn = charts.intervals("T", "a", rows, "points", points=True)
    assert titles(drawn)[1:] == ["first", "second"]
    assert drawn.count('class="fill"') == 1 and drawn.count('class="hollow"') == 1


def test_bars_are_as_long_as_their_numbers():
    members = [Bar("a", 0, (30.0, 10.0), "40", "t"), Bar("b", 1, (0.0, 20.0), "20", "u")]
    drawn = ElementTree.fromstring(charts.bars("T", "a", [("harmful", members)], "tokens"))
    wide = [float(one.attrib["width"]) for one in drawn.iter("rect")]
    assert wide[0] == pytest.approx(3 * wide[1], rel=0.01)
    assert wide[2] == 0 and wide[3] == pytest.approx(2 * wide[1], rel=0.01)


def test_scatter_tells_groups_apart_by_shape_and_count():
    drawn = charts.scatter("T", "a", [("harmful", 2, [(0, 0), (1, 1)]), ("benign", 1, [(1, 0)])])
    assert titles(drawn)[1:] == ["harmful: 2 prompts", "benign: 1 prompts"]


def test_legend_escapes_names():
    assert "<script>" not in charts.legend([("<script>", 0)], lines=True)
