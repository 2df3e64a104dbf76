"""Owns the typed tree of settings: every section, field, bound and description."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from saro_jax.config import combinations
from saro_jax.config.combinations import PROJECTIONS

Stage = Literal["rw", "srpo"]
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
STAGES: tuple[str, ...] = get_args(Stage)
# The sections that training reads; another stage has a section of its name.
TRAINING = ("model", "data", "train", "optimizer", "lora", "srpo", "mesh")


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The policy that is trained."""

    path: str | None = Field(
        default=None,
        description="weights and tokenizer: Hub id, folder, .gguf file or 'quickstart'; null = "
        "'quickstart' for rw; for srpo the export of the RW run beside the output folder "
        "(OUT/../rw/model) if there is one, else 'quickstart'",
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of the Hub id; null = its main branch"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="dtype of activations and matrix products; losses are always float32",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the master weights and optimizer moments"
    )
    frozen_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="dtype of the weights that do not train (lora.rank, train.freeze), such as "
        "bfloat16 under float32 adapters; null = model.param_dtype",
    )
    remat: Literal["none", "dots", "attention", "full"] = Field(
        default="attention",
        description="what the backward pass recomputes: none = nothing (most memory), dots = "
        "all but matrix products, attention = all but attention's result, full = every layer from "
        "its input (least memory)",
    )
    attention: Literal["auto", "xla", "flash"] = Field(
        default="auto",
        description="what computes attention: flash = fused kernels, for TPUs, xla = loops over "
        "blocks, for any device, auto = flash on a TPU, else xla",
    )
    chat_template: str | None = Field(
        default=None, description="Jinja file that replaces the tokenizer's chat template"
    )


class DataConfig(Section):
    """The rows a stage trains on, and how they become arrays."""

    train: str | list[str] = Field(
        description="training rows: file, folder or Hub id, or several of them; "
        "'quickstart:ritd' and 'quickstart:preferences' are packaged",
    )
    eval: str | None = Field(
        default=None, description="held-out rows: file, folder or Hub id; null = no evaluation"
    )
    split: str = Field(default="train", description="split that is read from a Hub id")
    max_length: int = Field(
        default=1024, ge=2, description="tokens of one sequence, prompt and completion together"
    )
    too_long: Literal["truncate", "reject"] = Field(
        default="truncate",
        description="what happens to a row of more than data.max_length tokens",
    )
    row_length: int | None = Field(
        default=None,
        ge=2,
        description="tokens of one packed row; null = 2 x data.max_length for rw, 4 x for srpo",
    )
    pack_window: int = Field(
        default=8,
        ge=1,
        description="optimizer steps whose rows are packed together and then dealt out to them: "
        "more fill rows better; has no effect without data.shuffle",
    )
    row_buckets: int = Field(
        default=8,
        ge=1,
        description="lengths that rows come in, equal parts of row_length: more lengths, less "
        "padding, more programs to compile; 1 = every row has row_length",
    )
    shuffle: bool = Field(
        default=True, description="new order of the rows in every epoch, drawn from seed"
    )
    workers: int = Field(
        default=0, ge=0, description="processes that prepare rows; 0 = the training process"
    )
    prefetch: int = Field(default=2, ge=0, description="batches prepared ahead of the step")
    max_reject_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="largest rejected share of the rows (0 to 1) before the run is refused",
    )


