"""The reference store: a key for everything that changes a log-prob and for nothing else."""

import json
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import tiny

from saro_jax import train
from saro_jax.training import reference
from saro_jax.training.reference import ReferenceStore, model_key, row_key, tokenizer_key

PAIR = tiny.item(0, 4, 3, 2)


def test_the_key_of_a_pair_is_its_ids_and_masks():
    base = row_key("m", PAIR)
    assert base == row_key("m", replace(PAIR, id="x", where="y", kind="z", weight=9.0))
    assert base != row_key("n", PAIR)
    assert base != row_key("m", replace(PAIR, prefix=PAIR.prefix + 1))
    assert base != row_key("m", replace(PAIR, branches=PAIR.branches[::-1]))
    first, second = PAIR.branches
    for other in (
        replace(first, ids=first.ids + 1),
        replace(first, ids=first.ids[:2], scored=first.scored[:2], truncated=True),
        replace(first, scored=np.array([False, True, True])),
    ):
        assert base != row_key("m", replace(PAIR, branches=(other, second)))
    # A token that moves from the prefix into the branches leaves the text as it is, not the sums.
    moved = [
        replace(b, ids=np.concatenate([PAIR.prefix[-1:], b.ids]), scored=np.append(True, b.scored))
        for b in PAIR.branches
    ]
    assert base != row_key("m", replace(PAIR, prefix=PAIR.prefix[:-1], branches=tuple(moved)))


def test_the_key_of_a_model_is_all_of_its_parts(monkeypatch):
    base = model_key("weights", "float32 float32", "tokenizer", "shared")
    for other in (
        ("other", "float32 float32", "tokenizer", "shared"),
        ("weights", "float32 bfloat16", "tokenizer", "shared"),
        ("weights", "float32 float32", "other", "shared"),
        ("weights", "float32 float32", "tokenizer", "separate"),
    ):
        assert base != model_key(*other)
    monkeypatch.setattr(reference, "SCORING_VERSION", reference.SCORING_VERSION + 1)
    assert base != model_key("weights", "float32 float32", "tokenizer", "shared")


def test_the_key_of_a_tokenizer_is_its_rules_and_template():
    base = tokenizer_key(tiny.tokenizer())
    assert base == tokenizer_key(tiny.tokenizer())
    assert base != tokenizer_key(tiny.tokenizer(tiny.CHATML + " "))
    more = tiny.tokenizer()
    more.add_tokens(["new"])
    assert base != tokenizer_key(more)


def test_the_store_gives_back_the_very_floats(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    values[0, 0, :2] = -1e-7, -3e4
    store = ReferenceStore(tmp_path / "deep" / "er")
    store.put(zip("ab", values, strict=True))
    store.close()
    again = ReferenceStore(tmp_path / "deep" / "er")
    found = again.get(["a", "none", "b"], 2)
    again.close()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[[0, 2]], values)
    assert np.isnan(found[1]).all()


