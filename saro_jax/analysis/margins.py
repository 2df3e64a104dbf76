"""Margins: how preference pairs of each kind fare, along a training run and under checkpoints."""

import json
from pathlib import Path
from typing import Any

from saro_jax.analysis.results import Margin

FILE = "metrics.jsonl"
ALL = "all"  # the kind that stands for pairs of every kind
SUFFIX = "rewards/margins"


def of_run(model: str, folder: Path) -> list[Margin]:
    """The curves that an SRPO run has logged, by step and kind (`all`: of every kind together).

    ValueError, in one line, where the folder holds no such run.
    """
    file = folder / FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # the line that is being written
            raise ValueError(f"{file}:{number}: not a line of metrics") from None
        kinds = [name.removesuffix(SUFFIX).rstrip("/") for name in record if name.endswith(SUFFIX)]
        for kind in kinds:
            prefix = f"{kind}/" if kind else ""
            if record[f"{prefix}{SUFFIX}"] is None:
                continue  # a step without pairs of this kind
            pairs = record.get(f"{prefix}pairs")
            values: dict[str, Any] = {
                "margin": record[f"{prefix}{SUFFIX}"],
                "accuracy": record.get(f"{prefix}rewards/accuracies"),
                "chosen": record.get(f"{prefix}logps/chosen"),
                "rejected": record.get(f"{prefix}logps/rejected"),
                "n": None if pairs is None else round(pairs),
            }
            found.append(Margin(model=model, kind=kind or ALL, step=step, **values))
    if not found:
        raise ValueError(f"{file}: no reward margins in it; a run of --stage=srpo logs them")
    return found
