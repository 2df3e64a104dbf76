"""The training loop: steps from a Grain iterator until the end, a signal or a fault."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from saro_jax.config import DROP_WINDOW, Config
from saro_jax.data.packing import Rows, laid_out_length, scored_tokens
from saro_jax.data.tokenise import Item
from saro_jax.objectives import kto
from saro_jax.objectives.preference import REFERENCE_FREE, SEGMENTS
from saro_jax.parallel import distributed, sharding
from saro_jax.training import mismatch
from saro_jax.training.checkpoint import Checkpoints, abstract, iterator_state
from saro_jax.training.metrics import Writer
from saro_jax.training.mismatch import Mismatches
from saro_jax.training.optimizer import adapter_ratio
from saro_jax.training.scoring import put
from saro_jax.training.step import Given, Programs, State
from saro_jax.training.watch import Watch

PER_TOKEN = {"correct": "mean_token_accuracy", "entropy": "entropy"}
# What is also given of each kind of pair, as KIND/NAME.
PER_KIND = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


class Evaluation(NamedTuple):
    """A packed evaluation set, and by item: reference log-probs [n, K, G], number of the kind.

    items: those of the blocks, where a process holds its own rows of them only.
    """

    blocks: list[Rows]
    reference: np.ndarray | None
    kind: np.ndarray | None = None
    mismatches: Mismatches | None = None
    items: Sequence[Item] | None = None


# The metrics of what the model (step, trained leaves) answers; calls `look` now and then, which
# raises `Cut`.
Answers = Callable[[int, Any, Callable[[], None]], dict[str, float]]


class Cut(Exception):
    """A signal came in the middle of an evaluation or of answers."""


class Fallen(Exception):
    """The chosen log-probs fell too far; `step` is where it was seen."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


@contextmanager
def stop_signals() -> Iterator[distributed.Seen]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one is the default again.

    In a run of several processes they are noted all the time, and all stop at one point.
    """
    if distributed.several():
        yield distributed.seen
        return
    seen = distributed.Seen()

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


def packing_efficiency(blocks: Sequence[Rows], items: Sequence[Item], layout: str) -> float:
    """Share of the computed tokens of a step that are no padding."""
    real = sum(laid_out_length(items[i], layout) for i in _indices(blocks))
    return real / sum(block.tokens.size for block in blocks)


def _indices(blocks: Sequence[Rows]) -> Iterator[int]:
    """The items of the blocks, those in the rows of other processes too."""
    return (int(i) for block in blocks for i in block.item[block.item >= 0])


def step_total(stage: str, blocks: Sequence[Rows], items: Sequence[Item] | None = None) -> float:
    """What a step's loss is divided by: the weight of its scored tokens (rw) or pairs (srpo).

    items: those of the blocks; without them the blocks have to hold all their rows.
    """
    if stage == "srpo":
        return float(sum(block.weight.sum() for block in blocks))
    if items is not None:
        return float(sum(items[i].weight * scored_tokens(items[i]) for i in _indices(blocks)))
    weights = (np.take_along_axis(block.weight, block.sequence, axis=1) for block in blocks)
    return float(sum((w * block.valid).sum() for w, block in zip(weights, blocks, strict=True)))


def summarise(
    stage: str, blocks: list[dict[str, Any]], kinds: Sequence[str] = ()
) -> dict[str, float]:
    """The sums of a step's blocks as means, under TRL's names; NaN where nothing was counted."""
    sums = {
        name: np.sum([np.asarray(block[name], np.float64) for block in blocks], axis=0)
        for name in blocks[0]
    }
    scored = float(sums.pop("scored"))
    out = {"loss": float(sums.pop("loss"))}
    per_token = {name: sums.pop(name) for name in PER_TOKEN if name in sums}
    for number, kind in enumerate(("", *kinds)):
        means = {name: _mean(*value[number]) for name, value in sums.items()}
        if stage == "srpo" and "rewards/margins" not in means:  # unpaired rows
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        if number == 0:
            out |= means
            continue
        out |= {f"{kind}/{name}": means[name] for name in PER_KIND if name in means}
        counted = [sums["logps/chosen"][number][1]]
        if "rewards/margins" not in sums:
            counted.append(sums["logps/rejected"][number][1])
        out[f"{kind}/pairs"] = float(sum(counted))
    for name, value in per_token.items():
        out[PER_TOKEN[name]] = float(value) / max(scored, 1.0)
    return out


def _mean(total: float, count: float) -> float:
    return float(total / count) if count else float("nan")


def window_means(window: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the steps since the last line, a kind's by its pairs; NaN where there is none."""
    means = {}
    for name in window[0]:
        kind = name.rsplit("/", 2)[0]
        pairs = f"{kind}/pairs"
        by_pairs = pairs in window[0] and name != pairs
        known = [
            (step[name], step[pairs] if by_pairs else 1.0)
            for step in window
            if not by_pairs or step[pairs]
        ]
        known = [(value, weight) for value, weight in known if not np.isnan(value)]
        total = sum(weight for _, weight in known)
        means[name] = float(sum(v * w for v, w in known) / total) if known else float("nan")
    return means


