"""GGUF files written with the gguf package, read back as the Hugging Face model they came from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer

from saro_jax.models import decoder, gguf, huggingface
from saro_jax.models.architecture import Rope, inverse_frequencies

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, WIDTH = 2, 64, 96, 4, 2, 16
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> tuple[list[str], list[str]]:
    """Special tokens, the 256 bytes in GPT-2's alphabet, and four merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["h e", "l l", "Ġ Ġ", "he ll"]
    merged = [pair.replace(" ", "") for pair in merges]
    return [*SPECIAL, "<think>", *sorted(ByteLevel.alphabet()), *merged], merges


TOKENS, MERGES = vocabulary()


def permute(data: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, `LlamaModel.permute`."""
    return (
        data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
        .swapaxes(1, 2)
        .reshape(data.shape)
    )


def write(
    file: Path,
    name: str = "llama",
    matrices: Kind = Kind.Q8_0,
    tied: bool = True,
    pre: str = "smollm",
    rope_factors: np.ndarray | None = None,
    skip: tuple[str, ...] = (),
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """Write a random model; returns the float32 tensors it holds, under Hugging Face keys."""
    writer = GGUFWriter(file, name)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * (len(TOKENS) - 4)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    rng = np.random.default_rng(1)
    truth: dict[str, np.ndarray] = {}

    def add(theirs: str, ours: str, *shape: int, heads: int | None = None) -> None:
        data = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 2 and matrices not in (Kind.F32, Kind.F16):
            packed = quantize(data, matrices)
            truth[ours] = dequantize(packed, matrices)
            if heads is not None and name == "llama":
                packed = permute(packed, heads)  # rows keep their blocks
            if theirs not in skip:
                writer.add_tensor(theirs, packed, raw_dtype=matrices)
            return
        if len(shape) == 2 and matrices == Kind.F16:
            data = data.astype(np.float16)
        truth[ours] = data
        if theirs not in skip:
            permuted = data if heads is None or name != "llama" else permute(data, heads)
            writer.add_tensor(theirs, permuted)

    add("token_embd.weight", "model.embed_tokens.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    if not tied:
        add("output.weight", "lm_head.weight", len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        old, new = f"blk.{i}.", f"model.layers.{i}."
        add(old + "attn_norm.weight", new + "input_layernorm.weight", HIDDEN)
        add(old + "ffn_norm.weight", new + "post_attention_layernorm.weight", HIDDEN)
        for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            key, rows = f"{new}self_attn.{letter}_proj", heads * WIDTH
            moved = None if letter == "v" else heads
            add(f"{old}attn_{letter}.weight", f"{key}.weight", rows, HIDDEN, heads=moved)
            if name == "qwen2":
                add(f"{old}attn_{letter}.bias", f"{key}.bias", rows)
            if name == "qwen3" and letter in "qk":
                norm = f"{new}self_attn.{letter}_norm.weight"
                add(f"{old}attn_{letter}_norm.weight", norm, WIDTH)
        add(old + "attn_output.weight", new + "self_attn.o_proj.weight", HIDDEN, HEADS * WIDTH)
        add(old + "ffn_gate.weight", new + "mlp.gate_proj.weight", MLP, HIDDEN)
        add(old + "ffn_up.weight", new + "mlp.up_proj.weight", MLP, HIDDEN)
        add(old + "ffn_down.weight", new + "mlp.down_proj.weight", HIDDEN, MLP)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("matrices", [Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.F32])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_that_were_quantised(
    tmp_path: Path, name: str, matrices: Kind, tied: bool
):
    file = tmp_path / "model.gguf"
    extra: dict[str, Any] = {"qwen3__attention__key_length": WIDTH} if name == "qwen3" else {}
    truth = write(file, name, matrices, tied, **extra)
    tensors = gguf.read_tensors(file)
    assert sorted(tensors) == sorted(truth)
    for key, value in truth.items():
        read = tensors[key].read()
        assert tensors[key].shape == read.shape and tensors[key].dtype == read.dtype == value.dtype
        np.testing.assert_array_equal(read, value, err_msg=key)
    arch = huggingface.load_architecture(file)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim) == (HEADS, KV_HEADS, WIDTH)
    assert arch.rms_norm_eps == 1e-5 and arch.rope == (Rope(theta=50000.0),)
    assert arch.tie_word_embeddings == tied and arch.vocab_size == len(TOKENS)
    assert (arch.bos_token_id, arch.eos_token_ids, arch.pad_token_id) == (1, (2,), 2)
    params = huggingface.load_params(file, arch, "float32")
    q = params["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_array_equal(q[1], truth["model.layers.1.self_attn.q_proj.weight"].T)
    assert set(params) == set(decoder.abstract_params(arch))


def test_the_conversion_is_a_hugging_face_folder(tmp_path: Path):
    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    truth = write(file, matrices=Kind.Q4_1)
    gguf.convert(file, folder)
    arch = huggingface.load_architecture(folder)
    assert arch == huggingface.load_architecture(file)
    params = huggingface.load_params(folder, arch, "float32")
    for path in (file, folder):  # an export needs no more than the source it came from
        out = tmp_path / f"out-{path.name}"
        huggingface.save(params, arch, path, out)
        from safetensors.numpy import load_file

        written = load_file(out / "model.safetensors")
        assert sorted(written) == sorted(truth)
        for key, value in truth.items():
            np.testing.assert_array_equal(written[key], value)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.chat_template == TEMPLATE
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_logits_are_those_of_transformers(tmp_path: Path):
    pytest.importorskip("torch", reason="transformers' models need torch")
    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    write(file, matrices=Kind.Q8_0)
    gguf.convert(file, folder)
    arch = huggingface.load_architecture(file)
    params = huggingface.load_params(file, arch, "float32")
    difference = huggingface.logits_match(folder, params, arch)
    assert difference is not None and difference < 3e-5  # of the largest logit, 30


def test_tokenizer(tmp_path: Path):
    file = tmp_path / "model.gguf"
    write(file)
    gguf.tokenizer(file).save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    pieces = tokenizer.tokenize("<|im_start|>hello<think>  12 é<|im_end|>")
    # Digits stand alone and are cut off first, so the two spaces before them stay together.
    expected = ["<|im_start|>", "hell", "o", "<think>", "ĠĠ", "1", "2", "Ġ", "Ã", "©", "<|im_end|>"]
    assert pieces == expected
    text = "naïve 日本 🙂 2024\n\n\t  x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("hello").input_ids == tokenizer.convert_tokens_to_ids(["hell", "o"])
    assert len(tokenizer) == len(TOKENS)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 256
    chat = [{"role": "user", "content": "he"}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he"


def test_a_tokenizer_that_adds_bos(tmp_path: Path):
    file = tmp_path / "model.gguf"
    write(file, pre="llama-bpe", tokenizer__ggml__add_bos_token=True)
    tokenizer = gguf.tokenizer(file)
    assert tokenizer("he").input_ids == [1, TOKENS.index("he")]
    assert tokenizer("he", add_special_tokens=False).input_ids == [TOKENS.index("he")]
    assert tokenizer.backend_tokenizer.model.ignore_merges is True


def test_the_splits_are_those_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert gguf._SPLITS["qwen2"] == PRETOKENIZE_REGEX


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_is_recognised_by_its_table(tmp_path: Path, factor: float):
    file = tmp_path / "model.gguf"
    rope = Rope("llama3", 50000.0, factor, 8192, 1.0, 4.0)
    plain, _ = inverse_frequencies(Rope(theta=50000.0), WIDTH)
    scaled, _ = inverse_frequencies(rope, WIDTH)
    write(file, rope_factors=plain / scaled)
    assert huggingface.load_architecture(file).rope == (rope,)
    write(file, rope_factors=np.full(WIDTH // 2, 3.0, np.float32))
    with pytest.raises(ValueError, match=r"neither Llama 3.1's nor 3.2's table"):
        gguf.read_config(file)


def test_rope_scaling_and_end_of_turn(tmp_path: Path):
    file = tmp_path / "model.gguf"
    keys: dict[str, Any] = {
        "qwen2__rope__scaling__type": "yarn",
        "qwen2__rope__scaling__factor": 4.0,
        "qwen2__rope__scaling__original_context_length": 64,
        "tokenizer__ggml__eot_token_id": 0,
    }
    write(file, "qwen2", **keys)
    arch = huggingface.load_architecture(file)
    assert arch.rope == (Rope("yarn", 50000.0, 4.0, 64),)
    assert arch.eos_token_ids == (2, 0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "gemma2"}, "general.architecture 'gemma2' is not supported; allowed: llama, qwen2"),
    ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported; allowed: gpt-2"),
    ({"llama__expert_count": 8}, "key llama.expert_count is not supported"),
    ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count 8 is not supported"),
    ({"llama__rope__scaling__type": "su"}, "rope.scaling.type 'su'; allowed: none, linear, yarn"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_is_not_understood_is_refused(tmp_path: Path, keys: dict[str, Any], message: str):
    file = tmp_path / "model.gguf"
    write(file, **keys)
    with pytest.raises(ValueError) as caught:
        gguf.convert(file, tmp_path / "out")
    assert message in str(caught.value) and str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_missing_tensor_and_a_broken_file_are_refused(tmp_path: Path):
    file = tmp_path / "model.gguf"
    write(file, skip=("blk.1.attn_v.weight",))
    arch = huggingface.load_architecture(file)
    with pytest.raises(ValueError, match=r"1 missing: model.layers.1.self_attn.v_proj.weight"):
        huggingface.load_params(file, arch, "float32")
    file.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf.read_config(file)
    write(file)
    whole = file.read_bytes()
    end = max(int(t.data_offset) for t in GGUFReader(file).tensors)
    file.write_bytes(whole[: end - 1000])
    with pytest.raises(ValueError, match="not a GGUF file, or truncated"):
        gguf.read_config(file)
