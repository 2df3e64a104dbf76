"""Scoring: `python -m saro_jax.score --model=DIR_OR_ID --rows=FILE --out=FILE [--a.b=value ...]`.

Writes one JSON line a row, in the order of the rows. Preference rows: id, logps/chosen,
logps/rejected, num_tokens/chosen, num_tokens/rejected; SFT rows: id, logps, num_tokens; rows of
several completions of one prompt (n samples, computed with one shared prefix): the same as lists.
Log-probs are natural logs, summed over the scored tokens (the answer with its end-of-turn token;
for process pairs the branches only), computed by the code that SRPO trains with, in float32 unless
--model.dtype says otherwise. Sequences are cut at the model's own limit or at --data.max_length.
Rows that can not be scored go to OUT.rejects.jsonl, versions to OUT.provenance.json. The same
command continues a run that was stopped.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.data import pipeline, rows
from saro_jax.data.packing import Shape, arrange, laid_out_length, round_up
from saro_jax.data.tokenise import Item, digest
from saro_jax.models import decoder, hub, huggingface
from saro_jax.models.attention import check_kernel
from saro_jax.parallel import distributed, sharding
from saro_jax.parallel import mesh as meshes
from saro_jax.text import chat
from saro_jax.training.scoring import make_scorer, score_items

GROUP = 64  # rows that are packed together
LEAST_ROW = 1024  # tokens of a packed row, at least


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("model", "model folder, .gguf file or Hub id", required=True),
        Flag("rows", "file, folder or Hub id of preference, SFT or samples rows", required=True),
        Flag("out", "JSON lines file to write", parse=Path, required=True),
        Flag("kind", "what the rows are", "auto", choices=("auto", "preference", "sft", "samples")),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.score", __doc__, argv, flags)
        distributed.start(args)
        kind = rows.detect_kind(args.rows) if args.kind == "auto" else args.kind
        own = [f"--model.path={args.model}", f"--data.train={args.rows}"]
        defaults = ["--model.dtype=float32"]
        given = {override.split("=")[0] for override in args.overrides}
        defaults = [d for d in defaults if d.split("=")[0] not in given]
        stage = "srpo" if kind == "preference" else "rw"
        config = configuration.load(None, [*defaults, *args.overrides, *own], stage)
        whole = "--data.max_length" not in given
        stopped = score(config, kind, args.out, whole=whole)
    except ValueError as error:
        return distributed.refuse(error)
    except KeyboardInterrupt:
        stopped = signal.SIGINT
        distributed.leave("was stopped by Ctrl-C", 130)
    if stopped and distributed.writes():
        print("stopped; the same command continues", file=sys.stderr)
    return 128 + stopped if stopped else 0


def score(config: Config, kind: rows.StageKind, out: Path, *, whole: bool = False) -> int:
    """Score the rows of `config.data.train` with `config.model` and write `out` atomically.

    Returns the signal that stopped it, 0 where it is complete. What is scored is kept in a file
    beside `out` until then, and taken up again for the same config, rows and weights. whole: take
    sequences as long as the model allows, not `data.max_length`, in packed rows that hold the
    longest. More than `data.max_reject_share` of the rows rejected is an error.
    """
    folder = hub.resolve(config.model.path, config.model.revision)
    arch = huggingface.load_architecture(folder)
    if whole:
        data = config.data.model_copy(update={"max_length": arch.max_position_embeddings})
        config = config.model_copy(update={"data": data})
    decoder.check_length(arch, config.data.max_length)
    check_kernel(config.model.attention)
    mesh = meshes.make_mesh(**dict(config.mesh))
    decoder.check_mesh(arch, mesh)
    tokenizer = chat.load_tokenizer(folder, config.model.chat_template)
    layout = config.srpo.layout if kind == "preference" else "shared"
    row_length = pipeline.row_length(config.data, kind, mesh.shape["sequence"])
    items, rejects, total = pipeline.read_items(
        config.data,
        config.data.train,
        kind,
        tokenizer,
        layout=layout,
        row_length=row_length,
        scope=config.srpo.scope,
    )
    if rejects and distributed.writes():
        rows.write_rejects(out.with_name(f"{out.name}.rejects.jsonl"), rejects)
        print(f"{len(rejects)} of {total} rows rejected: {out}.rejects.jsonl", file=sys.stderr)
    rows.check_share(rejects, total, config.data.max_reject_share)

    dtype = jnp.dtype(config.model.dtype)
    if whole and config.data.row_length is None and items:
        longest = max(laid_out_length(item, layout) for item in items)
        row_length = round_up(max(LEAST_ROW, round_up(longest, 128)), mesh.shape["sequence"])
    places = sharding.shardings(mesh, decoder.abstract_params(arch, dtype))
    params = huggingface.load_params(folder, arch, dtype, places)
    scorer = make_scorer(
        arch,
        mesh,
        dtype=dtype,
        remat="none",
        branches=max((len(item.branches) for item in items), default=1),
        attention=config.model.attention,
    )
    micro_rows = round_up(config.train.micro_rows, meshes.row_shards(mesh))
    buckets, unit = config.data.row_buckets, mesh.shape["sequence"]
    shape = Shape(row_length, micro_rows, layout, buckets, unit)
    facts = f"{configuration.digest(config)} {kind}, {digest(items)}"
    distributed.same("what is scored", f"{facts}, {huggingface.weights_digest(folder)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_name(f".{out.name}.scored")
    results: dict[int, dict] = {}  # of process 0 alone

    def resume() -> list[int]:
        results.update(_resume(kept, f"{facts} {huggingface.weights_hash(folder)}"))
        return list(results)

    done = set(distributed.first("scored before", resume))
    groups = [
        arrange(items, some, shape)
        for some in (range(i, min(i + GROUP, len(items))) for i in range(0, len(items), GROUP))
        if not done.issuperset(some)
    ]
    own = distributed.own_rows(sharding.rows(mesh), micro_rows)
    bar = tqdm(
        total=len(items),
        initial=len(done),
        unit="row",
        disable=None if distributed.writes() else True,
    )
    try:
        for group in groups:
            scored = list(score_items(scorer, params, items, [group], shape, own))
            new = {i: _result(kind, items[i], logps, counts) for i, logps, counts in scored}
            bar.update(len(new.keys() - done))
            if distributed.writes():
                results |= new
                with open(kept, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps([i, new[i]]) + "\n" for i in new)
    except distributed.Stopped as stop:
        return stop.number
    finally:
        bar.close()
    if not distributed.writes():
        return 0
    partial = out.with_name(f".{out.name}.part")
    with open(partial, "w", encoding="utf-8") as file:
        for i, item in enumerate(items):
            file.write(json.dumps({"id": item.id, **results[i]}, ensure_ascii=False) + "\n")
    os.replace(partial, out)
    provenance = {"config": config.model_dump(mode="json"), **configuration.provenance()}
    out.with_name(f"{out.name}.provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    kept.unlink()
    return 0


def _result(kind: rows.StageKind, item: Item, logps: np.ndarray, counts: np.ndarray) -> dict:
    """What is written of one row; logps and counts [K, G]."""
    logp, tokens = logps.sum(-1), counts.sum(-1).astype(int)
    if kind == "preference":
        return {
            "logps/chosen": float(logp[0]),
            "logps/rejected": float(logp[1]),
            "num_tokens/chosen": int(tokens[0]),
            "num_tokens/rejected": int(tokens[1]),
        }
    if kind == "samples":
        n = len(item.branches)
        return {"logps": logp[:n].tolist(), "num_tokens": tokens[:n].tolist()}
    return {"logps": float(logp[0]), "num_tokens": int(tokens[0])}


def _resume(kept: Path, key: str) -> dict[int, dict]:
    """What a run of the same key has scored; the file is begun anew where there was none."""
    found = {}
    try:
        first, *lines = kept.read_text(encoding="utf-8").splitlines()
        if first == key:
            for line in lines:
                i, result = json.loads(line)
                found[i] = result
    except (OSError, ValueError):
        pass  # none, or its last line was being written
    text = "".join(json.dumps([i, result]) + "\n" for i, result in found.items())
    kept.write_text(f"{key}\n{text}", encoding="utf-8")
    return found


if __name__ == "__main__":
    sys.exit(main())
