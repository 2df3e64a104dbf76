"""All stages from one recipe: `python -m saro_jax.pipeline [--config=RECIPE] [--out=DIR]`.

Measures the model the recipe starts from on held-out prompts, runs RW and SRPO, exports both,
measures them the same way and prints one table. Each stage lies in its own folder of OUT and is
skipped where it is complete, so the same command continues a run that was stopped.
"""

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from saro_jax import config as configuration
from saro_jax import train
from saro_jax.config import Flag
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
    """Measure, RW, SRPO, measure again; returns 0, or 128 + the signal that stopped a stage."""
    started = time.monotonic()
    configs = {
        stage: configuration.load(recipe, overrides, stage) for stage in configuration.STAGES
    }
    prompts = quick.read_prompts(held_out)
    base = configs["rw"].model.path or "quickstart"
    measured = {"base": _measure("base", base, prompts, out, max_new_tokens)}
    for stage, config in configs.items():
        if stage == "srpo":  # starts from what the warmup made
            model = config.model.model_copy(
                update={"path": str(out / "rw" / "model"), "revision": None}
            )
            config = config.model_copy(update={"model": model})
        print(f"\n== {stage.upper()} ==", flush=True)
        stopped = train.run(config, stage, out / stage)
        if stopped:
            return stopped
        model = str(out / stage / "model")
        measured[stage] = _measure(stage, model, prompts, out, max_new_tokens)
    table = comparison(measured)
    _write(out / "summary.md", table + "\n")
    facts = {"provenance": configuration.provenance(), "measured": measured}
    _write(out / "summary.json", json.dumps(facts, indent=2) + "\n")
    print(f"\n{table}\n")
    print(f"warmup model      {out / 'rw' / 'model'}")
    print(f"SRPO model        {out / 'srpo' / 'model'}")
    print(f"metrics           {out}/rw/metrics.jsonl, {out}/srpo/metrics.jsonl")
    print(f"transcripts       {out}/measured/*.jsonl")
    print(f"this table        {out / 'summary.md'}")
    print(f"total             {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


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
