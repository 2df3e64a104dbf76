"""Owns the typed configuration: the tree, recipes (YAML), command-line overrides, provenance."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import math
import operator
import os
import platform
import re
import subprocess
import textwrap
import types
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

import saro_jax

Stage = Literal["rw", "srpo"]
PreferenceLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "identity_po",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
    "kto",
]
# Steps over which the fall of the chosen log-probs is averaged (srpo.max_chosen_drop).
DROP_WINDOW = 5
STAGES: tuple[str, ...] = get_args(Stage)
# The matrices of a decoder that adapters can join, those of every layer first.
LAYER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*LAYER_PROJECTIONS, "lm_head")


# ---- the tree ------------------------------------------------------------------------------------


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The policy that is trained."""

    path: str | None = Field(
        default=None,
        description="weights and tokenizer: Hub id, folder, .gguf file or 'quickstart'; null = "
        "'quickstart' for rw; for srpo the export of the RW run beside the output folder "
        "(OUT/../rw/model) if there is one, else 'quickstart'",
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of the Hub id; null = its main branch"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="dtype of activations and matrix products; losses are always float32",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the master weights and optimizer moments"
    )
    frozen_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="dtype of the weights that do not train (lora.rank, train.freeze), such as "
        "bfloat16 under float32 adapters; null = model.param_dtype",
    )
    remat: Literal["none", "dots", "attention", "full"] = Field(
        default="attention",
        description="what the backward pass recomputes: none = nothing (most memory), dots = "
        "all but matrix products, attention = all but attention's result, full = every layer from "
        "its input (least memory)",
    )
    attention: Literal["auto", "xla", "flash"] = Field(
        default="auto",
        description="what computes attention: flash = fused kernels, for TPUs, xla = loops over "
        "blocks, for any device, auto = flash on a TPU, else xla",
    )
    chat_template: str | None = Field(
        default=None, description="Jinja file that replaces the tokenizer's chat template"
    )


class DataConfig(Section):
    """The rows a stage trains on, and how they become arrays."""

    train: str | list[str] = Field(
        description="training rows: file, folder or Hub id, or several of them; "
        "'quickstart:ritd' and 'quickstart:preferences' are packaged",
    )
    eval: str | None = Field(
        default=None, description="held-out rows: file, folder or Hub id; null = no evaluation"
    )
    split: str = Field(default="train", description="split that is read from a Hub id")
    max_length: int = Field(
        default=1024, ge=2, description="tokens of one sequence, prompt and completion together"
    )
    too_long: Literal["truncate", "reject"] = Field(
        default="truncate",
        description="what happens to a row of more than data.max_length tokens",
    )
    row_length: int | None = Field(
        default=None,
        ge=2,
        description="tokens of one packed row; null = 2 x data.max_length for rw, 4 x for srpo",
    )
    pack_window: int = Field(
        default=8,
        ge=1,
        description="optimizer steps whose rows are packed together and then dealt out to them: "
        "more fill rows better; has no effect without data.shuffle",
    )
    row_buckets: int = Field(
        default=8,
        ge=1,
        description="lengths that rows come in, equal parts of row_length: more lengths, less "
        "padding, more programs to compile; 1 = every row has row_length",
    )
    shuffle: bool = Field(
        default=True, description="new order of the rows in every epoch, drawn from seed"
    )
    workers: int = Field(
        default=0, ge=0, description="processes that prepare rows; 0 = the training process"
    )
    prefetch: int = Field(default=2, ge=0, description="batches prepared ahead of the step")
    max_reject_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="largest rejected share of the rows (0 to 1) before the run is refused",
    )


