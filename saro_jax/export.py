"""Export: `python -m saro_jax.export --checkpoint=DIR --out=DIR [--step=N] [--dtype=float32]`.

Writes the parameters of a training checkpoint as a Hugging Face folder: sharded safetensors,
config, generation config, tokenizer and chat template. DIR is the output folder of a training run
or its checkpoints/ folder.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import yaml

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.models import hub, huggingface
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.text import chat
from saro_jax.training import checkpoint as checkpoints
from saro_jax.training import step


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag(
            "checkpoint", "output folder of a run, or its checkpoints/", parse=Path, required=True
        ),
        Flag("out", "folder to write, must not exist or be empty", parse=Path, required=True),
        Flag("step", "which checkpoint; default the newest", parse=int),
        Flag("dtype", "of the weights", "float32", choices=("float32", "bfloat16")),
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.export",
            __doc__ or "",
            sys.argv[1:] if argv is None else argv,
            flags,
            tree=False,
        )
        export(args.checkpoint, args.out, args.step, args.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(checkpoint: Path, out: Path, at: int | None = None, dtype: str = "float32") -> None:
    """Write step `at` (None = the newest) of a run as a Hugging Face folder."""
    run = checkpoint.parent if checkpoint.name == "checkpoints" else checkpoint
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        raise ValueError(f"{checkpoint}: not the output folder of a training run")
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    saved = checkpoints.Checkpoints(run / "checkpoints", config.train.keep)
    try:
        steps = saved.steps()
        if not steps:
            raise ValueError(f"{run / 'checkpoints'}: no complete checkpoint")
        if at is not None and at not in steps:
            raise ValueError(f"--step={at}: not saved; there are {', '.join(map(str, steps))}")
        folder = hub.resolve(config.model.path, config.model.revision)
        arch = huggingface.load_architecture(folder)
        mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        shapes = step.abstract_params(arch, jnp.dtype(config.model.param_dtype))
        params = saved.restore_params(at or steps[-1], shapes, sharding.shardings(mesh, shapes))
    finally:
        saved.close()
    template = None
    if config.model.chat_template:
        template = chat.load_tokenizer(folder, config.model.chat_template).chat_template
    huggingface.save(params, arch, folder, out, dtype, chat_template=template)
    provenance = {"checkpoint": str(run), "step": at or steps[-1]} | configuration.provenance()
    beside = out.with_name(f"{out.name}.provenance.json")
    beside.write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"step {at or steps[-1]} of {run} is in {out}")


if __name__ == "__main__":
    sys.exit(main())
