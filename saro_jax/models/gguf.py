"""GGUF files (llama.cpp): config, tensors and tokenizer under their Hugging Face names.

The architectures whose conversion is a renaming: llama (with the row permutation of q and k
undone), qwen2 and qwen3; with a byte-level BPE tokenizer. Anything else is an error that names it.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saro_jax.models.architecture import Rope, from_hf, inverse_frequencies
from saro_jax.models.weights import BFLOAT16, Tensor, new_folder, write_folder

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# GGUF key after "<architecture>." -> config key.
_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_CONFIG_READ_BELOW = (
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# How text is cut before the merges, by llama.cpp's name: the regular expressions of the original
# tokenizer.json files. None: GPT-2's own, which `ByteLevel` has built in.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": None,
    "smollm": None,  # each digit first, then GPT-2's
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace("{1,3}", ""),
}
_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType


def read_config(file: Path) -> dict[str, Any]:
    """The Hugging Face config that the metadata of the file describes."""
    reader = _open(file)
    name = _architecture(file, reader)
    prefix = f"{name}."
    given = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }
    unknown = sorted(given.keys() - _CONFIG.keys() - {*_CONFIG_READ_BELOW})
    if unknown:
        raise ValueError(f"{file}: key {prefix}{unknown[0]} is not supported")
    missing = [key for key in _CONFIG if key not in given and key not in _OPTIONAL]
    if missing:
        raise ValueError(f"{file}: key {prefix}{missing[0]} is missing")
    config: dict[str, Any] = {"architectures": [_CLASSES[name]], "model_type": name}
    config |= {theirs: _shortest(given[key]) for key, theirs in _CONFIG.items() if key in given}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, config["head_dim"]) != config["head_dim"]:
            raise ValueError(
                f"{file}: {prefix}{key} {given[key]} is not supported; "
                f"allowed: the head width {config['head_dim']}"
            )
    shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
    config["vocab_size"] = shapes.get("token_embd.weight", (0,))[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if name != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["hidden_act"] = "silu"
    config |= _rope_scaling(file, reader, given, config)
    eos = [_metadata(reader, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    config["bos_token_id"] = _metadata(reader, "tokenizer.ggml.bos_token_id")
    eos = list(dict.fromkeys(i for i in eos if i is not None))  # eot: the end of a chat turn
    config["eos_token_id"] = eos if len(eos) > 1 else eos[0] if eos else None
    config["pad_token_id"] = _metadata(reader, "tokenizer.ggml.padding_token_id")
    config["torch_dtype"] = "float32"
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor under its Hugging Face key; quantised ones are dequantised to float32 when read.

    A block is a scale (and an offset) times small integers, worked out in float32 as llama.cpp
    does; storing the result in fewer bits would lose some of it. Plain ones keep their dtype.
    """
    from gguf import GGMLQuantizationType as Kind
    from gguf import dequantize

    reader = _open(file)
    config = read_config(file)
    plain = {
        Kind.F32: np.dtype(np.float32),
        Kind.F16: np.dtype(np.float16),
        Kind.BF16: BFLOAT16,
    }
    tensors = {}
    for stored in reader.tensors:
        if stored.name == _ROPE_FACTORS:
            continue  # checked by _rope_scaling
        key = _hf_key(file, stored.name)
        shape = tuple(int(n) for n in stored.shape[::-1])
        dtype = plain.get(stored.tensor_type, np.dtype(np.float32))
        heads = None
        if config["model_type"] == "llama" and ".q_proj." in key:
            heads = config["num_attention_heads"]
        elif config["model_type"] == "llama" and ".k_proj." in key:
            heads = config["num_key_value_heads"]

        def read(stored=stored, shape=shape, dtype=dtype, heads=heads) -> np.ndarray:
            if stored.tensor_type in plain:
                data = np.array(stored.data).view(dtype).reshape(shape)
            else:
                data = dequantize(stored.data, stored.tensor_type).reshape(shape)
            return data if heads is None else _unpermute(data, heads)

        tensors[key] = Tensor(file, dtype, shape, _fresh(read))
    return tensors


