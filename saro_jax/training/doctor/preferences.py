"""What preference pairs will teach: differences, lengths, contradictions."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from saro_jax.data.rows import Reject
from saro_jax.data.tokenise import Branch, Item
from saro_jax.training.doctor.items import digest, scored_tokens
from saro_jax.training.finding import Finding, percent

NEAR = 0.05  # a pair that differs in a smaller share of its tokens is nearly identical


def _pairs(items: Sequence[Item]) -> Iterator[tuple[Item, Branch, Branch]]:
    """Each item's first branch against each further one."""
    for item in items:
        for other in item.branches[1:]:
            yield item, item.branches[0], other


def pairs(items: Sequence[Item], rejects: Sequence[Reject]) -> list[Finding]:
    """How far the branches of a pair differ at all."""
    same = [r for r in rejects if r.reason.startswith("chosen equals rejected")]
    if not same and not any(True for _ in _pairs(items)):
        return []
    findings = []
    if same:
        cut = sum(r.reason.endswith("after truncation") for r in same)
        after = f" ({cut} of them only after the cut at data.max_length)" if cut else ""
        findings.append(
            Finding(
                "warning",
                "identical",
                f"{len(same)} pairs have identical branches{after} and are left out, first "
                f"{same[0].where}: their loss would stay at ln 2 without a gradient",
                "raise data.max_length"
                if cut == len(same)
                else "remove them, or mend how they were made",
            )
        )
    number, near, within, equal, tokens = 0, [], 0, 0, 0
    for item, a, b in _pairs(items):
        number += 1
        shorter = min(len(a.ids), len(b.ids))
        head = _equal_run(a.ids[:shorter], b.ids[:shorter])
        tail = _equal_run(a.ids[::-1][: shorter - head], b.ids[::-1][: shorter - head])
        # Tokens of the two that stand in no shared beginning or end.
        if len(a.ids) + len(b.ids) - 2 * (head + tail) <= NEAR * (len(a.ids) + len(b.ids)):
            near.append(item)
        within += head == shorter
        equal += 2 * int((a.scored[:head] & b.scored[:head]).sum())
        tokens += scored_tokens(a, b)
    if not number:
        return findings
    if near:
        findings.append(
            Finding(
                "warning" if len(near) > 0.05 * number else "note",
                "nearly_identical",
                f"{len(near)} of {number} pairs differ in at most {percent(NEAR)} of their "
                f"tokens, first {near[0].where}: hardly any gradient, most of it on few tokens",
                "look at them (python -m saro_jax.data.inspect) and remove what is no real "
                "preference",
            )
        )
    if within:
        findings.append(
            Finding(
                "warning" if within > 0.05 * number else "note",
                "contained",
                f"in {within} of {number} pairs one answer is the beginning of the other: all its "
                "tokens are shared, and only the rest of the longer one has a gradient",
                "often both were cut: raise data.max_length",
            )
        )
    share = equal / max(tokens, 1)
    found = f"the two answers of a pair begin alike for {percent(share)} of their scored tokens"
    if share > 0.1:
        findings.append(
            Finding(
                "warning" if share > 0.5 else "note",
                "shared_beginning",
                f"{found}: these are computed twice and have no gradient",
                "move the shared beginning into the column prefix (a process pair)",
            )
        )
    else:
        findings.append(Finding("ok", "shared_beginning", found))
    return findings


def length_bias(items: Sequence[Item]) -> list[Finding]:
    """Whether length alone tells the chosen answer from the rejected one."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for item, chosen, rejected in _pairs(items):
        by_kind[item.kind].append(scored_tokens(chosen) - scored_tokens(rejected))
    gaps = np.array([gap for some in by_kind.values() for gap in some])
    if not len(gaps):
        return []
    shorter, unequal = int((gaps < 0).sum()), int((gaps != 0).sum())
    low, high = wilson(shorter, unequal)
    rule, right = ("shorter", shorter) if 2 * shorter >= unequal else ("longer", unequal - shorter)
    if rule == "longer":
        low, high = 1 - high, 1 - low
    side = "longer" if gaps.mean() >= 0 else "shorter"
    found = (
        f"the chosen answer is {abs(gaps.mean()):.0f} tokens {side} on average (median "
        f"{np.median(gaps):.0f})"
    )
    if len(by_kind) > 1:
        means = ", ".join(f"{kind} {np.mean(some):+.0f}" for kind, some in by_kind.items())
        found += f", by kind: {means}"
    if unequal:
        found += (
            f"; 'the {rule} one is chosen' is right in {percent(right / unequal)} of {unequal} "
            f"pairs (95 % interval {percent(low)} to {percent(high)})"
        )
    if unequal and low > 0.6:
        remedy = (
            "balance lengths between chosen and rejected or set srpo.length=mean or desensitised; "
            "else length is learnt"
        )
        return [Finding("warning", "length_bias", found, remedy)]
    return [Finding("note" if unequal and low > 0.5 else "ok", "length_bias", found)]


def labels(items: Sequence[Item]) -> list[Finding]:
    """Pairs that contradict each other, and the noise that the rows state."""
    findings = []
    first: dict[tuple[bytes, bytes], str] = {}  # where (chosen, rejected) stands
    for item, chosen, rejected in _pairs(items):
        first.setdefault((digest(item.prefix, chosen.ids), digest(item.prefix, rejected.ids)),
                         item.where)  # fmt: skip
    swapped = [((w, r), (r, w)) for w, r in first if w < r and (r, w) in first]
    both = {chosen for chosen, _ in first} & {rejected for _, rejected in first}
    both -= {text for pair, _ in swapped for text in pair}
    number = sum(1 for _ in _pairs(items))
    robust = "srpo.loss=robust with srpo.label_smoothing=that share, or a row's noise"
    if swapped:
        findings.append(
            Finding(
                "warning",
                "contradictions",
                f"{len(swapped)} pairs come twice with chosen and rejected swapped, first "
                f"{first[swapped[0][0]]} and {first[swapped[0][1]]}: at least "
                f"{percent(len(swapped) / number)} of {number} labels are wrong",
                f"decide or remove them; labels like these are noisy elsewhere too: {robust}",
            )
        )
    if both:
        findings.append(
            Finding(
                "note",
                "ranked",
                f"{len(both)} answers are chosen in one row and rejected in another "
                "of the same prompt",
                "right for ranked answers (best > middle > worst); else remove one of the rows",
            )
        )
    noise = [value for item in items if (value := item.noise) is not None]
    if noise:
        mean = float(np.mean(noise))
        findings.append(
            Finding(
                "warning" if mean > 0.3 else "note",
                "noise",
                f"{len(noise)} rows state a label noise, {percent(mean)} on average",
                "rows near 50 % teach nothing: remove them",
            )
        )
    if number and not findings:
        findings.append(Finding("ok", "labels", f"no contradiction among {number} pairs"))
    return findings


def _equal_run(a: np.ndarray, b: np.ndarray) -> int:
    """How many first entries two arrays of one length share."""
    parted = np.flatnonzero(a != b)
    return int(parted[0]) if len(parted) else len(a)


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right of `of`; (0, 1) where there is nothing."""
    if of == 0:
        return 0.0, 1.0
    share = right / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)
