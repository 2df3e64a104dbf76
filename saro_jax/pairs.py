"""Pairs: `python -m saro_jax.pairs [--config=RECIPE] --out=DIR --pairs.traces=FILE ...`.

From rollouts of the policy, their prompts and judgments on them to preference pairs: outcome pairs
(OP1 to OP6) of whole responses, process pairs (PPA to PPG) of two ways to go on from the same
unfinished thought, no-op and mode pairs. Where thoughts go wrong is found by continuations drawn
from the policy (`model.path`) after each of their steps. OUT gets

pairs.jsonl                    what `train --stage=srpo` reads
step_values.jsonl              how often continuations from a step turned out well
rm.jsonl, prm.jsonl            the same for outcome and process reward models
traces.jsonl                   the continuations that pairs were made of
prompts.json                   by prompt id: pass rate, difficulty, least reasoning that is enough
rejects/                       pairs and traces that were not used, each with its reason
manifest.json                  inputs, hashes, counts, shares, lengths, noise

Without --pairs.guard an answer to a harmful prompt counts as unsafe where it does not refuse: that
is what the judge of form can see. The same command goes on where an earlier one was stopped, and
the same inputs, seed and model give the same files.
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.config import Config, ModelConfig, PairsConfig
from saro_jax.generation import served
from saro_jax.generation.requests import Generator
from saro_jax.judging.judges import Judge, open_judge, refusal_judge
from saro_jax.models import peft
from saro_jax.pairing import assembly, judges, noise, reward_items, trajectories
from saro_jax.pairing.outcome_pairs import Choice, outcome_pairs
from saro_jax.pairing.outcomes import Limits, Outcome, difficulty, outcome, pass_rates
from saro_jax.pairing.outcomes import report as outcome_report
from saro_jax.pairing.process_pairs import Worth
from saro_jax.pairing.rollouts import Rollouts
from saro_jax.records import (
    RITD,
    Input,
    Journal,
    Judgment,
    Pref,
    Prompt,
    Record,
    Reject,
    Sampler,
    Stage,
    Trace,
)
from saro_jax.text import chat
from saro_jax.text import policy as policies

AUDITED = ("OP1", "OP2", "OP3", "PPA", "PPG")  # kinds whose order is one of safety
GUARD_BATCH = 8
R = TypeVar("R", bound=Record)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [configuration.CONFIG, configuration.OUT]
    try:
        args = configuration.parse_command_line("python -m saro_jax.pairs", __doc__, argv, flags)
        # The tree needs training rows, which are what this stage makes.
        rows = f"--data.train={args.out / 'pairs.jsonl'}"
        config = configuration.load(args.config, [*args.overrides, rows], "srpo")
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
    generator: Generator | None = None,
    guard: Judge | None = None,
    tokenizer: Any = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Make pairs in `out` and return the manifest; nothing is done where they are there already.

    generator: what continues the policy's thoughts, by default `model.path` run here. guard: a
    judge of safety, by default that of `pairs.guard`. tokenizer: the policy's. ValueError in one
    line for wrong inputs.
    """
    settings = config.pairs
    if not settings.traces or not settings.prompts:
        missing = "traces" if not settings.traces else "prompts"
        raise ValueError(f"pairs.{missing}=null: a file of {missing} is needed")
    policy = policies.load(settings.policy)
    inputs: list[Input] = []
    prompts = {one.id: one for one in _read(settings.prompts, Prompt, inputs, "prompts")}
    traces = _read(settings.traces, Trace, inputs, "traces")
    given = _read(settings.judgments, Judgment, inputs, "judgments")
    taught: dict[str, RITD] = {}
    for row in _read(settings.ritd, RITD, inputs, "ritd"):
        taught.setdefault(row.prompt, row)
    foreign = _read(settings.negatives, Trace, inputs, "negatives")
    flips = _audit(settings.audit, inputs)
    for trace in (*traces, *foreign):
        if trace.prompt_id not in prompts:
            raise ValueError(
                f"pairs.traces: trace {trace.id!r} names the prompt {trace.prompt_id!r}, which is "
                "in none of pairs.prompts"
            )
    with contextlib.ExitStack() as stack:
        if guard is None and settings.guard is not None:
            guard = open_judge(settings.guard, GUARD_BATCH, None, config.server, "pairs.guard")
            stack.callback(guard.close)
        tokenizer = tokenizer or _tokenizer(config.model)
        if generator is None:
            generator = _opened(config)
            stack.callback(getattr(generator, "close", lambda: None))
        work = Stage(
            "pairs",
            # What is read from the tree; dtype and server are in the model's hash.
            settings.model_dump(mode="json", exclude={"slots", "dtype", "url"})
            | {"judge": guard.name if guard else "form", "judge_version": _judge_version(guard)},
            inputs,
            config.seed,
            policy.version,
            generator.name,
            generator.sha,
        )
        before = records.finished(work, out)
        if before is not None:
            return before
        limits = Limits(settings.safe, settings.unsafe)
        sampler = Sampler(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
        )
        key = {
            "model": generator.name,
            "sha": generator.sha,
            "sampler": sampler.model_dump(mode="json"),
            "seed": config.seed,
        }
        name = f"continuations-{records.sha256(records.to_json(key))[:12]}.jsonl"
        bar = stack.enter_context(tqdm(unit="request", desc="continuations", disable=not progress))
        journal = stack.enter_context(Journal(out / "journal" / name, key))
        asked = guard and judges.kept(guard, stack.enter_context(_verdicts(guard, out)))
        rollouts = Rollouts(
            generator,
            journal,
            sampler,
            config.seed,
            limits,
            _bases(prompts),
            asked,
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            lambda count: (bar.update(count), None)[1],
        )
        outcomes = _outcomes(traces, prompts, given, rollouts)
        negatives = _outcomes(foreign, prompts, [], rollouts)
        rates = pass_rates(outcomes, limits)
        choice = Choice(settings.hard, settings.per_prompt, settings.floor, config.seed)
        op, bare = outcome_pairs(outcomes, taught, negatives, limits, choice)
        found = trajectories.process(
            outcomes, rates, taught, policy, rollouts, _plan(settings, config.seed)
        )
        if isinstance(generator, served.Served):
            about = generator.api.report()
            work.run |= {"server": about, "cost": about["cost"]}
    op, first, kept_ids = assembly.checked(op, tokenizer)
    pp, second, more_ids = assembly.checked(found.pairs, tokenizer)
    if flips is not None:
        op, pp = ([_audited(pair, prompts, flips) for pair in pairs] for pairs in (op, pp))
    pairs, unused, shares = assembly.assembled(op, pp, _shares(settings))
    ids = {parent for pair in pairs for parent in pair.parent_ids}
    labelled = _labelled(rates, found.labels)
    by_trace = {one.trace.id: one for one in outcomes}
    shards: dict[str, Sequence[Record]] = {
        "pairs.jsonl": pairs,
        "step_values.jsonl": found.values,
        "rm.jsonl": reward_items.rm_items(outcomes, pairs, limits),
        "prm.jsonl": reward_items.prm_items(by_trace, found.values),
        "traces.jsonl": [one for name, one in found.traces.items() if name in ids - set(by_trace)],
    }
    invalid = [
        Reject(one.trace.id, "invalid: no judge gave a verdict on the answer")
        for one in outcomes
        if one.answer.invalid
    ]
    report = {
        "judge": judge_says(guard),
        "outcomes": outcome_report(outcomes, limits),
        **shares,
        "tokens": {name: kept_ids[name] + more_ids[name] for name in kept_ids},
        "step_values": len(found.values),
        "modes": _counted(found.labels),
    }
    return records.finish(
        work,
        out,
        shards,
        {
            "pairs.jsonl": [*first, *second, *unused],
            "prompts.jsonl": bare,
            "traces.jsonl": [*invalid, *found.rejects],
            "requests.jsonl": [
                Reject(name, f"not drawn: {why}") for name, why in sorted(rollouts.failures.items())
            ],
        },
        n_in=len(traces),
        n_out=len(pairs),
        report=report,
        documents={"prompts.json": labelled},
    )


