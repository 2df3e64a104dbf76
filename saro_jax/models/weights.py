"""Weight files: safetensors read a few rows of a tensor, and written one tensor, at a time.

Plain file reads into a fresh array, not a memory map: the pages of a map count as memory of the
process for as long as it is open, and a numpy view cannot hold bfloat16 without ml_dtypes anyway.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
BLOCK = 2**22  # bytes that are read at a time


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: what the file says of it, and how to read it."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None  # None: only whole

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first, rows) of rows start..stop, `BLOCK` bytes of them at a time.

        A tensor that can only be read whole comes as one block.
        """
        if self.read_rows is None:
            yield 0, self.read()
            return
        row_bytes = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        step = max(1, BLOCK // row_bytes)
        for at in range(start, stop, step):
            yield at, self.read_rows(at, min(stop, at + step))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in the order of their names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = sorted(set(_json(index, "weight_map").values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{index}: {len(missing)} of {len(names)} files missing: {missing[0]}")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth"))
    found = f"; {others[0]} has to be converted to safetensors first" if others else ""
    raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json{found}")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder by its key, none of them read yet."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for key, tensor in read_file(file).items():
            if key in tensors:
                raise ValueError(f"{file}: {key!r} is also in {tensors[key].file.name}")
            tensors[key] = tensor
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = _json(index, "weight_map")
        wrong = [k for k in tensors.keys() | listed.keys() if k not in tensors or k not in listed]
        if wrong:
            where = "no file" if wrong[0] in listed else "the index does not list it"
            raise ValueError(
                f"{index}: {len(wrong)} keys differ from the files: {wrong[0]} ({where})"
            )
    return tensors


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
    max_shard_bytes: float = 5e9,
) -> None:
    """Write (key, shape, dtype, read) as safetensors files with an index where there are several.

    Tensors are read in the order given and held one at a time.
    """
    shards: list[list[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]] = [[]]
    size, total = 0, 0
    for entry in tensors:
        nbytes = math.prod(entry[1]) * entry[2].itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {key: name for key, *_ in shard}
        write_file(folder / name, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, renamed to `folder` at the end: it exists whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; give a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)  # mkdtemp's 0700 would stay on the result
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(file: Path, key: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a JSON object with {key!r}: {error}") from None


def read_file(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{file}: not a safetensors file, or truncated ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{file}: {key}: dtype {entry['dtype']} is not supported; "
                f"supported: {', '.join(_DTYPES)}"
            )
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: {key}: {end - start} bytes for {list(shape)} of {dtype}")
        if 8 + length + end > size:
            raise ValueError(
                f"{file}: truncated: {size} bytes, but {key} ends at {8 + length + end}; "
                "download it again"
            )
        read_rows = _reader(file, 8 + length + start, dtype, shape)
        tensors[key] = Tensor(file, dtype, shape, partial(read_rows, 0, None), read_rows)
    return tensors


def _reader(
    file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]
) -> Callable[[int, int | None], np.ndarray]:
    """A function that reads rows start..stop (None = to the end) of axis 0."""

    def read(start: int, stop: int | None) -> np.ndarray:
        found = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:]) if shape else ()
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = np.empty(math.prod(found) * dtype.itemsize, np.uint8)
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset + start * row_bytes)
            view, done = data.data, 0
            while done < len(data):  # one read returns at most 2 GiB
                got = stream.readinto(view[done:])
                if not got:
                    raise ValueError(f"{file}: ended while reading")
                done += got
        return data.view(dtype).reshape(found)

    return read


def write_file(
    file: Path, shard: list[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]
) -> None:
    """Write (key, shape, dtype, read) as one safetensors file."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"}
    }  # transformers refuses files without
    offset = 0
    for key, shape, dtype, _ in shard:
        end = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, shape, dtype, read in shard:
            data = read()
            assert data.shape == shape and data.dtype == dtype, (key, data.shape, data.dtype)
            stream.write(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data)
            del data
        stream.flush()
        os.fsync(stream.fileno())
