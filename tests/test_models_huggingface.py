"""Hugging Face folders: read leaf by leaf, refused by name, written back bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import import_memory
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saro_jax.models import decoder, huggingface
from saro_jax.models.architecture import from_hf

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3-tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "gemma2": {"model_type": "gemma2", "sliding_window": 6, "query_pre_attn_scalar": 12},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "final_logit_softcapping": 20.0,
    },
}


def make_folder(
    folder: Path,
    config: dict[str, Any] | None = None,
    dtype: Any = np.float32,
    shards: int = 1,
    extra: dict[str, np.ndarray] | None = None,
    scale: float = 1.0,
) -> dict[str, np.ndarray]:
    """A random normal model written without transformers; returns its tensors."""
    config = SIZES | {"model_type": "llama", "tie_word_embeddings": True} | (config or {})
    arch = from_hf(config)
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(decoder.abstract_params(arch))[0]:
        key = ".".join(step.key for step in path)
        shape = leaf.shape[::-1] if key.endswith("_proj.weight") else leaf.shape
        if not key.startswith("model.layers."):
            tensors[key] = (scale * rng.normal(size=shape)).astype(dtype)
            continue
        shape = shape[:-1] if key.endswith("_proj.weight") else shape[1:]
        for i in range(arch.num_layers):
            name = key.replace("model.layers.", f"model.layers.{i}.")
            tensors[name] = (scale * rng.normal(size=shape)).astype(dtype)
    tensors |= extra or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def read_all(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load(folder: Path, dtype: Any = "float32", shardings: Any = None):
    arch = huggingface.load_architecture(folder)
    return huggingface.load_params(folder, arch, dtype, shardings), arch


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape, key
        assert ours[key].tobytes() == value.tobytes(), key


def test_leaves_are_the_tensors_of_the_file(tmp_path: Path):
    tensors = make_folder(tmp_path, {"attention_bias": True}, shards=3)
    params, arch = load(tmp_path)
    model = params["model"]
    np.testing.assert_array_equal(
        model["embed_tokens"]["weight"], tensors["model.embed_tokens.weight"]
    )
    for i in range(arch.num_layers):
        head = f"model.layers.{i}."
        attention = model["layers"]["self_attn"]
        np.testing.assert_array_equal(
            attention["k_proj"]["weight"][i], tensors[head + "self_attn.k_proj.weight"].T
        )
        np.testing.assert_array_equal(
            attention["k_proj"]["bias"][i], tensors[head + "self_attn.k_proj.bias"]
        )
        np.testing.assert_array_equal(
            model["layers"]["input_layernorm"]["weight"][i],
            tensors[head + "input_layernorm.weight"],
        )
    expected = decoder.abstract_params(arch)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_import_and_export_keep_every_bit(tmp_path: Path, dtype: str, tied: bool, shards: int):
    numpy_dtype = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    source = tmp_path / "source"
    tensors = make_folder(source, {"tie_word_embeddings": tied}, numpy_dtype, shards)
    params, arch = load(source)  # master weights are float32
    out = tmp_path / "out"
    huggingface.save(params, arch, source, out, dtype, max_shard_bytes=2e4 if shards > 1 else 5e9)
    assert_same_bits(read_all(out), tensors)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (out / "model.safetensors.index.json").exists() == (shards > 1)
    again, _ = load(out)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, again))


def test_parameters_in_bfloat16(tmp_path: Path):
    tensors = make_folder(tmp_path / "source", dtype=ml_dtypes.bfloat16)
    params, arch = load(tmp_path / "source", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    huggingface.save(params, arch, tmp_path / "source", tmp_path / "out", "bfloat16")
    assert_same_bits(read_all(tmp_path / "out"), tensors)


def test_the_export_keeps_config_tokenizer_and_licence(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    make_folder(source, {"torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]})
    kept = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"chat_template": "a"}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool.jinja": "t",
        "generation_config.json": '{"eos_token_id": [7, 2]}',
        "LICENSE.txt": "l",
    }
    for name, text in {**kept, "README.md": "r", "pytorch_model.bin": "x"}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    params, arch = load(source)
    assert arch.eos_token_ids == (7, 2)
    huggingface.save(params, arch, source, out, "float32")
    for name, text in kept.items():
        assert (out / name).read_text() == text
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert written == {*kept, "config.json", "model.safetensors"}
    config = json.loads((out / "config.json").read_text())
    expected = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert config == expected
    huggingface.save(params, arch, source, tmp_path / "other", chat_template="new")
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "new"


def test_the_dtype_key_of_transformers_5_is_updated(tmp_path: Path):
    make_folder(tmp_path / "source", {"dtype": "float32"})
    params, arch = load(tmp_path / "source")
    huggingface.save(params, arch, tmp_path / "source", tmp_path / "out", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_an_export_never_touches_a_folder_with_something_in_it(tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    make_folder(source)
    params, arch = load(source)
    out.mkdir()
    huggingface.save(params, arch, source, out)
    with pytest.raises(ValueError, match=r"exists and is not an empty folder"):
        huggingface.save(params, arch, source, out)
    with pytest.raises(ValueError, match=r"dtype 'float16' of the export; allowed"):
        huggingface.save(params, arch, source, tmp_path / "x", "float16")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path / "source")
    params, arch = load(tmp_path / "source")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(huggingface, "_copy_files", fail)
    with pytest.raises(OSError, match="disk full"):
        huggingface.save(params, arch, tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path: Path):
    tensors = make_folder(tmp_path)
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.copy()}, tmp_path / "model.safetensors")
    params, arch = load(tmp_path)
    assert "lm_head" not in params
    huggingface.save(params, arch, tmp_path, tmp_path / "out")
    assert "lm_head.weight" not in read_all(tmp_path / "out")
    other = table.copy()
    other[3, 4] = np.nextafter(other[3, 4], np.float32(9))
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path)


def test_only_rotary_buffers_may_be_ignored(tmp_path: Path):
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    make_folder(tmp_path, extra={key: np.ones(4, np.float32)})
    load(tmp_path)
    make_folder(tmp_path, extra={"model.layers.0.self_attn.sinks": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match=r"1 unexpected: model.layers.0.self_attn.sinks"):
        load(tmp_path)


def message(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_keys_are_named_with_the_nearest(tmp_path: Path):
    tensors = make_folder(tmp_path)
    renamed = {key.replace("q_proj", "query"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    text = message(tmp_path)
    assert "3 missing: model.layers.0.self_attn.q_proj.weight" in text
    assert "(nearest: model.layers.0.self_attn.query.weight)" in text
    assert "3 unexpected: " in text
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "1 missing: model.norm.weight" in message(tmp_path)


def test_an_untied_head_that_is_missing_points_at_the_config(tmp_path: Path):
    tensors = make_folder(tmp_path, {"tie_word_embeddings": False})
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "tie_word_embeddings is false in the config" in message(tmp_path)


def test_shapes_that_differ_are_refused(tmp_path: Path):
    tensors = make_folder(tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    # The transpose has as many numbers: only the shape tells.
    save_file(tensors | {key: tensors[key].T.copy()}, tmp_path / "model.safetensors")
    assert message(tmp_path) == (
        f"{tmp_path / 'model.safetensors'}: {key}: shape [32, 48], expected [48, 32]"
    )


def test_broken_folders_are_refused_by_name(tmp_path: Path):
    make_folder(tmp_path, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    assert "model-00002-of-00002.safetensors: truncated" in message(tmp_path)
    second.write_bytes(b"<html>not found</html>")
    assert "not a safetensors file" in message(tmp_path)
    second.unlink()
    assert "1 of 2 files missing: model-00002-of-00002.safetensors" in message(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin has to be converted to safetensors first" in message(tmp_path)
    (tmp_path / "config.json").write_text("{\n'a': 1}")
    assert "config.json:2: not JSON" in message(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "no config.json" in message(tmp_path)


def test_an_integer_weight_is_refused(tmp_path: Path):
    tensors = make_folder(tmp_path)
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "model.norm.weight: dtype I8 is not supported" in message(tmp_path)


def test_weights_hash_follows_the_weights(tmp_path: Path):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b", {"torch_dtype": "float32"})
    first = huggingface.weights_hash(tmp_path / "a")
    assert len(first) == 32 and first == huggingface.weights_hash(tmp_path / "b")
    assert first == huggingface.weights_hash(tmp_path / "a" / "model.safetensors")
    file = tmp_path / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert first != huggingface.weights_hash(tmp_path / "b")


SHARDED = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
from pathlib import Path
import jax, numpy as np
from saro_jax.models import decoder, huggingface
from saro_jax.parallel.mesh import make_mesh
from saro_jax.parallel.sharding import shardings
folder = Path(sys.argv[1])
arch = huggingface.load_architecture(folder)
mesh = make_mesh(fsdp=2, tensor=2)
places = shardings(mesh, decoder.abstract_params(arch))
params = huggingface.load_params(folder, arch, "float32", places)
assert jax.tree.map(lambda x: x.sharding, params) == places
plain = huggingface.load_params(folder, arch, "float32")
# Updating in place must not reach the other array, nor a second device, through shared memory.
double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
jax.tree.map(np.testing.assert_array_equal, params, plain)
doubled = double(params)
jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * np.asarray(b)), doubled, plain)
huggingface.save(doubled, arch, folder, Path(sys.argv[2]))
"""

