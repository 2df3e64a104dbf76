"""Tests analysis/margins.py: the curves of a run as its metrics have them."""

from pathlib import Path

import pytest
import tiny

from saro_jax.analysis import margins


def line(step: int, margin: float | None, kind: float | None) -> dict:
    return {
        "step": step,
        "loss": 0.5,
        "rewards/margins": margin,
        "rewards/accuracies": 0.75,
        "logps/chosen": -10.0,
        "logps/rejected": -12.0,
        "OP1/rewards/margins": kind,
        "OP1/rewards/accuracies": 1.0,
        "OP1/logps/chosen": -8.0,
        "OP1/logps/rejected": -9.0,
        "OP1/pairs": 3.0,
    }


def test_curves_by_kind(tmp_path: Path):
    tiny.write_rows(tmp_path / "metrics.jsonl", [line(1, 0.1, None), line(2, 0.2, 0.3)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')  # is being written
    found = margins.of_run("srpo", tmp_path)
    assert [(one.kind, one.step, one.margin) for one in found] == [
        ("all", 1, 0.1),
        ("all", 2, 0.2),
        ("OP1", 2, 0.3),
    ]
    assert (found[2].accuracy, found[2].chosen, found[2].rejected, found[2].n) == (1.0, -8, -9, 3)
    assert found[0].n is None and found[0].accuracy == 0.75


def test_what_is_no_srpo_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"metrics.jsonl: cannot be read"):
        margins.of_run("a", tmp_path)
    tiny.write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="no reward margins"):
        margins.of_run("a", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a line of metrics"):
        margins.of_run("a", tmp_path)


def test_a_real_run_has_curves(tmp_path: Path):
    from saro_jax import train

    assert train.main(tiny.arguments("srpo", tmp_path / "run")) == 0
    found = margins.of_run("srpo", tmp_path / "run")
    assert {one.kind for one in found} >= {"all"}
    records = tiny.metrics(tmp_path / "run")
    want = [one["rewards/margins"] for one in records]
    assert [one.margin for one in found if one.kind == "all"] == want


def test_margins_of_checkpoints_by_hand():
    def one(model: str, i: int, kind: str, chosen: float, rejected: float) -> margins.Scored:
        return margins.Scored(model=model, id=f"p{i}", kind=kind, chosen=chosen, rejected=rejected)

    scored = [
        one("base", 0, "OP1", -10, -9),
        one("base", 1, "OP1", -20, -18),
        one("base", 2, "PPA", -5, -5),
        one("base", 3, "PPA", -5, -5),
        one("srpo", 0, "OP1", -12, -15),  # the margin grows while both fall
        one("srpo", 1, "OP1", -21, -18),
        one("srpo", 2, "PPA", -5, -5),
    ]
    found = {(o.model, o.kind): o for o in margins.of_checkpoints(scored, "base", 0.1)}
    assert found.keys() == {(m, k) for m in ("base", "srpo") for k in ("all", "OP1", "PPA")}
    assert found["base", "all"].margin == 0 and found["base", "all"].accuracy == 0.5
    op = found["srpo", "OP1"]
    assert op.margin == pytest.approx(0.1 * (4 - 1) / 2)  # 3 - (-1) and -3 - (-2)
    assert (op.accuracy, op.chosen, op.rejected, op.n) == (0.5, -16.5, -16.5, 2)
    assert found["srpo", "PPA"].accuracy == 0.5 and found["srpo", "PPA"].n == 1
    assert found["srpo", "all"].n == 3
    assert margins.of_checkpoints(scored[4:], "base", 0.1) == []
