"""Ids and hashes: what says that two prompts, texts, values or files are the same."""

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any


def to_json(value: Any) -> str:
    """JSON in one line, keys in their order, as shards and journals have it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def normalised(text: str) -> str:
    """Text by which two prompts are the same: NFKC, case folded, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_id(text: str) -> str:
    """The id of a prompt: that of its normalised text, 16 hex digits."""
    return hashlib.sha1(normalised(text).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def content_id(*parts: Any) -> str:
    """An id that follows from the content: 16 hex digits."""
    return sha256(to_json(list(parts)))[:16]


def sha256(data: str | bytes) -> str:
    """The hash of text or bytes, 64 hex digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
