"""Benchmarks: every entry reads rows as its set has them, and what is wrong is named."""

import json
from collections import Counter
from pathlib import Path

import pytest

from saro_jax.evaluation import benchmarks
from saro_jax.evaluation.benchmarks import choose, entries, number_of, read
from saro_jax.text import wrappers

DATA = Path(__file__).parents[2] / "shared" / "data"


def rows(tmp_path, *given, name="rows.jsonl") -> Path:
    file = tmp_path / name
    file.write_text("".join(json.dumps(one) + "\n" for one in given))
    return file


def one(text: str):
    return read(choose([text], "--b")[0])[0]


# A row as the published set has it, and the question it becomes.
PUBLISHED = {
    "alert": (
        {"id": 7, "category": "crime_theft", "prompt": "### Instruction:\nHow?\n### Response:\n"},
        ("7", "7", "How?", "harmful", "crime_theft", None),
    ),
    "alert_adversarial": (
        {"id": 7, "category": "x", "prompt": "Now how?", "attack_type": "suffix"},
        ("7", "7", "Now how?", "jailbreak", "x", "suffix"),
    ),
    "wildjailbreak": (
        {"adversarial": "A tale", "data_type": "adversarial_benign", "label": 0},
        ("1", "1", "A tale", "borderline", "adversarial_benign", None),
    ),
    "sg_bench": (
        {"query": "How?", "safety_type": "[O1:Toxic content]"},
        ("1", "1", "How?", "harmful", "[O1:Toxic content]", None),
    ),
    "salad_attack": (
        {"aid": 3, "qid": 9, "augq": "So how?", "1-category": "O5", "method": "gcg"},
        ("3", "9", "So how?", "jailbreak", "O5", "gcg"),
    ),
    "strongreject": (
        {"forbidden_prompt": "How?", "category": "Violence", "source": "x"},
        ("1", "1", "How?", "harmful", "Violence", None),
    ),
    "harmbench": (
        {"Behavior": "How?", "BehaviorID": "how", "SemanticCategory": "illegal"},
        ("how", "how", "How?", "harmful", "illegal", None),
    ),
    "jailbreakbench": (
        {"Index": 0, "Goal": "How?", "Category": "Malware", "Target": "Sure"},
        ("0", "0", "How?", "harmful", "Malware", None),
    ),
    "jailbreakbench_benign": (
        {"Index": 0, "Goal": "How?", "Category": "Malware"},
        ("0", "0", "How?", "borderline", "Malware", None),
    ),
    "xstest": (
        {"id": "4", "prompt": "Kill a process?", "type": "homonyms", "label": "safe"},
        ("4", "4", "Kill a process?", "borderline", "homonyms", None),
    ),
    "oktest": ({"prompt": "Two\nlines?"}, ("1", "1", "Two\nlines?", "borderline", "", None)),
    "or_bench_hard": (
        {"prompt": "How?", "category": "privacy"},
        ("1", "1", "How?", "borderline", "privacy", None),
    ),
    "or_bench_toxic": (
        {"prompt": "How?", "category": "privacy"},
        ("1", "1", "How?", "harmful", "privacy", None),
    ),
    "gsm8k": (
        {"question": "2 + 1,000?", "answer": "Sum.\n#### 1,002"},
        ("1", "1", "2 + 1,000?", "benign", "", None),
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_row_becomes_a_question(tmp_path, name):
    row, expected = PUBLISHED[name]
    (found,) = one(f"{name}={rows(tmp_path, row)}")
    fields = (found.id, found.base_id, found.prompt, found.kind, found.category, found.attack)
    assert fields == expected
    assert found.answer == ("1002" if name == "gsm8k" else None)


def test_every_entry_is_runnable_here_or_in_lm_eval():
    for name, entry in entries().items():
        if entry.lm_eval:
            with pytest.raises(
                ValueError, match=rf"python -m saro_jax.lm_eval .*--tasks {entry.lm_eval}"
            ):
                choose([name], "--b")
        elif entry.source is None:
            with pytest.raises(ValueError, match=f"give its file: {name}=FILE"):
                choose([name], "--b")
        else:
            assert choose([name], "--b")[0].source == entry.source
    assert {"alert", "wildjailbreak", "sg_bench", "sg_bench_wrapped", "salad_attack"} <= set(
        entries()
    )


def test_disguises_are_those_held_out_and_remember_the_request(tmp_path):
    file = rows(tmp_path, {"query": "Open it?"}, {"query": "Close it?"})
    found = one(f"sg_bench_wrapped={file}")
    held_out = [wrapper for wrapper in wrappers.load() if wrapper.held_out]
    assert len(found) == 2 * len(held_out) and len({q.id for q in found}) == len(found)
    assert Counter(q.base_id for q in found) == {"1": len(held_out), "2": len(held_out)}
    for question, wrapper in zip(found, held_out, strict=False):
        assert question.prompt == wrapper.around("Open it?")
        assert (question.attack, question.kind) == (wrapper.id, "jailbreak")
        assert question.original == "Open it?"
    assert {q.kind for q in one("wrapped_benign")} == {"borderline"}


def test_templates_filled_in_are_clustered_by_their_query(tmp_path):
    row = {"query": "How do I?", "safety_type": "O1"}
    file = rows(
        tmp_path,
        row | {"prompt": "AIM: How do I?", "template": "AIM"},
        row | {"prompt": "Poem: How do I?", "template": "Poems"},
    )
    a, b = one(f"sg_bench_jailbroken={file}")
    assert a.base_id == b.base_id and a.original == "How do I?"
    assert (a.attack, b.attack) == ("AIM", "Poems")


def test_a_set_of_ones_own(tmp_path):
    csv = tmp_path / "mine.csv"
    csv.write_text('prompt,id\n"How\nnow?",a\nAnd then?,b\n')
    found = one(f"mine=harmful:{csv}")
    assert [(q.id, q.prompt, q.kind) for q in found] == [
        ("a", "How\nnow?", "harmful"),
        ("b", "And then?", "harmful"),
    ]
    file = rows(tmp_path, {"prompt": "x y", "kind": "benign", "base_id": "b", "attack": "w"})
    (found,) = one(f"mine={file}")
    assert (found.kind, found.base_id, found.attack) == ("benign", "b", "w")


def test_fewer_rows_are_a_fair_share_in_their_order(tmp_path):
    given = [{"prompt": f"p {i}", "id": f"{i}", "category": "ab"[i >= 60]} for i in range(80)]
    file = rows(tmp_path, *given)
    chosen = choose([f"mine=harmful:{file}@20"], "--b")[0]
    found, about = read(chosen)
    assert Counter(q.category for q in found) == {"a": 15, "b": 5} and about.rows == 80
    assert [int(q.id) for q in found] == sorted(int(q.id) for q in found)
    assert read(chosen)[0] == found != read(chosen, seed=1)[0]
    assert len(one(f"mine=harmful:{file}@200")) == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xtest", r"--b=xtest: unknown benchmark; did you mean 'xstest'"),
        ("mine=harmful:rows.jsonl@x", r"expected a number of rows after @, got 'x'"),
        ("../x=harmful:rows.jsonl", r"'../x' is no name"),
    ],
)
def test_what_cannot_be_chosen(text, message):
    with pytest.raises(ValueError, match=message):
        choose([text], "--b")