class TrainConfig(Section):
    """How long a stage trains, and what it writes on the way."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps, in place of train.epochs; null = what train.epochs gives",
    )
    epochs: float = Field(
        default=1.0, gt=0, description="passes over the training rows when train.steps is null"
    )
    batch_rows: int = Field(
        default=16, ge=1, description="data rows (examples or pairs) of one optimizer step"
    )
    micro_rows: int = Field(
        default=1, ge=1, description="packed rows of one forward and backward pass"
    )
    freeze: str | list[str] | None = Field(
        default=None,
        description="weights that do not train: regular expressions searched in parameter names "
        "such as model/layers/mlp/up_proj/weight; none = all train; null = none without adapters, "
        "the whole model with them",
    )
    save_every: int = Field(default=50, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay on disk")
    log_every: int = Field(default=1, ge=1, description="optimizer steps between logged metrics")
    eval_every: int = Field(
        default=0,
        ge=0,
        description="optimizer steps between evaluations on data.eval; 0 = after the last only",
    )
    tensorboard: bool = Field(default=True, description="also write metrics for TensorBoard")
    wandb: str | None = Field(
        default=None, description="Weights & Biases project that gets the metrics; null = none"
    )


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="the update rule; sgd has no momentum and no b1, b2, eps"
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="course of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(
        default=0.05, ge=0, le=1, description="share of the steps (0 to 1) that warm up linearly"
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="last learning rate as a share (0 to 1) of the peak"
    )
    weight_decay: float = Field(
        default=1e-4, ge=0, description="decoupled decay of matrices; never of norms and biases"
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="decay of the gradient's mean")
    b2: float = Field(default=0.95, ge=0, lt=1, description="decay of the squared gradient's mean")
    eps: float = Field(default=1e-8, gt=0, description="added to the update's denominator")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="global L2 norm gradients are clipped to; 0 = no clipping"
    )
    offload: bool = Field(
        default=False,
        description="keep adamw's moments in the host's memory between updates (TPU, GPU)",
    )


class LoRAConfig(Section):
    """Low-rank adapters beside the matrices of the model."""

    rank: int = Field(default=0, ge=0, description="columns of A and rows of B; 0 = no adapters")
    alpha: float = Field(
        default=32.0, gt=0, description="the adapters' product is scaled by alpha / rank"
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share (0 to 1) of an adapter's inputs that training sets to zero",
    )
    targets: str | list[str] | None = Field(
        default=None,
        description="the matrices with an adapter, out of " + ", ".join(PROJECTIONS) + "; null = "
        "all of the layers, all = those and lm_head",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate of the adapters, on optimizer's schedule; null = "
        "optimizer.learning_rate",
    )


class SRPOConfig(Section):
    """Preference optimisation; the rw stage does not read it."""

    loss: PreferenceLoss = Field(
        default="sigmoid",
        description="sigmoid = DPO (conservative DPO with srpo.label_smoothing), robust = unbiased "
        "under flipped labels, hinge = SLiC, identity_po = IPO, apo_zero and apo_down = anchored, "
        "simpo and orpo = without a reference, kto = rows of prompt, completion, label",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="strength of the tie to the reference policy (1/nat); for orpo the weight of "
        "the odds ratio",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="assumed share (0 to 0.5) of flipped preferences; a row's own noise replaces "
        "it",
    )
    nll_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the chosen branch's mean negative log-likelihood, added to a "
        "pairwise loss (RPO)",
    )
    target_margin: float = Field(
        default=0.5, ge=0, description="simpo's margin that a pair has to reach"
    )
    length: Literal["sum", "mean", "desensitised"] = Field(
        default="sum",
        description="log-ratio of a branch: sum over its tokens, mean over them, or desensitised = "
        "sum in which tokens past the shorter branch's length count srpo.length_alpha",
    )
    length_alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="weight (0 to 1) of tokens past the shorter branch's length",
    )
    reasoning_weight: float = Field(
        default=1.0, ge=0, description="weight of the log-ratio of the tokens through </think>"
    )
    answer_weight: float = Field(
        default=1.0, ge=0, description="weight of the log-ratio of the tokens after </think>"
    )
    scope: Literal["suffix", "step"] = Field(
        default="suffix",
        description="what of a branch is scored: suffix = all of it, step = the first reasoning "
        "step in which the two branches differ",
    )
    desirable_weight: float = Field(
        default=1.0, ge=0, description="weight of kto's rows with label true"
    )
    undesirable_weight: float = Field(
        default=1.0, ge=0, description="weight of kto's rows with label false"
    )
    layout: Literal["shared", "separate"] = Field(
        default="shared",
        description="shared = a pair's common prefix is computed once, separate = once a branch",
    )
    reference_cache: str | None = Field(
        default=None,
        description="folder where reference log-probs are kept between runs; null = reference/ in "
        "the user's cache",
    )
    recheck: int = Field(
        default=4, ge=0, description="cached pairs whose reference log-probs are recomputed"
    )
    reference: Literal["stored", "resident"] = Field(
        default="stored",
        description="stored = reference log-probs are computed once and kept on disk, resident = "
        "the reference policy stays in memory and scores every step",
    )
    sync_every: int = Field(
        default=0,
        ge=0,
        description="optimizer steps between updates of a resident reference towards the policy "
        "(TR-DPO); 0 = never",
    )
    sync_mix: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share (0 to 1) of the policy in an updated reference; 1 = a copy of it",
    )
    max_chosen_drop: float | None = Field(
        default=20.0,
        gt=0,
        description="mean fall of the chosen log-probs below the reference (nats), with growing "
        "margins, that ends the run; null = never",
    )
    on_drop: Literal["stop", "rollback"] = Field(
        default="stop",
        description="what srpo.max_chosen_drop does: stop = end with an error, rollback = export "
        "the last checkpoint from before the fall",
    )


class SynthesizeConfig(Section):
    """RIT-D out of prompts, a policy and a teacher; only synthesize reads it."""

    prompts: str | list[str] = Field(
        default="quickstart:ritd",
        description="prompts: file, folder or Hub id, or several of them; KIND=SOURCE (harmful, "
        "jailbreak, benign, borderline) where the rows have no column kind",
    )
    columns: str | list[str] | None = Field(
        default=None,
        description="FIELD=COLUMN, or several of them, where a source's columns are not found by "
        "their names: prompt, kind, categories, answer, base_id, id, license, lang",
    )
    split: str = Field(default="train", description="split that is read from a Hub id")
    evaluation: str | list[str] | None = Field(
        default="quickstart:held_out",
        description="evaluation sets no prompt may be taken from; null = none",
    )
    exact_hits: Literal["fail", "drop"] = Field(
        default="fail",
        description="what a prompt that stands in an evaluation set does: end the run, or go",
    )
    ngram: int = Field(
        default=8,
        ge=0,
        description="words in a row that a prompt may not share with an evaluation set; 0 = any",
    )
    tfidf: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="cosine of word weights with an evaluation prompt from which a prompt goes; "
        "1 = none goes",
    )
    near_duplicate: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="share of word triples (Jaccard) from which two prompts of one kind are one; "
        "1 = none are",
    )
    dev_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share (0 to 1) of the prompt groups that are held out, with wrappers of their "
        "own",
    )
    jailbreaks: float = Field(
        default=1.0, ge=0, description="wrapped copies of each harmful prompt"
    )
    wrapped_benign: float = Field(
        default=0.25, ge=0, description="wrapped copies of each benign or borderline prompt"
    )
    size: int | None = Field(
        default=None,
        ge=1,
        description="train prompts, in the shares of synthesize.mix; null = all there are",
    )
    mix: str = Field(
        default="25:25:30:20",
        description="shares of harmful : jailbreak : benign : borderline among synthesize.size",
    )
    policy: str = Field(
        default="saro", description="the safety policy: a YAML file, or a packaged one's name"
    )
    render: Literal["relevant", "whole"] = Field(
        default="relevant",
        description="what of the policy the teacher is told: rules of the prompt's categories, or "
        "all",
    )
    n: int = Field(default=8, ge=1, description="answers of the teacher to one prompt")
    temperature: float = Field(default=0.8, ge=0, description="the teacher's; 0 = greedy")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="probability mass (0 to 1) the teacher samples from"
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="tokens of an answer at most")
    retries: int = Field(
        default=3, ge=0, description="times that answers which do not parse are asked for again"
    )
    concurrency: int = Field(
        default=8, ge=1, description="prompts at the teacher at a time; does not change the result"
    )
    tokenizer: str | None = Field(
        default=None,
        description="tokenizer that counts tokens: Hub id, folder or 'quickstart'; null = words "
        "and marks are counted",
    )
    max_steps: int = Field(default=24, ge=1, description="reasoning steps at most")
    min_steps: int = Field(default=2, ge=1, description="reasoning steps at least")
    max_reasoning_tokens: int = Field(
        default=768, ge=1, description="tokens of the reasoning at most"
    )
    decision_line: bool = Field(
        default=True, description="rows keep the reasoning's last line, Decision: MODE"
    )
    overlap: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="share of runs of 8 words (Jaccard) above which reasoning repeats that of a "
        "prompt of the same category; 1 = none does",
    )
    srs: Literal["shortest_q", "shortest", "pctl", "pareto"] = Field(
        default="shortest_q",
        description="which accepted answer is kept: shortest_q = the shortest of full score and "
        "synthesize.srs_floor, shortest, pctl = nearest the 25th percentile of length, pareto = "
        "the shortest and the best",
    )
    srs_floor: int = Field(
        default=40,
        ge=0,
        description="reasoning tokens at least, for harmful prompts and jailbreaks, with "
        "synthesize.srs=shortest_q",
    )


class MeshConfig(Section):
    """How the devices are laid out; the axes' product is their number."""

    data: int = Field(
        default=1, ge=-1, description="devices that hold copies of the weights; -1 = the rest"
    )
    fsdp: int = Field(
        default=-1, ge=-1, description="devices that share out weights and batch; -1 = the rest"
    )
    tensor: int = Field(
        default=1, ge=-1, description="devices that share out each matrix product; -1 = the rest"
    )
    sequence: int = Field(
        default=1,
        ge=-1,
        description="devices that share out the tokens of each row, and weights; -1 = the rest",
    )
    slice: int = Field(
        default=1, ge=-1, description="slices of a multi-slice TPU: copies; -1 = the rest"
    )


