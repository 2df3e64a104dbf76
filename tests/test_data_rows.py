"""Rows: every accepted form, every refused one with file and line, nothing dropped silently."""

import csv
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from saro_jax.data import rows, sources
from saro_jax.data.rows import Reject, StageKind, check_share, read, write_rejects
from saro_jax.records import write_lines
from saro_jax.text.chat import Message

USER, ANSWER = Message("user", "Kill it?"), Message("assistant", "Use kill.")
HELD = {"prompt": "Kill it?", "chosen": "Use kill.", "rejected": "No."}


def plain(*turns: Message) -> list[dict]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def write(path: Path, *records) -> str:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def one(tmp_path, record, kind: StageKind = "sft"):
    read_rows, rejects = read(write(tmp_path / "x.jsonl", record), kind)
    assert not rejects, rejects
    (row,) = read_rows
    return row


def reason(tmp_path, record, kind: StageKind = "sft") -> str:
    read_rows, rejects = read(write(tmp_path / "x.jsonl", record), kind)
    assert not read_rows
    assert rejects[0].where == f"{tmp_path}/x.jsonl:1" and "\n" not in rejects[0].reason
    return rejects[0].reason


@pytest.mark.parametrize(
    "record",
    [
        {"messages": plain(USER, ANSWER)},
        {"messages": plain(USER, ANSWER), "prompt": "something else", "score": 3},
        {"prompt": "Kill it?", "completion": "Use kill."},
        {"prompt": plain(USER), "completion": plain(ANSWER)},
        {"question": "Kill it?", "response": "Use kill.", "category": "x", "source": None},
        {"question": "Kill it?", "answer": "Use kill."},
        {"instruction": "Kill it?", "response": "Use kill."},
        {"prompt": "Kill it?", "answer": "Use kill.", "reasoning": None},
    ],
)
def test_sft_forms(tmp_path, record):
    row = one(tmp_path, record)
    assert (row.prompt, row.completion) == ((USER,), (ANSWER,))
    assert (row.where, row.kind, row.weight) == (f"{tmp_path}/x.jsonl:1", "sft", 1.0)


def test_reasoned_row(tmp_path):
    row = one(tmp_path, {"prompt": "Kill it?", "reasoning": "Harmless.\n\nHelp.", "answer": "kill"})
    text = "<think>\nHarmless.\n\nHelp.\n</think>\n\nkill"
    assert row.completion == (Message("assistant", text),)


def test_messages_are_given_up_to_the_first_answer(tmp_path):
    system = Message("system", "")
    row = one(tmp_path, {"messages": plain(system, USER, ANSWER, USER, ANSWER)})
    assert row.prompt == (system, USER) and row.completion == (ANSWER, USER, ANSWER)


def test_columns_id_kind_weight(tmp_path):
    row = one(
        tmp_path,
        {"id": 7, "kind": "PPA", "weight": 0.25, "prefix": "<think>\nOh", **HELD},
        "preference",
    )
    assert (row.id, row.kind, row.weight, row.prefix) == ("7", "PPA", 0.25, "<think>\nOh")
    assert one(tmp_path, {"weight": 0, **HELD}, "preference").weight == 0.0


@pytest.mark.parametrize(
    "record",
    [
        HELD,
        {
            "prompt": plain(USER),
            "chosen": plain(ANSWER),
            "rejected": plain(Message("assistant", "No.")),
        },
        {"chosen": plain(USER, ANSWER), "rejected": plain(USER, Message("assistant", "No."))},
        # UltraFeedback has the prompt twice.
        {
            "prompt": "Kill it?",
            "chosen": plain(USER, ANSWER),
            "rejected": plain(USER, Message("assistant", "No.")),
        },
    ],
)
def test_preference_forms(tmp_path, record):
    row = one(tmp_path, record, "preference")
    assert row.prompt == (USER,) and row.prefix == "" and row.kind == "outcome"
    assert row.chosen == (ANSWER,) and row.rejected == (Message("assistant", "No."),)


def test_process_pair(tmp_path):
    row = one(tmp_path, {"prefix": "<think>\nOh", **HELD}, "preference")
    assert row.prefix == "<think>\nOh" and row.kind == "process"


