"""Training: `python -m saro_jax.train --stage=rw|srpo --config=RECIPE --out=DIR [--a.b=value ...]`.

rw    Reasoning-style Warmup: supervised fine-tuning on reasoning and answer.
srpo  Safety-oriented Reasoning Process Optimization: DPO on outcome and process pairs, with
      reference log-probs computed once, before training, by the training code itself.

--dry-run reads model config, tokenizer and rows, says what will go wrong and what to do about it,
writes nothing, and exits with 2 where the run cannot work.

The same command continues a run that was stopped. OUT holds config.yaml, provenance.json,
metrics.jsonl, doctor.jsonl, rejects.jsonl, checkpoints/, tensorboard/ and, at the end, model/: a
Hugging Face folder, adapters merged in, and with lora.rank adapter/: the same adapters as a PEFT
folder. Ctrl-C and SIGTERM save and end with exit code 130 and 143. On several hosts the same
command runs on each (docs/multihost.md).
"""

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh
from rich.console import Console

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.data import inspect, pipeline, rows
from saro_jax.data.packing import Shape, arrange, blocks, laid_out_length
from saro_jax.data.rows import Reject, StageKind
from saro_jax.data.tokenise import Item, digest
from saro_jax.models import decoder, hub, huggingface
from saro_jax.models.architecture import Architecture
from saro_jax.models.attention import check_kernel
from saro_jax.objectives.preference import REFERENCE_FREE
from saro_jax.parallel import distributed, sharding
from saro_jax.parallel import mesh as meshes
from saro_jax.text import chat
from saro_jax.training import doctor, loop, metrics, mismatch, optimizer, reference, step, trainable
from saro_jax.training.checkpoint import Checkpoints, abstract
from saro_jax.training.finding import Finding, refuse, report
from saro_jax.training.memory import GIB, device_memory, estimate, parameters
from saro_jax.training.mismatch import Mismatches
from saro_jax.training.scoring import make_scorer, score_items
from saro_jax.training.watch import Watch

MOST_KINDS = 32  # kinds of pairs that get metrics of their own
# Largest difference of fp32 logits between the export read by transformers and this model.
EXPORT_TOLERANCE = 2e-4
EXAMPLE_TOKENS = 80  # of a stretch of the row that --dry-run shows


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
        shapes = trainable.abstract_model(self.arch, self.config)
        return huggingface.load_params(
            self.folder, self.arch, shapes, sharding.shardings(self.mesh, shapes)
        )


class Read(NamedTuple):
    """Rows of one source: the items that are used, the rejects, and how many rows there were."""

    items: list[Item]
    rejects: list[Reject]
    total: int


@dataclass(frozen=True)
class Prepared:
    """A run before any weight is read."""

    stage: str
    config: Config  # train.batch_rows is at most the number of rows
    source: Source
    shape: Shape
    training: Read
    evaluation: Read
    steps: int


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("stage", "which stage to train", choices=("rw", "srpo"), required=True),
        Flag("config", "recipe: a YAML file or the name of one in configs/", "quickstart"),
        Flag("out", "output folder; default runs/RECIPE/STAGE", parse=Path),
        Flag("dry-run", "look for what will go wrong, train nothing, write nothing", switch=True),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.train", __doc__ or "", sys.argv[1:] if argv is None else argv, flags
        )
        distributed.start(args)
        config = configuration.load(args.config, args.overrides, args.stage)
        out = args.out or Path("runs") / Path(args.config).stem / args.stage
        return dry_run(config, args.stage, out) if args.dry_run else run(config, args.stage, out)
    except ValueError as error:
        return distributed.refuse(error)
    except KeyboardInterrupt:  # before the first step or while exporting: nothing is lost
        print("stopped; the same command continues", file=sys.stderr)
        return distributed.leave("was stopped by Ctrl-C", 130)


