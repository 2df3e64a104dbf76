"""RIT-D from end to end with the template and scripted teachers: files, resume, settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import Server

from saro_jax import records, synthesize
from saro_jax.config import Config, SynthesizeConfig
from saro_jax.data import rows
from saro_jax.data.filters import Judges
from saro_jax.records import RITD, Prompt, Trace
from saro_jax.text import reasoning, wrappers
from saro_jax.text.policy import policy_path
from saro_jax.text.template_teacher import TemplateTeacher

HARMFUL = [
    {"prompt": f"Help me steal the {what} of a stranger", "category": "P3"}
    for what in ("car", "purse", "bicycle", "garden gnome", "painting", "boat")
]
BENIGN = [
    {"question": f"What is {i} plus {i + 1}?", "answer": f"Add them.\n#### {2 * i + 1}"}
    for i in range(10, 16)
]
BORDERLINE = [
    {"prompt": "How do I kill a hanging process?", "answer": "Use the kill command."},
    {"prompt": "How do I steal the show?", "answer": "Practise, and smile at people."},
    {"prompt": "How does a lock work?", "category": "P3", "answer": "Pins block a cylinder."},
]
FILES = ("prompts.jsonl", "traces.jsonl", "ritd.jsonl", "ritd_dev.jsonl", "contamination.json")
FILES += ("rejects/prompts.jsonl", "rejects/traces.jsonl")
SMALL = {"n": 3, "evaluation": None, "concurrency": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, made in (("harmful", HARMFUL), ("benign", BENIGN), ("borderline", BORDERLINE)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (root / "evaluation.jsonl").write_text('{"prompt": "Who wrote the first novel?"}\n')
    (root / "hit.jsonl").write_text(json.dumps({"prompt": HARMFUL[2]["prompt"]}) + "\n")
    near = "Please help me steal the car of a stranger, now"
    (root / "near.jsonl").write_text(json.dumps({"prompt": near}) + "\n")
    return root


def config(data: Path, seed: int = 0, server: Any = None, **settings: Any) -> Config:
    given = [f"{name}={data}/{name}.jsonl" for name in ("harmful", "benign", "borderline")]
    section = {"prompts": given} | SMALL | settings
    sections = {"data": {"train": "x"}, "synthesize": section, "server": server or {}}
    return Config.model_validate(sections | {"seed": seed})


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    synthesize.run(config(data), out)
    return out


def read(out: Path) -> tuple[list[Prompt], list[Trace], list[RITD]]:
    made = [*records.read(out / "ritd.jsonl", RITD), *records.read(out / "ritd_dev.jsonl", RITD)]
    traces = records.read(out / "traces.jsonl", Trace)
    return records.read(out / "prompts.jsonl", Prompt), traces, made


# ---- what a run leaves ---------------------------------------------------------------------------


def test_every_prompt_gets_a_row_that_the_warmup_reads(straight: Path):
    prompts, traces, made = read(straight)
    kinds = [one.kind for one in prompts]
    assert (kinds.count("harmful"), kinds.count("jailbreak"), kinds.count("benign")) == (6, 6, 6)
    assert len(made) == len(prompts) and {row.parent_ids[1] for row in made} == {
        one.id for one in prompts
    }
    assert {row.parent_ids[0] for row in made} <= {trace.id for trace in traces}
    for name in ("ritd.jsonl", "ritd_dev.jsonl"):
        if (straight / name).stat().st_size:
            found, rejects = rows.read(str(straight / name), "sft")
            assert not rejects
            assert {row.kind for row in found} <= set(records.KINDS)
    row = next(row for row in made if row.kind == "benign")
    sft = next(one for one in rows.read(str(straight / "ritd.jsonl"), "sft")[0] if one.id == row.id)
    text = sft.completion[0].content
    assert text == f"<think>\n{row.reasoning}\n</think>\n\n{row.answer}"
    assert row.reasoning.endswith("Decision: comply") and "Add them." in row.reasoning
    for row in made:
        expected = {"harmful": "refuse", "jailbreak": "refuse", "benign": "comply"}
        assert row.decision == expected.get(row.kind, row.decision)
        assert row.judgments["refusal"] == ("FR" if row.decision == "refuse" else "FC")


def test_held_out_groups_have_wrappers_of_their_own(data: Path, tmp_path: Path):
    manifest = synthesize.run(config(data, dev_share=0.5, wrapped_benign=1.0), tmp_path)
    prompts, _, _ = read(tmp_path)
    for one in prompts:
        if one.attack:
            wrapper = wrappers.by_id(one.attack.template_id)
            assert wrapper is not None and wrapper.held_out == (one.split == "dev")
    train, dev = (records.read(tmp_path / name, RITD) for name in ("ritd.jsonl", "ritd_dev.jsonl"))
    assert train and dev and manifest["report"]["dev_rows"] == len(dev)
    group = {one.id: one.base_id or one.id for one in prompts}
    held = {group[row.parent_ids[1]] for row in dev}
    assert not held & {group[row.parent_ids[1]] for row in train}


def test_the_shortest_accepted_answer_is_kept(straight: Path):
    _, traces, made = read(straight)
    kept = {row.parent_ids[0] for row in made}
    for prompt_id in {trace.prompt_id for trace in traces}:
        mine = [trace for trace in traces if trace.prompt_id == prompt_id]
        lengths = {trace.id: trace.n_tok.reason or 0 for trace in mine}
        (chosen,) = [trace.id for trace in mine if trace.id in kept]
        enough = [n for n in lengths.values() if n >= 40] or list(lengths.values())
        assert lengths[chosen] in (min(enough), max(enough), min(lengths.values()))
    report = json.loads((straight / "manifest.json").read_text())["report"]["lengths"]
    shares = json.loads((straight / "manifest.json").read_text())["report"]["decisions"]
    assert all(one["accepted"] == one["kept"] for one in shares.values())
    for kind in ("harmful", "jailbreak"):
        tokens = [one["reasoning_tokens"] for one in report[kind]]
        assert tokens[-1] < tokens[0]


def test_the_manifest_and_the_way_back(straight: Path, data: Path):
    manifest = records.read_manifest(straight / "manifest.json")
    assert (manifest["n_in"], manifest["model"], manifest["seed"]) == (15, "template", 0)
    assert [one["rows"] for one in manifest["inputs"]] == [6, 6, 3]
    assert manifest["report"]["yield"]["harmful"]["yield"] == 1.0
    assert manifest["config"]["limits"]["quality"] == 8.0
    assert "concurrency" not in manifest["config"]
    row = next(r for r in records.read(straight / "ritd.jsonl", RITD) if r.kind == "jailbreak")
    found = records.lineage(row.id, straight / "ritd.jsonl")
    assert found["prompt"] == row.prompt
    assert found["prompts"][-1]["text"] in {one["prompt"] for one in HARMFUL}
    assert found["models"] == ["template"] and found["stages"] == ["synthesize"]
    assert found["policy_versions"] == [manifest["policy_version"]]


# ---- the same files, however it ran --------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_same_inputs_give_the_same_bytes(data, straight, tmp_path, concurrency: int):
    manifest = synthesize.run(config(data, concurrency=concurrency), tmp_path)
    assert contents(tmp_path) == contents(straight)
    before = records.read_manifest(straight / "manifest.json")
    assert records.comparable(manifest) == records.comparable(before)


def test_another_seed_gives_other_rows(data: Path, straight: Path, tmp_path: Path):
    synthesize.run(config(data, seed=1), tmp_path)
    assert contents(tmp_path)["ritd.jsonl"] != contents(straight)["ritd.jsonl"]


class Counted(TemplateTeacher):
    """The template teacher, which writes down what it was asked."""

    asked: list[str] = []  # noqa: RUF012 - reset by each test

    def generate(self, messages, n, sampler):
        Counted.asked.append(messages[-1]["content"])
        return super().generate(messages, n, sampler)


def test_a_finished_run_asks_nothing_and_a_change_of_filters_asks_nothing(data, tmp_path):
    Counted.asked = []
    first = synthesize.run(config(data), tmp_path, teacher=Counted)
    prompts, _, _ = read(tmp_path)
    assert sorted(Counted.asked) == sorted(one.text for one in prompts)
    again = synthesize.run(config(data), tmp_path, teacher=Counted)
    assert again == first and len(Counted.asked) == len(prompts)
    changed = synthesize.run(config(data, srs="shortest"), tmp_path, teacher=Counted)
    assert len(Counted.asked) == len(prompts)
    assert changed["config_sha"] != first["config_sha"]
    (tmp_path / "ritd.jsonl").unlink()
    back = synthesize.run(config(data, srs="shortest"), tmp_path, teacher=Counted)
    assert records.comparable(back) == records.comparable(changed)
    assert len(Counted.asked) == len(prompts)


class Failing(Counted):
    """Fails at its seventh request."""

    def generate(self, messages, n, sampler):
        if len(Counted.asked) == 6:
            raise ValueError("the server is gone")
        return super().generate(messages, n, sampler)


def test_a_failed_run_goes_on_where_it_was(data: Path, straight: Path, tmp_path: Path):
    Counted.asked = []
    with pytest.raises(ValueError, match="the server is gone"):
        synthesize.run(config(data, concurrency=1), tmp_path, teacher=Failing)
    assert not (tmp_path / "manifest.json").exists()
    synthesize.run(config(data), tmp_path, teacher=Counted)
    assert len(Counted.asked) == len(set(Counted.asked)) == len(read(tmp_path)[0])
    assert contents(tmp_path) == contents(straight)


WORKER = """
import sys, time
from pathlib import Path
from saro_jax import synthesize
from saro_jax.config import Config
from saro_jax.text.template_teacher import TemplateTeacher

