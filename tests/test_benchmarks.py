"""The benchmark scripts in miniature: their rows, tables and claims; no speed is asserted."""

import json

import harness
import peers
import pytest
import scaling_cpu
import star_rows
import tiny
import train_cpu
import train_gpu

STAR = [
    (f"lock {i}?", f"<think>\nthe user wants {'it ' * (i % 3 + 1)}opened, {i}\n</think>\n\nno {i}")
    for i in range(4)
]


def test_process_pairs_share_half_of_the_reasoning_and_outcome_pairs_the_prompt_alone():
    made = star_rows.make_rows(STAR)
    for k, (question, response) in enumerate(STAR):
        pair, whole = made["process"][k], made["outcome"][k]
        assert pair["prompt"] == whole["prompt"] == made["rw"][k]["prompt"]
        assert pair["prompt"][0]["content"] == question
        assert pair["prefix"] + pair["chosen"][0]["content"] == response
        assert "<think>" in pair["prefix"] and "</think>" not in pair["prefix"]
        assert pair["rejected"] != pair["chosen"]
        assert "prefix" not in whole
        assert (
            whole["chosen"][0]["content"] == made["rw"][k]["completion"][0]["content"] == response
        )
        assert whole["rejected"][0]["content"] in {r for _, r in STAR} - {response}


def test_the_memory_of_the_loss_does_not_grow_with_vocabulary_times_tokens():
    short, long = (scaling_cpu.loss_temporaries(8192, T, 32, "float32") for T in (512, 4096))
    logits = 4 * 8192 * (4096 - 512)
    assert long - short < 0.02 * logits


def test_flops_of_a_step_by_hand():
    hf = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
    }
    # q and o are 8 x 8, k and v 8 x 4, three matrices of the MLP 8 x 16.
    assert harness.matrix_parameters(hf) == (2 * (2 * 64 + 2 * 32 + 3 * 128), 80)
    counted = {"real": 3, "scored": 2, "keys": 1 + 2 + 3}
    attention = 2 * 6 * 3 * 4 * 8  # layers, keys, forward and twice backward, two products of 2 x 8
    assert harness.training_flops(hf, counted) == 6 * (1152 * 3 + 80 * 2) + attention
    assert harness.training_flops(hf, counted, frozen=True) == 4 * (1152 * 3 + 80 * 2) + attention


def test_a_step_counts_the_tokens_that_a_shared_prefix_saves():
    from saro_jax.data.pipeline import Shape

    tiny.folder()  # programs are compiled without the optimizations that take long
    items = harness.synthetic_items(2, 8, 4, 4, vocabulary=512)
    config = harness.settings(model={"dtype": "float32", "remat": "none"})
    found = harness.time_steps(
        harness.MINIATURE, config, "srpo", items, Shape(32, 1, "shared"), steps=1
    )
    assert (found["sequence"], found["real"], found["padded"], found["scored"]) == (48, 32, 32, 16)
    # Position + 1 keys of each: 8 of the prefix, 9 to 12 of each branch.
    assert found["keys"] == 2 * (36 + 2 * 42)
    assert found["seconds"] > 0 and found["blocks"] == 1


def test_without_a_gpu_the_gpu_script_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train_gpu, "in_process", lambda _: "cpu cpu\n")
    assert train_gpu.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert train_gpu.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert train_gpu.peak_flops("cpu") is None


def test_a_table_of_the_gpu_script_names_what_failed_and_the_gain_of_sharing(tmp_path):
    args = train_gpu.argparse.Namespace(rows=1, steps=1, out=tmp_path)
    case = {"model": "8b", "method": "full", "remat": "full", "work": "sft"}
    numbers = {"optimizer": "sgd", "mfu": 0.5, "real": 1, "padded": 2, "seconds": 1.0}
    numbers |= {"compile_seconds": 1.0, "peak_gb": 1.0, "tokens_per_second": 30.0}
    results = [
        case | {"failed": "RESOURCE_EXHAUSTED"},
        case | numbers | {"work": "srpo shared"},
        case | numbers | {"work": "srpo separate", "tokens_per_second": 20.0},
    ]
    train_gpu.report(args, results, "NVIDIA H200")
    lines = (tmp_path / "train_gpu.md").read_text().splitlines()
    assert "RESOURCE_EXHAUSTED" in lines[4] and len({line.count("|") for line in lines[2:]}) == 1
    assert "50.0%" in lines[5] and lines[5].endswith("| 1.5 |")


