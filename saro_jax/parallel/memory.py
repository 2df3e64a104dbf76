"""Owns what this process gives back to the system of the memory of its host."""

import ctypes
from functools import cache

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 0.5  # seconds of a compilation that leaves enough behind


@cache
def trim_after_compiling() -> None:
    """From here on, after each compilation that took long, free memory goes back to the system.

    LLVM frees what it compiled with, but glibc keeps it: 0.5 GB of a training step's peak, and more
    with each program of generation. Elsewhere than with glibc nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