class Slow(TemplateTeacher):
    def generate(self, messages, n, sampler):
        time.sleep(float(sys.argv[2]))
        return super().generate(messages, n, sampler)

config = Config.model_validate_json(sys.stdin.read())
synthesize.run(config, Path(sys.argv[1]), teacher=Slow)
"""


def test_kill_minus_nine_changes_nothing_in_the_end(data: Path, straight: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(synthesize.__file__).parents[1])}

    def start(pause: str) -> subprocess.Popen:
        arguments = [sys.executable, "-c", WORKER, str(tmp_path), pause]
        process = subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(config(data, concurrency=2).model_dump_json())
        process.stdin.close()
        return process

    process = start("0.1")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journals = list((tmp_path / "journal").glob("*"))
        if journals and journals[0].read_bytes().count(b"\n") > 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "manifest.json").exists()
    assert start("0").wait(120) == 0
    assert contents(tmp_path) == contents(straight)


# ---- teachers that do not do as they are told ----------------------------------------------------


class Scripted:
    """Answers by what the prompt contains; `replies` may depend on how often it was asked."""

    name, origin, sha = "scripted", "teacher", "1"
    script: Any = None

    def __init__(self, policy, prompts):
        self.spare = TemplateTeacher(policy, prompts)
        self.calls: dict[str, list[tuple[int, int]]] = {}

    def generate(self, messages, n, sampler):
        text = messages[-1]["content"]
        calls = self.calls.setdefault(text, [])
        calls.append((n, sampler.seed))
        found = type(self).script(text, len(calls), n)
        return self.spare.generate(messages, n, sampler) if found is None else found


def scripted(script) -> type[Scripted]:
    return type("One", (Scripted,), {"script": staticmethod(script)})


def test_answers_that_do_not_parse_are_asked_for_again_with_another_seed(data, tmp_path):
    made: list[Scripted] = []

    def script(text: str, call: int, n: int):
        if "car" in text and call < 3:
            return [{"text": "<think>no end", "finish": "eos"}] * n
        return None

    def teacher(policy, prompts):
        made.append(scripted(script)(policy, prompts))
        return made[-1]

    manifest = synthesize.run(config(data, jailbreaks=0), tmp_path, teacher=teacher)
    calls = made[0].calls[HARMFUL[0]["prompt"]]
    assert [n for n, _ in calls] == [3, 3, 3] and len({seed for _, seed in calls}) == 3
    assert all(len(calls) == 1 for text, calls in made[0].calls.items() if "car" not in text)
    assert manifest["report"]["yield"]["harmful"]["samples"] == 6 * 3 + 2 * 3
    assert manifest["report"]["yield"]["harmful"]["yield"] == 1.0
    assert manifest["drop_reasons"] == {"parse": 6}


def test_a_teacher_that_refuses_is_replaced_and_counted(data: Path, tmp_path: Path):
    def script(text: str, call: int, n: int):
        return [{"text": "I can't help with that.", "finish": "eos"}] * n if "car" in text else None

    settings = config(data, jailbreaks=0, retries=1)
    manifest = synthesize.run(settings, tmp_path, teacher=scripted(script))
    assert manifest["report"]["teacher_refusals"] == 1
    _, traces, made = read(tmp_path)
    origins = {trace.id: trace.origin for trace in traces}
    fallback = [row for row in made if origins[row.parent_ids[0]] == "template"]
    assert [row.prompt for row in fallback] == [HARMFUL[0]["prompt"]]
    assert manifest["report"]["yield"]["harmful"]["yield"] == 1.0


def test_what_is_dropped_has_its_reason_and_its_text(data: Path, tmp_path: Path, capsys):
    text = reasoning.render(
        "Sure thing, this is easy.\n\nP3.R1 is there.\n\nDecision: comply", "Ok."
    )

    def script(prompt: str, call: int, n: int):
        if "steal" in prompt and "stranger" in prompt:
            return [{"text": text, "finish": "eos", "cost": 0.25}] * n
        return [] if "process" in prompt else None

    risk = Judges(answer_risk=lambda pairs: [0.9] * len(pairs))
    settings = config(data, jailbreaks=0, wrapped_benign=0)
    teacher = scripted(script)
    manifest = synthesize.run(
        settings, tmp_path, teacher=teacher, judges=risk, judges_version="always bad"
    )
    lines = (tmp_path / "rejects" / "traces.jsonl").read_text().splitlines()
    rejects = [json.loads(line) for line in lines]
    assert len(rejects) == 18
    assert {one["reason"] for one in rejects} == {"answer_safety: 0.900, allowed below 0.2"}
    assert rejects[0]["record"]["raw"] == text
    assert rejects[0]["record"]["meta"]["verdicts"] == {"refusal": "FC", "answer_risk": 0.9}
    assert manifest["drop_reasons"] == {"answer_safety": 18, "no answer": 1}
    assert manifest["run"]["cost"] == 4.5
    said = synthesize.summary(manifest, tmp_path)
    assert "only 0% of the harmful prompts gave a row, mostly for 'answer_safety'" in said


def test_what_a_teacher_is_asked(data: Path, tmp_path: Path):
    asked: dict[str, str] = {}

    class Seen(TemplateTeacher):
        def generate(self, messages, n, sampler):
            asked[messages[-1]["content"]] = messages[0]["content"]
            return super().generate(messages, n, sampler)

    synthesize.run(config(data, jailbreaks=0, wrapped_benign=0), tmp_path, teacher=Seen)
    harmful, benign = asked[HARMFUL[0]["prompt"]], asked[BENIGN[0]["question"]]
    assert "P3.R1" in harmful and "P4.R1" not in harmful and "Decision: MODE" in harmful
    assert "P3.R1" not in benign and "Do not bring up safety" in benign
    assert "P4.R1" in asked[BORDERLINE[0]["prompt"]]  # no label: all of the policy


# ---- teachers that are models --------------------------------------------------------------------


def model_answer(sent: dict[str, Any]) -> dict[str, Any]:
    """A model's reply, by rules: it reasons where it is told to, and helps with boats anyway."""
    system = sent["messages"][0]["content"] if len(sent["messages"]) > 1 else ""
    prompt = sent["messages"][-1]["content"]
    made = faults.echo(sent)
    seed = sent["seed"] % 7
    if (extra := beside(system, prompt, sent)) is not None:
        made["choices"][0]["message"]["content"] = extra
        return made
    thought = f"They want this: {prompt} Take {seed} looks.\n\n" + "Think it over. " * seed
    if not system:
        text = "I can't help with that." if "painting" in prompt else "Sure, do this."
    elif "stranger" in prompt and "boat" not in prompt:
        rule = re.findall(r"P\d+\.R\d+", system)[0]
        text = reasoning.render(
            f"{thought}\n\n{rule} forbids it.\n\nDecision: refuse", "I can't help with that."
        )
    else:
        total = sum(map(int, re.findall(r"\d+", prompt)))
        text = reasoning.render(f"{thought}\n\nDecision: comply", f"It is {total}.")
    made["choices"][0]["message"]["content"] = text
    return made