class Config(Section):
    """The resolved configuration of one stage."""

    model: ModelConfig = Field(
        default_factory=ModelConfig, description="the policy that is trained"
    )
    data: DataConfig = Field(description="the rows it trains on, and how they become arrays")
    train: TrainConfig = Field(
        default_factory=TrainConfig, description="how long it trains, what it writes on the way"
    )
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="the optimizer and its learning rate"
    )
    lora: LoRAConfig = Field(
        default_factory=LoRAConfig, description="low-rank adapters beside the model's matrices"
    )
    srpo: SRPOConfig = Field(
        default_factory=SRPOConfig, description="preference optimisation; rw does not read it"
    )
    synthesize: SynthesizeConfig = Field(
        default_factory=SynthesizeConfig,
        description="RIT-D out of prompts, a policy and a teacher; only synthesize reads it",
    )
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="how the devices are laid out")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="seed of every random draw: order of the rows, adapters, dropout",
    )

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        # The first key named is the one whose file:line or flag `load` puts before the message.
        model, data, train = self.model, self.data, self.train
        optimizer, srpo = self.optimizer, self.srpo
        if model.revision is not None and (
            model.path in (None, "quickstart") or str(model.path).endswith(".gguf")
        ):
            raise ValueError(
                f"model.revision={model.revision} needs a Hub id in model.path, got "
                f"{model.path or 'null'}"
            )
        if data.row_length is not None and data.row_length < data.max_length:
            raise ValueError(
                f"data.row_length={data.row_length} cannot hold a sequence of "
                f"data.max_length={data.max_length} tokens"
            )
        if train.eval_every and data.eval is None:
            raise ValueError(f"train.eval_every={train.eval_every} needs rows in data.eval")
        if optimizer.min_lr_ratio and optimizer.schedule == "constant":
            raise ValueError(
                f"optimizer.min_lr_ratio={optimizer.min_lr_ratio} has no meaning with "
                "optimizer.schedule=constant; set it to 0"
            )
        for key in ("b1", "b2", "eps"):
            value, default = getattr(optimizer, key), type(optimizer).model_fields[key].default
            if optimizer.name == "sgd" and value != default:
                raise ValueError(
                    f"optimizer.{key}={value} has no meaning with optimizer.name=sgd; leave it at "
                    f"{default}"
                )
        if optimizer.offload and optimizer.name == "sgd":
            raise ValueError(
                "optimizer.offload=true has no meaning with optimizer.name=sgd: it has no moments"
            )
        _check_srpo(srpo, train)
        _check_adapters(self)
        _check_synthesize(self.synthesize)
        for axis, size in self.mesh:
            if size == 0:
                raise ValueError(f"mesh.{axis}=0: expected at least 1 device, or -1 for the rest")
        rest = [axis for axis, size in self.mesh if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"mesh.{rest[0]}=-1 and mesh.{rest[1]}=-1: only one axis can take the rest"
            )
        return self


