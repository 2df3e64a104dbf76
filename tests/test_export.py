"""Exports: a checkpoint's folder is the one training writes, and transformers agrees with it."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from saro_jax import export, train
from saro_jax.models import huggingface


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, both of them kept."""
    out = tmp_path_factory.mktemp("export") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.huggingface, "logits_match", lambda *_: None)
        assert train.main(tiny.arguments("rw", out, "--train.save_every=1")) == 0
    return out


def run(checkpoint, out, *arguments):
    assert export.main([f"--checkpoint={checkpoint}", f"--out={out}", *arguments]) == 0
    return out


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_newest_checkpoint_is_the_model_of_the_run_byte_by_byte(finished, tmp_path, capsys):
    out = run(finished, tmp_path / "a")
    assert capsys.readouterr().out == f"step 2 of {finished} is in {out}\n"
    theirs = {path.name: path.read_bytes() for path in (finished / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == theirs
    again = run(finished / "checkpoints", tmp_path / "b")
    assert weights(again) == weights(out)


def test_an_older_step_has_other_weights(finished, tmp_path):
    first = run(finished, tmp_path / "a", "--step=1")
    assert weights(first) != weights(finished / "model")
    assert weights(run(finished, tmp_path / "b", "--step=2")) == weights(finished / "model")


def test_bfloat16_is_the_float32_rounded(finished, tmp_path):
    out = run(finished, tmp_path / "a", "--dtype=bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    whole, half = (
        huggingface.load_params(folder, tiny.ARCH, jnp.float32)
        for folder in (finished / "model", out)
    )
    weight, rounded = (tree["model"]["embed_tokens"]["weight"] for tree in (whole, half))
    np.testing.assert_array_equal(rounded, weight.astype(jnp.bfloat16).astype(jnp.float32))


def test_the_keys_are_those_of_the_source(finished):
    source = load_file(tiny.folder() / "model" / "model.safetensors")
    exported = load_file(finished / "model" / "model.safetensors")
    assert {k: v.shape for k, v in source.items()} == {k: v.shape for k, v in exported.items()}


def test_transformers_agrees_with_the_export(finished):
    params = huggingface.load_params(finished / "model", tiny.ARCH, jnp.float32)
    if importlib.util.find_spec("torch") is None:
        with pytest.warns(UserWarning, match="not compared with transformers: torch is missing"):
            assert huggingface.logits_match(finished / "model", params, tiny.ARCH) is None
        return
    worst = huggingface.logits_match(finished / "model", params, tiny.ARCH)
    assert worst is not None and worst <= train.EXPORT_TOLERANCE


def test_an_export_that_transformers_reads_otherwise_is_not_named_model(tmp_path, capsys):
    for k, worst in enumerate((1e-3, float("nan"))):
        out = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.huggingface, "logits_match", lambda *_, worst=worst: worst)
            assert train.main(tiny.arguments("rw", out)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {out}/model.unchecked: transformers' logits differ by ")
        assert said.count("\n") == 1
        assert not (out / "model").exists()


def test_the_chat_template_of_the_run_goes_along(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ '<|endoftext|>' }}" + tiny.CHATML)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.huggingface, "logits_match", lambda *_: None)
        options = (f"--model.chat_template={template}", "--train.steps=1")
        assert train.main(tiny.arguments("rw", tmp_path / "run", *options)) == 0
    for folder in (tmp_path / "run" / "model", run(tmp_path / "run", tmp_path / "out")):
        assert (folder / "chat_template.jinja").read_text() == template.read_text()


def test_errors_are_one_line(finished, tmp_path, capsys):
    used = finished / "model"
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "config.yaml").write_text((finished / "config.yaml").read_text())
    for arguments, words in (
        (
            [f"--checkpoint={finished}", f"--out={tmp_path}/x", "--step=7"],
            "--step=7: not saved; there are 1, 2",
        ),
        (
            [f"--checkpoint={tmp_path}", f"--out={tmp_path}/x"],
            "not the output folder of a training",
        ),
        ([f"--checkpoint={finished}", f"--out={used}"], "not an empty folder"),
        ([f"--checkpoint={empty}", f"--out={tmp_path}/x"], "no complete checkpoint"),
        ([f"--checkpoint={finished}"], "--out: required"),
        ([f"--checkpoint={finished}", f"--out={tmp_path}/x", "--dtype=int8"], "--dtype=int8"),
        ([f"--checkpoint={finished}", f"--out={tmp_path}/x", "--srpo.beta=1"], "unknown option"),
    ):
        assert export.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said
    assert not (tmp_path / "x").exists()