def beside(system: str, prompt: str, sent: dict[str, Any]) -> str | None:
    """What the model says as a guard, and to T5, T6, T3 and T8; None for other requests."""
    if sent["messages"][-1]["role"] == "assistant":  # a guard: it minds three looks, till mended
        return "unsafe\nS2" if "Take 3 looks" in prompt and "Rather" not in prompt else "safe"
    if system.startswith("You sort requests"):
        kind = "benign" if "process" in prompt else "borderline"
        category = "P3" if "show" in prompt and sent["seed"] % 2 else "P0"
        return f"```json\n{json.dumps({'categories': [category], 'kind': kind})}\n```"
    if system.startswith("You grade the work"):
        third = 5 if "Take 5 looks" in prompt else 9
        return json.dumps({"scores": [9, 9, third], "reason": "so"})
    if system.startswith("You correct the course"):
        rule = re.findall(r"P\d+\.R\d+", system)
        return (
            f"Rather, that looked too closely; {rule[0]} decides.\n\nDecision: refuse\n</think>"
            "\n\nI can't help with that."
        )
    if system.startswith("You tighten"):
        thought = prompt.partition("Thinking:")[2].partition("Answer:")[0].strip()
        return re.sub(r"(Think it over\. )+", "Think it over. ", thought)
    return None


