"""Answers while a model trains: the same as those of its export, and training as without them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from saro_jax import evaluate, train
from saro_jax.config import Config
from saro_jax.evaluation import in_training
from saro_jax.evaluation.results import read_transcripts
from saro_jax.parallel import distributed

KINDS = ("harmful", "benign", "harmful", "borderline", "jailbreak")
ASKED = [
    {"id": f"a{i}", "kind": kind, "prompt": "open lock " + "and that " * (2 * i)}
    for i, kind in enumerate(KINDS)
]
NAMES = {
    f"answers/{kind}/{name}"
    for kind in KINDS
    for name in ("refused", "partial", "complied", "incomplete", "well_formed", "mean_tokens")
}
RATE = "--optimizer.learning_rate=1e-2"  # at which three steps change what is said
STEPS = ("--train.steps=3", "--train.answers_tokens=8", RATE)
LORA = ("--lora.rank=2", "--lora.learning_rate=1e-2", "--lora.targets=all", "--train.freeze=mlp")
MESH = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--train.micro_rows=4")


@pytest.fixture(autouse=True)
def no_comparison(monkeypatch):
    tiny.folder()
    monkeypatch.setattr(train.huggingface, "logits_match", lambda *_: None)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    rows = tiny.write_rows(tmp_path_factory.mktemp("asked") / "asked.jsonl", ASKED)
    return f"--train.answers={rows}"


def run(stage, out, *overrides, code=0):
    assert train.main(tiny.arguments(stage, out, *overrides)) == code
    return out


def transcripts(out, step):
    lines = (out / "answers" / f"{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def files(out):
    return sorted(path.name for path in (out / "answers").iterdir())


def of_the_export(out, asked, tokens=8):
    """What `evaluate` says of the model that the run left: its transcripts and rates."""
    section = {"benchmarks": f"held_out={asked.partition('=')[2]}", "think_tokens": None}
    section |= {"answer_tokens": tokens, "slots": 2, "draws": 100}
    config = Config.model_validate({"data": {"train": "x"}, "evaluate": section})
    found = evaluate.run(config, {"trained": str(out / "model")}, out / "evaluated")
    return read_transcripts(out / "evaluated", "trained", "held_out", "auto"), found.rates


@pytest.mark.parametrize(
    ("stage", "more"), [("srpo", ()), pytest.param("rw", LORA, marks=pytest.mark.slow)]
)
def test_the_answers_are_those_of_the_export_and_training_is_as_without(
    stage, more, asked, tmp_path, capsys
):
    without = run(stage, tmp_path / "without", "--train.steps=3", RATE, *more)
    capsys.readouterr()
    out = run(stage, tmp_path / "out", *STEPS, *more, asked, "--train.answers_every=2")
    assert files(out) == ["2.jsonl", "3.jsonl"]
    records = tiny.metrics(out)
    names = [{name for name in one if name.startswith("answers/")} for one in records]
    assert names == [set(), NAMES, NAMES]
    bare = [{n: v for n, v in one.items() if n not in NAMES} for one in records]
    assert bare == tiny.metrics(without)
    model = [(one / "model" / "model.safetensors").read_bytes() for one in (out, without)]
    assert model[0] == model[1]
    found, rates = of_the_export(out, asked)
    assert transcripts(out, 3) == [one.model_dump(mode="json") for one in found]
    assert transcripts(out, 2) != transcripts(out, 3)
    shares = {(one.metric, one.kind): one.share for one in rates}
    for kind in KINDS:
        mine = [one for one in found if one.kind == kind]
        for name in ("refused", "partial", "complied", "incomplete"):
            assert records[2][f"answers/{kind}/{name}"] == pytest.approx(shares[name, kind])
        well_formed = sum(one.status == "ok" for one in mine) / len(mine)
        assert records[2][f"answers/{kind}/well_formed"] == well_formed
        assert records[2][f"answers/{kind}/mean_tokens"] == sum(t.tokens for t in mine) / len(mine)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("answers at")]
    wanted = {"harmful": "refused", "jailbreak": "refused"}
    line = ", ".join(
        f"{kind} {shares[wanted.get(kind, 'complied'), kind]:.0%} {wanted.get(kind, 'complied')}"
        for kind in ("harmful", "jailbreak", "benign", "borderline")
    )
    assert len(said) == 2 and said[1] == f"answers at step 3: {line}"


def test_without_a_number_of_steps_only_the_last_is_followed_by_answers(asked, tmp_path):
    out = run("rw", tmp_path / "out", *STEPS, asked, "--train.log_every=2")
    assert files(out) == ["3.jsonl"]
    assert ["answers/benign/refused" in one for one in tiny.metrics(out)] == [False, True]


@pytest.mark.parametrize("at", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_signal_while_answering_saves_and_makes_up_for_it(at, asked, tmp_path, monkeypatch):
    """It goes on with the answers, and the evaluation, that were cut off; also the last ones."""
    options = (*STEPS, asked, "--train.answers_every=1")
    options += (f"--data.eval={tiny.folder()}/sft.jsonl", "--train.eval_every=1")
    whole = run("rw", tmp_path / "whole", *options)
    answer, calls = in_training.answer, []

    def signalled(*arguments, look, **options):
        def then():
            if len(calls) == at and calls[-1] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            calls[-1] += 1
            look()

        calls.append(0)
        return answer(*arguments, look=then, **options)

    monkeypatch.setattr(in_training, "answer", signalled)
    out = run("rw", tmp_path / "out", *options, code=143)
    assert calls[-1] == 1, "it ends within a burst"
    assert [one["step"] for one in tiny.metrics(out)] == list(range(1, at))
    assert f"{at}.jsonl" not in (files(out) if at > 1 else [])
    run("rw", out, *options)
    assert tiny.metrics(out) == tiny.metrics(whole)
    assert files(out) == files(whole)
    for step in (1, 2, 3):
        assert transcripts(out, step) == transcripts(whole, step)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (None, (), "train.answers="),
        ({"id": "a", "kind": "bad", "prompt": "x"}, (), "asked.jsonl:1: kind: 'bad'; expected"),
        (
            {"id": "a", "kind": "benign", "prompt": "x"},
            ("--train.answers_tokens=510",),
            "tokens and train.answers_tokens=510 exceed the model's 512 positions",
        ),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused_first(row, options, words, tmp_path, capsys):
    rows = tmp_path / "asked.jsonl"
    if row:
        tiny.write_rows(rows, [row])
    for more in ((), ("--dry-run",)):
        run("rw", tmp_path / "out", f"--train.answers={rows}", *options, *more, code=2)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("option", ["answers_every=2", "answers_tokens=9"])
def test_a_setting_without_prompts_is_refused(option, tmp_path, capsys):
    run("rw", tmp_path / "out", f"--train.{option}", code=2)
    assert f"train.{option} needs prompts in train.answers" in capsys.readouterr().err


def test_several_hosts_are_refused(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "several", lambda: True)
    with pytest.raises(ValueError, match=r"train\.answers=.*: a run on several hosts"):
        config = train.configuration.load(f"{tiny.folder()}/recipe.yaml", [asked], "rw")
        train.prepare(config, "rw")


@pytest.mark.slow
def test_eight_devices_answer_as_one(asked, tmp_path):
    options = (*STEPS, asked, *LORA, "--optimizer.eps=1e-3", "--train.answers_every=1")
    one = run("rw", tmp_path / "one", *options)
    eight = tmp_path / "eight"
    child = subprocess.run(
        [sys.executable, "-m", "saro_jax.train", *tiny.arguments("rw", eight, *options, *MESH)],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    assert files(eight) == files(one)
    for step in (1, 2, 3):
        assert transcripts(eight, step) == transcripts(one, step)