def run(config: Config, stage: str, out: Path) -> int:
    """Train one stage into `out`, from its newest checkpoint if there is one.

    Returns 0 when the run is complete, else 128 + the signal that stopped it.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it writes
    config = _with_model(config, stage, out)
    metrics.check(config)
    if not distributed.first("claim", lambda: _claim(config, stage, out)):
        print(f"{out}: complete, nothing to do; the model is in {out / 'model'}")
        return 0
    distributed.shared_folder(out)
    prepared = prepare(config, stage)
    _agree(prepared)
    _accept(prepared, out)
    _check_noise(prepared)
    try:
        return _train(prepared, out)
    except distributed.Stopped as stop:
        print("stopped before the first step; the same command continues", flush=True)
        return 128 + stop.number


def dry_run(config: Config, stage: str, out: Path) -> int:
    """Print what `run` would do and what the doctor finds; 2 where the run cannot work, else 0."""
    config = _with_model(config, stage, out)
    metrics.check(config)
    prepared = prepare(config, stage)
    items, console = prepared.training.items, Console(highlight=False, soft_wrap=True)
    if items:
        inspect.show(items[0], prepared.source.tokenizer, console, EXAMPLE_TOKENS)
        console.rule()
        print(_summary(prepared))
    findings = _examine(prepared)
    print(report(findings), flush=True)
    return 2 if any(finding.level == "error" for finding in findings) else 0


def _examine(prepared: Prepared) -> list[Finding]:
    source, training = prepared.source, prepared.training
    return doctor.before(
        prepared.config,
        prepared.stage,
        source.arch,
        source.tokenizer,
        prepared.shape,
        source.mesh,
        items=training.items,
        rejects=training.rejects,
        total=training.total,
        evaluation=prepared.evaluation.items,
        steps=prepared.steps,
    )


def prepare(config: Config, stage: str) -> Prepared:
    """Everything of a run that needs no weights: model config, tokenizer, rows, shape, steps.

    Writes nothing and refuses no row; `config.model.path` must be filled in.
    """
    check_kernel(config.model.attention)
    mesh = meshes.make_mesh(**dict(config.mesh))
    shape = _shape(config, stage, mesh)
    folder = hub.resolve(config.model.path, config.model.revision)
    arch = huggingface.load_architecture(folder)
    decoder.check_length(arch, config.data.max_length)
    decoder.check_mesh(arch, mesh)
    if config.optimizer.offload:
        sharding.check_offload(mesh)
    trainable.trained_names(arch, config)  # refuses now what nothing could train with
    tokenizer = chat.load_tokenizer(folder, config.model.chat_template)
    source = Source(folder, arch, tokenizer, mesh, config)
    training = _read(config, stage, source, shape, config.data.train)
    evaluation = _read(config, stage, source, shape, config.data.eval)
    batch_rows = min(config.train.batch_rows, max(1, len(training.items)))
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"batch_rows": batch_rows})}
    )
    steps = config.train.steps or math.ceil(config.train.epochs * len(training.items) / batch_rows)
    return Prepared(stage, config, source, shape, training, evaluation, steps)


def _agree(prepared: Prepared) -> None:
    """Refuse to run where the processes do not have the same config, rows or model."""
    if not distributed.several():
        return
    distributed.same("the config", configuration.digest(prepared.config))
    for name, read in (("train", prepared.training), ("eval", prepared.evaluation)):
        distributed.same(f"data.{name}, its rows as tokens,", digest(read.items))
    distributed.same("the weights", huggingface.weights_digest(prepared.source.folder))


def _train(prepared: Prepared, out: Path) -> int:
    """Reference, steps, export; the exit code of `run`."""
    config, stage, source, shape = (
        prepared.config,
        prepared.stage,
        prepared.source,
        prepared.shape,
    )
    items, evaluation_items = prepared.training.items, prepared.evaluation.items
    steps, config_rows, mesh = prepared.steps, prepared.config.train.batch_rows, source.mesh
    findings = _examine(prepared)
    refuse(findings)
    params = source.load()
    print(f"{_summary(prepared)} -> {out}", flush=True)
    fresh = not any((out / "checkpoints").glob("[0-9]*"))
    watch = Watch(out / "doctor.jsonl", config, stage, fresh=fresh)
    watch.say(findings, ("warning", "error"))
    logps = eval_logps = mismatches = eval_mismatches = None
    kinds = _kinds(stage, [*items, *evaluation_items])
    own = distributed.own_rows(sharding.rows(mesh), shape.rows)
    rows_of = pipeline.plan(
        items,
        batch_rows=config_rows,
        shape=shape,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.pack_window,
    )
    eval_groups = [
        arrange(evaluation_items, range(i, min(i + config_rows, len(evaluation_items))), shape)
        for i in range(0, len(evaluation_items), config_rows)
    ]
    if _stored(config, stage):
        epoch = [rows_of(k) for k in range(math.ceil(len(items) / config_rows))]
        logps = _reference(source, params, items, epoch, shape)
        if evaluation_items:
            eval_logps = _reference(source, params, evaluation_items, eval_groups, shape)
    if row_kind(config, stage) == "unpaired":
        step_groups = [[i for row in rows_of(k) for i in row] for k in range(steps)]
        mismatches = _mismatches(source, params, items, step_groups, shape)
        if evaluation_items:  # its baseline is that of the whole set
            whole = [list(range(len(evaluation_items)))]
            eval_mismatches = _mismatches(source, params, evaluation_items, whole, shape)
    evaluation = None
    if evaluation_items:
        packed = [b for rows in eval_groups for b in blocks(evaluation_items, rows, shape, own)]
        numbers = _kind_numbers(evaluation_items, kinds)
        evaluation = loop.Evaluation(packed, eval_logps, numbers, eval_mismatches, evaluation_items)

    transform = optimizer.make(config.optimizer, steps, config.lora)
    trained, frozen = trainable.start(source.arch, config, params, mesh)
    base = huggingface.weights_hash(source.folder) if frozen else None
    resident = stage == "srpo" and config.srpo.reference == "resident"
    state = step.init_state(
        transform, trained, mesh, resident=resident, offload=config.optimizer.offload
    )
    del params, trained
    iterator = pipeline.steps(items, rows_of, shape, config.data.prefetch, own)
    checkpoints = Checkpoints(out / "checkpoints", config.train.keep, state)
    tokens_before, window_before, recent_before, owed = 0, [], [], False
    latest = checkpoints.latest()
    if latest is not None:
        wanted = abstract(state)
        del state  # the restored arrays take its place
        state, saved = checkpoints.restore(latest, wanted)
        trainable.check_base(saved.get("base"), base, source.folder, out)
        state = step.owned(state)
        iterator.set_state(saved["iterator"])
        tokens_before, window_before = saved["num_tokens"], saved["window"]
        recent_before, owed = saved.get("recent", []), saved.get("owed", False)
        print(f"continuing from step {latest} of {steps}", flush=True)
    writer = metrics.Writer(out, config, stage, start=latest or 0, steps=steps)
    try:
        state, stopped = loop.fit(
            programs=step.programs(source.arch, config, stage, transform, len(kinds)),
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
            watch=watch,
            evaluation=evaluation,
            tokens_before=tokens_before,
            window_before=window_before,
            kind=_kind_numbers(items, kinds),
            kinds=kinds,
            mismatches=mismatches,
            recent_before=recent_before,
            frozen=frozen,
            base=base,
            owed=owed,
        )
    finally:
        writer.close()
        checkpoints.close()
    if stopped:
        print(
            f"stopped at step {int(state.step)} of {steps}; the same command continues", flush=True
        )
        return 128 + stopped
    params = trainable.join(state.params, frozen)
    del state  # the moments' memory, before the export asks for its own
    _export(config, source, params, out / "model")
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
    # Not read here, so that a change of it does not make this another run.
    config = config.model_copy(update={"synthesize": configuration.SynthesizeConfig()})
    text = f"# stage: {stage}\n{configuration.dump(config)}"
    file = out / "config.yaml"
    if file.exists():
        before = file.read_text()
        # Until something is saved, a run that failed (rows rejected, say) may be given again.
        if before != text and not any((out / "checkpoints").glob("[0-9]*")):
            _write_config(file, text)
        elif before != text and _same_run(before, text):
            print("goes on with another mesh or train.micro_rows than it began with", flush=True)
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


def _same_run(before: str, now: str) -> bool:
    """Whether two texts of config.yaml differ only in what cuts up the work and not in the work.

    The machine that goes on need not be the one that began.
    """
    stages = {text.partition("\n")[0] for text in (before, now)}
    trees = [yaml.safe_load(text) for text in (before, now)]
    for tree in trees:
        tree.pop("mesh", None)
        tree.get("train", {}).pop("micro_rows", None)
    return len(stages) == 1 and trees[0] == trees[1]


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
            "shards that the mesh cuts rows into (mesh.slice x mesh.data x mesh.fsdp)"
        )
    length = pipeline.row_length(config.data, row_kind(config, stage), mesh.shape["sequence"])
    layout = config.srpo.layout if stage == "srpo" else "shared"
    buckets, unit = config.data.row_buckets, mesh.shape["sequence"]
    return Shape(length, config.train.micro_rows, layout, buckets, unit)


def _read(config: Config, stage: str, source: Source, shape: Shape, rows_of) -> Read:
    if rows_of is None:
        return Read([], [], 0)
    kind = row_kind(config, stage)
    read = Read(
        *pipeline.read_items(
            config.data,
            rows_of,
            kind,
            source.tokenizer,
            layout=shape.layout,
            row_length=shape.row_length,
            scope=config.srpo.scope if stage == "srpo" else "suffix",
        )
    )
    wrong = rows.PAIRED if kind == "unpaired" else rows.UNPAIRED
    rejects = read.rejects
    if not read.items and rejects and all(r.reason.startswith(f"{wrong}:") for r in rejects):
        wants = "prompt, completion, label" if kind == "unpaired" else "prompt, chosen, rejected"
        raise ValueError(
            f"srpo.loss={config.srpo.loss} takes rows of {wants}: {rejects[0].where}: "
            f"{rejects[0].reason}"
        )
    return read


def _accept(prepared: Prepared, out: Path) -> None:
    """Say what became of the rows: rejects go to rejects.jsonl, too many of them stop the run."""
    data, (items, rejects, total) = prepared.config.data, prepared.training
    if distributed.writes():
        rows.write_rejects(out / "rejects.jsonl", rejects)
    rows.check_share(rejects, total, data.max_reject_share)
    if not items:
        raise ValueError(f"data.train={data.train}: no row is left; see {out}/rejects.jsonl")
    if rejects:
        print(f"{len(rejects)} of {total} rows rejected: {out / 'rejects.jsonl'}", flush=True)
    evaluation = prepared.evaluation
    rows.check_share(evaluation.rejects, evaluation.total, data.max_reject_share)
    wanted = prepared.source.config.train.batch_rows
    if prepared.config.train.batch_rows < wanted:
        print(f"train.batch_rows={wanted}: only {len(items)} rows, all in each step")


def row_kind(config: Config, stage: str) -> StageKind:
    """What rows a stage trains on."""
    if stage == "rw":
        return "sft"
    return "unpaired" if config.srpo.loss == "kto" else "preference"


def _stored(config: Config, stage: str) -> bool:
    """Whether the run takes reference log-probs from the store."""
    loss, reference = config.srpo.loss, config.srpo.reference
    return stage == "srpo" and loss not in REFERENCE_FREE and reference == "stored"


def _check_noise(prepared: Prepared) -> None:
    """Refuse a noise column that the loss does not read, and a robust loss without any noise."""
    if prepared.stage != "srpo":
        return
    config, items = prepared.config, [*prepared.training.items, *prepared.evaluation.items]
    noisy = [item for item in items if item.noise is not None]
    loss = config.srpo.loss
    if noisy and loss not in ("sigmoid", "robust"):
        raise ValueError(
            f"srpo.loss={loss} has no label smoothing, and {noisy[0].where} has a noise; use "
            "sigmoid or robust, or remove the column"
        )
    if loss == "robust" and not config.srpo.label_smoothing and not noisy:
        raise ValueError(
            "srpo.loss=robust needs srpo.label_smoothing above 0 or rows with a noise; without "
            "either it is the sigmoid loss"
        )


def _kinds(stage: str, items: Sequence[Item]) -> tuple[str, ...]:
    """Names of the kinds of pairs that get metrics of their own; none where there is only one."""
    found = sorted({item.kind for item in items})
    if stage != "srpo" or len(found) == 1:
        return ()
    if len(found) > MOST_KINDS:
        print(f"{len(found)} kinds of rows: more than {MOST_KINDS} get no metrics of their own")
        return ()
    return tuple(found)


def _kind_numbers(items: Sequence[Item], kinds: tuple[str, ...]) -> np.ndarray | None:
    if not kinds:
        return None
    return np.array([kinds.index(item.kind) for item in items], np.int32)


def _mismatches(
    source: Source, params, items: Sequence[Item], groups: list[list[int]], shape: Shape
) -> Mismatches:
    """KTO's mismatched rows, with their stored reference log-probs where none is resident.

    Which rows meet is a function of the step, so those of all steps are scored before the first.
    """
    longest = source.config.data.max_length
    if source.config.srpo.reference == "resident":
        return Mismatches(items, shape, longest, None)
    number: dict[mismatch.Match, int] = {}
    numbered = [
        [number.setdefault(match, len(number)) for match in mismatch.matches(group)]
        for group in groups
    ]
    joined = [mismatch.join(items, match, longest) for match in number]
    groups_of_rows = [arrange(joined, group, shape) for group in numbered]
    logps = _reference(source, params, joined, groups_of_rows, shape)
    return Mismatches(items, shape, longest, dict(zip(number, logps, strict=True)))


def _summary(prepared: Prepared) -> str:
    """One line: what is trained, on what, for how long, in how much memory."""
    config, shape, items = prepared.config, prepared.shape, prepared.training.items
    arch, stage = prepared.source.arch, prepared.stage
    rows_of = config.train.batch_rows
    tokens = sum(loop.sequence_tokens(item) for item in items) / len(items)
    laid_out = sum(laid_out_length(item, shape.layout) for item in items) / len(items)
    trained, frozen = trainable.abstract(arch, config)
    learning = sum(leaf.size for leaf in jax.tree.leaves(trained))
    part = f", {learning / 1e6:.2f}M trained" if frozen or config.lora.rank else ""
    need = estimate(config, stage, arch, shape, prepared.source.mesh).total
    offload = ", moments on the host" if config.optimizer.offload else ""
    return (
        f"{stage}: {parameters(arch) / 1e6:.1f}M parameters ({config.model.dtype}){part}, "
        f"{len(items)} rows, {tokens * rows_of:.0f} tokens per step "
        f"({laid_out * rows_of:.0f} computed, rows of {shape.row_length}), "
        f"{prepared.steps} steps, {jax.device_count()} x {jax.devices()[0].device_kind} of "
        f"{device_memory() / GIB:.1f} GiB, about {need / GIB:.2f} GiB needed on each{offload}"
    )


def _reference(source: Source, params, items, groups, shape: Shape) -> np.ndarray:
    """Reference log-probs of all items, float32 [n, K, G]: stored ones, the missing scored now."""
    config = source.config
    scorer = make_scorer(
        source.arch,
        source.mesh,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        branches=len(items[0].branches),
    )
    where = config.srpo.reference_cache
    store = None
    if distributed.writes():
        store = reference.ReferenceStore(Path(where) if where else hub.cache_folder() / "reference")
    own = distributed.own_rows(sharding.rows(source.mesh), shape.rows)
    try:
        return reference.complete(
            store,
            reference.model_key(
                huggingface.weights_hash(source.folder),
                _dtypes(config),
                repr(source.arch),  # RoPE, norms: what config.json says beside the weights
                reference.tokenizer_key(source.tokenizer),
                shape.layout,
                _packing(config, items, groups, shape),
            ),
            items,
            groups,
            lambda some: score_items(scorer, params, items, some, shape, own),
            recheck=config.srpo.recheck,
            tolerance=reference.TOLERANCE[config.model.dtype],
        )
    finally:
        if store is not None:
            store.close()


def _dtypes(config: Config) -> str:
    """What the weights are rounded to before they are used, which moves a log-prob."""
    model = config.model
    text = f"{model.param_dtype} {model.dtype}"
    if model.frozen_dtype not in (None, model.param_dtype):
        text += f" {model.frozen_dtype} {config.train.freeze}"
    return text


def _packing(config: Config, items, groups, shape: Shape) -> str:
    """In bfloat16, which rows lie beside which: it moves a log-prob, and step 0 must be exact."""
    if config.model.dtype != "bfloat16":
        return ""
    order = [[[items[i].id for i in row] for row in group] for group in groups]
    return f"{shape} {order} {config.model.attention}"


def _export(config: Config, source: Source, params, out: Path) -> None:
    """Write the Hugging Face folder and compare it with this model before it gets its name.

    `params` with adapters: they are merged into that folder, and alone in adapter/ beside it.
    """
    params, adapters = trainable.apart(config, params)
    template = source.tokenizer.chat_template if config.model.chat_template else None
    checked, beside = out.with_name("model.unchecked"), out.with_name("adapter")
    for stale in (checked, beside):
        if distributed.writes() and stale.exists():
            shutil.rmtree(stale)
    huggingface.save(
        params, source.arch, source.folder, checked, chat_template=template, adapters=adapters
    )
    worst = huggingface.logits_match(checked, params, source.arch, None, adapters)
    if worst is not None and not worst <= EXPORT_TOLERANCE:  # NaN too
        raise ValueError(
            f"{checked}: transformers' logits differ by {worst:.2e}, allowed {EXPORT_TOLERANCE:.0e}"
        )
    why_not = trainable.why_no_peft(source.arch, config)
    if adapters is not None and why_not:
        print(f"no adapter/: {why_not}", flush=True)
    elif adapters is not None:
        huggingface.save_peft(adapters, trainable.peft_settings(config, source.folder), beside)
        print(f"the adapters are in {beside}", flush=True)
    if distributed.writes():
        os.replace(checked, out)
    distributed.barrier("export")
    agreed = f" (transformers agrees to {worst:.1e})" if worst is not None else ""
    print(f"the model is in {out}{agreed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
