"""Shards: JSON lines, `.jsonl` or `.jsonl.zst`, in files that appear whole or not at all."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from saro_jax.records.schemas import Record, dump, parse

R = TypeVar("R", bound=Record)


@contextlib.contextmanager
def written(path: Path) -> Iterator[io.BufferedWriter]:
    """A file that appears whole, flushed to disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes lines to `.jsonl` or, compressed, `.jsonl.zst`; returns how many."""
    _check_suffix(path)
    count = 0
    with written(path) as file, _compressed(file, path) as target:
        for line in lines:
            target.write(line.encode() + b"\n")
            count += 1
    return count


def write(path: Path, records: Iterable[Record]) -> int:
    """Writes a shard, whole or not at all; ids must be unique. Returns how many records."""
    seen: set[str] = set()

    def lines() -> Iterator[str]:
        for record in records:
            if record.id in seen:
                raise ValueError(f"{path}: two records have the id {record.id!r}")
            seen.add(record.id)
            yield dump(record)

    return write_lines(path, lines())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file, which may be compressed as `.zst`."""
    with open(path, "rb") as file:
        yield io.BytesIO(_decompressed(path, file)) if path.suffix == ".zst" else file


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file:line, bytes) of each line of a shard that is not blank."""
    _check_suffix(path)
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def read(path: Path, cls: type[R]) -> list[R]:
    """All records of a shard.

    One-line ValueError with file:line and field for a record that is wrong or has an earlier id.
    """
    found: dict[str, str] = {}
    records = []
    for where, line in read_lines(path):
        record = parse(cls, line, where)
        if record.id in found:
            raise ValueError(
                f"{where}: id: {record.id!r} is given twice, first at {found[record.id]}"
            )
        found[record.id] = where
        records.append(record)
    return records


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    with written(path) as file:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        file.write(text.encode() + b"\n")


def _check_suffix(path: Path) -> None:
    if not re.search(r"\.jsonl(\.zst)?$", path.name):
        raise ValueError(f"{path}: a shard's name ends in .jsonl or .jsonl.zst")


def _compressed(file: io.BufferedWriter, path: Path) -> Any:
    if path.suffix != ".zst":
        return contextlib.nullcontext(file)
    import pyarrow

    # Not closed through pyarrow: the file is flushed to disk after the last frame.
    return pyarrow.CompressedOutputStream(pyarrow.PythonFile(_Unclosed(file), "w"), "zstd")


def _decompressed(path: Path, file: io.BufferedReader) -> bytes:
    import pyarrow

    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd") as stream:
            return stream.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not zstandard: {str(error).splitlines()[0]}") from None


class _Unclosed(io.RawIOBase):
    def __init__(self, file: io.BufferedWriter):
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return self.file.write(data)
