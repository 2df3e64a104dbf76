"""Table: an analysis as text, each result at the layer where it is strongest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saro_jax.analysis import results, side_by_side


def summary(analysis: results.Analysis, manifest: Mapping[str, Any], out: Path) -> str:
    """The tables that a person reads first; their layers are those where a number says most."""
    lines = []
    if analysis.groups and any(analysis.groups.values()):
        counts = ", ".join(f"{n} {group}" for group, n in analysis.groups.items() if n)
        lines.append(f"prompts           {counts}")
    compared = side_by_side.rows(analysis) if len(analysis.models) > 1 else []
    if compared:
        lines += ["", f"| measure | of | {' | '.join(analysis.models)} |"]
        lines.append("|---" * (2 + len(analysis.models)) + "|")
        for row in compared:
            said = [row.values.get(name) for name in analysis.models]
            cells = [f"{one.text} {one.below}".strip() if one else "-" for one in said]
            lines.append(f"| {row.measure} | {row.of} | {' | '.join(cells)} |")
    if analysis.overlap:
        lines += ["", "| model | groups | layer | C2ST (length alone) | kNN | cosine | MMD² | p |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for model in analysis.models:
            for pair in dict.fromkeys(one.groups for one in analysis.overlap):
                mine = [o for o in analysis.overlap if o.model == model and o.groups == pair]
                one = max(mine, key=lambda o: o.c2st)
                lines.append(
                    f"| {model} | {' / '.join(pair)} | {one.layer} | {one.c2st:.2f} "
                    f"({one.c2st_length:.2f}) | {one.knn_purity:.2f} | {one.centroid_cosine:.2f} | "
                    f"{one.mmd2:.3f} | {one.p:.3f} |"
                )
    if analysis.probes:
        lines += ["", "| model | position | tested on | layer | AUROC | selectivity | n |"]
        lines.append("|---|---|---|---|---|---|---|")
        places = dict.fromkeys((o.model, o.position, o.test) for o in analysis.probes)
        for place in places:
            model, position, test = place
            mine = [o for o in analysis.probes if (o.model, o.position, o.test) == place]
            # An AUROC far below 0.5 is as much of a finding.
            one = max(mine, key=lambda o: -1 if o.auroc is None else abs(o.auroc - 0.5))
            if one.auroc is not None and one.selectivity is not None:
                lines.append(
                    f"| {model} | {position} | {test.replace('|', ' / ')} | {one.layer} | "
                    f"{one.auroc:.2f} | {one.selectivity:.2f} | {one.n} |"
                )
    if analysis.likelihood:
        lines += ["", "| model | condition | log p(safe) - log p(unsafe) a token | n |"]
        lines.append("|---|---|---|---|")
        lines += [
            f"| {one.model} | {one.condition} | {one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}] "
            f"| {one.n} |"
            for one in analysis.likelihood
        ]
    checkpoints = [one for one in analysis.margins if one.step is None]
    if checkpoints:
        lines += ["", "| model | pairs | margin | accuracy | chosen | rejected | n |"]
        lines.append("|---|---|---|---|---|---|---|")
        lines += [
            f"| {one.model} | {one.kind} | {one.margin:+.3f} | {one.accuracy:.2f} | "
            f"{one.chosen:.1f} | {one.rejected:.1f} | {one.n} |"
            for one in checkpoints
        ]
    if analysis.depth:
        lines += ["", "| model | " + " | ".join(f"k={one}" for one in _depths(analysis)) + " | n |"]
        lines.append("|---" * (2 + len(_depths(analysis))) + "|")
        for model in dict.fromkeys(one.model for one in analysis.depth):
            mine = {one.k: one for one in analysis.depth if one.model == model}
            cells = [f"{mine[k].asr:.2f}" for k in _depths(analysis)]
            n = mine[_depths(analysis)[0]].n
            lines.append(f"| {model} | {' | '.join(cells)} | {n} |")
        lines.append("shares of harmful prompts not refused after k prefilled tokens of an opening")
    if analysis.authenticity:
        lines += ["", "| model | test | of | before | after | difference | n |"]
        lines.append("|---|---|---|---|---|---|---|")
        lines += [
            f"| {one.model} | {one.test} | {one.metric} | {one.before:.2f} | {one.after:.2f} | "
            f"{one.delta:+.2f} [{one.low:+.2f}, {one.high:+.2f}] | {one.n} |"
            for one in analysis.authenticity
        ]
    if manifest["drop_reasons"]:
        reasons = ", ".join(f"{count} {name}" for name, count in manifest["drop_reasons"].items())
        lines += ["", f"left out          {reasons}"]
    lines.append(f"all results       {out / results.FILE}")
    return "\n".join(lines)


def _depths(analysis: results.Analysis) -> list[int]:
    return sorted({one.k for one in analysis.depth})
