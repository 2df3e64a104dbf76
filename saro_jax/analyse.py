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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.analysis import (
    depth,
    likelihood,
    linear,
    maps,
    margins,
    overlap,
    pool,
    probes,
    reflections,
    results,
    states,
    table,
)
from saro_jax.analysis.pool import GROUPS, Asked
from saro_jax.analysis.results import END, PROMPT, Map, Point
from saro_jax.config import Config, Flag
from saro_jax.data import prompts as prompt_sources
from saro_jax.data import rows as preference_rows
from saro_jax.data.packing import round_up
from saro_jax.data.rows import PreferenceRow
from saro_jax.evaluation.results import Transcript, read_transcripts, transcript_files
from saro_jax.generation.local import Local
from saro_jax.models import hub, huggingface
from saro_jax.records import Input, Journal, Reject, Stage
from saro_jax.text import chat
from saro_jax.text import policy as policies

LEAST = 10  # prompts of a group
T = TypeVar("T", Asked, reflections.Tampered)


@dataclass(frozen=True)
class Model:
    """A model by its name, with its folder and the hash of its weights."""

    name: str
    folder: Path
    sha: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart"),
        Flag("model", "NAME=PATH: folder, .gguf file or Hub id", required=True, many=True),
        Flag("prompts", "SOURCE or KIND=SOURCE: file, folder or Hub id", many=True),
        Flag("pairs", "preference rows with reasoning: file, folder or Hub id"),
        Flag("transcripts", "folder of an evaluation of these models", parse=Path),
        Flag("run", "NAME=DIR: folder of an SRPO run", many=True),
        Flag("out", "output folder", parse=Path, required=True),
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.analyse",
            __doc__ or "",
            sys.argv[1:] if argv is None else argv,
            flags,
        )
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
    _depths(settings.depth)  # before anything is read
    asked, rejects, inputs = _prompts(config, prompts)
    preferred, more = _preferences(config, pairs)
    inputs += more
    answered, more = _transcripts(transcripts, list(models), settings.steps)
    curves = {name: margins.of_run(name, Path(path)) for name, path in (runs or {}).items()}
    inputs += more + [Input.of_file(Path(path) / margins.FILE) for path in (runs or {}).values()]
    if not asked and not answered and not curves and not preferred:
        raise ValueError("nothing to analyse: give --prompts, --pairs, --transcripts or --run")
    loaded = [Model(name, hub.resolve(path), "") for name, path in models.items()]
    loaded = [Model(one.name, one.folder, huggingface.weights_hash(one.folder)) for one in loaded]
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
            parts = _parts(config, model, asked, preferred, mine, journal, progress)
            for part, values in parts.items():
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


def _depths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(":")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"analyse.depth={text}: expected different counts >= 0 like 0:1:2:4:8")
    return found


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


# ---- the parts of one model ----------------------------------------------------------------------


def _parts(
    config: Config,
    model: Model,
    asked: Sequence[Asked],
    preferred: Sequence[PreferenceRow],
    answered: Sequence[tuple[Transcript, str]],
    journal: Journal,
    progress: bool,
) -> dict[str, list[Any]]:
    """All results of a model; those that the journal holds are not computed again."""
    work: dict[str, Callable[..., dict[str, list[Any]]]] = {}
    usable = [one for one, reason in answered if not reason]
    tampered = reflections.tampered([one for one, _ in answered], config.seed)
    if asked:
        work["prompts"] = partial(_of_prompts, config, model, asked, bool(usable))
    attacked = _drawn([one for one in asked if one.group == "harmful"], config, "depth")
    if attacked:
        work["depth"] = partial(_of_depth, config, model, attacked)
    if preferred:
        work["pairs"] = partial(_of_pairs, config, model, preferred)
    if usable:
        work["transcripts"] = partial(_of_transcripts, config, model, usable)
    changed = [
        one
        for test in reflections.TESTS
        for one in _drawn([one for one in tampered if one.test == test], config, test)
    ]
    if changed:
        work["reflections"] = partial(_of_reflections, config, model, changed)
    found: dict[str, list[Any]] = {}
    loaded: tuple[Any, Any, Any] | None = None
    for part, compute in work.items():
        place = f"{model.name}:{part}"
        if place not in journal.values:
            loaded = loaded or _load(config, model)
            with tqdm(desc=f"{model.name}: {part}", unit="text", disable=not progress) as bar:
                done = compute(*loaded, bar.update)
            journal.append(
                place,
                {name: [_plain(one) for one in made] for name, made in done.items()},
            )
        for name, made in journal.values[place].items():
            found.setdefault(name, []).extend(made)
    return found


