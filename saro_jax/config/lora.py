"""Owns the section `lora`: low-rank adapters."""

from pydantic import Field

from saro_jax.config.combinations import PROJECTIONS
from saro_jax.config.section import Section


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
