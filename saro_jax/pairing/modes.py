"""Modes of reasoning: the least of none, brief and full that is enough for a prompt."""

from collections.abc import Mapping
from typing import Literal

from saro_jax.records import Kind
from saro_jax.text import reasoning

Mode = Literal["none", "brief", "full"]
MODES: tuple[Mode, ...] = ("none", "brief", "full")  # the cheapest first
ENOUGH = 0.9  # share of good answers
BRIEF_STEPS, BRIEF_WORDS = 2, 60  # about 80 tokens
WEIGHT = 0.3  # of a MODE pair


def mode_of(thought: str) -> Mode:
    """What mode a reasoning has by its length."""
    if not thought.strip():
        return "none"
    brief = len(reasoning.segment(thought)) <= BRIEF_STEPS and len(thought.split()) <= BRIEF_WORDS
    return "brief" if brief else "full"


def cheapest(rates: Mapping[Mode, tuple[int, int]], kind: Kind) -> Mode | None:
    """The first mode whose share of good answers is enough, given (good, all) of each; else None.

    A jailbreak is trusted without reasoning only where that never failed.
    """
    for mode in MODES:
        good, total = rates.get(mode, (0, 0))
        if mode == "none" and kind == "jailbreak" and good < total:
            continue
        if total and good / total >= ENOUGH:
            return mode
    return None


def opening(mode: Mode, thought: str) -> str:
    """What an answer in a mode is forced to begin with; `thought` is a whole reasoning, for brief.

    none: an empty block. brief: the first steps of the thought that fit, and its decision, closed.
    full: nothing.
    """
    if mode == "none":
        return f"{reasoning.OPEN}\n\n{reasoning.CLOSE}\n\n"
    if mode == "full":
        return ""
    decided = reasoning.decision(thought)
    rest = reasoning.without_decision(thought)
    kept: list[str] = []
    for step in reasoning.segment(rest)[: BRIEF_STEPS - (decided is not None) or 1]:
        if kept and len(" ".join([*kept, step.text]).split()) > BRIEF_WORDS:
            break
        kept.append(" ".join(step.text.split()[:BRIEF_WORDS]))
    if decided is not None:
        kept.append(f"Decision: {decided}")
    return f"{reasoning.OPEN}\n" + "\n\n".join(kept) + f"\n{reasoning.CLOSE}\n\n"
