"""The doctor during a run: what the metrics of the first steps say, each finding once."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from saro_jax.config import Config
from saro_jax.parallel import distributed
from saro_jax.training.finding import Finding, Level, percent
from saro_jax.training.memory import GIB, peak_memory

WINDOW = 5  # steps that a finding averages over
REFERENCE_FREE = ("simpo", "orpo")


class Record(NamedTuple):
    """One step as the loop saw it."""

    step: int
    values: dict[str, float]  # the step's metrics, grad_norm among them
    learning_rate: float
    tokens: int  # of all branches, padding not counted
    seconds: float  # evaluating and saving left out


def during(records: Sequence[Record], config: Config, stage: str) -> list[Finding]:
    """What the metrics of a run so far say; `records` of consecutive steps, the newest last."""
    if not records:
        return []
    last, recent = records[-1], records[-WINDOW:]
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(last.values[name])]
    if broken:
        found = f"step {last.step}: {broken[0]} is {last.values[broken[0]]}"
        remedy = "lower optimizer.learning_rate, or look at the rows of this step"
        return [Finding("error", "not_finite", found, remedy)]
    findings = _gradients(records, config)
    if stage == "srpo" and "rewards/margins" in last.values:
        findings += _preference_start(records, config)
        if len(recent) == WINDOW:
            findings += _preference_course(recent, config)
    findings += _speed(records)
    return findings


def _gradients(records: Sequence[Record], config: Config) -> list[Finding]:
    findings = []
    last = records[-1]
    norms = [record.values["grad_norm"] for record in records]
    if norms[-1] == 0:
        findings.append(
            Finding(
                "warning",
                "zero_gradient",
                f"step {last.step}: the gradient is zero, this step learns nothing",
                "the rows of the step have weight 0 or the same tokens in both branches, or all "
                "parameters are frozen: see python -m saro_jax.data.inspect",
            )
        )
    if last.learning_rate == 0 and last.step == 1:
        found = "step 1 has learning rate 0 and learns nothing"
        findings.append(Finding("warning", "zero_rate", found, "set optimizer.learning_rate"))
    if len(norms) > WINDOW:
        usual = float(np.median(norms[:-1]))
        if usual > 0 and norms[-1] > 10 * usual:
            findings.append(
                Finding(
                    "warning",
                    "gradient_jump",
                    f"step {last.step}: the gradient norm is {norms[-1]:.3g}, "
                    f"{norms[-1] / usual:.0f} times its median of {usual:.3g}",
                    "lower optimizer.learning_rate or warm up longer; once is an odd row",
                )
            )
    limit = config.optimizer.max_grad_norm
    if limit and len(norms) >= 2 * WINDOW and min(norms) > limit:
        findings.append(
            Finding(
                "note",
                "clipped",
                f"all of the {len(norms)} newest gradients are clipped to "
                f"optimizer.max_grad_norm={limit:g} (median norm {np.median(norms):.3g})",
                "as usual with small batches; a larger train.batch_rows has smaller norms",
            )
        )
    return findings


def _preference_start(records: Sequence[Record], config: Config) -> list[Finding]:
    """At step 1 the policy is the reference; later it must leave it."""
    first, last = records[0], records[-1]
    srpo = config.srpo
    if srpo.loss in REFERENCE_FREE:
        return []
    findings = []
    nats = max(abs(first.values[f"rewards/{name}"]) for name in ("chosen", "rejected")) / srpo.beta
    if len(records) == 1 and first.step == 1 and nats > 1e-3:
        findings.append(
            Finding(
                "warning",
                "margin_at_start",
                f"the first step lies {nats:.2g} nats from the reference (margin "
                f"{first.values['rewards/margins']:.2g}), though policy and reference are the "
                "same weights: the reference was scored by another program, dtype or store",
                "delete the store (srpo.reference_cache; by default reference/ in the cache) so "
                "that it is scored again; dropout at step 1 looks like this too",
            )
        )
    if len(records) < WINDOW or abs(last.values["rewards/margins"]) / srpo.beta > 1e-3:
        return findings
    moved = abs(last.values["loss"] - first.values["loss"])
    if first.step > 1 or moved > 1e-3:
        return findings
    if max(record.values["grad_norm"] for record in records) == 0:
        why, remedy = "all gradients are zero", "see the warning on zero gradients"
    elif max(record.learning_rate for record in records) < 1e-9:
        rate = max(record.learning_rate for record in records)
        why, remedy = f"the learning rate is {rate:.1g}", "raise optimizer.learning_rate"
    elif config.model.param_dtype == "bfloat16":
        why = "updates are smaller than what bfloat16 weights can hold"
        remedy = "model.param_dtype=float32, or a higher optimizer.learning_rate"
    else:
        norm = float(np.median([record.values["grad_norm"] for record in records]))
        rate = max(record.learning_rate for record in records)
        why = f"gradient norm {norm:.2g}, learning rate to {rate:.1g}: steps are too small"
        remedy = "raise optimizer.learning_rate; if pairs are nearly identical, mend them"
    start = "ln 2" if abs(first.values["loss"] - math.log(2)) < 1e-3 else "its start"
    found = f"after {last.step} steps the loss is still {last.values['loss']:.4f} ({start}): {why}"
    return [*findings, Finding("warning", "loss_stuck", found, remedy)]


def _preference_course(recent: Sequence[Record], config: Config) -> list[Finding]:
    """Where margins come from, over the newest steps; in nats a row, against the reference."""
    findings = []
    srpo = config.srpo

    def mean(name: str) -> float:
        return float(np.mean([record.values[name] for record in recent]))

    at = f"steps {recent[0].step} to {recent[-1].step}"
    paired = "rewards/accuracies" in recent[0].values  # kto has none
    if paired and recent[0].step > 1 and mean("rewards/accuracies") < 0.4:
        findings.append(
            Finding(
                "warning",
                "accuracy",
                f"{at}: the chosen answer wins in {percent(mean('rewards/accuracies'))} of the "
                "pairs only",
                "are chosen and rejected swapped? else lower optimizer.learning_rate",
            )
        )
    if srpo.loss in REFERENCE_FREE:
        return findings
    chosen, rejected = (mean(f"rewards/{name}") / srpo.beta for name in ("chosen", "rejected"))
    remedy = (
        "add srpo.nll_weight, a higher srpo.beta, a lower optimizer.learning_rate or fewer steps"
    )
    if chosen < -1 and rejected < -1:
        findings.append(
            Finding(
                "warning",
                "both_falling",
                f"{at}: both log-probs fall, chosen answers by {-chosen:.1f} nats, rejected by "
                f"{-rejected:.1f}: probability goes to answers that are in no row",
                remedy,
            )
        )
    elif chosen - rejected > 2 and chosen < 0.1 * (chosen - rejected):
        findings.append(
            Finding(
                "note",
                "rejected_only",
                f"{at}: margins of {chosen - rejected:.1f} nats come from rejected answers alone "
                f"({rejected:+.1f}; chosen {chosen:+.1f})",
                remedy,
            )
        )
    return findings


def _speed(records: Sequence[Record]) -> list[Finding]:
    """Once, when a few steps after the compilation are timed."""
    if len(records) < WINDOW:
        return []
    later = records[1:]
    seconds = float(np.median([record.seconds for record in later]))
    rate = sum(r.tokens for r in later) / max(sum(r.seconds for r in later), 1e-9)
    first = records[0].seconds
    found = (
        f"{rate:.0f} tokens/s of all branches, {seconds:.2g} s a step; the first took {first:.2g} "
        f"s, mostly compiling; peak memory {peak_memory() / GIB:.2g} GiB"
    )
    return [Finding("ok", "speed", found)]


class Watch:
    """Says each finding of a run once, and keeps it as a line of `file`."""

    def __init__(self, file: Path, config: Config, stage: str, *, fresh: bool):
        """fresh: the run begins; else what `file` holds has been said."""
        self._file, self._config, self._stage = file, config, stage
        if distributed.writes() and (fresh or not file.exists()):
            file.write_text("")
        self._said = _names(file) if distributed.writes() else set()
        self._records: list[Record] = []

    def step(
        self,
        step: int,
        values: dict[str, float],
        learning_rate: float,
        tokens: int,
        seconds: float,
    ) -> None:
        """Look at the metrics of one step; tokens and seconds as in `Record`."""
        record = Record(step, dict(values), learning_rate, tokens, seconds)
        self._records = [*self._records[-49:], record]
        # The loop ends with an error of its own where a finding is one.
        found = during(self._records, self._config, self._stage)
        self.say(found, ("ok", "note", "warning"), step)

    def say(self, findings: Sequence[Finding], aloud: Sequence[Level], step: int = 0) -> None:
        """Keep new findings, and print those of the levels `aloud`."""
        for finding in findings:
            if finding.name in self._said:
                continue
            self._said.add(finding.name)
            if not distributed.writes():
                continue
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finding._asdict()}) + "\n")
            if finding.level in aloud:
                remedy = f"\n  -> {finding.remedy}" if finding.remedy else ""
                level = "" if finding.level == "ok" else f"{finding.level}: "
                tqdm.write(f"doctor: {level}{finding.found}{remedy}", file=sys.stdout)
                sys.stdout.flush()


def _names(file: Path) -> set[str]:
    names = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            names.add(json.loads(line)["name"])
        except (ValueError, KeyError):
            continue  # the line that was being written when the run was killed
    return names
