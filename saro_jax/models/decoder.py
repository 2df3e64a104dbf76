"""The one decoder: Llama, Mistral, Qwen and Gemma by configuration.

Legend: B rows, T tokens, S cache slots, D hidden, F MLP width, N query heads, K key/value heads,
H head width, V vocabulary, L layers.

Flax NNX modules are used as plain pytrees: the attribute path of every `nnx.Param` is the Hugging
Face key without the layer number, layers are stacked on axis 0 and run by one `lax.scan`. Outside
this file a model is its parameter tree, a nested dict with the same names ("params").
"""

from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from saro_jax.models import embedding
from saro_jax.models.architecture import Architecture, inverse_frequencies
from saro_jax.models.attention import Kernel, Tokens, attend, attend_cache
from saro_jax.models.dot import dot
from saro_jax.models.lora import Adapters, LowRank
from saro_jax.models.remat import recompute, store
from saro_jax.parallel.sharding import check_heads, constrain_rows, shardings

Params = dict[str, Any]
F32 = jnp.float32
NO_WINDOW = 2**30


class Cache(NamedTuple):
    """Keys and values of the tokens so far; [L, B, K, S, H] each."""

    k: jax.Array
    v: jax.Array


class Weight(nnx.Module):
    """One matrix, stored [in, out] (tables: [V, D]), with an optional bias [out]."""

    def __init__(self, rows: int, columns: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, columns), F32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(columns, F32))

    def __call__(self, x: jax.Array, adapter: LowRank | None = None) -> jax.Array:
        y = dot(x, self.weight[...])
        if adapter is not None:
            y = y + adapter(x)
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


class Norm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32; Gemma's weight is an offset from 1."""

    def __init__(self, width: int, arch: Architecture):
        self.weight = nnx.Param((jnp.zeros if arch.norm_plus_one else jnp.ones)(width, F32))

    def __call__(self, x: jax.Array, arch: Architecture) -> jax.Array:
        x32 = x.astype(F32)
        x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + arch.rms_norm_eps)
        weight = self.weight[...].astype(F32)
        if arch.norm_plus_one:
            return (x32 * (1.0 + weight)).astype(x.dtype)
        return weight.astype(x.dtype) * x32.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        D, NH, KH = (
            arch.hidden_size,
            arch.num_heads * arch.head_dim,
            arch.num_kv_heads * arch.head_dim,
        )
        self.q_proj = Weight(D, NH, bias=arch.qkv_bias, rngs=rngs)
        self.k_proj = Weight(D, KH, bias=arch.qkv_bias, rngs=rngs)
        self.v_proj = Weight(D, KH, bias=arch.qkv_bias, rngs=rngs)
        self.o_proj = Weight(NH, D, bias=arch.o_bias, rngs=rngs)
        if arch.qk_norm:
            self.q_norm = Norm(arch.head_dim, arch)
            self.k_norm = Norm(arch.head_dim, arch)

    def __call__(self, x_BTD, arch: Architecture, rope, mix, adapters: dict[str, LowRank]):
        """`mix` turns (q, k, v) of this layer into the attention output and whatever it carries."""
        B, T, _ = x_BTD.shape
        low = adapters.get

        def projected(projection: Weight, name: str, heads: int):
            # Cut by token as x is, or the compiler would cut the product as attention wants it.
            x_BTI = constrain_rows(projection(x_BTD, low(name)), "tensor")
            return x_BTI.reshape(B, T, heads, arch.head_dim)

        q = projected(self.q_proj, "q_proj", arch.num_heads)
        k = projected(self.k_proj, "k_proj", arch.num_kv_heads)
        v = projected(self.v_proj, "v_proj", arch.num_kv_heads)
        if arch.qk_norm:
            q, k = self.q_norm(q, arch), self.k_norm(k, arch)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = store(q, "q"), store(k, "k"), store(v, "v")
        out_BTNH, carried = mix(q, k, v)
        out_BTI = constrain_rows(out_BTNH.reshape(B, T, -1), "tensor")
        return self.o_proj(out_BTI, low("o_proj")), carried


