"""The training loop: steps from a Grain iterator until the end, a signal or a fault."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from saro_jax.config import Config
from saro_jax.data.packing import Rows
from saro_jax.data.tokenise import Item
from saro_jax.parallel import sharding
from saro_jax.training.checkpoint import Checkpoints, iterator_state
from saro_jax.training.metrics import Writer
from saro_jax.training.optimizer import adapter_ratio
from saro_jax.training.scoring import put
from saro_jax.training.step import Programs, State

PER_TOKEN = {"correct": "mean_token_accuracy", "entropy": "entropy"}


class Signalled:
    """Which signal asked the run to stop; 0 = none."""

    number = 0


@contextmanager
def stop_signals() -> Iterator[Signalled]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one is the default again."""
    seen = Signalled()

    def note(number, _):
        seen.number = number
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def sequence_tokens(item: Item) -> int:
    """Tokens of all branches with their prefix, as an unshared layout would count them."""
    return sum(len(item.prefix) + len(branch.ids) for branch in item.branches)


def step_total(stage: str, blocks: Sequence[Rows]) -> float:
    """What a step's loss is divided by: the weight of its scored tokens (rw) or pairs (srpo)."""
    if stage == "srpo":
        return float(sum(block.weight.sum() for block in blocks))
    weights = (np.take_along_axis(block.weight, block.sequence, axis=1) for block in blocks)
    return float(sum((w * block.valid).sum() for w, block in zip(weights, blocks, strict=True)))


def summarise(stage: str, blocks: list[dict[str, Any]]) -> dict[str, float]:
    """The sums of a step's blocks as means, under TRL's names."""
    sums = {name: float(sum(block[name] for block in blocks)) for name in blocks[0]}
    count = sums.pop("pairs", 0.0)
    scored = sums.pop("scored")
    out = {"loss": sums.pop("loss")}
    for name, value in sums.items():
        if name in PER_TOKEN:
            out[PER_TOKEN[name]] = value / max(scored, 1.0)
        else:
            out[name] = value / max(count, 1.0)
    return out


def reference_of(block: Rows, reference: np.ndarray | None) -> np.ndarray:
    """Reference log-probs of a block's slots, float32 [B, P, 2]; zeros where there are none."""
    if reference is None:
        return np.zeros((*block.item.shape, 2), np.float32)
    return np.where(block.item[..., None] >= 0, reference[block.item], 0.0).astype(np.float32)


def run_blocks(
    mesh: Mesh,
    stage: str,
    blocks: Sequence[Rows],
    reference: np.ndarray | None,
    call: Callable[[Rows, jax.Array, np.float32], Any],
) -> list[Any]:
    """`call` on every block of a step, put on the devices, with the step's total."""
    total = step_total(stage, blocks)
    if total <= 0:
        raise ValueError("a step has no weight: every row in it has weight 0 or no scored token")
    results = []
    for block in blocks:
        ref = jax.device_put(reference_of(block, reference), sharding.rows(mesh))
        results.append(call(put(mesh, block), ref, np.float32(total)))
    return results


class Gradients:
    """The gradient of a step, summed up block by block in one set of buffers."""

    def __init__(self, programs: Programs, params: Any, frozen: Any = None, step: int = 0):
        self._programs, self._params, self._frozen = programs, params, frozen
        self._step, self._block = step, 0
        self.sum = programs.zeros(params)

    def add(self, rows: Rows, reference: jax.Array, total: np.float32) -> Any:
        """Add one block; returns its sums for the metrics."""
        draw = np.array([self._step, self._block], np.int32)
        self.sum, sums = self._programs.accumulate(
            self._params, self.sum, rows, reference, total, self._frozen, draw
        )
        self._block += 1
        return sums


