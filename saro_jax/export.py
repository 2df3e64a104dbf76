"""Export: `python -m saro_jax.export --checkpoint=DIR --out=DIR [--step=N] [--format=merged|peft]`.

merged  the model as a Hugging Face folder (sharded safetensors, config, generation config,
        tokenizer, chat template), adapters merged in; --dtype says how its weights are stored
peft    the adapters alone, in float32, as a folder that `peft` puts on the base model

DIR is the output folder of a training run or its checkpoints/ folder.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.models import hub, huggingface
from saro_jax.parallel import distributed, sharding
from saro_jax.parallel import mesh as meshes
from saro_jax.text import chat
from saro_jax.training import checkpoint as checkpoints
from saro_jax.training import trainable


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        Flag(
            "checkpoint", "output folder of a run, or its checkpoints/", parse=Path, required=True
        ),
        Flag("out", "folder to write, must not exist or be empty", parse=Path, required=True),
        Flag("step", "which checkpoint; default the newest", parse=int),
        Flag("dtype", "of merged weights", "float32", choices=("float32", "bfloat16")),
        Flag("format", "what is written", "merged", choices=("merged", "peft")),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.export", __doc__, argv, flags, tree=False
        )
        distributed.start(args)
        export(args.checkpoint, args.out, args.step, args.dtype, args.format)
    except ValueError as error:
        return distributed.refuse(error)
    return 0


def export(
    checkpoint: Path,
    out: Path,
    at: int | None = None,
    dtype: str = "float32",
    form: str = "merged",
) -> None:
    """Write step `at` (None = the newest) of a run as a Hugging Face or (form "peft") PEFT folder.

    Weights that did not train are read from where the run read them, and must be the same.
    """
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
        mesh = meshes.make_mesh(**dict(config.mesh))
        if form == "peft" and (reason := trainable.why_no_peft(arch, config)):
            raise ValueError(f"--format=peft: {reason}")
        shapes, frozen_shapes = trainable.abstract(arch, config)
        number = at or steps[-1]
        trained = saved.restore_params(number, shapes, sharding.shardings(mesh, shapes))
        if frozen_shapes:
            base = huggingface.weights_hash(folder)
            trainable.check_base(saved.read_data(number).get("base"), base, folder, run)
    finally:
        saved.close()
    if form == "peft":
        _, adapters = trainable.apart(config, trained)
        assert adapters is not None
        huggingface.save_peft(adapters, trainable.peft_settings(config, folder), out)
    else:
        frozen = {}
        if frozen_shapes:
            whole = trainable.abstract_model(arch, config)
            loaded = huggingface.load_params(folder, arch, whole, sharding.shardings(mesh, whole))
            _, frozen = trainable.split(loaded, trainable.trained_names(arch, config))
        params, adapters = trainable.apart(config, trainable.join(trained, frozen))
        template = None
        if config.model.chat_template:
            template = chat.load_tokenizer(folder, config.model.chat_template).chat_template
        huggingface.save(
            params, arch, folder, out, dtype, chat_template=template, adapters=adapters
        )
    provenance = {"checkpoint": str(run), "step": number} | configuration.provenance()
    beside = out.with_name(f"{out.name}.provenance.json")
    if distributed.writes():
        beside.write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"step {number} of {run} is in {out}")


if __name__ == "__main__":
    sys.exit(main())
