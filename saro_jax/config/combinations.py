"""Owns what settings of the tree exclude or need each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from saro_jax.config.values import as_typed, names, nearest

if TYPE_CHECKING:
    from saro_jax.config.evaluate import EvaluateConfig
    from saro_jax.config.pairs import PairsConfig
    from saro_jax.config.sample import SampleConfig
    from saro_jax.config.server import ServerConfig
    from saro_jax.config.srpo import SRPOConfig
    from saro_jax.config.synthesize import SynthesizeConfig
    from saro_jax.config.train import TrainConfig
    from saro_jax.config.tree import Config

# Steps over which the fall of the chosen log-probs is averaged (srpo.max_chosen_drop).
DROP_WINDOW = 5
# The matrices of a decoder that adapters can join, those of every layer first.
LAYER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*LAYER_PROJECTIONS, "lm_head")


def check(config: Config) -> None:
    """Refuse settings that exclude each other, or that nothing would read, in one line."""
    # The first key named is the one whose file:line or flag `load` puts before the message.
    model, data, train = config.model, config.data, config.train
    optimizer, srpo = config.optimizer, config.srpo
    if model.revision is not None and (
        model.path in (None, "quickstart") or str(model.path).endswith(".gguf")
    ):
        raise ValueError(
            f"model.revision={model.revision} needs a Hub id in model.path, got "
            f"{model.path or 'null'}"
        )
    if data.row_length is not None and data.row_length < data.max_length:
        raise ValueError(
            f"data.row_length={data.row_length} cannot hold a sequence of "
            f"data.max_length={data.max_length} tokens"
        )
    if train.reduce_dtype == "bfloat16":
        for key in ("dtype", "param_dtype"):
            wanted = type(model).model_fields[key].default
            if getattr(model, key) != wanted:
                raise ValueError(
                    f"train.reduce_dtype=bfloat16 is for model.{key}={wanted}, got "
                    f"{getattr(model, key)}; leave it at float32"
                )
    if train.eval_every and data.eval is None:
        raise ValueError(f"train.eval_every={train.eval_every} needs rows in data.eval")
    for key in ("answers_every", "answers_tokens"):
        value = getattr(train, key)
        if train.answers is None and value != type(train).model_fields[key].default:
            raise ValueError(f"train.{key}={value} needs prompts in train.answers")
    if optimizer.min_lr_ratio and optimizer.schedule == "constant":
        raise ValueError(
            f"optimizer.min_lr_ratio={optimizer.min_lr_ratio} has no meaning with "
            "optimizer.schedule=constant; set it to 0"
        )
    for key in ("b1", "b2", "eps"):
        value, default = getattr(optimizer, key), type(optimizer).model_fields[key].default
        if optimizer.name == "sgd" and value != default:
            raise ValueError(
                f"optimizer.{key}={value} has no meaning with optimizer.name=sgd; leave it at "
                f"{default}"
            )
    if optimizer.offload and optimizer.name == "sgd":
        raise ValueError(
            "optimizer.offload=true has no meaning with optimizer.name=sgd: it has no moments"
        )
    _check_srpo(srpo, train)
    _check_adapters(config)
    _check_synthesize(config.synthesize)
    _check_evaluate(config.evaluate)
    _check_pairs(config.pairs)
    _check_served(config, "sample")
    _check_served(config, "pairs")
    _check_server(config.server)
    for axis, size in config.mesh:
        if size == 0:
            raise ValueError(f"mesh.{axis}=0: expected at least 1 device, or -1 for the rest")
    rest = [axis for axis, size in config.mesh if size == -1]
    if len(rest) > 1:
        raise ValueError(
            f"mesh.{rest[0]}=-1 and mesh.{rest[1]}=-1: only one axis can take the rest"
        )


def _check_srpo(srpo: SRPOConfig, train: TrainConfig) -> None:
    """Refuse, in one line, settings that the loss does not read or that exclude each other."""
    loss, default = srpo.loss, type(srpo).model_fields

    def refuse(why: str, *keys: str) -> None:
        for key in keys:
            value, usual = getattr(srpo, key), default[key].default
            if value != usual:
                text = "null" if value is None else value
                raise ValueError(
                    f"srpo.{key}={text} has no meaning with {why}; leave it at {usual}"
                )

    if loss not in ("sigmoid", "robust"):
        refuse(f"srpo.loss={loss}", "label_smoothing")
    if loss in ("orpo", "kto"):  # orpo has that term already
        refuse(f"srpo.loss={loss}", "nll_weight")
    if loss != "simpo":
        refuse(f"srpo.loss={loss}", "target_margin")
    if loss in ("identity_po", "simpo", "orpo"):
        refuse(f"srpo.loss={loss}, which always takes means", "length")
    if srpo.length != "desensitised":
        refuse(f"srpo.length={srpo.length}", "length_alpha")
    if loss in ("simpo", "orpo"):
        refuse(
            f"srpo.loss={loss}, which has no reference",
            *("reasoning_weight", "answer_weight", "reference", "max_chosen_drop", "on_drop"),
        )
    if loss == "kto":
        pairwise = ("length", "reasoning_weight", "answer_weight", "scope", "layout")
        refuse("srpo.loss=kto, which has no pairs", *pairwise)
        if train.batch_rows < 2:
            raise ValueError(
                "train.batch_rows=1: srpo.loss=kto needs at least 2 rows in a step for its baseline"
            )
    else:
        refuse(f"srpo.loss={loss}", "desirable_weight", "undesirable_weight")
    for one, other in (
        ("reasoning_weight", "answer_weight"),
        ("desirable_weight", "undesirable_weight"),
    ):
        if getattr(srpo, one) == getattr(srpo, other) == 0:
            raise ValueError(f"srpo.{one}=0 and srpo.{other}=0: nothing is left of the loss")
    if srpo.reference != "resident":
        refuse(f"srpo.reference={srpo.reference}", "sync_every")
    if not srpo.sync_every:
        refuse("srpo.sync_every=0", "sync_mix")
    if srpo.max_chosen_drop is None:
        refuse("srpo.max_chosen_drop=null", "on_drop")
    if srpo.on_drop == "rollback" and (train.keep - 1) * train.save_every < DROP_WINDOW:
        raise ValueError(
            f"srpo.on_drop=rollback needs a checkpoint from {DROP_WINDOW} steps ago: "
            f"train.keep={train.keep} and train.save_every={train.save_every} keep none"
        )


def _check_server(server: ServerConfig) -> None:
    if server.max_cost is not None and not server.input_price + server.output_price:
        raise ValueError(
            f"server.max_cost={server.max_cost:g} has no meaning without server.input_price or "
            "server.output_price"
        )


def _check_evaluate(evaluate: EvaluateConfig) -> None:
    if evaluate.samples > 1 and not evaluate.temperature:
        raise ValueError(
            f"evaluate.samples={evaluate.samples} needs evaluate.temperature above 0: greedy "
            "answers are all the same"
        )


def _check_teacher(synthesize: SynthesizeConfig) -> None:
    teacher, default = synthesize.teacher, type(synthesize).model_fields
    needs = {"api": ("teacher_url", "teacher_model"), "local": ("teacher_model",)}
    for key in needs.get(teacher, ()):
        if getattr(synthesize, key) is None:
            raise ValueError(f"synthesize.teacher={teacher} needs synthesize.{key}")
    if teacher == "self" and synthesize.teacher_url and not synthesize.teacher_model:
        raise ValueError("synthesize.teacher_url needs synthesize.teacher_model")
    if synthesize.repair and synthesize.guard is None:
        raise ValueError("synthesize.repair=true needs synthesize.guard")
    unread = {
        "template": (
            *("teacher_model", "teacher_url", "steer", "min_flip_rate", "flip_prompts"),
            *("shots", "examples", "search"),
            *("label", "score", "repair", "compress"),
        ),
        "api": ("min_flip_rate", "flip_prompts", "search"),
        "local": ("teacher_url", "min_flip_rate", "flip_prompts", "search"),
    }
    for key in unread.get(teacher, ()):
        value = getattr(synthesize, key)
        if value != default[key].default:
            raise ValueError(
                f"synthesize.{key}={as_typed(value)} has no meaning with "
                f"synthesize.teacher={teacher}"
            )
    if not synthesize.shots and not synthesize.search:
        if synthesize.examples != default["examples"].default:
            raise ValueError(
                f"synthesize.examples={synthesize.examples} is not read with synthesize.shots=0"
            )
    elif synthesize.search and synthesize.render != default["render"].default:
        raise ValueError(
            f"synthesize.render={synthesize.render} has no meaning with synthesize.search=true, "
            "which tries both"
        )


def _check_synthesize(synthesize: SynthesizeConfig) -> None:
    """Shares that are shares, limits that leave something, settings that are read."""
    shares = synthesize.mix.split(":")
    numbers = [float(one) for one in shares if re.fullmatch(r"\d+(\.\d+)?", one)]
    if len(shares) != 4 or len(numbers) != 4 or not sum(numbers):
        raise ValueError(
            f"synthesize.mix={synthesize.mix}: expected four shares like 25:25:30:20 (harmful : "
            "jailbreak : benign : borderline)"
        )
    default = type(synthesize).model_fields
    _check_teacher(synthesize)
    if synthesize.size is None and synthesize.mix != default["mix"].default:
        raise ValueError(
            f"synthesize.mix={synthesize.mix} has no meaning with synthesize.size=null, which "
            "takes all prompts"
        )
    if synthesize.min_steps > synthesize.max_steps:
        raise ValueError(
            f"synthesize.min_steps={synthesize.min_steps} is more than "
            f"synthesize.max_steps={synthesize.max_steps}"
        )
    if synthesize.srs != "shortest_q" and synthesize.srs_floor != default["srs_floor"].default:
        raise ValueError(
            f"synthesize.srs_floor={synthesize.srs_floor} has no meaning with "
            f"synthesize.srs={synthesize.srs}"
        )
    if synthesize.evaluation is None:
        for key in ("exact_hits", "ngram", "tfidf"):
            value = getattr(synthesize, key)
            if value != default[key].default:
                raise ValueError(
                    f"synthesize.{key}={value} has no meaning with synthesize.evaluation=null"
                )


def _check_pairs(pairs: PairsConfig) -> None:
    """Shares that are shares, thresholds in their order, settings that are read."""
    default = type(pairs).model_fields
    for key, count in (("quotas", 4), ("mix", 7)):
        value = getattr(pairs, key)
        shares = [one for one in value.split(":") if re.fullmatch(r"\d+(\.\d+)?", one)]
        if len(shares) != count or value.count(":") != count - 1 or not sum(map(float, shares)):
            raise ValueError(
                f"pairs.{key}={value}: expected {count} shares like {default[key].default}"
            )
        if pairs.size is None and value != default[key].default:
            raise ValueError(
                f"pairs.{key}={value} has no meaning with pairs.size=null, which takes all pairs"
            )
    if pairs.safe > pairs.unsafe:
        raise ValueError(f"pairs.safe={pairs.safe:g} is more than pairs.unsafe={pairs.unsafe:g}")
    if pairs.negatives is None and pairs.off_policy != default["off_policy"].default:
        raise ValueError(
            f"pairs.off_policy={pairs.off_policy:g} has no meaning with pairs.negatives=null"
        )


def _check_served(config: Config, name: Literal["sample", "pairs"]) -> None:
    """A policy behind a server has a name there, and nothing that only a model run here has."""
    section: SampleConfig | PairsConfig = getattr(config, name)
    default = type(section).model_fields
    if section.url is None:
        if section.served_name is not None:
            raise ValueError(f"{name}.served_name={section.served_name} needs {name}.url")
        return
    if section.served_name is None and config.model.path is None:
        raise ValueError(f"{name}.url needs {name}.served_name or model.path")
    for key in ("slots", "dtype", "think_tokens"):
        if key in default and (value := getattr(section, key)) != default[key].default:
            raise ValueError(
                f"{name}.{key}={as_typed(value)} has no meaning with {name}.url: it is for a model "
                "that runs here"
            )


def _check_adapters(config: Config) -> None:
    """Combinations of adapters and of what is frozen."""
    lora, freeze = config.lora, names(config.train.freeze)
    for key, value in lora:
        if key != "rank" and not lora.rank and value != type(lora).model_fields[key].default:
            raise ValueError(f"lora.{key}={as_typed(value)} has no meaning with lora.rank=0")
    for name in names(lora.targets):
        if name not in PROJECTIONS and lora.targets != "all":
            raise ValueError(f"lora.targets: unknown matrix {name!r}{nearest(name, PROJECTIONS)}")
    if len(set(names(lora.targets))) < len(names(lora.targets)):
        raise ValueError(
            f"lora.targets: a matrix is given twice in {', '.join(lora.targets or ())}"
        )
    if "none" in freeze and len(freeze) > 1:
        raise ValueError("train.freeze: none stands alone, got " + ", ".join(freeze))
    for pattern in freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"train.freeze: {pattern!r} is not a regular expression: {error}"
            ) from None
    if config.train.reduce_dtype != "float32" and lora.rank and not freeze:
        raise ValueError(
            f"train.reduce_dtype={config.train.reduce_dtype} has no meaning with lora.rank="
            f"{lora.rank}: no matrix of the layers trains; leave it at float32"
        )
    if config.model.frozen_dtype and freeze in (["none"], []) and not (lora.rank and not freeze):
        raise ValueError(
            f"model.frozen_dtype={config.model.frozen_dtype} has no meaning where every weight "
            "trains; set lora.rank or train.freeze"
        )