def _tokenizer(model: ModelConfig) -> Any:
    """The policy's tokenizer, with the chat template that training will use."""
    folder, _ = peft.resolve(model.path, model.revision)
    return chat.load_tokenizer(folder, model.chat_template)


def _opened(config: Config) -> Generator:
    """The policy, run here or behind a server."""
    from saro_jax.generation import local

    model = config.model
    if config.pairs.url is not None:
        return served.opened(config.pairs.url, config.pairs.served_name, model, config.server)
    return local.load(
        model.path,
        revision=model.revision,
        chat_template=model.chat_template,
        dtype=config.pairs.dtype,
        slots=config.pairs.slots,
    )


def _verdicts(guard: Judge, out: Path) -> Journal:
    """The journal of what a guard said, whatever it was asked for."""
    key = {"judge": guard.name, "version": guard.version}
    name = f"verdicts-{records.sha256(records.to_json(key))[:12]}.jsonl"
    return Journal(out / "journal" / name, key)


def judge_says(guard: Judge | None) -> str:
    """What "unsafe" means in these pairs."""
    if guard is not None:
        return f"{guard.name}: P(unsafe) of answers and reasoning to harmful prompts"
    return (
        "form only: an answer to a harmful prompt counts as unsafe where it does not refuse "
        "(non-refusal, not harm)"
    )


