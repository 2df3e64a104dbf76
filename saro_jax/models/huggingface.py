"""Hugging Face checkpoints: read into the parameter tree, written back from it, bit for bit."""

import difflib
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from saro_jax.models import decoder, gguf, lora
from saro_jax.models.architecture import Architecture, from_hf
from saro_jax.models.attention import Tokens
from saro_jax.models.lora import Adapters
from saro_jax.models.weights import (
    Tensor,
    new_folder,
    read_folder,
    weight_files,
    write_file,
    write_folder,
)
from saro_jax.parallel import distributed

Params = dict[str, Any]
_LAYERS = "model.layers."
_TRANSPOSED = ("_proj.weight",)  # ours [in, out], the file's [out, in]
_TIED = ("lm_head.weight", "model.embed_tokens.weight")  # the first may repeat the second
# Buffers that old transformers saved: the frequencies follow from the config.
_IGNORABLE = (".rotary_emb.inv_freq",)
# What a model folder holds besides config.json and weights.
_KEPT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def load_architecture(path: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder or a .gguf file.

    `eos_token_ids` joins those of generation_config.json, which generation stops at (chat models
    often name their end of turn only there), and those of config.json.
    """
    path = Path(path)
    config = _config(path)
    where = str(path if path.suffix == ".gguf" else path / "config.json")
    generation = path / "generation_config.json"
    if generation.exists():
        eos = [*_ids(_read_json(generation).get("eos_token_id")), *_ids(config.get("eos_token_id"))]
        if eos:
            config = config | {"eos_token_id": list(dict.fromkeys(eos))}
    return from_hf(config, where)


def load_params(
    path: str | Path, arch: Architecture, dtype: Any, shardings: Any | None = None
) -> Params:
    """Read the weights of a Hugging Face folder or a .gguf file as the decoder's parameter tree.

    Every leaf is set exactly once and every key of the files is used, or it is a ValueError.
    `dtype`: of all leaves, or a tree like the parameters of `jax.ShapeDtypeStruct`.
    `shardings`: a tree like the parameters, of `jax.sharding.Sharding`; None puts every leaf on
    the default device. Of one leaf at a time the parts of this process' devices are filled, from a
    few rows of a tensor at a time: beyond those parts the host holds `weights.BLOCK` bytes (of a
    .gguf file, one tensor), and on a CPU the parts are the devices' own memory.
    """
    path = Path(path)
    tensors = gguf.read_tensors(path) if path.suffix == ".gguf" else read_folder(path)
    wanted = dtype if isinstance(dtype, dict) else decoder.abstract_params(arch, dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(wanted)
    keys = {_key(where): _file_keys(_key(where), leaf.shape) for where, leaf in leaves}
    _check(path, tensors, {_key(where): leaf.shape for where, leaf in leaves}, keys, arch)
    places = [None] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    out = []
    for (where, leaf), place in zip(leaves, places, strict=True):
        key = _key(where)
        out.append(_load_leaf(key, leaf, [tensors[name] for name in keys[key]], place))
    return tree.unflatten(out)


def _load_leaf(
    key: str, leaf: jax.ShapeDtypeStruct, tensors: list[Tensor], place: Sharding | None
) -> jax.Array:
    """The leaf on the devices of `place`, of one tensor or of one a layer."""
    stacked, transposed = key.startswith(_LAYERS), key.endswith(_TRANSPOSED)
    whole = {None: (slice(None),) * len(leaf.shape)}  # the default device
    indices = whole if place is None else place.addressable_devices_indices_map(leaf.shape)
    wanted = {  # what each device of this process holds, as (start, stop) of every axis
        device: tuple(axis.indices(size)[:2] for axis, size in zip(index, leaf.shape, strict=True))
        for device, index in indices.items()
        if index is not None
    }
    parts = {
        index: _aligned(tuple(stop - start for start, stop in index), np.dtype(leaf.dtype))
        for index in set(wanted.values())
    }
    for layer, tensor in enumerate(tensors):
        targets = []  # of this layer, in the order of axes that the file has: (index, array)
        for index, part in parts.items():
            if stacked:
                (first, last), *index = index
                if not first <= layer < last:
                    continue
                part = part[layer - first]
            targets.append((tuple(index)[::-1], part.T) if transposed else (tuple(index), part))
        start = min((index[0][0] for index, _ in targets), default=0)
        stop = max((index[0][1] for index, _ in targets), default=0)
        for at, block in tensor.blocks(start, stop):
            for ((first, last), *rest), target in targets:
                low, high = max(first, at), min(last, at + len(block))
                if low < high:
                    some = block[(slice(low - at, high - at), *(slice(*axis) for axis in rest))]
                    target[low - first : high - first] = some
    # On CPU the result may share these buffers, which nobody writes to again; XLA copies instead of
    # donating a buffer that it does not own.
    arrays = [jax.device_put(parts[index], device) for device, index in wanted.items()]
    if place is not None:
        arrays = [jax.make_array_from_single_device_arrays(leaf.shape, place, arrays)]
    return arrays[0].block_until_ready()


def save(
    params: Params,
    arch: Architecture,
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    chat_template: str | None = None,
    adapters: Adapters | None = None,
) -> None:
    """Write `params` as a Hugging Face folder that transformers, vLLM and llama.cpp read.

    Config, tokenizer, chat template and licence come from `source_folder` (or .gguf file), where
    the model was loaded from; `chat_template` (jinja text) replaces the template. `adapters` are
    merged into their matrices in float32, one at a time; one of a tied lm_head unties it, since it
    changes the output only. The folder appears whole at the end. In a multi-host run every process
    must call this; the first writes.
    """
    source, out = Path(source_folder), Path(out_folder)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} of the export; allowed: float32, bfloat16")
    expected = decoder.abstract_params(load_architecture(source), dtype)
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
        raise ValueError(f"{source}: the parameters do not have the shapes of this model")
    entries = list(_export(params, arch.num_layers, jnp.dtype(dtype), adapters))
    if jax.process_count() > 1 and jax.process_index() > 0:
        for *_, read in entries:
            read()  # takes part in gathering
    else:
        with new_folder(out) as partial:
            write_folder(partial, entries, max_shard_bytes)
            config = _config(source)
            for key in ("quantization_config", "_name_or_path"):
                config.pop(key, None)
            for key in {"torch_dtype", "dtype"} & config.keys() or {"torch_dtype"}:
                config[key] = dtype
            if any(key == _TIED[0] for key, *_ in entries):
                config["tie_word_embeddings"] = False
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _copy_files(source, partial)
            if chat_template is not None:  # transformers prefers this file to the tokenizer's key
                (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("saro_jax.models.huggingface.save")


def save_peft(adapters: Adapters, settings: dict[str, Any], out_folder: str | Path) -> None:
    """Write adapters as a folder that `peft.PeftModel.from_pretrained` puts on the base model.

    settings: `lora.peft_config`. Float32, one safetensors file. In a multi-host run every process
    must call this; the first writes.
    """
    entries = []
    for name, leaves in lora.matrices(adapters.tree):
        for which in ("lora_A", "lora_B"):
            leaf = leaves[which]
            layers = [None] if leaf.ndim == 2 else list(range(leaf.shape[0]))
            for layer in layers:
                place = name if layer is None else _layer_key(name, layer)
                read = _transposed(leaf, layer)
                key = f"base_model.model.{place}.{which}.weight"
                entries.append((key, leaf.shape[:-3:-1], np.dtype(np.float32), read))
    if jax.process_count() > 1 and jax.process_index() > 0:
        for *_, read in entries:
            read()
        return
    with new_folder(Path(out_folder)) as partial:
        write_file(partial / "adapter_model.safetensors", entries)
        (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _transposed(leaf: jax.Array, layer: int | None):
    return lambda: _to_host(leaf, layer).T.astype(np.float32)


def _layer_key(key: str, layer: int) -> str:
    return f"{_LAYERS}{layer}.{key.removeprefix(_LAYERS)}"


def weights_hash(path: str | Path) -> str:
    """BLAKE2b (32 hex digits) of the weight files of a folder, or of one file.

    The same weights split into other files hash differently.
    """
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
    return _hash_files(tuple((f.resolve(), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def weights_digest(path: str | Path) -> str:
    """What tells a model's files from others without reading them: names, sizes, the config."""
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size) for file in files]
    digest = hashlib.blake2b(repr((facts, _config(path))).encode(), digest_size=8)
    return (
        f"{len(files)} files of {sum(size for _, size in facts)} bytes, hash {digest.hexdigest()}"
    )