def test_texts_with_a_shared_start_are_raw(tmp_path):
    record = {"chosen": "Human: hi\nAssistant: Hello", "rejected": "Human: hi\nAssistant: No"}
    row = one(tmp_path, record, "preference")
    # The space goes with the answers, as in TRL.
    assert (row.prompt, row.chosen, row.rejected) == ("Human: hi\nAssistant:", " Hello", " No")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("{", "not JSON: "),
        ("[1]", "not an object: list"),
        (
            {"text": "x"},
            "missing columns: found 'text', allowed messages; prompt + reasoning + answer;",
        ),
        ({"prompt": "x", "completion": 3}, "wrong type: completion is int"),
        ({"prompt": "x", "completion": " \n"}, "empty text: completion[0]"),
        ({"prompt": "", "completion": "x"}, "empty text: prompt[0]"),
        ({"prompt": "x", "reasoning": "", "answer": "x"}, "empty text: reasoning"),
        ({"prompt": "x", "completion": "\ud800"}, "not Unicode: lone surrogate in completion[0]"),
        ({"messages": []}, "empty text: messages has no messages"),
        ({"messages": ["x"]}, "wrong type: messages[0] is str"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "unknown role: 'bot' in messages[0], allowed",
        ),
        (
            {"messages": [{"role": "user", "content": [1]}]},
            "wrong type: the content of messages[0] is",
        ),
        ({"messages": plain(USER)}, "wrong turns: messages have no assistant turn"),
        ({"messages": plain(ANSWER)}, "wrong turns: the prompt ends with nothing"),
        ({"messages": plain(USER, ANSWER, USER)}, "wrong turns: the answer is assistant ... user"),
        (
            {"messages": plain(USER), "prompt": "a", "completion": "b"},
            "wrong turns: messages have no",
        ),
        ({"prompt": "x", "completion": "y", "weight": -1}, "bad weight: -1, must be"),
        ({"prompt": "x", "completion": "y", "weight": float("nan")}, "bad weight: nan"),
        ({"prompt": "x", "completion": "y", "weight": True}, "bad weight: True"),
        ({"prompt": "x", "completion": "y", "weight": "a"}, "bad weight: 'a'"),
        ({"prompt": "x", "completion": "y", "weight": 10**400}, "bad weight: 1000"),
        ({"prompt": "x", "completion": "y", "id": 0.5}, "wrong type: id is float"),
        ({"prompt": "x", "completion": "y", "kind": 3}, "wrong type: kind is 3"),
    ],
)
def test_refused_sft_rows(tmp_path, record, expected):
    assert reason(tmp_path, record).startswith(expected)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "x", "chosen": "a"}, "missing column: 'rejected', found 'prompt', 'chosen'"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"chosen": "a b", "rejected": "a b"}, "chosen equals rejected"),
        (
            {"chosen": plain(USER, ANSWER), "rejected": plain(USER, ANSWER)},
            "chosen equals rejected",
        ),
        (
            {"chosen": plain(USER), "rejected": plain(ANSWER)},
            "wrong turns: the prompt ends with nothing",
        ),
        (
            {"chosen": plain(USER, ANSWER), "rejected": plain(USER)},
            "wrong turns: rejected goes on with n",
        ),
        ({"chosen": "a b", "rejected": "c d"}, "no shared start"),
        ({"chosen": "a", "rejected": "a b"}, "empty text: one of chosen and rejected"),
        (
            {"prompt": "x", "chosen": "a", "rejected": plain(ANSWER)},
            "wrong type: chosen is str, rejected",
        ),
        ({"prompt": "x", "chosen": "", "rejected": "a"}, "empty text: chosen[0]"),
        ({"prefix": 3, **HELD}, "wrong type: prefix is int"),
        (
            {"prefix": "p", "chosen": "a b", "rejected": "a c"},
            "missing column: 'prompt', needed by a row",
        ),
    ],
)
def test_refused_preference_rows(tmp_path, record, expected):
    assert reason(tmp_path, record, "preference").startswith(expected)