def test_rows_are_stored_all_or_none(tmp_path):
    store = ReferenceStore(tmp_path)

    def rows():
        yield "a", np.zeros((2, 4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put(rows())
    assert np.isnan(store.get(["a"], 2)).all()
    store.close()


# What a run finds in the store of a run before it.


class Runs:
    """SRPO runs of one step that stop once the reference is there, on one store."""

    def __init__(self, root, capsys):
        self.root, self.capsys, self.count = root, capsys, 0

    def __call__(self, *overrides, code=0):
        """(pairs found in the store, steps scored, what was said on standard error)."""
        self.count += 1
        out = self.root / f"run{self.count}"
        cache = f"--srpo.reference_cache={self.root / 'reference'}"
        assert train.main(tiny.arguments("srpo", out, cache, *overrides)) == code
        said = self.capsys.readouterr()
        lines = [line for line in said.out.splitlines() if line.startswith("reference: ")]
        found = int(lines[0].split()[1]) if lines else None
        steps = int(lines[-1].split()[1]) if len(lines) > 1 else 0
        return found, steps, said.err

    def stored(self):
        with sqlite3.connect(self.root / "reference" / "reference.sqlite") as db:
            rows = db.execute("select * from sums order by key").fetchall()
        db.close()
        return rows


@pytest.fixture
def runs(tmp_path, capsys, monkeypatch):
    def fit(**arguments):
        return arguments["state"], 0

    monkeypatch.setattr(train.loop, "fit", fit)
    monkeypatch.setattr(train, "_export", lambda *_: None)
    tiny.folder()
    return Runs(tmp_path, capsys)


def test_a_second_run_scores_nothing_and_other_options_do_not_matter(runs):
    assert runs()[:2] == (0, 2)
    for overrides in (
        (),
        ("--srpo.beta=0.5", "--srpo.loss=identity_po", "--optimizer.learning_rate=1", "--seed=3"),
        ("--srpo.label_smoothing=0.1", "--train.batch_rows=3", "--data.shuffle=false"),
        ("--train.epochs=3", "--train.steps=null", "--data.max_length=81"),
        ("--model.remat=full", "--data.row_length=128", "--train.micro_rows=1"),
    ):
        assert runs(*overrides) == (8, 0, ""), overrides


def test_what_changes_a_log_prob_is_scored_again(runs):
    root = tiny.folder()
    assert runs("--train.micro_rows=2")[:2] == (0, 2)
    template = runs.root / "template.jinja"
    template.write_text(tiny.CHATML.replace("{% for", "{{ '<|endoftext|>' }}{% for", 1))
    other = tiny.write_model(runs.root / "other", seed=5)
    copied = shutil.copytree(root / "model", runs.root / "copied")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    changed = [row | {"chosen": row["chosen"] + "!"} for row in tiny.PAIRS[:3]] + tiny.PAIRS[3:]
    rows = tiny.write_rows(runs.root / "changed.jsonl", changed)
    for found, overrides in (
        (0, ("--model.dtype=bfloat16",)),
        (0, ("--model.param_dtype=bfloat16",)),
        (0, ("--srpo.layout=separate",)),
        (0, (f"--model.chat_template={template}",)),
        (0, (f"--model.path={other}",)),
        (0, (f"--model.path={copied}",)),
        (5, (f"--data.train={rows}",)),
    ):
        assert runs("--train.micro_rows=2", *overrides)[0] == found, overrides


def test_scoring_again_gives_the_same_bits(runs):
    runs()
    before = runs.stored()
    (runs.root / "reference" / "reference.sqlite").unlink()
    runs()
    assert len(before) == 8 and runs.stored() == before


def test_a_stored_value_that_does_not_hold_is_an_error(runs):
    runs()
    file = runs.root / "reference" / "reference.sqlite"
    with sqlite3.connect(file) as db:
        for key, blob in db.execute("select key, logps from sums").fetchall():
            moved = np.frombuffer(blob, "<f4") + np.float32(1)
            db.execute("update sums set logps = ? where key = ?", (moved.tobytes(), key))
    db.close()
    *_, error = runs(code=2)
    assert error.count("\n") == 1 and error.startswith(f"error: {file}: ")
    assert "pairs.jsonl:" in error and "more than 0.0001 nats per token apart" in error
    # Without a look at what is stored, it is believed.
    assert runs("--srpo.recheck=0")[:2] == (8, 0)


def test_the_store_lies_in_the_users_cache_by_default(runs, monkeypatch):
    monkeypatch.setenv("SARO_JAX_CACHE", str(runs.root / "cache"))
    out = runs.root / "out"
    arguments = tiny.arguments("srpo", out, "--srpo.reference_cache=null")
    assert train.main(arguments) == 0
    assert (runs.root / "cache" / "reference" / "reference.sqlite").is_file()


def test_a_broken_run_leaves_what_it_had_scored(runs, monkeypatch):
    scored, calls = reference.score_items, []

    def breaks(*arguments, **options):
        calls.append(arguments)
        for k, result in enumerate(scored(*arguments, **options)):
            # The first call looks at what is stored, the others score a step each.
            if len(calls) == 3 and k == 1:
                raise ValueError("stopped")
            yield result

    monkeypatch.setattr(reference, "score_items", breaks)
    assert runs(code=2)[2] == "error: stopped\n"
    monkeypatch.setattr(reference, "score_items", scored)
    assert runs()[:2] == (4, 1)
