"""Charts are well-formed, say their numbers, draw where the numbers are, and find the front."""

import random
import re
from xml.etree import ElementTree

import pytest

from saro_jax.reporting import charts
from saro_jax.reporting.charts import Bar, Interval, Point, Series


def titles(svg) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter("title")]


def test_pareto_front_is_that_of_its_definition():
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 9))]
        front = set(charts.pareto(points))
        for i, (x, y) in enumerate(points):
            beaten = any(a <= x and b <= y and (a < x or b < y) for a, b in points)
            assert (i in front) == (not beaten)


def test_plane_places_models_and_says_who_is_on_the_front():
    points = [
        Point("base", 0, (0.1, 0.05, 0.2), (0.8, 0.7, 0.9)),
        Point("worse", 1, (0.2, 0.1, 0.3), (0.9, 0.8, 1.0)),
        Point("srpo", 2, (0.2, 0.1, 0.3), (0.1, 0.05, 0.2)),
    ]
    drawn = charts.plane("Plane", "Two shares.", points, "over-refusal", "attack success")
    said = {text.split(":")[0]: text for text in titles(drawn)[1:]}
    assert "10.0\u202f% [5.0\u202f%, 20.0\u202f%]" in said["base"]
    assert [name for name, text in said.items() if "Pareto" in text] == ["base", "srpo"]
    # srpo is drawn to the right of base, and below it: SVG's y grows downwards.
    marks = [g for g in ElementTree.fromstring(drawn) if g.attrib.get("class", "")[:1] == "s"]
    errors = [g.findall("path")[0].attrib["d"] for g in marks]
    places = [[float(v) for v in re.findall(r"[\d.]+", d)] for d in errors]  # x1 y x2 x y1 y2
    assert places[2][3] > places[0][3] and places[2][1] > places[0][1]
    assert places[1][3] == places[2][3]  # the same over-refusal


def test_names_in_a_plane_do_not_cover_each_other():
    points = [
        Point(f"model-{i}", i, (0.1 + i / 500, 0.05, 0.2), (0.2 + i / 400, 0.1, 0.3))
        for i in range(6)
    ]
    drawn = ElementTree.fromstring(charts.plane("P", "a", points, "x", "y"))
    boxes = []
    for one in drawn.iter("text"):
        if (one.text or "").startswith("model-"):
            wide = 6.4 * len(one.text or "")
            x, y = float(one.attrib["x"]), float(one.attrib["y"])
            left = x - wide if one.attrib["text-anchor"] == "end" else x
            boxes.append((left, y - 9, left + wide, y))
    assert len(boxes) == 6
    assert not any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


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
