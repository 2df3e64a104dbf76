"""Training: `python -m saro_jax.train --stage=rw|srpo --config=RECIPE --out=DIR [--a.b=value ...]`.

rw    Reasoning-style Warmup: supervised fine-tuning on reasoning and answer.
srpo  Safety-oriented Reasoning Process Optimization: DPO on outcome and process pairs, with
      reference log-probs computed once, before training, by the training code itself.

--dry-run reads model config, tokenizer and rows, says what will go wrong and what to do about it,
writes nothing, and exits with 2 where the run cannot work.

The same command continues a run that was stopped. OUT holds config.yaml, provenance.json,
metrics.jsonl, doctor.jsonl, rejects.jsonl, checkpoints/, tensorboard/, with train.answers the
transcripts in answers/ and, at the end, model/: a Hugging Face folder, adapters merged in, and with
lora.rank adapter/: the same adapters as a PEFT folder. Ctrl-C and SIGTERM save and end with exit
code 130 and 143. On several hosts the same command runs on each (docs/multihost.md).
"""

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.data import inspect, pipeline, rows
from saro_jax.data.packing import Shape, arrange, blocks, laid_out_length
from saro_jax.data.rows import Reject, StageKind
from saro_jax.data.tokenise import Item, digest
from saro_jax.evaluation import in_training
from saro_jax.models import decoder, hub, huggingface
from saro_jax.models.attention import check_kernel
from saro_jax.parallel import distributed, memory, sharding
from saro_jax.parallel import mesh as meshes
from saro_jax.text import chat
from saro_jax.training import (
    doctor,
    folder,
    loop,
    metrics,
    mismatch,
    optimizer,
    reference,
    step,
    trainable,
)
from saro_jax.training.checkpoint import Checkpoints, abstract
from saro_jax.training.finding import Finding, refuse, report
from saro_jax.training.memory import GIB, Answering, device_memory, estimate, parameters
from saro_jax.training.mismatch import Mismatches
from saro_jax.training.source import Source
from saro_jax.training.watch import Watch

MOST_KINDS = 32  # kinds of pairs that get metrics of their own
# Largest difference of fp32 logits between the export read by transformers and this model, as a
# share of the largest logit: about 170 roundings (docs/log.md, 2026-11-28).
EXPORT_TOLERANCE = 2e-5
EXAMPLE_TOKENS = 80  # of a stretch of the row that --dry-run shows


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
    questions: in_training.Questions | None  # of train.answers

    @property
    def answering(self) -> Answering | None:
        """What answering them takes."""
        given = self.questions
        return None if given is None else in_training.decoded(given, self.source.mesh)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag("stage", "which stage to train", choices=("rw", "srpo"), required=True),
        configuration.CONFIG,
        Flag("out", "output folder; default runs/RECIPE/STAGE", parse=Path),
        Flag("dry-run", "look for what will go wrong, train nothing, write nothing", switch=True),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.train", __doc__, argv, flags)
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
    if not distributed.first("claim", lambda: folder.claim(config, stage, out)):
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
        answering=prepared.answering,
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
    questions = _questions(config, arch, tokenizer)
    training = _read(config, stage, source, shape, config.data.train)
    evaluation = _read(config, stage, source, shape, config.data.eval)
    batch_rows = min(config.train.batch_rows, max(1, len(training.items)))
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"batch_rows": batch_rows})}
    )
    steps = config.train.steps or math.ceil(config.train.epochs * len(training.items) / batch_rows)
    return Prepared(stage, config, source, shape, training, evaluation, steps, questions)


def _agree(prepared: Prepared) -> None:
    """Refuse to run where the processes do not have the same config, rows or model."""
    if not distributed.several():
        return
    distributed.same("the config", configuration.digest(prepared.config))
    for name, read in (("train", prepared.training), ("eval", prepared.evaluation)):
        distributed.same(f"data.{name}, its rows as tokens,", digest(read.items))
    distributed.same("the weights", huggingface.weights_digest(prepared.source.folder))


class Data(NamedTuple):
    """What the loop reads: by item its reference log-probs, kind and mismatched row, and more."""

    iterator: Any
    reference: np.ndarray | None
    kind: np.ndarray | None
    mismatches: Mismatches | None
    evaluation: loop.Evaluation | None


