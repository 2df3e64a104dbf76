"""Owns what a run starts from: the model's folder, architecture and tokenizer, and its mesh."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from saro_jax.config import Config
from saro_jax.models import huggingface
from saro_jax.models.architecture import Architecture
from saro_jax.parallel import sharding
from saro_jax.training import trainable


@dataclass(frozen=True)
class Source:
    """The model a run starts from."""

    folder: Path
    arch: Architecture
    tokenizer: Any
    mesh: Mesh
    config: Config

    def load(self) -> Any:
        """Its parameters, read straight to their shards."""
        shapes = trainable.abstract_model(self.arch, self.config)
        return huggingface.load_params(
            self.folder, self.arch, shapes, sharding.shardings(self.mesh, shapes)
        )
