"""Origins: what a record goes back to, by its parents and the manifests of the stages."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro_jax.records.ids import file_sha256
from saro_jax.records.manifest import MANIFEST, REJECTS, read_manifest
from saro_jax.records.shards import read_lines


@dataclass(frozen=True)
class Origin:
    """One record on the way back: where it lies, and the manifest it was made under (or none)."""

    file: Path
    record: dict[str, Any]
    manifest: dict[str, Any] | None


def trace(record_id: str, file: Path) -> list[Origin]:
    """The record of a shard and all it was made from, nearest first, through the manifests.

    Parents are looked for in the shards that the record's stage wrote, then in its inputs and in
    what those were made from. ValueError where the record or a parent is not found, or where a
    shard is not the one that its manifest describes.
    """
    found = _find(record_id, file)
    if found is None:
        raise ValueError(f"{file}: no record with the id {record_id!r}")
    chain = [found]
    seen = {(file.resolve(), record_id)}
    for origin in chain:  # grows
        for parent in _parents(origin.record):
            candidates = _upstream(origin)
            one = next((hit for place in candidates if (hit := _find(parent, place))), None)
            if one is None:
                raise ValueError(
                    f"{origin.file}: the parent {parent!r} of {origin.record['id']!r} is in none "
                    f"of {', '.join(str(place) for place in candidates) or 'its inputs'}"
                )
            if (one.file.resolve(), parent) not in seen:
                seen.add((one.file.resolve(), parent))
                chain.append(one)
    return chain


def lineage(record_id: str, file: Path) -> dict[str, Any]:
    """What a record goes back to: {prompt, prompts, models, policy_versions, stages}.

    `prompt` is the text of the first prompt on the way back; models are those that wrote a trace
    and those that the manifests name.
    """
    chain = trace(record_id, file)
    prompts = [one.record for one in chain if {"text", "source", "kind"} <= set(one.record)]
    # Parents on several ways back, in shards of several stages, may be the same prompt.
    prompts = [one for i, one in enumerate(prompts) if one not in prompts[:i]]
    if not prompts:
        raise ValueError(f"{file}: {record_id!r} leads back to no prompt")
    manifests = [one.manifest for one in chain if one.manifest]
    models = [one.record["model"] for one in chain if "prompt_id" in one.record]
    return {
        "prompt": prompts[0]["text"],
        "prompts": prompts,
        "models": _unique([*models, *(m["model"] for m in manifests)]),
        "model_shas": _unique(m["model_sha"] for m in manifests),
        "policy_versions": _unique(
            [*(m["policy_version"] for m in manifests), *(p["policy_version"] for p in prompts)]
        ),
        "stages": _unique(m["stage"] for m in manifests),
    }


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _parents(record: dict[str, Any]) -> list[str]:
    named = [record.get(key) for key in ("trace_id", "prompt_id")]
    return _unique([*record.get("parent_ids", []), *(name for name in named if name)])


def _find(record_id: str, file: Path) -> Origin | None:
    if not file.is_file():
        return None
    for _, line in read_lines(file):
        if record_id.encode() in line:
            record = json.loads(line)
            if isinstance(record, dict) and record.get("id") == record_id:
                return Origin(file, record, _manifest_of(file))
    return None


def _manifest_of(file: Path) -> dict[str, Any] | None:
    """The manifest beside a shard that it wrote."""
    path = file.parent / MANIFEST
    manifest = read_manifest(path) if path.is_file() else None
    if manifest is None or file.name not in manifest["outputs"]:
        return None
    if file_sha256(file) != manifest["outputs"][file.name]["sha256"]:
        raise ValueError(f"{file}: not the file that {path} describes")
    return manifest


def _upstream(origin: Origin) -> list[Path]:
    """Shards in which parents of the record may lie: its stage's own, its inputs, and theirs."""
    places: dict[Path, None] = {}
    todo = [origin.file]
    for file in todo:  # grows
        manifest = _manifest_of(file)
        if manifest is None:
            continue
        shards = [n for n in manifest["outputs"] if not n.startswith(REJECTS)]
        places |= {file.parent / name: None for name in shards if ".jsonl" in name}
        inputs = manifest.get("run", {}).get("where", [])
        for one in (Path(os.path.normpath(file.parent / path)) for path in inputs if path):
            if one not in places and ".jsonl" in one.name:
                places[one] = None
                todo.append(one)
    return list(places)
