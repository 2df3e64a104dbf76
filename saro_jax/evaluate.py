"""Evaluation: `python -m saro_jax.evaluate --config=... --model A --model NAME=B ... --out=DIR`.

Asks each model the prompts of `evaluate.benchmarks` in each of `evaluate.views`, lets judges read
the answers and compares the models: attack success or, where no judge of safety is given,
non-refusal of harmful prompts; over-refusal; accuracy; what the reasoning costs. DIR gets

transcripts/MODEL/BENCHMARK.VIEW.jsonl    prompt, reasoning, answer and verdicts
results.json                              rates, differences, costs with their intervals
manifest.json                             settings, inputs, hashes; time and tokens a second
responses/                                what a stopped run goes on from

The same command goes on where an earlier one was stopped and asks nothing twice. Models whose names
end in .s0, .s1, ... are training seeds of one recipe and are reported together too. DIR/audit.csv,
where it is (`python -m saro_jax.evaluation.audit`), corrects the rates by people's labels.
On several hosts each answers a part of the prompts, with the model on its first device.
"""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from saro_jax import config as configuration
from saro_jax.config import Config, EvaluateConfig, Flag
from saro_jax.evaluation import answering, audit, benchmarks, metrics, table, verdicts
from saro_jax.evaluation.answering import Subject
from saro_jax.evaluation.benchmarks import Chosen, Question
from saro_jax.evaluation.results import (
    RESULTS,
    VIEWS,
    Benchmark,
    Model,
    Results,
    Transcript,
    read_results,
    transcripts_file,
)
from saro_jax.parallel import distributed
from saro_jax.records import Input, Stage, file_sha256, finish, finished, sha256, to_json
from saro_jax.text import chat, policy

OPTION = "--evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        configuration.CONFIG,
        Flag("model", "[NAME=]folder, .gguf file or Hub id; once a model", many=True),
        configuration.OUT,
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.evaluate", __doc__, argv, flags)
        distributed.start(args)
        config = configuration.load(args.config, args.overrides, "rw")
        models = named(args.model or [config.model.path or "quickstart"])
        results = run(config, models, args.out, progress=sys.stderr.isatty())
    except ValueError as error:
        return distributed.refuse(error)
    except distributed.Stopped as stop:
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return distributed.leave("was stopped by Ctrl-C", 130)
    print(table.headline(results))
    print(f"\nresults      {args.out / RESULTS}\ntranscripts  {args.out / 'transcripts'}")
    return 0


