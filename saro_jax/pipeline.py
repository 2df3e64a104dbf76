"""All stages from one recipe: `python -m saro_jax.pipeline [--config=RECIPE] [--out=DIR]`.

Prompts and a policy to RIT-D, the warmup on it (RW), then in each round: rollouts of the model,
judgments, pairs, SRPO from the model of the round before. The model the recipe starts from and what
comes out of each training are measured on held-out prompts in the same way, in one table. OUT gets

ritd/                          RIT-D, see synthesize
rw/                            the warmup, see train
round1/rollouts/               answers of the warmup's model, see sample
round1/judgments.jsonl         what the judges say of them, see judge
round1/pairs/                  OP-COT and PP-COT, see pairs
round1/srpo/                   SRPO on them, see train; round2/... goes on from its model
measured/                      the models on the held-out prompts, see evaluate; report reads it
summary.md                     the table

Each stage lies in its own folder and is skipped where it is complete, so the same command continues
a run that was stopped. pipeline.synthesize=false and pipeline.rounds=0 train on data.train instead.
"""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from saro_jax import config as configuration
from saro_jax import evaluate, judge, pairs, sample, synthesize, train
from saro_jax.config import Config, EvaluateConfig, Flag
from saro_jax.evaluation import table
from saro_jax.parallel import distributed

BATCH = 60  # responses generated at a time
HELD_OUT = "quickstart:held_out"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        configuration.CONFIG,
        Flag("out", "output folder; default runs/RECIPE", parse=Path),
        Flag("held-out", "prompts to measure on: rows {id, kind, prompt}", HELD_OUT),
        Flag("max-new-tokens", "longest response that is measured", 320, parse=int),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.pipeline", __doc__, argv, flags)
        distributed.start(args)
        out = args.out or Path("runs") / Path(args.config).stem
        return run(args.config, args.overrides, out, args.held_out, args.max_new_tokens)
    except ValueError as error:
        return distributed.refuse(error)
    except distributed.Stopped as stop:
        print("stopped; the same command continues", flush=True)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return distributed.leave("was stopped by Ctrl-C", 130)


