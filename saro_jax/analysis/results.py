"""Results: what an analysis folder holds (`analysis.json`), typed, written and read whole.

Shares and rates are 0 to 1, log-probs natural logs, `low` and `high` the ends of 95 % intervals.
Groups are kinds of prompts; `borderline` ones that stand in a wrapper are the group `wrapped`.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from saro_jax.records import Part, Share, Text, written

FILE = "analysis.json"

# Where a hidden state is read: the last token of the prompt, of reasoning step 1, 2, ... or of the
# whole reasoning.
Position = Text
PROMPT, END = "prompt", "end"
# How hidden states become points of a plane.
Method = Literal["pca", "tsne"]


class Overlap(Part):
    """How far two groups of prompts lie apart in one layer (0 = embedding) of a model.

    c2st: balanced accuracy of a linear classifier on held-out prompts, 0.5 = they overlap;
    c2st_length: that of the same classifier that sees nothing but the number of tokens, a control;
    knn_purity: share of the 10 nearest neighbours that are of the own group, both groups weighing
    the same; centroid_cosine: of the two means, about the mean of all prompts; mmd2: squared
    maximum mean discrepancy (unbiased, so it can be below 0), p its permutation p-value.
    """

    model: Text
    layer: int = Field(ge=0)
    groups: tuple[Text, Text]
    n: tuple[int, int]
    c2st: Share
    c2st_length: Share
    knn_purity: Share
    centroid_cosine: float = Field(ge=-1.000001, le=1.000001)
    mmd2: float
    p: Share


class Point(Part):
    """A prompt in a picture."""

    id: Text
    kind: Text
    x: float
    y: float


class Map(Part):
    """A picture of the prompts of one model and layer; axes of t-SNE mean nothing."""

    model: Text
    layer: int = Field(ge=0)
    method: Method
    seed: int = 0
    points: tuple[Point, ...]


class Probe(Part):
    """A linear probe of harmful intent, fitted on some groups and tested on others.

    `train` and `test` name the groups, "harmful|benign" say. selectivity: AUROC less that of the
    same probe on random labels; shift: mean probability of harm over the tested prompts by group.
    """

    model: Text
    layer: int = Field(ge=0)
    position: Position
    train: Text
    test: Text
    auroc: Share | None
    selectivity: float | None
    shift: dict[str, Share] = Field(default_factory=dict)
    n: int = Field(ge=0)


class Likelihood(Part):
    """Mean over prompts of log p(safe) - log p(unsafe) per token, after one kind of context.

    condition: prompt | reasoning | shuffled | other (the reasoning of another prompt). "gain:..."
    is a condition less `prompt`, paired by prompt.
    """

    model: Text
    condition: Text
    mean: float
    low: float
    high: float
    n: int = Field(ge=0)


class Depth(Part):
    """Share of harmful prompts answered after k prefilled tokens of a compliant opening."""

    model: Text
    k: int = Field(ge=0)
    n: int = Field(ge=0)
    asr: Share
    low: Share
    high: Share


class Authenticity(Part):
    """A rate before and after reflections were tampered with, paired by prompt.

    test: delete, ban, inject, inject_refusal or swap; metric: what the rates are of.
    """

    model: Text
    test: Text
    metric: Text
    n: int = Field(ge=0)
    before: Share
    after: Share
    delta: float
    low: float
    high: float


class Margin(Part):
    """Preference pairs of one kind at one step of a training run or in one checkpoint.

    accuracy: share of pairs with a positive margin; chosen, rejected: mean log-probs, which can
    both fall while the margin grows. A run tells some of these only.
    """

    model: Text
    kind: Text
    step: int | None = Field(default=None, ge=0)
    margin: float | None = None
    accuracy: Share | None = None
    chosen: float | None = None
    rejected: float | None = None
    n: int | None = Field(default=None, ge=0)


class Analysis(Part):
    """All results of one analysis, by model; `groups` counts its prompts.

    What was not asked for is empty.
    """

    models: tuple[Text, ...]
    groups: dict[str, int] = Field(default_factory=dict)
    overlap: tuple[Overlap, ...] = ()
    maps: tuple[Map, ...] = ()
    probes: tuple[Probe, ...] = ()
    likelihood: tuple[Likelihood, ...] = ()
    depth: tuple[Depth, ...] = ()
    authenticity: tuple[Authenticity, ...] = ()
    margins: tuple[Margin, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)


def write(out: Path, analysis: Analysis) -> Path:
    """Writes OUT/analysis.json, whole or not at all; the same results give the same bytes."""
    file = out / FILE
    with written(file) as target:
        text = json.dumps(analysis.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)
        target.write(text.encode() + b"\n")
    return file


def read(out: Path) -> Analysis:
    """The results in a folder, or in the file itself; one-line ValueError where they are none."""
    file = out / FILE if out.is_dir() else out
    try:
        return Analysis.model_validate_json(file.read_bytes(), strict=True)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        got = repr(first["input"])
        got = got[:60] + "..." * (len(got) > 60)
        raise ValueError(f"{file}: {name or 'analysis'}: {first['msg']}, got {got}") from None
