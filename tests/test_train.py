"""Training runs: what they leave, how they stop and go on, and that every setting is read."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import tiny
import yaml
from safetensors.numpy import load_file, save_file

from saro_jax import config as configuration
from saro_jax import export, train
from saro_jax.config import Config
from saro_jax.training import loop, metrics, reference

SFT_METRICS = {"loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate", "epoch"}
SFT_METRICS |= {"num_tokens", "packing_efficiency", "step"}
PAIR_METRICS = SFT_METRICS - {"entropy"} | {
    f"{name}/{what}" for name in ("rewards", "logps") for what in ("chosen", "rejected")
}
PAIR_METRICS |= {"rewards/margins", "rewards/accuracies"}
PAIR_METRICS |= {
    f"{kind}/{name}" for kind in ("outcome", "process") for name in (*loop.PER_KIND, "pairs")
}
# A run whose chosen log-probs fall: the anchored loss that lowers both branches.
FALL = ("--srpo.loss=apo_down", "--train.steps=9", "--train.save_every=1", "--train.keep=7")
LONG = ("--train.steps=10", "--train.save_every=5")
LORA = ("--lora.rank=2",)
KINDS = ("harmful", "benign", "harmful", "borderline")
ASKED = [{"id": f"a{i}", "kind": kind, "prompt": f"lock {i}"} for i, kind in enumerate(KINDS)]


@pytest.fixture(autouse=True)
def no_comparison(monkeypatch):
    """test_export.py has the comparison with transformers."""
    tiny.folder()
    monkeypatch.setattr(train.huggingface, "logits_match", lambda *_: None)


def run(stage, out, *overrides, code=0):
    assert train.main(tiny.arguments(stage, out, *overrides)) == code
    return out


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def saved_steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps of each stage without a stop."""
    tiny.folder()
    root = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.huggingface, "logits_match", lambda *_: None)
        for stage in ("rw", "srpo"):
            run(stage, root / stage, *LONG)
    return root