def summary(manifest: Mapping[str, Any], out: Path) -> str:
    """Rollouts by kind of prompt, pairs by kind, what was left out and what to mind, as text."""
    report = manifest["report"]
    lines = ["| prompts | rollouts | complete | good | mixed prompts | pass rate |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind, one in report["outcomes"].items():
        rate = "" if one["pass_rate"] is None else f"{one['pass_rate']:.0%}"
        lines.append(
            f"| {one['prompts']} {kind} | {one['rollouts']} | {one['complete']} | {one['good']} | "
            f"{one['mixed']} | {rate} |"
        )
    lines += ["", "| pairs | n | weight | chosen tokens | rejected | noise |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind, one in report["kinds"].items():
        mean = one["mean_tokens"]
        lines.append(
            f"| {kind} | {one['pairs']} | {one['weight']:g} | {mean['w']:.0f} | {mean['l']:.0f} | "
            f"{one['noise']:.3f} |"
        )
    lines.append("")
    reasons = ", ".join(f"{count} {name}" for name, count in manifest["drop_reasons"].items())
    lines.append(f"not used          {reasons or 'nothing'}")
    sides = (f"{n['pairs']} to {to} weigh {n['weight']:g}" for to, n in report["decisions"].items())
    lines.append(f"decisions         {', '.join(sides)}")
    found = report["reflections"]
    lines.append(
        f"reflections       {found['pairs']}, {found['unmarked_share']:.0%} without a marker, "
        f"{found['stems']} stems, by "
        + (", ".join(f"{name} {count}" for name, count in found["sources"].items()) or "none")
    )
    lines.append(f"judged by         {report['judge']}")
    if len(report["kinds"]) < 6:
        lines.append(
            "warning           fewer than six kinds of pairs: more prompts, or more samples of them"
        )
    for kind, one in report["kinds"].items():
        limit = manifest["config"]["balance"]
        if abs(one["length_lean"]) > limit + 1e-3 and kind not in assembly.balance.SHORTER:
            lines.append(
                f"warning           {kind}: chosen less rejected tokens are "
                f"{one['length_lean']:+.0%} of the mean, allowed {limit:.0%}: srpo.length=mean "
                "does not see length"
            )
    lines.append(f"pairs             {manifest['n_out']} in {out / 'pairs.jsonl'}")
    return "\n".join(lines)


def _read(files: Any, cls: type[R], inputs: list[Input], option: str) -> list[R]:
    """All records of the files of a setting, whose ids are unique; they become inputs."""
    found: list[R] = []
    for name in configuration.names(files):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"pairs.{option}: {name}: no such file")
        found += records.read(path, cls)
        inputs.append(Input.of_file(path))
    seen: set[str] = set()
    for one in found:
        if one.id in seen:
            raise ValueError(f"pairs.{option}: the id {one.id!r} is given twice")
        seen.add(one.id)
    if files and not found:
        raise ValueError(f"pairs.{option}: no records in {', '.join(configuration.names(files))}")
    return found


def _audit(file: str | None, inputs: list[Input]) -> noise.Flips | None:
    if file is None:
        return None
    path = Path(file).expanduser()
    rows = []
    for where, line in records.read_lines(path):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{where}: not JSON") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__}; expected an object")
        rows.append(noise.audit_row(where, record))
    inputs.append(Input.of_file(path))
    return noise.audited(rows)


