"""What a teacher is told beside the prompt."""

import json
from pathlib import Path

import pytest

from saro_jax.config import SynthesizeConfig
from saro_jax.generation import contexts
from saro_jax.generation.contexts import Context, messages
from saro_jax.records import KINDS, Kind, Prompt
from saro_jax.text import policy as policies
from saro_jax.text import reasoning

POLICY = policies.load("saro")
EXAMPLES = contexts.read_examples("quickstart:ritd", "x")


def prompt(kind: Kind, *categories: str, name: str = "p") -> Prompt:
    return Prompt(id=name, text="Open it?", source="s", kind=kind, categories=categories)


@pytest.mark.parametrize("kind", KINDS)
def test_the_steering_line_stands_before_harmful_prompts_only(kind: Kind):
    asked = messages(prompt(kind, "P3"), POLICY, Context(steer="Take care."))
    risky = kind in ("harmful", "jailbreak")
    assert asked[-1]["content"] == ("Take care.\n\nOpen it?" if risky else "Open it?")


@pytest.mark.parametrize("kind", KINDS)
def test_examples_stand_between_the_instructions_and_the_prompt(kind: Kind):
    one, bare = prompt(kind, "P3"), messages(prompt(kind, "P3"), POLICY, Context())
    asked = messages(one, POLICY, Context(shots=4), EXAMPLES)
    assert [asked[0], asked[-1]] == bare and len(asked) == 10
    assert [turn["role"] for turn in asked[1:-1]] == ["user", "assistant"] * 4
    kinds = {example.prompt: example.kind for example in EXAMPLES}
    shown = [kinds[turn["content"]] for turn in asked[1:-1:2]]
    assert shown == (
        ["benign"] * 4 if kind == "benign" else ["harmful", "benign", "jailbreak", "borderline"]
    )
    for turn in asked[2:-1:2]:
        assert reasoning.parse(turn["content"]).status == "ok"
    # The same for the same prompt, others for another.
    assert asked == messages(one, POLICY, Context(shots=4), EXAMPLES)
    other = messages(prompt(kind, "P3", name="q"), POLICY, Context(shots=4), EXAMPLES)
    assert asked[1:-1] != other[1:-1]


def test_no_prompt_is_its_own_example():
    only = [example for example in EXAMPLES if example.kind == "benign"][:2]
    one = Prompt(id="p", text=only[0].prompt, source="s", kind="benign", categories=())
    asked = messages(one, POLICY, Context(shots=3), only)
    assert [turn["content"] for turn in asked[1:-1:2]] == [only[1].prompt] * 3


def test_what_the_search_tries():
    def told(**given) -> list[tuple]:
        found = contexts.tried(SynthesizeConfig(prompts=["x"], search=True, **given))
        return [(one.shots, one.render, one.steer) for one in found]

    assert told() == [(n, r, None) for n in (0, 2) for r in ("relevant", "whole")]
    steered = told(shots=4, steer="Careful.")
    assert len(steered) == 8 and set(steered) == {
        (n, r, s) for n in (0, 4) for r in ("relevant", "whole") for s in (None, "Careful.")
    }


def test_examples_that_are_none(tmp_path: Path):
    file = tmp_path / "e.jsonl"
    file.write_text(json.dumps({"kind": "benign", "prompt": "Hi?", "answer": "B."}) + "\n")
    with pytest.raises(ValueError, match=r"e\.jsonl:1: --x: reasoning: None; expected text"):
        contexts.read_examples(str(file), "--x")
