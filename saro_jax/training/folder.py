"""Owns the output folder of a run: claimed for one config, so that no two runs mix in it."""

import json
import os
from pathlib import Path

import yaml

from saro_jax import config as configuration
from saro_jax.config import Config


def claim(config: Config, stage: str, out: Path) -> bool:
    """Take `out` for this config; False where the run in it is complete already."""
    # What other stages read: a change of it does not make this another run.
    others = set(configuration.sections()) - set(configuration.TRAINING)
    defaults = {name: configuration.sections()[name]() for name in others}
    config = config.model_copy(update=defaults)
    text = f"# stage: {stage}\n{configuration.dump(config)}"
    file = out / "config.yaml"
    if file.exists():
        before = file.read_text()
        # Until something is saved, a run that failed (rows rejected, say) may be given again.
        if before != text and not any((out / "checkpoints").glob("[0-9]*")):
            _write_config(file, text)
        elif before != text and _same_run(before, text):
            print("goes on with another mesh or train.micro_rows than it began with", flush=True)
            _write_config(file, text)
        elif before != text:
            changed = next(
                (
                    f"{a!r} there, {b!r} now"
                    for a, b in zip(*map(_lines, (before, text)), strict=False)
                    if a != b
                ),
                "another length",
            )
            raise ValueError(f"{file}: this folder holds a run with another config: {changed}")
        return not (out / "model").is_dir()
    if out.exists() and {path.name for path in out.iterdir()} - {"provenance.json", ".config.yaml"}:
        raise ValueError(f"{out}: the output folder is not empty and holds no run; choose another")
    out.mkdir(parents=True, exist_ok=True)
    (out / "provenance.json").write_text(json.dumps(configuration.provenance(), indent=2) + "\n")
    _write_config(file, text)
    return True


def _same_run(before: str, now: str) -> bool:
    """Whether two texts of config.yaml differ only in what cuts up the work and not in the work.

    The machine that goes on need not be the one that began.
    """
    stages = {text.partition("\n")[0] for text in (before, now)}
    trees = [yaml.safe_load(text) for text in (before, now)]
    for tree in trees:
        tree.pop("mesh", None)
        tree.get("train", {}).pop("micro_rows", None)
    return len(stages) == 1 and trees[0] == trees[1]


def _write_config(file: Path, text: str) -> None:
    partial = file.with_name(".config.yaml")
    partial.write_text(text)
    os.replace(partial, file)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]
