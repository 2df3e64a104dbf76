"""Configs of every family, in transformers 4 and 5 spelling, against transformers' own reading."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from saro_jax.models.architecture import (
    SUPPORTED_MODEL_TYPES,
    Architecture,
    Rope,
    from_hf,
    inverse_frequencies,
)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def arch_of(model_type: str, **keys: Any) -> Architecture:
    return from_hf({"model_type": model_type, **keys})


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_an_empty_config_reads_as_the_defaults_of_transformers(model_type):
    assert arch_of(model_type) == from_hf(AutoConfig.for_model(model_type).to_dict())


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_fields_are_those_transformers_computes(model_type):
    sizes = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 640,
        "eos_token_id": [3, 5],
    }
    config: Any = AutoConfig.for_model(model_type, **sizes)
    arch = from_hf(config.to_dict())
    assert (arch.vocab_size, arch.hidden_size, arch.intermediate_size) == (99, 48, 80)
    assert (arch.num_layers, arch.num_heads, arch.num_kv_heads, arch.head_dim) == (7, 4, 2, 10)
    assert arch.rms_norm_eps == 1e-5 and arch.max_position_embeddings == 640
    assert arch.tie_word_embeddings == config.tie_word_embeddings
    assert arch.eos_token_ids == (3, 5)
    scale = getattr(config, "query_pre_attn_scalar", config.head_dim) ** -0.5
    assert arch.attention_scale == scale
    assert hash(arch) == hash(from_hf(config.to_dict()))


def test_head_dim_defaults():
    small: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    assert arch_of("llama", **small).head_dim == 8
    assert arch_of("qwen2", **small).head_dim == 8
    assert arch_of("qwen3", **small).head_dim == 128
    assert arch_of("gemma2", **small).head_dim == 256


def test_biases_and_norms_of_the_families():
    llama = arch_of("llama", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = arch_of("qwen2")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    qwen3 = arch_of("qwen3")
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.norm_plus_one) == (False, True, False)
    gemma2, gemma3 = arch_of("gemma2", hidden_size=2304), arch_of("gemma3_text")
    assert (gemma2.qk_norm, gemma2.norm_plus_one, gemma2.post_norms) == (False, True, True)
    assert gemma2.embed_scale == 48.0 and gemma2.hidden_act == "gelu_tanh"
    assert (gemma2.attention_softcap, gemma2.final_softcap) == (50.0, 30.0)
    assert (gemma3.attention_softcap, gemma3.final_softcap, gemma3.qk_norm) == (None, None, True)


def test_windows():
    def windows(model_type: str, **keys: Any) -> tuple[int, ...]:
        return arch_of(model_type, num_hidden_layers=4, **keys).windows

    assert windows("llama") == (0, 0, 0, 0)
    assert windows("mistral") == (4096,) * 4
    assert windows("mistral", sliding_window=None) == (0, 0, 0, 0)
    assert windows("qwen2", sliding_window=16, max_window_layers=2) == (0, 0, 0, 0)
    slides: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16}
    assert windows("qwen2", **slides, max_window_layers=2) == (0, 0, 16, 16)
    assert windows("qwen3", **slides) == (0, 0, 0, 0)  # max_window_layers 28
    types = ["sliding_attention", "full_attention"] * 2
    assert windows("qwen3", **slides, layer_types=types) == (16, 0, 16, 0)
    assert windows("gemma2", sliding_window=8) == (8, 0, 8, 0)
    gemma3 = arch_of("gemma3_text", num_hidden_layers=7, sliding_window=8)
    assert gemma3.windows == (8, 8, 8, 8, 8, 0, 8)
    assert gemma3.rope_index == (1, 1, 1, 1, 1, 0, 1)
    assert windows("gemma3_text", sliding_window=8, sliding_window_pattern=2) == (8, 0, 8, 0)


def test_rope_in_both_spellings():
    old = arch_of("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    new = arch_of(
        "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}
    )
    assert old == new and old.rope == (Rope("linear", 5e5, 2.0),)
    llama3 = arch_of(
        "llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", "type": "x"} | LLAMA3
    )
    assert llama3.rope == (Rope("llama3", 5e5, 8.0, 8192, 1.0, 4.0),)
    # Rows are limited to this length by the decoder.
    dynamic = arch_of(
        "llama",
        max_position_embeddings=512,
        rope_scaling={"type": "dynamic", "factor": 4.0},
    )
    assert dynamic.rope == (Rope("dynamic", 10000.0, 4.0, 512),)
    # yarn without its own length takes max_position_embeddings, or the key beside it.
    yarn = {"rope_type": "yarn", "factor": 4.0}
    inside = arch_of("qwen2", max_position_embeddings=100, rope_scaling=yarn)
    beside = arch_of("qwen2", rope_scaling=yarn, original_max_position_embeddings=50)
    assert inside.rope[0].original_max_position_embeddings == 100
    assert beside.rope[0].original_max_position_embeddings == 50


def test_gemma3_has_two_ropes():
    old = arch_of(
        "gemma3_text",
        rope_theta=3e6,
        rope_local_base_freq=2e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = arch_of(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    assert old == new
    assert old.rope == (Rope("linear", 3e6, 8.0), Rope("default", 2e4))
    assert arch_of("gemma3_text").rope == (Rope("default", 1e6), Rope("default", 1e4))


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_rope_equals_what_transformers_standardises(model_type):
    for keys in (
        {"rope_theta": 12345.0},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
    ):
        config = AutoConfig.for_model(model_type, **{k: _copy(v) for k, v in keys.items()})
        assert arch_of(model_type, **keys).rope == from_hf(config.to_dict()).rope


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.3},
    {"rope_type": "llama3"} | LLAMA3,
    {"rope_type": "llama3"} | LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 256},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
]


@pytest.mark.parametrize("entry", ROPES, ids=lambda e: "-".join(map(str, e.values())))
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_inverse_frequencies_are_those_of_transformers(entry, theta):
    pytest.importorskip("torch", reason="transformers computes RoPE with torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=dict(entry, rope_theta=theta),
    )
    theirs, theirs_factor = ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, "cpu")
    arch = from_hf(config.to_dict())
    ours, ours_factor = inverse_frequencies(arch.rope[0], arch.head_dim)
    assert ours.dtype == np.float32 and ours.shape == (64,)
    # float32 powers of the two libraries differ in the last bit; llama3's blend amplifies it.
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
    assert ours_factor == pytest.approx(theirs_factor, rel=1e-12)


def test_default_inverse_frequencies():
    ours, factor = inverse_frequencies(Rope(theta=10000.0), 8)
    np.testing.assert_allclose(ours, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert factor == 1.0


REFUSED = [
    ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral"),
    ({}, "model_type None is not supported"),
    ({"model_type": "gemma3", "text_config": {}}, "text-only"),
    ({"model_type": "llama", "attention_sinks": 4}, "unknown key 'attention_sinks' = 4"),
    ({"model_type": "llama", "rope_tetha": 1e6}, "did you mean 'rope_theta'?"),
    ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp 2"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ({"model_type": "llama", "sliding_window": 512}, "sliding_window 512"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"model_type": "llama", "hidden_size": 0}, "hidden_size 0 is not a positive integer"),
    ({"model_type": "llama", "num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
    ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}, "not a multiple"),
    ({"model_type": "llama", "head_dim": 7}, "head_dim 7 is odd"),
    ({"model_type": "llama", "rms_norm_eps": None}, "rms_norm_eps None"),
    ({"model_type": "llama", "rope_interleaved": True}, "rope_interleaved True"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias True"),
    ({"model_type": "mistral", "layer_types": ["full_attention"]}, "unknown key 'layer_types'"),
    ({"model_type": "qwen2", "use_mrope": True}, "use_mrope True"),
    ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 32}, "linear_attention"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "gemma2", "hidden_act": "silu"}, "contradicts hidden_activation"),
    ({"model_type": "llama", "rope_scaling": {"type": "longrope"}}, "'longrope' is not supported"),
    ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"model_type": "llama", "rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks low_freq"),
    (
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}},
        "unknown keys ['mscale']",
    ),
    (
        {"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.25}},
        "partial_rotary_factor 0.25",
    ),
    ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": -1}}, "factor -1"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, "full_attention"),
    ({"model_type": "llama", "per_layer_config": {"0": {}}}, "per_layer_config"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_would_change_the_forward_pass_is_refused(config, message):
    with pytest.raises(ValueError) as caught:
        from_hf(config, "a/config.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("a/config.json: ") and "\n" not in str(caught.value)


def test_what_leaves_the_forward_pass_alone_is_accepted():
    plain = arch_of("llama")
    keys: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "quantization_config": None,
        "rope_interleaved": False,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {}},
        "transformers_version": "4.42.3",
        "unheard_of": None,
        "use_cache": True,
    }
    assert arch_of("llama", **keys) == plain
