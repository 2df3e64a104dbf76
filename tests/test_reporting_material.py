"""What a report is made from is found below the folders, joined, and refused where it clashes."""

import json
from pathlib import Path

import pytest
import report_folders

from saro_jax.evaluation import results as evaluations
from saro_jax.reporting import material


@pytest.fixture(scope="module")
def made():
    return report_folders.transcripts(("base", "rw"), 30)


def test_runs_below_a_folder_are_found(tmp_path: Path, made):
    report_folders.write_evaluation(tmp_path / "a" / "eval", made)
    report_folders.write_training(tmp_path / "a" / "srpo", "srpo", steps=4)
    report_folders.write_analysis(tmp_path / "b", ("base",), layers=2)
    (tmp_path / "a" / "srpo" / "checkpoints" / "x").mkdir(parents=True)
    (tmp_path / "a" / "srpo" / "checkpoints" / "metrics.jsonl").write_text("no run")
    found = material.gather([tmp_path, tmp_path / "b"])  # the second one is below the first
    assert [s.what for s in found.sources] == ["evaluation", "training", "analysis"]
    assert len(found.transcripts) == len(made)
    assert found.evaluation is not None and found.analysis is not None
    assert [(run.name, run.stage) for run in found.training] == [("srpo", "srpo")]
    assert found.training[0].kinds("rewards/margins") == ["OP1", "PPA", "PPG"]
    assert len(found.training[0].series("loss")) == 4
    assert material.settings(found.sources[1]) == {"train": {"seed": 0}}


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    for one in ("x", "y"):
        report_folders.write_training(tmp_path / one / "srpo", "srpo", steps=2)
    names = [run.name for run in material.gather([tmp_path]).training]
    assert names == ["x/srpo", "y/srpo"]


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_named(tmp_path: Path):
    report_folders.write_training(tmp_path / "rw", "rw", steps=3)
    file = tmp_path / "rw" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "lo')
    assert len(material.read_training(tmp_path / "rw").lines) == 3
    file.write_text('{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
        material.read_training(tmp_path / "rw")


def test_folders_without_anything_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        material.gather([tmp_path / "none"])
    with pytest.raises(ValueError, match="nothing to report"):
        material.gather([tmp_path])


def test_evaluations_of_two_folders_are_joined(tmp_path: Path, made):
    for name in ("base", "rw"):
        mine = [one for one in made if one.model == name]
        report_folders.write_evaluation(tmp_path / name, mine)
    joined = material.gather([tmp_path / "rw", tmp_path / "base"]).evaluation
    assert joined is not None
    assert joined.baseline == "rw"
    assert [model.name for model in joined.models] == ["rw", "base"]
    assert len(joined.benchmarks) == len(report_folders.BENCHMARKS)


def test_the_same_rates_twice_and_two_models_of_one_name_are_refused(tmp_path: Path, made):
    for name in ("one", "two"):
        report_folders.write_evaluation(tmp_path / name, made)
    with pytest.raises(ValueError, match=r"two: base on xstest \(auto\) is in .*one too"):
        material.gather([tmp_path])
    results = evaluations.read_results(tmp_path / "two")
    other = results.models[0].model_copy(update={"sha": "f" * 64})
    changed = results.model_copy(update={"models": (other, *results.models[1:])})
    evaluations.write_results(tmp_path / "two", changed)
    with pytest.raises(ValueError, match="two: model 'base' is another one than in"):
        material.gather([tmp_path])


def test_a_broken_results_file_is_named(tmp_path: Path):
    (tmp_path / "results.json").write_text(json.dumps({"models": 3}))
    with pytest.raises(ValueError, match=r"results\.json: models"):
        material.gather([tmp_path])
