"""Owns the records of a source: files, folders, packaged rows and the hub, each with its place."""

import csv
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saro_jax.records import opened

EXTENSIONS = (".jsonl", ".jsonl.zst", ".json", ".parquet", ".csv")
# What stages write beside their rows.
NOT_ROWS = re.compile(r"(manifest|rejects)(\W.*)?")
QUICKSTART = Path(__file__).parent / "quickstart"
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]+))?")


def raw_records(source: str, split: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where, record) of each record of one source; a record that is a string says what is wrong.

    A source is a .jsonl (or .jsonl.zst), .json, .parquet or .csv file, a folder of such files
    (those named after the split if there are any, else all but manifests and rejects),
    "quickstart:NAME" of the package, or a hub id, "id" or "id:config". ValueError, in one line,
    where it cannot be read.
    """
    if source.startswith("quickstart:"):
        name = source.removeprefix("quickstart:")
        path = QUICKSTART / f"{name}.jsonl"
        if not path.is_file():
            names = [file.stem for file in QUICKSTART.glob("*.jsonl")]
            raise ValueError(f"{source}: no such packaged rows{_nearest(name, names)}")
        yield from _jsonl(path)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        for file in _folder_files(path, split):
            yield from _file(file)
    elif path.exists():
        yield from _file(path)
    elif _looks_local(source, path):
        names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"{source}: no such file or folder{_nearest(path.name, names)}")
    else:
        yield from _hub(source, split)


def _looks_local(source: str, path: Path) -> bool:
    top = path.parts[0] if path.parts else "."
    return (
        path.name.endswith(EXTENSIONS)
        or source.startswith((".", "/", "~"))
        or not HUB_ID.fullmatch(source)
        or (len(path.parts) > 1 and Path(top).is_dir())
    )


def _folder_files(folder: Path, split: str) -> list[Path]:
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.name.endswith(EXTENSIONS) and file.is_file() and not NOT_ROWS.fullmatch(file.stem)
    ]
    if not files:
        raise ValueError(f"{folder}: no rows: no {', '.join(EXTENSIONS)} file in the folder")
    named = [file for file in files if re.fullmatch(rf"{re.escape(split)}(\W.*|_.*)?", file.stem)]
    return named or files


def _file(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    if path.name.endswith(".jsonl.zst"):
        yield from _jsonl(path)
        return
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: unknown extension {path.suffix!r}, allowed: {', '.join(EXTENSIONS)}"
        )
    yield from readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                yield where, _as_record(json.loads(text))
            except UnicodeDecodeError as error:
                yield where, f"not UTF-8: {error.reason} at byte {error.start}"
            except (ValueError, RecursionError) as error:
                yield where, f"not JSON: {error}"


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """A list of objects, counted from 1, or JSON lines under another name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            yield from _jsonl(path)
            return
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, record in enumerate(records, 1):
        yield f"{path}:{number}", _as_record(record)


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not parquet: {str(error).splitlines()[0]}") from error


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Cells are strings, an empty cell a missing one; the line is the one where the row begins."""
    csv.field_size_limit(2**27)  # the default refuses long reasonings
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    yield (
                        f"{path}:{line}",
                        f"wrong cells: {len(cells)}, the header has {len(header)}",
                    )
                elif cells:
                    record = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
                    yield f"{path}:{line}", record
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from error


def _hub(source: str, split: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import datasets

    match = HUB_ID.fullmatch(source)
    assert match is not None, source
    try:
        dataset = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # the hub's errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source}: no such file or folder, and not loaded from the hub (split {split!r}): "
            f"{reason}"
        ) from error
    for number, record in enumerate(dataset, 1):
        yield f"{source}/{split}:{number}", dict(record)


def _as_record(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return value
    return f"not an object: {type(value).__name__}"


def _nearest(name: str, names: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, names, 1)
    return f", did you mean {match[0]!r}?" if match else ""