def run(recipe: str, overrides: list[str], out: Path, held_out: str, max_new_tokens: int) -> int:
    """All stages in their order; returns 0, or 128 + the signal that stopped a stage."""
    started = time.monotonic()
    ritd = out / "ritd"
    # What the pipeline makes is what training reads.
    made = [f"--stages.rw.data.train={ritd / 'ritd.jsonl'}"]
    made += [f"--stages.srpo.data.train={_round(out, 1) / 'pairs' / 'pairs.jsonl'}"]
    steps = configuration.load(recipe, [*overrides, *made], "rw").pipeline
    given = made[: int(steps.synthesize)] + made[1:] * bool(steps.rounds)
    configs = {
        stage: configuration.load(recipe, [*overrides, *given], stage)
        for stage in configuration.STAGES
    }
    if (steps.synthesize or steps.rounds) and jax.process_count() > 1:
        raise ValueError(
            "pipeline.synthesize and pipeline.rounds: data is made by one process; run the stages "
            "one by one, or set pipeline.synthesize=false and pipeline.rounds=0"
        )
    for name in ("sample", "pairs") if steps.rounds else ():
        if (url := getattr(configs["srpo"], name).url) is not None:
            raise ValueError(
                f"{name}.url={url}: the pipeline draws from the model that it has just trained, "
                "which no server has yet; run the stages one by one"
            )
    models: dict[str, str] = {}

    def measure(name: str, model: str) -> str:
        _say(f"{name} on held-out prompts")
        models[name] = model
        found = _measured(configs["rw"], models, out, held_out, max_new_tokens)
        print(found, flush=True)
        gc.collect()
        return found

    summary = measure("base", configs["rw"].model.path or "quickstart")
    if steps.synthesize:
        _say("RIT-D")
        manifest = synthesize.run(configs["rw"], ritd, progress=sys.stderr.isatty())
        print(synthesize.summary(manifest, ritd), flush=True)

    def trained(stage: str, config: Config, folder: Path, name: str) -> int:
        nonlocal summary
        _say(name)
        stopped = train.run(config, stage, folder)
        if not stopped:
            summary = measure(name, str(folder / "model"))
        return stopped

    if stopped := trained("rw", configs["rw"], out / "rw", "RW"):
        return stopped
    model = out / "rw" / "model"
    folders = [_round(out, number) for number in range(1, steps.rounds + 1)]
    for number, folder in enumerate(folders, 1):
        config = _with(configs["srpo"], "model", path=str(model), revision=None)
        _rolled(config, ritd if steps.synthesize else None, folder, number)
        config = _with(config, "data", train=str(folder / "pairs" / "pairs.jsonl"))
        name = "SRPO" if steps.rounds == 1 else f"SRPO{number}"
        if stopped := trained("srpo", config, folder / "srpo", name):
            return stopped
        model = folder / "srpo" / "model"
    if not steps.rounds:
        config = _with(configs["srpo"], "model", path=str(model), revision=None)
        if stopped := trained("srpo", config, out / "srpo", "SRPO"):
            return stopped
        model = out / "srpo" / "model"
    _write(out / "summary.md", summary + "\n")
    print(f"\n{summary}\n")
    print(f"warmup model      {out / 'rw' / 'model'}")
    print(f"SRPO model        {model}")
    print(f"metrics           {out}/rw/metrics.jsonl, {model.parent}/metrics.jsonl")
    print(f"transcripts       {out}/measured/transcripts")
    print(f"this table        {out / 'summary.md'}")
    print(f"total             {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def _round(out: Path, number: int) -> Path:
    return out / f"round{number}"


def _say(title: str) -> None:
    print(f"\n== {title} ==", flush=True)


def _with(config: Config, section: str, **values: Any) -> Config:
    """The config with some values of one section changed."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def _rolled(config: Config, ritd: Path | None, folder: Path, number: int) -> None:
    """Rollouts of the model, judgments and pairs, in `folder`; each round draws with its own seed.

    Prompts are those of RIT-D where it was made, else those of the recipe.
    """
    progress = sys.stderr.isatty()
    config = config.model_copy(update={"seed": config.seed + number - 1})
    if ritd is not None:
        config = _with(config, "sample", prompts=str(ritd / "prompts.jsonl"))
    _say(f"ROLLOUTS, round {number}")
    rollouts = folder / "rollouts"
    print(sample.summary(sample.run(config, rollouts, progress=progress), rollouts), flush=True)
    gc.collect()
    _say(f"JUDGMENTS, round {number}")
    # The whole pool has the requests behind the disguises too.
    pool = (ritd or rollouts) / "prompts.jsonl"
    judgments = folder / "judgments.jsonl"
    said = _judged(config, rollouts / "traces.jsonl", pool, judgments)
    print(judge.summary(said), flush=True)
    _say(f"PAIRS, round {number}")
    config = _with(
        config,
        "pairs",
        traces=str(rollouts / "traces.jsonl"),
        prompts=str(pool),
        judgments=str(judgments),
        ritd=str(ritd / "ritd.jsonl") if ritd else config.pairs.ritd,
    )
    found = pairs.run(config, folder / "pairs", progress=progress)
    print(pairs.summary(found, folder / "pairs"), flush=True)
    gc.collect()
    if not found["n_out"]:
        raise ValueError(
            f"{folder / 'pairs'}: no pairs, of {found['n_in']} rollouts: the model answers all "
            "prompts alike, or badly; see rejects/ there, and train the warmup longer or take more "
            "prompts"
        )


def _judged(config: Config, traces: Path, prompts: Path, out: Path) -> list[judge.Judgment]:
    """The judgments of pipeline.judges on answers and reasoning; the judges are let go of."""
    rows = judge.read_rows(traces, prompts)
    with contextlib.ExitStack() as stack:
        judges = judge.open_judges(
            config.pipeline.judges, server=config.server, option="pipeline.judges"
        )
        for one in judges:
            stack.callback(one.close)
        return judge.judge(rows, judges, ("answer", "reasoning"), out)


def _measured(
    config: Config, models: dict[str, str], out: Path, held_out: str, max_new_tokens: int
) -> str:
    """The table of the models on the held-out prompts; asked is only what was not before.

    Judges, dtype and system prompt are those of the recipe's section `evaluate`. Answers end by
    themselves or at the limit: no thought is closed before.
    """
    settings = EvaluateConfig.model_validate(
        config.evaluate.model_dump()
        | {"benchmarks": [f"held_out={held_out}"], "views": "auto", "baseline": None}
        | {"think_tokens": None, "answer_tokens": max_new_tokens, "slots": BATCH}
    )
    config = config.model_copy(update={"evaluate": settings})
    results = evaluate.run(config, models, out / "measured", progress=sys.stderr.isatty())
    return table.short(results)


def _write(path: Path, text: str) -> None:
    if not distributed.writes():
        return
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