class Mlp(nnx.Module):
    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        D, F = arch.hidden_size, arch.intermediate_size
        self.gate_proj = Weight(D, F, bias=arch.mlp_bias, rngs=rngs)
        self.up_proj = Weight(D, F, bias=arch.mlp_bias, rngs=rngs)
        self.down_proj = Weight(F, D, bias=arch.mlp_bias, rngs=rngs)

    def __call__(self, x_BTD, arch: Architecture, adapters: dict[str, LowRank]) -> jax.Array:
        low = adapters.get
        gate = store(self.gate_proj(x_BTD, low("gate_proj")), "gate").astype(F32)
        up = store(self.up_proj(x_BTD, low("up_proj")), "up").astype(F32)
        h_BTF = (_activation(gate, arch.hidden_act) * up).astype(x_BTD.dtype)
        return self.down_proj(h_BTF, low("down_proj"))


class Layer(nnx.Module):
    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        D = arch.hidden_size
        self.input_layernorm = Norm(D, arch)
        self.self_attn = Attention(arch, rngs)
        self.post_attention_layernorm = Norm(D, arch)
        if arch.post_norms:
            self.pre_feedforward_layernorm = Norm(D, arch)
            self.post_feedforward_layernorm = Norm(D, arch)
        self.mlp = Mlp(arch, rngs)

    def __call__(self, x_BTD, arch: Architecture, rope, mix, adapters=MappingProxyType({})):
        with jax.named_scope("attention"):
            low = adapters.get("self_attn", {})
            h, carried = self.self_attn(self.input_layernorm(x_BTD, arch), arch, rope, mix, low)
            if arch.post_norms:
                h = self.post_attention_layernorm(h, arch)
            x_BTD = constrain_rows(x_BTD + h)
        with jax.named_scope("mlp"):
            before = (
                self.pre_feedforward_layernorm if arch.post_norms else self.post_attention_layernorm
            )
            h = self.mlp(before(x_BTD, arch), arch, adapters.get("mlp", {}))
            if arch.post_norms:
                h = self.post_feedforward_layernorm(h, arch)
            return constrain_rows(x_BTD + h), carried


class Body(nnx.Module):
    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.embed_tokens = Weight(arch.vocab_size, arch.hidden_size, rngs=rngs)
        keys = jax.random.split(rngs.params(), arch.num_layers)
        self.layers = jax.vmap(lambda key: Layer(arch, nnx.Rngs(key)))(keys)
        self.norm = Norm(arch.hidden_size, arch)


class Decoder(nnx.Module):
    """Parameters of the whole model; `forward` and `head` below are what it computes."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.model = Body(arch, rngs)
        if not arch.tie_word_embeddings:
            self.lm_head = Weight(arch.vocab_size, arch.hidden_size, rngs=rngs)


def init_params(arch: Architecture, key: jax.Array) -> Params:
    """Random float32 parameters (normal, 0.02), for tests and for training from scratch."""
    return nnx.to_pure_dict(nnx.state(Decoder(arch, nnx.Rngs(key))))


@cache
def _structure(arch: Architecture):
    """The module without its arrays: graph definition and abstract state."""
    return nnx.split(jax.eval_shape(lambda: Decoder(arch, nnx.Rngs(0))))


def abstract_params(arch: Architecture, dtype: Any = F32) -> Params:
    """Shapes of the parameter tree, every leaf a `jax.ShapeDtypeStruct` of `dtype`."""
    tree = nnx.to_pure_dict(_structure(arch)[1])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def _module(arch: Architecture, params: Params) -> Decoder:
    graph, abstract = _structure(arch)
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: replace_by_pure_dict writes into it
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def check_length(arch: Architecture, length: int) -> None:
    """Refuse lengths that a dynamic RoPE would rescale: its angles depend on the whole sequence."""
    for rope in arch.rope:
        limit = rope.original_max_position_embeddings
        if rope.kind == "dynamic" and limit is not None and length > limit:
            raise ValueError(
                f"rope type 'dynamic' is supported up to {limit} tokens (max_position_embeddings); "
                f"this needs {length}"
            )


def check_mesh(arch: Architecture, mesh: Mesh) -> None:
    """Refuse, in one line, a mesh whose axes do not divide the heads or the matrices."""
    check_heads(arch.num_heads, mesh.shape)
    shardings(mesh, abstract_params(arch))


def head(arch: Architecture, params: Params) -> jax.Array:
    """The output matrix [V, D]: the embedding table itself where the two are tied."""
    return (params["model"]["embed_tokens"] if arch.tie_word_embeddings else params["lm_head"])[
        "weight"
    ]


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotary embedding in float32, Hugging Face's half-split convention."""
    x = x_BTNH.astype(F32)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    # Rounded before they are joined, which is the same and moves half the bytes.
    halves = (a * cos - b * sin).astype(x_BTNH.dtype), (b * cos + a * sin).astype(x_BTNH.dtype)
    return jnp.concatenate(halves, -1)


