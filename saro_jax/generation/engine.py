"""Continuous batching: jobs from a queue into slots, the compiled loop, and what came of each.

Legend: B slots, P prompts of one prefill, T tokens of a prompt.

A prompt is prefilled once and its keys and values are copied to a slot for each of its samples. All
but its last token, that is: the decode loop begins with that one and so draws the first token too.
A slot whose sample has ended gets the next one of the queue.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from saro_jax.generation import programs
from saro_jax.generation.programs import BURST, FORCED, NONE, Layers, cast_matrices
from saro_jax.generation.programs import sizes as cache_slots
from saro_jax.generation.sampling import Sampling, key_words
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Params
from saro_jax.parallel import memory
from saro_jax.parallel.mesh import row_shards

F32 = jnp.float32
GREEDY = Sampling()
Finish = Literal["stop", "length", "cut"]


@dataclass(frozen=True, eq=False)
class Completion:
    """What was generated after one prompt.

    ids: int32 [n], the stop token that ended it included. logps: float32 [n], log-probs under the
    model itself, whatever temperature and truncation the tokens were drawn with. finish: "stop",
    "length" where the limit was reached, "cut" where the job's review ended it. forced: tokens were
    forced upon it. seconds: from its slot to its last token, while others were decoded too.
    """

    ids: np.ndarray
    logps: np.ndarray
    finish: Finish
    forced: bool = False
    seconds: float = 0.0


class Cut(NamedTuple):
    """A review's decision: the sample ends with its first `tokens` tokens."""

    tokens: int


class Force(NamedTuple):
    """A review's decision: these ids follow (FORCED at most), after the first `tokens` tokens."""

    ids: tuple[int, ...]
    tokens: int


