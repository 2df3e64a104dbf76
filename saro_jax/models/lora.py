"""Low-rank adapters (LoRA, arXiv 2106.09685): a tree of their own that joins the layers.

Legend: L layers, I input features, O output features, r rank, D hidden, V vocabulary.

    {"model": {"layers": {"self_attn": {"q_proj": {"lora_A": [L, I, r], "lora_B": [L, r, O]}}}},
     "lm_head": {"lora_A": [D, r], "lora_B": [r, V]}}

y = x W + scale (dropout(x) A) B is computed beside x W, layer by layer inside the scan, and never
as x (W + scale A B): so no gradient and no copy of a W that does not train exists. The sum is for
the export (`merge`, on the host, one matrix at a time) and for decoding (`joined`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saro_jax.config import LAYER_PROJECTIONS, PROJECTIONS, LoRAConfig, names
from saro_jax.models.architecture import Architecture
from saro_jax.models.dot import dot

F32 = jnp.float32
Tree = dict[str, Any]
BLOCKS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
          for name in LAYER_PROJECTIONS}  # fmt: skip


class LowRank(NamedTuple):
    """The adapter of one matrix: A [I, r], B [r, O]; `key` is None where nothing is dropped."""

    a_Ir: jax.Array
    b_rO: jax.Array
    scale: float
    dropout: float
    key: jax.Array | None

    def down(self, x: jax.Array) -> jax.Array:
        """scale * dropout(x) A, [..., r] in x's dtype."""
        if self.key is not None and self.dropout:
            kept = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1.0 - self.dropout), 0.0).astype(x.dtype)
        return dot(x, self.a_Ir) * jnp.asarray(self.scale, x.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """What the adapter adds to x W, [..., O]."""
        return dot(self.down(x), self.b_rO)


class Adapters(NamedTuple):
    """All adapters of a model, ready to be used in one forward pass."""

    tree: Tree
    scale: float
    dropout: float = 0.0
    key: jax.Array | None = None  # of this pass; None = no dropout (scoring, evaluation)

    def of_layer(self, layer: Tree, index: jax.Array) -> dict[str, dict[str, LowRank]]:
        """The adapters of one layer by block and matrix; `layer`: this layer's leaves."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        return {
            block: {name: self._one(name, leaves, key) for name, leaves in matrices.items()}
            for block, matrices in layer.items()
        }

    def of_head(self) -> LowRank | None:
        """The adapter of the output matrix, if it has one."""
        if "lm_head" not in self.tree:
            return None
        return self._one("lm_head", self.tree["lm_head"], self.key)

    def layers(self) -> Tree:
        """The stacked leaves that are scanned beside the layers' own; {} if there are none."""
        return self.tree.get("model", {}).get("layers", {})

    def _one(self, name: str, leaves: Tree, key: jax.Array | None) -> LowRank:
        if key is not None:  # apart from the numbers of the layers, which lm_head does not have
            key = jax.random.fold_in(key, 2**31 + PROJECTIONS.index(name))
        return LowRank(leaves["lora_A"], leaves["lora_B"], self.scale, self.dropout, key)


def scale(config: LoRAConfig) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def targets(config: LoRAConfig) -> tuple[str, ...]:
    """The matrices with an adapter, in the order of `config.PROJECTIONS`."""
    if config.targets is None:
        return LAYER_PROJECTIONS
    chosen = PROJECTIONS if config.targets == "all" else names(config.targets)
    return tuple(name for name in PROJECTIONS if name in chosen)


def bind(config: LoRAConfig, tree: Tree | None, key: jax.Array | None = None) -> Adapters | None:
    """The adapters for one forward pass; None where there are none. `key`: with dropout only."""
    if not tree:
        return None
    return Adapters(tree, scale(config), config.dropout, key if config.dropout else None)


def abstract(config: LoRAConfig, arch: Architecture, base: Tree, dtype: Any) -> Tree:
    """Shapes of the adapters of a model with parameters like `base`; {} for rank 0."""

    def pair(shape: tuple[int, ...]) -> Tree:
        *stack, rows, columns = shape
        sizes = {"lora_A": (*stack, rows, config.rank), "lora_B": (*stack, config.rank, columns)}
        return {name: jax.ShapeDtypeStruct(size, dtype) for name, size in sizes.items()}

    tree: Tree = {}
    for name in targets(config) if config.rank else ():
        if name == "lm_head":
            tree["lm_head"] = pair((arch.hidden_size, arch.vocab_size))
            continue
        layers = tree.setdefault("model", {}).setdefault("layers", {})
        weight = base["model"]["layers"][BLOCKS[name]][name]["weight"]
        layers.setdefault(BLOCKS[name], {})[name] = pair(weight.shape)
    return tree


def init(shapes: Tree, seed: int) -> Tree:
    """A of a uniform draw in +-1 / sqrt(I) (PEFT's Kaiming uniform), B of zeros.

    The draw of a matrix depends on the seed and its name alone, not on which others have one.
    """

    def pair(name: str, leaves: Tree) -> Tree:
        key = jax.random.fold_in(jax.random.key(seed), PROJECTIONS.index(name))
        a, b = leaves["lora_A"], leaves["lora_B"]
        bound = 1.0 / math.sqrt(a.shape[-2])
        draw = jax.random.uniform(key, a.shape, F32, -bound, bound)
        return {"lora_A": draw.astype(a.dtype), "lora_B": jnp.zeros(b.shape, b.dtype)}

    return _by_matrix(shapes, pair)


def _by_matrix(tree: Tree, make: Callable[[str, Tree], Tree], name: str = "") -> Tree:
    if "lora_A" in tree:
        return make(name, tree)
    return {key: _by_matrix(part, make, key) for key, part in tree.items()}


def matrices(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tree]]:
    """("model.layers.mlp.up_proj", {"lora_A", "lora_B"}) of every adapter."""
    if "lora_A" in tree:
        yield prefix, tree
        return
    for key, part in tree.items():
        yield from matrices(part, f"{prefix}.{key}" if prefix else key)


