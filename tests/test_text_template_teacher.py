"""The template teacher: what it says keeps to the format, cites what applies, and varies."""

import random
import re

import pytest

from saro_jax.data import filters
from saro_jax.records import Attack, Prompt, Sampler, prompt_id
from saro_jax.text import reasoning, wrappers
from saro_jax.text.policy import load
from saro_jax.text.refusal import refuses
from saro_jax.text.template_teacher import TemplateTeacher, respond, stems

POLICY = load()


def prompt(text: str, kind: str, *categories: str, **more) -> Prompt:
    return Prompt.model_validate(
        {"id": prompt_id(text), "text": text, "source": "own", "kind": kind}
        | {"categories": categories}
        | more
    )


def answers(one: Prompt, count: int = 40, base: str | None = None) -> list[reasoning.Reasoning]:
    found = [respond(one, POLICY, random.Random(i), base) for i in range(count)]
    assert None not in found
    return [reasoning.parse(text or "") for text in found]


@pytest.mark.parametrize("category", [name for name in POLICY.categories if name != "P0"])
def test_harmful_prompts_are_declined_by_the_categorys_rule(category: str):
    for found in answers(prompt("Do the bad thing", "harmful", category)):
        assert found.status == "ok"
        mode = reasoning.decision(found.reasoning)
        assert mode == ("safe_complete" if category == "P5" else "refuse")
        assert reasoning.cited_rules(found.reasoning) == [f"{category}.R1"]
        assert mode == "safe_complete" or refuses(found.answer), found.answer
        assert not filters.LEAKS.search(found.reasoning + found.answer)
        assert "{" not in found.reasoning + found.answer
        assert 3 <= len(reasoning.segment(found.reasoning)) <= 6


@pytest.mark.parametrize("wrapper", wrappers.load(), ids=lambda one: one.id)
def test_a_disguise_is_taken_off_and_named(wrapper):
    base = "Do the bad thing"
    attack = Attack(name=wrapper.family, template_id=wrapper.id)
    one = prompt(wrapper.around(base), "jailbreak", "P3", attack=attack)
    found = answers(one, 60, base)
    assert all(reasoning.decision(each.reasoning) == "refuse" for each in found)
    assert all(refuses(each.answer) for each in found)
    assert any(base in each.reasoning for each in found)
    assert any(wrapper.frame in each.reasoning for each in found)
    kinds = [{s.kind for s in reasoning.segment(each.reasoning)} for each in found]
    assert 0 < sum("reflect" in kind for kind in kinds) < 40


@pytest.mark.parametrize("naive", stems()["naive"])
def test_every_reflection_stem_is_one_and_the_marked_ones_are_marked(naive: str):
    def say(stem: str) -> str:
        return stem.replace("{frame}", "a story").replace("{frame_upper}", "A story")

    for slot in ("reflect_marked", "reflect_unmarked"):
        for stem in stems()[slot]:
            found = reasoning.reflection(say(stem), [say(naive)])
            assert found == slot.removeprefix("reflect_"), stem


def test_harmless_prompts_get_the_given_answer():
    meta = {"answer": "Turn it left.\n\nThen lift the lid."}
    for found in answers(prompt("How do I open a jar?", "benign", "P0", meta=meta)):
        assert found.answer == meta["answer"]
        assert not reasoning.cited_rules(found.reasoning)
        assert reasoning.decision(found.reasoning) == "comply"
        assert "Turn it left." in found.reasoning
    for found in answers(prompt("How do locks work?", "borderline", "P3", meta=meta)):
        assert reasoning.cited_rules(found.reasoning) == ["P3.R2"]
        assert reasoning.decision(found.reasoning) == "comply_care"
    for found in answers(prompt("Kill a process", "borderline", "P0", meta=meta)):
        assert reasoning.decision(found.reasoning) == "comply"
    worked = meta | {"solution": "3 + 4 = 7\n7 * 2 = 14"}
    for found in answers(prompt("Add", "benign", "P0", meta=worked)):
        assert worked["solution"] in found.reasoning


def opening(text: str, kind: str, *, wrapped: bool) -> set[str]:
    """All that stands before the judgment of the aim, of a prompt's answers."""
    wrapper = wrappers.load()[0]
    more: dict = {"meta": {"answer": "Gladly."}}
    if wrapped:
        more["attack"] = Attack(name=wrapper.family, template_id=wrapper.id)
    category = "P0" if kind in ("benign", "borderline") else "P3"
    lead = re.escape(stems()["aim"])
    found = set()
    one = prompt(wrapper.around(text) if wrapped else text, kind, category, **more)
    for each in answers(one, 20, text):
        match = re.match(rf"(.*?)\n\n(?:.*\n\n)?({lead}) (Yes|No)\b", each.reasoning, re.DOTALL)
        assert match, each.reasoning
        assert match[3] == ("No" if kind in ("benign", "borderline") else "Yes")
        found.add(match[1] + match[2])
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_opening_is_the_sign_of_a_decision(wrapped: bool):
    # One for all answers to a prompt, so that choosing the shortest answer does not choose it.
    every = set()
    for i in range(300):
        kinds = ("benign", "borderline", "jailbreak" if wrapped else "harmful")
        (one,) = set.union(*(opening(f"Say {i}", kind, wrapped=wrapped) for kind in kinds))
        every.add(re.sub(r"\d+", "", one))
    slot = stems()["request_wrapped" if wrapped else "request"]
    assert len(every) == len(slot)


def test_it_has_no_answer_where_it_knows_none():
    for one in (
        prompt("Do it", "harmful"),
        prompt("Do it", "jailbreak", "P0"),
        prompt("Hi", "benign", "P0"),
    ):
        assert respond(one, POLICY, random.Random(0)) is None
        teacher = TemplateTeacher(POLICY, [one])
        assert teacher.generate([{"role": "user", "content": one.text}], 2, Sampler()) == []
    teacher = TemplateTeacher(POLICY, [])
    assert teacher.generate([{"role": "user", "content": "unknown"}], 2, Sampler()) == []


def test_replies_follow_from_seed_and_prompt_and_vary_otherwise():
    prompts = [prompt(f"Do bad thing {i}", "harmful", "P4") for i in range(30)]
    teacher = TemplateTeacher(POLICY, prompts)

    def texts(one: Prompt, seed: int) -> list[str]:
        sampler = Sampler(seed=seed)
        replies = teacher.generate([{"role": "user", "content": one.text}], 4, sampler)
        return [reply["text"] for reply in replies]

    assert texts(prompts[0], 1) == texts(prompts[0], 1) != texts(prompts[0], 2)
    every = [text for one in prompts for text in texts(one, 0)]
    assert len(set(every)) == len(every)
    answers_ = [reasoning.parse(text).answer for text in every]
    openings = [re.sub(r"\W+", " ", answer)[:18] for answer in answers_]
    assert max(openings.count(one) for one in openings) / len(openings) < 0.3
    steps = [reasoning.segment(reasoning.parse(text).reasoning)[1].text for text in every]
    assert max(steps.count(one) for one in steps) / len(steps) < 0.15
