"""The notebooks: every cell runs, in miniature, on the tiny model."""

import json
from pathlib import Path

import tiny

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


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
