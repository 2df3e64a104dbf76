"""The compile check: what it compiles, its hand counts, its errors; and 8B models for real TPUs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_parallel_topologies import LIBTPU, NEEDS_LIBTPU

from saro_jax import compile_check, config
from saro_jax.models.architecture import from_hf
from saro_jax.parallel import topologies
from saro_jax.parallel.topologies import GIB
from saro_jax.training import abstract, flops, trainable

LLAMA = "llama3.1_8b"
V5P = topologies.find("v5p-32")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder that holds its shape and nothing else."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG | sizes))
    return tmp_path


def settings(stage: str, folder: Path, *overrides: str):
    own = [f"--model.path={folder}", "--data.max_length=128", "--data.row_length=256"]
    return config.load("quickstart", [*own, "--train.micro_rows=4", *overrides], stage)


def prepared(stage: str, folder: Path, *overrides: str, **options):
    """A check of the v5p topology whose devices are this machine's: nothing of it is compiled."""
    devices = jax.devices()[:1]
    owner = stage if stage in ("rw", "srpo") else "rw"
    return abstract.prepare(settings(owner, folder, *overrides), stage, V5P, devices, **options)


def test_a_step_is_one_program_or_several(folder):
    def names(*arguments, **options):
        return [(p.name, p.times) for p in prepared(*arguments, **options).programs]

    assert names("rw", folder, blocks=1) == [("whole", 1)]
    assert names("rw", folder, blocks=3) == [("accumulate", 3), ("update", 1)]
    resident = names("srpo", folder, "--srpo.reference=resident", blocks=2)
    assert resident == [("score", 2), ("accumulate", 2), ("update", 1)]
    assert names("score", folder) == [("score", 1)]
    sizes = {"batch": 2, "prompt": 64, "new": 32}
    assert names("sample", folder, sizes=sizes) == [("prefill", 1), ("decode", 1)]


def test_blocks_come_from_the_recipe(folder):
    # 16 conversations of 128 tokens in blocks of 4 rows of 256; 16 pairs of 192 tokens.
    assert prepared("rw", folder, "--train.batch_rows=16").programs[0].times == 2
    assert prepared("srpo", folder, "--train.batch_rows=16").programs[0].times == 3


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_the_programs_lower(folder, stage, blocks):
    """The abstract arguments are those that the step functions take."""
    setup = prepared(stage, folder, "--srpo.reference=resident" if stage == "srpo" else "--seed=0",
                     blocks=blocks)  # fmt: skip
    with jax.set_mesh(setup.mesh):
        for program in setup.programs:
            program.jitted.lower(*program.arguments, **program.keywords)
    held = sum(
        np.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(trainable.abstract(setup.arch, setup.config))
    )
    assert setup.parts["parameters"] == held * (2 if stage == "srpo" else 1)
    assert setup.parts["optimizer"] == pytest.approx(2 * held, rel=1e-3)