# Peak memory above the model itself while 200 MB of float32 are read from 100 MB of bfloat16.
MEMORY = """
import sys
from pathlib import Path
from saro_jax.models import huggingface
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
huggingface.load_params(sys.argv[1], huggingface.load_architecture(sys.argv[1]), "float32")
arch = huggingface.load_architecture(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
params = huggingface.load_params(sys.argv[2], arch, "float32")
print(status("VmHWM") - before)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
huggingface.save(params, arch, sys.argv[2], sys.argv[3], "bfloat16")
print(status("VmHWM") - before)
"""


def run(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sharded_leaves_hold_the_same_numbers(tmp_path: Path):
    tensors = make_folder(tmp_path / "source", {"tie_word_embeddings": False})
    run(SHARDED, tmp_path / "source", tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), {k: 2 * v for k, v in tensors.items()})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_loading_holds_the_model_and_one_tensor(tmp_path: Path):
    large = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "head_dim": 128}
    make_folder(tmp_path / "small")
    tensors = make_folder(
        tmp_path / "large", large | {"num_hidden_layers": 16}, ml_dtypes.bfloat16, shards=2
    )
    model = sum(2 * value.nbytes for value in tensors.values())
    largest = max(value.nbytes for value in tensors.values())
    assert model > 190e6
    loading, saving = map(
        int, run(MEMORY, tmp_path / "small", tmp_path / "large", tmp_path / "out").split()
    )
    assert loading < model + largest
    assert saving < 3 * largest  # the tensor rounded, and transposed
    assert_same_bits(read_all(tmp_path / "out"), tensors)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_a_mesh_is_loaded_shard_by_shard_and_saved_tensor_by_tensor(tmp_path: Path):
    small = {"vocab_size": 16032, "hidden_size": 512, "intermediate_size": 1792}
    config = import_memory.SHAPE | small | {"num_attention_heads": 16, "num_hidden_layers": 20}
    import_memory.write_checkpoint(tmp_path / "source", config, 4e7)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    mesh = {"fsdp": 2, "tensor": 4}
    found = import_memory.measure(tmp_path / "source", tmp_path / "out", mesh, "bfloat16")
    assert found["parameters"] > 160e6 and found["largest_leaf"] > 2 * found["largest_tensor"]
    assert found["loading"] < found["largest_tensor"]
    assert found["saving"] < 2 * found["largest_tensor"]
    source, out = read_all(tmp_path / "source"), read_all(tmp_path / "out")
    assert_same_bits(out, source)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str):
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SIZES | FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms and biases start at constants, which would hide a mix-up
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.5))
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="30KB")
    params, arch = load(source)
    difference = huggingface.logits_match(source, params, arch)
    assert difference is not None and difference < 2e-6  # of the largest logit, 13 at most
    huggingface.save(params, arch, source, out)
    assert_same_bits(read_all(out), read_all(source))
    assert huggingface.logits_match(out, params, arch) == difference


def test_logits_that_differ_are_seen(tmp_path: Path):
    pytest.importorskip("torch", reason="transformers' models need torch")
    make_folder(tmp_path)
    params, arch = load(tmp_path)
    norm = params["model"]["norm"]
    difference = huggingface.logits_match(tmp_path, params, arch, [5, 6, 7])
    assert difference is not None and difference < 2e-6  # of the largest logit, 13 at most
    # All logits times 1.1, the largest of which is above 1: a tenth of it.
    norm["weight"] = norm["weight"] * 1.1
    wrong = huggingface.logits_match(tmp_path, params, arch, [5, 6, 7])
    assert wrong == pytest.approx(0.1, rel=1e-3)


def test_logits_match_says_when_it_did_not_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path)
    params, arch = load(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.warns(UserWarning, match="not compared with transformers: torch is missing"):
        assert huggingface.logits_match(tmp_path, params, arch) is None
