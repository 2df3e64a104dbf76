"""Owns the section `evaluate`: what models are measured on, and how."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


class EvaluateConfig(Section):
    """What models are measured on and how; only evaluate reads it."""

    benchmarks: str | list[str] = Field(
        default="held_out",
        description="NAME, NAME=SOURCE (file, folder or Hub id instead of the benchmark's own), "
        "NAME=KIND:SOURCE for prompts of your own, or several, a list or separated by commas; "
        "@ROWS after any for fewer rows",
    )
    views: str | list[str] = Field(
        default="auto",
        description="auto, think (a thought is forced), no_think (forced shut), injected (a "
        "thought that leans the wrong way), or several",
    )
    judges: str | list[str] = Field(
        default="refusal",
        description="refusal, which is always asked, and NAME=MODEL of guards and rubrics",
    )
    baseline: str | None = Field(
        default=None, description="name of the model that others are held against; null = the first"
    )
    think_tokens: int | None = Field(
        default=1024,
        ge=1,
        description="tokens after which an unfinished thought is closed; null = never, and "
        "answer_tokens are for both",
    )
    answer_tokens: int = Field(
        default=1024, ge=1, description="tokens of the answer at most, besides those of the thought"
    )
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")
    samples: int = Field(default=1, ge=1, description="answers to each prompt")
    policy: str = Field(
        default="saro",
        description="the safety policy whose rules the reasoning cites: a YAML file, or a packaged "
        "one's name",
    )
    system: str | None = Field(default=None, description="system prompt; null = none")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="what models compute in; null = float32 on CPU, else bfloat16"
    )
    slots: int = Field(default=32, ge=1, description="answers generated at a time")
    draws: int = Field(default=10_000, ge=100, description="draws of each bootstrap")
    margin: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="share by which a capability may fall and still be called not inferior",
    )
