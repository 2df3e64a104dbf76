"""Training: `python -m saro_jax.train --stage=rw|srpo --config=RECIPE --out=DIR [--a.b=value ...]`.

rw    Reasoning-style Warmup: supervised fine-tuning on reasoning and answer.
srpo  Safety-oriented Reasoning Process Optimization: DPO on outcome and process pairs, with
      reference log-probs computed once, before training, by the training code itself.

The same command continues a run that was stopped. OUT holds config.yaml, provenance.json,
metrics.jsonl, rejects.jsonl, checkpoints/, tensorboard/ and, at the end, model/: a Hugging Face
folder. Ctrl-C and SIGTERM save and end with exit code 130 and 143.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.data import pipeline, rows
from saro_jax.data.packing import laid_out_length, pack
from saro_jax.data.pipeline import Shape
from saro_jax.data.rows import StageKind
from saro_jax.data.tokenise import Item
from saro_jax.models import decoder, hub, huggingface
from saro_jax.models.architecture import Architecture
from saro_jax.models.attention import check_kernel
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.text import chat
from saro_jax.training import loop, metrics, optimizer, reference, step
from saro_jax.training.checkpoint import Checkpoints, abstract
from saro_jax.training.scoring import make_scorer, score_items

KINDS: dict[str, StageKind] = {"rw": "sft", "srpo": "preference"}
# Largest difference of fp32 logits between the export read by transformers and this model.
EXPORT_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Source:
    """The model a run starts from."""

    folder: Path
    arch: Architecture
    tokenizer: Any
    mesh: Mesh
    config: Config

    def load(self) -> Any:
        """Its parameters, read straight to their shards."""
        dtype = jnp.dtype(self.config.model.param_dtype)
        shapes = step.abstract_params(self.arch, dtype)
        return huggingface.load_params(
            self.folder, self.arch, dtype, sharding.shardings(self.mesh, shapes)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("stage", "which stage to train", choices=("rw", "srpo"), required=True),
        Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart"),
        Flag("out", "output folder; default runs/RECIPE/STAGE", parse=Path),
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.train", __doc__ or "", sys.argv[1:] if argv is None else argv, flags
        )
        config = configuration.load(args.config, args.overrides, args.stage)
        out = args.out or Path("runs") / Path(args.config).stem / args.stage
        return run(config, args.stage, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step or while exporting: nothing is lost
        print("stopped; the same command continues", file=sys.stderr)
        return 130


def run(config: Config, stage: str, out: Path) -> int:
    """Train one stage into `out`, from its newest checkpoint if there is one.

    Returns 0 when the run is complete, else 128 + the signal that stopped it.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes
    config = _with_model(config, stage, out)
    metrics.check(config)
    if not _claim(config, stage, out):
        print(f"{out}: complete, nothing to do; the model is in {out / 'model'}")
        return 0
    check_kernel(config.model.attention)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shape = _shape(config, stage, mesh)
    folder = hub.resolve(config.model.path, config.model.revision)
    arch = huggingface.load_architecture(folder)
    decoder.check_length(arch, config.data.max_length)
    source = Source(
        folder,
        arch,
        chat.load_tokenizer(folder, config.model.chat_template),
        mesh,
        config,
    )
    items = _items(config, stage, source, shape, out)
    evaluation_items = _evaluation_items(config, stage, source, shape)
    config_rows = min(config.train.batch_rows, len(items))
    if config_rows < config.train.batch_rows:
        print(
            f"train.batch_rows={config.train.batch_rows}: only {len(items)} rows, all in each step"
        )
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"batch_rows": config_rows})}
        )
    steps = config.train.steps or math.ceil(config.train.epochs * len(items) / config_rows)

    params = source.load()
    _announce(config, stage, out, source, params, items, shape, steps)
    logps = eval_logps = None
    if stage == "srpo":
        order = pipeline.order(
            len(items), config_rows, seed=config.seed, shuffle=config.data.shuffle
        )
        epoch = [order[k] for k in range(math.ceil(len(items) / config_rows))]
        logps = _reference(source, params, items, epoch, shape)
        if evaluation_items:
            eval_logps = _reference(
                source, params, evaluation_items, _groups(evaluation_items, config_rows), shape
            )
    evaluation = None
    if evaluation_items:
        blocks = _pack_groups(evaluation_items, _groups(evaluation_items, config_rows), shape)
        evaluation = (blocks, eval_logps)

    transform = optimizer.make(config.optimizer, steps)
    state = step.init_state(transform, params, mesh)
    del params
    iterator = pipeline.steps(
        items,
        batch_rows=config_rows,
        shape=shape,
        seed=config.seed,
        shuffle=config.data.shuffle,
        prefetch=config.data.prefetch,
    )
    checkpoints = Checkpoints(out / "checkpoints", config.train.keep)
    tokens_before, window_before = 0, []
    latest = checkpoints.latest()
    if latest is not None:
        wanted = abstract(state)
        del state  # the restored arrays take its place
        state, saved = checkpoints.restore(latest, wanted)
        state = step.owned(state)
        iterator.set_state(saved["iterator"])
        tokens_before, window_before = saved["num_tokens"], saved["window"]
        print(f"continuing from step {latest} of {steps}", flush=True)
    writer = metrics.Writer(out, config, stage, start=latest or 0, steps=steps)
    try:
        state, stopped = loop.fit(
            programs=step.programs(source.arch, config, stage, transform),
            mesh=mesh,
            stage=stage,
            config=config,
            state=state,
            iterator=iterator,
            items=items,
            reference=logps,
            steps=steps,
            schedule=optimizer.learning_rate(config.optimizer, steps),
            checkpoints=checkpoints,
            writer=writer,
            evaluation=evaluation,
            tokens_before=tokens_before,
            window_before=window_before,
        )
    finally:
        writer.close()
        checkpoints.close()
    if stopped:
        print(
            f"stopped at step {int(state.step)} of {steps}; the same command continues", flush=True
        )
        return 128 + stopped
    _export(config, source, state.params, out / "model")
    return 0


