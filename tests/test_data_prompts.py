"""The prompt pool: reading, labels, groups, wrappers, mix and decontamination."""

import csv
import json
from pathlib import Path

import pytest

from saro_jax.data import prompts as pool
from saro_jax.data.prompts import COLUMNS, Source, column_map, sources
from saro_jax.records import KINDS, Prompt, prompt_id
from saro_jax.text import wrappers
from saro_jax.text.policy import load

POLICY = load()


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(*given: Source, columns=COLUMNS):
    return pool.read(given, columns, POLICY, "train")


def some(count: int, kind: str = "harmful", **more) -> list[Prompt]:
    texts = [f"{kind} request {i} about the {'abc'[i % 3]}{i} matter" for i in range(count)]
    parts = {"source": "own", "kind": kind, "categories": ("P3",)} | more
    return [Prompt.model_validate({"id": prompt_id(t), "text": t} | parts) for t in texts]


def test_a_source_gives_as_many_as_it_is_asked_for(tmp_path: Path):
    file = write(tmp_path / "h.jsonl", *({"prompt": f"Do {i}"} for i in range(40)))
    (whole, ten) = sources([f"harmful={file}", f"harmful={file}@10"], "--x")
    assert (ten.kind, ten.name, ten.limit) == ("harmful", file, 10) and whole.limit is None
    every = [one.text for one in read(whole)[0]]
    drawn = {}
    for seed in (0, 1):
        prompts, rejects, inputs = pool.read([ten], COLUMNS, POLICY, "train", seed)
        drawn[seed] = [one.text for one in prompts]
        assert len(prompts) == 10 and inputs[0].rows == 40
        assert [one.reason for one in rejects] == ["not drawn"] * 30
        # In the file's order, and not its beginning.
        assert drawn[seed] == [text for text in every if text in drawn[seed]] != every[:10]
    assert drawn[0] != drawn[1]
    assert read(Source("harmful", file, 50))[1] == []
    with pytest.raises(ValueError, match=r"--x=benign=a\.jsonl@0: expected at least 1 row after @"):
        sources(["benign=a.jsonl@0"], "--x")


def test_rows_of_several_forms_become_prompts(tmp_path: Path):
    own = write(
        tmp_path / "own.jsonl",
        {"id": "a", "prompt": "Do it", "kind": "harmful", "cats": ["Self-Harm", "P3"]},
        {"id": "b", "prompt": [{"role": "user", "content": "Hi"}], "kind": "benign"},
    )
    maths = write(
        tmp_path / "maths.jsonl",
        {"question": "2 + 3?", "answer": "Add <<2+3=5>>5.\n#### 5"},
        {"question": "Who?", "answer": "<think>\nhm\n</think>\n\nMe."},
    )
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "category"], ["Kill, a process?", "Other; P4"]])
    prompts, rejects, inputs = read(
        Source(None, own), Source("benign", maths), Source("borderline", str(tmp_path / "x.csv"))
    )
    assert not rejects
    assert [one.text for one in prompts] == ["Do it", "Hi", "2 + 3?", "Who?", "Kill, a process?"]
    first, hi, sum_, who, kill = prompts
    assert first.id == prompt_id("do  IT") and first.categories == ("P5", "P3")
    assert (first.kind, first.source, first.source_id) == ("harmful", own, "a")
    assert first.policy_version == POLICY.version and first.label_conf == 1.0
    assert hi.categories == ("P0",) and hi.meta == {}
    assert sum_.meta == {"answer": "The answer is 5.", "solution": "Add 5.", "final": "5"}
    assert who.meta == {"answer": "Me."} and who.source_id == "2"
    assert kill.categories == ("P4",) and kill.label_conf == 0.5
    assert [(one.source, one.rows) for one in inputs] == [
        (own, 2),
        (maths, 2),
        (f"{tmp_path}/x.csv", 1),
    ]
    assert inputs[0].path == Path(own) and len({one.sha256 for one in inputs}) == 3


def test_answers_of_harmful_rows_are_not_kept(tmp_path: Path):
    file = write(tmp_path / "h.jsonl", {"prompt": "Do it", "response": "Sure"})
    prompts, _, _ = read(Source("harmful", file))
    assert prompts[0].meta == {} and prompts[0].categories == () and prompts[0].label_conf == 0.0


