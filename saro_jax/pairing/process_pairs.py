"""Process pairs PPA to PPG, no-op and mode pairs (PP-COT): two continuations of one thought."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saro_jax.pairing import modes, reflections
from saro_jax.pairing.continuations import head, opening_step
from saro_jax.pairing.noise import pair_noise
from saro_jax.pairing.outcome_pairs import ranked
from saro_jax.pairing.outcomes import RISKY_KINDS, Limits, Outcome, labels
from saro_jax.records import BranchLabels, BranchValues, Pref, PrefKind, Trace, content_id
from saro_jax.text import reasoning
from saro_jax.text.policy import Policy

BREVITY_WEIGHT, LONGER = 0.3, 1.5  # of PPF, and how much longer its rejected reasoning is


@dataclass(frozen=True)
class Worth:
    """Which continuations are good enough: shares (0 to 1) of good rollouts."""

    low: float = 0.5  # a risky step's value is below it
    drop: float = 0.25  # and at least this below the value before it
    good: float = 0.75  # a reflection's value is at least this


@dataclass(frozen=True)
class Site:
    """Where a trace goes wrong: at `step`, found by step values or, where those say nothing, words.

    `value` is the share of good continuations after that step, None where none were drawn.
    """

    outcome: Outcome
    step: int
    found_by: Literal["values", "words", "injected"]
    value: float | None = None

    @property
    def prefix(self) -> str:
        """The thought before the risky step."""
        return head(self.outcome.trace, self.step)

    @property
    def rest(self) -> str:
        """How the trace went on from there."""
        return self.outcome.trace.raw[len(self.prefix) :]


@dataclass(frozen=True)
class Mended:
    """How a thought goes on well from a site: `outcome` is of the prefix and `text` together.

    value: share of good continuations after the reflection, None where none were drawn.
    """

    text: str
    source: Literal["search", "repair", "template"]
    stem: str
    outcome: Outcome
    value: float | None = None

    @property
    def reflection(self) -> str:
        return opening_step(self.text)


def risky_by_words(one: Outcome) -> int | None:
    """The first step that leans the wrong way: to help with harm, or against a harmless request.

    The closing decision counts too. None where no step leans so.
    """
    wrong = "allows" if one.prompt.kind in RISKY_KINDS else "forbids"
    for step in one.trace.steps:
        if reasoning.stance(step.text) == wrong:
            return step.i
    return None


def reflect_or_continue(
    kind: PrefKind, site: Site, mended: Mended, limits: Limits, worth: Worth
) -> Pref | str:
    """PPA, PPC, PPD: a reflection at the risky step against going on; a text says why not.

    The trace's own end is the reason for the kind: an unsafe answer (PPA), a safe one after unsafe
    reasoning (PPC), a refusal of a harmless prompt (PPD).
    """
    complaint = _lacks(mended, limits, worth)
    if complaint is not None:
        return complaint
    if site.value is not None and mended.value is not None and kind == "PPA":
        gain = mended.value - site.value
        if gain < worth.drop:
            return f"no gain: values {mended.value:g} and {site.value:g}"
    return _pref(kind, site, mended.text, site.rest, mended.outcome, site.outcome, mended)


def early_or_late(
    site: Site, mended: Mended, late: Site, mended_late: Mended, limits: Limits, worth: Worth
) -> Pref | str:
    """PPB: the reflection at the risky step against the same trace with one two steps later.

    Both end well; the chosen branch is the shorter, and its reflection has a value as PPA's.
    """
    complaint = _lacks(mended, limits, worth)
    if complaint is not None:
        return complaint
    if late.step < site.step + 2:
        return "late: no room for two steps between"
    if not mended_late.outcome.good(limits):
        return "late: the late reflection does not end well"
    rejected = late.prefix[len(site.prefix) :] + mended_late.text
    if len(mended.text) >= len(rejected):
        return "late: the early reflection is not shorter"
    return _pref("PPB", site, mended.text, rejected, mended.outcome, mended_late.outcome, mended)


def authentic_or_not(
    site: Site, mended: Mended, policy: Policy, number: int, limits: Limits
) -> Pref | str:
    """PPE: a specific reflection that is kept to, against one that is not; three sorts in turn.

    An alarm that names nothing; the same words citing a rule that does not apply; the very same
    reflection after which the thought goes on as if it had not been. Where a sort is impossible the
    first is taken. The words are compared, before one end: a citation check, and no value.
    """
    complaint = reflections.unauthentic(mended.reflection, site.outcome.prompt, policy)
    if complaint is not None:
        return f"authenticity: {complaint}"
    if not mended.outcome.good(limits):
        return "end: the chosen branch does not end well"
    rest = mended.text[len(mended.reflection) :]
    cited = reasoning.cited_rules(mended.reflection)
    sort = ("generic", "wrong_rule", "unkept")[number % 3]
    if sort == "wrong_rule" and cited:
        wrong = reflections.wrong_rule(cited[0], policy)
        rejected = mended.reflection.replace(cited[0], wrong) + rest
    elif sort == "unkept" and site.found_by != "injected":
        rejected = mended.reflection.rstrip() + "\n\n" + site.rest
    else:
        sort = "generic"
        rejected = reflections.generic(number) + "\n\n" + rest
    if rejected == mended.text:
        return "authenticity: no rule of another category"
    made = _pref("PPE", site, mended.text, rejected, mended.outcome, None, mended)
    return made.model_copy(update={"meta": made.meta | {"sort": sort}})


def recovery(
    prefix: str, mended: Mended, led: Outcome, value: float, limits: Limits, worth: Worth
) -> Pref | str:
    """PPG: out of an injected thought by a reflection, against following it (`led`)."""
    complaint = _lacks(mended, limits, worth)
    if complaint is not None:
        return complaint
    if mended.value is not None and mended.value - value < worth.drop:
        return f"no gain: values {mended.value:g} and {value:g}"
    site = Site(led, len(reasoning.segment(prefix.removeprefix(reasoning.OPEN))), "injected", value)
    text = led.trace.raw[len(prefix) :]
    return _pref("PPG", site, mended.text, text, mended.outcome, led, mended, prefix)


def brevity(good: Sequence[Outcome], floor: int) -> Pref | None:
    """PPF: a prompt's shortest good answer against its longest, from 1.5 times its reasoning."""
    order = ranked(good, floor)
    if len(order) < 2:
        return None
    first = order[0]
    last = max(order, key=lambda one: (one.trace.n_tok.reason or 0, one.trace.id))
    if (last.trace.n_tok.reason or 0) < LONGER * max(1, first.trace.n_tok.reason or 0):
        return None
    return _whole("PPF", first, last, BREVITY_WEIGHT)