# (ids so far, why the slot has stopped or None where it runs, whether ids were forced) -> decision
Review = Callable[[np.ndarray, Finish | None, bool], Cut | Force | None]


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt (int ids, BOS and generation prompt included) and the samples wanted of it.

    Token t of sample i is drawn with the key fold_in(fold_in(key(seed), i), t). numbers: each i.
    pause: tokens after which the sample stops once, for its review. review: is asked about the ids
    of a sample after every burst of decoding, so a decision takes no part in what is drawn before
    the token that it is about.
    """

    prompt: np.ndarray
    new: int
    sampling: Sampling = GREEDY
    seed: int = 0
    numbers: Sequence[int] = (0,)
    pause: int | None = None
    review: Review | None = None


@dataclass(eq=False)
class _Prompt:
    """A job with its prefilled rows, and the samples that are not in a slot yet."""

    job: Job
    rows: Layers | None
    row: int
    waiting: deque[int]
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass(eq=False)
class _Sample:
    """The occupant of a slot."""

    prompt: _Prompt
    place: int  # of its number in the job's
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    forced: bool = False
    begun: float = field(default_factory=time.perf_counter)


class Engine:
    """A model in memory with its slots; `run` answers jobs.

    slots: sequences that are decoded at a time, raised to a multiple of the mesh's row shards.
    unroll (None: on one CPU device) runs layer by layer instead of by a scan, which copies each
    layer's weights there: up to four times as fast, and longer to compile. tokens: how many were
    generated so far.
    """

    def __init__(
        self,
        arch: Architecture,
        params: Params,
        *,
        slots: int,
        stop_ids: Iterable[int],
        dtype: Any = F32,
        unroll: bool | None = None,
        mesh: Mesh | None = None,
    ):
        if slots < 1:
            raise ValueError(f"slots: {slots}; allowed: >= 1")
        memory.trim_after_compiling()
        cpu = jax.default_backend() == "cpu"
        unroll = (cpu and mesh is None) if unroll is None else unroll
        self.arch, self.mesh, self.unroll, self.dtype = arch, mesh, unroll, jnp.dtype(dtype)
        self.slots = rounded(slots, mesh)
        self.prompts = prompts_at_once(slots, mesh, jax.default_backend())
        self.refill = 1 if cpu else max(1, self.slots // 8)
        self.stops_V = np.isin(np.arange(arch.vocab_size), list(stop_ids))
        params = cast_matrices(params, dtype)
        self.params = decoder.unstack_layers(params) if unroll else params
        # XLA's CPU backend writes into a bfloat16 array by way of a float32 copy of all of it.
        self.held = F32 if cpu else self.dtype
        self.tokens = 0
        # Over arrays of fewer entries XLA's CPU backend sums in another order, which would show how
        # long the neighbours are in the last bit of a log-prob.
        self._least = cache_slots(-(-4096 // (self.slots * arch.num_heads))) if cpu else 0
        self._size = 0
        self._cache: Any = None

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Completion]]]:
        """Yields each job with its samples, in the order of its numbers, when the last has ended.

        Jobs are taken as slots come free, in their order. ValueError for one that does not fit.
        """
        source = enumerate(jobs)
        waiting: deque[_Prompt] = deque()
        occupants: list[_Sample | None] = [None] * self.slots
        slots = programs.idle(self.slots)
        with jax.set_mesh(self.mesh) if self.mesh else nullcontext():
            while True:
                more = self._admit(source, waiting, occupants, slots)
                if not slots.active_B.any():
                    return
                self._fit(slots, occupants)
                enough = self.refill if more else self.slots
                self._cache, made = programs.burst(
                    self.arch,
                    self.params,
                    self._cache,
                    slots,
                    self.stops_V,
                    np.int32(enough),
                    dtype=self.dtype,
                )
                made = jax.device_get(made)
                # What only the device changes; the rest is the host's own.
                for name in ("active_B", "token_B", "position_B", "made_B"):
                    getattr(slots, name)[:] = getattr(made.slots, name)
                for slot, sample in enumerate(occupants):
                    if sample is not None and self._harvest(slot, sample, slots, made):
                        occupants[slot] = None
                        slots.active_B[slot] = False
                        slots.position_B[slot] = 0
                        done = sample.prompt
                        if len(done.done) == len(done.job.numbers):
                            yield done.job, [done.done[i] for i in range(len(done.done))]

    def _admit(self, source, waiting, occupants, slots) -> bool:
        """Fill free slots from the queue; whether more is waiting than they could take."""
        free = deque(slot for slot, sample in enumerate(occupants) if sample is None)
        while free:
            if not waiting:
                waiting.extend(self._prefilled(source))
                if not waiting:
                    return False
            rows, placed = waiting[0].rows, []
            while free and waiting and waiting[0].rows is rows:
                prompt, slot = waiting[0], free.popleft()
                sample = _Sample(prompt, prompt.waiting.popleft())
                occupants[slot] = sample
                self._occupy(slots, slot, sample)
                placed.append((slot, prompt.row))
                if not prompt.waiting:
                    waiting.popleft()
            if rows is not None:
                self._place(rows, placed)
        return True

    def _prefilled(self, source) -> list[_Prompt]:
        """The next jobs of the queue, their prompts in rows of the same arrays."""
        jobs: list[Job] = []
        for number, job in source:
            self.check(job, f"prompt {number}: ")
            jobs.append(job)
            if len(jobs) == self.prompts:
                break
        longest = max((len(job.prompt) - 1 for job in jobs), default=0)
        rows = None
        if longest:
            tokens_PT = np.zeros((self.prompts, cache_slots(longest)), np.int32)
            for row, job in zip(tokens_PT, jobs, strict=False):
                row[: len(job.prompt) - 1] = job.prompt[:-1]
            rows = programs.prefill(
                self.arch, self.params, tokens_PT, dtype=self.dtype, held=self.held
            )
        return [
            _Prompt(job, rows, row, deque(range(len(job.numbers)))) for row, job in enumerate(jobs)
        ]

    def _place(self, rows: Layers, placed: list[tuple[int, int]]) -> None:
        self._grow(jax.tree.leaves(rows)[0].shape[-2])
        # One sample at a time, or on a mesh, where a copy takes as long as all of them, as many as
        # there are slots: so that no number of samples compiles a program of its own.
        step = 1 if self.mesh is None else self.slots
        for start in range(0, len(placed), step):
            some = placed[start : start + step]
            pairs = np.array(some + [(self.slots, 0)] * (step - len(some)), np.int32)
            self._cache = programs.place(self._cache, rows, pairs[:, 0], pairs[:, 1])

    def _occupy(self, slots: programs.Slots, slot: int, sample: _Sample) -> None:
        job = sample.prompt.job
        slots.active_B[slot] = True
        slots.token_B[slot] = job.prompt[-1]
        slots.position_B[slot] = len(job.prompt) - 1
        slots.made_B[slot] = 0
        slots.limit_B[slot] = job.new if job.pause is None else min(job.pause, job.new)
        number = job.numbers[sample.place]
        slots.key_B2[slot] = _folded(key_words(job.seed), number)
        for name, column in slots.settings._asdict().items():
            column[slot] = getattr(job.sampling, name)
        slots.forced_BF[slot] = NONE

    def _grow(self, size: int) -> None:
        if self._cache is None:
            self._size = size
            self._cache = programs.empty(
                self.arch, slots=self.slots, size=size, dtype=self.held, unroll=self.unroll
            )
        elif size > self._size:
            self._size = size
            self._cache = programs.resize(self._cache, size=size)

    def _fit(self, slots: programs.Slots, occupants: list[_Sample | None]) -> None:
        """Give the rows of the cache room for a burst; take some where half would do."""
        need = max(
            min(
                int(slots.position_B[i]) + 1 + BURST,
                len(one.prompt.job.prompt) + one.prompt.job.new,
            )
            for i, one in enumerate(occupants)
            if one is not None
        )
        size = max(cache_slots(need), self._least)
        self._grow(size)
        if 2 * size <= self._size:
            self._size = size
            self._cache = programs.resize(self._cache, size=size)

    def _harvest(self, slot: int, sample: _Sample, slots, made) -> bool:
        """Take over what a burst made in a slot; whether its sample has ended."""
        job, count = sample.prompt.job, int(made.count_B[slot])
        sample.ids += made.ids_BW[slot, :count].tolist()
        sample.logps += made.logps_BW[slot, :count].tolist()
        self.tokens += count
        finish: Finish | None = None
        if not slots.active_B[slot]:
            finish = "stop" if made.stopped_B[slot] else "length"
        decision = None
        if job.review is not None:
            decision = job.review(np.array(sample.ids, np.int32), finish, sample.forced)
        if isinstance(decision, Force) and decision.tokens + len(decision.ids) < job.new:
            self._force(slot, sample, slots, decision)
            return False
        if isinstance(decision, Cut):
            finish = "cut"
            del sample.ids[decision.tokens :], sample.logps[decision.tokens :]
        elif finish == "length" and len(sample.ids) < job.new:  # no more than a pause
            slots.active_B[slot], slots.limit_B[slot] = True, job.new
            return False
        if finish is None:
            return False
        sample.prompt.done[sample.place] = Completion(
            np.array(sample.ids, np.int32),
            np.array(sample.logps, np.float32),
            finish,
            sample.forced,
            time.perf_counter() - sample.begun,
        )
        return True

    def _force(self, slot: int, sample: _Sample, slots, force: Force) -> None:
        """Go on from the first `force.tokens` tokens with the forced ones."""
        job = sample.prompt.job
        if not 0 < len(force.ids) <= FORCED:
            raise ValueError(f"{len(force.ids)} forced tokens; allowed: 1 to {FORCED}")
        kept = force.tokens
        del sample.ids[kept:], sample.logps[kept:]
        sample.forced = True
        slots.active_B[slot], slots.limit_B[slot] = True, job.new
        slots.made_B[slot] = kept
        slots.token_B[slot] = sample.ids[-1] if kept else job.prompt[-1]
        slots.position_B[slot] = len(job.prompt) - 1 + kept
        slots.forced_at_B[slot] = kept
        slots.forced_BF[slot] = NONE
        slots.forced_BF[slot, : len(force.ids)] = force.ids

    def check(self, job: Job, where: str = "") -> None:
        """ValueError, `where` before it, for a job that the model has no room for."""
        ids = np.asarray(job.prompt)
        if job.new < 1:
            raise ValueError(f"max_new_tokens: {job.new}; allowed: >= 1")
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{where}{ids.dtype} of shape {ids.shape}; allowed: int ids [n >= 1]")
        if ids.min() < 0 or ids.max() >= self.arch.vocab_size:
            raise ValueError(
                f"{where}id {ids.min() if ids.min() < 0 else ids.max()}; allowed: 0 to "
                f"{self.arch.vocab_size - 1}"
            )
        if ids.size + job.new > self.arch.max_position_embeddings:
            raise ValueError(
                f"{where}{ids.size} tokens and max_new_tokens={job.new} exceed the model's "
                f"{self.arch.max_position_embeddings} positions"
            )


def rounded(slots: int, mesh: Mesh | None) -> int:
    """`slots`, raised to a multiple of the mesh's row shards."""
    shards = 1 if mesh is None else row_shards(mesh)
    return -(-slots // shards) * shards


def prompts_at_once(slots: int, mesh: Mesh | None, platform: str) -> int:
    """Rows of one prefill: one prompt keeps a CPU busy, and is padded to no other's length."""
    shards = 1 if mesh is None else row_shards(mesh)
    return math.lcm(1 if platform == "cpu" else min(4, slots), shards)


@jax.jit
def _fold(words: jax.Array, number: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(key, number))


def _folded(words: np.ndarray, number: int) -> np.ndarray:
    """The words of fold_in(key, number), on the host."""
    return np.asarray(_fold(words, np.uint32(number)))


def generate(
    arch: Architecture,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Iterable[int],
    dtype: Any = F32,
    unroll: bool | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    numbers: Sequence[int] | None = None,
    review: Review | None = None,
) -> list[Completion]:
    """Continue each prompt (int ids, BOS and generation prompt included) until a stop id.

    Matrices are cast to `dtype` once. Token t of prompt i is drawn with the key
    fold_in(fold_in(key(seed), i), t): a sample depends neither on its neighbours nor on batch_size.
    temperature 0 is greedy. top_k, top_p and min_p keep the most probable tokens, after
    temperature. progress: a bar on stderr. numbers: the i of each prompt, where these are some of
    more; None = 0, 1, ... review: see `Job`. unroll, mesh: see `Engine`.
    """
    sampling = Sampling(float(temperature), float(top_p), int(top_k), float(min_p))
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; allowed: >= 1")
    jobs = [
        Job(prompt, max_new_tokens, sampling, seed, (number,), review=review)
        for prompt, number in zip(prompts, numbers or range(len(prompts)), strict=True)
    ]
    if not jobs:
        return []
    engine = Engine(
        arch,
        params,
        slots=min(batch_size, len(jobs)),
        stop_ids=stop_ids,
        dtype=dtype,
        unroll=unroll,
        mesh=mesh,
    )
    for i, job in enumerate(jobs):
        engine.check(job, f"prompt {i}: ")
    # The longest first, so that memory runs out at once or never.
    order = sorted(range(len(jobs)), key=lambda i: (-len(prompts[i]), i))
    place = {id(job): i for i, job in enumerate(jobs)}
    completions: list[Any] = [None] * len(jobs)
    # leave=None: not where it is the second bar, of a run that answers on its way.
    with tqdm(total=len(jobs), unit="prompt", disable=not progress, leave=None) as bar:
        for job, (completion,) in engine.run(jobs[i] for i in order):
            completions[place[id(job)]] = completion
            bar.update(1)
    return completions


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of sequences by batch, the longest first, so that memory runs out at once or never.

    The batches are as equal as can be: their rows differ by one at most, which padding evens out.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-len(order) // batch_size)
    rows = -(-len(order) // count) if count else 0
    return [order[start : start + rows] for start in range(0, len(order), rows or 1)]
