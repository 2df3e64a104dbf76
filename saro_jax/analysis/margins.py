"""Margins: how preference pairs of each kind fare, along a training run and under checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saro_jax.analysis.results import Margin
from saro_jax.records import Part, Text

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


class Scored(Part):
    """Log-probs that a model gives to the two branches of a pair."""

    model: Text
    id: Text
    kind: Text
    chosen: float
    rejected: float


def of_checkpoints(scored: Sequence[Scored], reference: str, beta: float) -> list[Margin]:
    """Rewards of each model over the reference, beta (log p - log p of the reference), by kind.

    Pairs that not all models have scored are left out; a tie is half right. The reference itself
    has margin 0, and its log-probs are where the others began.
    """
    by: dict[str, dict[str, Scored]] = {}
    for one in scored:
        by.setdefault(one.model, {})[one.id] = one
    if reference not in by:
        return []
    common = [i for i in by[reference] if all(i in mine for mine in by.values())]
    kinds = dict.fromkeys(by[reference][i].kind for i in common)
    found = []
    for model, mine in by.items():
        for kind in (ALL, *kinds):
            ids = [i for i in common if kind in (ALL, mine[i].kind)]
            if not ids:
                continue
            chosen = np.array([mine[i].chosen for i in ids])
            rejected = np.array([mine[i].rejected for i in ids])
            base = np.array([by[reference][i].chosen - by[reference][i].rejected for i in ids])
            margin = beta * (chosen - rejected - base)
            found.append(
                Margin(
                    model=model,
                    kind=kind,
                    margin=float(margin.mean()),
                    accuracy=float(((margin > 0) + 0.5 * (margin == 0)).mean()),
                    chosen=float(chosen.mean()),
                    rejected=float(rejected.mean()),
                    n=len(ids),
                )
            )
    return found
