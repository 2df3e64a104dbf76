"""The doctor: every finding is triggered once and left out once, and --dry-run says it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from saro_jax import config as configuration
from saro_jax import train
from saro_jax.config import Config
from saro_jax.data import pipeline
from saro_jax.data.packing import Shape, pack
from saro_jax.data.tokenise import Branch, Item
from saro_jax.objectives.preference import SEGMENTS
from saro_jax.parallel import mesh as meshes
from saro_jax.training import doctor, memory, optimizer, step, watch
from saro_jax.training.doctor.preferences import wilson
from saro_jax.training.doctor.settings import plausible_rates
from saro_jax.training.finding import Finding, refuse, report

KIND = {"rw": "sft", "srpo": "preference"}


def config_of(stage: str, *overrides: str) -> Config:
    return configuration.load(tiny.folder() / "recipe.yaml", overrides, stage)


def read(tmp_path: Path, stage: str, rows: list[dict[str, Any]], *overrides: str):
    """(items, rejects, total, config) of rows through the tiny tokenizer."""
    config = config_of(stage, *overrides)
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    kind: Any = KIND[stage]
    found = pipeline.read_items(
        config.data, str(file), kind, tiny.tokenizer(), layout="shared", row_length=400
    )
    return *found, config


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert all(f.remedy or f.level == "ok" for f in findings if f.name != "length_bias")
    return {finding.name: finding for finding in findings}


def pair(i: int, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"open lock {i}", "chosen": chosen, "rejected": rejected} | more


# ---- tokenizer -----------------------------------------------------------------------------------


def test_template():
    assert doctor.template(tiny.tokenizer(), tiny.ARCH) == [
        Finding("ok", "template", "turns end with <|im_end|>")
    ]
    raw = doctor.template(tiny.tokenizer(None), tiny.ARCH)
    assert [(f.level, f.name) for f in raw] == [("note", "template")]
    endless = tiny.tokenizer(tiny.CHATML.replace("<|im_end|>", ""))
    (found,) = doctor.template(endless, tiny.ARCH)
    assert found.level == "error" and "no end-of-turn token" in found.found
    assert "model.chat_template" in found.remedy
    with pytest.raises(ValueError, match=r"template: .*model\.chat_template"):
        refuse([found])
    headless = tiny.tokenizer(tiny.CHATML[: tiny.CHATML.index("{% if add")])
    (found,) = doctor.template(headless, tiny.ARCH)
    assert found.level == "warning" and "'<|im_start|>assistant\\n'" in found.found


def test_stop_token():
    other = tiny.tokenizer(tiny.CHATML.replace("<|im_end|>", "<|endoftext|>"))
    found = by_name(doctor.template(other, tiny.ARCH))
    assert set(found) == {"stop_token"}
    assert found["stop_token"].found == (
        "answers learn to end with <|endoftext|>, but the model's files stop generation at "
        "<|im_end|>"
    )
    assert "stop_token" not in by_name(
        doctor.template(other, replace(tiny.ARCH, eos_token_ids=(0, 2)))
    )


def test_vocabulary_and_bos(tmp_path):
    items, *_ = read(tmp_path, "rw", tiny.SFT)
    (ok,) = doctor.vocabulary(items, tiny.tokenizer(), tiny.ARCH)
    assert ok.level == "ok"
    (found,) = doctor.vocabulary(items, tiny.tokenizer(), replace(tiny.ARCH, vocab_size=50))
    highest = max(int(item.branches[0].ids.max()) for item in items)
    assert found.level == "error"
    assert found.found == f"the rows have token id {highest}, the model 50 embeddings"
    (found,) = doctor.vocabulary([], tiny.tokenizer(), replace(tiny.ARCH, vocab_size=200))
    assert found.level == "warning" and "tokens, the model 200 embeddings" in found.found
    bos = np.array([1], np.int32)
    doubled = [replace(item, prefix=bos) for item in items[:3]] + items[3:]
    found = by_name(doctor.vocabulary(doubled, tiny.tokenizer(), tiny.ARCH))["bos"]
    assert found.found == "3 of 10 rows begin with <|im_start|> twice"


# ---- rows ----------------------------------------------------------------------------------------


def test_lost_rows(tmp_path):
    _, rejects, total, config = read(tmp_path, "rw", tiny.SFT)
    assert by_name(doctor.lost(rejects, total, config))["rejected"].level == "ok"
    rows = [*tiny.SFT, {"prompt": "x"}, {"prompt": "x" * 200, "completion": "y"}]
    _, rejects, total, config = read(tmp_path, "rw", rows)
    (found,) = doctor.lost(rejects, total, config)
    assert found.level == "error"
    assert found.found.startswith("2 of 12 rows (17 %) are left out: 1 missing columns (first ")
    assert "1 nothing to score (first" in found.found
    assert found.found.endswith("data.max_reject_share=0.05 allows 5.0 %")
    assert found.remedy.startswith("raise data.max_length=80; mend or remove the others")
    loose = config_of("rw", "--data.max_reject_share=0.5")
    assert doctor.lost(rejects, total, loose)[0].level == "warning"
    assert doctor.lost(rejects, 2, loose)[0].level == "error", "nothing is left"


def test_ends(tmp_path):
    items, _, _, config = read(tmp_path, "srpo", tiny.PAIRS)
    (ok,) = doctor.ends(items, tiny.tokenizer(), config)
    assert (ok.level, ok.found) == ("ok", "all 16 answers end with their token")
    cut = [pair(i, "no", "yes, " * 60) for i in range(3)]
    items, _, _, config = read(tmp_path, "srpo", [*tiny.PAIRS, *cut])
    found = by_name(doctor.ends(items, tiny.tokenizer(), config))["truncated"]
    assert found.level == "warning" and "data.max_length" in found.remedy
    assert "3 of 11 rows, 27 % (chosen 0, rejected 3), are cut at data.max_length=80" in found.found
    assert "ending itself becomes the preference" in found.found
    items = [replace(items[0], branches=tuple(_without_end(b) for b in items[0].branches))]
    found = by_name(doctor.ends(items, tiny.tokenizer(), config))["end_of_turn"]
    assert found.found.startswith("2 of 2 whole answers do not end with a scored <|im_end|>")


def _without_end(branch: Branch) -> Branch:
    return Branch(branch.ids[:-1], branch.scored[:-1], False)


def test_prompts(tmp_path):
    rows = [{"prompt": f"Open lock {i}!", "completion": f"it is open {i}"} for i in range(4)]
    items, _, _, config = read(tmp_path, "rw", rows)
    found = by_name(doctor.prompts(items, [], tiny.tokenizer(), config))
    assert {f.level for f in found.values()} == {"ok"}
    again = [*rows, rows[0], {"prompt": " open LOCK 1 ", "completion": "another"}]
    items, _, _, config = read(tmp_path, "rw", again)
    found = by_name(doctor.prompts(items, [], tiny.tokenizer(), config))
    assert found["repeated"].found.startswith("1 of 6 rows repeat another row exactly")
    assert found["prompts"].found.startswith("6 rows have 4 different prompts, one of them 2 times")


def test_prompts_of_the_evaluation(tmp_path):
    training, _, _, config = read(tmp_path, "srpo", tiny.PAIRS)
    unseen = [pair(i, "no", "yes") for i in range(50, 53)]
    evaluation, *_ = read(tmp_path, "srpo", unseen)
    tokenizer = tiny.tokenizer()
    found = by_name(doctor.prompts(training, evaluation, tokenizer, config))["eval_overlap"]
    assert found.level == "ok"
    # Row 2 of PAIRS is a process pair: its prompt counts, not what its prefix adds.
    seen = [{"prompt": f"BREAK  lock {i}.", "chosen": "a", "rejected": "b"} for i in (2, 3)]
    evaluation, *_ = read(tmp_path, "srpo", [*unseen, *seen])
    found = by_name(doctor.prompts(training, evaluation, tokenizer, config))["eval_overlap"]
    assert found.level == "warning"
    assert found.found.startswith("2 of 5 rows of data.eval have a prompt that is trained on, ")
    assert f"first {tmp_path}/rows.jsonl:4 = {tmp_path}/rows.jsonl:3 " in found.found


def test_kinds(tmp_path):
    rows = [{**tiny.SFT[i], "kind": "harmful" if i < 4 else "benign"} for i in range(10)]
    items, *_ = read(tmp_path, "rw", rows)
    (found,) = doctor.kinds(items)
    scored = sum(int(i.branches[0].scored.sum()) for i in items[:4])
    assert f"harmful {scored} in 4 rows" in found.found and "benign" in found.found
    assert doctor.kinds([]) == []


# ---- pairs ---------------------------------------------------------------------------------------


def test_identical_and_near_pairs(tmp_path):
    items, rejects, *_ = read(tmp_path, "srpo", tiny.PAIRS)
    found = by_name(doctor.pairs(items, rejects))
    assert set(found) == {"shared_beginning"} and found["shared_beginning"].level == "ok"
    words = "the user wants a lock opened; that is fine. "
    rows = [
        pair(0, "no", "no"),
        pair(1, "x" * 90 + "a", "x" * 90 + "b"),
        pair(2, "Q" + words + "a", "R" + words + "a"),
        pair(3, "no", "no, never"),
        pair(4, "refuse", "go on"),
    ]
    items, rejects, *_ = read(tmp_path, "srpo", rows)
    found = by_name(doctor.pairs(items, rejects))
    assert "2 pairs have identical branches (1 of them only after the cut" in (
        found["identical"].found
    )
    assert (
        "1 of 3 pairs differ in at most 5.0 %"
        in by_name(
            doctor.pairs(
                [*items[1:], _near()],
                [],
            )
        )["nearly_identical"].found
    )
    # An answer cut before its end is all beginning.
    short = replace(items[0], branches=(items[0].branches[0], _without_end(items[0].branches[0])))
    assert "in 1 of 1 pairs one answer is the beginning" in (
        by_name(doctor.pairs([short], []))["contained"].found
    )
    assert doctor.pairs([], []) == [] == doctor.pairs(tiny.items("sft"), [])


def _near() -> Item:
    item = tiny.item(5, 4, 60, 60)
    ids = item.branches[0].ids.copy()
    ids[30] += 1
    return replace(item, branches=(item.branches[0], replace(item.branches[0], ids=ids)))


def test_shared_beginning():
    found = by_name(doctor.pairs([_near()], []))["shared_beginning"]
    assert found.level == "note" and "begin alike for 50 % of their scored" in found.found
    assert "column prefix" in found.remedy


def test_length_bias():
    def some(kind: str, lengths: list[tuple[int, int]]) -> list[Item]:
        made = [tiny.item(i, 3, *pair) for i, pair in enumerate(lengths)]
        return [replace(item, kind=kind) for item in made]

    outcome, process = some("outcome", [(30, 10)] * 18 + [(10, 30)] * 2), some("process", [(9, 9)])
    (found,) = doctor.length_bias([*outcome, *process])
    assert found.level == "warning" and found.remedy.startswith("balance lengths")
    assert "15 tokens longer on average (median 20), by kind: outcome +16, process +0" in (
        found.found
    )
    assert (
        "'the longer one is chosen' is right in 90 % of 20 pairs (95 % interval 70 % to 97 %)"
        in (found.found)
    )
    (found,) = doctor.length_bias(some("outcome", [(10, 30)] * 20))
    assert "'the shorter one is chosen' is right in 100 % of 20" in found.found
    (found,) = doctor.length_bias(some("outcome", [(10, 30), (30, 10)] * 10))
    assert found.level == "ok"
    assert doctor.length_bias(tiny.items("sft")) == []


def test_wilson_has_the_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_labels(tmp_path):
    items, *_ = read(tmp_path, "srpo", tiny.PAIRS)
    (ok,) = doctor.labels(items)
    assert ok.level == "ok"
    rows = [
        pair(0, "no", "yes"),
        pair(0, "yes", "no"),
        pair(1, "yes", "no"),
        pair(2, "best", "good"),
        pair(2, "good", "bad"),
    ]
    items, *_ = read(tmp_path, "srpo", rows)
    found = by_name(doctor.labels(items))
    file = tmp_path / "rows.jsonl"
    assert "1 pairs come twice with chosen and rejected swapped, first " in (
        found["contradictions"].found
    )
    assert f"{file}:1" in found["contradictions"].found
    assert f"{file}:2" in found["contradictions"].found
    assert "at least 20 % of 5 labels are wrong" in found["contradictions"].found
    assert found["ranked"].found.startswith("1 answers are chosen in one row and rejected in")


def test_noise_of_the_rows():
    class Noisy:
        noise = 0.4
        branches = ()

    found = by_name(doctor.labels([Noisy(), Noisy()]))["noise"]  # pyright: ignore
    assert found.level == "warning" and "2 rows state a label noise, 40 % on" in found.found


# ---- settings ------------------------------------------------------------------------------------


def settings(stage: str, *overrides: str, steps: int = 100, number: int = 80):
    batch = () if any("batch_rows" in given for given in overrides) else ("--train.batch_rows=8",)
    config = config_of(stage, *batch, *overrides)
    items = (tiny.items(KIND[stage]) * 10)[:number]
    return by_name(doctor.hyperparameters(config, stage, tiny.ARCH, items, steps))


def test_learning_rate():
    assert settings("rw")["learning_rate"].level == "ok"
    high = settings("rw", "--optimizer.learning_rate=0.5")["learning_rate"]
    assert high.level == "warning" and "optimizer.learning_rate=0.5 is very high" in high.found
    low = settings("srpo", "--optimizer.learning_rate=1e-9")["learning_rate"]
    assert low.level == "warning" and "is very low" in low.found and "(srpo)" in low.remedy
    plain = settings("rw", "--optimizer.learning_rate=0.5", "--optimizer.name=sgd")
    assert "learning_rate" not in plain
    # The usual rates of known models lie inside.
    for size, stage, lora, rate in (
        (8e9, "rw", False, 1e-5),
        (8e9, "srpo", False, 5e-7),
        (135e6, "rw", False, 2e-4),
        (8e9, "rw", True, 2e-4),
        (8e9, "srpo", True, 5e-6),
    ):
        low, high = plausible_rates(int(size), stage, lora)
        assert low < rate < high


def test_warmup_epochs_batch_steps():
    fine = settings("srpo", "--optimizer.warmup_ratio=0.1", steps=20)
    assert not {"warmup", "epochs", "steps"} & set(fine) and fine["batch"].level == "ok"
    found = settings("srpo", "--optimizer.warmup_ratio=1", "--optimizer.schedule=linear", steps=20)
    assert found["warmup"].found.startswith("20 of 20 steps warm up")
    found = settings("srpo", steps=45)["epochs"]
    assert found.level == "warning" and found.found.startswith("4.5 passes over 80 rows: margins")
    assert settings("rw", steps=60)["epochs"].level == "note"
    found = settings("srpo", "--train.batch_rows=2", steps=20)["batch"]
    assert found.level == "note" and found.found.startswith("2 pairs a step")
    assert "scored tokens a step" in settings("rw")["batch"].found
    assert settings("rw", steps=5)["steps"].found.startswith("the run has 5 steps")


def test_packing():
    items = [tiny.item(i, 0, 100) for i in range(8)]
    config = config_of("rw", "--train.batch_rows=4")
    full = by_name(doctor.packing(config, items, Shape(200, 1, "shared"), 10))
    assert full["packing"].found.startswith("100 % of the computed tokens are no padding, 2.0 pass")
    assert full["compile"].found == "programs for 1 shapes (rows x tokens): 1 x 200"
    empty = by_name(doctor.packing(config, items, Shape(190, 4, "shared", 1), 10))["packing"]
    assert empty.level == "note" and empty.found.startswith("53 % of")
    assert empty.remedy.startswith("train.micro_rows=1, ")


# ---- memory --------------------------------------------------------------------------------------


def test_memory_that_does_not_fit():
    config = config_of("srpo", "--model.remat=none")
    shape = Shape(2**17, 4, "shared")
    need = memory.estimate(config, "srpo", tiny.ARCH, shape).total
    (found,) = memory.memory(config, "srpo", tiny.ARCH, shape, None, int(4 * need))
    assert found.level == "ok" and found.found.startswith("needs about ")
    (found,) = memory.memory(config, "srpo", tiny.ARCH, shape, None, int(need / 2))
    assert found.level == "error"
    for option in ("train.micro_rows=1", "model.remat=full", "data.row_length=65536"):
        assert option in found.remedy
    assert found.remedy.endswith("more devices (mesh.fsdp)")
    assert memory.memory(config, "srpo", tiny.ARCH, shape, None, int(need * 1.1))[0].level == (
        "warning"
    )
    refuse([found])  # an estimate stops no run
    assert memory.device_memory() > 2**28 and memory.peak_memory() > 2**26


def test_what_the_estimate_counts():
    def need(*overrides: str, rows: int = 1):
        shape = Shape(512, rows, "shared")
        return memory.estimate(config_of("rw", *overrides), "rw", tiny.ARCH, shape)

    base, size = need(), memory.parameters(tiny.ARCH)
    assert (base.weights, base.moments, base.gradients) == (4 * size, 8 * size, 4 * size)
    assert need("--optimizer.name=sgd").moments == 0
    half = need("--model.param_dtype=bfloat16")
    assert (half.weights, half.moments, half.gradients) == (2 * size, 8 * size, 8 * size)
    kept = [need(f"--model.remat={remat}").activations for remat in ("full", "dots", "none")]
    assert kept == sorted(kept) and kept[0] < kept[2] / 2
    assert need(rows=4).activations == 4 * base.activations


def test_the_estimate_counts_answers_in_the_place_of_a_step():
    config = config_of("rw", "--model.dtype=bfloat16")

    def need(slots: int, tokens: int):
        answering = memory.Answering(slots, tokens)
        return memory.estimate(config, "rw", tiny.ARCH, Shape(512, 1, "shared"), None, answering)

    alone = memory.estimate(config, "rw", tiny.ARCH, Shape(512, 1, "shared"))
    assert alone.answers == 0 and need(1, 64).total == alone.total, "it has room in that of a step"
    few, many = need(64, 1024), need(128, 1024)
    assert few.answers > 0 and few._replace(answers=0.0) == alone
    # Twice the keys and values of 64 answers, float32 on a CPU; the prefill is of one prompt.
    arch = tiny.ARCH
    one = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * 1024 * 4
    assert many.answers - few.answers == pytest.approx(2 * 64 * one, rel=0.05)
    (found,) = memory.memory(
        config, "rw", arch, Shape(512, 1, "shared"), None, int(many.total * 1.1),
        memory.Answering(128, 1024),
    )  # fmt: skip
    assert found.level == "warning" and "train.answers=null saves " in found.remedy


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "none"])
def test_the_estimate_is_near_that_of_the_compiler(remat):
    config = config_of("srpo", f"--model.remat={remat}", "--model.dtype=bfloat16")
    shape = Shape(512, 1, "shared")
    params = step.abstract_params(tiny.ARCH, jnp.float32)
    programs = step.programs(tiny.ARCH, config, "srpo", optimizer.make(config.optimizer, 10))
    block = next(iter(pack(tiny.items("preference"), range(8), **shape._asdict())))
    with jax.set_mesh(meshes.make_mesh()):
        given = step.Given(
            np.zeros((*block.item.shape, 2, SEGMENTS), np.float32),  # pyright: ignore
            np.zeros(block.item.shape, np.int32),  # pyright: ignore
            np.float32(0),  # pyright: ignore
        )
        lowered = programs.accumulate.lower(params, params, block, given, np.float32(1))
        found = lowered.compile().memory_analysis()
    need = memory.estimate(config, "srpo", tiny.ARCH, shape)
    # The compiler sees no moments: only the update holds them.
    exact = need.moments + found.argument_size_in_bytes + found.temp_size_in_bytes
    assert 0.8 < (need.total - need.process) / exact < 1.25


# ---- the first steps -----------------------------------------------------------------------------


def records(number: int, **values: Any) -> list[watch.Record]:
    """Steps of an undisturbed SRPO run; a value may be a function of the step."""
    usual: dict[str, Any] = {
        "loss": lambda k: 0.69 - 0.02 * k,
        "grad_norm": 0.5,
        "rewards/chosen": lambda k: 0.02 * (k - 1),
        "rewards/rejected": lambda k: -0.02 * (k - 1),
        "rewards/margins": lambda k: 0.04 * (k - 1),
        "rewards/accuracies": 0.7,
    }
    rate = values.pop("learning_rate", 1e-5)
    names = {name.replace("_", "/", 1) if "rewards" in name else name: value
             for name, value in values.items()}  # fmt: skip
    course: dict[str, Any] = usual | names
    made = []
    for k in range(1, number + 1):
        at: dict[str, float] = {}
        for name, value in course.items():
            at[name] = value(k) if callable(value) else value  # pyright: ignore (Any)
        made.append(watch.Record(k, at, rate, 1000, 9.0 if k == 1 else 2.0))
    return made


def said(number: int, *overrides: str, **values: Any) -> dict[str, Finding]:
    return by_name(watch.during(records(number, **values), config_of("srpo", *overrides), "srpo"))


def test_nothing_to_say():
    assert watch.during([], config_of("srpo"), "srpo") == []
    for number in (1, 2, 5, 12):
        assert set(said(number)) <= {"speed"}


def test_not_finite():
    for name in ("loss", "grad_norm"):
        (found,) = said(3, **{name: math.nan}).values()
        assert found.level == "error" and found.found == f"step 3: {name} is nan"


def test_zero_gradient_and_rate():
    assert said(1, grad_norm=0.0)["zero_gradient"].found.startswith("step 1: the gradient is zero")
    assert "step 1 has learning rate 0" in said(1, learning_rate=0.0)["zero_rate"].found
    assert "zero_rate" not in said(2, learning_rate=0.0)


STUCK = {"loss": math.log(2), "rewards_chosen": 0.0, "rewards_rejected": 0.0}
STUCK |= {"rewards_margins": 0.0, "rewards_accuracies": 0.5}


@pytest.mark.parametrize(
    ("values", "overrides", "why"),
    [
        ({"grad_norm": 0.0}, (), "all gradients are zero"),
        ({"learning_rate": 0.0}, (), "the learning rate is 0"),
        ({}, ("--model.param_dtype=bfloat16",), "smaller than what bfloat16 weights can hold"),
        ({"learning_rate": 1e-8}, (), "learning rate to 1e-08: steps are too small"),
    ],
)
def test_loss_stuck(values, overrides, why):
    found = said(5, *overrides, **STUCK, **values)["loss_stuck"]
    assert found.found.startswith("after 5 steps the loss is still 0.6931 (ln 2): ")
    assert why in found.found
    assert "loss_stuck" not in said(4, *overrides, **STUCK, **values)


def test_margin_at_start():
    away = {"rewards_chosen": 0.03, "rewards_rejected": -0.01, "rewards_margins": 0.04}
    found = said(1, **away)["margin_at_start"]
    assert found.found.startswith("the first step lies 0.3 nats from the reference (margin 0.04)")
    assert "srpo.reference_cache" in found.remedy
    assert "margin_at_start" not in said(1) and "margin_at_start" not in said(2, **away)


def test_where_margins_come_from():
    falling = {
        "rewards_chosen": lambda k: -0.1 * (k - 1),
        "rewards_rejected": lambda k: -0.3 * (k - 1),
        "rewards_margins": lambda k: 0.2 * (k - 1),
    }
    found = said(6, **falling)["both_falling"]
    assert found.found.startswith(
        "steps 2 to 6: both log-probs fall, chosen answers by 3.0 nats, rejected by 9.0"
    )
    assert "srpo.beta" in found.remedy
    rejected = said(6, **falling | {"rewards_chosen": 0.0})
    assert set(rejected) == {"rejected_only", "speed"}
    assert "margins of 9.0 nats come from rejected answers alone" in rejected["rejected_only"].found
    assert "both_falling" not in said(4, **falling)


def test_accuracy():
    found = said(7, rewards_accuracies=0.2)["accuracy"]
    assert found.found == "steps 3 to 7: the chosen answer wins in 20 % of the pairs only"
    assert "accuracy" not in said(7, rewards_accuracies=0.5)


def test_gradients():
    found = said(8, grad_norm=lambda k: 50.0 if k == 8 else 0.5)["gradient_jump"]
    assert found.found == "step 8: the gradient norm is 50, 100 times its median of 0.5"
    assert "gradient_jump" not in said(9, grad_norm=lambda k: 50.0 if k == 8 else 0.5)
    found = said(10, grad_norm=4.0)["clipped"]
    assert "optimizer.max_grad_norm=1 (median norm 4)" in found.found
    assert "clipped" not in said(9, grad_norm=4.0)
    assert "clipped" not in said(10, "--optimizer.max_grad_norm=0", grad_norm=4.0)


def test_speed():
    found = said(6)["speed"]
    assert found.level == "ok"
    assert found.found.startswith("500 tokens/s of all branches, 2 s a step; the first took 9 s, ")


def test_each_finding_is_said_once_a_run(tmp_path, capsys):
    file, config = tmp_path / "doctor.jsonl", config_of("srpo")
    one = watch.Watch(file, config, "srpo", fresh=True)
    one.say([Finding("ok", "a", "A"), Finding("warning", "b", "B", "do b")], ("warning",))
    for _ in range(2):
        one.step(1, records(1, grad_norm=0.0)[0].values, 1e-5, 10, 1.0)
    said = capsys.readouterr().out
    assert said.startswith("doctor: warning: B\n  -> do b\ndoctor: warning: step 1: the gradient")
    assert said.count("the gradient is zero") == 1
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(k["step"], k["name"]) for k in kept] == [(0, "a"), (0, "b"), (1, "zero_gradient")]
    with open(file, "a") as stream:
        stream.write('{"step": 1, "na')
    again = watch.Watch(file, config, "srpo", fresh=False)
    again.say([Finding("warning", "b", "B", "do b")], ("warning",))
    assert capsys.readouterr().out == ""
    watch.Watch(file, config, "srpo", fresh=True)
    assert file.read_text() == ""


def test_the_report_has_the_gravest_first():
    text = report([Finding("ok", "a", "A"), Finding("error", "b", "B", "do b")])
    assert text == "1 error\n  b: B\n    -> do b\nin order\n  a: A"


# ---- the command ---------------------------------------------------------------------------------


def dry_run(stage: str, out: Path, *overrides: str) -> int:
    return train.main([*tiny.arguments(stage, out, *overrides), "--dry-run"])


@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_dry_run(stage, tmp_path, capsys, monkeypatch):
    def no_weights(*_):
        raise AssertionError("the dry run reads no weights")

    monkeypatch.setattr(train.huggingface, "load_params", no_weights)
    out = tmp_path / "out"
    before = sorted(tiny.folder().rglob("*"))
    assert dry_run(stage, out) == 0
    printed = capsys.readouterr().out
    assert not out.exists() and sorted(tiny.folder().rglob("*")) == before
    number = {"rw": 10, "srpo": 8}[stage]
    assert (
        f"{stage}: 0.1M parameters (float32), {number} rows, " in printed and "2 steps" in printed
    )
    assert "⟦" in printed, "an example row with its scored text"
    assert "in order\n" in printed and "  memory: needs about " in printed
    assert "1 note\n  steps: the run has 2 steps" in printed or "batch:" in printed
    names = {line.split(":")[0].strip() for line in printed.splitlines() if line.startswith("  ")}
    assert {"template", "vocabulary", "rejected", "kinds", "packing", "compile"} <= names
    assert ("length_bias" in names) == (stage == "srpo")


def test_dry_run_with_planted_problems(tmp_path, capsys):
    rows = [pair(i, f"no, refuse {i}", f"yes, take {i}") for i in range(8)]
    rows += [pair(0, "yes, take 0", "no, refuse 0"), pair(9, "no", "yes, " * 60)]
    rows += [pair(10, "same", "same")]
    file = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    held = tiny.write_rows(tmp_path / "held.jsonl", [pair(3, "a b c", "c b a")])
    out = tmp_path / "out"
    options = (f"--data.train={file}", f"--data.eval={held}", "--data.max_reject_share=0.1")
    assert dry_run("srpo", out, *options) == 0
    printed = capsys.readouterr().out
    for words in (
        "rejected: 1 of 11 rows (9.1 %) are left out: 1 chosen equals rejected",
        "identical: 1 pairs have identical branches",
        "truncated: 1 of 10 rows, 10 % (chosen 0, rejected 1), are cut",
        "contradictions: 1 pairs come twice with chosen and rejected swapped",
        "eval_overlap: 1 of 1 rows of data.eval have a prompt that is trained on",
        "10 rows have 9 different prompts, one of them 2 times",
    ):
        assert words in printed
    assert printed.index("warnings\n") < printed.index("note") < printed.index("in order\n")
    # One reject more than is allowed: the run would be refused, and so the dry run fails.
    assert dry_run("srpo", out, *options[:2]) == 2
    assert "1 error\n  rejected: 1 of 11 rows" in capsys.readouterr().out
    assert not out.exists()


def test_dry_run_where_nothing_is_left(tmp_path, capsys):
    file = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}])
    assert dry_run("rw", tmp_path / "out", f"--data.train={file}") == 2
    assert "1 of 1 rows (100 %) are left out: 1 missing columns" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_run_says_it_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.huggingface, "logits_match", lambda *_: None)
    out = tmp_path / "out"
    options = ("--train.steps=6", "--optimizer.learning_rate=1e-9")
    assert train.main(tiny.arguments("srpo", out, *options)) == 0
    printed = capsys.readouterr().out
    assert "doctor: warning: optimizer.learning_rate=1e-09 is very low" in printed
    assert printed.count("the loss is still 0.6931 (ln 2)") == 1
    kept = {json.loads(line)["name"] for line in (out / "doctor.jsonl").read_text().splitlines()}
    assert {"template", "memory", "learning_rate", "loss_stuck", "speed"} <= kept
    assert "margin_at_start" not in kept


def test_ids_outside_of_the_model_stop_a_run(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model", config={"vocab_size": 280})
    out = tmp_path / "out"
    arguments = tiny.arguments("rw", out, f"--model.path={model}")
    assert dry_run("rw", out, f"--model.path={model}") == 2 and not out.exists()
    capsys.readouterr()
    assert train.main(arguments) == 2
    assert "the model 280 embeddings; take the tokenizer" in capsys.readouterr().err
