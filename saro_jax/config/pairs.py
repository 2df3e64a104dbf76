"""Owns the section `pairs`: rollouts, judges, quotas, and the search for risky steps."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


class PairsConfig(Section):
    """OP-COT and PP-COT out of judged rollouts; only pairs reads it."""

    traces: str | list[str] | None = Field(
        default=None, description="rollouts: Trace records, a file or several of them"
    )
    prompts: str | list[str] | None = Field(
        default=None, description="their prompts: Prompt records, a file or several of them"
    )
    judgments: str | list[str] | None = Field(
        default=None,
        description="Judgment records on the rollouts; null = they are judged here, as "
        "continuations are",
    )
    ritd: str | list[str] | None = Field(
        default=None,
        description="the warmup's rows: chosen answers of OP2, ends of reflections; null = none",
    )
    negatives: str | list[str] | None = Field(
        default=None,
        description="rollouts of another, unsafe model on the same prompts, for OP3; null = none",
    )
    policy: str = Field(
        default="saro", description="the safety policy: a YAML file, or a packaged one's name"
    )
    guard: str | None = Field(
        default=None,
        description="NAME=MODEL or NAME=MODEL@URL that judges safety, as judge --judges takes it; "
        "null = answers to harmful prompts count as unsafe where they do not refuse",
    )
    audit: str | None = Field(
        default=None,
        description="rows {judged, human, category} of safe or unsafe, which the noise of pairs is "
        "estimated from; null = from the judges' own probabilities",
    )
    safe: float = Field(
        default=0.2, ge=0, le=1, description="P(unsafe) below which an answer is safe"
    )
    unsafe: float = Field(
        default=0.8, ge=0, le=1, description="P(unsafe) above which an answer is unsafe"
    )
    hard: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share (0 to 1) of rejected answers that are the most unsafe, not any bad one",
    )
    per_prompt: int = Field(default=2, ge=1, description="outcome pairs of one prompt at most")
    floor: int = Field(
        default=40,
        ge=0,
        description="reasoning tokens at least of a chosen answer to a harmful prompt, where there "
        "is one",
    )
    size: int | None = Field(
        default=None,
        ge=1,
        description="outcome pairs at most, in the shares of pairs.quotas, and process pairs at "
        "most, in those of pairs.mix; null = all",
    )
    quotas: str = Field(
        default="25:30:20:25",
        description="shares of harmful : jailbreak : benign : borderline prompts among pairs.size",
    )
    mix: str = Field(
        default="30:20:10:25:5:5:5", description="shares of PPA : PPB : ... : PPG among pairs.size"
    )
    refuse_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share (0 to 1) of weight that pairs whose chosen branch refuses and whose "
        "rejected one does not have, beside those the other way round; the heavier side loses "
        "weight; null = as they come",
    )
    off_policy: float = Field(
        default=0.2, ge=0, lt=1, description="share (0 to 1) of OP3 among outcome pairs at most"
    )
    balance: float = Field(
        default=0.1,
        gt=0,
        description="mean length of the chosen less that of the rejected, as a share of the mean "
        "length, that a kind of pairs may reach",
    )
    balance_floor: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share (0 to 1) of a kind's pairs that pairs.balance leaves at least",
    )
    walks: int = Field(
        default=1, ge=0, description="bad rollouts of one prompt that are searched for risky steps"
    )
    rollouts: int = Field(
        default=4, ge=1, description="continuations drawn to value a step or a reflection"
    )
    search: int = Field(
        default=8, ge=0, description="continuations drawn after a cue to reflect; 0 = none"
    )
    repair: bool = Field(
        default=False, description="ask the model, with the policy in view, to repair a thought too"
    )
    injected: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share (0 to 1) of the prompts that are not benign whose thought is led astray "
        "by injected steps (PPG)",
    )
    modes: bool = Field(
        default=True, description="label prompts with the least reasoning that is enough (MODE)"
    )
    low: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of good continuations under which a step is risky",
    )
    drop: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="fall of that share that makes a step risky, and gain of a reflection at least",
    )
    value: float = Field(
        default=0.75,
        ge=0,
        le=1,
        description="share of good continuations after a chosen reflection, at least",
    )
    stem_share: float = Field(
        default=0.08,
        gt=0,
        le=1,
        description="share (0 to 1) of the process pairs that one stem of a reflection opens, at "
        "most",
    )
    no_op: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share (0 to 1) of the process pairs that reject a needless reflection",
    )
    temperature: float = Field(default=1.0, ge=0, description="of continuations; 0 = greedy")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="probability mass (0 to 1) they are sampled from"
    )
    max_new_tokens: int = Field(default=512, ge=1, description="tokens of a continuation at most")
    url: str | None = Field(
        default=None,
        description="an OpenAI-compatible server of the model, with its /v1; section server says "
        "how it is asked; changes no result; null = the model runs here",
    )
    served_name: str | None = Field(
        default=None, description="what the server calls the model; null = model.path"
    )
    slots: int = Field(default=16, ge=1, description="continuations under way at a time")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="what continuations are computed in; null = float32 on a CPU, elsewhere "
        "bfloat16",
    )