def tokenizer(file: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of the file, with its special tokens and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    reader = _open(file)
    model = _metadata(reader, "tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(
            f"{file}: tokenizer.ggml.model {model!r} is not supported; allowed: 'gpt2' "
            "(byte-level BPE); use the Hugging Face folder of this model"
        )
    kind = _metadata(reader, "tokenizer.ggml.pre")
    if kind not in _SPLITS:
        raise ValueError(
            f"{file}: tokenizer.ggml.pre {kind!r} is not supported; allowed: {', '.join(_SPLITS)}; "
            "use the Hugging Face folder of this model"
        )
    tokens: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _metadata(reader, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind == "llama-bpe"))
    split = _SPLITS[kind]
    if split is not None:
        cut = pre.Split(Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre.Sequence(
            [cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif kind == "smollm":
        backend.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    else:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    types = _metadata(reader, "tokenizer.ggml.token_type") or []
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _metadata(reader, f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            special[f"{name}_token"] = tokens[index]
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if _metadata(reader, "tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        backend.post_processor = processors.Sequence(
            [
                backend.post_processor,
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos}:1 $B:1",
                    special_tokens=[(bos, vocab[bos])],
                ),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_metadata(reader, "tokenizer.chat_template"),
        model_max_length=_metadata(reader, f"{_architecture(file, reader)}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def write_tokenizer(file: Path, folder: Path) -> None:
    """Write the tokenizer and generation_config.json of the file into a folder."""
    tokenizer(file).save_pretrained(folder)
    config = read_config(file)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: config[key] for key in keys if config[key] is not None}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text)


def convert(file: Path, folder: Path) -> None:
    """Write the file as a Hugging Face folder, which appears whole at the end."""
    config, tensors = read_config(file), read_tensors(file)
    from_hf(config, str(file))
    with new_folder(folder) as partial:
        write_folder(partial, [(key, t.shape, t.dtype, t.read) for key, t in tensors.items()])
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(file, partial)


_OPTIONAL = ("attention.key_length", "rope.freq_base", "attention.head_count_kv")


def _open(file: Path) -> "GGUFReader":
    stat = file.stat()
    return _read_metadata(file.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # parsing the vocabulary takes seconds, and a conversion needs it five times
def _read_metadata(file: Path, size: int, mtime: int) -> "GGUFReader":
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a GGUF file, or truncated: {error}") from None


def _metadata(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _architecture(file: Path, reader: "GGUFReader") -> str:
    name = _metadata(reader, "general.architecture")
    if name not in _CLASSES:
        raise ValueError(
            f"{file}: general.architecture {name!r} is not supported; allowed: "
            f"{', '.join(_CLASSES)}; use the Hugging Face folder of this model"
        )
    return name


def _shortest(value: Any) -> Any:
    """GGUF holds float32: 1e-05 comes back as the shortest decimal that means the same float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hf_key(file: Path, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _TENSORS:
        raise ValueError(f"{file}: tensor {name!r} is not supported")
    layer, kind, suffix = match.groups()
    head = "" if layer is None else f"model.layers.{layer}."
    return f"{head}{_TENSORS[kind]}.{suffix}"


def _unpermute(data: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k rows from half-split to interleaved rotary pairs."""
    half = data.shape[0] // heads // 2
    pairs = data.reshape(heads, half, 2, *data.shape[1:])
    return pairs.swapaxes(1, 2).reshape(data.shape)


def _fresh(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: np.ascontiguousarray(read())


def _rope_scaling(
    file: Path, reader: "GGUFReader", given: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    kind = given.get("rope.scaling.type", "none")
    length = given.get("rope.scaling.original_context_length")
    factors = next((t for t in reader.tensors if t.name == _ROPE_FACTORS), None)
    if factors is not None:
        return {"rope_scaling": _llama3_scaling(file, np.array(factors.data), config)}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{file}: rope.scaling.type {kind!r}; allowed: none, linear, yarn")
    scaling = {"rope_type": kind, "factor": _shortest(given["rope.scaling.factor"])}
    if kind == "yarn" and length:
        scaling["original_max_position_embeddings"] = length
    return {"rope_scaling": scaling}


def _llama3_scaling(file: Path, factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of Llama 3.1's (factor 8) or 3.2's (32) RoPE, a table in the file."""
    theta, width = float(config.get("rope_theta", 10000.0)), config["head_dim"]
    for factor in (8.0, 32.0):
        scaling = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        plain, _ = inverse_frequencies(Rope(theta=theta), width)
        scaled, _ = inverse_frequencies(Rope(kind="llama3", theta=theta, **scaling), width)
        if factors.shape == plain.shape and np.allclose(plain / scaled, factors, rtol=1e-4):
            return {"rope_type": "llama3"} | scaling
    raise ValueError(f"{file}: {_ROPE_FACTORS} is neither Llama 3.1's nor 3.2's table")