def test_rows_that_are_no_prompts_are_rejected_with_their_place(tmp_path: Path):
    file = tmp_path / "own.jsonl"
    write(file, {"prompt": "A", "kind": "benign"}, {"prompt": " a ", "kind": "benign"})
    with open(file, "a") as more:
        more.write('{"prompt": "B"}\n{"prompt": 3, "kind": "benign"}\n[]\n')
    prompts, rejects, inputs = read(Source(None, str(file)))
    assert len(prompts) == 1 and inputs[0].rows == 5
    assert [(one.where, one.reason.split(";")[0]) for one in rejects] == [
        ("own.jsonl:2", f"duplicate prompt: of {file} 1"),
        ("own.jsonl:3", "no kind: got None, expected harmful or jailbreak or benign or borderline"),
        ("own.jsonl:4", "no prompt: looked for the columns " + ", ".join(COLUMNS["prompt"])),
        ("own.jsonl:5", "not an object: list"),
    ]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no rows"):
        read(Source("benign", str(tmp_path / "empty.jsonl")))


def test_columns_and_kinds_are_given_by_name(tmp_path: Path):
    assert sources(["benign=a=b.jsonl", "c.jsonl"], "--x") == [
        Source("benign", "a=b.jsonl"),
        Source(None, "c.jsonl"),
    ]
    with pytest.raises(ValueError, match="--x=bening=a: expected harmful or jailbreak or benign"):
        sources(["bening=a"], "--x")
    columns = column_map(["prompt=ask", "categories=area"], "--y")
    file = write(tmp_path / "a.jsonl", {"ask": "Do it", "prompt": "no", "area": "Privacy"})
    prompts, _, _ = read(Source("harmful", file), columns=columns)
    assert (prompts[0].text, prompts[0].categories) == ("Do it", ("P10",))
    for wrong in ("prompt", "promt=ask", "prompt="):
        with pytest.raises(ValueError, match=f"--y={wrong}: expected FIELD=COLUMN, FIELD one of"):
            column_map([wrong], "--y")


def test_a_request_its_disguises_and_twins_are_in_one_split(tmp_path: Path):
    rows = [
        {"id": str(i), "prompt": f"Prompt number {i}", "kind": "harmful", "cats": ["P3"]}
        | ({"base_id": str(i - 1)} if i % 2 else {})
        for i in range(200)
    ]
    prompts, _, _ = read(Source(None, write(tmp_path / "a.jsonl", *rows)))
    split = pool.split_groups(prompts, 0.3, 0)
    assert all(a.split == b.split for a, b in zip(split[::2], split[1::2], strict=True))
    assert prompts[1].base_id == prompts[0].id
    dev = sum(one.split == "dev" for one in split)
    assert 30 <= dev <= 90
    assert split == pool.split_groups(prompts, 0.3, 0) != pool.split_groups(prompts, 0.3, 1)
    every = [*split, *pool.wrapped(split, {"harmful": 1.5}, 0)]
    groups: dict[str, set] = {}
    for one in every:
        groups.setdefault(pool.group(one), set()).add(one.split)
    assert all(len(splits) == 1 for splits in groups.values())


def test_disguises_of_harmful_and_harmless_prompts():
    harmful = pool.split_groups(some(60), 0.5, 0)
    benign = pool.split_groups(some(60, "benign", meta={"answer": "x"}), 0.5, 0)
    made = pool.wrapped([*harmful, *benign], {"harmful": 2, "benign": 0.5}, 0)
    by_parent = {one.id: one for one in [*harmful, *benign]}
    for one in made:
        base = by_parent[one.parent_ids[0]]
        assert one.attack is not None and one.base_id == base.id
        wrapper = wrappers.by_id(one.attack.template_id)
        assert wrapper is not None and wrapper.around(base.text) == one.text
        assert wrapper.held_out == (base.split == "dev")
        assert one.kind == ("jailbreak" if base.kind == "harmful" else "borderline")
        assert one.id == prompt_id(one.text) and one.meta == base.meta
    assert sum(one.kind == "jailbreak" for one in made) == 120
    assert 15 <= sum(one.kind == "borderline" for one in made) <= 45
    assert pool.wrapped(made, {"jailbreak": 1, "borderline": 1}, 0) == []


MIX = {"harmful": 25, "jailbreak": 25, "benign": 30, "borderline": 20}


