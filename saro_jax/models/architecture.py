"""Architecture: the shape and the switches of a decoder, read from a Hugging Face config."""

import difflib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# What each supported model_type reads, with the value transformers takes where the file omits the
# key (its configuration classes). "head_dim" None means hidden_size / num_attention_heads.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MISTRAL = {key: value for key, value in _LLAMA.items() if key[-5:] != "_bias"} | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = {key: value for key, value in _LLAMA.items() if key[-5:] != "_bias"} | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN3 = _QWEN2 | {"head_dim": 128, "attention_bias": False}
_GEMMA2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "_sliding_window_pattern": None,
    "rope_local_base_freq": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
}
SUPPORTED_MODEL_TYPES = tuple(_DEFAULTS)
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")

# Keys that do not change the forward pass of these models. attention_dropout is a training-time
# regulariser: fine-tuning here runs without dropout, as reference implementations do.
_NO_EFFECT = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path
    _commit_hash initializer_range use_cache attention_dropout tokenizer_class
    output_attentions output_hidden_states return_dict use_return_dict torchscript use_bfloat16
    attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _flash_attn_2_enabled chunk_size_feed_forward
    id2label label2id num_labels problem_type finetuning_task
    task_specific_params tf_legacy_loss prefix sep_token_id decoder_start_token_id
    temperature top_k top_p typical_p min_p epsilon_cutoff eta_cutoff repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores output_logits return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    max_length min_length max_new_tokens cache_implementation renormalize_logits
    is_llama_config transformers.js_config unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905  (a list literal would be laid out one word a line)
)
# Keys that would change the forward pass: accepted only with the value that leaves it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "sliding_window": (),
    "use_sliding_window": (False,),
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Keys of one RoPE entry besides rope_theta, rope_type, type and partial_rotary_factor.
_ROPE_KIND_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of some layers, in Hugging Face's names.

    `original_max_position_embeddings` is the length the frequencies were trained for (llama3 and
    yarn); for `dynamic` it is the longest row for which the frequencies are those of `default`,
    and a longer row must be refused.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Architecture:
    """What the one decoder needs to know of a model; hashable, so it can be a static argument.

    `windows[i]` is 0 for full attention, else how many keys a query of layer i sees, itself
    included. `rope[rope_index[i]]` is the rotary embedding of layer i. `embed_scale` is exact: the
    decoder rounds it to the compute dtype, as transformers does.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_plus_one: bool
    post_norms: bool
    embed_scale: float
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    windows: tuple[int, ...]
    rope: tuple[Rope, ...]
    rope_index: tuple[int, ...]
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def from_hf(config: dict[str, Any], where: str = "config.json") -> Architecture:
    """Read a Hugging Face config (transformers 4 or 5 keys) into an Architecture.

    A key that is neither mapped, nor known to leave the forward pass alone, nor at its neutral
    value is a ValueError that names it: no model is ever run approximately. `where` opens errors.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        raise ValueError(
            f"{where}: model_type 'gemma3' is the multimodal model; only text-only checkpoints, "
            "model_type 'gemma3_text', are supported"
        )
    if model_type not in _DEFAULTS:
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    defaults = _DEFAULTS[model_type]
    _check_keys(config, model_type, where)
    read: dict[str, Any] = {key: config.get(key, default) for key, default in defaults.items()}
    gemma = model_type in ("gemma2", "gemma3_text")

    sizes = {
        key: _positive_int(read, key, where)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    }
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if read["num_key_value_heads"] is None:
        read["num_key_value_heads"] = heads
    kv_heads = _positive_int(read, "num_key_value_heads", where)
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if read["head_dim"] is None:
        if hidden % heads:
            raise ValueError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )
        read["head_dim"] = hidden // heads
    head_dim = _positive_int(read, "head_dim", where)
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need it even")

    act_key = "hidden_activation" if gemma else "hidden_act"
    if gemma and (config.get("hidden_act") or read[act_key]) != read[act_key]:
        raise ValueError(
            f"{where}: hidden_act {config['hidden_act']!r} contradicts "
            f"hidden_activation {read[act_key]!r}"
        )
    if read[act_key] not in _ACTIVATIONS:
        raise ValueError(
            f"{where}: {act_key} {read[act_key]!r} is not supported; "
            f"supported: {', '.join(_ACTIVATIONS)}"
        )
    rope, rope_index, windows = _layers(config, read, model_type, where)
    bias = bool(read.get("attention_bias"))
    eos = read["eos_token_id"]
    return Architecture(
        model_type=model_type,
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(read["rms_norm_eps"], "rms_norm_eps", where),
        hidden_act=_ACTIVATIONS[read[act_key]],
        tie_word_embeddings=bool(read["tie_word_embeddings"]),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=bool(read.get("mlp_bias")),
        qk_norm=model_type in ("qwen3", "gemma3_text"),
        norm_plus_one=gemma,
        post_norms=gemma,
        embed_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=_positive(
            read.get("query_pre_attn_scalar", head_dim), "query_pre_attn_scalar", where
        )
        ** -0.5,
        attention_softcap=_softcap(read, "attn_logit_softcapping", where),
        final_softcap=_softcap(read, "final_logit_softcapping", where),
        windows=windows,
        rope=rope,
        rope_index=rope_index,
        max_position_embeddings=sizes["max_position_embeddings"],
        bos_token_id=read["bos_token_id"],
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=read["pad_token_id"],
    )


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each rotary pair, float32 [head_dim/2], and the factor on cos and sin.

    The float32 arithmetic of transformers' `modeling_rope_utils`, step by step.
    """
    base = np.float32(rope.theta)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / base**exponent
    if rope.kind in ("default", "dynamic"):
        return inverse, 1.0
    factor = np.float32(rope.factor)
    if rope.kind == "linear":
        return inverse / factor, 1.0
    length = rope.original_max_position_embeddings
    assert length is not None
    if rope.kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        assert low is not None and high is not None
        wavelength = np.float32(2 * math.pi) / inverse
        smooth = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
        blended = (np.float32(1) - smooth) * inverse / factor + smooth * inverse
        scaled = np.where(wavelength > length / low, inverse / factor, blended)
        return np.where(wavelength < length / high, inverse, scaled).astype(np.float32), 1.0
    assert rope.kind == "yarn", rope.kind

    def correction_dim(rotations: float) -> float:
        turns = math.log(length / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(ramp, 0, 1)
    slow = np.float32(1.0) / (factor * base**exponent)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    elif scale is None:
        scale = _mscale(rope.factor, 1.0)
    return (slow * (np.float32(1) - keep) + inverse * keep).astype(np.float32), float(scale)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _check_keys(config: dict[str, Any], model_type: str, where: str) -> None:
    defaults = _DEFAULTS[model_type]
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{where}: quantization_config = {config['quantization_config']!r}: a quantised "
            "checkpoint cannot be trained; give the unquantised model"
        )
    for key, value in config.items():
        if key in defaults or key in _ROPE_KEYS or key in _NO_EFFECT or value is None:
            continue
        if key == "hidden_act" and "hidden_activation" in defaults:  # compared by from_hf
            continue
        if key in _NEUTRAL:
            if value in _NEUTRAL[key]:
                continue
            allowed = ", ".join(map(repr, (None, *_NEUTRAL[key])))
            raise ValueError(
                f"{where}: {key} {value!r} is not supported for model_type {model_type!r}; "
                f"allowed: {allowed}"
            )
        known = [*defaults, *_ROPE_KEYS, *_NEUTRAL, *_NO_EFFECT]
        near = difflib.get_close_matches(key, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"{where}: unknown key {key!r} = {value!r} for model_type {model_type!r}{hint}; it may "
            "change the forward pass, so the model is refused"
        )


def _layers(
    config: dict[str, Any], read: dict[str, Any], model_type: str, where: str
) -> tuple[tuple[Rope, ...], tuple[int, ...], tuple[int, ...]]:
    """The rotary embeddings, and per layer which one it uses and its attention window."""
    count, window = read["num_hidden_layers"], read.get("sliding_window")
    if model_type == "mistral":
        sliding = [window is not None] * count
    elif read.get("layer_types") is not None:
        types = read["layer_types"]
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if len(types) != count or unknown:
            raise ValueError(
                f"{where}: layer_types has {len(types)} entries of {sorted(set(types))}; expected "
                f"{count} of 'full_attention' or 'sliding_attention'"
            )
        sliding = [kind == "sliding_attention" for kind in types]
    elif model_type == "gemma2":
        sliding = [bool((i + 1) % 2) for i in range(count)]
    elif model_type == "gemma3_text":
        pattern = read["_sliding_window_pattern"] or read["sliding_window_pattern"]
        sliding = [bool((i + 1) % pattern) for i in range(count)]
    elif read.get("use_sliding_window"):
        sliding = [window is not None and i >= read["max_window_layers"] for i in range(count)]
    else:
        sliding = [False] * count
    if model_type in ("qwen2", "qwen3") and not read["use_sliding_window"]:
        window = None
    if any(sliding):
        if window is None:
            raise ValueError(f"{where}: layer_types has 'sliding_attention' but no sliding_window")
        _positive_int({"sliding_window": window}, "sliding_window", where)
    windows = tuple(int(window or 0) if slides else 0 for slides in sliding)

    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if model_type != "gemma3_text":
        # As transformers: rope_scaling wins over rope_parameters, rope_theta inside over outside.
        rope = _rope(scaling or parameters or {}, config, 10000.0, read, where)
        return (rope,), (0,) * count, windows
    nested = {key: dict((parameters or {}).get(key) or {}) for key in _GEMMA3_ROPES}
    stray = sorted(set(parameters or {}) - set(_GEMMA3_ROPES))
    if stray:
        raise ValueError(
            f"{where}: rope_parameters has {stray}; for model_type 'gemma3_text' it holds "
            f"{' and '.join(map(repr, _GEMMA3_ROPES))}"
        )
    nested["full_attention"] |= scaling or {}
    local = {"rope_theta": config.get("rope_local_base_freq")}
    ropes = (
        _rope(nested["full_attention"], config, 1_000_000.0, read, where),
        _rope(nested["sliding_attention"], local, 10000.0, read, where),
    )
    return ropes, tuple(int(slides) for slides in sliding), windows


_GEMMA3_ROPES = ("full_attention", "sliding_attention")


def _rope(
    entry: dict[str, Any], outer: dict[str, Any], theta: float, read: dict[str, Any], where: str
) -> Rope:
    kind = entry.get("rope_type", entry.get("type")) or "default"
    if kind not in _ROPE_KIND_KEYS:
        raise ValueError(
            f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KIND_KEYS)}"
        )
    common = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    values = {key: value for key, value in entry.items() if value is not None}
    # Files carry the length of pre-training whatever the kind; only llama3 and yarn read it.
    unknown = sorted(
        set(values) - {*common, *_ROPE_KIND_KEYS[kind], "original_max_position_embeddings"}
    )
    if unknown:
        raise ValueError(f"{where}: RoPE of type {kind!r} has unknown keys {unknown}")
    if values.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"{where}: partial_rotary_factor {values['partial_rotary_factor']!r} is not supported; "
            "allowed: 1"
        )
    given = {key: values[key] for key in _ROPE_KIND_KEYS[kind] if key in values}
    length = read["max_position_embeddings"]
    if kind == "dynamic":
        given["original_max_position_embeddings"] = length
    elif kind in ("llama3", "yarn"):
        outside = outer.get("original_max_position_embeddings")
        given.setdefault("original_max_position_embeddings", length)
        if outside is not None:
            given["original_max_position_embeddings"] = outside
    if kind == "yarn":  # transformers takes 0 for unset here
        for key in ("beta_fast", "beta_slow"):
            if not given.get(key):
                given.pop(key, None)
        given.setdefault("factor", length / given["original_max_position_embeddings"])
    required = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ("factor",))
    missing = [key for key in required if key not in given and kind != "default"]
    if missing:
        raise ValueError(f"{where}: RoPE of type {kind!r} lacks {', '.join(missing)}")
    for key in set(given) - {"truncate"}:
        _positive(given[key], f"RoPE {key}", where)
    theta = values.get("rope_theta") or outer.get("rope_theta") or theta
    return Rope(kind=kind, theta=_positive(theta, "rope_theta", where), **given)


def _softcap(read: dict[str, Any], key: str, where: str) -> float | None:
    return None if read.get(key) is None else _positive(read[key], key, where)


def _positive(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{where}: {key} {value!r} is not a positive number")
    return float(value)


def _positive_int(read: dict[str, Any], key: str, where: str) -> int:
    value = read[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} {value!r} is not a positive integer")
    return value
