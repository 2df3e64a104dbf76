"""Whole training runs equal a plain torch loop: loss, gradient norm, margin of every step."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
import reference_torch
from reference_torch import Pair, Tokens, Trace

from saro_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SRPOConfig,
    TrainConfig,
)
from saro_jax.data import pipeline
from saro_jax.data.rows import read
from saro_jax.data.tokenise import Branch, Item, tokenise
from saro_jax.models import hub, huggingface
from saro_jax.parallel import sharding
from saro_jax.parallel.mesh import make_mesh
from saro_jax.text.chat import load_tokenizer
from saro_jax.training import loop, optimizer, scoring, step

STEPS, BATCH = 10, 4
BETA = 0.1
ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "star1.jsonl"


class Case(NamedTuple):
    """A run of saro_jax: how its rows are laid out and cut into passes."""

    stage: str
    lr: float
    row_length: int
    layout: str = "shared"
    micro_rows: int = 1
    remat: str = "full"
    buckets: int = 1

    def config(self) -> Config:
        return Config(
            model=ModelConfig(dtype="float32", remat=self.remat),  # pyright: ignore[reportArgumentType]
            data=DataConfig(train="unread", row_length=self.row_length, max_length=self.row_length),
            train=TrainConfig(batch_rows=BATCH, micro_rows=self.micro_rows, save_every=1000),
            optimizer=OptimizerConfig(
                name="sgd",
                learning_rate=self.lr,
                schedule="constant",
                warmup_ratio=0,
                weight_decay=0,
                max_grad_norm=0,
            ),
            srpo=SRPOConfig(beta=BETA, layout=self.layout),  # pyright: ignore[reportArgumentType]
            seed=5,
        )


class Metrics:
    """Keeps what the loop writes."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def write(self, _: int, values: dict[str, float]) -> None:
        self.steps.append(values)

    def show(self, *_: Any) -> None:
        pass


class NoCheckpoints:
    def save(self, *_: Any) -> None:
        pass


def groups(case: Case, count: int, steps: int) -> list[list[int]]:
    """The rows of each step, in the order of the input pipeline."""
    config = case.config()
    order: Any = pipeline.order(count, BATCH, seed=config.seed, shuffle=True)
    return [[int(i) for i in order[k]] for k in range(steps)]


def train(case: Case, folder: Path, items: list[Item], steps: int) -> list[dict[str, float]]:
    """saro_jax's own loop on a model folder; the metrics of every step."""
    config, mesh = case.config(), make_mesh()
    arch = huggingface.load_architecture(folder)
    places = sharding.shardings(mesh, step.abstract_params(arch, jnp.float32))
    params = huggingface.load_params(folder, arch, jnp.float32, places)
    shape = pipeline.Shape(case.row_length, case.micro_rows, case.layout, case.buckets)
    rows_of = pipeline.plan(items, batch_rows=BATCH, shape=shape, seed=config.seed)
    reference = None
    if case.stage == "srpo":
        scorer = scoring.make_scorer(
            arch, mesh, dtype=jnp.float32, remat=config.model.remat, branches=2
        )
        reference = np.full((len(items), 2, 4), np.nan, np.float32)
        all_groups = [rows_of(k) for k in range(steps)]
        for i, logp, _ in scoring.score_items(scorer, params, items, all_groups, shape):
            reference[i] = logp
    transform = optimizer.make(config.optimizer, steps)
    metrics: Any = Metrics()
    checkpoints: Any = NoCheckpoints()
    state, stopped = loop.fit(
        programs=step.programs(arch, config, case.stage, transform),
        mesh=mesh,
        stage=case.stage,
        config=config,
        state=step.init_state(transform, params, mesh),
        iterator=pipeline.steps(items, rows_of, shape),
        items=items,
        reference=reference,
        steps=steps,
        schedule=optimizer.learning_rate(config.optimizer, steps),
        checkpoints=checkpoints,
        writer=metrics,
    )
    assert (int(state.step), stopped) == (steps, 0)
    return metrics.steps


