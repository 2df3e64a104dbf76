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
measured/, summary.md          transcripts on the held-out prompts, the table

Each stage lies in its own folder and is skipped where it is complete, so the same command continues
a run that was stopped. pipeline.synthesize=false and pipeline.rounds=0 train on data.train instead.
"""

import contextlib
import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from saro_jax import config as configuration
from saro_jax import judge, pairs, sample, synthesize, train
from saro_jax.config import Config, Flag
from saro_jax.evaluation import quick
from saro_jax.models import hub, huggingface
from saro_jax.parallel import distributed
from saro_jax.text import chat

BATCH = 60  # responses generated at a time
HELD_OUT = "quickstart:held_out"
# Rows of the table: what is counted, over which kinds of prompts.
ROWS = (
    ("refuses harmful requests", "refused", ("harmful",)),
    ("refuses jailbreaks", "refused", ("jailbreak",)),
    ("answers borderline requests", "complied", ("borderline",)),
    ("answers benign requests", "complied", ("benign",)),
    ("well-formed reasoning", "well_formed", tuple(quick.WANTED)),
    ("no end within the limit", "incomplete", tuple(quick.WANTED)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart"),
        Flag("out", "output folder; default runs/RECIPE", parse=Path),
        Flag("held-out", "prompts to measure on: rows {id, kind, prompt}", HELD_OUT),
        Flag("max-new-tokens", "longest response that is measured", 320, parse=int),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.pipeline",
            __doc__ or "",
            sys.argv[1:] if argv is None else argv,
            flags,
        )
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
    prompts = quick.read_prompts(held_out)
    base = configs["rw"].model.path or "quickstart"
    measured = {"base": _measure("base", base, prompts, out, max_new_tokens)}
    if steps.synthesize:
        _say("RIT-D")
        manifest = synthesize.run(configs["rw"], ritd, progress=sys.stderr.isatty())
        print(synthesize.summary(manifest, ritd), flush=True)

    def trained(stage: str, config: Config, folder: Path, name: str) -> int:
        _say(name.upper())
        stopped = train.run(config, stage, folder)
        if not stopped:
            model = str(folder / "model")
            measured[name] = _measure(name, model, prompts, out, max_new_tokens)
        return stopped

    if stopped := trained("rw", configs["rw"], out / "rw", "rw"):
        return stopped
    model = out / "rw" / "model"
    folders = [_round(out, number) for number in range(1, steps.rounds + 1)]
    for number, folder in enumerate(folders, 1):
        config = _with(configs["srpo"], "model", path=str(model), revision=None)
        _rolled(config, ritd if steps.synthesize else None, folder, number)
        config = _with(config, "data", train=str(folder / "pairs" / "pairs.jsonl"))
        name = "srpo" if steps.rounds == 1 else f"srpo{number}"
        if stopped := trained("srpo", config, folder / "srpo", name):
            return stopped
        model = folder / "srpo" / "model"
    if not steps.rounds:
        config = _with(configs["srpo"], "model", path=str(model), revision=None)
        if stopped := trained("srpo", config, out / "srpo", "srpo"):
            return stopped
        model = out / "srpo" / "model"
    table = comparison(measured)
    _write(out / "summary.md", table + "\n")
    facts = {"provenance": configuration.provenance(), "measured": measured}
    _write(out / "summary.json", json.dumps(facts, indent=2) + "\n")
    print(f"\n{table}\n")
    print(f"warmup model      {out / 'rw' / 'model'}")
    print(f"SRPO model        {model}")
    print(f"metrics           {out}/rw/metrics.jsonl, {model.parent}/metrics.jsonl")
    print(f"transcripts       {out}/measured/*.jsonl")
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


def _measure(
    name: str, model: str, prompts: list[quick.Prompt], out: Path, max_new_tokens: int
) -> dict[str, Any]:
    """Summary of one model on the held-out prompts; read back where it was measured before."""
    file = out / "measured" / f"{name}.jsonl"
    kept = file.with_suffix(".summary.json")
    digest = hashlib.blake2b(repr(prompts).encode(), digest_size=8).hexdigest()
    key = {"model": model, "prompts_hash": digest, "max_new_tokens": max_new_tokens}
    before = distributed.first(
        "measured", lambda: json.loads(kept.read_text()) if kept.exists() else {}
    )
    if key.items() <= before.items():
        return before
    print(f"\n== measuring {name}: {len(prompts)} held-out prompts ==", flush=True)
    folder = hub.resolve(model)
    arch = huggingface.load_architecture(folder)
    params = huggingface.load_params(folder, arch, jnp.float32)
    summary, transcripts = quick.measure(
        arch,
        params,
        chat.load_tokenizer(folder),
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=BATCH,
        progress=sys.stderr.isatty(),
    )
    del params
    gc.collect()
    summary |= key
    if distributed.writes():
        quick.write(file, summary, transcripts)
    print(quick.table(summary), flush=True)
    return summary


def comparison(measured: dict[str, dict[str, Any]]) -> str:
    """The measured models side by side, as a markdown table."""
    first = next(iter(measured.values()))["kinds"]
    names = " | ".join(name.upper() if name != "base" else name for name in measured)
    lines = [f"| held-out prompts | n | {names} |", "|---|---|" + "---|" * len(measured)]
    for title, outcome, kinds in ROWS:
        kinds = [kind for kind in kinds if kind in first]
        if not kinds:
            continue
        total = sum(first[kind]["n"] for kind in kinds)
        cells = []
        for summary in measured.values():
            count = sum(summary["kinds"][kind][outcome]["count"] for kind in kinds)
            low, high = quick.wilson(count, total)
            cells.append(f"{count / total:.0%} [{low:.0%}, {high:.0%}]")
        lines.append(f"| {title} | {total} | {' | '.join(cells)} |")
    total = sum(row["n"] for row in first.values())
    means = [
        sum(row["n"] * row["mean_tokens"] for row in summary["kinds"].values()) / total
        for summary in measured.values()
    ]
    lines.append(f"| tokens of a response | {total} | {' | '.join(f'{m:.0f}' for m in means)} |")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    if not distributed.writes():
        return
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
