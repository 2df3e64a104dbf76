"""Owns the section `synthesize`: prompts, safety policy, teacher, filters, selection."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


class SynthesizeConfig(Section):
    """RIT-D out of prompts, a policy and a teacher; only synthesize reads it."""

    prompts: str | list[str] = Field(
        default="quickstart:ritd",
        description="prompts: file, folder or Hub id, or several of them; KIND=SOURCE (harmful, "
        "jailbreak, benign, borderline) where the rows have no column kind",
    )
    columns: str | list[str] | None = Field(
        default=None,
        description="FIELD=COLUMN, or several of them, where a source's columns are not found by "
        "their names: prompt, kind, categories, answer, base_id, id, license, lang",
    )
    split: str = Field(default="train", description="split that is read from a Hub id")
    evaluation: str | list[str] | None = Field(
        default="quickstart:held_out",
        description="evaluation sets no prompt may be taken from; null = none",
    )
    exact_hits: Literal["fail", "drop"] = Field(
        default="fail",
        description="what a prompt that stands in an evaluation set does: end the run, or go",
    )
    ngram: int = Field(
        default=8,
        ge=0,
        description="words in a row that a prompt may not share with an evaluation set; 0 = any",
    )
    tfidf: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="cosine of word weights with an evaluation prompt from which a prompt goes; "
        "1 = none goes",
    )
    near_duplicate: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="share of word triples (Jaccard) from which two prompts of one kind are one; "
        "1 = none are",
    )
    dev_share: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share (0 to 1) of the prompt groups that are held out, with wrappers of their "
        "own",
    )
    jailbreaks: float = Field(
        default=1.0, ge=0, description="wrapped copies of each harmful prompt"
    )
    wrapped_benign: float = Field(
        default=0.25, ge=0, description="wrapped copies of each benign or borderline prompt"
    )
    size: int | None = Field(
        default=None,
        ge=1,
        description="prompts, in the shares of synthesize.mix, of which synthesize.dev_share are "
        "held out; null = all there are",
    )
    mix: str = Field(
        default="25:25:30:20",
        description="shares of harmful : jailbreak : benign : borderline among synthesize.size",
    )
    policy: str = Field(
        default="saro", description="the safety policy: a YAML file, or a packaged one's name"
    )
    teacher: Literal["template", "api", "local", "self"] = Field(
        default="template",
        description="what answers: template = stems, without a model; api = a model behind "
        "synthesize.teacher_url; local = another model, run here; self = the model that is to be "
        "trained, with the policy in context, run here or behind synthesize.teacher_url",
    )
    teacher_model: str | None = Field(
        default=None,
        description="the model: its name at the server, or Hub id, folder, .gguf file or "
        "'quickstart'; null = model.path, for self only",
    )
    teacher_url: str | None = Field(
        default=None,
        description="an OpenAI-compatible server, with its /v1; section server says how it is "
        "asked; changes no result",
    )
    steer: str | None = Field(
        default=None,
        description="a line before harmful prompts and jailbreaks that tips the teacher to caution",
    )
    shots: int = Field(
        default=0,
        ge=0,
        le=16,
        description="worked examples that the teacher is shown before each prompt, refused and "
        "answered ones in turn",
    )
    examples: str = Field(
        default="quickstart:ritd",
        description="where they come from: rows {kind, prompt, reasoning, answer}, such as RIT-D",
    )
    search: bool = Field(
        default=False,
        description="the self teacher takes the context of the highest flip rate: relevant rules "
        "or all, without examples or with synthesize.shots (2 where 0), without and with "
        "synthesize.steer",
    )
    min_flip_rate: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share (0 to 1) of its unsafe answers that the policy in context must turn for "
        "the self teacher; below it the run ends; 0 = any",
    )
    flip_prompts: int = Field(
        default=32,
        ge=1,
        description="harmful prompts and jailbreaks at most on which that share is measured, held "
        "out ones first",
    )
    label: bool = Field(
        default=False,
        description="the teacher labels prompts that have no category and are not benign (T5)",
    )
    guard: str | None = Field(
        default=None,
        description="guard that judges answers and reasoning: NAME=MODEL or NAME=MODEL@URL, as "
        "judge has them; null = none does",
    )
    score: bool = Field(
        default=False, description="the teacher scores answers, which need 8 of 10 each time (T6)"
    )
    repair: bool = Field(
        default=False,
        description="the teacher goes on from the first unsafe step of reasoning that the guard "
        "drops (T3)",
    )
    compress: bool = Field(
        default=False,
        description="the teacher shortens the reasoning of each prompt's best answer, which then "
        "competes (T8)",
    )
    render: Literal["relevant", "whole"] = Field(
        default="relevant",
        description="what of the policy the teacher is told: rules of the prompt's categories, or "
        "all",
    )
    n: int = Field(default=8, ge=1, description="answers of the teacher to one prompt")
    temperature: float = Field(default=0.8, ge=0, description="the teacher's; 0 = greedy")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="probability mass (0 to 1) the teacher samples from"
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="tokens of an answer at most")
    retries: int = Field(
        default=3, ge=0, description="times that answers which do not parse are asked for again"
    )
    concurrency: int = Field(
        default=8,
        ge=1,
        description="sequences that a teacher run here decodes at a time, and calls of one given "
        "from Python; does not change the result",
    )
    tokenizer: str | None = Field(
        default=None,
        description="tokenizer that counts tokens: Hub id, folder or 'quickstart'; null = words "
        "and marks are counted",
    )
    max_steps: int = Field(default=24, ge=1, description="reasoning steps at most")
    min_steps: int = Field(default=2, ge=1, description="reasoning steps at least")
    max_reasoning_tokens: int = Field(
        default=768, ge=1, description="tokens of the reasoning at most"
    )
    decision_line: bool = Field(
        default=True, description="rows keep the reasoning's last line, Decision: MODE"
    )
    overlap: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="share of runs of 8 words (Jaccard) above which reasoning repeats that of a "
        "prompt of the same category; 1 = none does",
    )
    srs: Literal["shortest_q", "shortest", "pctl", "pareto"] = Field(
        default="shortest_q",
        description="which accepted answer is kept: shortest_q = the shortest of full score and "
        "synthesize.srs_floor, shortest, pctl = nearest the 25th percentile of length, pareto = "
        "the shortest and the best",
    )
    srs_floor: int = Field(
        default=40,
        ge=0,
        description="reasoning tokens at least, for harmful prompts and jailbreaks, with "
        "synthesize.srs=shortest_q",
    )
