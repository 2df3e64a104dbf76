"""RIT-D: `python -m saro_jax.synthesize [--config=RECIPE] --out=DIR [--synthesize.KEY=VALUE ...]`.

From prompts and a written policy to reasoned answers that the warmup trains on: a pool of harmful,
jailbreak, benign and borderline prompts; disguises around them; a split by group; decontamination
against evaluation sets; a teacher's answers; filters; of each prompt's accepted answers the
shortest that will do. OUT gets

ritd.jsonl, ritd_dev.jsonl     rows that `train --stage=rw` reads, of train and held-out groups
prompts.jsonl, traces.jsonl    the pool and all accepted answers, which the rows came from
rejects/                       what was dropped, each with its reason; answers with their text
contamination.json             hits in the evaluation sets; an exact one ends the run
manifest.json                  inputs, hashes, counts, yields, lengths over n: how it was made

The same command goes on where an earlier one was stopped, asks the teacher for nothing twice, and
the same inputs, seed and teacher give the same files.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.config import Config, SynthesizeConfig
from saro_jax.data import filters
from saro_jax.data import prompts as pool
from saro_jax.data.filters import Judged, Judges, Limits
from saro_jax.generation import assisting, contexts, teaching
from saro_jax.generation.api import Api
from saro_jax.generation.requests import Generator
from saro_jax.generation.teaching import Asking, Called, Function
from saro_jax.judging.guards import GUARDS
from saro_jax.judging.judges import Judge, open_judge
from saro_jax.records import (
    RITD,
    Journal,
    Parsed,
    Prompt,
    Reject,
    Sampler,
    Stage,
    TokenCounts,
    Trace,
)
from saro_jax.text import policy as policies
from saro_jax.text import reasoning
from saro_jax.text.policy import Policy
from saro_jax.text.template_teacher import TemplateTeacher
from saro_jax.text.traces import decided, trace_steps

LEAST_YIELD = 0.3  # share of a kind's prompts with a row, below which more prompts are needed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [configuration.CONFIG, configuration.OUT]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.synthesize", __doc__, argv, flags
        )
        # The tree needs training rows, which are what this stage makes.
        rows = f"--data.train={args.out / 'ritd.jsonl'}"
        config = configuration.load(args.config, [*args.overrides, rows], "rw")
        manifest = run(config, args.out, progress=sys.stderr.isatty())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print(summary(manifest, args.out))
    return 0


def run(
    config: Config,
    out: Path,
    *,
    teacher: Callable[[Policy, Sequence[Prompt]], Function] | None = None,
    judges: Judges | None = None,
    judges_version: str = "rules",
    limits: Limits | None = None,
    embed: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Make RIT-D in `out` and return the manifest; nothing is done where it is there already.

    `teacher(policy, prompts)` makes another teacher than the config's. `judges_version` names
    judges other than the default ones, as the files depend on them; `limits` are their thresholds
    (what of it the config sets is the config's). `embed` adds decontamination by embeddings.
    ValueError, in one line, for wrong inputs and for prompts that stand in an evaluation set.
    """
    settings = config.synthesize
    policy = policies.load(settings.policy)
    judges = judges or Judges()
    limits = _limits(settings, limits or Limits())
    columns = pool.column_map(configuration.names(settings.columns), "--synthesize.columns")
    given = pool.sources(configuration.names(settings.prompts), "--synthesize.prompts")
    prompts, rejects, inputs = pool.read(given, columns, policy, settings.split, config.seed)
    n_in = sum(one.rows for one in inputs)
    evaluation: dict[str, list[str]] = {}
    for name in configuration.names(settings.evaluation):
        evaluation[name], about = pool.texts(name, columns, settings.split)
        inputs.append(about)
    prompts, bases, dropped, contamination = _pool(
        prompts, evaluation, settings, config.seed, embed
    )
    rejects += dropped
    spare = TemplateTeacher(policy, [*prompts, *bases])
    shown = settings.shots or settings.search
    examples = contexts.read_examples(settings.examples, "synthesize.examples") if shown else []
    with contextlib.ExitStack() as stack:
        if settings.guard is not None and judges.answer_risk is None:
            if settings.guard.partition("=")[0] not in GUARDS:
                raise ValueError(
                    f"--synthesize.guard={settings.guard}: expected NAME=MODEL or NAME=MODEL@URL, "
                    f"NAME one of {', '.join(GUARDS)}"
                )
            guard = open_judge(settings.guard, server=config.server, option="--synthesize.guard")
            stack.callback(guard.close)
            risk = _risk(guard)
            judges = dataclasses.replace(judges, answer_risk=risk, reasoning_risk=risk)
            judges_version = f"{guard.name}:{guard.version}"
        source: Generator
        if teacher is None and settings.teacher != "template":
            source = teaching.opened(config)
            origin = "self" if settings.teacher == "self" else "teacher"
            stack.callback(getattr(source, "close", lambda: None))
        else:
            function = spare if teacher is None else teacher(policy, [*prompts, *bases])
            source, origin = Called(function, settings.concurrency), function.origin
        stage = Stage(
            "synthesize",
            # What is read from the tree; how many requests run at a time, and where the server
            # stands, changes nothing.
            settings.model_dump(mode="json", exclude={"concurrency", "teacher_url"})
            | {"judges": judges_version, "limits": vars(limits)}
            | ({"examples_sha": contexts.digest(examples)} if examples else {}),
            inputs,
            config.seed,
            policy.version,
            source.name,
            source.sha,
        )
        before = records.finished(stage, out)
        if before is not None:
            return before
        _check_hits(contamination, settings, out)
        asking = Asking(source, policy, settings, config.seed, out, progress, examples)
        journal = stack.enter_context(asking.journal(spare))
        said: dict[str, Any] = {}
        if settings.label:
            prompts, said["labels"] = assisting.labelled(asking, prompts, journal)
            spare = TemplateTeacher(policy, [*prompts, *bases])
        if settings.score:
            quality = assisting.scorer(asking, prompts, journal)
            judges = dataclasses.replace(judges, quality=quality)
        if origin == "self":
            said["flip_rate"] = _flips(asking, prompts, journal, judges, settings)
        replies = asking.replies(prompts, spare, journal)
        count = _counter(settings.tokenizer)

        def made(prompt: Prompt, reply: Mapping[str, Any], i: int) -> Trace:
            return _trace(prompt, reply, i, source.name, origin, settings, count)

        traces: list[Trace] = []
        withheld: list[Reject] = []
        for prompt in prompts:
            found = replies[prompt.id]
            for i, reply in enumerate(found):
                if reply["finish"] == "filter":
                    name = records.content_id(prompt.id, source.name, reply["seed"], i)
                    about = {"prompt_id": prompt.id, **reply}
                    withheld.append(Reject(name, "filter: withheld by the server", record=about))
                else:
                    traces.append(made(prompt, reply, i))
            if not found:
                rejects.append(Reject(prompt.id, f"no answer: {asking.why_none(prompt)}"))
        by_id = {prompt.id: prompt for prompt in prompts}
        items = [Judged(trace, by_id[trace.prompt_id]) for trace in traces]
        accepted, failed = filters.passed(items, policy, judges, limits)

        def edited(name: str, edits: Sequence[tuple[Judged, Mapping[str, Any]]]) -> None:
            """What has been edited goes through the filters as any answer."""
            new = []
            for item, reply in edits:
                trace = made(item.prompt, {**reply, "edit": name, "of": item.trace.id}, 0)
                trace = trace.model_copy(update={"meta": trace.meta | {"i": item.trace.meta["i"]}})
                new.append(Judged(trace, item.prompt))
            passed, dropped = filters.passed(new, policy, judges, limits)
            said[name] = {"made": len(new), "accepted": len(passed)}
            traces.extend(one.trace for one in new)
            accepted.extend(passed)
            failed.extend(dropped)

        if settings.repair and judges.reasoning_risk is not None:
            ids = {r.id for r in failed if r.reason.startswith("reasoning_safety")}
            broken = [
                item
                for item in items
                if item.trace.id in ids and item.prompt.kind in ("harmful", "jailbreak")
            ]
            risk, limit = judges.reasoning_risk, limits.reasoning_risk
            edited("repair", assisting.repaired(asking, broken, journal, risk, limit))
        groups = _by_prompt(accepted)
        if settings.compress:
            first = [
                filters.ranked(g, settings.srs, settings.srs_floor)[0] for g in groups.values()
            ]
            edited("compress", assisting.shortened(asking, first, journal))
            groups = _by_prompt(accepted)
        stage.run["cost"] = round(sum(asking.costs.values()), 6)
        if isinstance(source, Api):
            stage.run["server"] = source.report()
    kept, unused = filters.chosen(
        list(groups.values()), settings.srs, settings.srs_floor, settings.overlap
    )
    report = {
        "yield": filters.yields(prompts, traces, accepted, kept, [*rejects, *failed, *unused]),
        "lengths": {
            kind: filters.length_report(
                [one for one in prompts if one.kind == kind],
                groups,
                settings.n,
                settings.srs,
                settings.srs_floor,
            )
            for kind in records.KINDS
            if any(one.kind == kind for one in prompts)
        },
        "decisions": filters.decisions(accepted, kept),
        "teacher_refusals": sum(
            any(reply.get("fallback") for reply in one) for one in replies.values()
        ),
        "dev_rows": sum(item.prompt.split == "dev" for item in kept),
        "withheld": len(withheld),
        "tokens_counted_by": settings.tokenizer or "words and marks",
    } | said
    rows = [_row(item, settings) for item in kept]
    split = [item.prompt.split for item in kept]
    shards: dict[str, Sequence[records.Record]] = {
        "prompts.jsonl": [*prompts, *bases],
        "traces.jsonl": [item.trace for item in accepted],
        "ritd.jsonl": [row for row, where in zip(rows, split, strict=True) if where == "train"],
        "ritd_dev.jsonl": [row for row, where in zip(rows, split, strict=True) if where == "dev"],
    }
    return records.finish(
        stage,
        out,
        shards,
        {"prompts.jsonl": rejects, "traces.jsonl": [*withheld, *failed, *unused]},
        n_in=n_in,
        n_out=len(rows),
        report=report,
        documents={"contamination.json": contamination},
    )


