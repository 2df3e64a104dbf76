"""Trajectories: which rollouts are searched for risky steps, and all process pairs out of them."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saro_jax.pairing import modes, process_pairs, reflections, search
from saro_jax.pairing.continuations import OPENING, head
from saro_jax.pairing.outcome_pairs import ranked
from saro_jax.pairing.outcomes import RISKY_KINDS, Outcome
from saro_jax.pairing.process_pairs import Mended, Site, Worth
from saro_jax.pairing.rollouts import Ask, Rollouts, share_good
from saro_jax.records import RITD, Pref, PrefKind, Prompt, Reject, StepValue, Trace
from saro_jax.text.policy import Policy

MOST_INJECTED = 3  # steps of an injected thought


@dataclass(frozen=True)
class Plan:
    """How much is drawn: bad traces a prompt, continuations of a step, after a cue, and the rest.

    `floor`: reasoning tokens below which an answer to a harmful prompt is degenerate. `injected`:
    share of prompts whose thought is led astray.
    """

    walks: int = 1
    k: int = 4
    search: int = 8
    repair: bool = False
    injected: float = 0.25
    modes: bool = True
    floor: int = 40
    worth: Worth = field(default_factory=Worth)
    seed: int = 0


@dataclass
class Found:
    """What came of the trajectories; `traces` are continuations that pairs were made of."""

    pairs: list[Pref] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    values: list[StepValue] = field(default_factory=list)
    traces: dict[str, Trace] = field(default_factory=dict)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)  # modes, by prompt id

    def add(self, made: Pref | str | None, about: str, *used: Outcome | None) -> None:
        """Keep a pair and the traces behind it, or why there is none ("KIND: reason")."""
        if isinstance(made, str):
            self.rejects.append(Reject(about, made))
        elif made is not None:
            self.pairs.append(made)
            self.traces |= {one.trace.id: one.trace for one in used if one is not None}


def process(
    outcomes: Sequence[Outcome],
    rates: Mapping[str, tuple[int, int]],
    taught: Mapping[str, RITD],
    policy: Policy,
    rollouts: Rollouts,
    plan: Plan,
) -> Found:
    """All process pairs of the rollouts: PPA to PPG, no-op and mode pairs."""
    found = Found()
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.prompt.id, []).append(one)
    numbers = _Numbers()
    _from_walks(groups, rates, taught, policy, rollouts, plan, found, numbers)
    if plan.injected:
        _from_injected(groups, taught, policy, rollouts, plan, found, numbers)
    for i, mine in enumerate(groups.values()):
        good = [one for one in mine if one.good(rollouts.limits)]
        found.add(process_pairs.brevity(good, plan.floor), "")
        plain = [one for one in ranked(good, 0) if one.trace.steps and one.prompt.kind == "benign"]
        if plain:
            found.add(process_pairs.no_op(plain[0], i), plain[0].trace.id)
    if plan.modes:
        _from_modes(groups, rollouts, plan, found)
    return found


class _Numbers:
    """Counts up, so that stems are used in turn."""

    def __init__(self) -> None:
        self.next = 0

    def take(self) -> int:
        self.next += 1
        return self.next - 1


def walks(
    groups: Mapping[str, Sequence[Outcome]], plan: Plan, rollouts: Rollouts
) -> Iterator[tuple[PrefKind, Outcome]]:
    """(kind, trace) of the bad traces that are searched, the worst of each prompt first.

    PPA: an unsafe answer. PPC: a safe answer after unsafe reasoning. PPD: a refusal of a harmless
    prompt.
    """
    limits = rollouts.limits
    for mine in groups.values():
        usable = [
            one
            for one in mine
            if len(one.trace.steps) > 1
            and one.trace.parsed.status in ("ok", "truncated_answer")
            and one.trace.parsed.reasoning in one.trace.raw
        ]
        kinds: list[tuple[PrefKind, list[Outcome]]] = []
        if usable and usable[0].prompt.kind in RISKY_KINDS:
            unsafe = [one for one in usable if one.unsafe(limits)]
            kinds.append(("PPA", unsafe))
            thought = [
                one
                for one in usable
                if one.complete
                and one.safe(limits)
                and (one.reasoning.p_unsafe or 0) > limits.unsafe
            ]
            kinds.append(("PPC", thought))
        else:
            kinds.append(("PPD", [one for one in usable if one.complete and one.refuses()]))
        for kind, bad in kinds:
            order = sorted(bad, key=lambda one: (-(one.answer.p_unsafe or 0), one.trace.id))
            for one in order[: plan.walks]:
                yield kind, one


def _from_walks(
    groups: Mapping[str, Sequence[Outcome]],
    rates: Mapping[str, tuple[int, int]],
    taught: Mapping[str, RITD],
    policy: Policy,
    rollouts: Rollouts,
    plan: Plan,
    found: Found,
    numbers: _Numbers,
) -> None:
    """PPA to PPE: at the risky step of each bad trace."""
    chosen = list(walks(groups, plan, rollouts))
    valued = search.step_values([one for _, one in chosen], rates, rollouts, plan.k)
    sites: list[tuple[PrefKind, Site]] = []
    for kind, one in chosen:
        mine = valued[one.trace.id]
        found.values += mine
        site = search.site_of(one, mine, plan.worth)
        if site is None:
            found.add(f"{kind}: no risky step with a step before it", one.trace.id)
        else:
            sites.append((kind, site))
    late = {
        i: Site(site.outcome, site.step + 2, site.found_by)
        for i, (kind, site) in enumerate(sites)
        if kind == "PPA" and site.step + 2 < len(site.outcome.trace.steps)
    }
    tasks = [search.Task(s.outcome, s.prefix, s.step, numbers.take()) for _, s in sites]
    tasks += [search.Task(s.outcome, s.prefix, s.step, numbers.take()) for s in late.values()]
    best = search.mended(
        tasks,
        rollouts,
        policy,
        taught,
        plan.worth,
        search=plan.search,
        k=plan.k,
        repair=plan.repair,
    )
    later = dict(zip(late, best[len(sites) :], strict=True))
    for i, ((kind, site), good) in enumerate(zip(sites, best, strict=False)):
        name, limits = site.outcome.trace.id, rollouts.limits
        made = process_pairs.reflect_or_continue(kind, site, good, limits, plan.worth)
        found.add(_as(kind, made), name, good.outcome)
        if i in late:
            made = process_pairs.early_or_late(site, good, late[i], later[i], limits, plan.worth)
            found.add(_as("PPB", made), name, good.outcome, later[i].outcome)
        if kind == "PPA":
            task = search.Task(site.outcome, site.prefix, site.step, numbers.take())
            row = taught.get(site.outcome.prompt.text)
            plain: Mended = search.stencil(task, rollouts, policy, row)
            made = process_pairs.authentic_or_not(site, plain, policy, i, limits)
            found.add(_as("PPE", made), name, plain.outcome)


def _from_injected(
    groups: Mapping[str, Sequence[Outcome]],
    taught: Mapping[str, RITD],
    policy: Policy,
    rollouts: Rollouts,
    plan: Plan,
    found: Found,
    numbers: _Numbers,
) -> None:
    """PPG: out of one to three injected steps, a bad trace's own or stems, that were followed."""
    asks: dict[str, tuple[Ask, int, str]] = {}
    for name, mine in groups.items():
        prompt = mine[0].prompt
        rng = random.Random(f"{plan.seed}:injected:{name}")
        if prompt.kind == "benign" or rng.random() >= plan.injected:
            continue
        prefix, steps, source = injected(mine, rollouts, policy, rng)
        asks[name] = (
            Ask(prompt, prefix, plan.k, "injected", (source,) if source else ()),
            steps,
            source,
        )
    drawn = rollouts.draw([ask for ask, _, _ in asks.values()])
    led: list[tuple[Ask, int, Outcome, float]] = []
    for name, (ask, steps, _) in asks.items():
        after = drawn[ask.key]
        risky = ask.prompt.kind in RISKY_KINDS
        bad = [o for o in after if (o.unsafe(rollouts.limits) if risky else o.refuses())]
        bad = [o for o in bad if o.trace.parsed.status in ("ok", "truncated_answer")]
        good, total = share_good(after, rollouts.limits)
        if not bad:
            found.add("PPG: the injected thought was not followed", name)
        else:
            led.append((ask, steps, bad[0], good / total))
    tasks = [search.Task(one, ask.prefix, n, numbers.take()) for ask, n, one, _ in led]
    best = search.mended(
        tasks,
        rollouts,
        policy,
        taught,
        plan.worth,
        search=plan.search,
        k=plan.k,
        repair=False,
    )
    for (ask, _, one, value), good in zip(led, best, strict=True):
        made = process_pairs.recovery(ask.prefix, good, one, value, rollouts.limits, plan.worth)
        found.add(_as("PPG", made), ask.prompt.id, good.outcome, one)


