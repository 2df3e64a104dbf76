"""Scores of the command line against a plain numpy Llama that knows nothing of packing."""

import json

import numpy as np
import pytest
import tiny

from saro_jax import score
from saro_jax.data import rows
from saro_jax.data.tokenise import tokenise
from saro_jax.text import chat


def run(out, *overrides, kind="pairs"):
    folder = tiny.folder()
    arguments = [f"--model={folder}/model", f"--rows={folder}/{kind}.jsonl", f"--out={out}"]
    given = " ".join(overrides)
    # Rows for a handful of sequences: what the recipe of no name gives is longer.
    small = [] if "row_length" in given else ["--data.max_length=80", "--data.row_length=160"]
    assert score.main([*arguments, *small, *overrides]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def items(kind):
    name = "sft" if kind == "sft" else "preference"
    found, _ = rows.read(str(tiny.folder() / f"{kind}.jsonl"), name)
    return tokenise(found, chat.load_tokenizer(tiny.folder() / "model"), 512)[0]


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_pairs_have_the_log_probs_of_plain_sequences(layout, tmp_path):
    found = run(tmp_path / "scores.jsonl", f"--srpo.layout={layout}")
    assert [record["id"] for record in found] == [row["id"] for row in tiny.PAIRS]
    for record, item in zip(found, items("pairs"), strict=True):
        expected = tiny.item_logps(tiny.params(), item)
        for k, name in enumerate(("chosen", "rejected")):
            assert record[f"logps/{name}"] == pytest.approx(expected[k], rel=0, abs=1e-4)
            assert record[f"num_tokens/{name}"] == item.branches[k].scored.sum()
        assert len(record) == 5


def test_sft_rows_have_the_log_probs_of_plain_sequences(tmp_path):
    found = run(tmp_path / "scores.jsonl", kind="sft")
    assert [record["id"] for record in found] == [row["id"] for row in tiny.SFT]
    for record, item in zip(found, items("sft"), strict=True):
        assert record["logps"] == pytest.approx(
            tiny.item_logps(tiny.params(), item)[0], rel=0, abs=1e-4
        )
        assert record["num_tokens"] == item.branches[0].scored.sum()
        # The end of turn is the last scored token, with pad == eos too.
        assert item.branches[0].scored[-1] and item.branches[0].ids[-1] == 2
        assert len(record) == 3


def test_samples_of_one_prompt_share_it_and_have_the_log_probs_of_plain_sequences(tmp_path):
    texts = ["no", "no, refuse it", "yes, take it. that is fine", "it is fine"]
    samples = [
        {"id": f"n{n}", "prompt": f"open lock {n}", "prefix": "so " * (n % 2)}
        | {"completions": texts[:n]}
        for n in range(1, 5)
    ]
    file = tiny.write_rows(tmp_path / "samples.jsonl", samples)
    out = tmp_path / "scores.jsonl"
    assert score.main([f"--model={tiny.folder()}/model", f"--rows={file}", f"--out={out}"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    read, rejects = rows.read(str(file), rows.detect_kind(str(file)))
    assert not rejects
    several = tokenise(read, chat.load_tokenizer(tiny.folder() / "model"), 512)[0]
    for n, (record, item) in enumerate(zip(found, several, strict=True), 1):
        assert len(item.branches) == len(record["logps"]) == n
        assert record["logps"] == pytest.approx(
            tiny.item_logps(tiny.params(), item), rel=0, abs=1e-4
        )
        assert record["num_tokens"] == [int(b.scored.sum()) for b in item.branches]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "missing column: 'completions'"),
        ({"prompt": "a", "completions": []}, "wrong type: completions must be a list"),
        ({"prompt": "a", "completions": [[{"role": "user", "content": "x"}]]}, "wrong turns"),
    ],
)
def test_rows_that_are_no_samples_say_why(row, words, tmp_path):
    file = tiny.write_rows(tmp_path / "samples.jsonl", [row])
    _, (reject,) = rows.read(str(file), "samples")
    assert reject.reason.startswith(words) and reject.where == f"{file}:1"


