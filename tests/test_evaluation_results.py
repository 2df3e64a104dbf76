"""An evaluation's folder: what is written comes back, and what is wrong in it is named."""

import pytest

from saro_jax import records
from saro_jax.evaluation.results import (
    Agreement,
    Audit,
    Benchmark,
    Cost,
    Difference,
    Model,
    Overhead,
    Rate,
    Results,
    Step,
    Transcript,
    Verdict,
    read_results,
    read_transcripts,
    transcript_files,
    write_results,
    write_transcripts,
)


def transcript(**changes) -> Transcript:
    fields = {
        "id": "x1",
        "base_id": "x1",
        "benchmark": "xstest",
        "view": "auto",
        "prompt": "How do I open a lock?\u2028",
        "model": "qwen2.5-rw",
        "kind": "borderline",
        "category": "homonyms",
        "response": "<think>\nIt is theirs.\n</think>\n\nTurn it.",
        "reasoning": "It is theirs.",
        "answer": "Turn it.",
        "status": "ok",
        "finish": "eos",
        "steps": (Step(text="It is theirs.", kind="understand"),),
        "tokens": 9,
        "reasoning_tokens": 6,
        "answer_tokens": 3,
        "verdicts": (Verdict(judge="refusal", target="answer", refusal="FC", score=0.1),),
        "outcome": "complied",
    }
    return Transcript(**(fields | changes))


RESULTS = Results(
    models=(Model(name="base", path="quickstart", sha="0" * 64),),
    baseline="base",
    benchmarks=(
        Benchmark(
            name="xstest",
            title="XSTest",
            kind="mixed",
            protocol="single turn",
            license="CC-BY-4.0",
            n=450,
            source="walledai/XSTest",
            metric="over_refusal",
        ),
    ),
    rates=(
        Rate(
            model="base",
            benchmark="xstest",
            view="auto",
            kind="borderline",
            metric="over_refusal",
            n=250,
            count=25,
            share=0.1,
            low=0.069,
            high=0.143,
            method="wilson",
        ),
    ),
    differences=(
        Difference(
            a="base",
            b="rw",
            benchmark="xstest",
            view="auto",
            metric="over_refusal",
            n=250,
            delta=0.1,
            low=0.0,
            high=0.2,
            p=0.04,
            p_holm=0.08,
            method="mcnemar mid-p",
            mde=0.05,
        ),
    ),
    costs=(
        Cost(
            model="rw",
            view="auto",
            kind="benign",
            n=3,
            mean_tokens=90.0,
            p95_tokens=99.0,
            mean_reasoning_tokens=60.0,
            mean_answer_tokens=30.0,
            overhead=Overhead(ratio=0.5, low=0.1, high=0.9),
        ),
    ),
    agreement=(
        Agreement(
            judge_a="llama_guard_3",
            judge_b="wildguard",
            about="label of answer",
            n=3,
            equal=1.0,
            kappa=None,
        ),
    ),
    audit=(
        Audit(
            model="base",
            benchmark="xstest",
            view="auto",
            kind="borderline",
            metric="over_refusal",
            labelled=50,
            agree=0.9,
            missed=3,
            false_alarms=2,
            judge_share=0.1,
            share=0.12,
            low=0.08,
            high=0.16,
            weight=0.7,
        ),
    ),
)


def test_a_folder_comes_back_as_it_was_written(tmp_path):
    found = [transcript(), transcript(id="x2"), transcript(view="no_think")]
    write_transcripts(tmp_path, found)
    write_results(tmp_path, RESULTS)
    assert read_results(tmp_path) == RESULTS
    assert transcript_files(tmp_path) == [
        ("qwen2.5-rw", "xstest", "auto"),
        ("qwen2.5-rw", "xstest", "no_think"),
    ]
    assert read_transcripts(tmp_path, "qwen2.5-rw", "xstest", "auto") == found[:2]
    assert read_transcripts(tmp_path, "qwen2.5-rw", "xstest", "no_think") == found[2:]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json: cannot be read"):
        read_results(tmp_path)
    write_results(tmp_path, RESULTS)
    file = tmp_path / "results.json"
    file.write_text(file.read_text().replace('"method": "wilson"', '"method": "wald"'))
    with pytest.raises(ValueError, match=r"results\.json: rates\.0\.method: .*'wald'"):
        read_results(tmp_path)
    # A name is that of a folder: it cannot lead out of this one.
    with pytest.raises(ValueError, match="model"):
        transcript(model="../x")
    line = records.dump(transcript()).replace('"auto"', '"always"')
    with pytest.raises(ValueError, match=r"f:1: view: .*'always'"):
        records.parse(Transcript, line, "f:1")
