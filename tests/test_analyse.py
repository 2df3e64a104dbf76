"""The analyse stage on the tiny model: what it writes, that it goes on, what settings change."""

import json
from pathlib import Path

import pytest
import tiny

from saro_jax import analyse, records
from saro_jax.analysis import parts, results, table
from saro_jax.config import AnalyseConfig, Config
from saro_jax.evaluation.results import Step, Transcript, write_transcripts

SMALL = {"prompts": 0, "per_group": 12, "tsne_seeds": 1, "permutations": 20, "row_length": 512}
WORDS = ("garden", "river", "engine", "window", "letter", "market", "bridge", "pencil")


def texts(kind: str, count: int = 14) -> list[dict]:
    verbs = {"harmful": "break", "benign": "open", "borderline": "kill"}
    pairs = [(a, b) for a in WORDS for b in WORDS]
    return [{"prompt": f"{verbs[kind]} the {a} {b}"} for a, b in pairs[:count]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for kind in ("harmful", "benign", "borderline"):
        tiny.write_rows(folder / f"{kind}.jsonl", texts(kind))
    return folder


def prompts(data: Path, *kinds: str) -> list[str]:
    return [f"{kind}={data}/{kind}.jsonl" for kind in kinds or ("harmful", "benign", "borderline")]


def config(seed: int = 0, dtype: str = "float32", **section) -> Config:
    return Config.model_validate(
        {
            "model": {"dtype": dtype},
            "data": {"train": "none"},
            "analyse": SMALL | section,
            "seed": seed,
        }
    )


def models() -> dict[str, str]:
    return {"base": str(tiny.folder() / "model")}


def test_prompts_are_compared_drawn_and_probed(data: Path, tmp_path: Path):
    manifest = analyse.run(config(), models(), tmp_path, prompts=prompts(data))
    found = results.read(tmp_path)
    assert found.models == ("base",)
    assert found.groups == dict.fromkeys(
        ("harmful", "jailbreak", "benign", "borderline", "wrapped"), 12
    )
    layers = tiny.ARCH.num_layers + 1
    assert len(found.overlap) == 10 * layers
    assert {one.layer for one in found.overlap} == set(range(layers))
    assert {(one.method, one.layer) for one in found.maps} == {
        (method, layer) for method in ("pca", "tsne") for layer in (1, 2)
    }
    assert all(len(one.points) == 60 for one in found.maps)
    assert {one.test for one in found.probes} == {
        "harmful|benign", "jailbreak|borderline", "jailbreak|wrapped", "harmful|borderline",
    }  # fmt: skip
    assert manifest["outputs"].keys() == {"analysis.json", "rejects/prompts.jsonl"}
    assert "harmful / benign" in table.summary(found, manifest, tmp_path)
    # Nothing is computed again; without manifest and document the journal has it all.
    before = (tmp_path / "analysis.json").read_bytes()
    assert analyse.run(config(), models(), tmp_path, prompts=prompts(data)) == manifest
    (tmp_path / "analysis.json").unlink()
    again = analyse.run(config(), models(), tmp_path, prompts=prompts(data))
    assert (tmp_path / "analysis.json").read_bytes() == before
    assert records.comparable(again) == records.comparable(manifest)


def test_the_journal_spares_what_is_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    two = {"base": models()["base"], "other": models()["base"]}
    real = parts.of_prompts

    def once(config, model, *rest):
        if model.name == "other":
            raise KeyboardInterrupt
        return real(config, model, *rest)

    monkeypatch.setattr(parts, "of_prompts", once)
    with pytest.raises(KeyboardInterrupt):
        analyse.run(config(), two, tmp_path, prompts=prompts(data))
    assert not (tmp_path / "analysis.json").exists()

    def rest(config, model, *rest):
        assert model.name == "other"
        return real(config, model, *rest)

    monkeypatch.setattr(parts, "of_prompts", rest)
    analyse.run(config(), two, tmp_path, prompts=prompts(data))
    found = results.read(tmp_path)
    by = {name: [o.c2st for o in found.overlap if o.model == name] for name in two}
    assert by["base"] == by["other"]


CHANGES = {
    "per_group": 11,
    "jailbreaks": 0.0,
    "wrapped": 0.0,
    "layer_step": 2,
    "permutations": 21,
    "tsne_seeds": 0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_results(data: Path, tmp_path: Path, name: str):
    def compute(folder: str, **section) -> dict:
        analyse.run(config(**section), models(), tmp_path / folder, prompts=prompts(data))
        found = json.loads((tmp_path / folder / "analysis.json").read_text())
        return {key: value for key, value in found.items() if key != "provenance"}

    assert compute("a") != compute("b", **{name: CHANGES[name]})


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": "bfloat16"}])
def test_seed_and_dtype_change_the_results(data: Path, tmp_path: Path, change: dict):
    plain = config(layer_step=2, tsne_seeds=0)
    changed = config(layer_step=2, tsne_seeds=0, **change)
    for name, one in (("a", plain), ("b", changed)):
        analyse.run(one, models(), tmp_path / name, prompts=prompts(data, "harmful", "benign"))
    assert results.read(tmp_path / "a").overlap != results.read(tmp_path / "b").overlap


def test_the_row_length_bounds_the_texts(data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="does not fit a row of 64"):
        analyse.run(config(row_length=64), models(), tmp_path, prompts=prompts(data))


def test_the_perturbations_are_of_every_setting():
    tested_below = {"row_length", "steps", "pairs", *GENERATES}
    assert CHANGES.keys() | tested_below == AnalyseConfig.model_fields.keys()


def transcript(i: int, kind: str, steps: int) -> Transcript:
    texts = [f"Step {n} of {kind} number {i}." for n in range(steps)]
    reasoning = "\n\n".join(texts)
    return Transcript(
        id=f"{kind}{i}",
        base_id=f"{kind}{i}",
        benchmark="b",
        view="auto",
        prompt=f"{kind} request {i}",
        model="base",
        kind=kind,  # type: ignore[arg-type]
        response=f"<think>\n{reasoning}\n</think>\n\nno",
        reasoning=reasoning,
        answer="no",
        status="ok",
        finish="eos",
        steps=tuple(Step(text=text, kind="plan") for text in texts),
        tokens=1,
        reasoning_tokens=1,
        answer_tokens=0,
        outcome="refused",
    )


def test_probes_after_each_step_of_transcripts(tmp_path: Path):
    made = [
        transcript(i, kind, 1 + i % 2) for kind in ("harmful", "benign", "jailbreak", "borderline")
        for i in range(12)
    ]  # fmt: skip
    made.append(transcript(99, "harmful", 0))
    write_transcripts(tmp_path / "evaluation", made)
    out = tmp_path / "out"
    manifest = analyse.run(config(), models(), out, transcripts=tmp_path / "evaluation")
    found = results.read(out).probes
    counts = {one.position: one.n for one in found if one.test == "harmful|benign"}
    assert counts == {"prompt": 24, "step 1": 24, "step 2": 12, "end": 24}
    assert {one.test for one in found} >= {"jailbreak|borderline"}
    assert manifest["drop_reasons"] == {"no reasoning steps": 1}
    one = tmp_path / "one"
    analyse.run(config(steps=1), models(), one, transcripts=tmp_path / "evaluation")
    assert {o.position for o in results.read(one).probes} == {"prompt", "step 1", "end"}


def test_pairs_are_scored_and_their_reasoning_is_weighed(tmp_path: Path):
    rows = [
        {
            "id": f"p{i}",
            "kind": "OP1",
            "prompt": f"lock {i}",
            "chosen": f"<think>\nthey would harm {i}\n</think>\n\nno",
            "rejected": f"<think>\nfine {i}\n</think>\n\nyes, take {i}",
        }
        for i in range(6)
    ]
    source = str(tiny.write_rows(tmp_path / "pairs.jsonl", rows))
    other = tiny.write_model(tmp_path / "model", seed=1)
    two = models() | {"other": str(other)}
    analyse.run(config(), two, tmp_path / "a", pairs=source)
    found = results.read(tmp_path / "a")
    assert {(one.model, one.kind, one.n) for one in found.margins} == {
        (model, kind, 6) for model in two for kind in ("all", "OP1")
    }
    by = {one.model: one for one in found.margins if one.kind == "all"}
    assert by["base"].margin == 0 and by["other"].margin != 0
    assert len(found.likelihood) == 2 * 7
    analyse.run(config(pairs=4), two, tmp_path / "b", pairs=source)
    assert {one.n for one in results.read(tmp_path / "b").margins} == {4}
    rows.append({"id": "p9", "prompt": "a", "chosen": "b"})
    with pytest.raises(ValueError, match=r"pairs.jsonl:7: "):
        analyse.run(
            config(),
            two,
            tmp_path / "c",
            pairs=str(tiny.write_rows(tmp_path / "pairs.jsonl", rows)),
        )


GENERATES = {
    "prompts": 3,
    "depth": "0:2",
    "max_new_tokens": 5,
    "tries": 2,
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def attacked(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run that generates, and its prompts and transcripts."""
    folder = tmp_path_factory.mktemp("attacked")
    made = [transcript(i, "harmful", 2) for i in range(5)]
    made = [
        one.model_copy(
            update={"steps": (one.steps[0], one.steps[1].model_copy(update={"kind": "reflect"}))}
        )
        for one in made
    ]
    write_transcripts(folder / "evaluation", made)
    given = {"prompts": prompts(data, "harmful", "benign"), "transcripts": folder / "evaluation"}
    settings = {"prompts": 2, "depth": "0:3", "max_new_tokens": 4, "batch_size": 4}
    settings |= {"jailbreaks": 0, "wrapped": 0, "tsne_seeds": 0, "layer_step": 2, "steps": 0}
    analyse.run(config(**settings), models(), folder / "out", **given)
    return results.read(folder / "out"), settings, given


def test_attacks_and_tampering_on_the_model(attacked):
    found, *_ = attacked
    assert [(one.k, one.n) for one in found.depth] == [(0, 2), (3, 2)]


def test_tampered_responses_are_compared_or_left_out(attacked, tmp_path: Path):
    # The tiny model thinks without end, or closes its thought where it is made to.
    _, settings, given = attacked
    tests = ("delete", "ban", "swap", "inject")
    asked = {f"{test}:b.auto:harmful{i}" for test in tests for i in range(5)}
    manifest = analyse.run(config(**settings), models(), tmp_path / "a", **given)
    lines = (tmp_path / "a" / "rejects" / "prompts.jsonl").read_text().splitlines()
    left_out = {one["id"] for one in map(json.loads, lines) if ":" in one["id"]}
    counted = sum(one.n for one in results.read(tmp_path / "a").authenticity)
    assert left_out <= asked and len(left_out) + counted == 2 * len(tests)
    assert manifest["drop_reasons"]["no answer"] == len(left_out)


@pytest.mark.parametrize("name", ["prompts", "depth"])
def test_settings_of_what_generates(attacked, tmp_path: Path, name: str):
    found, settings, given = attacked
    analyse.run(config(**settings | {name: GENERATES[name]}), models(), tmp_path, **given)
    assert results.read(tmp_path).depth != found.depth


def test_settings_that_reach_the_generator(attacked, tmp_path: Path, monkeypatch):
    _, settings, given = attacked
    told = {}

    class Told(parts.Local):
        def __init__(self, *arguments, slots: int, **options):
            told["batch_size"] = slots
            super().__init__(*arguments, slots=slots, **options)

        def generate(self, requests):
            asked = list(requests)
            told["max_new_tokens"] = asked[0].sampler.max_new_tokens
            return super().generate(asked)

    real = parts.reflections.continued

    def continued(*arguments, tries: int, **options):
        told["tries"] = tries
        return real(*arguments, tries=tries, **options)

    monkeypatch.setattr(parts, "Local", Told)
    monkeypatch.setattr(parts.reflections, "continued", continued)
    changes = {name: GENERATES[name] for name in ("max_new_tokens", "tries", "batch_size")}
    analyse.run(config(**settings | changes), models(), tmp_path, **given)
    assert told == changes


def test_a_depth_that_is_none_is_refused(data: Path, tmp_path: Path):
    for text in ("", "a", "1:1", "0:-1"):
        with pytest.raises(ValueError, match=r"analyse.depth=.*: expected different counts"):
            analyse.run(config(depth=text), models(), tmp_path, prompts=prompts(data))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts=harmful=HERE/harmful.jsonl"], "nothing"),
        ([], "nothing to analyse"),
        (["--model=base"], "--model=base: expected NAME=PATH"),
        (["--model=base=x"], "--model=base=x: the name 'base' is given twice"),
        (["--transcripts=HERE"], "none of the models base; there are none"),
        (["--run=a=HERE"], "metrics.jsonl: cannot be read"),
        (["--prompts=HERE/benign.jsonl"], "benign.jsonl: no kind: got None, expected harmful or"),
        (["--prompts=harm=HERE/harmful.jsonl"], "expected harmful or jailbreak or"),
        (["--prompts=harmful=HERE/few.jsonl", "--prompts=benign=HERE/benign.jsonl"], "3 prompts"),
    ],
)
def test_wrong_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], said: str
):
    tiny.write_rows(data / "few.jsonl", texts("harmful", 3))
    given = [one.replace("HERE", str(data)) for one in arguments]
    if said == "nothing":
        given, said = [*given, "--analyse.jailbreaks=0"], "two groups are needed, found"
    base = [f"--model=base={models()['base']}", f"--out={tmp_path / 'out'}"]
    assert analyse.main([*base, *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