class TrainConfig(Section):
    """How long a stage trains, and what it writes on the way."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps, in place of train.epochs; null = what train.epochs gives",
    )
    epochs: float = Field(
        default=1.0, gt=0, description="passes over the training rows when train.steps is null"
    )
    batch_rows: int = Field(
        default=16, ge=1, description="data rows (examples or pairs) of one optimizer step"
    )
    micro_rows: int = Field(
        default=1, ge=1, description="packed rows of one forward and backward pass"
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype in which devices sum the gradients of the layers' matrices: bfloat16 "
        "sends half as much and rounds each device's part",
    )
    freeze: str | list[str] | None = Field(
        default=None,
        description="weights that do not train: regular expressions searched in parameter names "
        "such as model/layers/mlp/up_proj/weight; none = all train; null = none without adapters, "
        "the whole model with them",
    )
    save_every: int = Field(default=50, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay on disk")
    log_every: int = Field(default=1, ge=1, description="optimizer steps between logged metrics")
    eval_every: int = Field(
        default=0,
        ge=0,
        description="optimizer steps between evaluations on data.eval; 0 = after the last only",
    )
    answers: str | None = Field(
        default=None,
        description="prompts (id, kind, prompt) that the model answers while it trains: a JSON "
        "lines file or quickstart:NAME; null = none",
    )
    answers_every: int = Field(
        default=0,
        ge=0,
        description="optimizer steps between such answers; 0 = after the last step only",
    )
    answers_tokens: int = Field(
        default=512, ge=1, description="tokens of such an answer at most, reasoning included"
    )
    tensorboard: bool = Field(default=True, description="also write metrics for TensorBoard")
    wandb: str | None = Field(
        default=None, description="Weights & Biases project that gets the metrics; null = none"
    )


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="the update rule; sgd has no momentum and no b1, b2, eps"
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="course of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(
        default=0.05, ge=0, le=1, description="share of the steps (0 to 1) that warm up linearly"
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="last learning rate as a share (0 to 1) of the peak"
    )
    weight_decay: float = Field(
        default=1e-4, ge=0, description="decoupled decay of matrices; never of norms and biases"
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="decay of the gradient's mean")
    b2: float = Field(default=0.95, ge=0, lt=1, description="decay of the squared gradient's mean")
    eps: float = Field(default=1e-8, gt=0, description="added to the update's denominator")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="global L2 norm gradients are clipped to; 0 = no clipping"
    )
    offload: bool = Field(
        default=False,
        description="keep adamw's moments in the host's memory between updates (TPU, GPU)",
    )


class LoRAConfig(Section):
    """Low-rank adapters beside the matrices of the model."""

    rank: int = Field(default=0, ge=0, description="columns of A and rows of B; 0 = no adapters")
    alpha: float = Field(
        default=32.0, gt=0, description="the adapters' product is scaled by alpha / rank"
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share (0 to 1) of an adapter's inputs that training sets to zero",
    )
    targets: str | list[str] | None = Field(
        default=None,
        description="the matrices with an adapter, out of " + ", ".join(PROJECTIONS) + "; null = "
        "all of the layers, all = those and lm_head",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate of the adapters, on optimizer's schedule; null = "
        "optimizer.learning_rate",
    )


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
        description="train prompts, in the shares of synthesize.mix; null = all there are",
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
    think_tokens: int = Field(
        default=1024, ge=1, description="tokens after which an unfinished thought is closed"
    )
    answer_tokens: int = Field(
        default=1024, ge=1, description="tokens of the answer at most, besides those of the thought"
    )
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")
    samples: int = Field(default=1, ge=1, description="answers to each prompt")
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
        default=None, ge=1, description="prompts at most, the first ones; null = all"
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
    slots: int = Field(
        default=16, ge=1, description="answers under way at a time, over all devices of a host"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="what is computed in; null = float32 on a CPU, elsewhere bfloat16",
    )


class ServerConfig(Section):
    """How models behind OpenAI-compatible servers are asked, and what that may cost."""

    key_env: str = Field(
        default="OPENAI_API_KEY", description="environment variable that holds the server's key"
    )
    concurrency: int = Field(
        default=8, ge=1, description="requests under way at a time; does not change the result"
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, description="requests in any minute at most; null = as the server says"
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="tokens in any minute at most, the prompt's estimated and all that may be new; "
        "null = as the server says",
    )
    max_requests: int | None = Field(
        default=None,
        ge=1,
        description="replies of a run at most, those it finds in the cache too; null = any number",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a run's prompts and replies at most, cached ones too; null = any "
        "number",
    )
    max_cost: float | None = Field(
        default=None,
        gt=0,
        description="cost of a run's replies at most, cached ones too, in the money of the prices; "
        "null = any",
    )
    input_price: float = Field(default=0.0, ge=0, description="money per million prompt tokens")
    output_price: float = Field(default=0.0, ge=0, description="money per million new tokens")
    timeout: float = Field(default=600.0, gt=0, description="seconds a reply may take")
    attempts: int = Field(
        default=8,
        ge=1,
        description="times a request is sent at most, where the server is busy or fails",
    )
    backoff: float = Field(
        default=1.0,
        ge=0,
        description="seconds before the second attempt; doubles with each, up to a minute",
    )
    give_up: Literal["run", "request"] = Field(
        default="run",
        description="what ends when all attempts fail: the run, which can go on later, or only the "
        "request, which is reported",
    )
    stream: bool = Field(
        default=False, description="ask for replies as streams, for gateways that cut idle lines"
    )
    extra: str | None = Field(
        default=None,
        description="JSON object of more fields of each request; a null takes a field out",
    )
    version: str | None = Field(
        default=None,
        description="what the replies depend on beside the model's name, such as its date; null = "
        "nothing",
    )
    cache: str | None = Field(
        default=None,
        description="sqlite file of replies; null = replies.sqlite in the cache folder "
        "(SARO_JAX_CACHE)",
    )


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
    slots: int = Field(default=16, ge=1, description="continuations under way at a time")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="what continuations are computed in; null = float32 on a CPU, elsewhere "
        "bfloat16",
    )


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


class MeshConfig(Section):
    """How the devices are laid out; the axes' product is their number."""

    data: int = Field(
        default=1, ge=-1, description="devices that hold copies of the weights; -1 = the rest"
    )
    fsdp: int = Field(
        default=-1, ge=-1, description="devices that share out weights and batch; -1 = the rest"
    )
    tensor: int = Field(
        default=1, ge=-1, description="devices that share out each matrix product; -1 = the rest"
    )
    sequence: int = Field(
        default=1,
        ge=-1,
        description="devices that share out the tokens of each row, and weights; -1 = the rest",
    )
    slice: int = Field(
        default=1, ge=-1, description="slices of a multi-slice TPU: copies; -1 = the rest"
    )


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
