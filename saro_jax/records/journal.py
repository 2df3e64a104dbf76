"""The journal: finished work by id, which survives being killed at any byte."""

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from saro_jax.records.ids import to_json


class Journal:
    """Finished work by record id, on disk as soon as it is done.

    A line is the CRC of its JSON and the JSON, [id, value]; the first line holds the key, that is
    everything the values depend on. A torn last line, which a killed process leaves, is cut off;
    damage elsewhere is an error. Only one process at a time has a journal open.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.values = path, {}
        self._lock = threading.Lock()
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            _lock(self._file, path)
            self._load(dict(key))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file, and with it the lock, go."""
        self._file.close()

    def append(self, record_id: str, value: Any) -> None:
        """Keep a value of an id; on return it survives the process, and the machine too."""
        with self._lock:
            if record_id in self.values:
                raise ValueError(f"{self.path}: id {record_id!r} is done already")
            self._write([record_id, value])
            self.values[record_id] = json.loads(to_json(value))

    def _load(self, key: dict[str, Any]) -> None:
        self._file.seek(0)
        good, lines = 0, self._file.read().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            entry = _journal_entry(line)
            if entry is None:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path}:{number}: damaged; delete this line to do its work again"
                    )
                break
            if number == 1 and entry != ["", key]:
                raise ValueError(f"{self.path}:1: a journal of other work; move it away")
            if number > 1:
                self.values[entry[0]] = entry[1]
            good += len(line)
        self._file.truncate(good)
        if not good:
            self._write(["", key])

    def _write(self, entry: list[Any]) -> None:
        text = to_json(entry).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()
        os.fsync(self._file.fileno())


def _journal_entry(line: bytes) -> list[Any] | None:
    """[id, value] of a whole and undamaged line."""
    crc, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system; then nothing warns of a second process
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{path}: in use by another process") from None


def resume(
    journal: Journal,
    items: Mapping[str, Any],
    work: Callable[[str, Any], Any],
    concurrency: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`work(id, item)` of every id that the journal lacks; all values, in the order of the items.

    At most `concurrency` calls run at a time, in threads, and each result is in the journal before
    the next call starts in its place. An error of `work`, and an interrupt, are raised after the
    calls that run have ended and are kept. `progress` is told how many were done, first those of
    earlier runs.
    """
    todo = iter([record_id for record_id in items if record_id not in journal.values])
    if progress:
        progress(sum(record_id in journal.values for record_id in items))
    failed: BaseException | None = None
    interrupted = False
    running: dict[Future[Any], str] = {}

    def keep(done: Iterable[Future[Any]]) -> None:
        nonlocal failed
        for future in done:
            record_id = running.pop(future)
            if (error := future.exception()) is not None:
                failed = failed or error
                continue
            journal.append(record_id, future.result())
            if progress and not interrupted:
                progress(1)

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while failed is None and len(running) < concurrency:
                    record_id = next(todo, None)
                    if record_id is None:
                        break
                    running[pool.submit(work, record_id, items[record_id])] = record_id
                if not running:
                    break
                keep(wait(running, return_when=FIRST_COMPLETED).done)
        except BaseException:  # an interrupt: what was begun is paid for
            interrupted = True
            keep(wait(running).done)
            raise
    if failed is not None:
        raise failed
    return {record_id: journal.values[record_id] for record_id in items}
