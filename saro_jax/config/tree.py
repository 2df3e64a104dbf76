"""Owns the root of the tree of settings; each section lies in the file of its name."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, Field, model_validator
from pydantic.fields import FieldInfo

from saro_jax.config import combinations
from saro_jax.config.analyse import AnalyseConfig
from saro_jax.config.data import DataConfig
from saro_jax.config.evaluate import EvaluateConfig
from saro_jax.config.lora import LoRAConfig
from saro_jax.config.mesh import MeshConfig
from saro_jax.config.model import ModelConfig
from saro_jax.config.optimizer import OptimizerConfig
from saro_jax.config.pairs import PairsConfig
from saro_jax.config.pipeline import PipelineConfig
from saro_jax.config.sample import SampleConfig
from saro_jax.config.section import Section
from saro_jax.config.server import ServerConfig
from saro_jax.config.srpo import SRPOConfig
from saro_jax.config.synthesize import SynthesizeConfig
from saro_jax.config.train import TrainConfig

Stage = Literal["rw", "srpo"]
STAGES: tuple[str, ...] = get_args(Stage)
# The sections that training reads; another stage has a section of its name.
TRAINING = ("model", "data", "train", "optimizer", "lora", "srpo", "mesh")


class Config(Section):
    """The resolved configuration of one stage."""

    model: ModelConfig = Field(
        default_factory=ModelConfig, description="the policy that is trained"
    )
    data: DataConfig = Field(description="the rows it trains on, and how they become arrays")
    train: TrainConfig = Field(
        default_factory=TrainConfig, description="how long it trains, what it writes on the way"
    )
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="the optimizer and its learning rate"
    )
    lora: LoRAConfig = Field(
        default_factory=LoRAConfig, description="low-rank adapters beside the model's matrices"
    )
    srpo: SRPOConfig = Field(
        default_factory=SRPOConfig, description="preference optimisation; rw does not read it"
    )
    synthesize: SynthesizeConfig = Field(
        default_factory=SynthesizeConfig,
        description="RIT-D out of prompts, a policy and a teacher; only synthesize reads it",
    )
    evaluate: EvaluateConfig = Field(
        default_factory=EvaluateConfig,
        description="what models are measured on and how; only evaluate reads it",
    )
    sample: SampleConfig = Field(
        default_factory=SampleConfig,
        description="answers of the model to prompts; only sample reads it",
    )
    server: ServerConfig = Field(
        default_factory=ServerConfig,
        description="models behind OpenAI-compatible servers; training does not read it",
    )
    pairs: PairsConfig = Field(
        default_factory=PairsConfig,
        description="OP-COT and PP-COT out of judged rollouts; only pairs reads it",
    )
    analyse: AnalyseConfig = Field(
        default_factory=AnalyseConfig, description="analyses of models; only analyse reads it"
    )
    pipeline: PipelineConfig = Field(
        default_factory=PipelineConfig,
        description="which stages the pipeline runs; only pipeline reads it",
    )
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="how the devices are laid out")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="seed of every random draw: order of the rows, adapters, dropout",
    )

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        combinations.check(self)
        return self


def sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def leaves() -> dict[str, FieldInfo]:
    """Every setting of the tree by dotted name, in the tree's order."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = sections().get(name)
        if section is None:
            leaves[name] = field
        else:
            leaves |= {f"{name}.{key}": leaf for key, leaf in section.model_fields.items()}
    return leaves
