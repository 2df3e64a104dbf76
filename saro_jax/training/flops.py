"""Floating-point operations of a step by hand: what the model needs, what is executed."""

import re
from typing import NamedTuple

from saro_jax.config import Config
from saro_jax.models.architecture import Architecture
from saro_jax.training import trainable


class Work(NamedTuple):
    """What one packed row holds, and what its attention has to do."""

    tokens: float  # computed, each once
    sequence_tokens: float  # of every sequence, a shared prefix counted in each
    area: float  # (query, key) pairs that see each other


def matrix_sizes(arch: Architecture) -> dict[str, int]:
    """Elements of the matrices that a token is multiplied with: of all layers by name, the head."""
    D, F, H = arch.hidden_size, arch.intermediate_size, arch.head_dim
    N, K, L = arch.num_heads * H, arch.num_kv_heads * H, arch.num_layers
    return {
        "q": L * D * N,
        "k": L * D * K,
        "v": L * D * K,
        "o": L * N * D,
        "gate": L * D * F,
        "up": L * D * F,
        "down": L * F * D,
        "head": arch.vocab_size * D,
    }


def attention_flops(arch: Architecture, area: float) -> float:
    """Of one product of queries and keys, or of probabilities and values, in all layers."""
    return 2.0 * area * arch.num_heads * arch.head_dim * arch.num_layers


def model_flops(arch: Architecture, config: Config, work: Work, *, train: bool) -> float:
    """What the model needs at least: 6 N T and causal attention (2 N T and no backward pass else).

    N without the embedding table, which is looked up. Frozen matrices need no gradient: 4 N T.
    Adapters and other small products are left out.
    """
    size = sum(matrix_sizes(arch).values())
    attention = attention_flops(arch, work.area)
    if not train:
        return 2.0 * size * work.tokens + 2 * attention
    return (4.0 * size + 2.0 * trained_size(arch, config)) * work.tokens + 6 * attention


def trained_size(arch: Architecture, config: Config) -> int:
    trained = trainable.trained_names(arch, config)
    sizes = matrix_sizes(arch)
    names = {"head": "head"} if trainable.trains_head(arch, config) else {}
    for name in trained:
        found = re.search(r"layers/.*/([a-z]+)_proj/weight$", name)
        if found:
            names[found.group(1)] = found.group(1)
    return sum(sizes[name] for name in names)


def executed_products(arch: Architecture, config: Config, tokens: float) -> float:
    """Matrix products of a training step by hand, attention left out.

    6 N T and 2 N T of the forward pass once more, less what is not computed again: the logits
    always are; of a layer, by model.remat, nothing (none), o (dots), or all but down, whose result
    nothing in the layer reads (attention, full). Frozen matrices need no gradient.
    """
    sizes = matrix_sizes(arch)
    again = {
        "none": ("head",),
        "dots": ("o", "head"),
        "attention": ("q", "k", "v", "o", "gate", "up", "head"),
        "full": ("q", "k", "v", "o", "gate", "up", "head"),
    }[config.model.remat]
    size = sum(sizes.values())
    passes = 4.0 * size + 2.0 * trained_size(arch, config) + 2.0 * sum(sizes[x] for x in again)
    return passes * tokens
