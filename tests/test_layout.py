"""Holds the direction of dependency: a file imports only from rooms below its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import saro_jax

PACKAGE = Path(saro_jax.__file__).resolve().parent

# From top to bottom. Rooms on one line are neighbours, which do not import each other either.
ORDER = (
    ("pipeline",),
    ("train",),
    ("synthesize", "sample", "judge", "pairs"),
    ("evaluate", "analyse", "report", "score", "export", "compile_check", "lm_eval"),
    ("reporting",),
    ("analysis",),
    ("evaluation",),
    ("pairing",),
    ("judging",),
    ("training",),
    ("generation",),
    ("objectives",),
    ("data",),
    ("models",),
    ("parallel",),
    ("text",),
    ("records",),
    ("config",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
STAGES = {room for rooms in ORDER[1:4] for room in rooms}

# The one file that may import torch, and only inside a function: to verify an export.
TORCH_FILE = Path("models/huggingface.py")


def imports_of(source: str, file: Path) -> list[tuple[str, int, bool]]:
    """(dotted module, line, inside a function) of every import; relative ones are resolved."""
    found: list[tuple[str, int, bool]] = []
    package = ["saro_jax", *file.parts[:-1]]

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # Only `from saro_jax import room` names rooms after the word import.
            if module == "saro_jax":
                names = [f"saro_jax.{alias.name}" for alias in node.names]
            else:
                names = [module]
            found.extend((name, node.lineno, lazy) for name in names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def violations(source: str, file: Path) -> list[str]:
    """What is wrong with the imports of `file`, a path relative to the package."""
    wrong: list[str] = []
    room = file.parts[0].removesuffix(".py")
    if room != "__init__" and room not in RANK:
        return [f"{file}: the room {room!r} is not in the order of tests/test_layout.py"]
    for module, line, lazy in imports_of(source, file):
        where = f"{file}:{line}"
        parts = module.split(".")
        if parts[0] == "torch" and not (file == TORCH_FILE and lazy):
            wrong.append(f"{where}: imports torch; only a function of {TORCH_FILE} may")
        if parts[0] != "saro_jax" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        target = parts[1]
        if room == "__init__":
            wrong.append(f"{where}: the package's __init__ imports {module}")
        elif target not in RANK:
            wrong.append(f"{where}: imports {module}, which is no room")
        elif target in STAGES | {"pipeline"} and room != "pipeline":
            wrong.append(f"{where}: imports the stage {target}; only pipeline may")
        elif target != room and RANK[target] <= RANK[room]:
            wrong.append(f"{where}: imports {module}, which is not below {room}")
    return wrong


def files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", files(), ids=str)
def test_imports_go_down(file: Path):
    assert violations((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", files(), ids=str)
def test_first_line_says_what_the_file_owns(file: Path):
    source = (PACKAGE / file).read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/rows.py", "from saro_jax.training import loop"),
        ("data/rows.py", "import saro_jax.training.loop as loop"),
        ("data/rows.py", "from saro_jax import training"),
        ("data/rows.py", "from ..training import loop"),
        ("data/rows.py", "from .. import training"),
        ("data/rows.py", "def read():\n    from saro_jax.training import loop"),
        ("judge.py", "from saro_jax import sample"),
        ("judge.py", "from saro_jax import train"),
        ("train.py", "import saro_jax.pairs"),
        ("train.py", "import saro_jax.pipeline"),
        ("text/chat.py", "from saro_jax.models import decoder"),
        ("config/tree.py", "from saro_jax import records"),
        ("config/tree.py", "from saro_jax import no_such_room"),
        ("utils.py", ""),
        ("__init__.py", "from saro_jax import config"),
        ("models/decoder.py", "import torch"),
        ("models/huggingface.py", "import torch.nn"),
        ("models/decoder.py", "def check():\n    from torch import nn"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str):
    assert len(violations(source, Path(file))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipeline.py", "from saro_jax import train, pairs\nimport saro_jax.training.loop"),
        ("data/rows.py", "from saro_jax.models import decoder\nfrom saro_jax import config"),
        ("data/rows.py", "from . import tokenise\nfrom ..text import chat"),
        ("config/tree.py", "import saro_jax\nfrom saro_jax import __version__"),
        ("records/manifest.py", "from saro_jax import config"),
        ("models/huggingface.py", "def verify():\n    import torch"),
        ("models/decoder.py", "import torchless"),
    ],
)
def test_a_right_import_passes(file: str, source: str):
    assert violations(source, Path(file)) == []


def test_importing_the_config_loads_no_array_library():
    code = (
        "import sys, saro_jax, saro_jax.config\n"
        "print([m for m in ('jax', 'flax', 'transformers', 'torch', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
