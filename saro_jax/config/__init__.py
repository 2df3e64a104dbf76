"""Owns the typed configuration; what the other rooms use of it is named here."""

from saro_jax.config.combinations import DROP_WINDOW, LAYER_PROJECTIONS, PROJECTIONS
from saro_jax.config.command_line import Flag, help_text, parse_command_line
from saro_jax.config.recipe import digest, dump, load, recipe_path
from saro_jax.config.tree import (
    STAGES,
    TRAINING,
    AnalyseConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PairsConfig,
    PipelineConfig,
    SampleConfig,
    ServerConfig,
    SRPOConfig,
    SynthesizeConfig,
    TrainConfig,
    leaves,
    sections,
)
from saro_jax.config.values import names
from saro_jax.config.versions import provenance

__all__ = [
    "DROP_WINDOW",
    "LAYER_PROJECTIONS",
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