def _train(prepared: Prepared, out: Path) -> int:
    """Reference, steps, export; the exit code of `run`."""
    config, stage, source, steps = (
        prepared.config,
        prepared.stage,
        prepared.source,
        prepared.steps,
    )
    findings = _examine(prepared)
    refuse(findings)
    memory.trim_after_compiling()
    params = source.load()
    print(f"{_summary(prepared)} -> {out}", flush=True)
    fresh = not any((out / "checkpoints").glob("[0-9]*"))
    watch = Watch(out / "doctor.jsonl", config, stage, fresh=fresh)
    watch.say(findings, ("warning", "error"))
    items = prepared.training.items
    kinds = _kinds(stage, [*items, *prepared.evaluation.items])
    data = _data(prepared, params, kinds)

    transform = optimizer.make(config.optimizer, steps, config.lora)
    trained, frozen = trainable.start(source.arch, config, params, source.mesh)
    base = huggingface.weights_hash(source.folder) if frozen else None
    resident = stage == "srpo" and config.srpo.reference == "resident"
    state = step.init_state(
        transform, trained, source.mesh, resident=resident, offload=config.optimizer.offload
    )
    del params, trained
    checkpoints = Checkpoints(out / "checkpoints", config.train.keep, state)
    saved: dict[str, Any] = {}
    latest = checkpoints.latest()
    if latest is not None:
        wanted = abstract(state)
        del state  # the restored arrays take its place
        state, saved = checkpoints.restore(latest, wanted)
        trainable.check_base(saved.get("base"), base, source.folder, out)
        state = step.owned(state)
        data.iterator.set_state(saved["iterator"])
        print(f"continuing from step {latest} of {steps}", flush=True)
    writer = metrics.Writer(out, config, stage, start=latest or 0, steps=steps)
    try:
        state, stopped = loop.fit(
            programs=step.programs(source.arch, config, stage, transform, len(kinds)),
            mesh=source.mesh,
            stage=stage,
            config=config,
            state=state,
            iterator=data.iterator,
            items=items,
            reference=data.reference,
            steps=steps,
            schedule=optimizer.learning_rate(config.optimizer, steps),
            checkpoints=checkpoints,
            writer=writer,
            watch=watch,
            evaluation=data.evaluation,
            answers=_answers(prepared, frozen, out),
            tokens_before=saved.get("num_tokens", 0),
            window_before=saved.get("window", []),
            kind=data.kind,
            kinds=kinds,
            mismatches=data.mismatches,
            recent_before=saved.get("recent", []),
            frozen=frozen,
            base=base,
            owed=saved.get("owed", False),
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


def _data(prepared: Prepared, params: Any, kinds: tuple[str, ...]) -> Data:
    """Pack the rows, and score under the model as it is now what the loss is given of them."""
    config, stage, source, shape = (
        prepared.config,
        prepared.stage,
        prepared.source,
        prepared.shape,
    )
    items, held_out = prepared.training.items, prepared.evaluation.items
    batch_rows = config.train.batch_rows
    own = distributed.own_rows(sharding.rows(source.mesh), shape.rows)
    rows_of = pipeline.plan(
        items,
        batch_rows=batch_rows,
        shape=shape,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.pack_window,
    )
    eval_groups = [
        arrange(held_out, range(i, min(i + batch_rows, len(held_out))), shape)
        for i in range(0, len(held_out), batch_rows)
    ]
    logps = eval_logps = mismatches = eval_mismatches = evaluation = None
    if reference.is_stored(config, stage):
        epoch = [rows_of(k) for k in range(math.ceil(len(items) / batch_rows))]
        logps = reference.of_items(source, params, items, epoch, shape)
        if held_out:
            eval_logps = reference.of_items(source, params, held_out, eval_groups, shape)
    if row_kind(config, stage) == "unpaired":
        step_groups = [[i for row in rows_of(k) for i in row] for k in range(prepared.steps)]
        mismatches = mismatch.of_run(source, params, items, step_groups, shape)
        if held_out:  # its baseline is that of the whole set
            whole = [list(range(len(held_out)))]
            eval_mismatches = mismatch.of_run(source, params, held_out, whole, shape)
    if held_out:
        packed = [b for rows in eval_groups for b in blocks(held_out, rows, shape, own)]
        numbers = _kind_numbers(held_out, kinds)
        evaluation = loop.Evaluation(packed, eval_logps, numbers, eval_mismatches, held_out)
    iterator = pipeline.steps(items, rows_of, shape, config.data.prefetch, own)
    return Data(iterator, logps, _kind_numbers(items, kinds), mismatches, evaluation)


def _questions(config: Config, arch: Any, tokenizer: Any) -> in_training.Questions | None:
    given, tokens = config.train.answers, config.train.answers_tokens
    if given is None:
        return None
    if distributed.several():
        raise ValueError(
            f"train.answers={given}: a run on several hosts answers no prompts; leave it at null "
            "and evaluate its checkpoints"
        )
    return in_training.read(given, tokens, arch, tokenizer)


def _answers(prepared: Prepared, frozen: Any, out: Path) -> loop.Answers | None:
    """What the loop calls where train.answers are due: answers, writes and says what came of it."""
    source, questions, config = prepared.source, prepared.questions, prepared.config
    if questions is None:
        return None

    def answers(at: int, trained: Any, look: Callable[[], None]) -> dict[str, float]:
        params, adapters = trainable.apart(config, trainable.join(trained, frozen))
        transcripts = in_training.answer(
            questions,
            source.arch,
            params,
            adapters,
            source.tokenizer,
            source.mesh,
            dtype=config.model.dtype,
            progress=sys.stderr.isatty(),
            look=look,
        )
        in_training.write(out, at, transcripts)
        tqdm.write(in_training.line(at, transcripts), file=sys.stdout)
        return in_training.logged(transcripts)

    return answers


def _with_model(config: Config, stage: str, out: Path) -> Config:
    """Fill in a null `model.path`: for srpo the warmup beside `out`, else the quickstart model."""
    if config.model.path is not None:
        return config
    warmup = out.parent / "rw" / "model"
    path = str(warmup) if stage == "srpo" and warmup.is_dir() else "quickstart"
    if stage == "srpo":
        print(f"model.path is not given: starting from {path}", flush=True)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


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
    need = estimate(config, stage, arch, shape, prepared.source.mesh, prepared.answering).total
    offload = ", moments on the host" if config.optimizer.offload else ""
    return (
        f"{stage}: {parameters(arch) / 1e6:.1f}M parameters ({config.model.dtype}){part}, "
        f"{len(items)} rows, {tokens * rows_of:.0f} tokens per step "
        f"({laid_out * rows_of:.0f} computed, rows of {shape.row_length}), "
        f"{prepared.steps} steps, {jax.device_count()} x {jax.devices()[0].device_kind} of "
        f"{device_memory() / GIB:.1f} GiB, about {need / GIB:.2f} GiB needed on each{offload}"
    )


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
            f"{checked}: transformers' logits differ by {worst:.2e} of the largest, allowed "
            f"{EXPORT_TOLERANCE:.0e}"
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