def logits_match(
    folder: str | Path,
    params: Params,
    arch: Architecture,
    tokens: list[int] | None = None,
    adapters: Adapters | None = None,
) -> float | None:
    """Largest difference between transformers' logits of `folder` and ours of `params`, in float32.

    As a share of the largest logit, or of 1 where all are smaller: what float32 rounds grows with
    them, and a trained model's are far above 1.
    `tokens` is the prompt, by default 32 ids spread over the vocabulary. None, with a warning,
    where torch is not installed. In a multi-host run every process must call this; the first
    compares, and all get what it found.
    """
    if jax.process_count() > 1:
        return _logits_match_together(folder, params, arch, tokens, adapters)
    theirs_TV = _their_logits(folder, tokens or _prompt(arch))
    if theirs_TV is None:
        return None
    ours_TV = _our_logits(params, arch, tokens or _prompt(arch), adapters)
    return _difference(np.asarray(ours_TV), theirs_TV)


def _difference(ours_TV: np.ndarray, theirs_TV: np.ndarray) -> float:
    return float(np.abs(ours_TV - theirs_TV).max() / max(1.0, np.abs(theirs_TV).max()))


def _prompt(arch: Architecture) -> list[int]:
    return [i * 7919 % arch.vocab_size for i in range(1, 33)]


