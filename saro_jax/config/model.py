"""Owns the section `model`: the policy, its dtypes, its attention, what is recomputed."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


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
