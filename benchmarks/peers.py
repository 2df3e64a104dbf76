"""Trains a job of train_cpu.py with TRL or google-tunix: runs in the peer's interpreter.

`python peers.py versions trl|tunix` prints the versions of its packages, `python peers.py matmul`
torch's GFLOP/s, `python peers.py train JOB.json` trains. Nothing of saro_jax is imported here.

TRL reads the rows of `rows` (prompt, completion, chosen, rejected as messages) and lays them out
itself, with its reference log-probs precomputed. google-tunix gets the token ids of `tokens`, which
saro_jax's tokeniser made of the same rows: it has no chat template of its own. Its inputs have one
static shape (else every step would compile): all rows are padded to the longest row of the run;
a pair's prompt and its shared reasoning to the longest of them on the left, its branches on the
right. It scores the reference in every step. Its Llama ignores `rope_theta`; the model is given
the right one here, so that the loss can be compared.
"""

import json
import os
import sys
import time
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGES = {"trl": ("trl", "transformers", "torch"), "tunix": ("google-tunix", "jax", "flax")}
DISTANT = 10**9  # steps: never


def main() -> None:
    command = sys.argv[1]
    if command == "versions":
        from importlib.metadata import version

        peer = sys.argv[2]
        import_module("trl" if peer == "trl" else "tunix")
        print(json.dumps({name: version(name) for name in PACKAGES[peer]}))
    elif command == "matmul":
        print(json.dumps(torch_matmul()))
    else:
        job = json.loads(Path(sys.argv[2]).read_text())
        result = {"trl": train_trl, "tunix": train_tunix}[job["peer"]](job)
        out = Path(job["out"])
        out.mkdir(parents=True, exist_ok=True)
        (out / "steps.json").write_text(json.dumps(result))


def read_lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def torch_matmul(rows: int = 1024, inner: int = 576, columns: int = 1536) -> dict[str, float]:
    """GFLOP/s of torch on the product that harness.matmul_speed measures with XLA."""
    torch: Any = import_module("torch")
    found = {}
    for name in ("bfloat16", "float32"):
        a = torch.ones(rows, inner, dtype=getattr(torch, name))
        b = torch.ones(columns, inner, dtype=getattr(torch, name))
        best, end = float("inf"), time.perf_counter() + 1.0
        while (start := time.perf_counter()) < end:
            for _ in range(8):
                torch.nn.functional.linear(a, b)
            best = min(best, (time.perf_counter() - start) / 8)
        found[f"torch_{name}_gflop_s"] = 2 * rows * inner * columns / best / 1e9
    return found


# ---- TRL -----------------------------------------------------------------------------------------