# ---- what a run leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "names"), [("rw", SFT_METRICS), ("srpo", PAIR_METRICS)])
def test_the_output_folder(straight, stage, names):
    out = straight / stage
    found = {path.name for path in out.iterdir()}
    assert found == {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "doctor.jsonl",
        "rejects.jsonl",
        "checkpoints",
        "model",
    }
    records = tiny.metrics(out)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert all(set(record) == names for record in records)
    assert saved_steps(out) == [5, 10]
    assert (out / "rejects.jsonl").read_text() == ""
    text = (out / "config.yaml").read_text()
    assert text.startswith(f"# stage: {stage}\n")
    config = Config.model_validate(yaml.safe_load(text))
    assert (config.train.steps, config.train.micro_rows) == (10, 2)
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["jax"] == jax.__version__
    files = {path.name for path in (out / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


def test_training_learns(straight):
    rw, srpo = tiny.metrics(straight / "rw"), tiny.metrics(straight / "srpo")
    assert rw[-1]["loss"] < rw[0]["loss"] - 0.5
    assert srpo[-1]["loss"] < 0.3 < srpo[0]["loss"]
    assert srpo[-1]["rewards/accuracies"] == 1.0 and srpo[-1]["rewards/margins"] > 1
    tokens = [record["num_tokens"] for record in rw]
    assert all(np.diff(tokens) > 0)
    # Ten rows in steps of four.
    assert [record["epoch"] for record in rw[:3]] == pytest.approx([0.4, 0.8, 1.2])
    assert rw[0]["learning_rate"] == pytest.approx(1e-3)


def test_tokens_are_those_of_the_rows(straight, capsys, tmp_path):
    run("rw", tmp_path / "out", "--train.steps=5")
    said = capsys.readouterr().out
    assert said.startswith("rw: 0.1M parameters (float32), 10 rows, ")
    # Five steps of four are two epochs: every row counts twice.
    per_row = tiny.metrics(tmp_path / "out")[-1]["num_tokens"] / 20
    assert f"{4 * per_row:.0f} tokens per step" in said and "5 steps" in said


@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_evaluation_has_its_own_names(stage, tmp_path):
    rows = tiny.folder() / ("sft.jsonl" if stage == "rw" else "pairs.jsonl")
    steps = ("--train.steps=3", f"--data.eval={rows}")
    out = run(stage, tmp_path / "out", *steps, "--train.eval_every=2")
    first, second, third = tiny.metrics(out)
    base = {"loss", "mean_token_accuracy"}
    base |= {"entropy"} if stage == "rw" else PAIR_METRICS - SFT_METRICS
    assert not [name for name in first if name.startswith("eval_")]
    for record in (second, third):
        assert {name for name in record if name.startswith("eval_")} == {f"eval_{n}" for n in base}
    assert third["eval_loss"] < second["eval_loss"]
    last = tiny.metrics(run(stage, tmp_path / "last", *steps))
    assert ["eval_loss" in record for record in last] == [False, False, True]
    assert last[2] == third, "evaluating changes nothing"


def test_the_model_reloads_as_the_last_checkpoint(straight):
    from saro_jax.models import huggingface
    from saro_jax.parallel import mesh as meshes
    from saro_jax.parallel import sharding
    from saro_jax.training import step
    from saro_jax.training.checkpoint import Checkpoints

    out = straight / "srpo"
    arch = huggingface.load_architecture(out / "model")
    assert arch == tiny.ARCH
    shapes = step.abstract_params(arch, np.float32)
    checkpoints = Checkpoints(out / "checkpoints")
    places = sharding.shardings(meshes.make_mesh(), shapes)
    saved = checkpoints.restore_params(10, shapes, places)
    checkpoints.close()
    loaded = huggingface.load_params(out / "model", arch, np.float32)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_srpo_starts_from_the_warmup_beside_it(tmp_path, capsys):
    other = tiny.write_model(tmp_path / "rw" / "model", seed=7)
    run("srpo", tmp_path / "srpo", "--model.path=null", "--train.steps=1")
    assert capsys.readouterr().out.startswith(f"model.path is not given: starting from {other}\n")
    direct = run("srpo", tmp_path / "direct", f"--model.path={other}", "--train.steps=1")
    assert tiny.metrics(tmp_path / "srpo") == tiny.metrics(direct)


# ---- stopping and going on -----------------------------------------------------------------------

KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import tiny
from saro_jax import export, train
from saro_jax.training import metrics

write = metrics.Writer.write

def then_die(self, step, values):
    write(self, step, values)
    if step == 7:
        until = time.monotonic() + 60
        while not Path(sys.argv[2], "checkpoints", "5").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

metrics.Writer.write = then_die
train.main(json.loads(sys.argv[1]))
"""


def test_a_killed_run_goes_on_as_if_nothing_had_been(straight, tmp_path, capsys):
    out = tmp_path / "killed"
    arguments = tiny.arguments("rw", out, *LONG)
    kill_and_go_on(arguments, out, capsys)
    assert tiny.metrics(out) == tiny.metrics(straight / "rw")
    assert weights(out) == weights(straight / "rw")


@pytest.mark.slow
def test_a_killed_run_with_adapters_goes_on_too(tmp_path, capsys):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    options = (*LONG, *LORA, "--lora.dropout=0.3", "--train.freeze=mlp")
    kill_and_go_on(tiny.arguments("rw", out, *options), out, capsys)
    run("rw", whole, *options)
    assert tiny.metrics(out) == tiny.metrics(whole)
    assert weights(out) == weights(whole)


def kill_and_go_on(arguments, out, capsys):
    """Kill -9 at step 7, and the same command again."""
    child = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(arguments), str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]
    assert tiny.metrics(out)[-1]["step"] == 7 and saved_steps(out) == [5]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert train.main(arguments) == 0
    assert "continuing from step 5 of 10\n" in capsys.readouterr().out


def signal_at(step, number, monkeypatch):
    """Send this process a signal when the line of `step` is written, once."""
    write = metrics.Writer.write

    def then_signal(self, at, values):
        write(self, at, values)
        if at == step:
            monkeypatch.setattr(metrics.Writer, "write", write)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.Writer, "write", then_signal)


@pytest.mark.parametrize(
    ("stage", "number", "code"), [("srpo", signal.SIGTERM, 143), ("rw", signal.SIGINT, 130)]
)
def test_a_signal_saves_and_the_same_command_goes_on(
    stage, number, code, straight, tmp_path, capsys, monkeypatch
):
    handler = signal.getsignal(number)
    signal_at(3, number, monkeypatch)
    out = run(stage, tmp_path / "out", *LONG, code=code)
    (stopped,) = saved_steps(out)
    assert 3 <= stopped <= 4
    assert f"stopped at step {stopped} of 10; the same command continues" in capsys.readouterr().out
    assert not (out / "model").exists() and signal.getsignal(number) == handler
    assert tiny.metrics(out)[-1]["step"] == stopped
    run(stage, out, *LONG)
    assert f"continuing from step {stopped} of 10" in capsys.readouterr().out
    assert tiny.metrics(out) == tiny.metrics(straight / stage)
    assert weights(out) == weights(straight / stage)


@pytest.mark.parametrize("at", [1, 3])
def test_a_signal_during_an_evaluation_saves_and_makes_up_for_it(tmp_path, monkeypatch, at):
    """Also that of the last step; in the middle, before the next step."""
    options = (f"--data.eval={tiny.folder()}/sft.jsonl", "--train.eval_every=1", "--train.steps=3")
    whole = run("rw", tmp_path / "whole", *options)
    evaluate, calls = loop.evaluate, []

    def signalled(*arguments, **options):
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", signalled)
    out = run("rw", tmp_path / "out", *options, code=143)
    assert saved_steps(out) == [at] and not (out / "model").exists()
    assert [record["step"] for record in tiny.metrics(out)] == list(range(1, at))
    run("rw", out, *options)
    assert tiny.metrics(out) == tiny.metrics(whole)
    assert weights(out) == weights(whole)


def test_another_cut_into_passes_goes_on_with_the_same_run(straight, tmp_path, monkeypatch, capsys):
    signal_at(3, signal.SIGTERM, monkeypatch)
    out = run("rw", tmp_path / "out", *LONG, code=143)
    capsys.readouterr()
    run("rw", out, *LONG, "--train.micro_rows=1")
    assert "goes on with another mesh or train.micro_rows" in capsys.readouterr().out
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["micro_rows"] == 1
    for one, other in zip(tiny.metrics(out), tiny.metrics(straight / "rw"), strict=True):
        assert one["step"] == other["step"] and one["num_tokens"] == other["num_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_means_over_several_steps_survive_a_stop(tmp_path, monkeypatch):
    options = ("--train.steps=6", "--train.log_every=3", "--train.save_every=2")
    whole = tiny.metrics(run("rw", tmp_path / "whole", *options))
    assert [record["step"] for record in whole] == [3, 6]
    signal_at(3, signal.SIGTERM, monkeypatch)
    out = run("rw", tmp_path / "out", *options, code=143)
    assert saved_steps(out)[-1] in (3, 4)
    run("rw", out, *options)
    assert tiny.metrics(out) == whole


def test_a_complete_run_is_left_alone(straight, capsys):
    out = straight / "rw"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run("rw", out, *LONG)
    assert capsys.readouterr().out == (
        f"{out}: complete, nothing to do; the model is in {out / 'model'}\n"
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_killed_before_its_export_only_exports(straight, tmp_path):
    out = shutil.copytree(straight / "rw", tmp_path / "rw")
    shutil.rmtree(out / "model")
    (out / "model.unchecked").mkdir()
    run("rw", out, *LONG)
    assert weights(out) == weights(straight / "rw")
    assert tiny.metrics(out) == tiny.metrics(straight / "rw")
    assert not (out / "model.unchecked").exists()


def test_settings_that_training_does_not_read_may_change(straight, tmp_path, capsys):
    """Also those that another version of the project adds or takes away."""
    out = shutil.copytree(straight / "rw", tmp_path / "rw")
    now = (out / "config.yaml").read_text()
    tree = yaml.safe_load(now)
    del tree["sample"]["n"]
    tree["pairs"]["gone"] = 1
    (out / "config.yaml").write_text("# stage: rw\n" + yaml.safe_dump(tree, sort_keys=False))
    run("rw", out, *LONG, "--sample.n=7")
    assert "complete, nothing to do" in capsys.readouterr().out
    assert (out / "config.yaml").read_text() == now
    assert weights(out) == weights(straight / "rw")


def test_a_folder_of_another_run_is_refused(straight, tmp_path, capsys):
    run("rw", straight / "rw", *LONG, "--optimizer.learning_rate=5e-4", code=2)
    assert capsys.readouterr().err == (
        f"error: {straight}/rw/config.yaml: this folder holds a run with another config: "
        "optimizer.learning_rate=0.001 there, 0.0005 now\n"
    )
    run("srpo", straight / "rw", *LONG, code=2)
    assert "stage=rw there, srpo now" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    run("rw", tmp_path, code=2)
    said = capsys.readouterr().err
    assert said == (
        f"error: {tmp_path}: the output folder is not empty and holds no run; choose another\n"
    )


def test_bad_rows_are_named_and_too_many_stop_the_run(tmp_path, capsys):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.SFT, {"id": "bad", "prompt": "x"}])
    out, data = tmp_path / "out", f"--data.train={rows}"
    run("rw", out, data, code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: 1 of 11 rows rejected, data.max_reject_share=0.05 allows 0;")
    assert said.count("\n") == 1 and f"first {rows}:11: " in said
    (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert (reject["where"], reject["id"]) == (f"{rows}:11", "bad")
    assert reject["reason"].startswith("missing columns")
    # Nothing is trained yet: what was wrong may be set right in the same folder.
    run("rw", out, data, "--data.max_reject_share=0.1")
    assert f"1 of 11 rows rejected: {out / 'rejects.jsonl'}" in capsys.readouterr().out
    assert "max_reject_share: 0.1\n" in (out / "config.yaml").read_text()


def test_rows_that_fit_no_packed_row_are_rejected(tmp_path):
    pair = {"id": "long", "prompt": "x" * 30, "chosen": "a" * 40, "rejected": "b" * 40}
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.PAIRS, pair])
    options = (f"--data.train={rows}", "--data.max_reject_share=0.2", "--data.row_length=100")
    out = run("srpo", tmp_path / "out", *options, "--train.steps=1")
    (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert reject["reason"].startswith("too long for a packed row: ")
    assert reject["reason"].endswith(" tokens, data.row_length=100")


def test_a_rate_far_too_high_ends_the_run_in_one_line(tmp_path, capsys):
    options = ("--optimizer.learning_rate=1e30", "--train.save_every=1", "--train.steps=5")
    out = run("rw", tmp_path / "out", *options, code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: step 2: ") and "; lower optimizer.learning_rate or " in said
    assert said.count("\n") == 1
    assert saved_steps(out) == [1]
    assert not (out / "model").exists()


def test_a_loss_that_is_no_number_is_not_saved(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, model / "model.safetensors")
    out = run("rw", tmp_path / "out", f"--model.path={model}", "--train.save_every=1", code=2)
    assert capsys.readouterr().err.startswith("error: step 1: loss is nan; ")
    assert saved_steps(out) == []


def test_a_gradient_that_is_no_number_is_not_saved(tmp_path, capsys, monkeypatch):
    make = train.step.programs

    def broken(*arguments):
        programs = make(*arguments)

        def update(state, gradients):
            state, norm = programs.update(state, jax.tree.map(lambda x: x * np.nan, gradients))
            return state, norm

        return programs._replace(update=update)

    monkeypatch.setattr(train.step, "programs", broken)
    out = run("rw", tmp_path / "out", code=2)
    assert capsys.readouterr().err.startswith("error: step 1: grad_norm is nan; ")
    assert saved_steps(out) == []


def test_more_batch_rows_than_rows_is_said(tmp_path, capsys):
    out = run("rw", tmp_path / "out", "--train.batch_rows=64", "--train.steps=1")
    assert "train.batch_rows=64: only 10 rows, all in each step" in capsys.readouterr().out
    assert tiny.metrics(out)[0]["epoch"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--stage: required"),
        (["--stage=rl"], "--stage=rl: expected rw or srpo"),
        (["--stage=rw", "--optimiser.name=sgd"], "unknown option"),
        (["--stage=rw", "--config=none"], "unknown recipe"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, words, capsys):
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


# ---- adapters ------------------------------------------------------------------------------------


def test_a_run_with_adapters_leaves_both_exports_and_small_checkpoints(tmp_path, capsys):
    out = run("srpo", tmp_path / "out", *LORA, "--lora.learning_rate=1e-2", "--train.steps=3")
    said = capsys.readouterr().out
    assert "M parameters (float32), 0.00M trained, " in said
    assert f"the adapters are in {out / 'adapter'}\n" in said
    first, _, third = tiny.metrics(out)
    assert abs(first["loss"] - np.log(2)) <= 1e-6 and first["rewards/margins"] == 0.0
    assert third["loss"] < 0.6
    assert (first["learning_rate"], first["lora_learning_rate"]) == pytest.approx((1e-3, 1e-2))
    # Exactly the adapters thrice, parameters and two moments, and no array of the base. Counted in
    # Orbax's own list: how many bytes its store leaves for so little differs from run to run.
    listed = out / "checkpoints" / "3" / "state" / "array_metadatas" / "process_0"
    arrays = {
        array["array_metadata"]["param_name"]: math.prod(array["array_metadata"]["write_shape"])
        for array in json.loads(listed.read_text())["array_metadatas"]
    }
    adapters = sum(
        value.size for value in load_file(out / "adapter" / "adapter_model.safetensors").values()
    )
    large = {name: size for name, size in arrays.items() if size > 1}
    assert sum(large.values()) == 3 * adapters and all(".lora_" in name for name in large)
    assert len(arrays) - len(large) <= 3, arrays  # the step and the optimizer's counts
    start = load_file(tiny.folder() / "model" / "model.safetensors")
    merged = load_file(out / "model" / "model.safetensors")
    for name, value in merged.items():
        assert (value != start[name]).any() == name.endswith("_proj.weight"), name
    adapters = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 7
    a, b = (
        adapters[f"base_model.model.model.layers.1.mlp.up_proj.lora_{which}.weight"]
        for which in "AB"
    )
    key = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(merged[key], start[key] + 16 * b @ a, rtol=0, atol=1e-6)
    again = {}
    for form in ("merged", "peft"):
        arguments = [f"--checkpoint={out}", f"--out={tmp_path / form}", f"--format={form}"]
        assert export.main(arguments) == 0
        (again[form],) = (path.read_bytes() for path in (tmp_path / form).glob("*.safetensors"))
    assert again["merged"] == weights(out)
    assert again["peft"] == (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_another_base_under_a_checkpoint_is_refused(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model")
    options = (*LORA, f"--model.path={model}", "--train.steps=1")
    out = run("rw", tmp_path / "out", *options)
    shutil.rmtree(out / "model")
    shutil.rmtree(model)
    tiny.write_model(model, seed=3)
    run("rw", out, *options, code=2)
    assert export.main([f"--checkpoint={out}", f"--out={tmp_path / 'x'}"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"error: {model}: the weights are not those that the run in {out} ")


def test_a_model_that_trains_beside_its_adapters_has_no_adapter_folder(tmp_path, capsys):
    out = run("rw", tmp_path / "out", *LORA, "--train.freeze=mlp", "--train.steps=1")
    assert "no adapter/: 8 weights of the model were trained too" in capsys.readouterr().out
    assert (out / "model").is_dir() and not (out / "adapter").exists()
    arguments = [f"--checkpoint={out}", f"--out={tmp_path / 'x'}", "--format=peft"]
    assert export.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --format=peft: 8 weights of the model ")


# ---- every setting is read -----------------------------------------------------------------------


# Those of other stages are in their own test files.
TRAINING = [
    name
    for name in configuration.leaves()
    if name.partition(".")[0] not in set(configuration.sections()) - set(configuration.TRAINING)
]


class Observed:
    """What can be seen of runs: exit code, output, records, files and what was compiled."""

    def __init__(self, root, capsys, monkeypatch):
        self.root, self.capsys = root, capsys
        self.count, self.known = 0, {}
        self.notes = []
        score_items, programs = reference.score_items, train.step.programs
        options = grain.ReadOptions
        grain_workers = grain.MultiprocessingOptions

        def scored(*arguments, **keywords):
            found = list(score_items(*arguments, **keywords))
            self.notes.append(f"scored {len(found)}")
            return found

        def noted(*arguments):
            made = programs(*arguments)

            def accumulate(*inputs):
                if "program" in self.notes:
                    self.notes.remove("program")
                    self.notes.append(made.accumulate.lower(*inputs).as_text())
                return made.accumulate(*inputs)

            return made._replace(accumulate=accumulate)

        def read_options(*arguments, **keywords):
            self.notes.append(f"read {keywords}")
            return options(*arguments, **keywords)

        monkeypatch.setattr(reference, "score_items", scored)
        monkeypatch.setattr(train.step, "programs", noted)

        def workers(number, **_):
            self.notes.append(f"{number} workers")
            return grain_workers(0)

        monkeypatch.setattr(grain, "ReadOptions", read_options)
        monkeypatch.setattr(grain, "MultiprocessingOptions", workers)
        monkeypatch.setattr(train, "_export", lambda *_: None)
        monkeypatch.setitem(sys.modules, "wandb", None)

    def __call__(self, stage, *overrides, program=False):
        key = (stage, overrides, program)
        if key not in self.known:
            self.count += 1
            out = self.root / f"run{self.count}"
            self.notes[:] = ["program"] if program else []
            code = train.main(tiny.arguments(stage, out, *overrides))
            said = self.capsys.readouterr()
            lines = [line for line in said.out.splitlines() if f"{stage} step" not in line]
            files = {
                str(path.relative_to(out)).split(".out.")[0]
                for path in out.rglob("*")
                if path.parent.name in (out.name, "checkpoints")
            }
            records = tiny.metrics(out) if (out / "metrics.jsonl").exists() else []
            self.known[key] = {
                "code": code,
                "error": said.err,
                "said": [line.replace(str(out), "OUT") for line in lines],
                "files": sorted(files),
                "records": records,
                "notes": list(self.notes),
            }
        return self.known[key]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """Filled by the tests below: runs by their arguments, so that the baselines run once."""
    return tmp_path_factory.mktemp("settings"), {}


def settings(root: Path) -> dict[str, tuple]:
    """Per setting: stage, its change, what it needs beside it, whether to look at the program."""
    data = tiny.folder()
    many = jax.device_count() + 1
    eval_rows = f"--data.eval={data}/sft.jsonl"
    asked = (f"--train.answers={root}/asked.jsonl", "--train.answers_tokens=4")
    kto = ("--srpo.loss=kto", f"--data.train={root}/unpaired.jsonl")
    return {
        "model.path": ("rw", f"{root}/other"),
        "model.revision": ("rw", "main"),
        "model.dtype": ("rw", "bfloat16"),
        "model.param_dtype": ("rw", "bfloat16"),
        "model.frozen_dtype": ("rw", "bfloat16", LORA),
        "model.remat": ("rw", "full", (), True),
        "model.attention": ("rw", "flash"),
        "model.chat_template": ("rw", f"{root}/template.jinja"),
        "data.train": ("rw", f"{root}/split/test.jsonl"),
        "data.eval": ("rw", f"{data}/sft.jsonl"),
        "data.split": ("rw", "test", (f"--data.train={root}/split",)),
        "data.max_length": ("rw", "60", ("--data.max_reject_share=1",)),
        "data.too_long": (
            "rw",
            "reject",
            ("--data.max_length=60", "--data.max_reject_share=1"),
        ),
        "data.row_length": ("rw", "96"),
        "data.pack_window": ("rw", "1", ("--data.row_length=96", "--train.batch_rows=2")),
        "data.row_buckets": ("rw", "4", ("--data.row_length=400",), True),
        "data.shuffle": ("rw", "false"),
        "data.workers": ("rw", "1"),
        "data.prefetch": ("rw", "0"),
        "data.max_reject_share": ("rw", "0.2", (f"--data.train={root}/bad.jsonl",)),
        "train.steps": ("rw", "1"),
        "train.epochs": ("rw", "0.3", ("--train.steps=null",)),
        "train.batch_rows": ("rw", "3"),
        "train.micro_rows": ("rw", "1", (), True),
        "train.reduce_dtype": ("rw", "bfloat16", ("--model.dtype=bfloat16",)),
        "train.freeze": ("rw", "mlp"),
        "train.save_every": ("rw", "1"),
        "train.keep": ("rw", "1", ("--train.save_every=1",)),
        "train.log_every": ("rw", "2"),
        "train.eval_every": ("rw", "1", (eval_rows,)),
        "train.answers": ("rw", f"{root}/asked.jsonl"),
        "train.answers_every": ("rw", "1", asked),
        "train.answers_tokens": ("rw", "3", asked),
        "train.tensorboard": ("rw", "true"),
        "train.wandb": ("rw", "lab"),
        "optimizer.name": ("rw", "sgd"),
        "optimizer.learning_rate": ("rw", "2e-3"),
        "optimizer.schedule": ("rw", "cosine"),
        "optimizer.warmup_ratio": ("rw", "1"),
        "optimizer.min_lr_ratio": ("rw", "0.5", ("--optimizer.schedule=cosine",)),
        "optimizer.weight_decay": ("rw", "0.5"),
        "optimizer.b1": ("rw", "0.5", ("--train.steps=3",)),
        "optimizer.b2": ("rw", "0.5", ("--train.steps=3",)),
        "optimizer.eps": ("rw", "0.01"),
        "optimizer.offload": ("rw", "true"),
        "optimizer.max_grad_norm": ("rw", "0.01", ("--optimizer.name=sgd",)),
        "lora.rank": ("rw", "2"),
        "lora.alpha": ("rw", "8", LORA),
        "lora.dropout": ("rw", "0.5", LORA),
        "lora.targets": ("rw", "q_proj", LORA),
        "lora.rslora": ("rw", "true", LORA),
        "lora.learning_rate": ("rw", "2e-3", LORA),
        "srpo.loss": ("srpo", "hinge"),
        "srpo.beta": ("srpo", "0.5"),
        "srpo.label_smoothing": ("srpo", "0.1"),
        "srpo.nll_weight": ("srpo", "0.5"),
        "srpo.target_margin": ("srpo", "1", ("--srpo.loss=simpo",)),
        "srpo.length": ("srpo", "mean"),
        "srpo.length_alpha": ("srpo", "0.1", ("--srpo.length=desensitised",)),
        "srpo.reasoning_weight": ("srpo", "2"),
        "srpo.answer_weight": ("srpo", "2"),
        "srpo.scope": ("srpo", "step", (f"--data.train={root}/steps.jsonl",)),
        "srpo.desirable_weight": ("srpo", "2", kto),
        "srpo.undesirable_weight": ("srpo", "2", kto),
        "srpo.reference": ("srpo", "resident"),
        "srpo.sync_every": ("srpo", "1", ("--srpo.reference=resident",)),
        "srpo.sync_mix": ("srpo", "0.5", ("--srpo.reference=resident", "--srpo.sync_every=1")),
        "srpo.max_chosen_drop": ("srpo", "4.5", FALL),
        "srpo.on_drop": ("srpo", "rollback", (*FALL, "--srpo.max_chosen_drop=4.5")),
        "srpo.layout": ("srpo", "separate"),
        "srpo.reference_cache": ("srpo", f"{root}/reference"),
        "srpo.recheck": ("srpo", "2"),
        "mesh.data": ("rw", str(many)),
        "mesh.fsdp": ("rw", str(many)),
        "mesh.tensor": ("rw", str(many)),
        "mesh.sequence": ("rw", str(many)),
        "mesh.slice": ("rw", str(many)),
        "seed": ("rw", "1"),
    }


def test_all_settings_are_here():
    assert set(settings(Path())) == set(TRAINING)


@pytest.mark.parametrize("name", TRAINING)
def test_every_setting_changes_something(name, observed, capsys, monkeypatch):
    root, known = observed
    if not known:
        tiny.write_model(root / "other", seed=5)
        (root / "template.jinja").write_text("{{ '<|endoftext|>' }}" + tiny.CHATML)
        (root / "split").mkdir()
        tiny.write_rows(root / "split" / "train.jsonl", tiny.SFT)
        tiny.write_rows(root / "split" / "test.jsonl", tiny.SFT[4:])
        tiny.write_rows(root / "bad.jsonl", [*tiny.SFT, {"id": "bad"}])
        tiny.write_rows(root / "unpaired.jsonl", tiny.UNPAIRED)
        tiny.write_rows(root / "asked.jsonl", ASKED)
        steps = [row | {"chosen": f"{row['chosen']}\n\nmore"} for row in tiny.PAIRS]
        tiny.write_rows(root / "steps.jsonl", steps)
    see = Observed(root, capsys, monkeypatch)
    see.known, see.count = known, len(known)
    stage, value, *rest = settings(root)[name]
    needs, program = [*rest, (), False][:2] if len(rest) < 2 else rest
    before = see(stage, *needs, program=program)
    after = see(stage, *needs, f"--{name}={value}", program=program)
    if name in ("data.max_reject_share", "srpo.on_drop"):
        assert (before["code"], after["code"]) == (2, 0)
    else:
        assert before["code"] == 0, before["error"]
    if after["code"]:
        assert after["error"].startswith("error: ") and after["error"].count("\n") == 1
        assert name in after["error"], "a refusal names the setting"
    assert {key for key in before if before[key] != after[key]}
