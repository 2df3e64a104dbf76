"""Owns the section `optimizer`: the optimizer and its learning rate."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


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