def _with_model(config: Config, stage: str, out: Path) -> Config:
    """Fill in a null `model.path`: for srpo the warmup beside `out`, else the quickstart model."""
    if config.model.path is not None:
        return config
    warmup = out.parent / "rw" / "model"
    path = str(warmup) if stage == "srpo" and warmup.is_dir() else "quickstart"
    if stage == "srpo":
        print(f"model.path is not given: starting from {path}", flush=True)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _claim(config: Config, stage: str, out: Path) -> bool:
    """Take `out` for this config; False where the run in it is complete already."""
    text = f"# stage: {stage}\n{configuration.dump(config)}"
    file = out / "config.yaml"
    if file.exists():
        before = file.read_text()
        # Until something is saved, a run that failed (rows rejected, say) may be given again.
        if before != text and not any((out / "checkpoints").glob("[0-9]*")):
            _write_config(file, text)
        elif before != text:
            changed = next(
                (
                    f"{a!r} there, {b!r} now"
                    for a, b in zip(*map(_lines, (before, text)), strict=False)
                    if a != b
                ),
                "another length",
            )
            raise ValueError(f"{file}: this folder holds a run with another config: {changed}")
        return not (out / "model").is_dir()
    if out.exists() and {path.name for path in out.iterdir()} - {"provenance.json", ".config.yaml"}:
        raise ValueError(f"{out}: the output folder is not empty and holds no run; choose another")
    out.mkdir(parents=True, exist_ok=True)
    (out / "provenance.json").write_text(json.dumps(configuration.provenance(), indent=2) + "\n")
    _write_config(file, text)
    return True


def _write_config(file: Path, text: str) -> None:
    partial = file.with_name(".config.yaml")
    partial.write_text(text)
    os.replace(partial, file)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def _shape(config: Config, stage: str, mesh: Mesh) -> Shape:
    shards = meshes.row_shards(mesh)
    if config.train.micro_rows % shards:
        raise ValueError(
            f"train.micro_rows={config.train.micro_rows}: must be a multiple of the {shards} "
            "shards that the mesh cuts rows into (mesh.data x mesh.fsdp)"
        )
    length = pipeline.row_length(config.data, KINDS[stage])
    layout = config.srpo.layout if stage == "srpo" else "shared"
    return Shape(length, config.train.micro_rows, layout, config.data.row_buckets)


def _read_items(config: Config, stage: str, source: Source, shape: Shape, sources):
    return pipeline.read_items(
        config.data,
        sources,
        KINDS[stage],
        source.tokenizer,
        layout=shape.layout,
        row_length=shape.row_length,
    )