def _check_srpo(srpo: SRPOConfig, train: TrainConfig) -> None:
    """Refuse, in one line, settings that the loss does not read or that exclude each other."""
    loss, default = srpo.loss, SRPOConfig.model_fields

    def refuse(why: str, *keys: str) -> None:
        for key in keys:
            value, usual = getattr(srpo, key), default[key].default
            if value != usual:
                text = "null" if value is None else value
                raise ValueError(
                    f"srpo.{key}={text} has no meaning with {why}; leave it at {usual}"
                )

    if loss not in ("sigmoid", "robust"):
        refuse(f"srpo.loss={loss}", "label_smoothing")
    if loss in ("orpo", "kto"):  # orpo has that term already
        refuse(f"srpo.loss={loss}", "nll_weight")
    if loss != "simpo":
        refuse(f"srpo.loss={loss}", "target_margin")
    if loss in ("identity_po", "simpo", "orpo"):
        refuse(f"srpo.loss={loss}, which always takes means", "length")
    if srpo.length != "desensitised":
        refuse(f"srpo.length={srpo.length}", "length_alpha")
    if loss in ("simpo", "orpo"):
        refuse(
            f"srpo.loss={loss}, which has no reference",
            *("reasoning_weight", "answer_weight", "reference", "max_chosen_drop", "on_drop"),
        )
    if loss == "kto":
        pairwise = ("length", "reasoning_weight", "answer_weight", "scope", "layout")
        refuse("srpo.loss=kto, which has no pairs", *pairwise)
        if train.batch_rows < 2:
            raise ValueError(
                "train.batch_rows=1: srpo.loss=kto needs at least 2 rows in a step for its baseline"
            )
    else:
        refuse(f"srpo.loss={loss}", "desirable_weight", "undesirable_weight")
    for one, other in (
        ("reasoning_weight", "answer_weight"),
        ("desirable_weight", "undesirable_weight"),
    ):
        if getattr(srpo, one) == getattr(srpo, other) == 0:
            raise ValueError(f"srpo.{one}=0 and srpo.{other}=0: nothing is left of the loss")
    if srpo.reference != "resident":
        refuse(f"srpo.reference={srpo.reference}", "sync_every")
    if not srpo.sync_every:
        refuse("srpo.sync_every=0", "sync_mix")
    if srpo.max_chosen_drop is None:
        refuse("srpo.max_chosen_drop=null", "on_drop")
    if srpo.on_drop == "rollback" and (train.keep - 1) * train.save_every < DROP_WINDOW:
        raise ValueError(
            f"srpo.on_drop=rollback needs a checkpoint from {DROP_WINDOW} steps ago: "
            f"train.keep={train.keep} and train.save_every={train.save_every} keep none"
        )