def summary(manifest: Mapping[str, Any], out: Path) -> str:
    """The yields by kind as a table, what was dropped, and what to do about it."""
    report = manifest["report"]
    lines = ["| kind | prompts | samples | accepted | rows | yield |", "|---|---|---|---|---|---|"]
    for kind, one in report["yield"].items():
        lines.append(
            f"| {kind} | {one['prompts']} | {one['samples']} | {one['accepted']} | {one['rows']} | "
            f"{one['yield']:.0%} |"
        )
    lines.append("")
    reasons = ", ".join(f"{count} {name}" for name, count in manifest["drop_reasons"].items())
    lines.append(f"dropped           {reasons or 'nothing'}")
    for kind, one in report["yield"].items():
        if one["yield"] < LEAST_YIELD:
            why = next(iter(one["drop_reasons"]), "no answer")
            lines.append(
                f"warning           only {one['yield']:.0%} of the {kind} prompts gave a row, "
                f"mostly for {why!r}: add prompts of that kind rather than samples"
            )
    for kind, lengths in report["lengths"].items():
        if lengths[0]["reasoning_tokens"] and lengths[-1]["reasoning_tokens"]:
            first, last = lengths[0], lengths[-1]
            lines.append(
                f"reasoning tokens  {kind}: {first['reasoning_tokens']:.0f} with n=1, "
                f"{last['reasoning_tokens']:.0f} with n={last['n']}"
            )
    if flips := report.get("flip_rate"):
        lines.append(
            f"flip rate         {flips['safe_with_policy']} of {flips['unsafe_without_policy']} "
            f"unsafe answers to {flips['prompts']} prompts become safe with the policy in context"
            if flips["prompts"]
            else "flip rate         not measured: no harmful prompts"
        )
    for one in (flips or {}).get("tried", []):
        steer = " and the steering line" if one["steer"] else ""
        told = f"{one['render']} rules, {one['shots']} examples{steer}"
        lines.append(f"  {one['safe_with_policy']:>4} with {told}")
    if labels := report.get("labels"):
        lines.append("labels            " + ", ".join(f"{labels[k]} {k}" for k in labels))
    for name in ("repair", "compress"):
        if edits := report.get(name):
            lines.append(f"{name:<18}{edits['made']} made, {edits['accepted']} accepted")
    if report["teacher_refusals"]:
        lines.append(
            f"refused           the teacher would not reason about {report['teacher_refusals']} "
            "prompts; the template teacher answered them"
        )
    if server := manifest["run"].get("server"):
        lines.append(
            f"server            {server['requests']} requests, {server['cached']} replies from "
            f"the cache, {sum(server['retries'].values())} attempts failed, "
            f"{server['prompt_tokens']} + {server['new_tokens']} tokens, cost {server['cost']:g}"
        )
    dev = report["dev_rows"]
    lines.append(
        f"rows              {manifest['n_out'] - dev} in {out / 'ritd.jsonl'}, {dev} held out"
    )
    lines.append(f"policy            {manifest['policy_version']}")
    return "\n".join(lines)


