"""The store of replies: kept over processes and threads, the first reply of a key wins."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saro_jax.generation.reply_cache import ReplyCache


def test_it_keeps_the_first_reply(tmp_path: Path):
    file = tmp_path / "deep" / "replies.sqlite"
    one, other = ReplyCache(file), ReplyCache(file)  # two processes, say
    assert one.get("a") is None
    assert one.put("a", {"text": "\ud800 ü"}) == {"text": "\ud800 ü"}
    assert other.put("a", {"text": "later"}) == {"text": "\ud800 ü"}
    one.close()
    other.close()
    again = ReplyCache(file)
    assert again.get("a") == {"text": "\ud800 ü"}
    again.close()


def test_threads_share_it(tmp_path: Path):
    cache = ReplyCache(tmp_path / "replies.sqlite")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: cache.put(str(i % 5), {"i": i % 5}), range(40)))
    assert found == [{"i": i % 5} for i in range(40)]
    cache.close()


def test_other_files_are_refused(tmp_path: Path):
    db = sqlite3.connect(tmp_path / "new.sqlite")
    db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(ValueError, match=r"new.sqlite: replies of version 9; this is 1"):
        ReplyCache(tmp_path / "new.sqlite")
    with pytest.raises(ValueError, match=r"server.cache: .*: unable to open"):
        ReplyCache(tmp_path)
