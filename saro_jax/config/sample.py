"""Owns the section `sample`: how answers of the model are drawn."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


class SampleConfig(Section):
    """Answers of the model to prompts; only sample reads it."""

    prompts: str | list[str] = Field(
        default="quickstart:held_out",
        description="prompts: file, folder or Hub id of rows, or prompts.jsonl of a stage, or "
        "several of them; KIND=SOURCE (harmful, jailbreak, benign, borderline) where the rows have "
        "no column kind",
    )
    columns: str | list[str] | None = Field(
        default=None,
        description="FIELD=COLUMN, or several of them, where a source's columns are not found by "
        "their names: prompt, kind, categories, answer, base_id, id, license, lang",
    )
    split: str = Field(
        default="train",
        description="split that is read from a Hub id, and of prompts.jsonl; of that, all = any",
    )
    policy: str = Field(
        default="saro",
        description="the safety policy that the rows' categories are of: a YAML file, or a "
        "packaged one's name",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="prompts at most, drawn by seed, each kind in its share; null = all",
    )
    n: int = Field(default=8, ge=1, description="answers to each prompt")
    temperature: float = Field(default=1.0, ge=0, description="0 = greedy")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="probability mass (0 to 1) that is sampled from"
    )
    top_k: int = Field(default=0, ge=0, description="tokens that are sampled from; 0 = all")
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability of a token at least, as a share of the most probable one's",
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, description="tokens of reasoning and answer together at most"
    )
    think_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens after which an unfinished thought is closed (budget forcing), as is "
        "one in which the turn ends; null = never",
    )
    stop: str | list[str] | None = Field(
        default=None, description="texts that end an answer, which is cut before them"
    )
    system: str | None = Field(default=None, description="system turn before each prompt")
    prefix: str | None = Field(
        default=None, description="text that every answer begins with, such as an opened thought"
    )
    url: str | None = Field(
        default=None,
        description="an OpenAI-compatible server of the model, with its /v1; section server says "
        "how it is asked; changes no result; null = the model runs here",
    )
    served_name: str | None = Field(
        default=None, description="what the server calls the model; null = model.path"
    )
    slots: int = Field(
        default=16, ge=1, description="answers under way at a time, over all devices of a host"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="what is computed in; null = float32 on a CPU, elsewhere bfloat16",
    )
