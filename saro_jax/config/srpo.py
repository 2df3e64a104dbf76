"""Owns the section `srpo`: the preference loss, its weights, its reference policy."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section

PreferenceLoss = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "identity_po",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
    "kto",
]


class SRPOConfig(Section):
    """Preference optimisation; the rw stage does not read it."""

    loss: PreferenceLoss = Field(
        default="sigmoid",
        description="sigmoid = DPO (conservative DPO with srpo.label_smoothing), robust = unbiased "
        "under flipped labels, hinge = SLiC, identity_po = IPO, apo_zero and apo_down = anchored, "
        "simpo and orpo = without a reference, kto = rows of prompt, completion, label",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="strength of the tie to the reference policy (1/nat); for orpo the weight of "
        "the odds ratio",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="assumed share (0 to 0.5) of flipped preferences; a row's own noise replaces "
        "it",
    )
    nll_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the chosen branch's mean negative log-likelihood, added to a "
        "pairwise loss (RPO)",
    )
    target_margin: float = Field(
        default=0.5, ge=0, description="simpo's margin that a pair has to reach"
    )
    length: Literal["sum", "mean", "desensitised"] = Field(
        default="sum",
        description="log-ratio of a branch: sum over its tokens, mean over them, or desensitised = "
        "sum in which tokens past the shorter branch's length count srpo.length_alpha",
    )
    length_alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="weight (0 to 1) of tokens past the shorter branch's length",
    )
    reasoning_weight: float = Field(
        default=1.0, ge=0, description="weight of the log-ratio of the tokens through </think>"
    )
    answer_weight: float = Field(
        default=1.0, ge=0, description="weight of the log-ratio of the tokens after </think>"
    )
    scope: Literal["suffix", "step"] = Field(
        default="suffix",
        description="what of a branch is scored: suffix = all of it, step = the first reasoning "
        "step in which the two branches differ",
    )
    desirable_weight: float = Field(
        default=1.0, ge=0, description="weight of kto's rows with label true"
    )
    undesirable_weight: float = Field(
        default=1.0, ge=0, description="weight of kto's rows with label false"
    )
    layout: Literal["shared", "separate"] = Field(
        default="shared",
        description="shared = a pair's common prefix is computed once, separate = once a branch",
    )
    reference_cache: str | None = Field(
        default=None,
        description="folder where reference log-probs are kept between runs; null = reference/ in "
        "the user's cache",
    )
    recheck: int = Field(
        default=4, ge=0, description="cached pairs whose reference log-probs are recomputed"
    )
    reference: Literal["stored", "resident"] = Field(
        default="stored",
        description="stored = reference log-probs are computed once and kept on disk, resident = "
        "the reference policy stays in memory and scores every step",
    )
    sync_every: int = Field(
        default=0,
        ge=0,
        description="optimizer steps between updates of a resident reference towards the policy "
        "(TR-DPO); 0 = never",
    )
    sync_mix: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share (0 to 1) of the policy in an updated reference; 1 = a copy of it",
    )
    max_chosen_drop: float | None = Field(
        default=20.0,
        gt=0,
        description="mean fall of the chosen log-probs below the reference (nats), with growing "
        "margins, that ends the run; null = never",
    )
    on_drop: Literal["stop", "rollback"] = Field(
        default="stop",
        description="what srpo.max_chosen_drop does: stop = end with an error, rollback = export "
        "the last checkpoint from before the fall",
    )
