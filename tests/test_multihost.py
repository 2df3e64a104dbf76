"""Training over two and four real processes: the losses of one, own data, restarts, one stop."""

import json
import os
import shutil
import signal

import numpy as np
import processes
import pytest
import tiny
from safetensors.numpy import load_file

from saro_jax.parallel.hub import LOST

# Rows short enough that every process has some of a step, a mesh of four devices for any number.
SIZES = ("--train.micro_rows=4", "--train.batch_rows=8", "--train.save_every=1", "--train.keep=9")
ROWS = {"rw": "--stages.rw.data.row_length=80", "srpo": "--stages.srpo.data.row_length=96"}
RATE = {"tokens_per_second"}


def train(stage, out, count, *overrides, devices=4, steps=4, signalled="-1:0:0", name="run"):
    arguments = tiny.arguments(
        stage, out, *SIZES, ROWS[stage], f"--train.steps={steps}", *overrides
    )
    return processes.run(
        processes.STAGE,
        count,
        "train",
        *arguments,
        notes=out.parent / f"{out.name}.{name}",
        devices=devices // count,
        SIGNAL=signalled,
    )


def codes(ended):
    return [one.code for one in ended]


def saved(out):
    folder = out / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def equal(found, wanted, *, rtol=1e-5):
    """The same lines of metrics, to what the order of float32 sums leaves."""
    assert [one.keys() for one in found] == [one.keys() for one in wanted]
    for a, b in zip(found, wanted, strict=True):
        for key in b:
            np.testing.assert_allclose(a[key], b[key], rtol=rtol, atol=1e-5, err_msg=key)


# What of a checkpoint is on this process's devices, gathered, as hashes; and its data.
CHECK = """
import hashlib, json, sys
from argparse import Namespace
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
import tiny
from saro_jax.config import load
from saro_jax.parallel import distributed, sharding, mesh as meshes
from saro_jax.training import optimizer, step
from saro_jax.training.checkpoint import Checkpoints, abstract

flags = dict(argument[2:].split("=") for argument in sys.argv[2:])
distributed.start(Namespace(
    coordinator=flags.get("coordinator"), join_timeout=100.0,
    processes=int(flags.get("processes", 1)), process=int(flags.get("process", 0))))
config = load("{recipe}", [], "rw")
mesh = meshes.make_mesh({mesh})
whole = tiny.params()
places = sharding.shardings(mesh, whole)
params = jax.tree.map(
    lambda leaf, place: distributed.place(np.zeros(leaf.shape, leaf.dtype), place), whole, places)
transform = optimizer.make(config.optimizer, 6, config.lora)
wanted = abstract(step.init_state(transform, params, mesh))
checkpoints = Checkpoints(Path("{folder}"))
state, data = checkpoints.restore({step}, wanted)
def digest(leaf):
    found = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return [list(found.shape), hashlib.sha256(found.tobytes()).hexdigest()]
said = {{"state": jax.tree.map(digest, jax.tree.leaves(state)), "data": data}}
Path(sys.argv[1]).write_text(json.dumps(said))
checkpoints.close()
"""


def laid_out(out, count, name="run"):
    """Of each process and block: its rows, and the items whose tokens the process laid out."""
    folder = out.parent / f"{out.name}.{name}"
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(count)]


