"""Metrics: whole lines of JSON, cut back at a resume, and one line for the person who watches."""

import json
import sys

import pytest

from saro_jax.config import Config
from saro_jax.training.metrics import Writer, truncate_after

VALUES = {"loss": 0.5, "rewards/margins": 0.25, "tokens_per_second": 1000.0}


def config(**train):
    return Config.model_validate({"data": {"train": "x"}, "train": {"tensorboard": False} | train})


def writer(out, start=0, steps=10, **train):
    out.mkdir(exist_ok=True)
    return Writer(out, config(**train), "srpo", start=start, steps=steps)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_records_are_json_lines_and_nan_is_null(tmp_path):
    one = writer(tmp_path)
    one.write(1, VALUES)
    assert lines(tmp_path) == [{"step": 1, **VALUES}], "each line is flushed as it is written"
    one.write(2, VALUES | {"loss": float("nan"), "entropy": float("inf")})
    one.close()
    assert lines(tmp_path)[1] == {"step": 2, **VALUES, "loss": None, "entropy": None}


def test_a_resumed_writer_drops_what_will_be_written_again(tmp_path):
    one = writer(tmp_path)
    for k in (1, 2, 3, 4):
        one.write(k, VALUES)
    one.close()
    two = writer(tmp_path, start=2)
    two.write(3, VALUES)
    two.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    truncate_after(file, 5)
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'
    truncate_after(tmp_path / "none.jsonl", 5)
    assert not (tmp_path / "none.jsonl").exists()


def test_tensorboard_gets_every_value(tmp_path):
    one = writer(tmp_path, tensorboard=True)
    one.write(1, VALUES)
    one.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert all(name.encode() in events.read_bytes() for name in VALUES)
    other = tmp_path / "other"
    writer(other).close()
    assert not (other / "tensorboard").exists()


def test_the_watched_line(tmp_path, capsys):
    one = writer(tmp_path)
    one.show(5, VALUES)
    one.close()
    out = capsys.readouterr().out
    assert out.startswith("srpo step 5/10: loss 0.5000, margin 0.250, 1000 tokens/s, 0:00 left")
    one = writer(tmp_path)
    one.show(5, {"loss": 1.0, "tokens_per_second": 1.0})
    one.close()
    assert "margin" not in capsys.readouterr().out


def test_weights_and_biases_gets_the_records(tmp_path, monkeypatch):
    class Stub:
        """Stands for the package and for the run it gives."""

        def __init__(self):
            self.calls = []

        def init(self, **options):
            self.calls.append(("init", options["project"], options["name"]))
            assert "wandb: lab" in options["config"]["yaml"]
            return self

        def log(self, values, step):
            self.calls.append((step, values))

        def finish(self):
            self.calls.append("finish")

    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    out = tmp_path / "run"
    one = writer(out, wandb="lab")
    one.write(1, VALUES)
    one.close()
    assert stub.calls == [("init", "lab", "run"), (1, VALUES), "finish"]


@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_a_missing_wandb_is_said_before_anything_is_loaded(stage, tmp_path, capsys, monkeypatch):
    import tiny

    from saro_jax import train

    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "out"
    assert train.main(tiny.arguments(stage, out, "--train.wandb=lab")) == 2
    said = capsys.readouterr()
    assert said.err == "error: train.wandb=lab: the package wandb is not installed\n"
    assert not out.exists()