def run(contestant: str, speed: float, rss: float, loss: float = 0.69, tokens: int = 100):
    choice = train_cpu.Choice(contestant, "s", "hugetlb")
    numbers = ([tokens] * 4, [1.0] * 4, [loss] * 4, speed, rss, 9.0, 0.1)
    return train_cpu.Run("process", "float32", choice, *numbers)


def test_the_table_of_the_cpu_script_holds_the_ratios(tmp_path):
    args = train_cpu.arguments([f"--out={tmp_path}"])
    runs = [run("saro_jax", 400, 4), run("TRL", 200, 10), run("TRL", 240, 10), run("Tunix", 80, 9)]
    train_cpu.report(args, runs, {"jax": "1"}, "rows", {"copy_gb_s": 70.0})
    lines = (tmp_path / "train_cpu.md").read_text().splitlines()
    own = next(line for line in lines if "saro_jax" in line)
    assert own.endswith("| 400 | 400 | 4 | 9 | 1.82 | 5.00 | 0.40 |")
    assert json.loads((tmp_path / "train_cpu.json").read_text())["ceilings"] == {"copy_gb_s": 70.0}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run("TRL", 1, 1, tokens=120), "not the same rows"),
        (run("TRL", 1, 1, loss=0.8), "not the same model"),
        (run("TRL", 1, 1, loss=float("nan")), "not the same model"),
        (run("TRL", 1, 1)._replace(refused="switched off"), "tune again"),
    ],
)
def test_contestants_that_did_other_work_are_found(other, message):
    train_cpu.check_same_work([run("saro_jax", 1, 1), run("TRL", 1, 1, tokens=101)], batch=4)
    with pytest.raises(ValueError, match=message):
        train_cpu.check_same_work([run("saro_jax", 1, 1), other], batch=4)


def test_results_of_other_arguments_are_not_mixed(tmp_path):
    train_cpu.claim(train_cpu.arguments([f"--out={tmp_path}"]), {"jax": "1"})
    train_cpu.claim(train_cpu.arguments([f"--out={tmp_path}", "--rounds=3"]), {"jax": "1"})
    with pytest.raises(ValueError, match="batch=4, now 8"):
        train_cpu.claim(train_cpu.arguments([f"--out={tmp_path}", "--batch=8"]), {"jax": "1"})
    with pytest.raises(ValueError, match="jax=1, now 2"):
        train_cpu.claim(train_cpu.arguments([f"--out={tmp_path}"]), {"jax": "2"})


def test_a_finished_process_is_not_run_again_and_the_tuned_choice_is_taken(tmp_path):
    args = train_cpu.arguments([f"--out={tmp_path}", "--default-malloc"])
    done = run("TRL", 7, 1)
    (tmp_path / "results").mkdir()
    name = "round1-process-float32-TRL-s-hugetlb.json"
    (tmp_path / "results" / name).write_text(json.dumps(done._asdict()))
    jobs = train_cpu.Jobs(args, {"TRL": "no such interpreter"}, {}, tmp_path)
    assert jobs.run("process", "float32", done.choice, "round1", 5) == done

    tuned = {"TRL srpo float32": ["TRL", "1 row a pass", "hugetlb"]}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    found = train_cpu.choices(args, jobs.contestants, "float32")
    assert [tuple(c) for c in found["srpo"]] == [
        ("TRL", "1 row a pass", "hugetlb"),
        ("TRL", "1 row a pass", "default"),
    ]
    assert found["rw"][0] == ("TRL", "whole batch", "keep-pages")


def test_the_batches_of_tunix_hold_every_token_and_repeat_the_rows():
    def branch(*ids):
        return {"ids": list(ids), "scored": [1] * len(ids)}

    items = [
        {"prefix": [5, 6], "branches": [branch(7), branch(8, 9)]},
        {"prefix": [4], "branches": [branch(3, 2, 1), branch(1)]},
    ]
    job = {"batch": 2, "steps": 2, "stage": "srpo"}
    batches = list(peers.tunix_batches(job, items, micro=1))
    assert len(batches) == 4
    assert batches[0]["prompt_ids"].tolist() == [[5, 6]]
    assert batches[1]["prompt_ids"].tolist() == [[0, 4]]
    assert batches[1]["prompt_mask"].tolist() == [[0, 1]]
    assert batches[0]["rejected_ids"].tolist() == [[8, 9, 0]]
    assert batches[0]["rejected_mask"].tolist() == [[1, 1, 0]]
    assert batches[2]["chosen_ids"].tolist() == batches[0]["chosen_ids"].tolist()