def test_stopped_in_two_processes_and_continued_in_one(tmp_path):
    """SIGTERM to one of two: both save one step; one process goes on to the metrics of a whole run.

    The reference log-probs of all pairs are computed by both and stored by the first.
    """
    cache = f"--srpo.reference_cache={tmp_path / 'reference'}"
    straight, out = tmp_path / "straight", tmp_path / "out"
    alone = processes.start(
        processes.STAGE,
        1,
        "train",
        *tiny.arguments("srpo", straight, *SIZES, ROWS["srpo"], "--train.steps=4", cache),
        notes=tmp_path / "straight.run",
        devices=4,
    )
    two = train("srpo", out, 2, f"{cache}2", signalled=f"1:2:{int(signal.SIGTERM)}")
    (one,) = processes.wait(alone)
    assert one.code == 0, one.output
    assert codes(two) == [143, 143], two
    assert "got signal 15: all stop" in two[0].output and "step" not in two[1].output
    step = saved(out)[-1]
    assert 0 < step < 4 and f"stopped at step {step} of 4" in two[0].output
    assert (tmp_path / "reference2" / "reference.sqlite").exists()
    (rest,) = train("srpo", out, 1, f"{cache}2", name="rest")
    assert rest.code == 0 and f"continuing from step {step} of 4" in rest.output, rest.output
    equal(tiny.metrics(out), tiny.metrics(straight))
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in straight.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_losses_of_one_two_and_four_processes(tmp_path, stage):
    """And each lays out its own rows of a block and no other; together they are all of it."""
    for count in (1, 2, 4):
        cache = f"--srpo.reference_cache={tmp_path}/reference{count}"
        ended = train(stage, tmp_path / str(count), count, cache)
        assert codes(ended) == [0] * count, ended
    for count in (2, 4):
        equal(tiny.metrics(tmp_path / str(count)), tiny.metrics(tmp_path / "1"))
    # As many blocks as the one read furthest ahead has packed; the same ones for any number.
    whole = laid_out(tmp_path / "1", 1)[0]
    assert all(sorted(i for row in rows for i in row) == items for rows, items in whole)
    for count in (2, 4):
        parts = laid_out(tmp_path / str(count), count)
        number = min(len(whole), *map(len, parts))
        assert number >= 4
        for k in range(number):
            assert {json.dumps(part[k][0]) for part in parts} == {json.dumps(whole[k][0])}
            assert sorted(i for part in parts for i in part[k][1]) == whole[k][1]
        assert all(any(items for _, items in part) for part in parts)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run of four processes that was stopped after some step."""
    out = tmp_path_factory.mktemp("four") / "out"
    ended = train("rw", out, 4, steps=6, signalled=f"2:3:{int(signal.SIGTERM)}")
    assert codes(ended) == [143] * 4, ended
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(1, "fsdp=4"), (2, "fsdp=2, tensor=2")])
def test_a_checkpoint_of_four_continues_in_fewer(tmp_path, four, count, mesh):
    """Bit for bit what four had saved, data position included, and then to the same losses."""
    out = tmp_path / "out"
    shutil.copytree(four, out)
    step = saved(out)[-1]
    facts = {"folder": out / "checkpoints", "step": step, "recipe": tiny.folder() / "recipe.yaml"}
    said = []
    for number, sizes in ((count, mesh), (4, "fsdp=4")):
        notes = tmp_path / f"restored by {number}"
        code = CHECK.format(mesh=sizes, **facts)
        ended = processes.run(code, number, notes=notes, devices=4 // number)
        assert codes(ended) == [0] * number, ended
        said.append(json.loads((notes / "0.json").read_text()))
    assert said[0] == said[1] and said[0]["data"]["iterator"]["next_index"] == step
    straight = tmp_path / "straight"
    assert codes(train("rw", straight, 1, steps=6)) == [0]
    given = [f"--mesh.{size.strip()}" for size in mesh.split(",")]
    ended = train("rw", out, count, *given, steps=6, name="rest")
    assert codes(ended) == [0] * count, ended
    assert f"continuing from step {step} of 6" in ended[0].output
    equal(tiny.metrics(out), tiny.metrics(straight))


@pytest.mark.slow
def test_one_of_four_is_killed_and_the_run_goes_on(tmp_path):
    out = tmp_path / "out"
    ended = train("srpo", out, 4, signalled=f"2:2:{int(signal.SIGKILL)}")
    assert codes(ended) == [LOST, LOST, -9, LOST], ended
    line = f"error: process 2 ({os.uname().nodename}) died; process "
    assert all(line in ended[i].output for i in (0, 1, 3))
    again = train("srpo", out, 4, name="again")
    assert codes(again) == [0] * 4, again
    straight = tmp_path / "straight"
    assert codes(train("srpo", straight, 1)) == [0]
    equal(tiny.metrics(out), tiny.metrics(straight))


@pytest.mark.slow
def test_bad_rows_of_one_host_end_all(tmp_path):
    """A host whose copy of the rows differs is named before anything is trained."""
    other = tmp_path / "other.jsonl"
    tiny.write_rows(other, tiny.SFT[:-1])
    ended = processes.run(
        processes.STAGE,
        2,
        "train",
        *tiny.arguments("rw", tmp_path / "out", *SIZES),
        notes=tmp_path / "notes",
        devices=2,
        extra={1: (f"--data.train={other}",)},
    )
    assert codes(ended) == [2, 2], ended
    assert f"the config differs: process 1 ({os.uname().nodename}): " in ended[0].output
    assert not ended[1].output.startswith("error")


def stage(name, notes, count, *arguments, **environment):
    return processes.run(
        processes.STAGE, count, name, *arguments, notes=notes, devices=2 // count, **environment
    )


@pytest.mark.slow
def test_scores_of_two_processes_stopped_and_continued(tmp_path):
    folder = tiny.folder()
    rows = [row | {"id": f"{n} {row['id']}"} for n in range(16) for row in tiny.PAIRS]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)  # two groups
    given = [f"--model={folder}/model", f"--rows={tmp_path}/rows.jsonl", "--data.max_length=80"]
    given += ["--data.row_length=320", "--train.micro_rows=2"]
    found = []
    for count in (1, 2):
        out = tmp_path / f"{count}.jsonl"
        if count == 2:
            asked = f"1:6:{int(signal.SIGTERM)}"
            ended = stage(
                "score", tmp_path / "a", 2, *given, f"--out={out}", SIGNAL=asked, WHERE="scoring"
            )
            assert codes(ended) == [143, 143], ended
            assert not out.exists() and (tmp_path / f".{out.name}.scored").exists()
        ended = stage("score", tmp_path / f"b{count}", count, *given, f"--out={out}")
        assert codes(ended) == [0] * count, ended
        found.append([json.loads(line) for line in out.read_text().splitlines()])
        assert [one.pop("id") for one in found[-1]] == [row["id"] for row in rows]
    equal(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampled", [(), ("--evaluate.temperature=1.0", "--seed=3")], ids=["greedy", "drawn"]
)
def test_transcripts_of_two_processes(tmp_path, sampled):
    prompts = [{"id": f"h{n}", "kind": "benign", "prompt": f"open {'a ' * n}"} for n in range(5)]
    tiny.write_rows(tmp_path / "prompts.jsonl", prompts)
    given = [f"--model=tiny={tiny.folder()}/model", "--evaluate.think_tokens=3", *sampled]
    given += [f"--evaluate.benchmarks=held_out={tmp_path}/prompts.jsonl"]
    given += ["--evaluate.answer_tokens=6", "--evaluate.slots=3"]
    for count in (1, 2):
        out = tmp_path / str(count)
        ended = stage("evaluate", tmp_path / f"n{count}", count, *given, f"--out={out}")
        assert codes(ended) == [0] * count, ended
    for name in ("transcripts/tiny/held_out.auto.jsonl", "results.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    # What one host kept, two do not ask again.
    ended = stage("evaluate", tmp_path / "again", 2, *given, f"--out={tmp_path}/1")
    assert codes(ended) == [0, 0], ended
    assert len(list((tmp_path / "1" / "responses" / "tiny").iterdir())) == 1


@pytest.mark.slow
def test_adapters_trained_evaluated_and_exported_by_two_processes(tmp_path):
    """The model folders of one process; the export compared with transformers over both."""
    pytest.importorskip("torch")
    over = ["--lora.rank=2", "--train.steps=2", "--train.micro_rows=2", "--train.eval_every=1"]
    over += [f"--data.eval={tiny.folder()}/sft.jsonl", "--lora.learning_rate=0.01"]
    for count in (1, 2):
        out = tmp_path / str(count)
        ended = stage(
            "train", tmp_path / f"n{count}", count, *tiny.arguments("rw", out, *over), COMPARE="1"
        )
        assert codes(ended) == [0] * count, ended
        assert "transformers agrees to" in ended[0].output
        given = (f"--checkpoint={out}", f"--out={tmp_path}/e{count}")
        ended = stage("export", tmp_path / f"x{count}", count, *given)
        assert codes(ended) == [0] * count, ended
    equal(tiny.metrics(tmp_path / "2"), tiny.metrics(tmp_path / "1"))
    for folder in ("{}/model", "{}/adapter", "e{}"):
        one, two = (tmp_path / folder.format(count) for count in (1, 2))
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        (file,) = one.glob("*.safetensors")
        a, b = load_file(file), load_file(two / file.name)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(a[key], b[key], atol=2e-5, err_msg=key)