def named(given: Sequence[str]) -> dict[str, str]:
    """Models by name; without one it is the path's last part, or that of the run it lies in."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = "", text
            parts = [part for part in Path(path).parts if part not in ("model", "/", "..", ".")]
            name = parts[-1].removesuffix(".gguf") if parts else ""
        if not path:
            raise ValueError(f"--model={text}: expected NAME=MODEL")
        try:
            Model(name=name, path=path, sha="")
        except ValueError:
            raise ValueError(
                f"--model={text}: {name!r} is no name: letters, digits, _ . + -"
            ) from None
        if name in found:
            raise ValueError(f"--model={text}: {name} is given twice; write NAME=MODEL")
        found[name] = path
    return found


def load(name: str, path: str, settings: EvaluateConfig) -> Subject:
    """A model in this process, which is loaded when it is first asked."""
    from saro_jax.generation import local

    files = local.find(path, dtype=settings.dtype, name=name)

    def count(text: str) -> int:
        return len(files.tokenizer.encode(text, add_special_tokens=False))

    opened = chat.generation_prefill(files.tokenizer)
    open_once = cache(lambda: local.load(files, slots=settings.slots))
    return Subject(name, path, files.sha, opened, count, open_once)


def run(
    config: Config,
    models: dict[str, str],
    out: Path,
    *,
    open_model: Callable[[str, str, EvaluateConfig], Subject] = load,
    progress: bool = False,
) -> Results:
    """Evaluate models, given by name, into `out`; nothing is asked where it is done already."""
    settings = config.evaluate
    chosen, views, judges = checked(settings, models)
    rules = policy.load(settings.policy)
    questions: dict[str, list[Question]] = {}
    inputs: list[Input] = []
    for one in chosen:
        questions[one.name], about = benchmarks.read(one, config.seed)
        inputs.append(about)
    if distributed.several():
        distributed.first("the folder", lambda: out.mkdir(parents=True, exist_ok=True))
        distributed.shared_folder(out)
    progress = progress and distributed.writes()
    started = time.time()
    subjects = [open_model(name, path, settings) for name, path in models.items()]
    found = [Model(name=one.name, path=one.path, sha=one.sha) for one in subjects]
    said: dict[str, list[Transcript]] = {}
    speed: dict[str, Any] = {}
    while subjects:
        subject = subjects.pop(0)
        said[subject.name], speed[subject.name] = _asked(
            subject, questions, views, config, out / "responses" / subject.name, progress
        )
        del subject  # and its weights
        gc.collect()
    stage = Stage(
        "evaluate",
        settings.model_dump(mode="json", exclude={"slots"}),
        inputs,
        config.seed,
        policy_version=rules.version,
        model=" ".join(models),
        model_sha=sha256(to_json([one.sha for one in found])),
        run={"speed": speed},
        started=started,
    )
    people = audit.labels_file(out)
    if people is not None:
        stage.config["audit"] = file_sha256(people)

    def conclude() -> None:
        if finished(stage, out):
            return
        transcripts = _judged(said, questions, judges, settings, out, progress)
        results = measured(config, found, chosen, questions, transcripts)
        if people is not None:
            results = results.model_copy(update={"audit": audit.folded(people, transcripts)})
        shards: dict[str, list[Transcript]] = {}
        for one in transcripts:
            shards.setdefault(transcripts_file(one.model, one.benchmark, one.view), []).append(one)
        finish(
            stage,
            out,
            shards,
            {},
            n_in=sum(map(len, questions.values())),
            n_out=len(transcripts),
            documents={RESULTS: results.model_dump(mode="json")},
        )

    distributed.first("the results", conclude)
    return read_results(out)


def _asked(
    subject: Subject,
    questions: dict[str, list[Question]],
    views: Sequence[Any],
    config: Config,
    folder: Path,
    progress: bool,
) -> tuple[list[Transcript], dict[str, Any]]:
    """What a model said to everything, not judged yet, and how fast it was."""
    settings = config.evaluate
    transcripts: list[Transcript] = []
    tokens, seconds = 0, 0.0
    waits: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for benchmark, asked in questions.items():
        for view in views:
            requests = answering.requests(asked, view, settings, config.seed)
            got = answering.answers(subject, requests, folder / f"{benchmark}.{view}", progress)
            tokens, seconds = tokens + got.tokens, seconds + got.seconds
            transcripts += answering.transcripts(
                subject, benchmark, view, asked, got.samples, settings
            )
            for one in asked:
                waits.setdefault((view, one.kind), []).extend(
                    (sample["seconds"], sample["tokens"])
                    for sample in got.samples[one.id]
                    if sample["seconds"]
                )
    speed: dict[str, Any] = {"seconds": round(seconds, 2), "tokens": tokens}
    speed["slots"] = settings.slots
    speed["answers"] = [
        {"view": view, "kind": kind, **metrics.latency(mine)}
        for (view, kind), mine in waits.items()
        if mine
    ]
    if tokens:
        speed["tokens_per_second"] = round(tokens / seconds, 1)
    return transcripts, speed


def _judged(
    said: dict[str, list[Transcript]],
    questions: dict[str, list[Question]],
    judges: Sequence[str],
    settings: EvaluateConfig,
    out: Path,
    progress: bool,
) -> list[Transcript]:
    """The transcripts of all models with every judge's verdicts.

    Each model's by themselves: what is said of one is kept when another is added.
    """
    originals = {
        (benchmark, one.id): one.original
        for benchmark, asked in questions.items()
        for one in asked
        if one.original
    }
    for text in judges:
        judge = verdicts.open_judge(text, settings.slots)
        folder = out / "responses" / "judges"
        said = {
            name: verdicts.judged(mine, originals, judge, folder, progress)
            for name, mine in said.items()
        }
    return [one for mine in said.values() for one in mine]


def listed(given: str | list[str]) -> list[str]:
    """Entries of a setting: of a list, or separated by commas."""
    return [one.strip() for text in configuration.names(given) for one in text.split(",")]


def checked(
    settings: EvaluateConfig, models: dict[str, str]
) -> tuple[list[Chosen], list[Any], list[str]]:
    """Benchmarks, views and judges of the settings; ValueError names the option that is wrong."""
    chosen = benchmarks.choose(listed(settings.benchmarks), f"{OPTION}.benchmarks")
    views = listed(settings.views)
    for view in views:
        if view not in VIEWS:
            raise ValueError(f"{OPTION}.views={view}: allowed: {', '.join(VIEWS)}")
    judges = listed(settings.judges)
    verdicts.check(judges, f"{OPTION}.judges")
    if settings.baseline is not None and settings.baseline not in models:
        raise ValueError(
            f"{OPTION}.baseline={settings.baseline}: no such model; given: {', '.join(models)}"
        )
    return chosen, views, list(dict.fromkeys(["refusal", *judges]))


def measured(
    config: Config,
    models: Sequence[Model],
    chosen: Sequence[Chosen],
    questions: dict[str, list[Question]],
    transcripts: Sequence[Transcript],
) -> Results:
    """The numbers of judged transcripts."""
    settings = config.evaluate
    by_group = metrics.groups(transcripts)
    names = [one.name for one in models]
    baseline = settings.baseline or names[0]
    names.sort(key=lambda name: name != baseline)  # the others are held against it
    return Results(
        models=tuple(models),
        baseline=baseline,
        benchmarks=tuple(
            Benchmark(
                name=one.name,
                title=one.entry.title,
                kind=one.entry.about,
                protocol=one.entry.protocol,
                license=one.entry.license,
                n=len(questions[one.name]),
                source=one.source,
                metric=one.entry.metric,
            )
            for one in chosen
        ),
        rates=tuple(
            rate
            for rows in by_group.values()
            for rate in metrics.rates(rows, settings.draws, config.seed)
        ),
        differences=tuple(
            metrics.differences(by_group, names, settings.draws, settings.margin, config.seed)
        ),
        costs=tuple(metrics.costs(by_group, baseline, settings.draws, config.seed)),
        seeds=tuple(metrics.seed_rates(by_group, settings.draws, config.seed)),
        agreement=tuple(verdicts.agreements(transcripts)),
    )


if __name__ == "__main__":
    sys.exit(main())
