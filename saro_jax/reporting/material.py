"""Owns what a report is made from: the folders it is given, told apart, read and put together."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from saro_jax import records
from saro_jax.analysis import results as analyses
from saro_jax.evaluation import results as evaluations
from saro_jax.evaluation.results import Benchmark, Model, Results, Transcript

METRICS, CONFIG, PROVENANCE = "metrics.jsonl", "config.yaml", "provenance.json"
# Folders inside a run that hold no run of their own.
INNER = {"checkpoints", "model", "rejects", "responses", "tensorboard", "transcripts", "reference"}
DEPTH = 4  # folders below the one that is named

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A folder that the report was made from, and what it says of how it was made."""

    place: str
    what: str  # evaluation, analysis, training, or the stage of its manifest
    manifest: dict[str, Any]
    config: str = ""  # YAML of a training run
    sha256: str = ""  # of the file that the numbers were read from


@dataclass(frozen=True)
class Training:
    """A training run: its lines of metrics, in the order of their steps."""

    name: str
    stage: str
    lines: list[dict[str, Any]]

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric has a value."""
        found = ((line["step"], line.get(metric)) for line in self.lines)
        return [(float(step), float(value)) for step, value in found if value is not None]

    def kinds(self, metric: str) -> list[str]:
        """Kinds of pairs that have the metric, by name."""
        names = {name for line in self.lines for name in line if name.endswith(f"/{metric}")}
        return sorted(name.removesuffix(f"/{metric}") for name in names if "eval_" not in name)


@dataclass
class Material:
    """All that the folders hold, joined: one evaluation, one analysis, the training runs."""

    evaluation: Results | None = None
    transcripts: list[Transcript] = field(default_factory=list)
    analysis: analyses.Analysis | None = None
    training: list[Training] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)


def gather(folders: Sequence[Path]) -> Material:
    """Reads the folders, and the runs in folders below them, in the order given.

    Several evaluations are joined, as are analyses. ValueError in one line: a folder that holds
    nothing for a report, or two evaluations that do not go together.
    """
    material = Material()
    results: list[tuple[Path, Results]] = []
    found_analyses: list[analyses.Analysis] = []
    seen: set[Path] = set()
    for given in folders:
        if not given.is_dir():
            raise ValueError(f"{given}: no such folder")
        places = list(_runs(given))
        if not places:
            raise ValueError(
                f"{given}: nothing to report in it or up to {DEPTH} folders below; expected "
                f"{evaluations.RESULTS}, {analyses.FILE}, {METRICS} or {records.MANIFEST}"
            )
        for place in places:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            if (place / evaluations.RESULTS).is_file():
                results.append((place, evaluations.read_results(place)))
                material.sources.append(_source(place, "evaluation", evaluations.RESULTS))
                for parts in evaluations.transcript_files(place):
                    material.transcripts += evaluations.read_transcripts(place, *parts)
            if (place / analyses.FILE).is_file():
                found_analyses.append(analyses.read(place))
                material.sources.append(_source(place, "analysis", analyses.FILE))
            if (place / METRICS).is_file():
                material.sources.append(_source(place, "training", METRICS))
                material.training.append(read_training(place))
            if not any(source.place == str(place) for source in material.sources):
                material.sources.append(_source(place, "", records.MANIFEST))
    if results:
        material.evaluation = join_evaluations(results)
    if found_analyses:
        material.analysis = _joined_analyses(found_analyses)
    _name_apart(material)
    return material


def _runs(folder: Path) -> Iterator[Path]:
    """The folders with something to report, from the top, by name; links are not followed."""
    files = (evaluations.RESULTS, analyses.FILE, METRICS, records.MANIFEST)
    for at, below, names in os.walk(folder):
        place = Path(at)
        deep = len(place.relative_to(folder).parts) >= DEPTH
        below[:] = [] if deep else sorted(n for n in below if n not in INNER and n[0] != ".")
        if any(name in files for name in names):
            yield place


def _source(place: Path, what: str, file: str) -> Source:
    manifest: dict[str, Any] = {}
    if (place / records.MANIFEST).is_file():
        manifest = records.read_manifest(place / records.MANIFEST)
    elif (place / PROVENANCE).is_file():
        manifest = {"run": {"provenance": _json(place / PROVENANCE)}}
    config = place / CONFIG
    return Source(
        str(place),
        what or str(manifest["stage"]),
        manifest,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        records.file_sha256(place / file),
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None


def read_training(folder: Path) -> Training:
    """The metrics of a run; a last line that is not whole (a run that is at work) is left out."""
    lines: list[dict[str, Any]] = []
    file = folder / METRICS
    raw = file.read_bytes().split(b"\n")
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(raw):
                break
            raise ValueError(f"{file}:{number}: not a line of metrics: {error}") from None
        lines.append(line)
    stage = "rw"
    if (folder / CONFIG).is_file():
        first = (folder / CONFIG).read_text(encoding="utf-8").partition("\n")[0]
        stage = first.removeprefix("# stage:").strip() if first.startswith("# stage:") else stage
    elif any("rewards/margins" in line for line in lines):
        stage = "srpo"
    return Training(str(folder), stage, lines)


def join_evaluations(found: Sequence[tuple[Path, Results]]) -> Results:
    """One evaluation of several; the first one's baseline is that of all.

    ValueError where a name stands for two models or two benchmarks, or where two folders have the
    same model's rates on the same benchmark.
    """
    models: dict[str, tuple[Path, Model]] = {}
    benchmarks: dict[str, tuple[Path, Benchmark]] = {}
    owners: dict[tuple[str, str, str], Path] = {}
    for place, one in found:
        for model in one.models:
            _same("model", model.name, model.sha, place, models, lambda m: m.sha)
            models.setdefault(model.name, (place, model))
        for bench in one.benchmarks:
            asked = (bench.n, bench.protocol)
            _same("benchmark", bench.name, asked, place, benchmarks, lambda b: (b.n, b.protocol))
            benchmarks.setdefault(bench.name, (place, bench))
        for rate in one.rates:
            key = (rate.model, rate.benchmark, rate.view)
            if owners.setdefault(key, place) != place:
                raise ValueError(
                    f"{place}: {rate.model} on {rate.benchmark} ({rate.view}) is in "
                    f"{owners[key]} too; give one of the two"
                )
    whole = [one for _, one in found]
    audits = [audit for one in whole for audit in one.audit or ()]
    return Results(
        models=tuple(model for _, model in models.values()),
        baseline=whole[0].baseline,
        benchmarks=tuple(bench for _, bench in benchmarks.values()),
        rates=tuple(rate for one in whole for rate in one.rates),
        differences=tuple(d for one in whole for d in one.differences),
        costs=tuple(cost for one in whole for cost in one.costs),
        seeds=tuple(rate for one in whole for rate in one.seeds),
        agreement=tuple(a for one in whole for a in one.agreement),
        audit=tuple(audits) if any(one.audit is not None for one in whole) else None,
    )


def _same(what: str, name: str, value: Any, place: Path, known: dict[str, Any], of: Any) -> None:
    if name in known and of(known[name][1]) != value:
        raise ValueError(f"{place}: {what} {name!r} is another one than in {known[name][0]}")


def _joined_analyses(found: Sequence[analyses.Analysis]) -> analyses.Analysis:
    groups: dict[str, int] = {}
    for one in found:
        groups = one.groups | groups
    return analyses.Analysis(
        models=tuple(dict.fromkeys(name for one in found for name in one.models)),
        groups=groups,
        overlap=tuple(x for one in found for x in one.overlap),
        maps=tuple(x for one in found for x in one.maps),
        probes=tuple(x for one in found for x in one.probes),
        likelihood=tuple(x for one in found for x in one.likelihood),
        depth=tuple(x for one in found for x in one.depth),
        authenticity=tuple(x for one in found for x in one.authenticity),
        margins=tuple(x for one in found for x in one.margins),
        provenance=found[0].provenance,
    )


def _name_apart(material: Material) -> None:
    """Training runs by the last part of their path that tells them apart."""
    paths = [Path(run.name).resolve() for run in material.training]
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    else:
        return
    material.training = [
        Training(name, run.stage, run.lines)
        for name, run in zip(names, material.training, strict=True)
    ]


def latencies(sources: Sequence[Source]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What evaluations say of an answer's time, by model, view and kind of prompt."""
    found = {}
    for source in sources:
        speed = (
            source.manifest.get("run", {}).get("speed", {}) if source.what == "evaluation" else {}
        )
        for model, said in speed.items():
            for one in said.get("answers", ()):
                found[model, one["view"], one["kind"]] = one | {"slots": said["slots"]}
    return found


def settings(source: Source) -> dict[str, Any]:
    """The settings of a source as a tree: its manifest's, or those of a training run."""
    if source.config:
        tree = yaml.safe_load(source.config)
        return tree if isinstance(tree, dict) else {}
    config = source.manifest.get("config")
    return config if isinstance(config, dict) else {}
