"""The notebooks: every cell runs, in miniature, on the tiny model."""

import json
from pathlib import Path

import jax
import pytest
import tiny

from saro_jax.config import load

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture
def optimized():
    """Programs as users compile them; without optimizations the first margin is 3e-6, not 0."""
    tiny.folder()  # which turns them off
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_quickstart_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny.folder() / "model"
    small = ["--train.steps=2", "--train.batch_rows=2", "--model.dtype=float32"]
    small += ["--data.max_length=1024", "--train.tensorboard=false", "--srpo.reference_cache=refs"]
    cells = json.loads((NOTEBOOKS / "quickstart.ipynb").read_text())["cells"]
    scope: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in source:
            continue
        source = source.replace("--model=quickstart", f"--model={model}")
        if source.startswith("SETTINGS"):
            source = f"SETTINGS = {small!r}"
        if "--stage=rw" in source:
            source = source.replace("*SETTINGS", f"'--model.path={model}', *SETTINGS")
        exec(compile(source, "notebook", "exec"), scope)
    assert len(scope["margins"]) == 2 and scope["margins"][0] == 0.0
    # SRPO starts from the warmup that the notebook trained.
    assert "starting from runs/notebook/rw/model" in capsys.readouterr().out


def test_the_settings_of_colab_tpu_lora_fit_its_recipe():
    cells = json.loads((NOTEBOOKS / "colab_tpu_lora.ipynb").read_text())["cells"]
    scope: dict = {}
    (source,) = ["".join(c["source"]) for c in cells if "SETTINGS = " in "".join(c["source"])]
    exec(source, scope)
    for stage in ("rw", "srpo"):
        config = load(scope["RECIPE"], scope["SETTINGS"], stage)
        assert config.lora.rank and config.data.row_length == 4 * config.data.max_length
    # The recipe is for the model that the notebook names.
    assert load(scope["RECIPE"], [], "rw").model.path == scope["MODEL"]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_colab_tpu_lora_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny.folder() / "model"
    small = ["--train.steps=2", "--train.batch_rows=2", "--model.dtype=float32", "--lora.rank=2"]
    small += ["--data.max_length=1024", "--train.tensorboard=false", "--srpo.reference_cache=refs"]
    cells = json.loads((NOTEBOOKS / "colab_tpu_lora.ipynb").read_text())["cells"]
    scope: dict = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in source:
            continue
        exec(compile(source, "notebook", "exec"), scope)
        if "SETTINGS = " in source:
            scope |= {"MODEL": str(model), "SETTINGS": small}
    assert len(scope["margins"]) == 2 and scope["margins"][0] == 0.0
    # SRPO starts from the warmup, which the adapters were merged into, and has adapters of its own.
    assert "starting from runs/colab/rw/model" in capsys.readouterr().out
    assert (tmp_path / "runs/colab/srpo/adapter").is_dir()
