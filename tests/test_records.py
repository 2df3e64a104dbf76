"""Records: schemas with their errors, shards, the journal under kill -9, manifests and lineage."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saro_jax import records
from saro_jax.records import (
    RITD,
    Input,
    Journal,
    Judgment,
    Parsed,
    Pref,
    PRMItem,
    Prompt,
    Record,
    Reject,
    RMItem,
    Sampler,
    Stage,
    StepValue,
    Trace,
)

PROMPT = Prompt(id="p1", text="open a lock", source="own", kind="benign")
TRACE = Trace(
    id="t1",
    parent_ids=("p1",),
    prompt_id="p1",
    model="tiny",
    sampler=Sampler(seed=3),
    raw="<think>a</think>b",
    parsed=Parsed(reasoning="a", answer="b", status="ok"),
    decision="comply",
    finish="eos",
    origin="template",
)
ROW = RITD(
    id="r1",
    parent_ids=("t1",),
    kind="benign",
    prompt="open a lock",
    reasoning="a",
    answer="b",
    decision="comply",
)
EXAMPLES: list[Record] = [
    PROMPT,
    TRACE,
    ROW,
    Judgment(id="j", trace_id="t1", judge="rules", target="prefix@3", label="safe", score=0.1),
    Pref(id="x", kind="PPA", prompt="p", chosen="a", rejected="b", noise=0.08),
    StepValue(id="v", trace_id="t1", step=0, n_roll=4, n_good=3, v=0.75, ci=(0.3, 0.95)),
    RMItem(id="m", prompt="p", pair=("a", "b")),
    PRMItem(id="q", prompt="p", steps=("a", "b"), v=(0.5, 1.0)),
]


# ---- schemas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_its_line(record: Record):
    line = records.dump(record)
    assert "\n" not in line
    assert records.parse(type(record), line, "f:1") == record
    assert records.dump(records.parse(type(record), line, "f:1")) == line


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "evil"}, "kind: input should be 'harmful', 'jailbreak', 'benign' or"),
        ({"text": None}, "text: input should be a valid string, got None"),
        ({"text": ""}, "text: string should have at least 1 character, got ''"),
        ({"label_conf": 1.5}, "label_conf: input should be less than or equal to 1, got 1.5"),
        ({"label_conf": "1"}, "label_conf: input should be a valid number, got '1'"),
        ({"categorys": []}, "categorys: unknown field of a Prompt; did you mean 'categories'?"),
        ({"attack": {"name": "x"}}, "attack.template_id: missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, change: dict, complaint: str):
    file = tmp_path / "prompts.jsonl"
    good = json.loads(records.dump(PROMPT))
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(good | {'id': 'p2'} | change)}\n")
    with pytest.raises(ValueError) as error:
        records.read(file, Prompt)
    assert str(error.value).startswith(f"{file}:3: {complaint}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("{", "not JSON: "), ("[1]", "Prompt: input should be an object"), ("{}", "id: missing; a ")],
)
def test_a_line_that_is_no_record(line: str, complaint: str):
    with pytest.raises(ValueError, match=f"^f:7: {complaint}"):
        records.parse(Prompt, line, "f:7")


def test_a_prompts_id_is_that_of_its_normalised_text():
    assert records.prompt_id("Ａ  lock\n") == records.prompt_id("a LOCK")
    assert records.prompt_id("a lock") != records.prompt_id("a block")
    assert len(records.prompt_id("")) == 16


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_shard_comes_back_and_has_the_same_bytes_each_time(tmp_path: Path, name: str):
    many = [PROMPT.model_copy(update={"id": f"p{i}", "text": f"öffne {i}"}) for i in range(500)]
    assert records.write(tmp_path / name, many) == 500
    first = (tmp_path / name).read_bytes()
    assert records.read(tmp_path / name, Prompt) == many
    records.write(tmp_path / name, iter(many))
    assert (tmp_path / name).read_bytes() == first
    assert (len(first) < 10_000) == name.endswith(".zst")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_empty_shard(tmp_path: Path):
    for name in ("a.jsonl", "a.jsonl.zst"):
        assert records.write(tmp_path / name, []) == 0
        assert records.read(tmp_path / name, Prompt) == []


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    records.write(file, [PROMPT])

    def fails():
        yield PROMPT
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        records.write(file, fails())
    assert records.read(file, Prompt) == [PROMPT]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_wrong_shards_are_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a\.jsonl: two records have the id 'p1'"):
        records.write(tmp_path / "a.jsonl", [PROMPT, PROMPT])
    with pytest.raises(ValueError, match=r"a\.json: a shard's name ends in"):
        records.write(tmp_path / "a.json", [PROMPT])
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read: No such file"):
        records.read(tmp_path / "none.jsonl", Prompt)
    (tmp_path / "b.jsonl.zst").write_bytes(b"no frame")
    with pytest.raises(ValueError, match=r"b\.jsonl\.zst: not zstandard: ") as error:
        records.read(tmp_path / "b.jsonl.zst", Prompt)
    assert "\n" not in str(error.value)
    line = records.dump(PROMPT)
    (tmp_path / "c.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"c\.jsonl:2: id: 'p1' is given twice, first at .*:1$"):
        records.read(tmp_path / "c.jsonl", Prompt)


# ---- the journal ---------------------------------------------------------------------------------

KEY = {"seed": 1}


def filled(path: Path, count: int = 3) -> bytes:
    with Journal(path, KEY) as journal:
        for i in range(count):
            journal.append(f"id{i}", {"text": f"né {i}\n", "n": [i, None]})
    return path.read_bytes()


def test_a_journal_cut_anywhere_goes_on_and_ends_the_same(tmp_path: Path):
    whole = filled(tmp_path / "whole")
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        with Journal(path, KEY) as journal:
            done = whole[:cut].count(b"\n") - 1
            assert list(journal.values) == [f"id{i}" for i in range(done)]
            for i in range(max(done, 0), 3):
                journal.append(f"id{i}", {"text": f"né {i}\n", "n": [i, None]})
        assert path.read_bytes() == whole
    with Journal(tmp_path / "whole", KEY) as journal:
        assert journal.values["id2"] == {"text": "né 2\n", "n": [2, None]}


def test_damage_before_the_end_is_an_error_with_its_line(tmp_path: Path):
    path = tmp_path / "j"
    lines = filled(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"id0", b"id9") + lines[2])
    with pytest.raises(ValueError, match=r"j:2: damaged; delete this line"):
        Journal(path, KEY)


def test_a_journal_of_other_work_is_refused(tmp_path: Path):
    filled(tmp_path / "j")
    with pytest.raises(ValueError, match="j:1: a journal of other work"):
        Journal(tmp_path / "j", {"seed": 2})


def test_a_journal_has_one_process_and_one_value_an_id(tmp_path: Path):
    with Journal(tmp_path / "j", KEY) as journal:
        with pytest.raises(ValueError, match="in use by another process"):
            Journal(tmp_path / "j", KEY)
        journal.append("a", 1)
        with pytest.raises(ValueError, match="id 'a' is done already"):
            journal.append("a", 2)
    Journal(tmp_path / "j", KEY).close()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_order_of_the_results_is_that_of_the_items(tmp_path: Path, concurrency: int):
    running, most = set(), 0
    lock = threading.Lock()

    def work(record_id: str, item: int) -> int:
        nonlocal most
        with lock:
            running.add(record_id)
            most = max(most, len(running))
        time.sleep(random.Random(record_id).random() / 100)
        with lock:
            running.remove(record_id)
        return item * item

    items = {f"i{n}": n for n in range(30)}
    told: list[int] = []
    with Journal(tmp_path / "j", KEY) as journal:
        journal.append("i7", 49)
        found = records.resume(journal, items, work, concurrency, told.append)
    assert list(found.items()) == [(f"i{n}", n * n) for n in range(30)]
    assert 1 <= most <= concurrency and told == [1] + [1] * 29


def test_an_error_keeps_what_was_done_and_only_the_rest_is_done_again(tmp_path: Path):
    items = {f"i{n}": n for n in range(8)}
    calls: list[str] = []

    def work(record_id: str, item: int) -> int:
        calls.append(record_id)
        if item == 4 and calls.count("i4") == 1:
            raise ValueError("no answer")
        return item

    with Journal(tmp_path / "j", KEY) as journal, pytest.raises(ValueError, match="no answer"):
        records.resume(journal, items, work, 2)
    with Journal(tmp_path / "j", KEY) as journal:
        assert records.resume(journal, items, work, 2) == items
    assert sorted(set(calls)) == sorted(items) and len(calls) == 9


def test_an_interrupt_keeps_the_calls_that_run(tmp_path: Path):
    def work(record_id: str, item: int) -> int:
        time.sleep(0.01 * item)
        return item

    def interrupt(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    with Journal(tmp_path / "j", KEY) as journal, pytest.raises(KeyboardInterrupt):
        records.resume(journal, {f"i{n}": n for n in range(9)}, work, 3, interrupt)
    with Journal(tmp_path / "j", KEY) as journal:
        assert sorted(journal.values) == ["i0", "i1", "i2"]


WORKER = """
import sys, time
from pathlib import Path
from saro_jax.records import Journal, resume
out, pause = Path(sys.argv[1]), float(sys.argv[2])