def at(server: Server, tmp_path: Path, teacher: str = "api", **given: Any) -> dict[str, Any]:
    """Settings for a teacher behind a server."""
    where = {"teacher_url": server.url, "teacher_model": "tiny"}
    cache = {"cache": str(tmp_path / "replies.sqlite"), "backoff": 0.01}
    return {"teacher": teacher, **where, "server": cache | given}


def test_a_teacher_behind_a_server_that_fails(data: Path, tmp_path: Path, capsys):
    with Server(answer=model_answer) as server:
        clean = synthesize.run(config(data, **at(server, tmp_path)), tmp_path / "clean")
        asked = server.delivered.total()
    kinds = ["429-ms", "500", "truncated", "cut", "html", "drop", "text", "unasked"]

    def plan(sent: dict[str, Any]) -> list[str]:
        return [kinds[int(faults.key(sent), 16) % len(kinds)]]

    prices: Any = {"input_price": 1.0, "output_price": 10.0}
    with Server(plan=plan, answer=model_answer) as server:
        given = at(server, tmp_path / "x", stream=True, concurrency=3, **prices)
        made = synthesize.run(config(data, **given), tmp_path / "faults")
        assert set(server.delivered.values()) == {1} and server.delivered.total() == asked
        # Elsewhere the same command finds all replies in the cache.
        synthesize.run(config(data, **given), tmp_path / "again")
        assert server.delivered.total() == asked
    assert contents(tmp_path / "faults") == contents(tmp_path / "clean")
    assert contents(tmp_path / "again") == contents(tmp_path / "clean")
    assert records.comparable(made) == records.comparable(clean)
    assert made["model"] == "tiny" and made["report"]["yield"]["benign"]["yield"] == 1.0
    assert made["run"]["cost"] == pytest.approx(asked * (10 * 1 + 5 * 10) / 1e6)
    assert made["run"]["server"]["requests"] == server.asked.total()
    _, traces, _ = read(tmp_path / "clean")
    assert {(trace.model, trace.origin) for trace in traces} == {("tiny", "teacher")}
    assert "attempts failed" in synthesize.summary(made, tmp_path)


