"""Owns what this process gives back to the system of the memory of its host."""

import ctypes
import sys
from functools import cache

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 0.5  # seconds of a compilation that leaves enough behind


@cache
def trim_after_compiling() -> None:
    """From here on, after each compilation that took long, free memory goes back to the system.

    LLVM frees what it compiled with, but glibc keeps it, so that a process grows with each program
    (docs/log.md, 2026-11-28). Elsewhere than with glibc nothing happens.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    trim = getattr(library, "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