def test_abstract_rows_are_like_those_of_training(folder):
    from saro_jax.data import packing

    setup = prepared("rw", folder, blocks=1)
    abstract = setup.programs[0].arguments[1]
    (real,) = packing.pack(tiny.items("sft")[:2], [0, 1], row_length=256, rows=4, layout="shared")
    for name, a, b in zip(packing.Rows._fields, abstract, real, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name


def test_tokens_and_attention_of_a_pair_that_shares_its_prefix():
    pair = abstract._work(300, 200, "srpo", "shared")
    assert (pair.tokens, pair.sequence_tokens) == (300, 400)
    seen = sum(range(1, 101)) + 2 * sum(range(101, 201))
    assert pair.area == seen
    twice = abstract._work(600, 200, "srpo", "shared")
    assert twice == (600, 800, 2 * seen)
    apart = abstract._work(400, 200, "srpo", "separate")
    assert (apart.sequence_tokens, apart.area) == (400, 2 * sum(range(1, 201)))
    assert abstract._work(500, 200, "rw", "shared").area == 2 * 20100 + 5050


def test_hand_counts_of_llama_8b():
    loaded = config.load(LLAMA, ["--model.remat=full"], "rw")
    arch = abstract.architecture(loaded)
    size = sum(flops.matrix_sizes(arch).values())
    assert size == 7_504_658_432  # 8.03 B without the embedding table and the norms
    # 8 N T less the product with down that is not computed again: 230.5 TFLOP of 4096 tokens.
    assert flops.executed_products(arch, loaded, 4096) == pytest.approx(230.52e12, rel=1e-4)
    work = flops.Work(4096, 4096, 4096 * 4097 / 2)
    model = flops.model_flops(arch, loaded, work, train=True)
    assert model == pytest.approx(197.6e12, rel=1e-3)
    adapters = config.load(LLAMA, ["--lora.rank=8"], "rw")
    frozen = flops.model_flops(arch, adapters, work, train=True)
    assert frozen == pytest.approx(4 * size * 4096 + 13.2e12, rel=1e-2)


@pytest.mark.parametrize(
    ("path", "layers", "vocabulary"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 32, 128256),
        ("meta-llama/Meta-Llama-3.1-70B", 80, 128256),
        ("meta-llama/Llama-3.2-1B", 16, 128256),
        ("Qwen/Qwen2.5-7B-Instruct", 28, 152064),
        ("Qwen/Qwen3-8B", 36, 151936),
        ("quickstart", 30, 49152),
    ],
)
def test_packaged_shapes(path, layers, vocabulary):
    loaded = config.load("quickstart", [f"--model.path={path}"], "rw")
    arch = abstract.architecture(loaded)
    assert (arch.num_layers, arch.vocab_size) == (layers, vocabulary)


def test_every_packaged_shape_is_read():
    folder = config.recipe_path("quickstart").parent / "models"
    for file in folder.glob("*.json"):
        assert from_hf(json.loads(file.read_text()), str(file)).num_layers


@pytest.mark.parametrize(
    ("message", "needed", "allowed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (26.84G) exceeds available HBM (15.75G)",
            26.84,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 140.02G of 15.75G hbm. Exceeded hbm capacity by 124.27G.",
            140.02,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)
def test_the_compiler_says_how_much_is_missing(message, needed, allowed):
    found = compile_check.memory_in(message)
    assert found == tuple(x if x is None else x * GIB for x in (needed, allowed))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage=rw", "--topology=v5p-31"], "nearest: v5p-32"),
        (["--stage=rw"], "--topology: required"),
        (["--stage=both", "--topology=v5p-32"], "expected rw or srpo or score or sample"),
        (["--stage=rw", "--topology=v5p-32", "--config=nothing"], "nothing"),
        (["--stage=rw", "--topology=v5e-4", "--blocks=0"], "--blocks=0: expected an integer >= 1"),
        (["--stage=rw", "--topology=v5e-4", "--train.micro_rows=6"], "multiple of the 4 shards"),
        (["--stage=sample", "--topology=v5e-1", "--new=9000"], "exceed the model's 8192 positions"),
        (["--stage=score", "--topology=v5e-4", "--search"], "for stage rw or srpo, got score"),
    ],
)
def test_errors_are_one_line(arguments, words, capsys):
    if not LIBTPU and "v5e" in str(arguments):
        words = "pip install -e '.[tpu]'"
    assert compile_check.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_every_key_of_a_time_says_estimate():
    report = {
        "stage": "rw", "model": "m", "devices": "d", "settings": {}, "rows": "r", "programs": [],
        "hbm_limit_bytes": GIB, "fits": True, "peak_bytes": GIB / 2, "free_bytes": GIB / 2,
        "split_bytes": {"parameters": 1.0}, "model_flops": 1e12, "executed_flops": 1e12,
        "executed_product_flops": 1e12, "executed_kernel_flops": 0.0, "collectives": {},
        "estimate_step_seconds": 1.0, "estimate_seconds_by_part": {"products": 1.0},
        "estimate_roofline_seconds": {"compute": 1.0}, "estimate_binding": "compute",
        "estimate_tokens_per_second_per_chip": 1.0, "estimate_mfu": 0.5, "tokens_per_step": 10,
        "sequence_tokens_per_step": 10,
    }  # fmt: skip
    text = compile_check.render(report)
    for line in text.splitlines():
        if any(word in line for word in (" ms", "tokens/s", "MFU")):
            assert "estimate" in line, line


