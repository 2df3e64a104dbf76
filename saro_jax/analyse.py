"""Analyses: `python -m saro_jax.analyse --model=NAME=PATH ... --prompts=KIND=FILE ... --out=DIR`.

What goes on inside models, the first of which is the one that the others are compared with:

--prompts       overlap of harmful, jailbreak, benign, borderline and wrapped prompts in hidden
                space, layer by layer; maps; a linear probe of harmful intent at the prompt's end;
                how often harmful ones are answered after a prefilled opening of k tokens
--transcripts   of an evaluation's folder: the probe after each reasoning step; what becomes of
                answers whose reflections are deleted, banned, swapped or led astray
--pairs         of preferences: rewards of the models over the first; how much more probable their
                reasoning makes the safe answer, against shuffled and foreign reasoning
--run           a folder of `train --stage=srpo`: reward margins and accuracies by kind of pairs

Disguises are made of the prompts with held-out wrappers, as many as --analyse.jailbreaks and
--analyse.wrapped say. Writes DIR/analysis.json, DIR/rejects/ and DIR/manifest.json; the same
command goes on where an earlier one was stopped. docs/analyse.md says what each number means.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.analysis import linear, margins, parts, pool, results, table
from saro_jax.analysis.pool import GROUPS, Asked
from saro_jax.config import Config, Flag
from saro_jax.data import prompts as prompt_sources
from saro_jax.data import rows as preference_rows
from saro_jax.data.rows import PreferenceRow
from saro_jax.evaluation.results import Transcript, read_transcripts, transcript_files
from saro_jax.records import Input, Journal, Reject, Stage
from saro_jax.text import policy as policies

LEAST = 10  # prompts of a group


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        configuration.CONFIG,
        Flag(
            "model",
            "NAME=PATH: model or adapter folder, .gguf file or Hub id",
            required=True,
            many=True,
        ),
        Flag("prompts", "SOURCE or KIND=SOURCE: file, folder or Hub id", many=True),
        Flag("pairs", "preference rows with reasoning: file, folder or Hub id"),
        Flag("transcripts", "folder of an evaluation of these models", parse=Path),
        Flag("run", "NAME=DIR: folder of an SRPO run", many=True),
        configuration.OUT,
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.analyse", __doc__, argv, flags)
        given = {override.split("=")[0] for override in args.overrides}
        defaults = ["--data.train=none", "--model.dtype=float32"]
        defaults = [d for d in defaults if d.split("=")[0] not in given]
        config = configuration.load(args.config, [*defaults, *args.overrides], "rw")
        manifest = run(
            config,
            named(args.model, "--model"),
            args.out,
            prompts=args.prompts,
            pairs=args.pairs,
            transcripts=args.transcripts,
            runs=named(args.run, "--run"),
            progress=sys.stderr.isatty(),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print(table.summary(results.read(args.out), manifest, args.out))
    return 0


def named(given: Sequence[str], option: str) -> dict[str, str]:
    """Texts like "rw=out/rw/model" by name; each name once."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"{option}={text}: expected NAME=PATH")
        if name in found:
            raise ValueError(f"{option}={text}: the name {name!r} is given twice")
        found[name] = path
    return found


