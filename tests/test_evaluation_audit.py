"""The audit: what is drawn, what people write, and what becomes of it; verdicts of other judges."""

import csv

import pytest
from test_evaluation_results import transcript

from saro_jax.evaluation import audit, metrics, statistics, verdicts
from saro_jax.evaluation.results import Verdict, write_transcripts


def answers(n: int = 80):
    """Every fourth is refused; one of ten is incomplete."""
    found = []
    for i in range(n):
        outcome = "incomplete" if i % 10 == 9 else "refused" if i % 4 == 0 else "complied"
        found.append(
            transcript(id=f"x{i}", base_id=f"x{i}", answer=f"=answer {i}", outcome=outcome)
        )
    return found


def filled(folder, label):
    """audit.csv with the labels that `label` gives by row number."""
    file = folder / "audit.csv"
    with open(file, newline="") as source:  # not by lines: a cell can hold several
        rows = list(csv.DictReader(source))
    for number, row in enumerate(rows):
        row["label"] = label(row, number)
    with open(file, "w", newline="") as target:
        writer = csv.DictWriter(target, audit.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return file, rows


def test_a_blind_sample_is_drawn_labelled_and_folded_in(tmp_path, capsys):
    found = answers()
    write_transcripts(tmp_path, found)
    assert audit.main([str(tmp_path), "--n=40"]) == 0
    assert "40 answers" in capsys.readouterr().out
    assert audit.labels_file(tmp_path) is None  # nothing is labelled yet
    by_key = {audit.key(one): one for one in found}
    # People find one refusal more among what the judge called compliance.
    missed = []

    def person(row, number):
        one = by_key[row["key"]]
        if one.outcome == "refused":
            return "FR"
        if not missed:
            missed.append(one)
            return "PR"
        return "fc"

    file, rows = filled(tmp_path, person)
    assert all(row["answer"].startswith("'=") for row in rows)  # no formula
    assert all(by_key[row["key"]].outcome != "incomplete" for row in rows)
    (one,) = [a for a in audit.folded(file, found) if a.metric == "over_refusal"]
    assert (one.labelled, one.missed, one.false_alarms, one.agree) == (40, 1, 0, 0.975)
    labelled = {row["key"] for row in rows}
    complete = [t for t in found if t.outcome != "incomplete"]
    judged = {audit.key(t): float(t.outcome == "refused") for t in complete}
    rest = [judged[k] for k in judged if k not in labelled]
    people = [float(row["label"] != "fc") for row in rows]
    expected = statistics.ppi(rest, people, [judged[row["key"]] for row in rows])
    share = len(complete) / len(found)
    assert one.share == pytest.approx(expected.value * share, abs=1e-6)
    assert one.low == pytest.approx(expected.low * share, abs=1e-6)
    assert one.judge_share == pytest.approx(sum(judged.values()) / 80, abs=1e-6)


def test_wrong_labels_and_folders_are_named(tmp_path, capsys):
    assert audit.main([]) == 2 and audit.main([str(tmp_path)]) == 2
    assert "no transcripts" in capsys.readouterr().err
    found = answers()
    write_transcripts(tmp_path, found)
    audit.main([str(tmp_path), "--n=3"])
    assert audit.main([str(tmp_path)]) == 2  # labels are not overwritten
    file, _ = filled(tmp_path, lambda row, number: "XX")
    with pytest.raises(ValueError, match=r"audit.csv: row 2: label: 'XX'; allowed: FC, FR, PR"):
        audit.labels_file(tmp_path)
    filled(tmp_path, lambda row, number: "FC")
    with pytest.raises(ValueError, match="is no answer of this evaluation"):
        audit.folded(file, [])


def test_judges_of_safety_are_asked_of_harmful_prompts_and_once(tmp_path):
    asked = []

    def say(pairs):
        asked.extend(pairs)
        return [{"label": "unsafe" if "take" in text else "safe"} for _, text in pairs]

    guard = verdicts.Judge("guard", "1", ("answer", "reasoning"), True, say)
    found = [
        transcript(id="a", kind="jailbreak", answer="take it", reasoning="hm"),
        transcript(id="b", kind="harmful", answer="", reasoning="take it"),
        transcript(id="c", kind="borderline", answer="take it"),
    ]
    judged = verdicts.judged(found, {("xstest", "a"): "open it"}, guard, tmp_path)
    assert [prompt for prompt, _ in asked].count("open it") == 2 and len(asked) == 5
    assert judged[2].verdicts == found[2].verdicts
    names = [(one.judge, one.target, one.label) for one in judged[0].verdicts[1:]]
    assert names == [
        ("guard", "answer", "unsafe"),
        ("guard:original", "answer", "unsafe"),
        ("guard", "reasoning", "safe"),
        ("guard:original", "reasoning", "safe"),
    ]
    assert verdicts.judged(found, {("xstest", "a"): "open it"}, guard, tmp_path) == judged
    assert len(asked) == 5  # from the journal
    measured = {
        (one.metric, one.judge): one.values
        for one in metrics.measures(judged)
        if one.metric.startswith("asr")
    }
    assert measured["asr_answer", "guard"] == [1.0, 0.0]
    assert measured["asr_reasoning", "guard"] == [0.0, 1.0]
    assert measured["asr_any", "guard"] == [1.0, 1.0]


def test_agreement_is_kappa_over_what_both_judged():
    labels = [("safe", "safe"), ("safe", "unsafe"), ("unsafe", "unsafe"), ("invalid", "safe")]
    found = [
        transcript(
            id=f"{i}",
            verdicts=tuple(
                Verdict(judge=name, target="answer", label=label)  # type: ignore[arg-type]
                for name, label in zip("ab", pair, strict=True)
            ),
        )
        for i, pair in enumerate(labels)
    ]
    (one,) = verdicts.agreements(found)
    # Observed 2/3, by chance 2/3 * 1/3 + 1/3 * 2/3 = 4/9.
    assert (one.judge_a, one.judge_b, one.n) == ("a", "b", 3)
    assert one.kappa == pytest.approx((2 / 3 - 4 / 9) / (5 / 9), abs=1e-6)