def random_ids(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(3, 300, n).astype(np.int32)


def branch(rng: np.random.Generator, n: int, scored: np.ndarray | None = None) -> Branch:
    return Branch(random_ids(rng, n), np.ones(n, bool) if scored is None else scored, False)


def conversations() -> list[Item]:
    """SFT rows: a prompt, then scored answers with unscored turns between them."""
    rng = np.random.default_rng(0)
    items = []
    for k in range(10):
        n = int(rng.integers(12, 60))
        scored = np.arange(n) >= rng.integers(1, n - 1)
        scored[n - 4 : n - 2] = k % 3 > 0
        if k == 4:  # the first token of a sequence has nothing before it: it does not count
            scored[:] = True
        items.append(
            Item(f"s{k}", f"rows:{k}", "sft", 1.0, random_ids(rng, 0), (branch(rng, n, scored),))
        )
    return items


def preferences() -> list[Item]:
    """Pairs with long, short and single-token prefixes and answers."""
    rng = np.random.default_rng(1)
    sizes = [(30, 12, 20), (1, 9, 3), (25, 1, 14), (40, 17, 1), (8, 30, 28), (15, 5, 5), (3, 2, 33)]
    items = []
    for k, (prefix, chosen, rejected) in enumerate(sizes):
        branches = branch(rng, chosen), branch(rng, rejected)
        items.append(Item(f"p{k}", f"rows:{k}", "process", 1.0, random_ids(rng, prefix), branches))
    return items


def sequences(item: Item) -> list[Tokens]:
    """The branches of an item as whole sequences, the way any other trainer has them."""
    prefix = [int(i) for i in item.prefix]
    return [
        Tokens(prefix + b.ids.tolist(), [False] * len(prefix) + b.scored.tolist())
        for b in item.branches
    ]


def torch_trace(case: Case, model: Any, items: list[Item], steps: int) -> Trace:
    batches = [[sequences(items[i]) for i in group] for group in groups(case, len(items), steps)]
    if case.stage == "rw":
        return reference_torch.sft(model, [[s for (s,) in batch] for batch in batches], lr=case.lr)
    pairs = [[Pair(*both) for both in batch] for batch in batches]
    return reference_torch.dpo(model, pairs, lr=case.lr, beta=BETA)


@cache
def tiny_trace(kind: str, stage: str, lr: float) -> Trace:
    items = conversations() if stage == "rw" else preferences()
    return torch_trace(Case(stage, lr, 256), reference_torch.tiny_model(kind, seed=3), items, STEPS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("llama", "qwen2"):
        found[kind] = tmp_path_factory.mktemp(kind)
        reference_torch.tiny_model(kind, seed=3).save_pretrained(found[kind])
    return found


def assert_equal_runs(metrics: list[dict[str, float]], trace: Trace, rtol: float = 1e-4) -> None:
    losses = [values["loss"] for values in metrics]
    np.testing.assert_allclose(losses, trace.losses, rtol=rtol)
    norms = [values["grad_norm"] for values in metrics]
    np.testing.assert_allclose(norms, trace.grad_norms, rtol=10 * rtol)
    if trace.margins:
        margins = [values["rewards/margins"] for values in metrics]
        scale = max(map(abs, trace.margins))
        np.testing.assert_allclose(margins, trace.margins, rtol=0, atol=10 * rtol * scale)


CASES = [
    # Each compiles a program of its own, so only these four are fast; they cover every choice.
    ("llama", Case("srpo", 0.02, 128, "shared", 1)),
    ("qwen2", Case("srpo", 0.02, 200, "separate", 3, "none")),
    ("llama", Case("rw", 0.2, 64, "shared", 4, "none")),
    ("qwen2", Case("rw", 0.2, 150, "shared", 1)),
    ("llama", Case("srpo", 0.02, 256, "separate", 2, "none", buckets=2)),
    ("qwen2", Case("srpo", 0.02, 200, "shared", 3, "dots")),
    ("qwen2", Case("srpo", 0.02, 160, "separate", 1)),
    ("llama", Case("rw", 0.2, 64, "shared", 1, "dots")),
    ("qwen2", Case("rw", 0.2, 150, "shared", 2)),
]


@pytest.mark.parametrize(
    ("kind", "case"),
    [pytest.param(*case, marks=pytest.mark.slow if k > 3 else ()) for k, case in enumerate(CASES)],
    ids=lambda x: (
        x if isinstance(x, str) else f"{x.stage}-{x.layout}-{x.micro_rows}x{x.row_length}"
    ),
)
def test_ten_steps_equal_torch(kind: str, case: Case, folders: dict[str, Path]):
    trace = tiny_trace(kind, case.stage, case.lr)
    # A run in which nothing moves would prove nothing.
    assert max(trace.losses) - min(trace.losses) > 0.05
    items = conversations() if case.stage == "rw" else preferences()
    metrics = train(case, folders[kind], items, STEPS)
    assert_equal_runs(metrics, trace)
    if case.stage == "srpo":  # the policy still is the reference
        assert metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
        assert metrics[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def real_model() -> Path:
    """The quickstart model where it is at hand; skips where it would have to be downloaded."""
    if os.environ.get("SARO_JAX_QUICKSTART_WHEEL"):
        return hub.resolve("quickstart")
    # conftest.py gives the tests a cache of their own; the user's may hold it already.
    folder = Path.home() / ".cache" / "saro_jax" / Path(hub.QUICKSTART_FILE).stem
    if not (folder / "config.json").exists():
        pytest.skip(f"no quickstart model in {folder}, and SARO_JAX_QUICKSTART_WHEEL is not set")
    return folder


def real_rows(stage: str, folder: Path, file: Path, max_length: int) -> list[Item]:
    """Rows of STAR-1; a pair's answers part in the middle of the reasoning."""
    if not ROWS.exists():
        pytest.skip(f"no rows of STAR-1 at {ROWS}")
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:40]]
    middles = [len(row["response"].partition("</think>")[0]) // 2 for row in rows]
    records: list[dict[str, Any]] = [
        {"prompt": row["question"], "completion": row["response"]} for row in rows
    ]
    if stage == "srpo":
        records = [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "prefix": row["response"][:middle],
                "chosen": [{"role": "assistant", "content": row["response"][middle:]}],
                "rejected": [{"role": "assistant", "content": other["response"][cut:]}],
            }
            for row, middle, other, cut in zip(
                rows, middles, rows[1:] + rows[:1], middles[1:] + middles[:1], strict=True
            )
        ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    found, _ = read(str(file), "preference" if stage == "srpo" else "sft")
    items, _ = tokenise(found, load_tokenizer(folder), max_length)
    return items[:8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("rw", 1e-3, 256, "shared", 2),
        Case("srpo", 1e-4, 512, "shared", 1),
        Case("srpo", 1e-4, 512, "separate", 2),
    ],
    ids=lambda case: f"{case.stage}-{case.layout}",
)
def test_the_real_model_equals_torch(case: Case, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, steps = real_model(), 4
    items = real_rows(case.stage, folder, tmp_path / "rows.jsonl", max_length=224)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trace = torch_trace(case, model, items, steps)
    del model
    assert max(trace.losses) - min(trace.losses) > 0.01
    with jax.default_matmul_precision("highest"):
        assert_equal_runs(train(case, folder, items, steps), trace)
