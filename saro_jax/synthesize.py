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

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.config import Config, Flag, SynthesizeConfig
from saro_jax.data import filters
from saro_jax.data import prompts as pool
from saro_jax.data.filters import Judged, Judges, Limits
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
    TraceStep,
)
from saro_jax.text import policy as policies
from saro_jax.text import reasoning, template
from saro_jax.text.policy import Policy
from saro_jax.text.refusal import refuses
from saro_jax.text.template_teacher import TemplateTeacher

LEAST_YIELD = 0.3  # share of a kind's prompts with a row, below which more prompts are needed


class Teacher(Protocol):
    """What answers the prompts: `name` stands in the traces, `sha` is what its answers depend on.

    `generate` gives n replies {text, finish: eos | length | stop, cost: money, default 0}, or none
    where it can not answer; `sampler.seed` is new for each request. It is called from threads.
    """

    name: str
    origin: Any
    sha: str

    def generate(
        self, messages: Sequence[Mapping[str, str]], n: int, sampler: Sampler
    ) -> list[dict[str, Any]]: ...


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart"),
        Flag("out", "output folder", parse=Path, required=True),
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.synthesize",
            __doc__ or "",
            sys.argv[1:] if argv is None else argv,
            flags,
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
    teacher: Callable[[Policy, Sequence[Prompt]], Teacher] = TemplateTeacher,
    judges: Judges | None = None,
    judges_version: str = "rules",
    limits: Limits | None = None,
    embed: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Make RIT-D in `out` and return the manifest; nothing is done where it is there already.

    `teacher(policy, prompts)` makes the teacher. `judges_version` names judges other than the
    default ones, as the files depend on them; `limits` are their thresholds (what of it the config
    sets is the config's). `embed` adds decontamination by embeddings. ValueError, in one line, for
    wrong inputs and for prompts that stand in an evaluation set.
    """
    settings = config.synthesize
    policy = policies.load(settings.policy)
    judges = judges or Judges()
    limits = _limits(settings, limits or Limits())
    columns = pool.column_map(configuration.names(settings.columns), "--synthesize.columns")
    given = pool.sources(configuration.names(settings.prompts), "--synthesize.prompts")
    prompts, rejects, inputs = pool.read(given, columns, policy, settings.split)
    n_in = sum(one.rows for one in inputs)
    evaluation: dict[str, list[str]] = {}
    for name in configuration.names(settings.evaluation):
        evaluation[name], about = pool.texts(name, columns, settings.split)
        inputs.append(about)
    prompts, bases, dropped, contamination = _pool(
        prompts, evaluation, settings, config.seed, embed
    )
    rejects += dropped
    source = teacher(policy, [*prompts, *bases])
    stage = Stage(
        "synthesize",
        # What is read from the tree; how many requests run at a time changes nothing.
        settings.model_dump(mode="json", exclude={"concurrency"})
        | {"judges": judges_version, "limits": vars(limits)},
        inputs,
        config.seed,
        policy.version,
        source.name,
        source.sha,
    )
    before = records.finished(stage, out)
    if before is not None:
        return before
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
    spare = TemplateTeacher(policy, [*prompts, *bases])
    replies = _ask(source, spare, policy, prompts, settings, config.seed, out, progress)
    stage.run["cost"] = round(sum(r.get("cost", 0.0) for one in replies.values() for r in one), 6)
    count = _counter(settings.tokenizer)
    traces: list[Trace] = []
    for prompt in prompts:
        found = [
            _trace(prompt, reply, i, source, settings, count)
            for i, reply in enumerate(replies[prompt.id])
        ]
        if not found:
            rejects.append(Reject(prompt.id, "no answer: the teacher had none"))
        traces += found
    by_id = {prompt.id: prompt for prompt in prompts}
    items = [Judged(trace, by_id[trace.prompt_id]) for trace in traces]
    accepted, failed = filters.passed(items, policy, judges, limits)
    groups: dict[str, list[Judged]] = {}
    for item in accepted:
        groups.setdefault(item.prompt.id, []).append(item)
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
        "tokens_counted_by": settings.tokenizer or "words and marks",
    }
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
        {"prompts.jsonl": rejects, "traces.jsonl": [*failed, *unused]},
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
        mix = dict(zip(records.KINDS, numbers, strict=True))
        kept, dropped = pool.mixed(prompts, settings.size, mix, seed)
        # A disguise leads back to the request inside: that stays in the pool, but is not asked.
        inside = {parent for prompt in kept for parent in prompt.parent_ids}
        bases = [one for one in prompts if one.id in inside - {asked.id for asked in kept}]
        prompts = kept
        rejects += dropped
    return prompts, bases, rejects, contamination


def _ask(
    teacher: Teacher,
    spare: TemplateTeacher,
    policy: Policy,
    prompts: Sequence[Prompt],
    settings: SynthesizeConfig,
    seed: int,
    out: Path,
    progress: bool,
) -> dict[str, list[dict[str, Any]]]:
    """The teacher's replies by prompt, from the journal where they are there.

    A reply is {text, finish, seed, attempt}; one that does not parse too. A teacher that only
    refuses is replaced by the template teacher, whose replies have a `fallback`.
    """
    sampler = Sampler(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
    )
    # All that a reply depends on beside the prompt; filters are not among it, so that a change of
    # theirs costs no new request.
    key = {
        "teacher": teacher.name,
        "sha": teacher.sha,
        "spare": spare.sha,
        "sampler": sampler.model_dump(mode="json"),
        "n": settings.n,
        "retries": settings.retries,
        "render": settings.render,
        "policy_version": policy.version,
        "seed": seed,
        "templates": records.sha256(
            "".join(
                (template.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
                for name in ("t1_reason_safe", "t2_reason_general")
            )
        ),
    }

    def work(_: str, item: tuple[Prompt, int, int]) -> list[dict[str, Any]]:
        prompt, attempt, wanted = item
        own = _seed(seed, prompt, attempt)
        found = teacher.generate(
            messages(prompt, policy, settings.render),
            wanted,
            sampler.model_copy(update={"seed": own}),
        )
        return [one | {"seed": own, "attempt": attempt} for one in found]

    name = f"replies-{records.sha256(records.to_json(key))[:12]}.jsonl"
    # A prompt's categories and answer are part of what is asked.
    ids = {prompt.id: records.content_id(prompt.model_dump(mode="json")) for prompt in prompts}
    found: dict[str, list[dict[str, Any]]] = {prompt.id: [] for prompt in prompts}
    wanted = dict.fromkeys(found, settings.n)
    bar = tqdm(total=len(prompts), unit="request", desc="teacher", disable=not progress)

    def tell(count: int) -> None:
        bar.update(count)

    with bar, Journal(out / "journal" / name, key) as journal:
        for attempt in range(1 + settings.retries):
            # Of answers that do not parse as many are asked for again, with another seed.
            items = {
                f"{ids[one.id]}:{attempt}": (one, attempt, wanted[one.id])
                for one in prompts
                if wanted[one.id]
            }
            if attempt:
                bar.reset(bar.total + len(items))
                bar.update(bar.total - len(items))
            made = records.resume(journal, items, work, settings.concurrency, tell)
            for (prompt, _, _), replies in zip(items.values(), made.values(), strict=True):
                found[prompt.id] += replies
                wanted[prompt.id] = sum(not _well_formed(one) for one in replies)
    for prompt in prompts:
        if _refused(prompt, found[prompt.id]):
            own = _seed(seed, prompt, "spare")
            asked = messages(prompt, policy, settings.render)
            extra = spare.generate(asked, settings.n, sampler.model_copy(update={"seed": own}))
            found[prompt.id] += [
                one | {"seed": own, "attempt": 0, "fallback": spare.name} for one in extra
            ]
    return found


def _seed(seed: int, prompt: Prompt, attempt: int | str) -> int:
    return int(records.sha256(f"{seed}:{prompt.id}:{attempt}")[:8], 16)


def _refused(prompt: Prompt, replies: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all that a teacher said of a prompt is that it will not reason about it."""
    if not replies or prompt.kind == "benign" or any(_well_formed(one) for one in replies):
        return False
    return all(refuses(reasoning.parse(one["text"]).answer) for one in replies)


def _well_formed(reply: Mapping[str, Any]) -> bool:
    finished = reply["finish"] != "length"
    return finished and reasoning.parse(reply["text"]).status == "ok"


def messages(prompt: Prompt, policy: Policy, render: str) -> list[dict[str, str]]:
    """What a teacher is asked: T2 for benign prompts, T1 for all others; the prompt comes last."""
    categories = [one for one in prompt.categories if one in policy.categories]
    rules = policies.render(policy, None if render == "whole" or not categories else categories)
    if prompt.kind == "benign":
        if render != "whole":
            rules = policies.render(policy, [])
        return template.render("t2_reason_general", {"policy": rules, "prompt": prompt.text})
    cited = [r.id for one in categories or policy.categories for r in policy.categories[one].rules]
    slots = {
        "policy": rules,
        "prompt": prompt.text,
        "modes": ", ".join(policy.modes),
        "example_rule": cited[0] if cited else next(iter(policy.global_rules), "R1"),
    }
    return template.render("t1_reason_safe", slots)


def _trace(
    prompt: Prompt,
    reply: Mapping[str, Any],
    i: int,
    teacher: Teacher,
    settings: SynthesizeConfig,
    count: filters.CountTokens,
) -> Trace:
    finished = reply["finish"] != "length"
    parsed = reasoning.parse(reply["text"], finished=finished)
    fallback = reply.get("fallback")
    decided = reasoning.decision(parsed.reasoning)
    return Trace(
        id=records.content_id(prompt.id, fallback or teacher.name, reply["seed"], i, reply["text"]),
        parent_ids=(prompt.id,),
        meta={"i": i, "attempt": reply["attempt"]},
        prompt_id=prompt.id,
        model=fallback or teacher.name,
        sampler=Sampler(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=reply["seed"],
        ),
        raw=reply["text"],
        parsed=Parsed(**vars(parsed)),
        steps=tuple(
            TraceStep(i=at, start_char=s.start, end_char=s.end, text=s.text, kind=s.kind)
            for at, s in enumerate(reasoning.segment(parsed.reasoning))
        ),
        decision=decided if decided in records.MODES else "none",  # type: ignore[arg-type]
        n_tok=TokenCounts(
            prompt=count(prompt.text), reason=count(parsed.reasoning), answer=count(parsed.answer)
        ),
        finish=reply["finish"],
        origin="template" if fallback else teacher.origin,
    )


def _row(item: Judged, settings: SynthesizeConfig) -> RITD:
    parsed = item.trace.parsed
    kept = parsed.reasoning
    if not settings.decision_line:
        kept = reasoning.without_decision(kept)
    return RITD(
        id=records.content_id("ritd", item.trace.id),
        parent_ids=(item.trace.id, item.prompt.id),
        meta={"split": item.prompt.split, "source": item.prompt.source}
        | ({"attack": item.prompt.attack.template_id} if item.prompt.attack else {}),
        kind=item.prompt.kind,
        prompt=item.prompt.text,
        reasoning=kept,
        answer=parsed.answer,
        decision=item.trace.decision,  # type: ignore[arg-type] - "none" did not pass the filters
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