def fallen(recent: Sequence[Sequence[float]], limit: float) -> bool:
    """Whether the chosen log-probs fell by more than `limit` nats while the margins grew.

    recent: (mean log-ratio of the chosen branches in nats, mean reward margin) of the latest steps.
    The means of the last DROP_WINDOW steps count, against those of as many before (before the first
    step the margin is 0), so that no single step decides.
    """
    now, before = recent[-DROP_WINDOW:], recent[-2 * DROP_WINDOW : -DROP_WINDOW]
    if len(now) < DROP_WINDOW:
        return False
    earlier = float(np.mean([margin for _, margin in before])) if before else 0.0
    ratio, margin = np.mean(now, axis=0)
    return bool(-ratio > limit and margin > earlier)


def ready_at(results: Any) -> float:
    """When the results are there, by time.monotonic; waits for them."""
    jax.block_until_ready(results)
    return time.monotonic()


def reference_of(block: Rows, reference: np.ndarray | None) -> np.ndarray:
    """Reference log-probs of a block's slots, float32 [B, P, K, G]; zeros where there are none."""
    if reference is None:
        return np.zeros((*block.item.shape, 2, SEGMENTS), np.float32)
    present = (block.item >= 0)[..., None, None]
    return np.where(present, reference[block.item], 0.0).astype(np.float32)


def run_blocks(
    mesh: Mesh,
    stage: str,
    blocks: Sequence[Rows],
    reference: np.ndarray | None,
    call: Callable[[Rows, Given, np.float32], Any],
    *,
    kind: np.ndarray | None = None,
    score: Callable[[Rows], jax.Array] | None = None,
    baseline: jax.Array | float = 0.0,
    items: Sequence[Item] | None = None,
) -> list[Any]:
    """`call` on every block of a step, put on the devices, with the step's total.

    reference: by item; or score: the resident reference's log-probs of a block. kind: by item.
    items: those of the blocks (`step_total`).
    """
    total = step_total(stage, blocks, items)
    if total <= 0:
        raise ValueError("a step has no weight: every row in it has weight 0 or no scored token")
    z0: Any = np.float32(baseline) if isinstance(baseline, float) else baseline
    results = []
    for block in blocks:
        rows = put(mesh, block)
        place = sharding.rows(mesh)
        kinds = np.zeros_like(block.item) if kind is None else kind[block.item]
        given = Given(
            score(rows) if score else distributed.place(reference_of(block, reference), place),
            distributed.place(np.where(block.item >= 0, kinds, 0).astype(np.int32), place),
            z0,
        )
        results.append(call(rows, given, np.float32(total)))
    return results


def one_program() -> bool:
    """Whether a step of one block runs as `Programs.whole`.

    Not on a CPU: there it saves nothing, and each row length would be compiled twice.
    """
    return jax.default_backend() != "cpu"


def kto_baseline(
    programs: Programs,
    mesh: Mesh,
    params: Any,
    frozen: Any,
    resident: Any,
    blocks: Sequence[Rows],
    mismatches: Mismatches,
) -> jax.Array:
    """KTO's z0 of a step, from forward passes alone; a scalar that stays on the device."""
    own = distributed.own_rows(sharding.rows(mesh), len(blocks[0].item))
    packed, reference = mismatch.of_step(mismatches, blocks, own)
    total: Any = 0.0
    for block in packed:
        rows = put(mesh, block)
        if reference is None:
            before = programs.score(resident, frozen, rows)
        else:
            before = distributed.place(reference_of(block, reference), sharding.rows(mesh))
        total = total + (programs.score(params, frozen, rows) - before).sum()
    return kto.baseline(total, sum(int((block.item >= 0).sum()) for block in packed))


