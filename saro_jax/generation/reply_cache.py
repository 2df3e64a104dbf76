"""Owns the store of replies on disk, by content: what was paid for once is never asked again."""

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

VERSION = 1


class ReplyCache:
    """Replies by key in one sqlite file, which several processes may share.

    On return from `put` a reply survives the process, and the machine too.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"server.cache: {path}: {error}") from None
        try:
            found = self._run("PRAGMA user_version")[0][0]
            if found not in (0, VERSION):
                raise ValueError(f"{path}: replies of version {found}; this is {VERSION}")
            self._run("PRAGMA journal_mode=WAL")  # one flush to disk a reply instead of three
            self._run("PRAGMA synchronous=FULL")
            self._run("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, value TEXT)")
            self._run(f"PRAGMA user_version={VERSION}")
        except BaseException:
            self._db.close()
            raise

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply of a key, or None."""
        found = self._run("SELECT value FROM replies WHERE key = ?", (key,))
        return json.loads(found[0][0]) if found else None

    def put(self, key: str, value: dict[str, Any]) -> dict[str, Any]:
        """Keep a reply; returns the one that is kept, an earlier one where there was one."""
        text = json.dumps(value, ensure_ascii=True, allow_nan=False)
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, text))
        found = self.get(key)
        assert found is not None
        return found

    def close(self) -> None:
        """Let the file go."""
        with self._lock:
            self._db.close()

    def _run(self, command: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._lock, self._db:
                return self._db.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: {error}") from None
