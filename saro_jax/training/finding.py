"""Findings: what a check of a run says, with which figures, and what to do about it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)


class Finding(NamedTuple):
    """One thing that was looked at: `found` says it with figures, `remedy` what to do."""

    level: Level
    name: str
    found: str
    remedy: str = ""


def report(findings: Sequence[Finding]) -> str:
    """A list by level, the gravest first; what is in order takes one line each."""
    lines = []
    for level in reversed(LEVELS):
        group = [finding for finding in findings if finding.level == level]
        if group:
            plural = "s" if len(group) > 1 and level != "ok" else ""
            lines.append("in order" if level == "ok" else f"{len(group)} {level}{plural}")
        for finding in group:
            lines.append(f"  {finding.name}: {finding.found}")
            if finding.remedy:
                lines.append(f"    -> {finding.remedy}")
    return "\n".join(lines)


def refuse(findings: Sequence[Finding]) -> None:
    """ValueError for a run that cannot work; an estimate of memory alone stops nothing."""
    for finding in findings:
        if finding.level == "error" and finding.name != "memory":
            raise ValueError(f"{finding.name}: {finding.found}; {finding.remedy}")


def percent(share: float) -> str:
    text = f"{100 * share:.0f}" if share == 0 or share >= 0.1 else f"{100 * share:.1f}"
    return f"{text} %"