def _items(config: Config, stage: str, source: Source, shape: Shape, out: Path) -> list[Item]:
    """The training items; rejects go to rejects.jsonl, too many of them stop the run."""
    items, rejects, total = _read_items(config, stage, source, shape, config.data.train)
    rows.write_rejects(out / "rejects.jsonl", rejects)
    rows.check_share(rejects, total, config.data.max_reject_share)
    if not items:
        raise ValueError(f"data.train={config.data.train}: no row is left; see {out}/rejects.jsonl")
    if rejects:
        print(f"{len(rejects)} of {total} rows rejected: {out / 'rejects.jsonl'}", flush=True)
    cut = sum(any(branch.truncated for branch in item.branches) for item in items)
    if cut:
        print(
            f"{cut} of {len(items)} rows are cut at data.max_length={config.data.max_length} and "
            "do not learn to end",
            flush=True,
        )
    return items


def _evaluation_items(config: Config, stage: str, source: Source, shape: Shape) -> list[Item]:
    if config.data.eval is None:
        return []
    items, rejects, total = _read_items(config, stage, source, shape, config.data.eval)
    rows.check_share(rejects, total, config.data.max_reject_share)
    return items


def _groups(items: Sequence[Item], size: int) -> list[list[int]]:
    return [list(range(i, min(i + size, len(items)))) for i in range(0, len(items), size)]


def _pack_groups(items, groups, shape: Shape):
    blocks = []
    for group in groups:
        blocks += pack(items, group, **shape._asdict())
    return blocks


def _announce(config, stage, out, source: Source, params, items, shape: Shape, steps: int) -> None:
    """The first line: what is trained, on what, for how long, in how much memory."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = sum(loop.sequence_tokens(item) for item in items) / len(items)
    laid_out = sum(laid_out_length(item, shape.layout) for item in items) / len(items)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Master weights, two moments and the summed gradient; plus activations.
    moments = 2 if config.optimizer.name == "adamw" else 0
    width = jnp.dtype(config.model.param_dtype).itemsize
    state = count * (width * (1 + moments) + 4) / 2**30
    print(
        f"{stage}: {count / 1e6:.1f}M parameters ({config.model.dtype}), {len(items)} rows, "
        f"{tokens * config.train.batch_rows:.0f} tokens per step "
        f"({laid_out * config.train.batch_rows:.0f} computed, rows of {shape.row_length}), "
        f"{steps} steps, {jax.device_count()} x {device.device_kind} of "
        f"{memory / 2**30:.1f} GiB, "
        f"{state:.2f} GiB of training state -> {out}",
        flush=True,
    )


def _reference(source: Source, params, items, groups, shape: Shape) -> np.ndarray:
    """Reference log-probs of all pairs, float32 [n, 2]: from the store, the missing scored now."""
    config = source.config
    scorer = make_scorer(
        source.arch,
        source.mesh,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        branches=2,
    )
    where = config.srpo.reference_cache
    store = reference.ReferenceStore(Path(where) if where else hub.cache_folder() / "reference")
    try:
        return reference.complete(
            store,
            reference.model_key(
                huggingface.weights_hash(source.folder),
                f"{config.model.param_dtype} {config.model.dtype}",
                repr(source.arch),  # RoPE, norms: what config.json says beside the weights
                reference.tokenizer_key(source.tokenizer),
                shape.layout,
                _packing(config, items, groups, shape),
            ),
            items,
            groups,
            lambda some: score_items(scorer, params, items, some, shape),
            recheck=config.srpo.recheck,
            tolerance=reference.TOLERANCE[config.model.dtype],
        )
    finally:
        store.close()


def _packing(config: Config, items, groups, shape: Shape) -> str:
    """In bfloat16, which rows lie beside which: it moves a log-prob, and step 0 must be exact."""
    if config.model.dtype != "bfloat16":
        return ""
    order = [[items[int(i)].id for i in group] for group in groups]
    return f"{shape} {order} {config.model.attention}"


def _export(config: Config, source: Source, params, out: Path) -> None:
    """Write the Hugging Face folder and compare it with this model before it gets its name."""
    template = source.tokenizer.chat_template if config.model.chat_template else None
    checked = out.with_name("model.unchecked")
    if checked.exists():
        import shutil

        shutil.rmtree(checked)
    huggingface.save(params, source.arch, source.folder, checked, chat_template=template)
    worst = huggingface.logits_match(checked, params, source.arch)
    if worst is not None and not worst <= EXPORT_TOLERANCE:  # NaN too
        raise ValueError(
            f"{checked}: transformers' logits differ by {worst:.2e}, allowed {EXPORT_TOLERANCE:.0e}"
        )
    os.replace(checked, out)
    agreed = f" (transformers agrees to {worst:.1e})" if worst is not None else ""
    print(f"the model is in {out}{agreed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
