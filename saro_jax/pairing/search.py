"""Search: step values of traces that end badly, their risky steps, and how to go on well there."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro_jax.pairing import reflections, values
from saro_jax.pairing.continuations import head, opening_step, whole
from saro_jax.pairing.outcomes import RISKY_KINDS, Outcome
from saro_jax.pairing.process_pairs import Mended, Site, Worth, risky_by_words
from saro_jax.pairing.rollouts import Ask, Rollouts, share_good
from saro_jax.records import RITD, Prompt, StepValue
from saro_jax.text import policy as policies
from saro_jax.text import reasoning, template, template_teacher
from saro_jax.text.policy import Policy

TRIED = 2  # continuations with a reflection whose value is measured, the shortest good ones


@dataclass(frozen=True)
class Task:
    """A prefix of `step` steps, the last of which a reflection is to take back.

    `number` picks the reflection's style and its stem, in turn.
    """

    outcome: Outcome
    prefix: str
    step: int
    number: int

    @property
    def style(self) -> reflections.Style:
        return "marked" if self.number % 2 else "unmarked"


def step_values(
    walks: Sequence[Outcome], rates: Mapping[str, tuple[int, int]], rollouts: Rollouts, k: int
) -> dict[str, list[StepValue]]:
    """By trace: the value of its prompt (step -1) and of each step, by k continuations each."""
    asks = {
        (one.trace.id, step): Ask(one.prompt, head(one.trace, step + 1), k, "self", (one.trace.id,))
        for one in walks
        for step in range(len(one.trace.steps))
    }
    drawn = rollouts.draw(list(asks.values()))
    found: dict[str, list[StepValue]] = {}
    for one in walks:
        found[one.trace.id] = [values.step_value(one.trace.id, -1, *rates[one.prompt.id])]
    for (name, step), ask in asks.items():
        counts = share_good(drawn[ask.key], rollouts.limits)
        found[name].append(values.step_value(name, step, *counts))
    return found


def site_of(one: Outcome, valued: Sequence[StepValue], worth: Worth) -> Site | None:
    """Where a trace goes wrong: where its values fall, else where its words lean the wrong way.

    A reflection needs a thought to take back: what goes wrong in the first step is cut after it.
    None where nothing goes wrong, or where there is no step to come.
    """
    # Where no continuation was drawn, for want of room say, nothing is known, nor after that.
    drawn = itertools.takewhile(lambda v: v.n_roll, valued)
    shares = [v.n_good / v.n_roll for v in drawn]
    step = values.first_risky(shares, worth.low, worth.drop)
    found_by = "values" if step is not None else "words"
    step = risky_by_words(one) if step is None else step
    if step is None or len(valued) < 3:
        return None
    step = max(1, step)
    after = valued[step + 1]
    return Site(one, step, found_by, after.n_good / after.n_roll if after.n_roll else None)


def mended(
    tasks: Sequence[Task],
    rollouts: Rollouts,
    policy: Policy,
    taught: Mapping[str, RITD],
    worth: Worth,
    *,
    search: int,
    k: int,
    repair: bool,
) -> list[Mended]:
    """For each task the best way to go on that was found, in the order of the tasks.

    First continuations after a neutral cue (`search` of them), the shortest that end well; then, on
    request, a repair by the model that is told the policy and the mistake; then a stem and the
    warmup's answer to the prompt. The first whose reflection has a value of `worth.good` is taken,
    else the stem, whatever its value.
    """
    cues = {i: reflections.cue(task.style, task.number) for i, task in enumerate(tasks)}
    asks = {i: _search(task, cues[i], rollouts, policy, search) for i, task in enumerate(tasks)}
    drawn = rollouts.draw([ask for ask in asks.values() if search])
    candidates: dict[int, list[Mended]] = {}
    for i, task in enumerate(tasks):
        candidates[i] = [
            Mended(one.trace.raw[len(task.prefix) :], "search", cues[i], one)
            for one in _shortest(drawn.get(asks[i].key, []), rollouts)[:TRIED]
        ]
    if repair:
        told = {i: _repair(task, policy, rollouts, search or 1) for i, task in enumerate(tasks)}
        drawn = rollouts.draw(list(told.values()))
        for i, task in enumerate(tasks):
            found = _shortest(drawn[told[i].key], rollouts)[:1]
            candidates[i] += [
                Mended(one.trace.raw[len(task.prefix) :], "repair", "", one) for one in found
            ]
    for i, task in enumerate(tasks):
        candidates[i].append(stencil(task, rollouts, policy, taught.get(task.outcome.prompt.text)))
    after = {
        (i, j): Ask(
            task.outcome.prompt, task.prefix + _closed(one), k, "self", (one.outcome.trace.id,)
        )
        for i, task in enumerate(tasks)
        for j, one in enumerate(candidates[i])
    }
    drawn = rollouts.draw([ask for ask in after.values() if k])
    best = []
    for i in range(len(tasks)):
        valued = []
        for j, one in enumerate(candidates[i]):
            good, total = share_good(drawn.get(after[i, j].key, []), rollouts.limits)
            share = round(good / total, 4) if total else None
            valued.append(Mended(one.text, one.source, one.stem, one.outcome, share))
        enough = [one for one in valued if one.value is None or one.value >= worth.good]
        best.append((enough or valued[-1:])[0])
    return best


def stencil(task: Task, rollouts: Rollouts, policy: Policy, row: RITD | None) -> Mended:
    """A reflection from a stem, the decision and an answer: the warmup's, or one from stems."""
    prompt = task.outcome.prompt
    stem = reflections.specific(prompt, task.style, task.number)
    slots = _slots(task, rollouts, policy)
    decision, answer = _end(prompt, row, slots, task.number)
    text = f"{reflections.fill(stem, slots)}\n\nDecision: {decision}\n{reasoning.CLOSE}\n\n{answer}"
    trace = whole(
        prompt,
        task.prefix + text,
        model="template",
        origin="template",
        parents=(task.outcome.trace.id, *((row.id,) if row else ())),
        count=rollouts.count,
    )
    return Mended(text, "template", stem, rollouts.judged([trace], [prompt])[0])


