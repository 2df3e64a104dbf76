"""Owns the section `pipeline`: which stages the pipeline runs."""

from pydantic import Field

from saro_jax.config.section import Section


class PipelineConfig(Section):
    """What the pipeline runs; only pipeline reads it."""

    synthesize: bool = Field(
        default=True, description="make RIT-D and warm up on it; false = on data.train as it is"
    )
    rounds: int = Field(
        default=1,
        ge=0,
        description="times that rollouts are drawn and judged, pairs made of them and SRPO run, "
        "each from the model of the round before; 0 = SRPO once, on data.train as it is",
    )
    judges: str = Field(
        default="refusal",
        description="judges of the rollouts, as judge --judges takes them: refusal, GUARD=MODEL, "
        "RUBRIC=MODEL, separated by commas",
    )