def _pool(
    prompts: list[Prompt],
    evaluation: Mapping[str, Sequence[str]],
    settings: SynthesizeConfig,
    seed: int,
    embed: Any,
) -> tuple[list[Prompt], list[Prompt], list[Reject], dict[str, Any]]:
    """The prompts the teacher gets, requests inside them, the rest, the report on contamination."""
    prompts, rejects = pool.unduplicated(prompts, settings.near_duplicate)
    prompts = pool.split_groups(prompts, settings.dev_share, seed)
    shares = dict.fromkeys(("benign", "borderline"), settings.wrapped_benign)
    seen = {prompt.id for prompt in prompts}
    for one in pool.wrapped(prompts, shares | {"harmful": settings.jailbreaks}, seed):
        if one.id not in seen:
            prompts.append(one)
            seen.add(one.id)
    prompts, dropped, contamination = pool.decontaminated(
        prompts, evaluation, ngram=settings.ngram, tfidf=settings.tfidf, embed=embed
    )
    rejects += dropped
    bases: list[Prompt] = []
    if settings.size is not None:
        numbers = [float(share) for share in settings.mix.split(":")]
        mix: dict[str, float] = dict(zip(records.KINDS, numbers, strict=True))
        kept, dropped = pool.mixed(prompts, settings.size, mix, settings.dev_share, seed)
        # A disguise leads back to the request inside: that stays in the pool, but is not asked.
        inside = {parent for prompt in kept for parent in prompt.parent_ids}
        bases = [one for one in prompts if one.id in inside - {asked.id for asked in kept}]
        prompts = kept
        rejects += dropped
    return prompts, bases, rejects, contamination