def _end(
    prompt: Prompt, row: RITD | None, slots: Mapping[str, str], number: int
) -> tuple[str, str]:
    if row is not None:
        return row.decision, row.answer
    if prompt.kind not in RISKY_KINDS:
        return "comply", str(prompt.meta.get("answer") or "Gladly. What would you like to know?")
    stems = template_teacher.stems()
    own = stems["categories"].get(slots["rule"].split(".")[0], stems["categories"]["other"])
    offer = own["offer"][number % len(own["offer"])]["answer"]
    values = {**slots, "offer_sentence": offer, "harm": own["harm"][number % len(own["harm"])]}
    return "refuse", reflections.fill(stems["refuse"][number % len(stems["refuse"])], values)


def _search(task: Task, cue: str, rollouts: Rollouts, policy: Policy, n: int) -> Ask:
    text = reflections.fill(cue, _slots(task, rollouts, policy))
    parents = (task.outcome.trace.id,)
    return Ask(task.outcome.prompt, task.prefix + text, n, "self", parents)


def _slots(task: Task, rollouts: Rollouts, policy: Policy) -> dict[str, str]:
    prompt = task.outcome.prompt
    base = rollouts.bases.get(prompt.id, prompt.text)
    return reflections.slots(prompt, base, policy, max(task.step - 1, 0), task.number)


def _repair(task: Task, policy: Policy, rollouts: Rollouts, n: int) -> Ask:
    """T3 for harmful prompts, T4 for others; the last step of the prefix is the one to correct."""
    prompt = task.outcome.prompt
    steps = [one.text.strip() for one in task.outcome.trace.steps[: task.step]]
    marked = task.style == "marked"
    slots = {
        "policy": policies.render(policy, [c for c in prompt.categories if c in policy.categories]),
        "prompt": prompt.text,
        "steps": "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1)),
        "style": "Open that step with a word such as Wait or Hold on."
        if marked
        else "Do not open that step with a word such as Wait or Hold on.",
    }
    if prompt.kind in RISKY_KINDS:
        more = {"risky_step": str(task.step), "modes": "refuse, safe_complete"}
        told = template.render("t3_reflect_rewrite", slots | more)
    else:
        more = {"last_step": str(task.step), "mode": "comply"}
        told = template.render("t4_reflect_benign", _only("t4_reflect_benign", slots | more))
    parents = (task.outcome.trace.id,)
    return Ask(prompt, task.prefix, n, "repair", parents, tuple(told))


def _only(name: str, given: Mapping[str, Any]) -> dict[str, str]:
    return {slot: given[slot] for slot in template.slots(name)}


def _shortest(outcomes: Sequence[Outcome], rollouts: Rollouts) -> list[Outcome]:
    good = [one for one in outcomes if one.good(rollouts.limits)]
    return sorted(good, key=lambda one: (len(one.trace.raw), one.trace.id))


def _closed(one: Mended) -> str:
    """The reflection, ended as a step: what is drawn after it begins a new one."""
    return opening_step(one.text).split(reasoning.CLOSE)[0].rstrip() + "\n\n"
