"""The manifest: what a stage was run on, what it wrote and what it rejected, written last."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saro_jax.config import provenance
from saro_jax.records.ids import file_sha256, sha256, to_json
from saro_jax.records.schemas import Record
from saro_jax.records.shards import read_lines, write, write_json, write_lines

MANIFEST, REJECTS = "manifest.json", "rejects"


@dataclass(frozen=True)
class Reject:
    """A record that is not used: why ("category: detail"), and the record where there is one."""

    id: str
    reason: str
    where: str = ""
    record: dict[str, Any] | None = None


def drop_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """How often each category of reasons occurs, the most frequent first, then by name."""
    counts = Counter(reject.reason.split(":")[0] for reject in rejects)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True)
class Input:
    """A source as the user named it, with its rows and their hash; `path` where it is a file."""

    source: str
    rows: int
    sha256: str
    path: Path | None = None

    @staticmethod
    def of_file(path: Path) -> "Input":
        """A shard on disk."""
        return Input(str(path), sum(1 for _ in read_lines(path)), file_sha256(path), path)


@dataclass
class Stage:
    """A run of a stage: what it depends on, and what is to be written at its end.

    `config` holds only settings that the stage reads. What is in `run` (cost, and what `finish`
    adds: time, versions, commit, places of the inputs) does not take part in comparisons.
    """

    name: str
    config: dict[str, Any]
    inputs: Sequence[Input]
    seed: int
    policy_version: str = ""
    model: str = ""
    model_sha: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def key(self) -> dict[str, Any]:
        """Everything the outputs are a function of."""
        return {
            "stage": self.name,
            "config": self.config,
            "config_sha": sha256(to_json(self.config)),
            "inputs": [
                {"source": one.source, "rows": one.rows, "sha256": one.sha256}
                for one in self.inputs
            ],
            "seed": self.seed,
            "policy_version": self.policy_version,
            "model": self.model,
            "model_sha": self.model_sha,
        }


def finished(stage: Stage, out: Path) -> dict[str, Any] | None:
    """The manifest in `out` where it is of this very work and its files are whole, else None."""
    file = out / MANIFEST
    if not file.exists():
        return None
    manifest = read_manifest(file)
    if not stage.key().items() <= manifest.items():
        return None
    for name, about in manifest["outputs"].items():
        path = out / name
        if not path.is_file() or file_sha256(path) != about["sha256"]:
            return None
    return manifest


def finish(
    stage: Stage,
    out: Path,
    shards: Mapping[str, Sequence[Record]],
    rejects: Mapping[str, Sequence[Reject]],
    *,
    n_in: int,
    n_out: int,
    report: Mapping[str, Any] | None = None,
    documents: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes shards, rejects and JSON documents by name, then the manifest, which it returns.

    n_in and n_out: records that came in, and that the stage is there for. `report` is what else the
    manifest is to say of the run, the same for the same inputs.
    """
    (out / MANIFEST).unlink(missing_ok=True)  # what follows is no longer what it describes
    counts = {name: write(out / name, found) for name, found in shards.items()}
    for name, found in rejects.items():
        place = f"{REJECTS}/{name}"
        lines = (to_json({k: v for k, v in vars(one).items() if v}) for one in found)
        counts[place] = write_lines(out / place, lines)
    for name, value in (documents or {}).items():
        write_json(out / name, value)
        counts[name] = 1
    dropped = [reject for found in rejects.values() for reject in found]
    run = {
        "where": [
            None if one.path is None else os.path.relpath(one.path.resolve(), out.resolve())
            for one in stage.inputs
        ],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stage.started)),
        "wall_s": round(time.time() - stage.started, 3),
        "cost": 0.0,
        **stage.run,
        "provenance": provenance(),
    }
    manifest = {
        **stage.key(),
        "n_in": n_in,
        "n_out": n_out,
        "drop_reasons": drop_reasons(dropped),
        "report": dict(report or {}),
        "outputs": {
            name: {"rows": count, "sha256": file_sha256(out / name)}
            for name, count in counts.items()
        },
        "run": run,
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def read_manifest(file: Path) -> dict[str, Any]:
    """A manifest; ValueError in one line where it is none."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no manifest: {error}") from None
    if not isinstance(manifest, dict) or not {"stage", "outputs", "inputs"} <= set(manifest):
        raise ValueError(f"{file}: no manifest: lacks stage, inputs or outputs")
    return manifest


def comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that is the same for the same inputs, seed, model and policy."""
    return {key: value for key, value in manifest.items() if key != "run"}
