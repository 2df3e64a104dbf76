"""Host memory of import and export of a checkpoint: `python benchmarks/import_memory.py`.

A random checkpoint of Llama-3.1-8B's proportions, scaled down, bfloat16 in several safetensors
files, is read onto the CPU devices of a process of its own, whose devices' memory is the host's.
Given is the peak above what the parameters themselves take, beside the size of a tensor: of all
resident pages (VmHWM) and of anonymous ones (RssAnon, sampled every millisecond).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

# Llama-3.1-8B with a quarter of its width, half of its layers and of its vocabulary.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64128,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MESHES = ({"fsdp": 1}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4})
MIB = 2**20


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: float = 1e8) -> None:
    """Random bfloat16 weights of a Llama as a Hugging Face folder of several files."""
    import jax
    import ml_dtypes

    from saro_jax.models import decoder, weights
    from saro_jax.models.architecture import from_hf

    rng = np.random.default_rng(0)
    entries = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(
        decoder.abstract_params(from_hf(config))
    )[0]:
        key = ".".join(step.key for step in path)
        layers = key.startswith("model.layers.")
        shape = leaf.shape[1:] if layers else leaf.shape
        shape = shape[::-1] if key.endswith("_proj.weight") else shape

        def read(shape=shape):
            return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

        names = [key]
        if layers:
            rest = key.removeprefix("model.layers.")
            names = [f"model.layers.{i}.{rest}" for i in range(leaf.shape[0])]
        entries += [(name, shape, np.dtype(ml_dtypes.bfloat16), read) for name in names]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights.write_folder(folder, entries, shard_bytes)


def measure(folder: Path, out: Path, mesh: dict[str, int], dtype: str) -> dict[str, int]:
    """Bytes of import and export in a new process: parameters, tensors, peaks above them."""
    devices = int(np.prod(list(mesh.values())))
    arguments = [str(Path(__file__)), "--child", str(folder), str(out), json.dumps(mesh), dtype]
    child = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr[-2000:])
    return json.loads(child.stdout)


class Peak:
    """The most resident bytes since the start of a block, above those at its start."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        self._before, self._done = (_status("VmRSS"), _status("RssAnon")), threading.Event()
        self._most = 0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.is_set():
            self._most = max(self._most, _status("RssAnon"))
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        self.total = _status("VmHWM") - self._before[0]
        self.anonymous = self._most - self._before[1]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _child(folder: str, out: str, mesh: str, dtype: str) -> None:
    import jax

    from saro_jax.models import decoder, huggingface
    from saro_jax.parallel.mesh import make_mesh
    from saro_jax.parallel.sharding import shardings

    arch = huggingface.load_architecture(folder)
    places = shardings(make_mesh(**json.loads(mesh)), decoder.abstract_params(arch, dtype))
    with Peak() as loading:
        params = huggingface.load_params(folder, arch, dtype, places)
    leaves = jax.tree.leaves(params)
    # What the devices hold, a copy on several devices once where they share its memory.
    held = {
        part.data.unsafe_buffer_pointer(): part.data.nbytes
        for leaf in leaves
        for part in leaf.addressable_shards
    }
    matrices = jax.tree.leaves(params["model"]["layers"])
    layer = max(leaf.nbytes // arch.num_layers for leaf in matrices)
    with Peak() as saving:
        huggingface.save(params, arch, folder, out, "bfloat16")
    found = {
        "parameters": sum(held.values()),
        "largest_tensor": max(layer, *(leaf.nbytes for leaf in leaves if leaf.ndim == 2)),
        "largest_layer_tensor": layer,
        "largest_leaf": max(leaf.nbytes for leaf in leaves),
        "loading": loading.total - sum(held.values()),
        "loading_anonymous": loading.anonymous - sum(held.values()),
        "saving": saving.total,
        "saving_anonymous": saving.anonymous,
    }
    print(json.dumps(found))


def main() -> None:
    columns = "mesh | dtype | parameters | largest leaf | largest tensor | of a layer"
    print(f"| {columns} | import | export |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        write_checkpoint(folder, SHAPE)
        for i, (mesh, dtype) in enumerate(
            (mesh, dtype) for mesh in MESHES for dtype in ("bfloat16", "float32")
        ):
            found = measure(folder, Path(root) / f"out{i}", mesh, dtype)
            mib = {name: f"{value / MIB:.0f}" for name, value in found.items()}
            name = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
            sizes = ("parameters", "largest_leaf", "largest_tensor", "largest_layer_tensor")
            cells = [name, dtype, *(mib[size] for size in sizes)]
            cells += [f"{mib[k]} ({mib[f'{k}_anonymous']})" for k in ("loading", "saving")]
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\nMiB; import and export: peak above the parameters, in brackets of anonymous pages.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        argparse.ArgumentParser(description=__doc__).parse_args()
        main()
