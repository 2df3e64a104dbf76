"""Owns the tiny random model, its tokenizer and rows that the training tests run on."""

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saro_jax import train
from saro_jax.data.tokenise import Branch, Item
from saro_jax.models import decoder, huggingface
from saro_jax.models.architecture import Architecture, from_hf

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
RECIPE = {
    "model": {"dtype": "float32", "remat": "none"},
    "data": {"max_length": 80},
    "train": {"steps": 2, "batch_rows": 4, "save_every": 100, "tensorboard": False},
    "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
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
    tree = decoder.init_params(arch, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, tree)


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


@cache
def folder() -> Path:
    """One folder a test session with model/, sft.jsonl, pairs.jsonl and recipe.yaml.

    Its programs are compiled once: tests run the same ones many times, in several processes.
    """
    root = Path(tempfile.mkdtemp(dir=Path(os.environ["SARO_JAX_CACHE"]).parent))
    write_model(root / "model")
    write_rows(root / "sft.jsonl", SFT)
    write_rows(root / "pairs.jsonl", PAIRS)
    recipe = RECIPE | {
        "model": RECIPE["model"] | {"path": str(root / "model")},
        "srpo": {"reference_cache": str(root / "reference")},
        "stages": {
            "rw": {"data": {"train": str(root / "sft.jsonl")}},
            "srpo": {"data": {"train": str(root / "pairs.jsonl")}},
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