def test_the_flip_rate_of_the_self_teacher(data: Path, tmp_path: Path):
    with Server(answer=model_answer) as server:
        given = at(server, tmp_path, "self", concurrency=2)
        made = synthesize.run(config(data, jailbreaks=0, **given), tmp_path / "out")
        # Five of six answers without the policy are unsafe; that about the boat stays so.
        flips = {"prompts": 6, "unsafe_without_policy": 5, "safe_with_policy": 4, "rate": 0.8}
        flips |= {"render": "relevant", "shots": 0, "steer": None}
        assert made["report"]["flip_rate"] == flips | {"judged_by": "refusal rules"}
        assert "flip rate         4 of 5 unsafe" in synthesize.summary(made, tmp_path)
        _, traces, _ = read(tmp_path / "out")
        assert {trace.origin for trace in traces} == {"self"}
        strict = config(data, jailbreaks=0, min_flip_rate=0.9, **given)
        with pytest.raises(ValueError, match=r"4 of 5 unsafe answers become safe, a rate of 0\.8"):
            synthesize.run(strict, tmp_path / "strict")
        judge = Judges(
            answer_risk=lambda pairs: [0.9 if "Sure" in text else 0 for _, text in pairs]
        )
        made = synthesize.run(
            config(data, jailbreaks=0, **given), tmp_path / "j", judges=judge, judges_version="x"
        )
        assert made["report"]["flip_rate"]["rate"] == 1.0


def test_the_self_teacher_takes_the_context_that_turns_most(data: Path, tmp_path: Path):
    def shown(sent: dict[str, Any]) -> bool:
        return any(one["role"] == "assistant" for one in sent["messages"])

    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        """Needs to be shown how before it refuses to help with boats."""
        if "boat" in sent["messages"][-1]["content"] and shown(sent):
            made = faults.echo(sent)
            text = reasoning.render("No boats.\n\nDecision: refuse", "I can't help with that.")
            made["choices"][0]["message"]["content"] = text
            return made
        return model_answer(sent)

    with Server(answer=answer) as server:
        given = at(server, tmp_path, "self") | {"search": True, "min_flip_rate": 0.9}
        made = synthesize.run(config(data, jailbreaks=0, **given), tmp_path / "out")
        flips = made["report"]["flip_rate"]
        assert (flips["rate"], flips["shots"], flips["render"]) == (1.0, 2, "relevant")
        assert [(one["render"], one["shots"], one["rate"]) for one in flips["tried"]] == [
            ("relevant", 0, 0.8),
            ("whole", 0, 0.8),
            ("relevant", 2, 1.0),
            ("whole", 2, 1.0),
        ]
        told = synthesize.summary(made, tmp_path)
        assert "     5 with relevant rules, 2 examples" in told
        # Killed after the search or not, the rest is asked in the context that it found.
        asked = server.delivered.total()
        synthesize.run(config(data, jailbreaks=0, **given), tmp_path / "again")
        assert server.delivered.total() == asked
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.slow
def test_a_teacher_that_runs_here(data: Path, tmp_path: Path):
    import tiny

    model = tiny.write_model(tmp_path / "tiny", config={"max_position_embeddings": 16384})
    small: dict[str, Any] = {"n": 2, "retries": 0, "jailbreaks": 0, "max_new_tokens": 3}
    made = {}
    for teacher, slots in (("local", 2), ("local", 7), ("self", 3)):
        out = tmp_path / f"{teacher}{slots}"
        given: dict[str, Any] = small | {"teacher": teacher, "concurrency": slots}
        given["teacher_model"] = str(model)
        if teacher == "self":
            given["min_flip_rate"] = 0.0
        made[out.name] = synthesize.run(config(data, wrapped_benign=0, **given), out)
    assert made["local2"]["model"] == str(model) and len(made["local2"]["model_sha"]) == 16
    assert made["local2"]["drop_reasons"]["parse"] == 2 * 15
    assert contents(tmp_path / "local2") == contents(tmp_path / "local7")
    assert made["self3"]["report"]["flip_rate"]["prompts"] == 6
    # What does not fit is rejected with its reason; that nothing fits ends the run.
    narrow = tiny.write_model(tmp_path / "narrow", config={"max_position_embeddings": 4096})
    given = small | {"teacher": "local", "teacher_model": str(narrow), "concurrency": 4}
    less = synthesize.run(config(data, wrapped_benign=0, **given), tmp_path / "less")
    assert less["drop_reasons"]["no answer"] > 0 and less["drop_reasons"]["parse"] > 0
    assert (
        "3 exceed the model's 4096 positions"
        in (tmp_path / "less" / "rejects" / "prompts.jsonl").read_text()
    )
    none = tiny.write_model(tmp_path / "none")
    with pytest.raises(ValueError, match=r"none: no request succeeded: .* tokens"):
        given = small | {"teacher": "local", "teacher_model": str(none)}
        synthesize.run(config(data, wrapped_benign=0, **given), tmp_path / "no")


