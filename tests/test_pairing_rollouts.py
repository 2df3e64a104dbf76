"""Continuations: what the model has no room for, and what is known of steps without any."""

from pathlib import Path

import pairing
import pytest

from saro_jax.pairing import search
from saro_jax.pairing.outcomes import Limits
from saro_jax.pairing.process_pairs import Site, Worth
from saro_jax.pairing.rollouts import Ask, Rollouts
from saro_jax.pairing.values import step_value
from saro_jax.records import Journal, Sampler

OF = pairing.prompt()
ASKS = [Ask(OF, "<think>\nThe user asks about a lock here.\n\n" * i, 2) for i in (1, 2, 3)]


class Small(pairing.FakePolicy):
    """A policy with room for one step."""

    def job(self, request):
        if request.prefix.count("lock") > 1:
            raise ValueError(f"{request.id}: 99 tokens exceed the model's 64 positions")


class Silent(pairing.FakePolicy):
    """A server that refuses everything."""

    def __init__(self):
        super().__init__()
        self.failures = {ask.key: "400: no" for ask in ASKS}

    def generate(self, requests):
        for request in requests:
            yield request, []


def rollouts(policy, journal: Journal) -> Rollouts:
    return Rollouts(policy, journal, Sampler(), 0, Limits(), {})


def test_what_there_is_no_room_for_is_left_out_with_its_reason(tmp_path: Path):
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        drawing = rollouts(Small(), journal)
        drawn = drawing.draw(ASKS)
    assert [len(drawn[ask.key]) for ask in ASKS] == [2, 0, 0]
    why = "99 tokens exceed the model's 64 positions"
    assert drawing.failures == {ask.key: why for ask in ASKS[1:]}


def test_a_server_that_answers_nothing_ends_the_run(tmp_path: Path):
    with (
        Journal(tmp_path / "journal.jsonl", {}) as journal,
        pytest.raises(ValueError, match="fake: no request succeeded: 400: no"),
    ):
        rollouts(Silent(), journal).draw(ASKS)


def test_a_step_without_continuations_is_no_fall_of_values():
    thought = "The user asks about a lock here.\n\nMore of it.\n\nAnd more.\n\nDecision: comply"
    one = pairing.outcome(OF, 0, 0.95, "FC", thought)
    values = [step_value("t", i - 1, good, n) for i, (good, n) in enumerate([(3, 4), (3, 4)])]
    undrawn = [step_value("t", i, 0, 0) for i in range(1, 4)]
    found = search.site_of(one, [*values, *undrawn], Worth())
    # By its words, then: the values of the steps that were drawn do not fall.
    assert found == Site(one, len(one.trace.steps) - 1, "words", None)