def _check_synthesize(synthesize: SynthesizeConfig) -> None:
    """Shares that are shares, limits that leave something, settings that are read."""
    shares = synthesize.mix.split(":")
    numbers = [float(one) for one in shares if re.fullmatch(r"\d+(\.\d+)?", one)]
    if len(shares) != 4 or len(numbers) != 4 or not sum(numbers):
        raise ValueError(
            f"synthesize.mix={synthesize.mix}: expected four shares like 25:25:30:20 (harmful : "
            "jailbreak : benign : borderline)"
        )
    default = SynthesizeConfig.model_fields
    if synthesize.size is None and synthesize.mix != default["mix"].default:
        raise ValueError(
            f"synthesize.mix={synthesize.mix} has no meaning with synthesize.size=null, which "
            "takes all prompts"
        )
    if synthesize.min_steps > synthesize.max_steps:
        raise ValueError(
            f"synthesize.min_steps={synthesize.min_steps} is more than "
            f"synthesize.max_steps={synthesize.max_steps}"
        )
    if synthesize.srs != "shortest_q" and synthesize.srs_floor != default["srs_floor"].default:
        raise ValueError(
            f"synthesize.srs_floor={synthesize.srs_floor} has no meaning with "
            f"synthesize.srs={synthesize.srs}"
        )
    if synthesize.evaluation is None:
        for key in ("exact_hits", "ngram", "tfidf"):
            value = getattr(synthesize, key)
            if value != default[key].default:
                raise ValueError(
                    f"synthesize.{key}={value} has no meaning with synthesize.evaluation=null"
                )


def names(value: str | list[str] | None) -> list[str]:
    """A setting that takes one text or several, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _check_adapters(config: Config) -> None:
    """Combinations of adapters and of what is frozen."""
    lora, freeze = config.lora, names(config.train.freeze)
    for key, value in lora:
        if key != "rank" and not lora.rank and value != type(lora).model_fields[key].default:
            raise ValueError(f"lora.{key}={_as_typed(value)} has no meaning with lora.rank=0")
    for name in names(lora.targets):
        if name not in PROJECTIONS and lora.targets != "all":
            raise ValueError(f"lora.targets: unknown matrix {name!r}{_nearest(name, PROJECTIONS)}")
    if len(set(names(lora.targets))) < len(names(lora.targets)):
        raise ValueError(
            f"lora.targets: a matrix is given twice in {', '.join(lora.targets or ())}"
        )
    if "none" in freeze and len(freeze) > 1:
        raise ValueError("train.freeze: none stands alone, got " + ", ".join(freeze))
    for pattern in freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"train.freeze: {pattern!r} is not a regular expression: {error}"
            ) from None
    if config.model.frozen_dtype and freeze in (["none"], []) and not (lora.rank and not freeze):
        raise ValueError(
            f"model.frozen_dtype={config.model.frozen_dtype} has no meaning where every weight "
            "trains; set lora.rank or train.freeze"
        )


# ---- loading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One value and where it was given: `file:line`, or `--flag=value` as typed."""

    value: Any
    where: str


def load(recipe: Path | str | None, overrides: Sequence[str], stage: str) -> Config:
    """Resolve a recipe, its part for `stage` and `--a.b=value` overrides into one Config.

    `recipe` is a file or the bare name of a packaged recipe; None is the packaged quickstart. Later
    wins: the recipe, its `stages.STAGE`, overrides, overrides of `stages.STAGE`. Raises a one-line
    ValueError that names the file and line, or the flag.
    """
    if stage not in STAGES:
        raise ValueError(f"--stage={stage}: expected {' or '.join(STAGES)}, got {stage!r}")
    path = _recipe_file(recipe)
    settings: dict[str, Setting] = {}
    for parts in (_read_recipe(path), _read_overrides(overrides)):
        settings |= parts[""] | parts[stage]
    tree: dict[str, Any] = {name: {} for name in _sections()}
    for name, setting in settings.items():
        section, _, key = name.rpartition(".")
        (tree[section] if section else tree)[key] = setting.value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_one_line(error, settings, _shown(path))) from None


def recipe_path(name: str) -> Path:
    """Find the packaged recipe `name` (no folder, no suffix), in a wheel or a checkout."""
    # A wheel carries configs/ inside the package; a checkout keeps it beside the package.
    package = Path(__file__).resolve().parent
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    names = sorted(path.name.removesuffix(".yaml") for path in folder.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"--config={name}: unknown recipe{_nearest(name, names)}")
    return folder / f"{name}.yaml"


def dump(config: Config) -> str:
    """Write the config as YAML that `load` reads back as the same Config for either stage."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=2**20)


def digest(config: Config) -> str:
    """Hash of all settings."""
    return hashlib.blake2b(dump(config).encode(), digest_size=8).hexdigest()


def _recipe_file(recipe: Path | str | None) -> Path:
    if recipe is None:
        return recipe_path("quickstart")
    path = Path(recipe)
    if not path.is_file() and path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        return recipe_path(str(recipe))
    return path


def _shown(path: Path) -> str:
    absolute = Path(os.path.abspath(path))
    cwd = Path.cwd()
    return str(absolute.relative_to(cwd) if absolute.is_relative_to(cwd) else path)


def _one_line(error: ValidationError, settings: dict[str, Setting], recipe: str) -> str:
    """The first complaint of pydantic, after the place of the first key that it names."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{recipe}: {name} is required: {_leaves()[name].description}"
    message = str(first.get("ctx", {}).get("error") or f"{name}: {first['msg']}")
    for key in re.findall(r"\b[a-z]+\.[a-z0-9_]+", message):
        if key in settings:
            return f"{settings[key].where}: {message}"
    return f"{recipe}: {message}"