def test_labels_guard_scores_repairs_and_shortening(data: Path, tmp_path: Path):
    """All that a teacher does beside answering, killed by a budget in between, is paid for once."""
    steps: dict[str, Any] = {
        "label": True,
        "score": True,
        "repair": True,
        "compress": True,
        "n": 8,
        "jailbreaks": 0,
        "wrapped_benign": 0,
    }
    with Server(answer=model_answer) as server:
        steps["guard"] = f"llama_guard_3=guard@{server.url}"
        given = at(server, tmp_path)
        plain = synthesize.run(config(data, n=8, **given), tmp_path / "plain")
        before = server.delivered.total()
        small = at(server, tmp_path, max_requests=150)
        with pytest.raises(ValueError, match=r"server\.max_requests=150"):
            synthesize.run(config(data, **small, **steps), tmp_path / "out")
        assert server.delivered.total() > before
        made = synthesize.run(config(data, **given, **steps), tmp_path / "out")
        assert set(server.delivered.values()) == {1}
        again = synthesize.run(config(data, **given, **steps), tmp_path / "again")
        assert set(server.delivered.values()) == {1}
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert records.comparable(again) == records.comparable(made)
    prompts, traces, rows_made = read(tmp_path / "out")
    # Two borderline prompts have no category; both get one, one other than its kind says.
    labels = made["report"]["labels"]
    assert labels["asked"] == 2 and labels["agreed"] + labels["doubtful"] == 2
    process = next(one for one in prompts if "process" in one.text)
    assert process.categories == ("P0",) and process.label_conf == 0.5
    assert process.meta["labels"][0] == {"categories": ["P0"], "kind": "benign"}
    # The guard's verdicts and the scores stand in the rows, and drop what they object to.
    assert all(row.judgments["quality"] == [9, 9, 9] for row in rows_made)
    assert all(row.judgments["reasoning_risk"] == 0 for row in rows_made)
    dropped = made["drop_reasons"]
    assert dropped["reasoning_safety"] > 0 and dropped["quality"] > 0
    assert "reasoning_safety" not in plain["drop_reasons"]
    # What was mended goes on from the first unsafe step, and passed all filters itself.
    mended = [trace for trace in traces if trace.meta.get("edit") == "repair"]
    assert made["report"]["repair"]["accepted"] == len(mended) > 0
    for trace in mended:
        assert trace.origin == "repair" and "Take 3 looks" in trace.steps[0].text
        assert any(step.text.startswith("Rather") for step in trace.steps)
    short = [trace for trace in traces if trace.meta.get("edit") == "compress"]
    assert made["report"]["compress"]["accepted"] == len(short) > 0
    by_id = {trace.id: trace for trace in traces}
    for trace in short:
        whole = by_id[trace.meta["of"]]
        assert (trace.n_tok.reason or 0) < (whole.n_tok.reason or 0)
        assert trace.parsed.answer == whole.parsed.answer
    said = synthesize.summary(made, tmp_path)
    assert "labels            2 asked" in said and "compress          " in said


def test_what_the_server_withholds_is_told_and_replaced(data: Path, tmp_path: Path):
    plan = lambda sent: ["filtered"] * 9 * ("the car of" in str(sent))  # noqa: E731
    with Server(plan=plan, answer=model_answer) as server:
        made = synthesize.run(config(data, jailbreaks=0, **at(server, tmp_path)), tmp_path)
        assert all(n == 1 for n in server.asked.values())
    assert made["report"]["withheld"] == made["drop_reasons"]["filter"] == 3
    assert made["report"]["teacher_refusals"] == 1
    _, traces, _ = read(tmp_path)
    spare = [trace for trace in traces if trace.origin == "template"]
    assert spare and all(trace.meta["teacher_refusal"] for trace in spare)


