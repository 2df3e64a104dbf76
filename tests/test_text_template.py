"""Prompt templates: each renders with exactly its slots, and anything else is refused."""

import re
from pathlib import Path

import pytest

from saro_jax.text import template
from saro_jax.text.policy import load, render

NAMES = (
    *("t1_reason_safe", "t2_reason_general", "t3_reflect_rewrite", "t4_reflect_benign"),
    *("t5_classify", "t6_score", "t7_step_split", "t8_compress"),
)
# What each has to say, by the specification's table.
SAYS = {
    "t1_reason_safe": ("policy", "Decision: MODE", "really being asked", "Never mention", "preach"),
    "t2_reason_general": ("Take the task apart", "Check the result", "Do not bring up safety"),
    "t3_reflect_rewrite": ("got wrong", "Do not begin again", "does not count"),
    "t4_reflect_benign": ("set off the alarm", "complete, friendly answer"),
    "t5_classify": ("definitions", "JSON"),
    "t6_score": ("policy", "JSON", "follow no instruction"),
    "t7_step_split": ("every character",),
    "t8_compress": ("the same ids", "stays as it is"),
}


def test_the_packaged_templates_are_the_listed_ones():
    assert tuple(template.names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_template_renders_with_its_slots_and_says_what_it_must(name: str):
    values = {slot: f"<{slot}> {{{{other}}}} --- user ---" for slot in template.slots(name)}
    messages = template.render(name, values)
    assert [one["role"] for one in messages] == ["system", "user"]
    text = "\n".join(one["content"] for one in messages)
    for slot, value in values.items():
        assert value in text, slot
    file = (template.FOLDER / f"{name}.txt").read_text()
    assert all(words in file for words in SAYS[name])
    assert not file.startswith("---") and file.splitlines()[0] not in text


def test_the_user_turn_of_the_reasoning_templates_is_the_prompt_alone():
    policy = render(load(), ["P4"])
    common = {"policy": policy, "prompt": "Hi {{policy}}"}
    more = {"modes": "comply, refuse", "example_rule": "P4.R1"}
    for name, values in (("t1_reason_safe", common | more), ("t2_reason_general", common)):
        system, user = template.render(name, values)
        assert user == {"role": "user", "content": "Hi {{policy}}"}
        assert "P4.R1" in system["content"] and "{{" not in system["content"]


def test_wrong_slots_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"t7_step_split\.txt: no value for the slot 'reasoning'"):
        template.render("t7_step_split", {"max_steps": "24"})
    with pytest.raises(ValueError, match="has no slot 'x'; its slots are max_steps, reasoning"):
        template.render("t7_step_split", {"max_steps": "24", "reasoning": "a", "x": "b"})
    with pytest.raises(ValueError, match="t9: no such template; the packaged ones are t1_reason"):
        template.render("t9", {})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("what it is for\n", "no messages: a line like"),
        ("--- judge ---\nx", "unknown role 'judge', allowed: system, user, assistant"),
        ("--- user ---\n{{a b}}", r"\{\{a b\}\} is no slot"),
        ("--- user ---\n{{}}", r"\{\{\}\} is no slot"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, text: str, error: str):
    file = tmp_path / "own.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {error}"):
        template.render(file, {"a": "x"})
    with pytest.raises(ValueError, match=r"none\.txt: cannot be read"):
        template.render(tmp_path / "none.txt", {})
