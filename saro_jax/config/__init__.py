"""Owns the typed configuration; what the other rooms use of it is named here."""

from saro_jax.config.analyse import AnalyseConfig
from saro_jax.config.combinations import DROP_WINDOW, LAYER_PROJECTIONS, PROJECTIONS
from saro_jax.config.command_line import CONFIG, OUT, Flag, help_text, parse_command_line
from saro_jax.config.data import DataConfig
from saro_jax.config.evaluate import EvaluateConfig
from saro_jax.config.lora import LoRAConfig
from saro_jax.config.mesh import MeshConfig
from saro_jax.config.model import ModelConfig
from saro_jax.config.optimizer import OptimizerConfig
from saro_jax.config.pairs import PairsConfig
from saro_jax.config.pipeline import PipelineConfig
from saro_jax.config.recipe import digest, dump, load, recipe_path
from saro_jax.config.sample import SampleConfig
from saro_jax.config.server import ServerConfig
from saro_jax.config.srpo import SRPOConfig
from saro_jax.config.synthesize import SynthesizeConfig
from saro_jax.config.train import TrainConfig
from saro_jax.config.tree import STAGES, TRAINING, Config, leaves, sections
from saro_jax.config.values import names
from saro_jax.config.versions import provenance

__all__ = [
    "CONFIG",
    "DROP_WINDOW",
    "LAYER_PROJECTIONS",
    "OUT",
    "PROJECTIONS",
    "STAGES",
    "TRAINING",
    "AnalyseConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "Flag",
    "LoRAConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PipelineConfig",
    "SRPOConfig",
    "SampleConfig",
    "ServerConfig",
    "SynthesizeConfig",
    "TrainConfig",
    "digest",
    "dump",
    "help_text",
    "leaves",
    "load",
    "names",
    "parse_command_line",
    "provenance",
    "recipe_path",
    "sections",
]