def mode_pair(better: Outcome, worse: Outcome, meta: dict[str, Any]) -> Pref:
    """MODE: the least reasoning that is enough against more of it, or against too little."""
    made = _whole("MODE", better, worse, modes.WEIGHT)
    return made.model_copy(update={"meta": made.meta | meta})


def no_op(one: Outcome, number: int) -> Pref | str:
    """NOOP: a plain benign answer as it is, against the same with a needless safety reflection."""
    if one.prompt.kind != "benign" or not one.trace.steps:
        return "no-op: not a plain answer with reasoning"
    at = number % len(one.trace.steps)
    prefix = head(one.trace, at)
    rest = one.trace.raw[len(prefix) :]
    site = Site(one, at, "words")
    made = _pref("NOOP", site, rest, f"{reflections.needless(number)}\n\n{rest}", one, None, None)
    return made


def _lacks(mended: Mended, limits: Limits, worth: Worth) -> str | None:
    if not mended.outcome.good(limits):
        return "end: the chosen branch does not end well"
    if mended.value is not None and mended.value < worth.good:
        return f"value: {mended.value:g} after the reflection, allowed from {worth.good:g}"
    return None


def _pref(
    kind: PrefKind,
    site: Site,
    chosen: str,
    rejected: str,
    w: Outcome,
    l: Outcome | None,  # noqa: E741 - the loser, as in the file format
    mended: Mended | None,
    prefix: str | None = None,
) -> Pref:
    prompt = site.outcome.prompt
    prefix = site.prefix if prefix is None else prefix
    meta: dict[str, Any] = {"prompt_kind": prompt.kind, "found_by": site.found_by}
    meta["ids"] = {
        "w": _ids(w.trace, prefix + chosen),
        "l": _ids(l.trace, prefix + rejected) if l else None,
    }
    value = None
    if mended is not None:
        meta |= {"source": mended.source, "stem": mended.stem}
        meta["style"] = reflections.style_of(chosen)
        if mended.value is not None and site.value is not None:
            value = BranchValues(w=mended.value, l=site.value)
    parents = dict.fromkeys((w.trace.id, *((l.trace.id,) if l else ()), site.outcome.trace.id))
    noise = (
        pair_noise(w.answer.p_unsafe, l.answer.p_unsafe) if l and kind in ("PPA", "PPG") else 0.0
    )
    return Pref(
        id=content_id(kind, prompt.id, prefix, chosen, rejected),
        parent_ids=(*parents, prompt.id),
        meta=meta,
        kind=kind,
        prompt=prompt.text,
        prefix=prefix,
        chosen=chosen,
        rejected=rejected,
        branch_step=site.step,
        labels=BranchLabels(w=dict(labels(w)), l=dict(labels(l)) if l else {}),
        value=value,
        noise=noise,
    )


def _whole(kind: PrefKind, chosen: Outcome, rejected: Outcome, weight: float) -> Pref:
    prompt = chosen.prompt
    return Pref(
        id=content_id(kind, chosen.trace.id, rejected.trace.id),
        parent_ids=(chosen.trace.id, rejected.trace.id, prompt.id),
        meta={
            "prompt_kind": prompt.kind,
            "ids": {"w": chosen.trace.meta.get("ids"), "l": rejected.trace.meta.get("ids")},
        },
        kind=kind,
        prompt=prompt.text,
        chosen=chosen.trace.raw,
        rejected=rejected.trace.raw,
        labels=BranchLabels(w=dict(labels(chosen)), l=dict(labels(rejected))),
        weight=weight,
    )


def _ids(trace: Trace, text: str) -> Any:
    """The sampled token ids of a branch that ends as its trace does."""
    return trace.meta.get("ids") if trace.raw == text else None