def evaluate(
    programs: Programs,
    mesh: Mesh,
    stage: str,
    params,
    blocks: Sequence[Rows],
    reference,
    frozen=None,
) -> dict[str, float]:
    """Means over all blocks of an evaluation set, with the prefix `eval_`."""
    sums = run_blocks(
        mesh, stage, blocks, reference, lambda *args: programs.evaluate(params, *args, frozen)
    )
    means = summarise(stage, jax.device_get(sums))
    return {f"eval_{name}": value for name, value in means.items()}


def fit(
    *,
    programs: Programs,
    mesh: Mesh,
    stage: str,
    config: Config,
    state: State,
    iterator: Any,
    items: Sequence[Item],
    reference: np.ndarray | None,
    steps: int,
    schedule: Callable[[int], Any],
    checkpoints: Checkpoints,
    writer: Writer,
    evaluation: tuple[list[Rows], np.ndarray | None] | None = None,
    tokens_before: int = 0,
    window_before: Sequence[dict[str, float]] = (),
    frozen: Any = None,
    base: str | None = None,
) -> tuple[State, int]:
    """Train to `steps`; returns the state and the signal that ended it early (0 = ran to the end).

    `frozen`: the leaves that are only read, not in checkpoints; `base`: the hash of the weights
    they come from, which is.

    The metrics of step n - 1 are fetched when step n is under way. A loss that is not a number
    stops the run with an error and without a checkpoint of that state.
    """
    per_epoch = len(items) / config.train.batch_rows
    num_tokens, started = tokens_before, time.monotonic()
    step = int(state.step)
    window = list(window_before)  # steps since the last line that was written
    window_tokens = 0
    pending: tuple[int, list[Any], Any, int] | None = None
    ratio = adapter_ratio(config.optimizer, config.lora)

    def flush(extra: dict[str, float] | None = None) -> None:
        nonlocal started, window_tokens, num_tokens, pending
        if pending is None:
            return
        at, sums, norm, tokens = pending
        pending = None
        values = summarise(stage, jax.device_get(sums))
        values["grad_norm"] = float(norm["grad_norm"])
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                raise ValueError(
                    f"step {at}: {name} is {values[name]}; lower optimizer.learning_rate or look "
                    "at the rows of this step"
                )
        num_tokens += tokens
        window_tokens += tokens
        window.append(values)
        if at % config.train.log_every == 0 or at == steps or extra:
            means = {name: float(np.mean([v[name] for v in window])) for name in window[0]}
            now = time.monotonic()
            means |= {
                "learning_rate": float(schedule(at - 1)),
                **({} if ratio == 1.0 else {"lora_learning_rate": ratio * float(schedule(at - 1))}),
                "epoch": at / per_epoch,
                "num_tokens": num_tokens,
                "tokens_per_second": window_tokens / max(now - started, 1e-9),
            }
            writer.write(at, means | (extra or {}))
            writer.show(at, means)
            window.clear()
            started, window_tokens = now, 0

    def save() -> None:
        flush()
        data = {
            "iterator": iterator_state(iterator),
            "num_tokens": num_tokens,
            "window": window,
            "config": config.model_dump(mode="json"),
        } | ({} if base is None else {"base": base})
        checkpoints.save(step, state, data)

    with jax.set_mesh(mesh), stop_signals() as signalled:
        while step < steps and not signalled.number:
            blocks = next(iterator)
            gradients = Gradients(programs, state.params, frozen, step)
            sums = run_blocks(mesh, stage, blocks, reference, gradients.add)
            state, norm = programs.update(state, gradients.sum)
            tokens = sum(
                sequence_tokens(items[i]) for block in blocks for i in block.item[block.item >= 0]
            )
            flush()
            step += 1
            pending = step, sums, norm, tokens
            if evaluation and (step == steps or _due(step, config.train.eval_every)):
                eval_blocks, eval_reference = evaluation
                found = evaluate(
                    programs, mesh, stage, state.params, eval_blocks, eval_reference, frozen
                )
                flush(found)
            if step == steps or step % config.train.save_every == 0:
                save()
        if signalled.number and step:
            save()  # whenever the signal came; a step that is saved already stays as it is
    return state, 0 if step == steps else signalled.number