def _read_recipe(path: Path) -> dict[str, dict[str, Setting]]:
    """Settings of a recipe by dotted name, for all stages ("") and for each one."""
    shown = _shown(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in recipe_path("quickstart").parent.glob("*.yaml")))
        raise ValueError(f"{shown}: no such recipe; the packaged ones are {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{shown}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{shown}: not YAML: {' '.join(str(error).split())}") from None
    found: dict[str, dict[str, Setting]] = {part: {} for part in ("", *STAGES)}
    for key, where, node in _items(root, shown, "the recipe", [*Config.model_fields, "stages"]):
        if key != "stages":
            _read_key(found[""], Config, key, "", where, node, shown)
            continue
        for stage, _, tree in _items(node, shown, "stages", STAGES):
            for name, place, value in _items(tree, shown, f"stages.{stage}", Config.model_fields):
                _read_key(found[stage], Config, name, f"stages.{stage}.", place, value, shown)
    return found


def _read_key(
    found: dict[str, Setting],
    model: type[BaseModel],
    key: str,
    outer: str,
    where: str,
    node: yaml.Node,
    shown: str,
) -> None:
    """Put the key's setting, or those of the section that it names, into `found`."""
    section = _sections().get(key)
    if section is None:
        value = _node_value(node, model.model_fields[key], f"{where}: {outer}{key}")
        found[key] = Setting(value, where)
        return
    for name, place, value in _items(node, shown, outer + key, section.model_fields):
        field = section.model_fields[name]
        parsed = _node_value(value, field, f"{place}: {outer}{key}.{name}")
        found[f"{key}.{name}"] = Setting(parsed, place)


def _items(
    node: yaml.Node | None, shown: str, section: str, allowed: Iterable[str]
) -> Iterable[tuple[str, str, yaml.Node]]:
    """The (key, file:line, value) of a mapping node, whose keys must be allowed and unique."""
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~")):
        return
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ValueError(f"{shown}:{line}: {section}: expected keys, got {_node_text(node)}")
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        key, where = key_node.value, f"{shown}:{line}"
        if not isinstance(key_node, yaml.ScalarNode) or key not in allowed:
            place = "" if section == "the recipe" else f" in {section}"
            hint = _nearest_key(str(key), allowed)
            raise ValueError(f"{where}: unknown key {_node_text(key_node)}{place}{hint}")
        if key in seen:
            raise ValueError(f"{where}: key {key!r} is given twice, first in line {seen[key]}")
        seen[key] = line
        yield key, where, value


def _node_text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return "a mapping"


def _node_value(node: yaml.Node, field: FieldInfo, place: str) -> Any:
    """The typed value of a YAML node; the field's type decides, not YAML's guess.

    YAML 1.1 reads 1e-5 as text, 010 as eight and a commit such as 12345e6 as a number.
    """
    if isinstance(node, yaml.ScalarNode):
        return _parse(node.value, field, place, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode) and node.value and _takes_list(field):
        items = [item for item in node.value if isinstance(item, yaml.ScalarNode)]
        if len(items) == len(node.value):
            return [_text(item.value, place, item.style is not None) for item in items]
    raise ValueError(f"{place}: expected {_expected(field)}, got {_node_text(node)}")


def _read_overrides(overrides: Sequence[str]) -> dict[str, dict[str, Setting]]:
    """Settings of `--a.b=value` by dotted name, for all stages ("") and for each one."""
    found: dict[str, dict[str, Setting]] = {part: {} for part in ("", *STAGES)}
    for override in overrides:
        flag, equals, text = override.removeprefix("--").partition("=")
        stage, name = _option(flag)
        field = _leaves()[name]
        if not equals:
            raise ValueError(f"--{flag}: needs a value: --{flag}=VALUE")
        where = f"--{flag}={text}"
        null = type(None) in _members(field) and text in ("", "~", "null")
        listed = _takes_list(field) and not null
        values = _parse_list(text, where) if listed else _parse(text, field, where)
        earlier = found[stage].get(name)
        if earlier is not None:
            if not _takes_list(field):
                raise ValueError(f"{where}: given twice, first as {earlier.where}")
            values = [*names(earlier.value), *names(values)]
        found[stage][name] = Setting(values, where)
    return found


