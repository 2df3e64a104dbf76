"""Transcripts inside the page: they come back as they were, and which of them go in."""

import base64
import csv
import gzip
import io
import json

import pytest
import report_folders

from saro_jax.reporting import tables, transcripts


@pytest.fixture(scope="module")
def made():
    return report_folders.transcripts(("base", "srpo"), 40)


def unpacked(text: str) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_everything_comes_back(made):
    results = report_folders.results(made)
    text = transcripts.packed(made, results)
    assert text == transcripts.packed(made, results)
    data = unpacked(text)
    assert len(data["prompts"]) == 40 and len(data["rows"]) == 80
    found = {}
    for row in data["rows"]:
        prompt = data["prompts"][row[0]]
        found[data["models"][row[1]], prompt[0]] = (prompt, row)
    for one in made:
        prompt, row = found[one.model, one.id]
        assert data["kinds"][prompt[2]] == one.kind
        assert prompt[3:] == [one.category, one.attack, one.prompt]
        assert data["outcomes"][row[3]] == one.outcome
        assert row[7:9] == [one.tokens, one.reasoning_tokens]
        assert [(data["steps"][kind], said) for kind, said in row[11]] == [
            (step.kind, step.text) for step in one.steps
        ]
        assert row[12] == one.answer
        assert row[13] == [[v.judge, v.target, v.label, v.score, v.refusal] for v in one.verdicts]


def test_reasoning_without_steps_is_kept_whole(made):
    one = next(t for t in made if t.reasoning).model_copy(update={"steps": ()})
    data = unpacked(transcripts.packed([one], None))
    assert data["rows"][0][11] == [[0, one.reasoning]] and data["steps"] == [""]


def test_a_limit_keeps_whole_prompts_spread_over_each_benchmark(made):
    kept = transcripts.chosen(made, 4)
    ids = {(one.benchmark, one.id) for one in kept}
    assert len(ids) == 4 * len(report_folders.BENCHMARKS)
    assert len(kept) == 2 * len(ids)
    xstest = sorted(name for benchmark, name in ids if benchmark == "xstest")
    assert xstest == [f"xstest-{i:04d}" for i in (0, 4, 8, 12)]
    assert transcripts.chosen(made, None) == made
    assert transcripts.chosen(made, 0) == []


def test_the_sheet_holds_verdicts_and_no_texts(made):
    sheet = transcripts.sheet(made)
    assert sheet is not None
    rows = list(csv.DictReader(io.StringIO(tables.spreadsheet(sheet))))
    assert len(rows) == len(made)
    assert not {"prompt", "answer", "reasoning", "response"} & set(rows[0])
    harmful = next(i for i, one in enumerate(made) if one.kind == "harmful")
    assert rows[harmful]["guard answer label"] == made[harmful].verdicts[1].label
    assert rows[harmful]["refusal answer refusal"] == made[harmful].verdicts[0].refusal
