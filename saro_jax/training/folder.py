"""Owns the output folder of a run: claimed for one config, so that no two runs mix in it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
        elif _trained(before, others) == _trained(text, others):
            if before != text:  # an earlier version wrote what other stages read in another way
                _write_config(file, text)
        elif _trained(before, others, work=True) == _trained(text, others, work=True):
            print("goes on with another mesh or train.micro_rows than it began with", flush=True)
            _write_config(file, text)
        else:
            there, now = (dict(_settings(_trained(one, others))) for one in (before, text))
            changed = next(
                f"{name}={there.get(name)} there, {now.get(name)} now"
                for name in (*now, *there)
                if there.get(name) != now.get(name)
            )
            raise ValueError(f"{file}: this folder holds a run with another config: {changed}")
        return not (out / "model").is_dir()
    if out.exists() and {path.name for path in out.iterdir()} - {"provenance.json", ".config.yaml"}:
        raise ValueError(f"{out}: the output folder is not empty and holds no run; choose another")
    out.mkdir(parents=True, exist_ok=True)
    (out / "provenance.json").write_text(json.dumps(configuration.provenance(), indent=2) + "\n")
    _write_config(file, text)
    return True


def _trained(text: str, others: Iterable[str], *, work: bool = False) -> dict[str, Any]:
    """The stage, and what training reads, of a text of config.yaml.

    With `work` without what cuts up the work and is not the work itself: the machine that goes on
    need not be the one that began.
    """
    stage = text.partition("\n")[0].removeprefix("# stage: ")
    tree = {"stage": stage, **yaml.safe_load(text)}
    for name in (*others, *(("mesh",) if work else ())):
        tree.pop(name, None)
    if work:
        tree["train"] = {k: v for k, v in tree["train"].items() if k != "micro_rows"}
    return tree


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(a.b, value) of each setting of a tree."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _write_config(file: Path, text: str) -> None:
    partial = file.with_name(".config.yaml")
    partial.write_text(text)
    os.replace(partial, file)