def _plain(one: Any) -> dict[str, Any]:
    return vars(one) if isinstance(one, Reject) else one.model_dump(mode="json")


def _load(config: Config, model: Model) -> tuple[Any, Any, Any]:
    arch = huggingface.load_architecture(model.folder)
    tokenizer = chat.load_tokenizer(model.folder, config.model.chat_template)
    return (
        arch,
        huggingface.load_params(model.folder, arch, jnp.dtype(config.model.dtype)),
        tokenizer,
    )


def _of_prompts(
    config: Config,
    model: Model,
    asked: Sequence[Asked],
    has_transcripts: bool,
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """Overlap, maps and probes of states at the ends of the prompts."""
    settings = config.analyse
    texts = []
    for one in asked:
        try:
            texts.append(states.prompt_end(tokenizer, one.text))
        except ValueError as error:
            raise ValueError(f"--prompts: {one.id}: {error}") from None
    read = _read(config, arch, params, texts, tell)
    states_NLD = np.stack([one[:, 0] for one in read])
    groups = _rows([one.group for one in asked])
    bases = [one.base for one in asked]
    layers = _layers(arch.num_layers, settings.layer_step)
    tokens = np.array([len(text.ids) for text in texts])
    compared = overlap.compare(
        model.name,
        states_NLD,
        groups,
        bases,
        tokens,
        layers=layers,
        seed=config.seed,
        permutations=settings.permutations,
    )
    probed = []
    if not has_transcripts:  # else those of the transcripts, at all positions
        probed = probes.compare(
            model.name, PROMPT, states_NLD, groups, bases, layers=layers, seed=config.seed
        )
    pictures = []
    for layer in sorted({arch.num_layers // 2, arch.num_layers}):
        x_ND = linear.standardised(states_NLD[:, layer])
        drawn = [("pca", 0, maps.pca(x_ND)[0])]
        for seed in range(config.seed, config.seed + settings.tsne_seeds):
            drawn.append(("tsne", seed, maps.tsne(x_ND, seed)))
        for method, seed, y_N2 in drawn:
            points = tuple(
                Point(id=one.id, kind=one.group, x=round(float(x), 3), y=round(float(y), 3))
                for one, (x, y) in zip(asked, y_N2, strict=True)
            )
            pictures.append(
                Map(model=model.name, layer=layer, method=method, seed=seed, points=points)  # type: ignore[arg-type]
            )
    return {"overlap": compared, "maps": pictures, "probes": probed}


def _of_transcripts(
    config: Config,
    model: Model,
    answered: Sequence[Transcript],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """Probes after each reasoning step of the model's own answers."""
    settings = config.analyse
    texts, kept, left_out = [], [], []
    for one in answered:
        steps = [step.text for step in one.steps if step.text.strip()]
        text = states.step_ends(tokenizer, one.prompt, one.response, steps)
        if len(text.ids) <= settings.row_length:
            texts.append(text)
            kept.append(one)
        else:
            reason = f"too long: {len(text.ids)} tokens, analyse.row_length={settings.row_length}"
            left_out.append(Reject(one.id, reason, model.name))
    read = _read(config, arch, params, texts, tell)
    layers = _layers(arch.num_layers, settings.layer_step)
    found = []
    names = [PROMPT, *(f"step {i + 1}" for i in range(settings.steps)), END]
    for number, position in enumerate(names):
        at = -1 if position == END else number
        have = [i for i, one in enumerate(read) if position == END or one.shape[1] > number]
        if not have:
            continue
        states_NLD = np.stack([read[i][:, at] for i in have])
        groups = _rows([pool.group_of(kept[i].kind, kept[i].attack is not None) for i in have])
        found += probes.compare(
            model.name,
            position,
            states_NLD,
            groups,
            [kept[i].base_id for i in have],
            layers=layers,
            seed=config.seed,
        )
    return {"probes": found, "rejects": left_out}


def _of_pairs(
    config: Config,
    model: Model,
    preferred: Sequence[PreferenceRow],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """Log-probs of the pairs, and likelihoods of their answers after different reasoning."""

    def score(rows: Sequence[PreferenceRow]) -> dict[str, likelihood.Scores]:
        return likelihood.score(
            arch,
            params,
            tokenizer,
            rows,
            row_length=round_up(config.analyse.row_length, 64),
            dtype=config.model.dtype,
            progress=tell,
        )

    scored = score(preferred)
    scores = [
        margins.Scored(
            model=model.name, id=row.id, kind=row.kind, chosen=mine.chosen, rejected=mine.rejected
        )
        for row in preferred
        if (mine := scored.get(row.id)) is not None
    ]
    left_out = [
        Reject(row.id, f"too long: of analyse.row_length={config.analyse.row_length}", model.name)
        for row in preferred
        if row.id not in scored
    ]
    found: dict[str, list[Any]] = {"scores": scores, "rejects": left_out}
    given = likelihood.cases(preferred)
    if not given:
        return found
    after = {
        name: score(likelihood.in_context(given, before))
        for name, before in likelihood.contexts(given, config.seed).items()
    }
    return found | {"likelihood": likelihood.gains(model.name, after, given, config.seed)}


def _of_depth(
    config: Config,
    model: Model,
    asked: Sequence[Asked],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """How often harmful prompts are answered after a prefilled opening."""
    curve = depth.curve(
        _generator(config, model, arch, params, tokenizer),
        tokenizer,
        asked,
        _depths(config.analyse.depth),
        max_new_tokens=config.analyse.max_new_tokens,
        seed=config.seed,
        progress=tell,
    )
    return {"depth": curve}


def _of_reflections(
    config: Config,
    model: Model,
    changed: Sequence[reflections.Tampered],
    arch: Any,
    params: Any,
    tokenizer: Any,
    tell: Callable[[int], Any],
) -> dict[str, list[Any]]:
    """What becomes of answers after their reflections were changed."""
    responses = reflections.continued(
        _generator(config, model, arch, params, tokenizer),
        changed,
        max_new_tokens=config.analyse.max_new_tokens,
        tries=config.analyse.tries,
        seed=config.seed,
        progress=tell,
    )
    left_out = [
        Reject(one.id, f"a marker came again: in {config.analyse.tries} tries", model.name)
        for one in changed
        if one.id not in responses
    ]
    found = reflections.compare(model.name, changed, responses, config.seed)
    return {"authenticity": found, "rejects": left_out}


def _generator(config: Config, model: Model, arch: Any, params: Any, tokenizer: Any) -> Local:
    return Local(
        arch,
        params,
        tokenizer,
        name=model.name,
        sha=model.sha,
        dtype=config.model.dtype,
        slots=config.analyse.batch_size,
    )


def _drawn(given: Sequence[T], config: Config, test: str) -> list[T]:
    """As many as analyse.prompts says, drawn by the seed, in their order."""
    order = sorted(given, key=lambda one: records.sha256(f"{config.seed}:{test}:{one.id}"))
    keep = {one.id for one in order[: config.analyse.prompts]}
    return [one for one in given if one.id in keep]


def _read(config: Config, arch: Any, params: Any, texts: Any, tell: Any) -> list[np.ndarray]:
    return states.read(
        arch,
        params,
        texts,
        row_length=round_up(config.analyse.row_length, 64),
        dtype=config.model.dtype,
        progress=tell,
    )


def _rows(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Indices by group, in the order of GROUPS."""
    array = np.array(names)
    return {name: rows for name in GROUPS if len(rows := np.flatnonzero(array == name))}


def _layers(count: int, step: int) -> list[int]:
    """The embedding, every `step`-th layer, and the last."""
    return sorted({*range(0, count, step), count})


if __name__ == "__main__":
    sys.exit(main())
