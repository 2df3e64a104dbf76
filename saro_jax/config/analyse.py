"""Owns the section `analyse`: analyses of what goes on inside models."""

from pydantic import Field

from saro_jax.config.section import Section


class AnalyseConfig(Section):
    """What goes on inside models: hidden states, likelihoods, attacks, tampered reflections."""

    per_group: int = Field(
        default=80, ge=10, description="prompts of a group at most, drawn by the seed"
    )
    jailbreaks: float = Field(
        default=1.0,
        ge=0,
        description="disguised prompts made per harmful prompt, held-out wrappers",
    )
    wrapped: float = Field(
        default=1.0, ge=0, description="the same per benign or borderline prompt: the group wrapped"
    )
    layer_step: int = Field(default=1, ge=1, description="every so many layers are compared")
    row_length: int = Field(
        default=1024, ge=64, description="tokens of a packed row; no text is longer"
    )
    permutations: int = Field(
        default=200, ge=1, description="of the labels, for the p-value of a discrepancy"
    )
    tsne_seeds: int = Field(default=3, ge=0, description="pictures by t-SNE; 0 = none")
    pairs: int = Field(
        default=40, ge=2, description="preference pairs that are scored at most, drawn by the seed"
    )
    steps: int = Field(
        default=6, ge=0, description="reasoning steps after which the probe reads, the first ones"
    )
    prompts: int = Field(
        default=16,
        ge=0,
        description="prompts of each test that generates, drawn by the seed; 0 = none generates",
    )
    depth: str = Field(
        default="0:1:2:4:8:16:32",
        description="tokens of a compliant opening that are prefilled, one test each",
    )
    max_new_tokens: int = Field(
        default=128, ge=1, description="tokens of a generated continuation at most"
    )
    tries: int = Field(
        default=8, ge=1, description="times a continuation is drawn anew to be without markers"
    )
    batch_size: int = Field(default=16, ge=1, description="continuations generated at a time")