def _by_prompt(items: Sequence[Judged]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for item in items:
        groups.setdefault(item.prompt.id, []).append(item)
    return groups


def _risk(guard: Judge) -> filters.Verdicts:
    """A guard as the filters take it: P(unsafe), or 0 or 1 by its word, or None where invalid."""

    def risk(pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        by_label = {"safe": 0.0, "unsafe": 1.0}
        said = guard.say(pairs)
        return [
            by_label.get(one["label"])
            if one["label"] == "invalid" or one["score"] is None
            else one["score"]
            for one in said
        ]

    return risk


def _check_hits(contamination: Mapping[str, Any], settings: SynthesizeConfig, out: Path) -> None:
    """ValueError for prompts that stand in an evaluation set, where they are not to be dropped."""
    hits = {name: one["hits"]["exact"] for name, one in contamination.items()}
    if sum(hits.values()) and settings.exact_hits == "fail":
        records.write_json(out / "contamination.json", contamination)
        worst = max(hits, key=lambda name: hits[name])
        first = next(one for one in contamination[worst]["list"] if one["method"] == "exact")
        raise ValueError(
            f"{sum(hits.values())} prompts stand in an evaluation set, {hits[worst]} of them in "
            f"{worst}, first row {first['evaluation_row']}: all in {out / 'contamination.json'}; "
            "take them out, or set synthesize.exact_hits=drop"
        )


def _flips(
    asking: Asking,
    prompts: Sequence[Prompt],
    journal: Journal,
    judges: Judges,
    settings: SynthesizeConfig,
) -> dict[str, Any]:
    """The flip rate of the self teacher on harmful prompts, held-out ones first, by context.

    With `search` the teacher goes on with the context of the highest rate. One-line ValueError
    where the policy in context does too little for the model to teach itself.
    """
    risky = [one for one in prompts if one.kind in ("harmful", "jailbreak")]
    risky.sort(key=lambda one: one.split != "dev")
    measured = risky[: settings.flip_prompts]
    if not measured:
        return {"prompts": 0, "rate": None}
    tried = contexts.tried(settings) if settings.search else [asking.context]
    found = asking.flips(measured, journal, judges.answer_risk, tried)
    flips = max(found, key=lambda one: one["rate"] or 0.0)  # the first, which is short, of equals
    asking.context = tried[found.index(flips)]
    rate = flips["rate"]
    if rate is not None and rate < settings.min_flip_rate:
        more = "" if settings.search else "synthesize.search=true, "
        raise ValueError(
            f"synthesize.teacher=self: with the policy in context {flips['safe_with_policy']} of "
            f"{flips['unsafe_without_policy']} unsafe answers become safe, a rate of {rate:g}; "
            f"synthesize.min_flip_rate={settings.min_flip_rate:g}. Try {more}synthesize.steer, "
            "synthesize.shots, a larger model or the template teacher"
        )
    return flips | ({"tried": found} if settings.search else {})


def _trace(
    prompt: Prompt,
    reply: Mapping[str, Any],
    i: int,
    name: str,
    origin: Any,
    settings: SynthesizeConfig,
    count: filters.CountTokens,
) -> Trace:
    finished = reply["finish"] != "length"
    parsed = reasoning.parse(reply["text"], finished=finished)
    fallback = reply.get("fallback")
    name = fallback or name
    return Trace(
        id=records.content_id(prompt.id, name, reply["seed"], i, reply["text"]),
        parent_ids=(prompt.id,),
        meta={"i": i}
        | {k: reply[k] for k in ("attempt", "edit", "of") if k in reply}
        | ({"teacher_refusal": True} if fallback else {}),
        prompt_id=prompt.id,
        model=name,
        sampler=Sampler(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=reply["seed"],
        ),
        raw=reply["text"],
        parsed=Parsed(**vars(parsed)),
        steps=trace_steps(parsed.reasoning),
        decision=decided(parsed.reasoning),
        n_tok=TokenCounts(
            prompt=count(prompt.text), reason=count(parsed.reasoning), answer=count(parsed.answer)
        ),
        finish=reply["finish"],
        origin="template" if fallback else "repair" if reply.get("edit") == "repair" else origin,
    )


def _row(item: Judged, settings: SynthesizeConfig) -> RITD:
    parsed = item.trace.parsed
    kept = parsed.reasoning
    if not settings.decision_line:
        kept = reasoning.without_decision(kept)
    decision = item.trace.decision
    assert decision != "none"  # does not pass the filters
    return RITD(
        id=records.content_id("ritd", item.trace.id),
        parent_ids=(item.trace.id, item.prompt.id),
        meta={"split": item.prompt.split, "source": item.prompt.source}
        | ({"attack": item.prompt.attack.template_id} if item.prompt.attack else {}),
        kind=item.prompt.kind,
        prompt=item.prompt.text,
        reasoning=kept,
        answer=parsed.answer,
        decision=decision,
        cats=item.prompt.categories,
        cited_rules=tuple(reasoning.cited_rules(kept)),
        judgments=item.verdicts,
    )


def _limits(settings: SynthesizeConfig, given: Limits) -> Limits:
    return Limits(
        settings.min_steps,
        settings.max_steps,
        settings.max_reasoning_tokens,
        given.answer_risk,
        given.reasoning_risk,
        given.quality,
    )


def _counter(tokenizer: str | None) -> filters.CountTokens:
    """Counts tokens of a text: the tokenizer's, or words and marks, which need no files."""
    if tokenizer is None:
        return lambda text: len(re.findall(r"\w+|[^\w\s]", text))
    from saro_jax.models import hub
    from saro_jax.text import chat

    loaded = chat.load_tokenizer(hub.resolve(tokenizer))
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    sys.exit(main())