def test_the_mix_takes_its_shares_of_each_kind_and_of_what_is_held_out():
    every = pool.split_groups([one for kind in KINDS for one in some(60, kind)], 0.5, 0)
    kept, rejects = pool.mixed(every, 100, MIX, 0.2, 0)
    by_split = {
        split: [sum((one.kind, one.split) == (kind, split) for one in kept) for kind in KINDS]
        for split in ("train", "dev")
    }
    assert by_split == {"train": [20, 20, 24, 16], "dev": [5, 5, 6, 4]}
    assert len(rejects) == 140 and {one.reason for one in rejects} == {"not in the mix"}
    assert [one for one in every if one in kept] == kept
    assert {one.id for one in kept} != {one.id for one in pool.mixed(every, 100, MIX, 0.2, 1)[0]}
    assert len(pool.mixed(every, 1000, MIX, 0.5, 0)[0]) == 240


def test_what_a_kind_lacks_in_the_mix_the_others_give():
    every = [*some(60), *some(60, "jailbreak"), *some(3, "benign")]
    kept, _ = pool.mixed(every, 103, MIX, 0.0, 0)
    assert [sum(one.kind == kind for one in kept) for kind in KINDS] == [50, 50, 3, 0]


def test_a_limit_draws_of_every_kind_by_its_share():
    every = [*some(80), *some(15, "benign"), *some(5, "borderline")]
    for limit in (20, 40):
        kept = pool.drawn(every, limit, 0)
        counts = [sum(one.kind == kind for one in kept) for kind in KINDS]
        assert counts == [limit * 0.8, 0, limit * 0.15, limit * 0.05]
        assert [one for one in every if one in kept] == kept
    assert {one.kind for one in pool.drawn(every, 3, 0)} == {"harmful", "benign", "borderline"}
    smaller = {one.id for one in pool.drawn(every, 13, 0)}
    assert smaller < {one.id for one in pool.drawn(every, 14, 0)} and len(smaller) == 13
    assert smaller != {one.id for one in pool.drawn(every, 13, 1)}
    shuffled = pool.drawn(every[::-1], 13, 0)
    assert {one.id for one in shuffled} == smaller  # by the prompts, not by their order
    assert pool.drawn(every, 1000, 0) == every


def test_near_duplicates_of_one_kind_go():
    a, b = "one two three four five six seven eight nine ten", " eleven twelve thirteen"
    texts = [a + b, a + b + " x", "something else entirely here"]
    made = some(3)
    prompts = [p.model_copy(update={"text": t}) for p, t in zip(made, texts, strict=True)]
    kept, rejects = pool.unduplicated(prompts, 0.8)
    assert [one.id for one in kept] == [made[0].id, made[2].id]
    assert rejects[0].reason == f"near duplicate: of {made[0].id}"
    assert pool.unduplicated(prompts, 1.0) == (prompts, [])
    twins = [prompts[0], prompts[1].model_copy(update={"kind": "borderline"})]
    assert pool.unduplicated(twins, 0.8) == (twins, [])


def test_one_hit_drops_the_group_and_is_reported():
    prompts = pool.split_groups(some(6), 0.0, 0)
    prompts += pool.wrapped(prompts, {"harmful": 1}, 0)
    evaluation = {"a": ["nothing like it"], "b": [prompts[2].text.upper(), "x"]}
    kept, rejects, report = pool.decontaminated(prompts, evaluation, ngram=0, tfidf=1)
    assert {pool.group(prompts[2])} == {pool.group(p) for p in prompts if p not in kept}
    assert len(rejects) == 2 and len(kept) == 10
    assert rejects[0].reason == "contaminated: exact hit in row 1 of b"
    assert report["a"]["hits"] == {"exact": 0, "ngram": 0, "tfidf": 0, "embedding": 0}
    assert report["b"]["hits"]["exact"] == 1 and report["b"]["texts"] == 2
    assert report["b"]["list"][0]["id"] == prompts[2].id
    again = pool.decontaminated(kept, evaluation, ngram=8, tfidf=1)[2]
    assert all(sum(one["hits"].values()) == 0 for one in again.values())


def test_evaluation_sets_are_read_whole(tmp_path: Path):
    texts, about = pool.texts("quickstart:held_out", COLUMNS, "train")
    assert len(texts) == about.rows == 60
    file = write(tmp_path / "e.jsonl", {"prompt": "a"}, {"name": "b"})
    with pytest.raises(ValueError, match=r"e\.jsonl:2: no prompt: looked for prompt, question"):
        pool.texts(file, COLUMNS, "train")


def test_a_public_set_is_labelled_by_its_own_names():
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "star1.jsonl"
    if not path.is_file():
        pytest.skip("needs star1.jsonl beside the checkout")
    prompts, rejects, _ = read(Source("harmful", str(path)))
    assert len(prompts) + len(rejects) == 1000 and len(prompts) >= 990
    assert all(one.categories and one.label_conf == 1.0 for one in prompts)