class Gradients:
    """The gradient of a step, summed up block by block in one set of buffers."""

    def __init__(self, programs: Programs, params: Any, frozen: Any = None, step: int = 0):
        self._programs, self._params, self._frozen = programs, params, frozen
        self._step, self._block = step, 0
        self.sum = programs.zeros(params)

    def add(self, rows: Rows, given: Given, total: np.float32) -> Any:
        """Add one block; returns its sums for the metrics."""
        draw = np.array([self._step, self._block], np.int32)
        self.sum, sums = self._programs.accumulate(
            self._params, self.sum, rows, given, total, self._frozen, draw
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
    *,
    frozen: Any = None,
    kind: np.ndarray | None = None,
    kinds: Sequence[str] = (),
    resident: Any = None,
    mismatches: Mismatches | None = None,
    items: Sequence[Item] | None = None,
    stop: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """Means over all blocks of an evaluation set, with the prefix `eval_`.

    stop: asked before each block; anything but 0 raises `Cut`.
    """

    def one(*given):
        if stop():
            raise Cut
        return programs.evaluate(params, *given, frozen)

    baseline = 0.0
    if mismatches is not None:
        baseline = kto_baseline(programs, mesh, params, frozen, resident, blocks, mismatches)
    sums = run_blocks(
        mesh,
        stage,
        blocks,
        reference,
        one,
        kind=kind,
        score=partial(programs.score, resident, frozen) if resident else None,
        baseline=baseline,
        items=items,
    )
    means = summarise(stage, jax.device_get(sums), kinds)
    if mismatches is not None:
        means["kl"] = float(baseline)
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
    watch: Watch | None = None,
    evaluation: Evaluation | None = None,
    answers: Answers | None = None,
    tokens_before: int = 0,
    window_before: Sequence[dict[str, float]] = (),
    kind: np.ndarray | None = None,
    kinds: Sequence[str] = (),
    mismatches: Mismatches | None = None,
    recent_before: Sequence[Sequence[float]] = (),
    frozen: Any = None,
    base: str | None = None,
    owed: bool = False,
) -> tuple[State, int]:
    """Train to `steps`; returns the state and the signal that ended it early (0 = ran to the end).

    `frozen`: the leaves that are only read, not in checkpoints; `base`: the hash of the weights
    they come from, which is.

    The metrics of step n - 1 are fetched when step n is under way. A step lasts from the result of
    the one before, or from the end of evaluating and saving, to its own. A loss that is not a
    number stops the run with an error and without a checkpoint of that state. So does a fall of the
    chosen log-probs (`fallen`), or the state is that of a checkpoint from before it. reference and
    kind: by item; kinds: names of the kinds; mismatches: for kto; recent_before: `fallen`'s before
    the first step; owed: a signal cut off the evaluation or the answers of the step that the state
    is from.
    """
    per_epoch = len(items) / config.train.batch_rows
    num_tokens = tokens_before
    step = int(state.step)
    window = list(window_before)  # steps since the last line that was written
    recent = [list(entry) for entry in recent_before]
    limit = config.srpo.max_chosen_drop if stage == "srpo" else None
    if config.srpo.loss in REFERENCE_FREE:
        limit = None
    window_tokens, window_seconds = 0, 0.0
    begun = 0.0  # when the step whose metrics come next began
    pending: tuple[int, list[Any], Any, int, float, Future[float]] | None = None
    ratio = adapter_ratio(config.optimizer, config.lora)
    layout = config.srpo.layout if stage == "srpo" else "shared"
    stopped = 0

    def stop() -> int:
        """Where all processes look whether to end here."""
        nonlocal stopped
        stopped = distributed.stopping(signalled.number)
        return stopped

    def look() -> None:
        if stop():
            raise Cut

    def due(every: int) -> bool:
        return step == steps or _due(step, every)

    def line(at: int, extra: dict[str, float]) -> None:
        """Write the means since the last line."""
        nonlocal window_tokens, window_seconds
        means = window_means(window)
        means |= {
            "learning_rate": float(schedule(at - 1)),
            **({} if ratio == 1.0 else {"lora_learning_rate": ratio * float(schedule(at - 1))}),
            "epoch": at / per_epoch,
            "num_tokens": num_tokens,
            # No step has been made where an evaluation is made up for.
            "tokens_per_second": window_tokens / window_seconds if window_seconds else float("nan"),
        }
        writer.write(at, means | extra)
        writer.show(at, means)
        window.clear()
        window_tokens, window_seconds = 0, 0.0

    def measure() -> dict[str, float] | None:
        """What is due of evaluation and answers; None, and owed, where a signal cuts it off."""
        nonlocal owed
        owed, means = True, {}
        try:
            if evaluation and due(config.train.eval_every):
                means |= evaluate(
                    programs,
                    mesh,
                    stage,
                    state.params,
                    evaluation.blocks,
                    evaluation.reference,
                    frozen=frozen,
                    kind=evaluation.kind,
                    kinds=kinds,
                    resident=state.reference or None,
                    mismatches=evaluation.mismatches,
                    items=evaluation.items,
                    stop=stop,
                )
            if answers and due(config.train.answers_every):
                means |= answers(step, state.params, look)
        except Cut:
            return None
        owed = False
        return means

    def flush(extra: dict[str, float] | None = None) -> None:
        nonlocal window_tokens, window_seconds, num_tokens, begun, pending
        if pending is None:
            return
        at, sums, norm, tokens, efficiency, end = pending
        pending = None
        ended = end.result()
        begun, seconds = ended, ended - begun
        values = summarise(stage, jax.device_get(sums), kinds)
        values |= {name: float(value) for name, value in jax.device_get(norm).items()}
        values["packing_efficiency"] = efficiency
        if watch is not None:
            watch.step(at, values, float(schedule(at - 1)), tokens, seconds)
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                raise ValueError(
                    f"step {at}: {name} is {values[name]}; lower optimizer.learning_rate or look "
                    "at the rows of this step"
                )
        num_tokens += tokens
        window_tokens += tokens
        window_seconds += seconds
        window.append(values)
        # The line of a step whose evaluation was cut off is written when that is made up for.
        if not (owed and at == step) and (at % config.train.log_every == 0 or at == steps or extra):
            line(at, extra or {})
        if limit is not None:
            entry = [values["rewards/chosen"] / config.srpo.beta, values["rewards/margins"]]
            if np.isfinite(entry).all():  # a step of kto may lack one of the two
                recent.append(entry)
                del recent[: -2 * DROP_WINDOW]
            if fallen(recent, limit):
                drop = -float(np.mean([ratio for ratio, _ in recent[-DROP_WINDOW:]]))
                raise Fallen(
                    at,
                    f"step {at}: the chosen log-probs lie {drop:.1f} nats below the reference "
                    f"while margins grow, srpo.max_chosen_drop={limit:g} allows no more; lower "
                    "optimizer.learning_rate, or raise srpo.beta or srpo.nll_weight",
                )

    def save() -> None:
        flush()
        data = {
            "iterator": iterator_state(iterator),
            "num_tokens": num_tokens,
            "window": window,
            "recent": recent,
            "config": config.model_dump(mode="json"),
        } | ({} if base is None else {"base": base})
        if owed:
            data["owed"] = True
        checkpoints.save(step, state, data)

    # On a thread of its own: asking for a step may itself take until the step is done, as it does
    # on several CPU devices, so that the time between two requests is another step's.
    observer = ThreadPoolExecutor(1)
    with observer, jax.set_mesh(mesh), stop_signals() as signalled:
        try:
            if owed and (extra := measure()):
                line(step, extra)
            begun = time.monotonic()
            while step < steps and not owed and not stop():
                blocks = next(iterator)
                baseline = 0.0
                if mismatches is not None:
                    baseline = kto_baseline(
                        programs, mesh, state.params, frozen, state.reference, blocks, mismatches
                    )
                policy = state.reference  # before the update donates it
                in_blocks = partial(
                    run_blocks,
                    mesh,
                    stage,
                    blocks,
                    reference,
                    kind=kind,
                    score=partial(programs.score, policy, frozen) if policy else None,
                    baseline=baseline,
                    items=items,
                )
                if len(blocks) == 1 and one_program():
                    ((state, norm, *sums),) = in_blocks(
                        lambda *args, state=state, at=(step, 0): programs.whole(
                            state, *args, frozen, np.array(at, np.int32)
                        )
                    )
                else:
                    gradients = Gradients(programs, state.params, frozen, step)
                    sums = in_blocks(gradients.add)
                    state, norm = programs.update(state, gradients.sum)
                    del gradients  # or it would lie beside the next step's, and through saving
                if mismatches is not None:
                    norm = norm | {"kl": baseline}
                tokens = sum(sequence_tokens(items[i]) for i in _indices(blocks))
                flush()
                step += 1
                efficiency = packing_efficiency(blocks, items, layout)
                pending = step, sums, norm, tokens, efficiency, observer.submit(ready_at, norm)
                if _due(step, config.srpo.sync_every) and state.reference:
                    state = programs.sync(state)
                if (evaluation and due(config.train.eval_every)) or (
                    answers and due(config.train.answers_every)
                ):
                    extra = measure()
                    if extra is None:
                        break
                    flush(extra)
                    begun = time.monotonic()
                if step == steps or step % config.train.save_every == 0:
                    save()
                    begun = time.monotonic()
            if stopped and step:
                save()  # whenever the signal came; a step that is saved already stays as it is
        except Fallen as fall:
            return roll_back(state, fall, config, checkpoints), 0
    return state, 0 if step == steps and not owed else stopped


def roll_back(state: State, fall: Fallen, config: Config, checkpoints: Checkpoints) -> State:
    """The newest state from before a fall; the fall as an error where there is none to go to."""
    if config.srpo.on_drop == "stop":
        raise ValueError(str(fall)) from fall
    before = checkpoints.rewind(fall.step - DROP_WINDOW)
    if before is None:
        raise ValueError(f"{fall}; no checkpoint is from before the fall") from fall
    print(f"{fall}; back to step {before}, where the run ends", flush=True)
    return checkpoints.restore(before, abstract(state))[0]