def test_lines_are_exact_and_good_rows_survive(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n{oh\n" + good + b"\n\xff\n" + good)
    read_rows, rejects = read(str(path), "sft")
    assert [row.where for row in read_rows] == [f"{path}:{line}" for line in (1, 4, 6)]
    assert [reject.where for reject in rejects] == [f"{path}:3", f"{path}:5"]
    assert rejects[1].reason.startswith("not UTF-8: ")


def test_ids_are_the_content_and_duplicates_are_refused(tmp_path):
    record = {"prompt": "a", "completion": "b"}
    path = write(
        tmp_path / "a.jsonl", record, record, {**record, "weight": 2}, {**record, "id": "k"}
    )
    other = write(tmp_path / "b.jsonl", {"id": "k", "prompt": "c", "completion": "d"})
    read_rows, rejects = read([path, other], "sft")
    first = read_rows[0].id
    assert [row.id for row in read_rows] == [first, f"{first}-2", f"{first}-3", "k"]
    assert rejects == [Reject(f"{other}:1", "k", f"duplicate id: 'k', first at {path}:4")]
    # The same in every process and on every machine, and of the content alone.
    assert first == one(tmp_path, {**record, "kind": "x"}).id == "ebb79f829df317f1"
    assert one(tmp_path, {"prompt": "ab", "completion": "b"}).id != first


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    records = [{"id": str(i), "prompt": f"Q {i}\n?", "completion": f"A, {i}"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    write(tmp_path / "lines.json", *records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "completion", "weight"])
        writer.writeheader()
        writer.writerows(records)
    want = read(write(tmp_path / "a.jsonl", *records), "sft")[0]
    for name, places in {
        "a.json": (1, 2, 3),
        "lines.json": (1, 2, 3),
        "a.parquet": (1, 2, 3),
        "a.csv": (2, 4, 6),  # each prompt has a line break
    }.items():
        got, rejects = read(str(tmp_path / name), "sft")
        assert not rejects
        assert [(r.id, r.prompt, r.completion) for r in got] == [
            (r.id, r.prompt, r.completion) for r in want
        ]
        assert [row.where for row in got] == [f"{tmp_path / name}:{place}" for place in places]


def test_messages_from_parquet(tmp_path):
    records = [{"messages": plain(USER, ANSWER), "id": None}, {"messages": plain(USER), "id": "k"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    read_rows, rejects = read(str(tmp_path / "a.parquet"), "sft")
    assert read_rows[0].completion == (ANSWER,)
    assert rejects[0].where.endswith("a.parquet:2") and rejects[0].id == "k"


def test_csv_with_missing_cells_and_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,weight\nHi,42,0.5\nHi,\nHi,,1\n")
    read_rows, rejects = read(str(path), "sft")
    assert read_rows[0].completion[0].content == "42" and read_rows[0].weight == 0.5
    assert [reject.reason.split(":")[0] for reject in rejects] == ["wrong cells", "missing columns"]


def test_folder(tmp_path):
    record = {"prompt": "a", "completion": "b"}
    write(tmp_path / "b.jsonl", record)
    write(tmp_path / "a.jsonl", record)
    write(tmp_path / "rejects.jsonl", {"where": "x"})
    write(tmp_path / "manifest.json", {"stage": "x"})
    (tmp_path / "README.md").write_text("x")
    names = [Path(row.where).name for row in read(str(tmp_path), "sft")[0]]
    assert names == ["a.jsonl:1", "b.jsonl:1"]
    # Files of the split, where there are any: no test rows in training.
    write(tmp_path / "train-00000-of-00001.jsonl", record)
    write(tmp_path / "test.jsonl", record)
    assert len(read(str(tmp_path), "sft")[0]) == 1
    assert len(read(str(tmp_path), "sft", split="test")[0]) == 1


def test_unreadable_sources_are_told_in_one_line(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", HELD)
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "bad.json").write_text("[1,")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    for source, expected in {
        f"{tmp_path}/trian.jsonl": "no such file or folder, did you mean 'train.jsonl'?",
        f"{tmp_path.name}/train.json": "no such file or folder, did you mean 'train.jsonl'?",
        f"{tmp_path}/x.txt": "unknown extension '.txt', allowed: .jsonl, .jsonl.zst, .json, "
        ".parquet, .csv",
        f"{tmp_path}/bad.json": "not JSON: ",
        f"{tmp_path}/bad.parquet": "not parquet: ",
        f"{tmp_path}/empty": "no rows",
        write(tmp_path / "none.jsonl"): "none.jsonl: no rows",
        "quickstart:nothing-of-this-name": "no such packaged rows",
    }.items():
        with pytest.raises(ValueError) as error:
            read(source, "sft")
        assert expected in str(error.value) and "\n" not in str(error.value)


def test_packaged_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "QUICKSTART", tmp_path)
    write(tmp_path / "ritd.jsonl", {"prompt": "a", "completion": "b"})
    assert len(read("quickstart:ritd", "sft")[0]) == 1
    with pytest.raises(ValueError, match="did you mean 'ritd'"):
        read("quickstart:rit", "sft")


def test_hub_ids(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name == "org/none":
            raise DatasetNotFoundError("not there\nsecond line")
        return datasets.Dataset.from_list([{**HELD, "id": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,), rejects = read(["org/name:small"], "preference", split="test")
    assert row.where == "org/name:small/test:1" and not rejects
    assert calls == [("org/name", "small", "test")]
    with pytest.raises(ValueError, match=r"^org/none: no such file .*'train'\): not there$"):
        read("org/none", "preference")


def test_detect_kind(tmp_path):
    assert rows.detect_kind(write(tmp_path / "a.jsonl", "{", HELD)) == "preference"
    assert rows.detect_kind(write(tmp_path / "a.jsonl", {"prompt": "a"})) == "sft"


def test_write_rejects(tmp_path):
    path = tmp_path / "out" / "rejects.jsonl"
    write_rejects(path, [Reject("f:1", "é", "x: y"), Reject("f:2", "\ud800", "z")])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"where": "f:1", "id": "é", "reason": "x: y"} and len(lines) == 2
    write_rejects(path, [])
    assert path.read_text() == "" and os.listdir(path.parent) == ["rejects.jsonl"]


def test_check_share():
    rejects = [
        Reject("f:1", "", "not JSON: a"),
        Reject("f:2", "", "empty text: x"),
        Reject("f:5", "", "empty text: y"),
    ]
    check_share(rejects, 60, 0.05)
    check_share([], 0, 0.0)
    with pytest.raises(ValueError) as error:
        check_share(rejects, 59, 0.05)
    assert str(error.value) == (
        "3 of 59 rows rejected, data.max_reject_share=0.05 allows 2; 2 of them: empty text, "
        "first f:2: empty text: x"
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("star1.jsonl", 1000),
        ("gsm8k_train_1000.jsonl", 1000),
        ("gsm8k_test_300.jsonl", 300),
        ("xstest_completions_llama2orig.csv", 450),
        ("xstest_completions_mistralguard.csv", 450),
    ],
)
def test_real_sets_are_read_whole(name, count):
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"needs {name} beside the checkout")
    read_rows, rejects = read(str(path), "sft")
    assert len(read_rows) == count and not rejects


def test_compressed_rows_are_read_as_a_file_and_in_a_folder(tmp_path):
    lines = [json.dumps({"id": f"r{i}", "prompt": "x", "completion": "y"}) for i in range(3)]
    write_lines(tmp_path / "train.jsonl.zst", lines)
    for source in (tmp_path, tmp_path / "train.jsonl.zst"):
        found, rejects = read(str(source), "sft")
        assert [row.id for row in found] == ["r0", "r1", "r2"] and not rejects
    assert found[2].where == f"{tmp_path}/train.jsonl.zst:3"
    (tmp_path / "bad.jsonl.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"bad\.jsonl\.zst: not zstandard"):
        read(f"{tmp_path}/bad.jsonl.zst", "sft")


# ---- noise and unpaired rows

PAIR = {"prompt": "x", "chosen": "y", "rejected": "z"}
SINGLE = {"prompt": "x", "completion": "y", "label": True}


def test_noise_is_a_share_below_one_half(tmp_path):
    assert one(tmp_path, PAIR, "preference").noise is None
    for value in (0, 0.25, "0.25", 0.499):
        assert one(tmp_path, PAIR | {"noise": value}, "preference").noise == float(value)
    for value in (0.5, -0.1, True, "much", float("nan"), [0.1]):
        assert reason(tmp_path, PAIR | {"noise": value}, "preference").startswith("bad noise: ")


def test_unpaired_rows(tmp_path):
    row = one(tmp_path, SINGLE, "unpaired")
    assert (row.label, row.kind, row.weight, row.prefix, row.noise) == (
        True,
        "outcome",
        1.0,
        "",
        None,
    )
    assert row.completion[0].content == "y" and row.prompt[0].content == "x"
    for value, label in ((False, False), ("true", True), ("FALSE", False), (1, True), ("0", False)):
        assert one(tmp_path, SINGLE | {"label": value}, "unpaired").label is label
    process = one(tmp_path, SINGLE | {"prefix": "<think>\na", "weight": 2}, "unpaired")
    assert (process.kind, process.weight, process.prefix) == ("process", 2.0, "<think>\na")


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        (SINGLE | {"label": "maybe"}, "unpaired", "bad label: 'maybe', must be true or false"),
        (SINGLE | {"label": 2}, "unpaired", "bad label: 2"),
        ({"prompt": "x", "completion": "y"}, "unpaired", "missing column: 'label'"),
        (PAIR, "unpaired", "paired row: "),
        (SINGLE, "preference", "unpaired row: "),
        (SINGLE | {"completion": ""}, "unpaired", "empty text: completion"),
    ],
)
def test_refused_unpaired_rows(tmp_path, record, kind, expected):
    assert reason(tmp_path, record, kind).startswith(expected)
