"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the line a person watches."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saro_jax.config import Config, dump
from saro_jax.parallel import distributed


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed
        if record["step"] > step:
            break
        kept.append(line + "\n")
    partial = path.with_suffix(".part")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def check(config: Config) -> None:
    """Refuse, before anything is loaded, what the writer could not do."""
    if config.train.wandb is not None:
        try:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"train.wandb={config.train.wandb}: the package wandb is not installed"
            ) from error


class Writer:
    """Where one run's metrics go; a resource: `close` flushes all of them.

    Of several processes the first writes, and the others' writers do nothing.
    """

    def __init__(self, out: Path, config: Config, stage: str, *, start: int, steps: int):
        self._file: Any = None
        if not distributed.writes():
            return
        truncate_after(out / "metrics.jsonl", start)
        self._file = open(out / "metrics.jsonl", "a")  # noqa: SIM115 (closed by close)
        self._board: Any = None
        self._wandb: Any = None
        if config.train.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        if config.train.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]  (optional)

            self._wandb = wandb.init(
                project=config.train.wandb, name=out.name, config={"yaml": dump(config)}
            )
        self._stage, self._steps = stage, steps
        self._bar = (
            tqdm(total=steps, initial=start, desc=stage, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._started, self._start = time.monotonic(), start

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record; every value a finite or non-finite float, written as JSON (NaN as null)."""
        if self._file is None:
            return
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        # Where a step has no value (a kind of pairs that it does not hold) the curves have a gap.
        known = {name: value for name, value in clean.items() if value is not None}
        for name, value in known.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def show(self, step: int, values: dict[str, float]) -> None:
        """The watched line: loss, margin where there is one, speed, time left."""
        if self._file is None:
            return
        parts = [f"loss {values['loss']:.4f}"]
        if "rewards/margins" in values:
            parts.append(f"margin {values['rewards/margins']:.3f}")
        if math.isfinite(values["tokens_per_second"]):
            parts.append(f"{values['tokens_per_second']:.0f} tokens/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        done = max(1, step - self._start)
        left = (time.monotonic() - self._started) / done * (self._steps - step)
        print(
            f"{self._stage} step {step}/{self._steps}: {', '.join(parts)}, "
            f"{int(left // 60)}:{int(left % 60):02d} left",
            flush=True,
        )

    def close(self) -> None:
        if self._file is None:
            return
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()
