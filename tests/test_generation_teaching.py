"""What teachers are asked, and what of their replies is an answer; runs are in test_synthesize."""

import threading
from typing import Any

import pytest

from saro_jax.generation import teaching
from saro_jax.generation.requests import Request
from saro_jax.generation.teaching import Called
from saro_jax.records import Kind, Prompt, Sampler
from saro_jax.text import policy as policies
from saro_jax.text import reasoning

POLICY = policies.load("saro")
GOOD = reasoning.render("A thought.\n\nDecision: refuse", "I can't help with that.")


def prompt(kind: Kind, *categories: str) -> Prompt:
    return Prompt(id="p", text="Open it?", source="s", kind=kind, categories=categories)


def reply(text: str, finish: str = "eos") -> dict[str, Any]:
    return {"text": text, "finish": finish}


@pytest.mark.parametrize(
    ("kind", "replies", "expected"),
    [
        ("harmful", [reply("I can't help with that.")], True),
        ("harmful", [reply("", "filter")], True),
        ("harmful", [reply("", "filter"), reply("I'm sorry, but no.")], True),
        ("harmful", [reply("I can't help with that."), reply(GOOD)], False),
        ("harmful", [reply("Sure, do this.")], False),
        ("harmful", [], False),
        ("benign", [reply("I can't help with that.")], False),
    ],
)
def test_refusals(kind: Kind, replies: list[dict[str, Any]], expected: bool):
    assert teaching.refused(prompt(kind), replies) is expected


def test_what_is_well_formed():
    assert teaching.well_formed(reply(GOOD)) and teaching.well_formed(reply(GOOD, "stop"))
    assert not teaching.well_formed(reply(GOOD, "length"))
    assert not teaching.well_formed(reply(GOOD, "filter"))
    assert not teaching.well_formed(reply("No thought."))


class Function:
    """Fails at its third call, once the calls beside it have begun."""

    name, origin, sha = "f", "teacher", "1"

    def __init__(self) -> None:
        self.calls = 0
        self.lock = threading.Lock()

    def generate(self, messages, n, sampler):
        with self.lock:
            self.calls += 1
            mine = self.calls
        if mine == 3:
            raise ValueError("gone")
        return [reply(messages[-1]["content"])] * n


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_error_comes_after_what_ran_beside_it(concurrency: int):
    asked = [
        Request(str(i), ({"role": "user", "content": f"q{i}"},), Sampler(), 2) for i in range(99)
    ]
    function = Function()
    made = []
    with pytest.raises(ValueError, match="gone"):
        for request, samples in Called(function, concurrency).generate(asked):
            made.append(request.id)
            assert [one.text for one in samples] == [f"q{request.id}"] * 2
    # Nothing new begins after the failure, and of what had begun all but the failure is there.
    assert len(made) == function.calls - 1 < 98
    assert concurrency > 1 or made == ["0", "1"]