def _audited(pair: Pref, prompts: Mapping[str, Prompt], flips: noise.Flips) -> Pref:
    """The pair with the noise of an audit, where its order is one of safety."""
    if pair.kind not in AUDITED:
        return pair
    categories = prompts[pair.parent_ids[-1]].categories
    found = noise.audited_noise(flips, categories[0] if categories else "")
    return pair.model_copy(update={"noise": found})


def _bases(prompts: Mapping[str, Prompt]) -> dict[str, str]:
    """The text of the bare request behind a disguised prompt, where that is known."""
    return {
        one.id: prompts[one.base_id].text
        for one in prompts.values()
        if one.attack is not None and one.base_id is not None and one.base_id in prompts
    }


def _outcomes(
    traces: Sequence[Trace],
    prompts: Mapping[str, Prompt],
    given: Sequence[Judgment],
    rollouts: Rollouts,
) -> list[Outcome]:
    """Outcomes by the judgments that are given, or judged here where none are."""
    asked = [prompts[one.prompt_id] for one in traces]
    if not given:
        return rollouts.judged(traces, asked)
    by_trace: dict[str, list[Judgment]] = {}
    for one in given:
        by_trace.setdefault(one.trace_id, []).append(one)
    return [
        outcome(trace, prompt, by_trace.get(trace.id, ()))
        for trace, prompt in zip(traces, asked, strict=True)
    ]


def _labelled(
    rates: Mapping[str, tuple[int, int]], labels: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By prompt id: rollouts, good ones, how hard the prompt is, how much reasoning it needs."""
    return {
        name: {"good": good, "rollouts": total, "difficulty": difficulty(good, total)}
        | dict(labels.get(name, {}))
        for name, (good, total) in rates.items()
    }


def _counted(labels: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    names = [one["mode"] or "no mode is enough" for one in labels.values()]
    return {name: names.count(name) for name in sorted(set(names))}


def _plan(settings: PairsConfig, seed: int) -> trajectories.Plan:
    return trajectories.Plan(
        settings.walks,
        settings.rollouts,
        settings.search,
        settings.repair,
        settings.injected,
        settings.modes,
        settings.floor,
        Worth(settings.low, settings.drop, settings.value),
        seed,
    )


def _shares(settings: PairsConfig) -> assembly.Shares:
    return assembly.Shares(
        settings.size,
        settings.quotas,
        settings.mix,
        settings.off_policy,
        settings.balance,
        settings.balance_floor,
        settings.stem_share,
        settings.no_op,
        settings.refuse_share,
    )


def _judge_version(guard: Judge | None) -> str:
    return refusal_judge().version + (f"+{guard.version}" if guard else "")


if __name__ == "__main__":
    sys.exit(main())