def injected(
    mine: Sequence[Outcome], rollouts: Rollouts, policy: Policy, rng: random.Random
) -> tuple[str, int, str]:
    """(prefix, its steps, the trace they are from or "") of a thought that leads astray."""
    prompt: Prompt = mine[0].prompt
    risky = prompt.kind in RISKY_KINDS
    wanted = rng.randint(1, MOST_INJECTED)
    for one in sorted(mine, key=lambda one: one.trace.id):
        wrong = one.unsafe(rollouts.limits) if risky else one.refuses()
        usable = one.trace.parsed.reasoning in one.trace.raw and len(one.trace.steps) > wanted
        if wrong and usable and one.trace.parsed.status in ("ok", "truncated_answer"):
            return head(one.trace, wanted), wanted, one.trace.id
    base = rollouts.bases.get(prompt.id, prompt.text)
    slots = reflections.slots(prompt, base, policy, 0, 0)
    first = rng.randrange(100)
    texts = [
        reflections.fill(reflections.injected(prompt, first + i), slots) for i in range(wanted)
    ]
    return OPENING + "".join(f"{text}\n\n" for text in texts), wanted, ""


def _from_modes(
    groups: Mapping[str, Sequence[Outcome]], rollouts: Rollouts, plan: Plan, found: Found
) -> None:
    """Labels of the least reasoning that is enough, and a pair for each where there is one."""
    limits = rollouts.limits
    asks: dict[tuple[str, modes.Mode], Ask] = {}
    for name, mine in groups.items():
        prompt = mine[0].prompt
        asks[name, "none"] = Ask(prompt, modes.opening("none", ""), plan.k)
        thoughts = [
            o for o in mine if o.complete and modes.mode_of(o.trace.parsed.reasoning) == "full"
        ]
        if thoughts:
            source = ranked([o for o in thoughts if o.good(limits)] or thoughts, plan.floor)[0]
            opening = modes.opening("brief", source.trace.parsed.reasoning)
            asks[name, "brief"] = Ask(prompt, opening, plan.k, "self", (source.trace.id,))
    drawn = rollouts.draw(list(asks.values()))
    for name, mine in groups.items():
        by_mode: dict[modes.Mode, list[Outcome]] = {mode: [] for mode in modes.MODES}
        for one in mine:
            by_mode[modes.mode_of(one.trace.parsed.reasoning)].append(one)
        for mode in modes.MODES:
            if (name, mode) in asks:
                by_mode[mode] += drawn[asks[name, mode].key]
        rates: dict[modes.Mode, tuple[int, int]] = {
            mode: share_good(by_mode[mode], limits) for mode in modes.MODES
        }
        label = modes.cheapest(rates, mine[0].prompt.kind)
        found.labels[name] = {"mode": label, "mode_rates": {m: list(r) for m, r in rates.items()}}
        if label is None:
            continue
        better = ranked([o for o in by_mode[label] if o.good(limits)], 0)[0]
        at = modes.MODES.index(label)
        longer = [o for m in modes.MODES[at + 1 :] for o in by_mode[m] if o.good(limits)]
        short = [
            o
            for m in modes.MODES[:at]
            for o in by_mode[m]
            if not o.good(limits) and not o.answer.invalid
        ]
        worse = longer or short
        if worse:
            # The longest of what is longer; of what is too little, what fails.
            last = max(worse, key=lambda o: (o.trace.n_tok.reason or 0, o.trace.id))
            meta = {"mode": label, "against": modes.mode_of(last.trace.parsed.reasoning)}
            found.add(process_pairs.mode_pair(better, last, meta), name, better, last)


def _as(kind: str, made: Pref | str) -> Pref | str:
    return f"{kind}: {made}" if isinstance(made, str) else made