def run(
    config: Config,
    models: Mapping[str, str],
    out: Path,
    *,
    prompts: Sequence[str] = (),
    pairs: str | None = None,
    transcripts: Path | None = None,
    runs: Mapping[str, str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Analyse in `out` and return the manifest; nothing is done where it is there already."""
    linear.check()
    settings = config.analyse
    parts.depths(settings.depth)  # before anything is read
    asked, rejects, inputs = _prompts(config, prompts)
    preferred, more = _preferences(config, pairs)
    inputs += more
    answered, more = _transcripts(transcripts, list(models), settings.steps)
    curves = {name: margins.of_run(name, Path(path)) for name, path in (runs or {}).items()}
    inputs += more + [Input.of_file(Path(path) / margins.FILE) for path in (runs or {}).values()]
    if not asked and not answered and not curves and not preferred:
        raise ValueError("nothing to analyse: give --prompts, --pairs, --transcripts or --run")
    loaded = [parts.model_at(name, path) for name, path in models.items()]
    stage = Stage(
        "analyse",
        settings.model_dump(mode="json")
        | {"dtype": config.model.dtype, "beta": config.srpo.beta}
        | {"models": {one.name: one.sha for one in loaded}},
        inputs,
        config.seed,
        model=loaded[0].name,
        model_sha=loaded[0].sha,
    )
    before = records.finished(stage, out)
    if before is not None:
        return before
    found: dict[str, list[Any]] = {"margins": [one for curve in curves.values() for one in curve]}
    key = stage.key()
    name = f"parts-{records.sha256(records.to_json(key))[:12]}.jsonl"
    with Journal(out / "journal" / name, key) as journal:
        for model in loaded:
            mine = answered.get(model.name, [])
            made = parts.compute(config, model, asked, preferred, mine, journal, progress)
            for part, values in made.items():
                found.setdefault(part, []).extend(values)
    rejects += [Reject(**one) for one in found.pop("rejects", [])]
    scored = [margins.Scored(**one) for one in found.pop("scores", [])]
    found["margins"] += margins.of_checkpoints(scored, loaded[0].name, config.srpo.beta)
    for values in answered.values():
        rejects += [Reject(one.id, reason) for one, reason in values if reason]
    document = results.Analysis(
        models=tuple(models),
        groups={group: sum(one.group == group for one in asked) for group in GROUPS},
        provenance=key,
        **{part: tuple(values) for part, values in found.items()},
    )
    return records.finish(
        stage,
        out,
        {},
        {"prompts.jsonl": rejects},
        n_in=sum(one.rows for one in inputs),
        n_out=len(asked) + len(preferred) + sum(len(values) for values in answered.values()),
        documents={results.FILE: document.model_dump(mode="json")},
    )


# ---- inputs --------------------------------------------------------------------------------------


def _prompts(config: Config, given: Sequence[str]) -> tuple[list[Asked], list[Reject], list[Input]]:
    """The prompts by group; ValueError for a group with too few to say anything."""
    if not given:
        return [], [], []
    settings = config.analyse
    sources = prompt_sources.sources(given, "--prompts")
    read, rejects, inputs = prompt_sources.read(
        sources, prompt_sources.column_map([], ""), policies.load(), config.data.split
    )
    if not read:
        raise ValueError(f"--prompts: no prompt in {given[0]}: {rejects[0].reason}")
    asked, rest = pool.choose(
        read, settings.per_group, settings.jailbreaks, settings.wrapped, config.seed
    )
    sizes = {group: sum(one.group == group for one in asked) for group in GROUPS}
    if sum(size > 0 for size in sizes.values()) < 2:
        raise ValueError(f"--prompts: two groups are needed, found {_counted(sizes)}")
    for group, size in sizes.items():
        if 0 < size < LEAST:
            raise ValueError(
                f"--prompts: {size} prompts of the group {group}; {LEAST} are needed to compare it "
                f"(found {_counted(sizes)})"
            )
    return asked, rejects + rest, inputs


def _preferences(config: Config, source: str | None) -> tuple[list[PreferenceRow], list[Input]]:
    """The pairs, drawn by the seed, in their order; ValueError for a row that is none."""
    if source is None:
        return [], []
    read, rejects = preference_rows.read(source, "preference", config.data.split)
    if rejects:
        raise ValueError(f"{rejects[0].where}: {rejects[0].reason}")
    drawn = sorted(read, key=lambda row: records.sha256(f"{config.seed}:{row.id}"))
    keep = {row.id for row in drawn[: config.analyse.pairs]}
    digest = records.content_id([(row.id, str(row)) for row in read])
    path = Path(source).expanduser()
    about = Input(source, len(read), digest, path if path.is_file() else None)
    return [row for row in read if row.id in keep], [about]


def _counted(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} {group}" for group, size in sizes.items() if size) or "none"


def _transcripts(
    folder: Path | None, models: Sequence[str], steps: int
) -> tuple[dict[str, list[tuple[Transcript, str]]], list[Input]]:
    """Transcripts by model, each with the reason why it is not used, or "", and the files."""
    if folder is None:
        return {}, []
    found: dict[str, list[tuple[Transcript, str]]] = {}
    inputs = []
    for model, benchmark, view in transcript_files(folder):
        if model not in models:
            continue
        for one in read_transcripts(folder, model, benchmark, view):
            reason = "" if one.steps or not steps else "no reasoning steps"
            found.setdefault(model, []).append((one, reason))
        name = f"{benchmark}.{view}.jsonl"
        inputs.append(Input.of_file(folder / "transcripts" / model / name))
    if not found:
        there = ", ".join(sorted({model for model, *_ in transcript_files(folder)})) or "none"
        raise ValueError(
            f"--transcripts={folder}: none of the models {', '.join(models)}; there are {there}"
        )
    return found, inputs


if __name__ == "__main__":
    sys.exit(main())