def work(record_id, item):
    with open(out / "paid", "a") as file:
        file.write(record_id + "\\n")
    time.sleep(pause)
    return {"text": record_id * 50}

with Journal(out / "journal", {"seed": 0}) as journal:
    values = resume(journal, {f"i{n}": n for n in range(40)}, work, 3)
(out / "final").write_text(repr(values))
"""


def test_kill_minus_nine_loses_only_the_requests_in_flight(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(records.__file__).parents[2])}

    def start(out: Path, pause: str) -> subprocess.Popen:
        out.mkdir(exist_ok=True)
        arguments = [sys.executable, "-c", WORKER, str(out), pause]
        return subprocess.Popen(arguments, env=environment)

    assert start(tmp_path / "straight", "0").wait(60) == 0
    killed = tmp_path / "killed"
    for _ in range(2):
        process = start(killed, "0.02")
        before = len((killed / "paid").read_text().split()) if (killed / "paid").exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (killed / "paid").exists() and len((killed / "paid").read_text().split()) > before:
                break
            time.sleep(0.002)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert start(killed, "0").wait(60) == 0
    assert (killed / "final").read_text() == (tmp_path / "straight" / "final").read_text()
    paid = (killed / "paid").read_text().split()
    assert len(set(paid)) == 40 and len(paid) <= 40 + 2 * 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(json_values, max_size=4), cut=st.integers(0, 200))
def test_any_values_survive_a_cut(tmp_path_factory: pytest.TempPathFactory, values, cut):
    path = tmp_path_factory.mktemp("j") / "j"
    with Journal(path, KEY) as journal:
        for i, value in enumerate(values):
            journal.append(str(i), value)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    with Journal(path, KEY) as journal:
        assert list(journal.values.values()) == values[: len(journal.values)]
        for i in range(len(journal.values), len(values)):
            journal.append(str(i), values[i])
    assert path.read_bytes() == whole


# ---- manifests and lineage -----------------------------------------------------------------------


def two_stages(root: Path, seed: int = 0) -> Path:
    """Prompts and rows of a first stage, pairs of a second that reads them."""
    (root / "in").mkdir(parents=True, exist_ok=True)
    source = root / "in" / "source.jsonl"
    source.write_text('{"prompt": "open a lock"}\n')
    given = Input("source.jsonl", 1, records.file_sha256(source), source)
    first = Stage("synthesize", {"n": 8}, [given], seed, "1.0.0+abc", "teacher", "f00")
    rejects = [Reject("p2", "parse: unclosed", record={"raw": "x"}), Reject("p3", "leak: above")]
    records.finish(
        first,
        root / "ritd",
        {"prompts.jsonl": [PROMPT], "traces.jsonl": [TRACE], "ritd.jsonl": [ROW]},
        {"traces.jsonl": [*rejects, Reject("p4", "parse: no_think")]},
        n_in=4,
        n_out=1,
        report={"yield": {"benign": 0.25}},
        documents={"contamination.json": {"exact": 0}},
    )
    pair = Pref(id="x", parent_ids=("t1",), kind="OP1", prompt="p", chosen="a", rejected="b")
    second = Stage("pairs", {}, [Input.of_file(root / "ritd" / "traces.jsonl")], seed, model="rw")
    second.run["cost"] = 0.5
    shards = {"pairs.jsonl.zst": [pair]}
    records.finish(second, root / "pairs", shards, {}, n_in=1, n_out=1)
    return root / "pairs" / "pairs.jsonl.zst"


def test_the_manifest_says_what_it_was_made_of(tmp_path: Path):
    two_stages(tmp_path)
    manifest = records.read_manifest(tmp_path / "ritd" / "manifest.json")
    assert manifest["config"] == {"n": 8} and len(manifest["config_sha"]) == 64
    assert manifest["inputs"][0]["source"] == "source.jsonl" and manifest["inputs"][0]["rows"] == 1
    assert (manifest["n_in"], manifest["n_out"], manifest["seed"]) == (4, 1, 0)
    assert manifest["drop_reasons"] == {"parse": 2, "leak": 1}
    assert (manifest["model"], manifest["model_sha"]) == ("teacher", "f00")
    assert manifest["policy_version"] == "1.0.0+abc"
    assert manifest["report"] == {"yield": {"benign": 0.25}}
    assert manifest["outputs"]["rejects/traces.jsonl"]["rows"] == 3
    assert {"started", "wall_s", "cost", "where", "provenance"} == set(manifest["run"])
    rejects = (tmp_path / "ritd" / "rejects" / "traces.jsonl").read_text().splitlines()
    assert json.loads(rejects[0]) == {
        "id": "p2",
        "reason": "parse: unclosed",
        "record": {"raw": "x"},
    }
    second = records.read_manifest(tmp_path / "pairs" / "manifest.json")
    assert second["run"]["cost"] == 0.5
    assert second["run"]["where"] == ["../ritd/traces.jsonl"]


def test_the_comparable_part_and_all_shards_are_the_same_in_another_run(tmp_path: Path):
    for root in ("a", "b"):
        two_stages(tmp_path / root)
    for name in ("ritd/ritd.jsonl", "ritd/rejects/traces.jsonl", "ritd/contamination.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    one, other = (records.read_manifest(tmp_path / x / "ritd" / "manifest.json") for x in "ab")
    assert records.comparable(one) == records.comparable(other)
    assert "run" not in records.comparable(one)


def test_a_finished_stage_is_recognised_and_anything_else_is_not(tmp_path: Path):
    two_stages(tmp_path)
    out = tmp_path / "ritd"
    given = [Input("source.jsonl", 1, records.file_sha256(tmp_path / "in" / "source.jsonl"))]

    def stage(**changes) -> Stage:
        parts = {"config": {"n": 8}, "seed": 0, "policy_version": "1.0.0+abc"} | changes
        return Stage("synthesize", inputs=given, model="teacher", model_sha="f00", **parts)

    found = records.finished(stage(), out)
    assert found is not None and found["n_out"] == 1
    assert records.finished(stage(), tmp_path / "none") is None
    assert records.finished(stage(seed=1), out) is None
    assert records.finished(stage(config={"n": 4}), out) is None
    assert records.finished(stage(policy_version="1.0.1+abc"), out) is None
    (out / "ritd.jsonl").write_text("")
    assert records.finished(stage(), out) is None
    (out / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: no manifest: "):
        records.finished(stage(), out)


def test_a_pair_leads_back_to_prompt_model_and_policy(tmp_path: Path):
    pairs = two_stages(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "moved")
    pairs = tmp_path / "moved" / pairs.relative_to(tmp_path / "runs")
    chain = records.trace("x", pairs)
    assert [(one.file.name, one.record["id"]) for one in chain] == [
        ("pairs.jsonl.zst", "x"),
        ("traces.jsonl", "t1"),
        ("prompts.jsonl", "p1"),
    ]
    found = records.lineage("x", pairs)
    assert found["prompt"] == "open a lock"
    assert found["models"] == ["tiny", "rw", "teacher"] and found["model_shas"] == ["f00"]
    assert found["policy_versions"] == ["1.0.0+abc"]
    assert found["stages"] == ["pairs", "synthesize"]
    assert found["prompts"][0]["id"] == "p1"


def test_a_broken_chain_is_an_error_in_one_line(tmp_path: Path):
    pairs = two_stages(tmp_path)
    with pytest.raises(ValueError, match=r"pairs\.jsonl\.zst: no record with the id 'y'"):
        records.trace("y", pairs)
    prompts = tmp_path / "ritd" / "prompts.jsonl"
    (tmp_path / "ritd" / "manifest.json").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"traces\.jsonl: the parent 'p1' of 't1' is in none of"):
        records.trace("x", pairs)
    (tmp_path / "kept").rename(tmp_path / "ritd" / "manifest.json")
    assert len(records.trace("x", pairs)) == 3
    prompts.write_text(prompts.read_text().replace("a lock", "the lock"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl: not the file that .* describes"):
        records.trace("x", pairs)