def _rope_tables(arch: Architecture, position_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every RoPE variant the layers use, [variants, B, T, H / 2]."""
    tables = []
    for rope in arch.rope:
        frequencies, factor = inverse_frequencies(rope, arch.head_dim)
        angle = position_BT.astype(F32)[..., None] * jnp.asarray(frequencies, F32)
        tables.append((jnp.cos(angle) * factor, jnp.sin(angle) * factor))
    cos, sin = zip(*tables, strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def _activation(x: jax.Array, name: str) -> jax.Array:
    if name == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


def _enter(arch: Architecture, params: Params, tokens_BT, position_BT, dtype):
    """The module, the embedded tokens [B, T, D], and per layer: window and RoPE tables."""
    model = _module(arch, params).model
    x_BTD = embedding.lookup(model.embed_tokens.weight[...], tokens_BT, dtype)
    if arch.embed_scale != 1.0:
        x_BTD = x_BTD * jnp.asarray(arch.embed_scale, dtype)
    cos, sin = _rope_tables(arch, position_BT)
    windows = jnp.asarray([w or NO_WINDOW for w in arch.windows], jnp.int32)
    variants = jnp.asarray(arch.rope_index, jnp.int32)

    def rope_of(variant):
        return (cos[variant], sin[variant]) if len(arch.rope) > 1 else (cos[0], sin[0])

    return model, constrain_rows(x_BTD), windows, variants, rope_of


def forward(
    arch: Architecture,
    params: Params,
    tokens_BT: jax.Array,
    where: Tokens,
    *,
    dtype: Any = F32,
    remat: str = "none",
    adapters: Adapters | None = None,
    attention: Kernel = "auto",
    reduce_dtype: Any = F32,
) -> jax.Array:
    """Hidden states after the final norm of packed rows, [B, T, D] in `dtype`.

    tokens_BT: int32 ids; where: segment, branch and position of each token (`attention.Tokens`).
    remat: none | dots | attention | full, what the backward pass computes again. adapters:
    `lora.bind`; they join layer by layer inside the scan. attention: which code computes it
    (`attention.attend`). reduce_dtype: in which devices sum the gradients of the layers' float32
    matrices. Padding (segment 0) yields finite, meaningless states.
    """
    options = (dtype, remat, adapters, attention, reduce_dtype)
    return _run(arch, params, tokens_BT, where, *options, lambda x_BTD: None)[0]


def states(
    arch: Architecture,
    params: Params,
    tokens_BT: jax.Array,
    where: Tokens,
    at_BP: jax.Array,
    *,
    dtype: Any = F32,
    attention: Kernel = "auto",
) -> jax.Array:
    """Hidden states of every layer at some positions of packed rows, [L + 1, B, P, D] in `dtype`.

    at_BP: indices in the row. As transformers' `output_hidden_states` has them: the embedding, what
    each layer but the last puts out, and the last after the final norm.
    """

    def keep(x_BTD):
        return jnp.take_along_axis(x_BTD, at_BP[..., None], axis=1)

    options = (dtype, "none", None, attention, F32)
    hidden_BTD, kept_LBPD = _run(arch, params, tokens_BT, where, *options, keep)
    return jnp.concatenate([kept_LBPD, keep(hidden_BTD)[None]])


def _run(arch, params, tokens_BT, where, dtype, remat, adapters, attention, reduce_dtype, keep):
    """Hidden states after the final norm, and what `keep` takes of each layer's input, stacked."""
    model, x_BTD, windows, variants, rope_of = _enter(
        arch, params, tokens_BT, where.position, dtype
    )

    def body(x_BTD, scanned):
        layer, window, variant, *low = scanned
        if reduce_dtype != F32:  # the products see matrices of that dtype, see `dot`
            layer = jax.tree.map(lambda w: w.astype(reduce_dtype) if w.ndim > 1 else w, layer)
        x_BTD = store(x_BTD, "input")

        def mix(q, k, v):
            scale, cap = arch.attention_scale, arch.attention_softcap
            return attend(q, k, v, where, window, scale, cap, kernel=attention), None

        joined = {} if adapters is None else adapters.of_layer(*low)
        return layer(x_BTD, arch, rope_of(variant), mix, joined)[0], keep(x_BTD)

    scanned = (model.layers, windows, variants)
    if adapters is not None:
        scanned += (adapters.layers(), jnp.arange(arch.num_layers))
    x_BTD, kept = lax.scan(recompute(body, remat), x_BTD, scanned)
    return model.norm(x_BTD, arch), kept


def logits(
    arch: Architecture, params: Params, hidden: jax.Array, adapter: LowRank | None = None
) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]; for a few positions, not a whole row."""
    weight = head(arch, params).astype(hidden.dtype)
    out = jnp.einsum("...D,VD->...V", hidden, weight, preferred_element_type=F32)
    if adapter is not None:
        out = out + adapter(hidden).astype(F32)
    return soft_cap(out, arch.final_softcap)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def empty_cache(arch: Architecture, batch: int, slots: int, dtype: Any) -> Cache:
    shape = (arch.num_layers, batch, arch.num_kv_heads, slots, arch.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def unstack(tree: Any, layers: int) -> Any:
    """A tuple of per-layer trees out of one whose leaves are stacked on axis 0."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(layers))