# ---- for TPUs that this machine need not have ----------------------------------------------------


def run(tmp_path: Path, *arguments: str) -> dict:
    file = tmp_path / "report.json"
    compile_check.main([*arguments, f"--json={file}"])
    return json.loads(file.read_text())


@NEEDS_LIBTPU
def test_a_small_model_compiles_for_a_tpu(folder, tmp_path, capsys):
    base = [f"--model.path={folder}", "--data.max_length=256", "--data.row_length=256"]
    found = run(
        tmp_path, "--stage=rw", "--topology=v5e-4", "--train.micro_rows=4", "--blocks=1", *base
    )
    assert found["fits"]
    hand = found["hand_count_product_flops"]
    assert found["executed_product_flops"] == pytest.approx(hand, rel=0.05)
    calls = found["kernel_calls"]
    assert calls == {"forward_kernel": 2.0, "backward_kernel": 2.0}  # two layers, kept by remat
    assert all(not program["loops_counted_once"] for program in found["programs"])
    keys = [key for key in found if "second" in key or "mfu" in key]
    assert all("estimate" in key or key == "compile_seconds" for key in keys)
    printed = capsys.readouterr().out
    assert "fits" in printed and "estimate" in printed


@NEEDS_LIBTPU
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(tmp_path, capsys):
    arguments = ["--stage=rw", "--topology=v5e-4", f"--config={LLAMA}", "--train.micro_rows=4"]
    found = run(tmp_path, *arguments, "--blocks=1", "--data.row_length=4096", "--model.remat=full")
    assert not found["fits"]
    assert found["programs"][0]["over_bytes"] > 5 * GIB
    assert "GiB too many" in capsys.readouterr().out


ROW = ["--data.row_length=4096", "--blocks=1", "--model.remat=full"]


@NEEDS_LIBTPU
@pytest.mark.slow
def test_llama_8b_on_16_chips_of_v5p(tmp_path):
    """Golden figures of one device, and that SRPO needs no more memory than RW at equal tokens."""
    arguments = ["--topology=v5p-32", f"--config={LLAMA}", "--train.micro_rows=16", *ROW]
    rw = run(tmp_path, "--stage=rw", *arguments)
    srpo = run(tmp_path, "--stage=srpo", "--data.max_length=2730", *arguments)
    for found in (rw, srpo):
        assert found["fits"]
        hand = found["hand_count_product_flops"]
        assert found["executed_product_flops"] == pytest.approx(hand, rel=0.05)
        assert found["executed_product_flops"] == pytest.approx(230.6e12, rel=0.02)
        assert found["peak_bytes"] <= 10.5 * GIB
    assert rw["peak_bytes"] == pytest.approx(10.42 * GIB, rel=0.02)
    assert srpo["peak_bytes"] <= rw["peak_bytes"] * 1.001
    reduced = sum(v["bytes"] for k, v in rw["collectives"].items() if k.startswith("all-reduce"))
    assert reduced < 2.5e9  # of the output matrix's gradient, once


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("v6e-16", 16), ("v5e-32", 32)])
def test_llama_8b_fits_smaller_chips(name, rows, tmp_path):
    arguments = [f"--topology={name}", f"--config={LLAMA}", f"--train.micro_rows={rows}", *ROW]
    assert run(tmp_path, "--stage=rw", *arguments)["fits"]
