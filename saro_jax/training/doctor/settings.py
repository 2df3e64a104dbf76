"""What the settings will do to a run: rate, warm-up, epochs, batch, how full rows are."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from saro_jax.config import Config
from saro_jax.data import pipeline
from saro_jax.data.packing import Shape, blocks, laid_out_length
from saro_jax.data.tokenise import Item
from saro_jax.models.architecture import Architecture
from saro_jax.training.doctor.items import scored_tokens
from saro_jax.training.finding import Finding, percent
from saro_jax.training.memory import parameters

LOOKED_AT = 32  # steps that are packed to see how full rows are
SMALL_PAIR_BATCH, SMALL_BATCH_TOKENS = 8, 2048


def plausible_rates(size: int, stage: str, lora: bool) -> tuple[float, float]:
    """Peak AdamW rates outside of which a run mostly learns nothing or breaks.

    A rule of thumb, no law: the usual rate of an 8B model (1e-5 for SFT, 5e-7 for DPO), larger for
    smaller models by the square root, ten times that for LoRA; a thirtieth to ten times of it.
    """
    usual = (1e-5 if stage == "rw" else 5e-7) * math.sqrt(8e9 / size) * (10 if lora else 1)
    return usual / 30, usual * 10


def hyperparameters(
    config: Config, stage: str, arch: Architecture, items: Sequence[Item], steps: int
) -> list[Finding]:
    """Rate, warm-up, epochs and batch."""
    if not items:
        return []
    findings = []
    optimizer, batch = config.optimizer, config.train.batch_rows
    size = parameters(arch)
    low, high = plausible_rates(size, stage, config.lora.rank > 0)
    rate = f"optimizer.learning_rate={optimizer.learning_rate:g}"
    what = f"{size / 1e6:.0f}M parameters{' with LoRA' if config.lora.rank else ''} ({stage})"
    usual = f"usual for {what}: {low:.0e} to {high:.0e}"
    if optimizer.name == "adamw" and not low <= optimizer.learning_rate <= high:
        side = "low: little will be learnt" if optimizer.learning_rate < low else "high: expect "
        side += "" if optimizer.learning_rate < low else "a loss that jumps and text that decays"
        remedy = f"{usual}; begin near {math.sqrt(low * high):.0e}"
        findings.append(Finding("warning", "learning_rate", f"{rate} is very {side}", remedy))
    elif optimizer.name == "adamw":
        findings.append(Finding("ok", "learning_rate", f"{rate}; {usual}"))
    warmup = round(optimizer.warmup_ratio * steps)
    if optimizer.warmup_ratio and warmup >= max(2, 0.5 * steps):
        findings.append(
            Finding(
                "warning",
                "warmup",
                f"{warmup} of {steps} steps warm up: the full learning rate is hardly used",
                "lower optimizer.warmup_ratio (0.03 to 0.1 is usual) or train longer",
            )
        )
    epochs = steps * batch / len(items)
    usual_epochs = 2 if stage == "srpo" else 5
    if epochs > usual_epochs + batch / len(items):  # the last step may reach into the next pass
        why = (
            "margins then grow by memorising, while log-probs of chosen answers fall"
            if stage == "srpo"
            else "rows are then memorised"
        )
        findings.append(
            Finding(
                "warning" if stage == "srpo" else "note",
                "epochs",
                f"{epochs:.1f} passes over {len(items)} rows: {why}",
                f"train.epochs of at most {usual_epochs}, or more rows; data.eval shows when it "
                "stops helping",
            )
        )
    tokens = sum(scored_tokens(*item.branches) for item in items) / len(items) * batch
    if stage == "srpo" and batch < SMALL_PAIR_BATCH:
        findings.append(
            Finding(
                "note",
                "batch",
                f"{batch} pairs a step: the direction of a step is mostly noise",
                "train.batch_rows of 16 to 128; memory does not depend on it",
            )
        )
    elif stage == "rw" and tokens < SMALL_BATCH_TOKENS:
        findings.append(
            Finding(
                "note",
                "batch",
                f"{tokens:.0f} scored tokens a step: the direction of a step is mostly noise",
                "raise train.batch_rows; memory does not depend on it",
            )
        )
    else:
        findings.append(Finding("ok", "batch", f"{batch} rows, {tokens:.0f} scored tokens a step"))
    if steps < 10:
        found = f"the run has {steps} steps: the optimizer hardly gets going"
        remedy = "more rows, a smaller train.batch_rows or more train.epochs"
        findings.append(Finding("note", "steps", found, remedy))
    return findings


def packing(config: Config, items: Sequence[Item], shape: Shape, steps: int) -> list[Finding]:
    """How full the packed rows are, and which shapes are compiled."""
    if not items:
        return []
    rows_of = pipeline.plan(
        items,
        batch_rows=config.train.batch_rows,
        shape=shape,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.pack_window,
    )
    epoch = math.ceil(len(items) / config.train.batch_rows)
    looked = min(steps, epoch, LOOKED_AT)
    real, computed, shapes = 0, 0, Counter()
    for k in range(looked):
        step = rows_of(k)
        real += sum(laid_out_length(items[i], shape.layout) for row in step for i in row)
        for block in blocks(items, step, shape, own=np.zeros(shape.rows, np.bool_)):
            computed += block.tokens.size
            shapes[block.tokens.shape] += 1
    full = real / max(computed, 1)
    found = (
        f"{percent(full)} of the computed tokens are no padding, "
        f"{shapes.total() / looked:.1f} passes a step (first {looked} steps)"
    )
    findings = [Finding("ok", "packing", found)]
    if full < 0.75:
        smaller = "train.micro_rows=1, " if shape.rows > 1 else ""
        findings = [
            Finding(
                "note" if full > 0.5 else "warning",
                "packing",
                found,
                f"{smaller}more data.row_buckets, a longer data.row_length or a larger "
                "train.batch_rows fill rows better",
            )
        ]
    listed = ", ".join(f"{b} x {t}" for b, t in sorted(shapes))
    found = f"programs for {len(shapes)} shapes (rows x tokens): {listed}"
    findings.append(Finding("ok", "compile", found))
    return findings
