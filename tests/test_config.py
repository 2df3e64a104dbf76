"""Tests saro_jax/config/: recipes, overrides, one-line errors with their place, help."""

import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import saro_jax
from saro_jax.config import (
    Config,
    DataConfig,
    Flag,
    SRPOConfig,
    dump,
    help_text,
    load,
    parse_command_line,
    provenance,
    recipe,
    recipe_path,
    versions,
)

RECIPES = (
    *(
        "quickstart",
        "smollm2_star1",
        "smollm2_135m",
        "qwen2.5_0.5b",
        "llama3.1_8b",
        "llama3.1_8b_lora",
    ),
    *("llama3.1_70b", "llama3.2_1b", "llama3.2_1b_lora", "qwen2.5_7b", "qwen3_8b"),
)
RECIPE = """\
# a recipe
model:
  path: some/model
data:
  train: rows.jsonl
  max_length: 512

optimizer:
  learning_rate: 1e-5
stages:
  rw:
    train:
      steps: 7
    optimizer:
      learning_rate: 3e-4
  srpo:
    data: {train: [a.jsonl, b.jsonl]}
    srpo:
      beta: 0.2
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> str:
    Path("configs").mkdir(exist_ok=True)
    Path("configs/x.yaml").write_text(text, encoding="utf-8")
    return "configs/x.yaml"


def message(recipe: str | None, *overrides: str, stage: str = "rw") -> str:
    with pytest.raises(ValueError) as caught:
        load(recipe, overrides, stage)
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def all_fields(model: type[BaseModel] = Config, outer: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, field in model.model_fields.items():
        found.append((outer + name, field))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += all_fields(kind, f"{outer}{name}.")
    return found


# ---- loading


@pytest.mark.parametrize("stage", ["rw", "srpo"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_packaged_recipe_loads_and_states_command_and_hardware(name: str, stage: str):
    path = recipe_path(name)
    config = load(path, [], stage)
    assert config == load(name, [], stage)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("command" in line for line in header)
    assert any("hardware" in line for line in header)
    # A 135M model is taught a habit from a few hundred rows (docs/log.md); others stay lower.
    small = name in ("quickstart", "smollm2_star1")
    assert config.optimizer.learning_rate <= (2e-4 if small else 5e-5)


def test_the_packaged_recipes_are_the_listed_ones():
    names = sorted(path.name for path in recipe_path("quickstart").parent.glob("*.yaml"))
    assert names == sorted(f"{name}.yaml" for name in RECIPES)


def test_without_a_recipe_it_is_the_quickstart():
    assert load(None, [], "rw") == load(recipe_path("quickstart"), [], "rw")
    assert load(None, [], "rw").data.train == "quickstart:ritd"
    assert load(None, [], "srpo").data.train == "quickstart:preferences"


def test_a_stage_lies_over_the_recipe_and_overrides_over_both():
    path = write(RECIPE)
    rw, srpo = load(path, [], "rw"), load(path, [], "srpo")
    assert (rw.train.steps, rw.optimizer.learning_rate, rw.data.train) == (7, 3e-4, "rows.jsonl")
    assert (srpo.train.steps, srpo.optimizer.learning_rate) == (None, 1e-5)
    assert (srpo.data.train, srpo.data.max_length) == (["a.jsonl", "b.jsonl"], 512)
    assert (rw.srpo.beta, srpo.srpo.beta) == (0.1, 0.2)
    over = load(path, ["--train.steps=9", "--optimizer.learning_rate=1"], "rw")
    assert (over.train.steps, over.optimizer.learning_rate) == (9, 1.0)
    assert load(path, ["--train.steps=null"], "rw").train.steps is None


def test_an_override_of_one_stage_leaves_the_other_alone():
    overrides = ["--stages.rw.train.steps=5", "--train.steps=6", "--seed=3"]
    path = write(RECIPE)
    assert load(path, overrides, "rw").train.steps == 5
    assert load(path, overrides, "srpo").train.steps == 6
    assert load(path, overrides, "srpo").seed == 3


def test_the_resolved_config_has_no_stages_and_is_frozen():
    config = load(write(RECIPE), [], "rw")
    assert "stages" not in config.model_dump()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        SRPOConfig(betta=1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-5", 1e-5), ("'1e-5'", 1e-5), ("1", 1.0), ("2.5E-3", 2.5e-3), (".5", 0.5), ("1.", 1.0)],
)
def test_numbers_are_read_by_the_fields_type(text: str, expected: float):
    path = write(f"data: {{train: x}}\noptimizer:\n  learning_rate: {text}\n")
    value = load(path, [], "rw").optimizer.learning_rate
    assert isinstance(value, float) and value == expected


def test_text_that_looks_like_a_number_stays_text():
    path = write("model: {path: a/b, revision: 12345e6}\ndata: {train: 0017, split: '3'}\n")
    config = load(path, [], "rw")
    assert config.model.revision == "12345e6"
    assert (config.data.train, config.data.split) == ("0017", "3")
    assert load(path, ["--model.revision=0017"], "rw").model.revision == "0017"


def test_an_empty_section_is_no_setting():
    config = load(write("data: {train: x}\noptimizer:\n  # nothing\nstages:\n  rw:\n"), [], "rw")
    assert config == Config(data=DataConfig(train="x"))


@pytest.mark.parametrize("text", ["a.jsonl,b.jsonl", "[a.jsonl, b.jsonl]"])
def test_a_list_override(text: str):
    assert load(None, [f"--data.train={text}"], "rw").data.train == ["a.jsonl", "b.jsonl"]


def test_a_repeated_list_override_adds_up():
    flags = ["--data.train=a", "--data.train=b,c", "--data.train=[d]"]
    assert load(None, flags, "rw").data.train == ["a", "b", "c", "d"]
    assert load(None, ["--data.train=a"], "rw").data.train == "a"
    assert load(None, ["--data.train=[a]"], "rw").data.train == ["a"]


def test_a_list_that_may_be_null_takes_null_as_an_override():
    path = write("data: {train: x}\ntrain: {freeze: [mlp, norm]}\n")
    assert load(path, [], "rw").train.freeze == ["mlp", "norm"]
    assert load(path, ["--train.freeze=null"], "rw").train.freeze is None
    assert load(path, ["--train.freeze=none"], "rw").train.freeze == "none"


def test_typed_overrides():
    flags = ["--train.tensorboard=false", "--mesh.fsdp=-1", "--model.remat=none"]
    config = load(None, [*flags, "--train.wandb=off", "--data.row_length=null"], "srpo")
    assert config.train.tensorboard is False
    assert config.mesh.fsdp == -1
    assert config.model.remat == "none"
    assert config.train.wandb == "off"
    assert config.data.row_length is None


# ---- errors in a recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "optimizer:\n\n  learning_rat: 1\n",
            "configs/x.yaml:3: unknown key 'learning_rat' in optimizer; "
            "did you mean 'learning_rate'?",
        ),
        (
            "optimiser: {}\n",
            "configs/x.yaml:1: unknown key 'optimiser'; did you mean 'optimizer'?",
        ),
        (
            "\nsteps: 3\n",
            "configs/x.yaml:2: unknown key 'steps'; did you mean 'train.steps'?",
        ),
        (
            "srpo:\n  zzz: 3\n",
            "configs/x.yaml:2: unknown key 'zzz' in srpo; allowed: loss, beta, label_smoothing, "
            "nll_weight, target_margin, length, length_alpha, reasoning_weight, answer_weight, "
            "scope, desirable_weight, undesirable_weight, layout, reference_cache, recheck, "
            "reference, sync_every, sync_mix, max_chosen_drop, on_drop",
        ),
        (
            "stages:\n  rw:\n    train:\n      stepz: 3\n",
            "configs/x.yaml:4: unknown key 'stepz' in stages.rw.train; did you mean 'steps'?",
        ),
        (
            "stages:\n  srop: {}\n",
            "configs/x.yaml:2: unknown key 'srop' in stages; did you mean 'srpo'?",
        ),
        (
            "stages:\n  srpo:\n    srpo: {beta: -1}\n",
            "configs/x.yaml:3: stages.srpo.srpo.beta: expected a number > 0, got '-1'",
        ),
        (
            "stages: {rw: {stages: {}}}\n",
            "configs/x.yaml:1: unknown key 'stages' in stages.rw; allowed: model, data, train, "
            "optimizer, lora, srpo, synthesize, evaluate, sample, server, pairs, analyse, "
            "pipeline, mesh, seed",
        ),
        (
            "train:\n  steps: abc\n",
            "configs/x.yaml:2: train.steps: expected an integer >= 1 or null, got 'abc'",
        ),
        (
            "train:\n  keep: null\n",
            "configs/x.yaml:2: train.keep: expected an integer >= 1, got null",
        ),
        (
            "train:\n  keep: 1.5\n",
            "configs/x.yaml:2: train.keep: expected an integer >= 1, got '1.5'",
        ),
        (
            "train:\n  tensorboard: yes\n",
            "configs/x.yaml:2: train.tensorboard: expected true or false, got 'yes'",
        ),
        (
            "train:\n  epochs: .inf\n",
            "configs/x.yaml:2: train.epochs: expected a number > 0, got '.inf'",
        ),
        (
            "train:\n  epochs: nan\n",
            "configs/x.yaml:2: train.epochs: expected a number > 0, got 'nan'",
        ),
        (
            "model:\n  remat: some\n",
            "configs/x.yaml:2: model.remat: expected none or dots or attention or full, got 'some'",
        ),
        (
            "optimizer: adamw\n",
            "configs/x.yaml:1: optimizer: expected keys, got 'adamw'",
        ),
        (
            "train:\n  steps: [1, 2]\n",
            "configs/x.yaml:2: train.steps: expected an integer >= 1 or null, got a list",
        ),
        (
            "data:\n  train: []\n",
            "configs/x.yaml:2: data.train: expected text or a list of text, got an empty list",
        ),
        (
            "data:\n  train: [a, [b]]\n",
            "configs/x.yaml:2: data.train: expected text or a list of text, got a list",
        ),
        ("data:\n  train: ''\n", "configs/x.yaml:2: data.train: expected text, got ''"),
        (
            "seed: 1\ntrain: {}\nseed: 2\n",
            "configs/x.yaml:3: key 'seed' is given twice, first in line 1",
        ),
        (
            "train:\n  keep: 1\n  keep: 1\n",
            "configs/x.yaml:3: key 'keep' is given twice, first in line 2",
        ),
        ("- a\n", "configs/x.yaml:1: the recipe: expected keys, got a list"),
        ("a: [1\nb: 2\n", "configs/x.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("seed: 1\n", "configs/x.yaml: data.train is required: training rows: file, folder or "
         "Hub id, or several of them; 'quickstart:ritd' and 'quickstart:preferences' are packaged"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_line(text: str, expected: str):
    assert message(write(text)) == expected


def test_both_stages_are_checked_whichever_runs():
    path = write("data: {train: x}\nstages:\n  srpo:\n    srpo:\n      loss: ipo\n")
    assert message(path, stage="rw").startswith("configs/x.yaml:5: stages.srpo.srpo.loss: expected")


def test_what_is_no_recipe():
    assert message("configs/none.yaml").startswith(
        "configs/none.yaml: no such recipe; the packaged ones are llama3.1_70b, "
    )
    assert message("quickstar") == (
        "--config=quickstar: unknown recipe; did you mean 'quickstart'?"
    )
    Path("latin.yaml").write_bytes(b"seed: \xff\n")
    assert message("latin.yaml").startswith("latin.yaml: cannot be read: ")
    Path("bell.yaml").write_bytes(b"seed: \x07\n")
    assert message("bell.yaml").startswith("bell.yaml: not YAML: ")
    assert message(None, stage="sft") == "--stage=sft: expected rw or srpo, got 'sft'"


def test_a_recursive_alias_is_refused():
    assert "unknown key" in message(write("stages: &a\n  rw: *a\n"))
    assert "got a list" in message(write("data:\n  train: &a [*a]\n"))


# ---- errors in overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--train.keep=abc", "--train.keep=abc: expected an integer >= 1, got 'abc'"),
        ("--train.steps=0", "--train.steps=0: expected an integer >= 1 or null, got '0'"),
        ("--train.stepz=1", "--train.stepz: unknown option; did you mean --train.steps?"),
        ("--steps=1", "--steps: unknown option; did you mean --train.steps?"),
        ("--zzz.zzz=1", "--zzz.zzz: unknown option; --help lists them"),
        ("--train=1", "--train: train is a section; set one of its keys: --train.steps=VALUE"),
        ("--train.steps", "--train.steps: needs a value: --train.steps=VALUE"),
        ("--stages.wr.seed=1", "--stages.wr.seed: unknown stage 'wr'; allowed: rw, srpo"),
        ("--stages.rw.sead=1", "--stages.rw.sead: unknown option; did you mean --seed?"),
        ("--data.train=a,,b", "--data.train=a,,b: expected text, got ''"),
        ("--data.train=", "--data.train=: expected text, got ''"),
        (
            "--model.remat=all",
            "--model.remat=all: expected none or dots or attention or full, got 'all'",
        ),
        ("--srpo.label_smoothing=0.5", "--srpo.label_smoothing=0.5: expected a number >= 0 and "
         "< 0.5, got '0.5'"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused_by_its_flag(override: str, expected: str):
    assert message(None, override) == expected


def test_an_override_given_twice_is_refused():
    assert message(None, "--seed=1", "--seed=2") == "--seed=2: given twice, first as --seed=1"


# ---- combinations


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--srpo.loss=identity_po", "--srpo.label_smoothing=0.1"],
            "--srpo.label_smoothing=0.1: srpo.label_smoothing=0.1 has no meaning with "
            "srpo.loss=identity_po; leave it at 0.0",
        ),
        (
            ["--srpo.loss=orpo", "--srpo.nll_weight=1"],
            "--srpo.nll_weight=1: srpo.nll_weight=1.0 has no meaning with srpo.loss=orpo; leave it "
            "at 0.0",
        ),
        (
            ["--train.reduce_dtype=bfloat16", "--model.dtype=float32"],
            "--train.reduce_dtype=bfloat16: train.reduce_dtype=bfloat16 is for model.dtype="
            "bfloat16, got float32; leave it at float32",
        ),
        (
            ["--train.reduce_dtype=bfloat16", "--lora.rank=4"],
            "--train.reduce_dtype=bfloat16: train.reduce_dtype=bfloat16 has no meaning with "
            "lora.rank=4: no matrix of the layers trains; leave it at float32",
        ),
        (
            ["--srpo.target_margin=1"],
            "--srpo.target_margin=1: srpo.target_margin=1.0 has no meaning with "
            "srpo.loss=sigmoid; leave it at 0.5",
        ),
        (
            ["--srpo.loss=identity_po", "--srpo.length=mean"],
            "--srpo.length=mean: srpo.length=mean has no meaning with srpo.loss=identity_po, which "
            "always takes means; leave it at sum",
        ),
        (
            ["--srpo.length_alpha=0.1"],
            "--srpo.length_alpha=0.1: srpo.length_alpha=0.1 has no meaning with srpo.length=sum; "
            "leave it at 0.5",
        ),
        (
            ["--srpo.loss=simpo", "--srpo.max_chosen_drop=null"],
            "--srpo.max_chosen_drop=null: srpo.max_chosen_drop=null has no meaning with "
            "srpo.loss=simpo, which has no reference; leave it at 20.0",
        ),
        (
            ["--srpo.loss=kto", "--srpo.scope=step"],
            "--srpo.scope=step: srpo.scope=step has no meaning with srpo.loss=kto, which has no "
            "pairs; leave it at suffix",
        ),
        (
            ["--srpo.loss=kto", "--train.batch_rows=1"],
            "--train.batch_rows=1: train.batch_rows=1: srpo.loss=kto needs at least 2 rows in a "
            "step for its baseline",
        ),
        (
            ["--srpo.desirable_weight=2"],
            "--srpo.desirable_weight=2: srpo.desirable_weight=2.0 has no meaning with "
            "srpo.loss=sigmoid; leave it at 1.0",
        ),
        (
            ["--srpo.reasoning_weight=0", "--srpo.answer_weight=0"],
            "--srpo.reasoning_weight=0: srpo.reasoning_weight=0 and srpo.answer_weight=0: nothing "
            "is left of the loss",
        ),
        (
            ["--srpo.sync_every=2"],
            "--srpo.sync_every=2: srpo.sync_every=2 has no meaning with srpo.reference=stored; "
            "leave it at 0",
        ),
        (
            ["--srpo.reference=resident", "--srpo.sync_mix=0.5"],
            "--srpo.sync_mix=0.5: srpo.sync_mix=0.5 has no meaning with srpo.sync_every=0; leave "
            "it at 1.0",
        ),
        (
            ["--srpo.max_chosen_drop=null", "--srpo.on_drop=rollback"],
            "--srpo.on_drop=rollback: srpo.on_drop=rollback has no meaning with "
            "srpo.max_chosen_drop=null; leave it at stop",
        ),
        (
            ["--srpo.on_drop=rollback", "--train.save_every=1"],
            "--srpo.on_drop=rollback: srpo.on_drop=rollback needs a checkpoint from 5 steps ago: "
            "train.keep=2 and train.save_every=1 keep none",
        ),
        (
            ["--data.row_length=100"],
            "--data.row_length=100: data.row_length=100 cannot hold a sequence of "
            "data.max_length=512 tokens",
        ),
        (
            ["--train.eval_every=3"],
            "--train.eval_every=3: train.eval_every=3 needs rows in data.eval",
        ),
        (
            ["--optimizer.schedule=constant", "--optimizer.min_lr_ratio=0.1"],
            "--optimizer.min_lr_ratio=0.1: optimizer.min_lr_ratio=0.1 has no meaning with "
            "optimizer.schedule=constant; set it to 0",
        ),
        (
            ["--optimizer.name=sgd", "--optimizer.offload=true"],
            "--optimizer.offload=true: optimizer.offload=true has no meaning with "
            "optimizer.name=sgd: it has no moments",
        ),
        (
            ["--optimizer.name=sgd", "--optimizer.b2=0.9"],
            "--optimizer.b2=0.9: optimizer.b2=0.9 has no meaning with optimizer.name=sgd; leave it "
            "at 0.95",
        ),
        (
            ["--lora.alpha=8"],
            "--lora.alpha=8: lora.alpha=8.0 has no meaning with lora.rank=0",
        ),
        (
            ["--lora.rank=4", "--lora.targets=q_proj,up_prj"],
            "--lora.targets=q_proj,up_prj: lora.targets: unknown matrix 'up_prj'; did you mean "
            "'up_proj'?",
        ),
        (
            ["--lora.rank=4", "--lora.targets=q_proj,q_proj"],
            "--lora.targets=q_proj,q_proj: lora.targets: a matrix is given twice in q_proj, q_proj",
        ),
        (
            ["--train.freeze=none,mlp"],
            "--train.freeze=none,mlp: train.freeze: none stands alone, got none, mlp",
        ),
        (
            ["--train.freeze=mlp(", "--lora.rank=4"],
            "--train.freeze=mlp(: train.freeze: 'mlp(' is not a regular expression: missing ), "
            "unterminated subpattern at position 3",
        ),
        (
            ["--model.frozen_dtype=bfloat16"],
            "--model.frozen_dtype=bfloat16: model.frozen_dtype=bfloat16 has no meaning where every "
            "weight trains; set lora.rank or train.freeze",
        ),
        (
            ["--model.frozen_dtype=bfloat16", "--lora.rank=4", "--train.freeze=none"],
            "--model.frozen_dtype=bfloat16: model.frozen_dtype=bfloat16 has no meaning where every "
            "weight trains; set lora.rank or train.freeze",
        ),
        (
            ["--model.revision=main"],
            "--model.revision=main: model.revision=main needs a Hub id in model.path, got null",
        ),
        (
            ["--model.revision=main", "--model.path=x.gguf"],
            "--model.revision=main: model.revision=main needs a Hub id in model.path, got x.gguf",
        ),
        (
            ["--server.max_cost=5"],
            "--server.max_cost=5: server.max_cost=5 has no meaning without server.input_price or "
            "server.output_price",
        ),
        (
            ["--synthesize.mix=1:2:3"],
            "--synthesize.mix=1:2:3: synthesize.mix=1:2:3: expected four shares like 25:25:30:20 "
            "(harmful : jailbreak : benign : borderline)",
        ),
        (
            ["--synthesize.mix=1:1:1:1"],
            "--synthesize.mix=1:1:1:1: synthesize.mix=1:1:1:1 has no meaning with "
            "synthesize.size=null, which takes all prompts",
        ),
        (
            ["--synthesize.max_steps=1"],
            "--synthesize.max_steps=1: synthesize.min_steps=2 is more than synthesize.max_steps=1",
        ),
        (
            ["--synthesize.srs=pctl", "--synthesize.srs_floor=10"],
            "--synthesize.srs_floor=10: synthesize.srs_floor=10 has no meaning with "
            "synthesize.srs=pctl",
        ),
        (
            ["--synthesize.evaluation=null", "--synthesize.ngram=4"],
            "--synthesize.ngram=4: synthesize.ngram=4 has no meaning with "
            "synthesize.evaluation=null",
        ),
        (
            ["--mesh.fsdp=0"],
            "--mesh.fsdp=0: mesh.fsdp=0: expected at least 1 device, or -1 for the rest",
        ),
        (
            ["--mesh.data=-1"],
            "--mesh.data=-1: mesh.data=-1 and mesh.fsdp=-1: only one axis can take the rest",
        ),
    ],
)
def test_a_combination_without_meaning_is_refused(overrides: list[str], expected: str):
    assert message(None, *overrides) == expected


def test_a_wrong_combination_in_a_recipe_names_its_line():
    path = write("data: {train: x}\nsrpo:\n  loss: hinge\n  label_smoothing: 0.1\n")
    assert message(path).startswith("configs/x.yaml:4: srpo.label_smoothing=0.1 has no meaning")


# ---- dump, help, provenance


@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_dump_reads_back_as_the_same_config(stage: str):
    flags = [
        "--data.train=[a, ü.jsonl]",
        "--model.path=a/b",
        "--model.revision=1234567",
        "--seed=9",
    ]
    config = load(None, [*flags, "--optimizer.eps=1e-20", "--data.split=yes"], stage)
    for other in ("rw", "srpo"):
        assert load(write(dump(config)), [], other) == config


def test_dump_keeps_a_text_that_reads_as_null():
    config = Config(data=DataConfig(train=["null", "~", "a b: c"], split="null"))
    assert load(write(dump(config)), [], "rw") == config


def test_every_field_has_a_description_and_the_help_shows_it():
    text = " ".join(help_text().split())
    assert len(all_fields()) > 40
    for name, field in all_fields():
        description = getattr(field, "description", None)
        assert description, f"{name} has no description"
        assert description in text, name
        if "." in name:
            assert f"--{name}=" in text
    assert "--optimizer.learning_rate=number > 0 peak learning rate [default 1e-05]" in text
    assert all(len(line) <= 100 for line in help_text().splitlines())


def test_every_default_is_a_value_its_own_option_accepts():
    defaults = yaml.safe_load(dump(Config(data=DataConfig(train="x"))))
    for section, values in defaults.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            text = json.dumps(value).strip('"')
            resolved = load(write("data: {train: x}\n"), [f"--{section}.{key}={text}"], "rw")
            assert resolved.model_dump()[section][key] == value


def test_provenance_is_plain_data_with_versions_and_commit():
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["saro_jax"] == saro_jax.__version__
    for name in ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        assert found[name] and str(found[name])[0].isdigit()
    assert {"git_commit", "git_dirty"} <= set(found)


def copy_of(module: ModuleType, root: Path) -> Path:
    folder = root / "saro_jax" / "config"
    folder.mkdir(parents=True)
    return Path(shutil.copy(str(module.__file__), folder))


def test_the_commit_is_that_of_the_checkout_and_of_nothing_else(
    in_a_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = in_a_folder / "checkout"
    monkeypatch.setattr(versions, "__file__", str(copy_of(versions, root)))
    assert provenance()["git_commit"] is None
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "x"], check=True)
    assert provenance()["git_commit"] is None  # a wheel inside some other project's checkout
    (root / "pyproject.toml").touch()
    found = provenance()
    assert len(str(found["git_commit"])) == 40 and found["git_dirty"] is False
    (root / "saro_jax" / "config" / "versions.py").write_text("changed")
    assert provenance()["git_dirty"] is True


def test_a_wheels_recipes_lie_in_the_package(in_a_folder: Path, monkeypatch: pytest.MonkeyPatch):
    module = copy_of(recipe, in_a_folder / "site")
    inside = module.parents[1] / "configs"
    for folder in (inside, inside.parent.parent / "configs"):
        folder.mkdir()
        (folder / "quickstart.yaml").write_text("data: {train: x}\n")
    monkeypatch.setattr(recipe, "__file__", str(module))
    assert recipe_path("quickstart") == inside / "quickstart.yaml"


# ---- the command line

FLAGS = (
    Flag("config", "recipe: file or name", parse=Path),
    Flag("stage", "what to train", choices=("rw", "srpo"), required=True),
    Flag("max-rows", "rows at most", default=5, parse=int),
    Flag("resume", "go on from the last checkpoint", switch=True),
)


def parse(*argv: str, tree: bool = True):
    return parse_command_line("python -m saro_jax.train", "Train.", argv, FLAGS, tree)


def refused(*argv: str, tree: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        parse(*argv, tree=tree)
    return str(caught.value)


def test_flags_and_overrides_in_both_spellings():
    found = parse("--stage=rw", "--train.steps", "5", "--mesh.fsdp", "-1", "--resume", "--seed=1")
    assert (found.stage, found.config, found.max_rows, found.resume) == ("rw", None, 5, True)
    assert found.overrides == ["--train.steps=5", "--mesh.fsdp=-1", "--seed=1"]
    found = parse("--max-rows", "7", "--stage", "srpo", "--config", "a.yaml", "--resume=false")
    assert (found.max_rows, found.config, found.resume) == (7, Path("a.yaml"), False)
    assert load(None, parse("--stage=rw", "--train.steps", "5").overrides, "rw").train.steps == 5


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--stage=rw", "--confg=a"], "--confg: unknown option; did you mean --config?"),
        (["--stage=rw", "--train.step=1"], "--train.step: unknown option; did you mean "
         "--train.steps?"),
        (["--stage=rv"], "--stage=rv: expected rw or srpo, got 'rv'"),
        ([], "--stage: required: what to train"),
        (["--stage"], "--stage: needs a value: --stage=VALUE"),
        (["--seed", "--stage=rw"], "--seed: needs a value: --seed=VALUE"),
        (["--stage=rw", "--config="], "--config=: needs a value: --config=VALUE"),
        (["--stage=rw", "--max-rows=x"], "--max-rows=x: expected an integer, got 'x'"),
        (["--stage=rw", "--resume=1"], "--resume=1: expected true or false, got '1'"),
        (["--stage=rw", "--stage=rw"], "--stage=rw: given twice"),
        (["--stage=rw", "rest"], "unexpected argument 'rest'; options are given as --name=value"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused(argv: list[str], expected: str):
    assert refused(*argv) == expected


def test_a_stage_without_the_tree_takes_no_overrides():
    assert refused("--stage=rw", "--seed=1", tree=False).startswith("--seed: unknown option")
    assert parse("--stage=rw", tree=False).overrides == []


def test_help_shows_flags_then_fields(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m saro_jax.train ")
    assert "  --stage=rw|srpo\n      what to train [required]\n" in text
    assert text.index("--max-rows=VALUE") < text.index("--optimizer.learning_rate=")
    with pytest.raises(SystemExit):
        parse("-h", tree=False)
    assert "--optimizer" not in capsys.readouterr().out
