"""The plane: its front is that of the definition, models stand where their rates are."""

import random
import re
from xml.etree import ElementTree

from saro_jax.reporting import plane
from saro_jax.reporting.plane import Point


def titles(svg) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter("title")]


def test_pareto_front_is_that_of_its_definition():
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 9))]
        front = set(plane.pareto(points))
        for i, (x, y) in enumerate(points):
            beaten = any(a <= x and b <= y and (a < x or b < y) for a, b in points)
            assert (i in front) == (not beaten)


def test_plane_places_models_and_says_who_is_on_the_front():
    points = [
        Point("base", 0, (0.1, 0.05, 0.2), (0.8, 0.7, 0.9)),
        Point("worse", 1, (0.2, 0.1, 0.3), (0.9, 0.8, 1.0)),
        Point("srpo", 2, (0.2, 0.1, 0.3), (0.1, 0.05, 0.2)),
    ]
    drawn = plane.draw("Plane", "Two shares.", points, "over-refusal", "attack success")
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
    drawn = ElementTree.fromstring(plane.draw("P", "a", points, "x", "y"))
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


def test_a_name_at_the_top_does_not_cover_what_the_axis_means():
    points = [Point("base", 0, (0.0, 0.0, 0.01), (0.99, 0.98, 1.0))]
    drawn = ElementTree.fromstring(plane.draw("P", "a", points, "x", "y"))
    at = {one.text: float(one.attrib["y"]) for one in drawn.iter("text")}
    assert at["base"] - 9 > at["y"]