def train_trl(job: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer or DPOTrainer; {"refused": why} for an option that TRL switches off again."""
    datasets: Any = import_module("datasets")
    transformers: Any = import_module("transformers")
    trl: Any = import_module("trl")

    class Clock(transformers.TrainerCallback):
        ends: list[float] = []  # noqa: RUF012 (one trainer a process)

        def on_train_begin(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    rows = read_lines(job["rows"])
    for row in rows:
        prefix = row.pop("prefix", "")
        for key in {"chosen", "rejected"} & row.keys():
            row[key][0]["content"] = prefix + row[key][0]["content"]
    options = dict(job["options"])
    micro = min(options.pop("micro", job["batch"]), job["batch"])
    common = {
        "output_dir": job["out"],
        "use_cpu": True,
        "bf16": job["dtype"] == "bfloat16",  # autocast over float32 weights, as saro_jax has them
        "max_steps": job["steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job["batch"] // micro,
        "max_length": job["max_length"],
        "learning_rate": 1e-6,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job["stage"] == "rw":
        if options.get("padding_free"):  # TRL wants it so; prepare() keeps longer rows out
            common["max_length"] = None
        trainer_class, config = trl.SFTTrainer, trl.SFTConfig(**common | options)
    else:
        trainer_class = trl.DPOTrainer
        config = trl.DPOConfig(**common | options, precompute_ref_log_probs=True)
    clock = Clock()
    trainer = trainer_class(
        model=job["model"],
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[clock],
    )
    if options.get("padding_free") and not trainer.padding_free:
        return {"refused": "TRL says it is unavailable in this version and switches it off"}
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    total = [0, *(int(line["num_tokens"]) for line in logs)]
    return {
        "tokens": [b - a for a, b in pairwise(total)],
        "seconds": [b - a for a, b in pairwise(clock.ends)],
        "loss": [line["loss"] for line in logs],
    }


# ---- google-tunix --------------------------------------------------------------------------------


def train_tunix(job: dict[str, Any]) -> dict[str, Any]:
    """PeftTrainer or DPOTrainer on the model's own weights, in the dtype of the job."""
    jax: Any = import_module("jax")
    optax: Any = import_module("optax")
    llama: Any = import_module("tunix.models.llama3.model")
    params: Any = import_module("tunix.models.llama3.params")
    sft: Any = import_module("tunix.sft.peft_trainer")
    dpo: Any = import_module("tunix.sft.dpo.dpo_trainer")
    hooks: Any = import_module("tunix.sft.hooks")

    options = dict(job["options"])
    micro = min(options.pop("micro", job["batch"]), job["batch"])
    hf = json.loads((Path(job["model"]) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
        remat_config=llama.RematConfig[options.pop("remat", "DECODER")],
    )
    # Attention calls apply_rope without the config's theta and so with the default of 1,000,000.
    llama.apply_rope = partial(llama.apply_rope, rope_theta=config.rope_theta)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    load = partial(params.create_model_from_safe_tensors, job["model"], config, mesh)
    losses: list[Any] = []
    ends: list[float] = []

    class Clock(hooks.TrainingHooks):
        """Tunix calls the end of a step when it has fetched its loss, after starting the next."""

        def on_train_start(self, train_ctx):
            ends.append(time.perf_counter())

        def on_train_end(self, train_ctx):
            pass

        def on_train_step_start(self, train_ctx):
            pass

        def on_train_step_end(self, train_ctx, train_step, train_loss):
            losses.append(float(train_loss))
            ends.append(time.perf_counter())

        def on_eval_step_start(self, train_ctx):
            pass

        def on_eval_step_end(self, train_ctx, eval_loss):
            pass

    common = {
        "eval_every_n_steps": DISTANT,
        "max_steps": job["steps"],
        "gradient_accumulation_steps": job["batch"] // micro if micro < job["batch"] else None,
    }
    items = read_lines(job["tokens"])
    # The optimizer of the other two: AdamW behind a clip by the global norm.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    with jax.set_mesh(mesh):
        if job["stage"] == "rw":
            trainer = sft.PeftTrainer(
                load(dtype=job["dtype"]), optimizer, sft.TrainingConfig(**common)
            )
            trainer = trainer.with_gen_model_input_fn(tunix_inputs)
        else:
            trainer = dpo.DPOTrainer(
                model=load(dtype=job["dtype"]),
                ref_model=load(dtype=job["dtype"]),
                optimizer=optimizer,
                training_config=dpo.DPOTrainingConfig(**common, beta=0.1),
            )
        trainer.with_training_hooks(Clock())
        trainer.train(tunix_batches(job, items, micro))
    per_step = [
        sum(
            sum(len(item["prefix"]) + len(branch["ids"]) for branch in item["branches"])
            for item in chunk
        )
        for chunk in step_items(job, items)
    ]
    return {
        "tokens": per_step,
        "seconds": [b - a for a, b in pairwise(ends)],
        "loss": losses,
    }


def step_items(job: dict[str, Any], items: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The items of each step: in order, over and over."""
    n = job["batch"]
    return [[items[(s * n + i) % len(items)] for i in range(n)] for s in range(job["steps"])]


def tunix_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Tunix's default loss, as its examples build them."""
    common: Any = import_module("tunix.rl.common")
    jnp: Any = import_module("jax.numpy")

    present = jnp.arange(batch["tokens"].shape[1]) < batch["lengths"]
    return {
        "input_tokens": batch["tokens"],
        "input_mask": batch["scored"],
        "positions": common.build_positions_from_mask(present),
        "attention_mask": common.make_causal_attn_mask(present),
    }


def tunix_batches(job: dict[str, Any], items: list[dict[str, Any]], micro: int) -> Any:
    """Arrays of every pass of every step, padded to one shape for the whole run."""
    np: Any = import_module("numpy")

    def padded(rows: list[list[int]], width: int, left: bool = False) -> tuple[Any, Any]:
        ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, at], mask[i, at] = row, 1
        return ids, mask

    prefixes = max(len(item["prefix"]) for item in items)
    branches = max(len(branch["ids"]) for item in items for branch in item["branches"])
    for step in step_items(job, items):
        for start in range(0, len(step), micro):
            part = step[start : start + micro]
            sides = [
                padded([item["branches"][k]["ids"] for item in part], branches)
                for k in range(len(part[0]["branches"]))
            ]
            if job["stage"] == "rw":
                ((ids, _),) = sides
                scored, _ = padded([item["branches"][0]["scored"] for item in part], branches)
                lengths = np.array([[len(item["branches"][0]["ids"])] for item in part])
                yield {"tokens": ids, "scored": scored, "lengths": lengths}
                continue
            prompt, prompt_mask = padded([item["prefix"] for item in part], prefixes, left=True)
            (chosen, chosen_mask), (rejected, rejected_mask) = sides
            yield {
                "prompt_ids": prompt,
                "prompt_mask": prompt_mask,
                "chosen_ids": chosen,
                "chosen_mask": chosen_mask,
                "rejected_ids": rejected,
                "rejected_mask": rejected_mask,
            }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
