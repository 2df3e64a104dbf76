"""Report: `python -m saro_jax.report RUN... --out=DIR [--title=TEXT] [--transcripts=N]`.

From folders of evaluations, analyses, training runs and other stages (or a folder above them) to

index.html      one page that loads nothing: comparison, charts, transcripts, provenance
report.md       its tables
csv/            the numbers behind it, one file a kind

Several evaluations are joined; the baseline is the first one's. The same folders give the same
files. No texts of transcripts are written outside the page.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.config import Flag
from saro_jax.reporting import (
    breakdown,
    comparison,
    findings,
    material,
    page,
    training,
    transcripts,
)
from saro_jax.reporting.material import Material
from saro_jax.reporting.tables import Section, Sheet, Table, cells, sheet_of, spreadsheet


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("out", "folder of the report", parse=Path, required=True),
        Flag("title", "of the page; default: the models that are compared"),
        Flag("transcripts", "prompts of a benchmark in the page at most; default all", parse=int),
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.report", __doc__, argv, flags, tree=False, places="RUN"
        )
        if not args.places:
            raise ValueError(
                "RUN: name at least one folder: python -m saro_jax.report RUN --out=DIR"
            )
        if args.transcripts is not None and args.transcripts < 0:
            raise ValueError(f"--transcripts={args.transcripts}; allowed: >= 0")
        file = run([Path(one) for one in args.places], args.out, args.title, args.transcripts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


def run(
    folders: Sequence[Path], out: Path, title: str | None = None, most: int | None = None
) -> Path:
    """Writes the report of the folders to `out`; the page's path.

    most: prompts of a benchmark whose transcripts go into the page. ValueError in one line.
    """
    found = material.gather(folders)
    kept = transcripts.chosen(found.transcripts, most)
    sections = contents(found, len(kept))
    facts = key_facts(found)
    title = title or default_title(found)
    packed = transcripts.packed(kept, found.evaluation) if kept else ""
    made_by = configuration.provenance()
    text = page.render(title, facts, sections, packed, found.sources, made_by)
    try:
        for sheet in sheets(found):
            with records.written(out / "csv" / f"{sheet.name}.csv") as file:
                file.write(spreadsheet(sheet).encode())
        with records.written(out / "report.md") as file:
            file.write(page.as_markdown(title, facts, sections).encode())
        with records.written(out / "index.html") as file:
            file.write(text.encode())
    except OSError as error:
        raise ValueError(f"--out={out}: {error.strerror}") from error
    return out / "index.html"


def default_title(found: Material) -> str:
    """What the report compares."""
    if found.evaluation is None:
        return "Report of a run"
    names = list(comparison.styles(found.evaluation))
    if len(names) > 4:
        return f"{names[0]} and {len(names) - 1} other models"
    return " \N{MIDDLE DOT} ".join(names)


def key_facts(found: Material) -> list[tuple[str, str]]:
    """Numbers that stand below the title."""
    counts: list[tuple[int, str]] = []
    if found.evaluation is not None:
        counts.append((len(found.evaluation.models), "model"))
        counts.append((len(found.evaluation.benchmarks), "benchmark"))
    counts.append((len(found.transcripts), "transcript"))
    counts.append((len(found.training), "training run"))
    facts = [(f"{n:,}", word + "s" * (n != 1)) for n, word in counts if n]
    if found.evaluation is not None:
        facts.append((found.evaluation.baseline, "is the baseline"))
    return facts


def contents(found: Material, kept: int) -> list[Section]:
    """The sections of the page, in its order."""
    results, sections = found.evaluation, []
    style = _styles(found)
    if results is None:
        missing = (
            "No evaluation was given: name its folder (with results.json) to see a comparison."
        )
        sections.append(Section("summary", "Comparison", empty=missing))
    else:
        front = comparison.planes(results)
        differences = comparison.differences_chart(results)
        head = (
            front[:1] + ([differences] if differences else []) + front[1 : comparison.MOST_PLANES]
        )
        sections += [
            Section("summary", "Comparison", figures=head, tables=[comparison.headline(results)]),
            breakdown.costs(results, material.latencies(found.sources)),
            breakdown.categories(results),
            breakdown.judges(results),
            Section(
                "all",
                "All metrics",
                tables=[breakdown.all_metrics(results), *breakdown.seeds(results)],
            ),
        ]
    sections.append(training.section(found.training))
    sections += findings.sections(found.analysis, style)
    if found.transcripts:
        intro = (
            f"{kept:,} of {len(found.transcripts):,} transcripts, by prompt, the models side by "
            "side. Harmful prompts, and what models said to them, are collapsed until opened."
        )
        sections.append(Section("transcripts", "Transcripts", intro))
    sections.append(provenance(found))
    return sections


def _styles(found: Material):
    """Colours of models: the evaluation's, then those of models that only an analysis has."""
    known = {} if found.evaluation is None else comparison.styles(found.evaluation)

    def style(name: str) -> int:
        return known.setdefault(name, len(known))

    return style


def provenance(found: Material) -> Section:
    """Where everything came from."""
    tables = []
    if found.evaluation is not None:
        tables += [breakdown.models(found.evaluation), breakdown.benchmarks(found.evaluation)]
    rows = [
        cells(
            *(one.place, one.what, one.manifest.get("seed", "")),
            *(one.manifest.get("run", {}).get("started", ""), one.sha256[:16]),
        )
        for one in found.sources
    ]
    columns = ["folder", "what", "seed", "began", "sha256"]
    tables.append(Table("sources", "Folders", columns, rows, left=frozenset({1, 2, 3, 4})))
    intro = "What the report was made from; open a folder for its settings, inputs and versions."
    return Section("provenance", "Provenance", intro, tables=tables)


def sheets(found: Material) -> list[Sheet]:
    """The CSV files; what there is nothing of has none."""
    made: list[Sheet | None] = [
        transcripts.sheet(found.transcripts),
        training.sheet(found.training),
    ]
    for whole, names in (
        (found.evaluation, ("rates", "differences", "costs", "seeds", "agreement", "audit")),
        (
            found.analysis,
            ("overlap", "probes", "likelihood", "depth", "authenticity", "margins"),
        ),
    ):
        if whole is not None:
            made += [sheet_of(name, getattr(whole, name) or ()) for name in names]
    return [one for one in made if one is not None]


if __name__ == "__main__":
    sys.exit(main())