def _logits_match_together(folder, params, arch, tokens, adapters) -> float | None:
    tokens = tokens or _prompt(arch)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    tree = None if adapters is None else adapters.tree

    def ours(params, tree):
        low = None if adapters is None else adapters._replace(tree=tree)
        return _our_logits(params, arch, tokens, low)

    # The first may find that torch is missing, so it looks before anyone computes.
    def theirs() -> list[Any] | None:
        found = _their_logits(folder, tokens)
        if found is not None:
            logits.append(found)
        return None if found is None else []

    logits: list[np.ndarray] = []
    if distributed.first("transformers", theirs) is None:
        return None
    with jax.set_mesh(mesh):
        ours_TV = jax.jit(ours, out_shardings=NamedSharding(mesh, PartitionSpec()))(params, tree)
    own = np.asarray(ours_TV.addressable_data(0))
    return distributed.first("logits", lambda: _difference(own, logits[0]))


def _their_logits(folder: str | Path, tokens: list[int]) -> np.ndarray | None:
    """[T, V] of transformers; None, with a warning, where torch is missing."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  (never needed to run)
        from transformers import AutoModelForCausalLM
    except ImportError:
        warnings.warn(f"{folder}: not compared with transformers: torch is missing", stacklevel=3)
        return None
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def _our_logits(params: Params, arch: Architecture, tokens: list[int], adapters) -> jax.Array:
    """[T, V] of this model, in float32."""
    tokens_BT = jnp.asarray([tokens], jnp.int32)
    ones = jnp.ones_like(tokens_BT)
    where = Tokens(ones, 0 * ones, jnp.arange(len(tokens), dtype=jnp.int32)[None])
    with jax.default_matmul_precision("highest"):
        hidden_BTD = decoder.forward(
            arch, params, tokens_BT, where, dtype=jnp.float32, adapters=adapters
        )
        head = None if adapters is None else adapters.of_head()
        return decoder.logits(arch, params, hidden_BTD, head)[0]


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(step.key for step in path)


def _file_keys(key: str, shape: tuple[int, ...]) -> list[str]:
    """The keys of a leaf in the files: one, or one a layer."""
    if not key.startswith(_LAYERS):
        return [key]
    return [f"{_LAYERS}{i}.{key.removeprefix(_LAYERS)}" for i in range(shape[0])]


def _check(
    path: Path,
    tensors: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    keys: dict[str, list[str]],
    arch: Architecture,
) -> None:
    expected = {}
    for key, shape in shapes.items():
        shape = shape[1:] if key.startswith(_LAYERS) else shape
        expected |= dict.fromkeys(
            keys[key], shape[::-1] if key.endswith(_TRANSPOSED) else tuple(shape)
        )
    extra = [key for key in tensors if key not in expected and not key.endswith(_IGNORABLE)]
    if arch.tie_word_embeddings and _TIED[0] in extra:
        extra.remove(_TIED[0])
        _check_tied(tensors)
    missing = [key for key in expected if key not in tensors]
    if missing or extra:
        parts = [_some("missing", missing, extra), _some("unexpected", extra, list(expected))]
        if missing == [_TIED[0]]:
            parts.append("tie_word_embeddings is false in the config")
        raise ValueError(f"{path}: " + "; ".join(part for part in parts if part))
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{tensors[key].file}: {key}: shape {list(tensors[key].shape)}, "
                f"expected {list(shape)}"
            )


def _some(what: str, keys: list[str], others: list[str]) -> str:
    if not keys:
        return ""
    near = difflib.get_close_matches(keys[0], others, 1)
    hint = f" (nearest: {near[0]})" if near else ""
    rest = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} {what}: {keys[0]}{hint}" + "".join(f", {k}" for k in keys[1:3]) + rest


def _check_tied(tensors: dict[str, Tensor]) -> None:
    head, table = (tensors.get(key) for key in _TIED)
    if head is None or table is None:
        return  # the table is reported as missing
    same = head.dtype == table.dtype and head.shape == table.shape
    both = zip(*(x.blocks(0, x.shape[0]) for x in (head, table)), strict=True)
    bits = (tuple(block.view(np.uint8) for _, block in pair) for pair in both)
    if not same or not all(np.array_equal(*pair) for pair in bits):
        raise ValueError(
            f"{head.file}: {_TIED[0]} differs from {_TIED[1]}, but the config says "
            "tie_word_embeddings: true"
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which JAX on CPU takes without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    data = np.empty(size + 64, np.uint8)
    start = -data.ctypes.data % 64
    return data[start : start + size].view(dtype).reshape(shape)


def _export(
    params: Params, layers: int, dtype: np.dtype, adapters: Adapters | None = None
) -> Iterator[tuple[str, Any, Any, Any]]:
    """(key, shape, dtype, read) of every tensor in the order of the layers, adapters merged in."""
    flat = {_key(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    stacked = [key for key in flat if key.startswith(_LAYERS)]
    low = {} if adapters is None else dict(lora.matrices(adapters.tree))

    def merged(key: str, data: np.ndarray, layer: int | None) -> np.ndarray:
        leaves = low.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if leaves is None or adapters is None:
            return data
        a, b = (_to_host(leaves[which], layer) for which in ("lora_A", "lora_B"))
        table = key == _TIED[0]  # [V, D], as the file has it: [out, in]
        summed = lora.merge(data.T if table else data, a, b, adapters.scale)
        return summed.T if table else summed

    def entry(key: str, file_key: str, layer: int | None, source: str | None = None):
        leaf = flat[source or key]
        transposed = key.endswith(_TRANSPOSED)
        shape = leaf.shape if layer is None else leaf.shape[1:]

        def read() -> np.ndarray:
            data = merged(key, _to_host(leaf, layer), layer)
            return (data.T if transposed else data).astype(dtype, copy=False)

        return file_key, tuple(shape[::-1] if transposed else shape), dtype, read

    first = [key for key in flat if key == _TIED[1]]
    last = [key for key in flat if key not in stacked and key not in first]
    for key in first:
        yield entry(key, key, None)
    for layer in range(layers):
        for key in stacked:
            yield entry(key, _layer_key(key, layer), layer)
    for key in last:
        yield entry(key, key, None)
    if "lm_head" in low and _TIED[0] not in flat:
        yield entry(_TIED[0], _TIED[0], None, source=_TIED[1])


def _to_host(x: jax.Array, layer: int | None) -> np.ndarray:
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = x if layer is None else x[layer]
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    # Part by part: the whole leaf exists neither on one device nor here.
    parts = {str(part.index): part for part in x.addressable_shards}.values()
    out = None
    for part in parts:
        index, data = part.index, part.data
        if layer is not None:  # on a CPU a view: nothing is copied, nothing compiled
            cpu = next(iter(data.devices())).platform == "cpu"
            data = np.asarray(data)[layer] if cpu else data[layer]
            index = index[1:]
        if len(parts) == 1:
            return np.asarray(data)
        if out is None:
            out = np.empty(x.shape if layer is None else x.shape[1:], x.dtype)
        out[index] = data
    assert out is not None
    return out


def _copy_files(source: Path, out: Path) -> None:
    if source.suffix == ".gguf":
        gguf.write_tokenizer(source, out)
        return
    for pattern in _KEPT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                target = out / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


@cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file, size, _ in files:
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _config(path: Path) -> dict[str, Any]:
    if path.suffix == ".gguf":
        return gguf.read_config(path)
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: no config.json; expected a Hugging Face model folder")
    return _read_json(path / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _ids(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