def unstack_layers(params: Params) -> Params:
    """The parameters with a tuple of layers in place of the stack, which `decode` runs unrolled.

    A scan copies each layer out of the stack before it multiplies, which on CPU costs a decode step
    as much as the products themselves (`benchmarks/decode_cpu.py` has the table). Compiling takes
    as many times longer as there are layers.
    """
    layers = params["model"]["layers"]
    count = len(jax.tree.leaves(layers)[0])
    return params | {"model": params["model"] | {"layers": unstack(layers, count)}}


def decode(
    arch: Architecture,
    params: Params,
    tokens_BT: jax.Array,
    position_BT: jax.Array,
    cache: Cache | tuple[Cache, ...],
    *,
    dtype: Any = F32,
) -> tuple[jax.Array, Any]:
    """Append T tokens to a cache and return their hidden states [B, T, D] and the new cache.

    Slot s of a row holds the token at position s, so position_BT says where to write; tokens of a
    row are contiguous and a row's first T may be right-padded: what lies past a row's length is
    overwritten before it is ever attended. The cache rides in the scan's carry, which XLA updates
    in place (as scanned input and output it would be copied). With params of `unstack_layers` the
    cache is a tuple too: one `Cache` [B, K, S, H] a layer, which `unstack` makes.
    """
    layers = params["model"]["layers"]
    unrolled = isinstance(layers, tuple)
    if unrolled:  # any one layer serves as pattern for the modules of all
        params = params | {"model": params["model"] | {"layers": layers[0]}}
    model, x_BTD, windows, variants, rope_of = _enter(arch, params, tokens_BT, position_BT, dtype)
    row_B11 = jnp.arange(tokens_BT.shape[0])[:, None, None]
    head_K1 = jnp.arange(arch.num_kv_heads)[:, None]
    slot_B1T = position_BT[:, None]

    def run(layer, x_BTD, cache, at, window, variant):
        """One layer; its keys and values are those of the cache at index `at`."""

        def mix(q, k, v):
            new = Cache(
                *(
                    old.at[(*at, row_B11, head_K1, slot_B1T)].set(
                        fresh.swapaxes(1, 2).astype(old.dtype), mode="drop"
                    )
                    for old, fresh in zip(cache, (k, v), strict=True)
                )
            )
            out = attend_cache(
                q,
                new.k[at].swapaxes(1, 2),
                new.v[at].swapaxes(1, 2),
                position_BT,
                window,
                arch.attention_scale,
                arch.attention_softcap,
            )
            return out, new

        return layer(x_BTD, arch, rope_of(variant), mix)

    if unrolled:
        news = []
        for i, (layer, old) in enumerate(zip(_modules(model.layers, layers), cache, strict=True)):
            x_BTD, new = run(layer, x_BTD, old, (), windows[i], variants[i])
            news.append(new)
        return model.norm(x_BTD, arch), tuple(news)

    def body(carry, scanned):
        layer, window, variant, index = scanned
        x_BTD, cache = carry
        return run(layer, x_BTD, cache, (index,), window, variant), None

    scanned = (model.layers, windows, variants, jnp.arange(arch.num_layers))
    (x_BTD, cache), _ = lax.scan(body, (x_BTD, cache), scanned)
    return model.norm(x_BTD, arch), cache


def _modules(pattern: Layer, trees: tuple[Params, ...]) -> list[Layer]:
    """A module like `pattern` for each parameter tree."""
    graph, abstract = nnx.split(pattern)
    modules = []
    for tree in trees:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, tree)
        modules.append(nnx.merge(graph, state))
    return modules