def test_a_process_pair_is_scored_from_the_end_of_what_both_share():
    process, outcome = items("pairs")[2], items("pairs")[0]
    tokenizer = chat.load_tokenizer(tiny.folder() / "model")
    assert tokenizer.decode(process.prefix).endswith("<think>\nthe lock 2 is ")
    assert tokenizer.decode(outcome.prefix).endswith("<|im_start|>assistant\n")
    assert sum(i == 1 for i in process.prefix) == 2, "one header of each role, none reopened"


def test_order_length_and_groups_do_not_matter(tmp_path, monkeypatch):
    one = run(tmp_path / "one.jsonl")
    monkeypatch.setattr(score, "GROUP", 3)
    two = run(tmp_path / "two.jsonl", "--data.row_length=600", "--train.micro_rows=2")
    for a, b in zip(one, two, strict=True):
        assert a["id"] == b["id"]
        np.testing.assert_allclose(
            [a["logps/chosen"], a["logps/rejected"]],
            [b["logps/chosen"], b["logps/rejected"]],
            rtol=0,
            atol=1e-4,
        )


def test_bfloat16_is_near(tmp_path):
    one, two = run(tmp_path / "one.jsonl"), run(tmp_path / "two.jsonl", "--model.dtype=bfloat16")
    assert one != two
    for a, b in zip(one, two, strict=True):
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], rel=0.02)


def test_rows_that_can_not_be_scored_are_named(tmp_path, capsys):
    file = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.PAIRS, {"id": "bad", "chosen": "x"}])
    out = tmp_path / "out" / "scores.jsonl"
    arguments = [f"--model={tiny.folder()}/model", f"--rows={file}", f"--out={out}"]
    assert score.main([*arguments, "--data.max_reject_share=0.01"]) == 2
    assert "1 of 9 rows rejected" in capsys.readouterr().err and not out.exists()
    assert score.main([*arguments, "--data.max_reject_share=0.2"]) == 0
    assert len(out.read_text().splitlines()) == 8
    reject = json.loads(out.with_name("scores.jsonl.rejects.jsonl").read_text())
    assert reject["id"] == "bad" and reject["where"] == f"{file}:9"


def test_errors_are_one_line(tmp_path, capsys):
    folder = tiny.folder()
    out = f"--out={tmp_path / 'x.jsonl'}"
    for arguments, words in (
        ([f"--model={tmp_path}/none", f"--rows={folder}/sft.jsonl", out], "no such file or folder"),
        ([f"--model={folder}/model", f"--rows={tmp_path}/none.jsonl", out], "no such file"),
        ([f"--model={folder}/model", out], "--rows: required"),
        ([f"--model={folder}/model", f"--rows={folder}/sft.jsonl", out, "--kind=x"], "--kind=x"),
    ):
        assert score.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said


def test_scores_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    """After a stop in the second group of rows; not for other settings, and the file is gone."""
    whole = run(tmp_path / "whole.jsonl")
    monkeypatch.setattr(score, "GROUP", 3)
    out, kept = tmp_path / "scores.jsonl", tmp_path / ".scores.jsonl.scored"
    score_items, groups = score.score_items, []

    def broken(*arguments):
        groups.append(arguments[3])
        if len(groups) == 2:
            raise KeyboardInterrupt
        return score_items(*arguments)

    monkeypatch.setattr(score, "score_items", broken)
    with pytest.raises(AssertionError):
        run(out)
    assert not out.exists() and len(kept.read_text().splitlines()) == 1 + 3
    kept.write_text(kept.read_text() + "[4, {")  # killed while it wrote
    groups[:] = [None, None]
    found = run(out)
    assert len(groups) == 2 + 2 and not kept.exists()
    assert [record["id"] for record in found] == [record["id"] for record in whole]
    for one, other in zip(found, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    kept.write_text("another run\n[0, {}]\n")
    assert run(out) == found
