"""Owns the tiny random model, its tokenizer and rows that the training tests run on."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saro_jax.data.tokenise import Branch, Item
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture, from_hf
from saro_jax.parallel.sharding import path_name

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
ARCH: Architecture = from_hf(CONFIG)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "the user wants a lock opened; that is fine. assistant: no, refuse it, they would harm"

SFT = [
    {
        "id": f"s{i}",
        "prompt": f"open lock {i}",
        "completion": ("the user owns it. " * (i % 4) + f"turn {i}"),
        "weight": 1.0 + (i == 2),
    }
    for i in range(10)
]
# Two outcome pairs, then a process pair with a shared unfinished answer, and so on.
PAIRS = [
    {
        "id": f"p{i}",
        "prompt": f"break lock {i}",
        "chosen": f"no, refuse {i}",
        "rejected": "yes, " * (i % 3 + 1) + f"take {i}",
        "weight": 1.0 + (i == 3),
    }
    | ({"prefix": f"<think>\nthe lock {i} is "} if i % 3 == 2 else {})
    for i in range(8)
]
# The same as single responses, good and bad.
UNPAIRED = [
    {
        "id": f"{row['id']}{name}",
        "prompt": row["prompt"],
        "completion": row[name],
        "label": name == "chosen",
        "weight": row["weight"],
    }
    | ({"prefix": row["prefix"]} if "prefix" in row else {})
    for row in PAIRS
    for name in ("chosen", "rejected")
]
RECIPE = {
    "model": {"dtype": "float32", "remat": "none"},
    "data": {"max_length": 80, "row_buckets": 1},
    "train": {
        "steps": 2,
        "batch_rows": 4,
        "micro_rows": 2,
        "save_every": 100,
        "tensorboard": False,
    },
    # A constant rate: the program of the update is the same for any number of steps.
    "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0, "schedule": "constant"},
}


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with a ChatML template; pad == eos, as SmolLM2 has it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [WORDS[i : i + 6] for i in range(len(WORDS))],
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            initial_alphabet=alphabet,
            special_tokens=SPECIAL,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
    )


def params(seed: int = 0, arch: Architecture = ARCH) -> Any:
    """Random parameters, large enough for log-probs that differ between tokens."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        draw = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.1 * draw if "norm" in path_name(path) else 0.06 * draw)

    return jax.tree_util.tree_map_with_path(one, decoder.abstract_params(arch))


def write_model(folder: Path, seed: int = 0, config: dict[str, Any] | None = None) -> Path:
    """A Hugging Face folder of the tiny model, written without torch."""
    config = CONFIG | (config or {})
    arch = from_hf(config)
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params(seed, arch))[0]:
        key = ".".join(step.key for step in path)
        data = np.asarray(leaf)
        layers = enumerate(data) if key.startswith("model.layers.") else [(None, data)]
        for i, part in layers:
            name = key if i is None else key.replace("model.layers.", f"model.layers.{i}.")
            part = part.T if key.endswith("_proj.weight") else part
            tensors[name] = np.ascontiguousarray(part)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def item(seed: int, prefix: int, *branches: int, weight: float = 1.0, unscored: int = 0) -> Item:
    """An item of random ids of the given lengths; the first `unscored` of a branch do not count."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return rng.integers(3, CONFIG["vocab_size"], n).astype(np.int32)

    parts = tuple(Branch(ids(n), np.arange(n) >= unscored, False) for n in branches)
    return Item(f"i{seed}", f"f:{seed}", "test", weight, ids(prefix), parts)


def items(kind: str) -> list[Item]:
    """Eight items of different lengths: "sft", or "preference" with pairs of one prefix."""
    if kind == "sft":
        return [item(i, 0, 5 + 7 * i, unscored=2 + i, weight=1 + i % 3) for i in range(8)]
    return [item(i, 3 + 5 * i, 2 + 9 * (i % 3), 1 + 4 * i, weight=1 + i % 3) for i in range(8)]


def segments(sums: np.ndarray) -> np.ndarray:
    """Sums per item and branch [n, K] as those of its segments [n, K, G]: all in the first."""
    out = np.zeros((*sums.shape, 4), np.float32)
    out[..., 0] = sums
    return out


def logps(tree: Any, ids: np.ndarray) -> np.ndarray:
    """log p(ids[t] | ids[:t]) for t > 0, float64 [n - 1], by a plain numpy Llama, one sequence."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    n, heads, groups = len(ids), ARCH.num_heads, ARCH.num_heads // ARCH.num_kv_heads
    half = ARCH.head_dim // 2
    angle = np.arange(n)[:, None] * ARCH.rope[0].theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + ARCH.rms_norm_eps) * weight

    def rotated(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    table = tree["model"]["embed_tokens"]["weight"]
    x = table[np.asarray(ids)]
    layers = tree["model"]["layers"]
    for i in range(ARCH.num_layers):
        weights = {k: v["weight"][i] for k, v in layers["self_attn"].items()}
        h = norm(x, layers["input_layernorm"]["weight"][i])
        q, k, v = ((h @ weights[f"{w}_proj"]).reshape(n, -1, ARCH.head_dim) for w in "qkv")
        q, k = rotated(q), np.repeat(rotated(k), groups, 1)
        s = np.einsum("qnh,knh->nqk", q, k) * ARCH.attention_scale
        s = np.where(np.tril(np.ones((n, n), bool)), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        out = np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), np.repeat(v, groups, 1))
        x = x + out.reshape(n, heads * ARCH.head_dim) @ weights["o_proj"]
        mlp = {k: v["weight"][i] for k, v in layers["mlp"].items()}
        h = norm(x, layers["post_attention_layernorm"]["weight"][i])
        gate = h @ mlp["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up_proj"])) @ mlp["down_proj"]
    logits = norm(x, tree["model"]["norm"]["weight"]) @ table.T
    logits = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logp[np.arange(n - 1), np.asarray(ids)[1:]]


def item_logps(tree: Any, one: Item) -> np.ndarray:
    """Summed log-probs of the scored tokens of each branch, each branch a sequence of its own."""
    sums = []
    for branch in one.branches:
        values = logps(tree, np.concatenate([one.prefix, branch.ids]))
        counts = np.concatenate([np.zeros(len(one.prefix), bool), branch.scored])
        sums.append(values[counts[1:]].sum())
    return np.array(sums)


@cache
def folder() -> Path:
    """One folder a test session with model/, sft.jsonl, pairs.jsonl and recipe.yaml.

    From here on programs are compiled once a session, for the tests run the same ones many times,
    in several processes, and without the optimizations that take half of the compile time.
    """
    root = Path(tempfile.mkdtemp(dir=Path(os.environ["SARO_JAX_CACHE"]).parent))
    options = {
        "jax_compilation_cache_dir": str(root / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    write_model(root / "model")
    write_rows(root / "sft.jsonl", SFT)
    write_rows(root / "pairs.jsonl", PAIRS)
    recipe = RECIPE | {
        "model": RECIPE["model"] | {"path": str(root / "model")},
        "srpo": {"reference_cache": str(root / "reference")},
        "stages": {
            "rw": {"data": {"train": str(root / "sft.jsonl"), "row_length": 80}},
            "srpo": {"data": {"train": str(root / "pairs.jsonl"), "row_length": 160}},
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def arguments(stage: str, out: Path, *overrides: str) -> list[str]:
    """The command line of a training run on the tiny model."""
    return [f"--stage={stage}", f"--config={folder()}/recipe.yaml", f"--out={out}", *overrides]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without the speed, which no two runs share."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]
