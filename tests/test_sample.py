"""Rollouts: the folder is whole, resumed equals straight, every setting changes something."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pairing
import processes
import pytest
import tiny
from faults import Server

from saro_jax import records, sample
from saro_jax.config import SampleConfig, load
from saro_jax.data.packing import Shape, arrange
from saro_jax.data.tokenise import Branch, Item
from saro_jax.generation.local import Local
from saro_jax.models import huggingface
from saro_jax.parallel.mesh import make_mesh
from saro_jax.records import Prompt, Sampler, Trace
from saro_jax.text import chat, policy
from saro_jax.training.scoring import make_scorer, score_items

ROWS = [
    {"id": "a", "kind": "harmful", "prompt": "open the lock"},
    {"id": "b", "kind": "benign", "prompt": "why"},
    {"id": "c", "kind": "benign", "prompt": "the user wants a lock opened; " * 6},
    {"id": "d", "kind": "borderline", "prompt": "no, refuse it"},
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tiny.write_rows(path, ROWS)
    return path


def overrides(rows: Path, **settings: Any) -> list[str]:
    given = {"prompts": rows, "n": 3, "max_new_tokens": 12, "slots": 4} | settings
    return [f"--sample.{name}={value}" for name, value in given.items()]


def config(rows: Path, **settings: Any):
    # One device, as a test process can have several.
    mesh = ["--mesh.fsdp=1", "--mesh.data=-1"]
    return load(str(tiny.folder() / "recipe.yaml"), [*overrides(rows, **settings), *mesh], "rw")


@pytest.fixture(scope="module")
def straight(rows: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    sample.run(config(rows), out)
    return out


def files(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        if path.parent.name != "journal":
            found[str(path.relative_to(out))] = path.read_bytes()
    manifest = records.comparable(records.read_manifest(out / "manifest.json"))
    return found | {"manifest": records.to_json(manifest).encode()}


def test_every_sample_is_a_trace(straight: Path):
    traces = records.read(straight / "traces.jsonl", Trace)
    prompts = records.read(straight / "prompts.jsonl", Prompt)
    assert len(traces) == 12
    assert [one.text for one in prompts] == [row["prompt"].strip() for row in ROWS]
    assert len({one.id for one in traces}) == 12
    tree = tiny.params()
    tokenizer: Any = tiny.tokenizer()
    for prompt in prompts:
        mine = [one for one in traces if one.prompt_id == prompt.id]
        assert [one.meta["i"] for one in mine] == [0, 1, 2]
        assert len({one.sampler.seed for one in mine}) == 1
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        for one in mine:
            assert one.n_tok.prompt == len(ids) and one.origin == "self"
            assert tokenizer.decode(one.meta["ids"]).removesuffix("<|im_end|>") == one.raw
            want = tiny.logps(tree, np.array(ids + one.meta["ids"]))[len(ids) - 1 :]
            np.testing.assert_allclose(one.meta["logprobs"], want, atol=1e-3)
            assert (one.n_tok.reason or 0) + (one.n_tok.answer or 0) == len(one.meta["ids"])
            assert (one.finish == "length") == (len(one.meta["ids"]) == 12)
            assert records.lineage(one.id, straight / "traces.jsonl")["prompt"] == prompt.text


def test_log_probs_are_those_of_score(straight: Path):
    prompts = {one.id: one for one in records.read(straight / "prompts.jsonl", Prompt)}
    traces = records.read(straight / "traces.jsonl", Trace)
    items = []
    for one in traces:
        message = chat.Message("user", prompts[one.prompt_id].text)
        ids = np.array(one.meta["ids"], np.int32)
        branch = Branch(ids, np.ones(len(ids), bool), False)
        prefix = chat.prompt_ids(tiny.tokenizer(), (message,))
        items.append(Item(one.id, "", "sft", 1.0, prefix, (branch,)))
    mesh = make_mesh(devices=jax.devices()[:1])
    scorer = make_scorer(tiny.ARCH, mesh, dtype=jnp.float32, remat="none", branches=1)
    shape = Shape(256, 2, "shared")
    groups = [arrange(items, range(len(items)), shape)]
    params = huggingface.load_params(tiny.folder() / "model", tiny.ARCH, jnp.float32)
    found = list(score_items(scorer, params, items, groups, shape))
    assert len(found) == len(traces)
    for i, logps, counts in found:
        assert counts.sum() == len(traces[i].meta["ids"])
        assert abs(logps.sum() - sum(traces[i].meta["logprobs"])) < 1e-3


def test_a_folder_that_is_there_is_left_alone(straight: Path, rows: Path, monkeypatch):
    before = files(straight)
    monkeypatch.setattr(sample, "_ask", None)
    sample.run(config(rows), straight)
    assert files(straight) == before


def test_resumed_equals_straight(straight: Path, rows: Path, tmp_path: Path, monkeypatch):
    generate, asked = Local.generate, []

    def interrupted(self, requests):
        for number, one in enumerate(generate(self, requests)):
            if number == 2 and not asked:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(Local, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.run(config(rows), tmp_path)
    assert not (tmp_path / "traces.jsonl").exists()
    asked.append(True)
    sample.run(config(rows), tmp_path)
    assert files(tmp_path) == files(straight)


def test_the_prompts_of_a_stage_are_taken_as_they_are(straight: Path, rows: Path, tmp_path: Path):
    prompts = records.read(straight / "prompts.jsonl", Prompt)
    held_out = prompts[0].model_copy(update={"split": "dev", "meta": {"x": 1}})
    records.write(tmp_path / "prompts.jsonl", [held_out, *prompts[1:]])
    sample.run(config(tmp_path / "prompts.jsonl"), tmp_path / "train")
    assert records.read(tmp_path / "train" / "prompts.jsonl", Prompt) == prompts[1:]
    sample.run(config(tmp_path / "prompts.jsonl", split="all"), tmp_path / "all")
    assert records.read(tmp_path / "all" / "prompts.jsonl", Prompt) == [held_out, *prompts[1:]]
    assert (tmp_path / "all/traces.jsonl").read_bytes() == (straight / "traces.jsonl").read_bytes()


# Every setting, and one other value of it.
CHANGED = {
    "prompts": "benign=ROWS",
    "columns": "prompt=id",
    "split": "dev",
    "policy": "POLICY",
    "limit": 2,
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.5,
    "max_new_tokens": 7,
    "think_tokens": 2,
    "stop": "STOP",
    "system": "be kind",
    "prefix": "Well",
    "url": "http://127.0.0.1:9/v1",
    "served_name": "other",
    "slots": 2,
    "dtype": "bfloat16",
}


def test_every_setting_changes_something(straight: Path, rows: Path, tmp_path: Path):
    assert set(CHANGED) == set(SampleConfig.model_fields)
    shards = {name: data for name, data in files(straight).items() if name != "manifest"}
    for name, value in CHANGED.items():
        if name == "prompts":
            value = f"benign={rows}"
        elif name == "stop":
            raws = [one.raw for one in records.read(straight / "traces.jsonl", Trace)]
            value = next(found[0] for raw in raws if (found := re.findall("[a-z]{2}", raw)))
        elif name in ("split", "think_tokens"):
            continue  # below, and in test_the_prompts_of_a_stage_are_taken_as_they_are
        elif name == "policy":
            value = tmp_path / "policy.yaml"
            text = policy.policy_path("saro").read_text()
            value.write_text(text.replace("version: 1.0.0", "version: 9.9.9"))
        elif name in ("url", "served_name"):
            continue  # test_a_model_behind_a_server_...
        elif name == "slots":
            opened = sample.opened(config(rows, slots=2))
            assert isinstance(opened, Local) and opened.engine.slots == 2
            continue
        sample.run(config(rows, **{name: value}), tmp_path / name)
        found = files(tmp_path / name)
        assert {k: v for k, v in found.items() if k != "manifest"} != shards, name
        shutil.rmtree(tmp_path / name)
    thought = {"prefix": "<think>", "think_tokens": 2, "max_new_tokens": 30}
    manifest = sample.run(config(rows, **thought), tmp_path / "thought")
    assert all(one["forced"] == one["samples"] for one in manifest["report"].values())


def test_a_limit_draws_of_every_kind(rows: Path):
    read = {seed: sample.read(SampleConfig(prompts=str(rows), limit=3), seed) for seed in range(4)}
    for prompts, rejects, _ in read.values():
        assert {one.kind for one in prompts} == {"harmful", "benign", "borderline"}
        assert [one.reason for one in rejects] == ["limit: not drawn"]
    assert len({prompts[1].id for prompts, _, _ in read.values()}) == 2


def test_prompts_without_room_are_rejected(tmp_path: Path):
    tiny.write_rows(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], "prompt": "lock " * 600}])
    manifest = sample.run(config(tmp_path / "rows.jsonl"), tmp_path / "out")
    assert manifest["drop_reasons"] == {"can not be asked": 1} and manifest["n_out"] == 12
    (line,) = (tmp_path / "out/rejects/prompts.jsonl").read_text().splitlines()
    assert "exceed the model's 512 positions" in json.loads(line)["reason"]


# ---- behind a server -----------------------------------------------------------------------------


def served(rows: Path, server: Server, folder: Path, *more: str):
    flags = [
        f"--sample.prompts={rows}",
        "--sample.n=3",
        f"--sample.url={server.url}",
        f"--server.cache={folder / 'replies.sqlite'}",
        "--server.backoff=0.01",
        *more,
    ]
    return load(str(tiny.folder() / "recipe.yaml"), flags, "rw")


def test_a_model_behind_a_server_that_fails_and_is_killed(rows: Path, tmp_path: Path, monkeypatch):
    with Server(answer=pairing.answer) as server:
        manifest = sample.run(served(rows, server, tmp_path / "a"), tmp_path / "straight")
    assert manifest["n_out"] == 12 and manifest["run"]["server"]["replies"] == 12
    traces = records.read(tmp_path / "straight" / "traces.jsonl", Trace)
    for one in traces:
        assert one.model == str(tiny.folder() / "model") and one.tokenizer_sha
        assert (one.n_tok.reason or 0) + (one.n_tok.answer or 0) == len(one.raw.split())
    named = ["--sample.served_name=other"]
    with Server(answer=pairing.answer) as server:
        manifest = sample.run(served(rows, server, tmp_path / "b", *named), tmp_path / "named")
        assert {body["model"] for body in server.bodies} == {"other"}
    assert records.read(tmp_path / "named" / "traces.jsonl", Trace)[0].model == "other"

    generate, stopped = sample.served.Served.generate, []

    def interrupted(self, requests):
        for number, one in enumerate(generate(self, requests)):
            yield one
            if number == 1 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt

    monkeypatch.setattr(sample.served.Served, "generate", interrupted)
    with Server(lambda sent: ["500", "cut"], pairing.answer) as server:
        with pytest.raises(KeyboardInterrupt):
            sample.run(served(rows, server, tmp_path / "c"), tmp_path / "killed")
        slow = ["--server.concurrency=1", "--server.stream=true"]
        sample.run(served(rows, server, tmp_path / "c", *slow), tmp_path / "killed")
        assert len(server.delivered) == 12 == server.delivered.total()
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


def test_what_a_server_withholds_or_refuses_is_a_reject(rows: Path, tmp_path: Path):
    def plan(sent: dict[str, Any]) -> list[str]:
        text = sent["messages"][-1]["content"]
        return {"why": ["filtered"], "open the lock": ["refuse"]}.get(text, [])

    with Server(plan, pairing.answer) as server:
        manifest = sample.run(served(rows, server, tmp_path), tmp_path / "out")
    assert manifest["n_out"] == 6 and manifest["drop_reasons"] == {"filter": 3, "no answer": 1}
    failed = pytest.raises(ValueError, match="no request succeeded: 400: context is too long")
    with Server(lambda sent: ["refuse"]) as server, failed:
        sample.run(served(rows, server, tmp_path / "x"), tmp_path / "none")


def command(rows: Path, out: Path, *more: str) -> list[str]:
    recipe = f"--config={tiny.folder() / 'recipe.yaml'}"
    return [recipe, f"--out={out}", *overrides(rows), *more]


def test_the_command_line(straight: Path, rows: Path, tmp_path: Path, capsys):
    assert sample.main(command(rows, tmp_path)) == 0
    text = capsys.readouterr().out
    assert "| benign | 2 | 6 |" in text and f"12 in {tmp_path / 'traces.jsonl'}" in text
    assert files(tmp_path) == files(straight)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sample.nn=3", "--sample.nn: unknown option; did you mean --sample.n?"),
        ("--sample.columns=x", "--sample.columns=x: expected FIELD=COLUMN"),
        ("--sample.prompts=none.jsonl", "none.jsonl: no such file"),
        ("--sample.top_p=2", "sample.top_p=2"),
        ("--sample.served_name=x", "sample.served_name=x needs sample.url"),
        ("--sample.url=http://127.0.0.1:9/v1", "sample.slots=4 has no meaning with sample.url"),
    ],
)
def test_wrong_input_is_one_line(rows: Path, tmp_path: Path, capsys, flag: str, message: str):
    assert sample.main([*command(rows, tmp_path), flag]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "traces.jsonl").exists()


@pytest.mark.slow
def test_killed_anywhere(straight: Path, rows: Path, tmp_path: Path):
    run = [sys.executable, "-m", "saro_jax.sample", *command(rows, tmp_path)]
    journal = tmp_path / "journal"
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        size = sum(f.stat().st_size for f in journal.glob("*")) if journal.exists() else 0
        while process.poll() is None:
            now = sum(f.stat().st_size for f in journal.glob("*")) if journal.exists() else 0
            if now > size + 200:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        if process.returncode == 0:
            break
    assert kills and files(tmp_path) == files(straight)


@pytest.mark.slow
def test_two_processes_write_what_one_does(straight: Path, rows: Path, tmp_path: Path):
    code = "import sys; from saro_jax import sample; sys.exit(sample.main(sys.argv[2:]))"
    given = command(rows, tmp_path / "out")
    ended = processes.run(code, 2, *given, notes=tmp_path / "notes")
    assert [one.code for one in ended] == [0, 0], ended
    assert files(tmp_path / "out") == files(straight)


def test_samplers_of_old_records_parse():
    old = '{"temperature":0.8,"top_p":0.95,"top_k":0,"seed":1,"max_new_tokens":9}'
    assert Sampler.model_validate_json(old, strict=True) == Sampler(seed=1, max_new_tokens=9)
