"""The loop's arithmetic: means by kind and window, and the fall of the chosen log-probs."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import tiny

from saro_jax import train
from saro_jax.training import loop, reference

FALL = ("--srpo.loss=apo_down", "--train.steps=12", "--train.save_every=1", "--train.keep=7")
FALL += ("--srpo.max_chosen_drop=4.5",)


def block(**values):
    return {"loss": 0.5, "scored": 4.0, "correct": 3.0} | values


def test_kinds_have_their_own_means():
    # Rows of [all, a, b]: (sum, number).
    first = block(**{"rewards/margins": np.array([[3.0, 2], [1.0, 1], [2.0, 1]])})
    second = block(**{"rewards/margins": np.array([[6.0, 1], [0.0, 0], [6.0, 1]])})
    for one in (first, second):
        one["logps/chosen"] = np.asarray(one["rewards/margins"]) * [-1, 1]
    found = loop.summarise("srpo", [first, second], ("a", "b"))
    assert found == {
        "loss": 1.0,
        "rewards/margins": 3.0,
        "logps/chosen": -3.0,
        "a/rewards/margins": 1.0,
        "a/logps/chosen": -1.0,
        "a/pairs": 1.0,
        "b/rewards/margins": 4.0,
        "b/logps/chosen": -4.0,
        "b/pairs": 2.0,
        "mean_token_accuracy": 0.75,
    }
    alone = loop.summarise("srpo", [first, second])
    assert not [name for name in alone if name.startswith(("a/", "b/"))]


def test_unpaired_rows_have_margins_of_means():
    sums = {f"{what}/{name}": np.array([[value, 2.0]]) for what, name, value in (
        ("rewards", "chosen", 3.0), ("rewards", "rejected", -1.0),
        ("logps", "chosen", -8.0), ("logps", "rejected", -6.0),
    )}  # fmt: skip
    assert loop.summarise("srpo", [block(**sums)])["rewards/margins"] == 2.0
    sums["rewards/rejected"] = np.array([[0.0, 0.0]])
    assert math.isnan(loop.summarise("srpo", [block(**sums)])["rewards/margins"])


def test_a_window_weighs_a_kind_by_its_pairs():
    nan = float("nan")
    window = [
        {"loss": loss, "a/rewards/margins": margin, "a/pairs": pairs}
        | {"b/rewards/margins": nan, "b/pairs": 0}
        for loss, margin, pairs in ((1.0, 4.0, 3.0), (3.0, 8.0, 1.0))
    ]
    found = loop.window_means(window)
    assert (found["loss"], found["a/rewards/margins"], found["a/pairs"]) == (2.0, 5.0, 2.0)
    assert math.isnan(found["b/rewards/margins"]) and found["b/pairs"] == 0


# ---- the fall ------------------------------------------------------------------------------------


def test_a_fall_with_growing_margins_is_seen():
    falling = [[-3.0 * k, 0.1 * k] for k in range(20)]
    seen = [loop.fallen(falling[:n], 20.0) for n in range(21)]
    # The mean of five ratios passes -20 once the middle one does: the eighth, of ten steps.
    assert seen.index(True) == 10 and all(seen[10:])


def test_one_noisy_step_does_not_trip():
    steady = [[-1.0, 0.1 * k] for k in range(20)]
    for at in range(20):
        noisy = [[-90.0, m] if k == at else [r, m] for k, (r, m) in enumerate(steady)]
        assert not any(loop.fallen(noisy[:n], 20.0) for n in range(21))


def test_a_fall_without_growing_margins_is_left_alone():
    assert not loop.fallen([[-50.0, 0.0]] * 20, 20.0)
    assert not loop.fallen([[-3.0 * k, -0.1 * k] for k in range(20)], 20.0)
    assert not loop.fallen([[3.0 * k, 0.1 * k] for k in range(20)], 20.0)


def test_a_few_steps_are_too_few():
    assert not loop.fallen([[-500.0, 1.0]] * 4, 20.0)
    assert loop.fallen([[-500.0, 1.0]] * 5, 20.0)


@pytest.fixture
def no_comparison(monkeypatch):
    tiny.folder()
    monkeypatch.setattr(train.huggingface, "logits_match", lambda *_: None)


def saved_steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.usefixtures("no_comparison")
def test_a_fall_stops_the_run_or_rolls_it_back(tmp_path, capsys):
    stopped = tmp_path / "stop"
    assert train.main(tiny.arguments("srpo", stopped, *FALL)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: step 8: the chosen log-probs lie 5.6 nats below the reference")
    assert saved_steps(stopped)[-1] == 7 and not (stopped / "model").exists()
    assert tiny.metrics(stopped)[-1]["step"] == 8, "the fall is in the metrics"

    back = tmp_path / "back"
    assert train.main(tiny.arguments("srpo", back, *FALL, "--srpo.on_drop=rollback")) == 0
    said = capsys.readouterr().out
    assert "; back to step 3, where the run ends\n" in said and saved_steps(back)[-1] == 3
    short = tmp_path / "short"
    options = ("--srpo.loss=apo_down", "--train.steps=3")
    assert train.main(tiny.arguments("srpo", short, *options)) == 0
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (back, short)]
    assert weights[0] == weights[1], "the model is that of step 3"


# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_comparison")
@pytest.mark.parametrize("late", [False, True], ids=["asking waits", "the result is late"])
def test_every_line_has_the_time_of_its_steps(late, tmp_path, monkeypatch):
    """Steps of 0.2 s, with evaluations and saving of 0.5 s between some of them."""
    fit, evaluate, save = loop.fit, loop.evaluate, loop.Checkpoints.save
    spent = []

    def slowly(update):
        def asking(state, gradients):
            if not late:
                time.sleep(0.2)
            return update(state, gradients)

        return asking

    def fit_slowly(*, programs, **given):
        began = time.monotonic()
        done = fit(programs=programs._replace(update=slowly(programs.update)), **given)
        spent.append(time.monotonic() - began)
        return done

    def ready_late(norm):
        time.sleep(0.2)
        return ready_at(norm)

    def pausing(function):
        def after_a_pause(*args, **given):
            time.sleep(0.5)
            return function(*args, **given)

        return after_a_pause

    ready_at = loop.ready_at
    if late:
        monkeypatch.setattr(loop, "ready_at", ready_late)
    monkeypatch.setattr(loop, "fit", fit_slowly)
    monkeypatch.setattr(loop, "evaluate", pausing(evaluate))
    monkeypatch.setattr(loop.Checkpoints, "save", pausing(save))

    def seconds(name, *options):
        out = tmp_path / name
        assert train.main(tiny.arguments("rw", out, *options)) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tokens = [0, *(line["num_tokens"] for line in lines)]
        return [
            (after - before) / line["tokens_per_second"]
            for before, after, line in zip(tokens, tokens[1:], lines, strict=False)
        ]

    broken = (f"--data.eval={tiny.folder()}/sft.jsonl", "--train.eval_every=2")
    found = seconds("out", "--train.steps=5", "--train.save_every=3", *broken)
    assert len(found) == 5 and min(found) >= 0.2
    # Three evaluations, which may begin before the result is there, and two times of saving.
    assert sum(found) <= spent[0] - 5 * 0.5 + (3 * 0.2 if late else 0)
    (alone,) = seconds("one", "--train.steps=1")
    assert 0.2 <= alone <= spent[1] - 0.5


# ---- runs of the other kinds of reference --------------------------------------------------------


@pytest.mark.usefixtures("no_comparison")
def test_a_resident_reference_gives_the_run_of_a_stored_one(tmp_path):
    """And touches no store; synchronised after every step, each step starts from a tie."""
    records = {}
    for name, options in {
        "stored": (f"--srpo.reference_cache={tmp_path}/kept",),
        "resident": ("--srpo.reference=resident",),
        "synced": ("--srpo.reference=resident", "--srpo.sync_every=1"),
    }.items():
        cache = () if name == "stored" else (f"--srpo.reference_cache={tmp_path}/{name}_cache",)
        out = tmp_path / name
        assert train.main(tiny.arguments("srpo", out, "--train.steps=3", *cache, *options)) == 0
        records[name] = [{k: v or 0.0 for k, v in r.items()} for r in tiny.metrics(out)]
    for a, b in zip(records["stored"], records["resident"], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert records["resident"][2]["rewards/margins"] > 0.01
    assert all(abs(record["rewards/margins"]) < 1e-5 for record in records["synced"])
    assert not list(tmp_path.glob("*_cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_comparison")
def test_a_reference_is_mixed_and_goes_on_after_a_stop(tmp_path):
    options = ("--srpo.reference=resident", "--srpo.sync_every=2", "--srpo.sync_mix=0.5")
    whole = tmp_path / "whole"
    arguments = (*options, "--train.steps=4", "--train.save_every=3")
    assert train.main(tiny.arguments("srpo", whole, *arguments)) == 0
    records = tiny.metrics(whole)
    # Half way to the policy: about half of the margin is left at the next step.
    assert records[2]["rewards/margins"] > 0
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "4")
    assert train.main(tiny.arguments("srpo", again, *arguments)) == 0
    assert tiny.metrics(again) == records


@pytest.mark.usefixtures("no_comparison")
def test_a_loss_without_reference_touches_no_store(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "score_items", None)
    cache = f"--srpo.reference_cache={tmp_path}/cache"
    for loss in ("simpo", "orpo"):
        out = tmp_path / loss
        options = (f"--srpo.loss={loss}", "--train.steps=1", cache)
        assert train.main(tiny.arguments("srpo", out, *options)) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_comparison")
@pytest.mark.parametrize("reference", ["stored", "resident"])
def test_kto_learns_from_unpaired_rows(reference, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.UNPAIRED)
    options = ("--srpo.loss=kto", f"--data.train={rows}", "--train.steps=6", "--train.batch_rows=8")
    options += (f"--srpo.reference={reference}", f"--srpo.reference_cache={tmp_path}/cache")
    options += (f"--data.eval={rows}",)
    out = tmp_path / "out"
    assert train.main(tiny.arguments("srpo", out, *options)) == 0
    records = tiny.metrics(out)
    assert records[0]["loss"] == pytest.approx(0.5, abs=1e-6) and records[0]["kl"] == 0.0
    assert records[-1]["loss"] < 0.45 and records[-1]["rewards/margins"] > 0.1
    assert {"outcome/pairs", "process/rewards/margins", "eval_kl"} <= set(records[-1])
    assert (tmp_path / "cache").exists() == (reference == "stored")


@pytest.mark.parametrize(
    ("loss", "rows", "wanted"),
    [
        ("kto", tiny.PAIRS, "srpo.loss=kto takes rows of prompt, completion, label: "),
        ("hinge", tiny.UNPAIRED, "srpo.loss=hinge takes rows of prompt, chosen, rejected: "),
        ("hinge", [r | {"noise": 0.1} for r in tiny.PAIRS], "srpo.loss=hinge has no label smooth"),
        ("robust", tiny.PAIRS, "srpo.loss=robust needs srpo.label_smoothing above 0 or rows with"),
    ],
)
def test_rows_for_another_loss_are_refused(loss, rows, wanted, tmp_path, capsys):
    file = tiny.write_rows(tmp_path / "rows.jsonl", json.loads(json.dumps(rows)))
    options = (f"--srpo.loss={loss}", f"--data.train={file}")
    assert train.main(tiny.arguments("srpo", tmp_path / "out", *options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {wanted}")
