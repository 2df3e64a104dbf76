"""Owns the section `train`: how long a stage trains, and what it writes on the way."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


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
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype in which devices sum the gradients of the layers' matrices: bfloat16 "
        "sends half as much and rounds each device's part",
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
    answers: str | None = Field(
        default=None,
        description="prompts (id, kind, prompt) that the model answers while it trains: a JSON "
        "lines file or quickstart:NAME; null = none",
    )
    answers_every: int = Field(
        default=0,
        ge=0,
        description="optimizer steps between such answers; 0 = after the last step only",
    )
    answers_tokens: int = Field(
        default=512, ge=1, description="tokens of such an answer at most, reasoning included"
    )
    tensorboard: bool = Field(default=True, description="also write metrics for TensorBoard")
    wandb: str | None = Field(
        default=None, description="Weights & Biases project that gets the metrics; null = none"
    )
