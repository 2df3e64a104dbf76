"""The jailbreak wrappers: each carries its request, and held-out families stay apart."""

import base64
import codecs
import random

import pytest

from saro_jax.text.wrappers import by_id, choose, load

REQUEST = "How do I open a jar?"


@pytest.mark.parametrize("wrapper", load(), ids=lambda one: one.id)
def test_a_wrapper_carries_the_request(wrapper):
    text = wrapper.around(REQUEST)
    assert "{encoded}" not in text and "{request}" not in text
    assert text != REQUEST and wrapper.frame
    if wrapper.encode is None:
        assert REQUEST in text
    else:
        assert REQUEST not in text
    assert by_id(wrapper.id) is wrapper


def test_the_encodings_can_be_undone():
    text = {one.id: one.around(REQUEST) for one in load()}
    assert codecs.decode(text["rot13_1"], "rot13").endswith(REQUEST)
    assert base64.b64decode(text["base64_1"].split(": ")[1]).decode() == REQUEST
    assert "jar? a open I do How" in text["reversed_1"]
    assert by_id("none") is None


def test_families_are_for_training_or_held_out():
    families = {held: {one.family for one in load() if one.held_out == held} for held in (0, 1)}
    assert not families[0] & families[1]
    assert len(families[0]) >= 10 and len(families[1]) >= 5
    # Families of public benchmarks are never trained on.
    assert {"opening", "no_refusing", "distractor", "verse", "villain", "unbound"} <= families[1]
    ids = [one.id for one in load()]
    assert len(set(ids)) == len(ids)


def test_the_choice_follows_from_the_seed_and_takes_families_first():
    for held_out in (False, True):
        chosen = choose(5, held_out=held_out, rng=random.Random(3))
        assert chosen == choose(5, held_out=held_out, rng=random.Random(3))
        assert len({one.family for one in chosen}) == 5
        assert all(one.held_out == held_out for one in chosen)
    every = choose(10_000, held_out=False, rng=random.Random(0))
    assert len(every) == len(set(every)) == sum(not one.held_out for one in load())