def merge(weight: np.ndarray, a_Ir: np.ndarray, b_rO: np.ndarray, scale: float) -> np.ndarray:
    """W + scale A B in float32; weight [I, O] in any float dtype."""
    delta = np.asarray(a_Ir, np.float32) @ np.asarray(b_rO, np.float32)
    return weight.astype(np.float32) + np.float32(scale) * delta


@partial(jax.jit, static_argnames=("scale", "dtype"))
def added(weight: jax.Array, left: jax.Array, right: jax.Array, scale: float, dtype: Any):
    """W + scale A B of stacked matrices [L, I, O], a sum in float32, in `dtype`."""

    def one(layer):
        w, a, b = layer
        delta = jnp.dot(a.astype(F32), b.astype(F32), precision=lax.Precision.HIGHEST)
        return (w.astype(F32) + scale * delta).astype(dtype)

    # Layer by layer, so that no copy of all of them in float32 exists.
    return lax.map(one, (weight, left, right))


def joined(
    arch: Architecture, params: Tree, adapters: Adapters, dtype: Any
) -> tuple[Architecture, Tree]:
    """The model whose matrices are W + scale A B in `dtype`, to decode with, where they lie.

    Other leaves are those of `params`. A head tied to the table gets a matrix of its own if it has
    an adapter, which is of the output alone.
    """

    def summed(weight: jax.Array, leaves: Tree) -> Tree:
        a, b = leaves["lora_A"], leaves["lora_B"]
        if weight.ndim == 2:  # the head, a table [V, D], where a layer's matrix is [I, O]
            new = added(weight[None], b.T[None], a.T[None], adapters.scale, dtype)[0]
        else:
            new = added(weight, a, b, adapters.scale, dtype)
        return {"weight": jax.device_put(new, weight.sharding)}

    layers = dict(params["model"]["layers"])
    for block, found in adapters.layers().items():
        layers[block] = layers[block] | {
            name: layers[block][name] | summed(layers[block][name]["weight"], leaves)
            for name, leaves in found.items()
        }
    params = params | {"model": params["model"] | {"layers": layers}}
    if "lm_head" in adapters.tree:
        head = params["model"]["embed_tokens"] if arch.tie_word_embeddings else params["lm_head"]
        params = params | {"lm_head": summed(head["weight"], adapters.tree["lm_head"])}
        arch = dataclasses.replace(arch, tie_word_embeddings=False)
    return arch, params


def peft_config(config: LoRAConfig, base: str, revision: str | None) -> dict[str, Any]:
    """adapter_config.json: what `peft.LoraConfig` reads, and nothing that it would ignore."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(targets(config)),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
