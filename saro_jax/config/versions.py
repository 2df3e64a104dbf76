"""Owns provenance: versions and commit of the running code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import saro_jax


def provenance() -> dict[str, str | bool | None]:
    """Versions and commit of the running code, to be saved beside what it makes.

    `git_commit` and `git_dirty` (tracked files changed) are None outside a checkout.
    """
    found: dict[str, str | bool | None] = {
        "saro_jax": saro_jax.__version__,
        "python": platform.python_version(),
    }
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    status = _git("status", "--porcelain", "--untracked-files=no")
    found["git_commit"] = _git("rev-parse", "HEAD")
    found["git_dirty"] = None if found["git_commit"] is None or status is None else bool(status)
    return found


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    # An installed wheel may lie inside some other project's checkout: that commit is not ours.
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