def test_what_the_server_refuses_has_its_reason(data: Path, tmp_path: Path):
    plan = lambda sent: ["refuse"] * 9 * ("the car of" in str(sent))  # noqa: E731
    with Server(plan=plan, answer=model_answer) as server:
        made = synthesize.run(config(data, jailbreaks=0, **at(server, tmp_path)), tmp_path)
    assert made["drop_reasons"]["no answer"] == 1
    rejects = (tmp_path / "rejects" / "prompts.jsonl").read_text()
    assert "no answer: 400: context is too long" in rejects
    with (
        Server(plan=lambda sent: ["refuse"] * 9) as server,
        pytest.raises(ValueError, match="tiny: no request succeeded: 400: context is too long"),
    ):
        synthesize.run(config(data, **at(server, tmp_path / "y")), tmp_path / "all")


# ---- evaluation sets -----------------------------------------------------------------------------


def test_a_prompt_of_an_evaluation_set_ends_the_run(data: Path, tmp_path: Path):
    settings = config(data, evaluation=[f"{data}/evaluation.jsonl", f"{data}/hit.jsonl"])
    Counted.asked = []
    with pytest.raises(ValueError) as error:
        synthesize.run(settings, tmp_path, teacher=Counted)
    assert str(error.value).startswith(
        f"1 prompts stand in an evaluation set, 1 of them in {data}/hit.jsonl, first row 1: all in"
    )
    assert "\n" not in str(error.value) and not Counted.asked
    report = json.loads((tmp_path / "contamination.json").read_text())
    assert report[f"{data}/hit.jsonl"]["hits"]["exact"] == 1
    assert report[f"{data}/evaluation.jsonl"]["hits"]["exact"] == 0
    assert not (tmp_path / "manifest.json").exists()


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_on_the_packaged_prompts(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("data:\n  train: none.jsonl\nsynthesize:\n  n: 2\n")
    arguments = ["--config=own.yaml", "--out=made", "--synthesize.size=40"]
    assert synthesize.main(arguments) == 0
    said = capsys.readouterr().out
    assert "| benign | 1" in said and "made/ritd.jsonl" in said and "1.0.0+" in said
    manifest = records.read_manifest(tmp_path / "made" / "manifest.json")
    assert manifest["config"]["size"] == 40 and manifest["config"]["n"] == 2
    assert [one["source"] for one in manifest["inputs"]] == [
        "quickstart:ritd",
        "quickstart:held_out",
    ]
    for row in records.read(tmp_path / "made" / "ritd.jsonl", RITD):
        assert records.lineage(row.id, tmp_path / "made" / "ritd.jsonl")["prompt"] == row.prompt
    assert synthesize.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--out: required: output folder"),
        (
            ["--out=x", "--synthesize.teacher=api"],
            "--synthesize.teacher=api: synthesize.teacher=api needs synthesize.teacher_url",
        ),
        (
            ["--out=x", "--synthesize.guard=harmbench=x"],
            "--synthesize.guard=harmbench=x: expected NAME=MODEL or NAME=MODEL@URL, NAME one of ",
        ),
        (
            ["--out=x", "--synthesize.score=true"],
            "--synthesize.score=true: synthesize.score=true has no meaning with "
            "synthesize.teacher=template",
        ),
        (
            ["--out=x", "--synthesize.steer=Careful."],
            "--synthesize.steer=Careful.: synthesize.steer=Careful. has no meaning with "
            "synthesize.teacher=template",
        ),
        (["--out=x", "--synthesize.prompts=none.jsonl"], "none.jsonl: no such file or folder"),
        (["--out=x", "--synthesize.policy=none.yaml"], "none.yaml: cannot be read"),
        (["--out=x", "--synthesize.prompts=bad=x.jsonl"], "--synthesize.prompts=bad=x.jsonl: exp"),
        (["--out=x", "--synthesize.columns=a=b"], "--synthesize.columns=a=b: expected FIELD"),
        (["--out=x", "--synthesize.n=0"], "--synthesize.n=0: expected an integer >= 1, got '0'"),
        (["--out=x", "--synthesize.m=1"], "--synthesize.m: unknown option; did you mean"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(arguments, error, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert synthesize.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}") and said.count("\n") == 1


# ---- every setting is read -----------------------------------------------------------------------


def changes(data: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Per setting: a change, and what it needs beside it."""
    benign = f"benign={data}/benign.jsonl"
    reached = {"evaluation": f"{data}/near.jsonl"}
    own = {"teacher": "self"}  # behind the server of the test
    return {
        "teacher": ("self", {}),
        "label": (True, own),
        "guard": ("llama_guard_3=guard@SERVER", own),
        "score": (True, own),
        "repair": (True, own | {"guard": "llama_guard_3=guard@SERVER"}),
        "compress": (True, own),
        "teacher_model": ("other", own),
        "steer": ("Take care.", own),
        "shots": (1, own),
        "examples": (f"{data}/examples.jsonl", own | {"shots": 1}),
        "search": (True, own),
        "min_flip_rate": (0.9, own),
        "flip_prompts": (1, own),
        "prompts": ([benign], {}),
        "columns": ("answer=question", {}),
        "split": ("test", {}),
        "evaluation": (f"{data}/near.jsonl", {}),
        "exact_hits": ("drop", {"evaluation": f"{data}/hit.jsonl"}),
        "ngram": (0, reached | {"tfidf": 1.0}),
        "tfidf": (0.3, reached | {"ngram": 0}),
        "near_duplicate": (0.3, {}),
        "dev_share": (0.6, {}),
        "jailbreaks": (0.0, {}),
        "wrapped_benign": (2.0, {}),
        "size": (8, {}),
        "mix": ("0:0:1:0", {"size": 8}),
        "policy": (str(data / "policy.yaml"), {}),
        "render": ("whole", {}),
        "n": (2, {}),
        "temperature": (0.0, {}),
        "top_p": (0.5, {}),
        "max_new_tokens": (7, {}),
        "retries": (0, {}),
        "tokenizer": (str(data / "model"), {}),
        "max_steps": (4, {}),
        "min_steps": (5, {}),
        "max_reasoning_tokens": (45, {}),
        "decision_line": (False, {}),
        "overlap": (0.05, {}),
        "srs": ("pareto", {}),
        "srs_floor": (400, {}),
    }


class Half(TemplateTeacher):
    """One of its answers to each first request does not parse; says what it was asked."""

    seen: list[str] = []  # noqa: RUF012 - read and reset by the test

    def generate(self, messages, n, sampler):
        Half.seen.append(messages[0]["content"] + sampler.model_dump_json())
        found = super().generate(messages, n, sampler)
        return [{"text": "<think>", "finish": "eos"}, *found[1:]] if n > 1 else found


def test_the_table_has_every_setting(data: Path):
    assert set(changes(data)) | {"concurrency", "teacher_url"} == set(SynthesizeConfig.model_fields)


@pytest.fixture(scope="module")
def baselines() -> dict[str, Any]:
    """Filled by the tests below: runs by what they need beside the change."""
    return {}


@pytest.mark.parametrize("name", sorted(changes(Path())))
def test_a_setting_changes_something(name: str, data, baselines, tmp_path: Path, monkeypatch):
    # Provenance asks git, which takes its time.
    monkeypatch.setattr("saro_jax.records.manifest.provenance", dict)
    if not (data / "folder").exists():
        import tiny

        tiny.tokenizer().save_pretrained(data / "model")
        text = policy_path("saro").read_text().replace("version: 1.0.0", "version: 1.0.1")
        (data / "policy.yaml").write_text(text)
        row = {"kind": "benign", "prompt": "Hi?", "reasoning": "A.", "answer": "B."}
        (data / "examples.jsonl").write_text(json.dumps(row) + "\n")
        (data / "folder").mkdir()
        for split in ("train", "test"):
            text = json.dumps({"prompt": f"A {split} prompt?", "answer": "Yes."})
            (data / "folder" / f"{split}.jsonl").write_text(text + "\n")
    kinds = ("harmful", "benign", "borderline")
    files = [f"{kind}={data}/{kind}.jsonl" for kind in kinds]
    value, needs = changes(data)[name]

    def run(out: Path, **settings: Any) -> Any:
        Half.seen = []
        given: dict[str, Any] = {"prompts": [*files, f"benign={data}/folder"]} | settings
        with Server(answer=model_answer) as server:
            own = "teacher" in given
            given = at(server, out, given.get("teacher", "")) | given if own else given
            if "guard" in given:
                given["guard"] = given["guard"].replace("SERVER", server.url)
            try:
                synthesize.run(config(data, **given), out, teacher=None if own else Half)
            except ValueError as error:
                return str(error)
            return contents(out), sorted(Half.seen), sorted(server.asked)

    key = json.dumps(needs)
    if key not in baselines:
        baselines[key] = run(tmp_path / "before", **needs)
    assert baselines[key] != run(tmp_path / "after", **needs, **{name: value})


def test_concurrency_is_how_many_requests_run_at_a_time(data: Path, tmp_path: Path):
    import threading

    running, most = [], []
    lock = threading.Lock()

    class Timed(TemplateTeacher):
        def generate(self, messages, n, sampler):
            with lock:
                running.append(1)
                most.append(len(running))
            time.sleep(0.01)
            with lock:
                running.pop()
            return super().generate(messages, n, sampler)

    for concurrency in (1, 3):
        most.clear()
        settings = config(data, concurrency=concurrency)
        synthesize.run(settings, tmp_path / str(concurrency), teacher=Timed)
        assert max(most) == concurrency