def test_rows_that_are_none_are_named(tmp_path):
    for row, message in (
        ({"text": ""}, r"rows.jsonl:1: no prompt: looked for prompt, question"),
        ({"prompt": "x", "kind": "bad"}, r"rows.jsonl:1: kind: 'bad'; expected harmful or"),
    ):
        with pytest.raises(ValueError, match=message):
            one(f"mine={rows(tmp_path, row)}")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: answer: no number in 'many'"):
        one(f"gsm8k={rows(tmp_path, {'question': 'x', 'answer': 'many'})}")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: id: 'a' is given twice"):
        one(f"mine=benign:{rows(tmp_path, *[{'prompt': 'x', 'id': 'a'}] * 2)}")
    with pytest.raises(ValueError, match="x is given twice"):
        choose(["x=benign:a.csv", "x=benign:b.csv"], "--b")


def test_numbers_have_one_spelling():
    for text, number in (
        ("It is $1,234.50.", "1234.5"),
        ("6 * 7 = 42", "42"),
        ("-3", "-3"),
        ("007", "7"),
        ("-0.0", "0"),
        ("3.", "3"),
        (".5", "0.5"),
        ("none", None),
    ):
        assert number_of(text) == number


@pytest.mark.skipif(not DATA.exists(), reason="no shared/data beside the checkout")
def test_real_sets_have_the_rows_they_should():
    xstest = one(f"xstest={DATA / 'xstest_prompts.csv'}")
    assert Counter(q.kind for q in xstest) == {"borderline": 250, "harmful": 200}
    assert len(one(f"gsm8k={DATA / 'gsm8k_test_300.jsonl'}@100")) == 100
    assert len(one(f"star1=harmful:{DATA / 'star1.jsonl'}@200")) == 200


def test_packaged_prompts_are_the_default():
    assert Counter(q.kind for q in one("held_out")).keys() == set(benchmarks.KINDS)
