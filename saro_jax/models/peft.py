"""Adapter folders (PEFT): found with the model they belong to, and added to its weights.

Legend: L layers, I input features, O output features, r rank, D hidden, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saro_jax.config import PROJECTIONS
from saro_jax.models import hub, huggingface, lora
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Params
from saro_jax.models.lora import BLOCKS
from saro_jax.models.weights import Tensor, read_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings under which the product of A and B is not all that an adapter does, and their defaults.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, []),
}


def resolve(path: str | None, revision: str | None = None) -> tuple[Path, Path | None]:
    """The folder of a model (see `hub.resolve`), and the adapter folder if the path is of one."""
    folder = hub.resolve(path, revision)
    if not (folder / CONFIG).is_file():
        return folder, None
    settings = _settings(folder)
    base, at = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / CONFIG}: base_model_name_or_path: {base!r}; expected a model")
    return hub.resolve(base, None if Path(base).expanduser().exists() else at), folder


def load_params(
    folder: Path, adapter: Path | None, arch: Architecture, dtype: Any, shardings: Any = None
) -> Params:
    """The model's parameters in `dtype`, with W + scale A B (a sum in float32) in place of W.

    ValueError in one line where the adapters are of a kind that this sum does not give, are for
    another model, or are not all used.
    """
    params = huggingface.load_params(folder, arch, dtype, shardings)
    if adapter is None:
        return params
    scale = _scale(adapter)
    tensors = read_file(adapter / WEIGHTS)
    for name in PROJECTIONS:
        keys = _keys(name, arch.num_layers)
        if found := [key for pair in keys for key in pair if key in tensors]:
            if name == "lm_head" and arch.tie_word_embeddings:
                raise ValueError(f"{adapter / WEIGHTS}: {found[0]}: the head is tied to the table")
            at = params if name == "lm_head" else params["model"]["layers"][BLOCKS[name]]
            at[name]["weight"] = _added(adapter, at[name]["weight"], keys, tensors, scale)
    if tensors:
        raise ValueError(f"{adapter / WEIGHTS}: {next(iter(tensors))}: not of this model")
    return params


def _keys(name: str, layers: int) -> list[tuple[str, str]]:
    """The keys of A and B in the file, for each layer (or the head)."""
    if name == "lm_head":
        places = [name]
    else:
        places = [f"model.layers.{i}.{BLOCKS[name]}.{name}" for i in range(layers)]
    return [(f"{_PREFIX}{p}.lora_A.weight", f"{_PREFIX}{p}.lora_B.weight") for p in places]


def _added(adapter: Path, weight, keys, tensors: dict[str, Tensor], scale: float) -> jax.Array:
    """One matrix (of all layers, or the head's) with its adapters; takes them out of `tensors`."""
    head = weight.ndim == 2  # a table [V, D], where a layer's matrix is [I, O]
    rows, columns = weight.shape[::-1] if head else weight.shape[1:]
    pairs = []
    for key_a, key_b in keys:
        if key_a not in tensors or key_b not in tensors:
            raise ValueError(f"{adapter / WEIGHTS}: {key_a} or {key_b}: missing; others are there")
        a_Ir, b_rO = (tensors.pop(key).read().astype(np.float32).T for key in (key_a, key_b))
        if a_Ir.shape[0] != rows or b_rO.shape[1] != columns or a_Ir.shape[1] != b_rO.shape[0]:
            raise ValueError(
                f"{adapter / WEIGHTS}: {key_a}: {a_Ir.shape[::-1]} and {b_rO.shape[::-1]}; the "
                f"model's matrix has {rows} inputs and {columns} outputs"
            )
        pairs.append((b_rO.T, a_Ir.T) if head else (a_Ir, b_rO))
    left, right = (np.stack(part) for part in zip(*pairs, strict=True))
    stacked = weight[None] if head else weight
    added = lora.added(stacked, left, right, scale, weight.dtype)
    return jax.device_put(added[0] if head else added, weight.sharding)


def _scale(adapter: Path) -> float:
    settings = _settings(adapter)
    for name, plain in _PLAIN.items():
        value = settings.get(name, plain[0])
        if value not in plain:
            raise ValueError(f"{adapter / CONFIG}: {name}: {value!r}; allowed: {plain[0]!r}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ValueError(f"{adapter / CONFIG}: r: {rank!r}, lora_alpha: {alpha!r}; need numbers")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG}: not an object")
    return settings