def _option(flag: str, flags: Iterable[str] = ()) -> tuple[str, str]:
    """The stage ("" = all) and dotted name that `flag` (without dashes) sets."""
    stage, name = "", flag
    if flag.startswith("stages."):
        _, stage, name = [*flag.split(".", 2), "", ""][:3]
        if stage not in STAGES:
            raise ValueError(f"--{flag}: unknown stage {stage!r}; allowed: {', '.join(STAGES)}")
    if name in _sections():
        key = next(iter(_sections()[name].model_fields))
        raise ValueError(
            f"--{flag}: {name} is a section; set one of its keys: --{flag}.{key}=VALUE"
        )
    if name not in _leaves():
        hint = _nearest_key(name, [*flags, *_leaves()], dashes="--")
        raise ValueError(f"--{flag}: unknown option{hint}")
    return stage, name


# ---- values --------------------------------------------------------------------------------------


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _leaves() -> dict[str, FieldInfo]:
    """Every setting of the tree by dotted name, in the tree's order."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = _sections().get(name)
        if section is None:
            leaves[name] = field
        else:
            leaves |= {f"{name}.{key}": leaf for key, leaf in section.model_fields.items()}
    return leaves


def _members(field: FieldInfo) -> tuple[Any, ...]:
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _takes_list(field: FieldInfo) -> bool:
    return list[str] in _members(field)


def _parse(text: str, field: FieldInfo, place: str, quoted: bool = False) -> Any:
    """The value that `text` is under the field's type and bounds."""
    members = _members(field)
    null = not quoted and text in ("", "~", "null")
    if null and type(None) in members:
        return None
    kind = members[0]
    value: Any = None
    if null:
        text = "null"
    elif get_origin(kind) is Literal:
        value = text if text in get_args(kind) else None
    elif kind is bool:
        value = {"true": True, "false": False}.get(text.lower())
    elif kind is int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
    elif kind is float:
        value = _number(text)
    else:
        value = _text(text, place, quoted)
    if value is None or not all(holds(value, limit) for _, holds, limit in _bounds(field)):
        got = text if null else repr(text)
        raise ValueError(f"{place}: expected {_expected(field)}, got {got}")
    return value


def _bounds(field: FieldInfo) -> list[tuple[str, Callable[[Any, Any], bool], Any]]:
    """The (sign, comparison, limit) that the field's Field(ge=..., lt=...) states."""
    bounds: list[tuple[str, Callable[[Any, Any], bool], Any]] = []
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            bounds.append((">=", operator.ge, bound.ge))
        elif isinstance(bound, annotated_types.Gt):
            bounds.append((">", operator.gt, bound.gt))
        elif isinstance(bound, annotated_types.Le):
            bounds.append(("<=", operator.le, bound.le))
        elif isinstance(bound, annotated_types.Lt):
            bounds.append(("<", operator.lt, bound.lt))
        else:
            raise TypeError(f"{bound!r} would not be checked in recipes and overrides")
    return bounds


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _text(text: str, place: str, quoted: bool) -> str:
    if not text.strip() or (not quoted and text in ("~", "null")):
        raise ValueError(f"{place}: expected text, got {text!r}")
    return text


def _parse_list(text: str, place: str) -> str | list[str]:
    """One text, or the list of `a,b` or `[a, b]`."""
    inner = text.strip()
    bracketed = inner.startswith("[") and inner.endswith("]")
    items = (inner[1:-1] if bracketed else inner).split(",")
    values = [_text(item.strip(), place, quoted=False) for item in items]
    return values if bracketed or len(values) > 1 else values[0]


def _expected(field: FieldInfo) -> str:
    """What the field takes, in words for an error: 'an integer >= 1 or null'."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return _wording(field, words | {list[str]: "a list of text"}, " or ")


def _type_name(field: FieldInfo) -> str:
    """What the field takes, in short for the help: 'integer >= 1|null'."""
    words = {int: "integer", float: "number", bool: "true|false", str: "text"}
    return _wording(field, words | {list[str]: "list"}, "|")


def _wording(field: FieldInfo, words: dict[Any, str], joint: str) -> str:
    bounds = " and".join(f" {sign} {limit}" for sign, _, limit in _bounds(field))
    parts = []
    for member in _members(field):
        if get_origin(member) is Literal:
            parts += [str(choice) for choice in get_args(member)]
        elif member is type(None):
            parts.append("null")
        else:
            parts.append(words[member] + bounds)
    return joint.join(parts)


def _nearest_key(key: str, allowed: Iterable[str], dashes: str = "") -> str:
    """The hint after an unknown key: a setting of that very name elsewhere comes first."""
    elsewhere = [name for name in _leaves() if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {_quoted(elsewhere[0], dashes)}?"
    return _nearest(key, list(allowed), dashes)


def _nearest(name: str, allowed: Sequence[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"; did you mean {_quoted(close[0], dashes)}?"
    return "; --help lists them" if dashes else f"; allowed: {', '.join(allowed)}"


def _quoted(name: str, dashes: str) -> str:
    return f"{dashes}{name}" if dashes else repr(name)


# ---- the command line ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """A flag of a stage beside the tree: `--name=value`, or `--name` alone for a switch."""

    name: str
    help: str
    default: Any = None
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    required: bool = False
    switch: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


def parse_command_line(
    prog: str, doc: str, argv: Sequence[str], flags: Sequence[Flag], tree: bool = True
) -> Namespace:
    """Parse a stage's flags; what is left must be overrides of the tree, kept as `.overrides`.

    `--a=b` and `--a b` are the same. `tree=False` is for a stage that reads no Config. `--help`
    prints `doc`, the flags and all fields, and exits. Raises a one-line ValueError that names the
    flag; values of overrides are checked by `load`.
    """
    known = {flag.name: flag for flag in flags}
    values: dict[str, Any] = {}
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            print(_stage_help(prog, doc, flags, tree))
            raise SystemExit(0)
        if not token.startswith("--") or token == "--":
            raise ValueError(f"unexpected argument {token!r}; options are given as --name=value")
        name, equals, text = token[2:].partition("=")
        flag = known.get(name)
        if flag is None and not tree:
            raise ValueError(f"--{name}: unknown option{_nearest(name, list(known), '--')}")
        if flag is None:
            _option(name, known)
        if flag is not None and flag.switch:
            if equals and text not in ("true", "false"):
                raise ValueError(f"--{name}={text}: expected true or false, got {text!r}")
            values[flag.key] = text != "false"
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name}: needs a value: --{name}=VALUE")
            text = rest.pop(0)
        if flag is None:
            overrides.append(f"--{name}={text}")
        elif flag.key in values:
            raise ValueError(f"--{name}={text}: given twice")
        else:
            values[flag.key] = _flag_value(flag, text)
    for flag in flags:
        if flag.required and flag.key not in values:
            raise ValueError(f"--{flag.name}: required: {flag.help}")
        values.setdefault(flag.key, False if flag.switch else flag.default)
    return Namespace(**values, overrides=overrides)


def help_text() -> str:
    """Every setting of the tree with its type, default and meaning, grouped by section."""
    lines: list[str] = []
    group = ""
    for name, field in _leaves().items():
        section = name.rpartition(".")[0]
        if section != group:
            about = Config.model_fields[section].description if section else "beside the sections"
            lines += ["", f"{section or 'other'}: {about}"]
            group = section
        default = "required" if field.is_required() else f"default {_as_typed(field.default)}"
        lines += _entry(f"--{name}={_type_name(field)}", f"{field.description} [{default}]")
    lines += [
        "",
        "--stages.rw.KEY=VALUE and --stages.srpo.KEY=VALUE set a key for one stage only.",
    ]
    return "\n".join(lines[1:])


def _as_typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _entry(head: str, meaning: str) -> list[str]:
    indent = " " * 6
    body = textwrap.wrap(meaning, 96, initial_indent=indent, subsequent_indent=indent)
    return [f"  {head}", *body]


def _stage_help(prog: str, doc: str, flags: Sequence[Flag], tree: bool) -> str:
    settings = " [--section.key=VALUE ...]" if tree else ""
    lines = [f"usage: {prog} [--flag=VALUE ...]{settings}", "", doc.strip(), "", "flags:"]
    for flag in flags:
        value = "|".join(flag.choices) or "VALUE"
        head = f"--{flag.name}" if flag.switch else f"--{flag.name}={value}"
        default = "required" if flag.required else f"default {_as_typed(flag.default)}"
        lines += _entry(head, flag.help if flag.switch else f"{flag.help} [{default}]")
    lines += _entry("--help", "print this and exit")
    if tree:
        lines += ["", "settings (each can stand in the recipe or on the command line):", ""]
        lines.append(help_text())
    return "\n".join(lines)


def _flag_value(flag: Flag, text: str) -> Any:
    place = f"--{flag.name}={text}"
    if flag.choices and text not in flag.choices:
        raise ValueError(f"{place}: expected {' or '.join(flag.choices)}, got {text!r}")
    if not text:
        raise ValueError(f"{place}: needs a value: --{flag.name}=VALUE")
    try:
        return flag.parse(text)
    except ValueError as error:
        words: dict[Any, str] = {int: "an integer", float: "a number"}
        reason = f"expected {words[flag.parse]}" if flag.parse in words else str(error)
        raise ValueError(f"{place}: {reason}, got {text!r}") from None


# ---- provenance ----------------------------------------------------------------------------------


def provenance() -> dict[str, str | bool | None]:
    """Versions and commit of the running code, to be saved beside what it makes.

    `git_commit` and `git_dirty` (tracked files changed) are None outside a checkout.
    """
    found: dict[str, str | bool | None] = {
        "saro_jax": saro_jax.__version__,
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    status = _git("status", "--porcelain", "--untracked-files=no")
    found["git_commit"] = _git("rev-parse", "HEAD")
    found["git_dirty"] = None if found["git_commit"] is None or status is None else bool(status)
    return found


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[1]
    # An installed wheel may lie inside some other project's checkout: that commit is not ours.
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
