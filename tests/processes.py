"""Owns the start of several real processes on one machine, and what comes back of them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# A stage on the tiny model that notes of every block its rows and the items whose tokens it lays
# out, and is asked by SIGNAL (process:call:signal) to stop or die at a pass over a block of
# training (WHERE=loop) or scoring. COMPARE: exports are compared with transformers.
STAGE = """
import importlib, json, os, sys
from pathlib import Path
from saro_jax.data import packing
from saro_jax.models import huggingface
from saro_jax.parallel import distributed
from saro_jax.training import loop, scoring

notes, stage, *arguments = sys.argv[1:]
seen, calls, own, block, put = [], [], [], packing._block, loop.put
where = {"loop": loop, "scoring": scoring}[os.environ.get("WHERE", "loop")]
lay_out = packing.lay_out
wanted = [int(part) for part in os.environ.get("SIGNAL", "-1:0:0").split(":")]

def noted(item, index, layout):
    own.append(index)
    return lay_out(item, index, layout)

def packed(items, rows, *given):
    own.clear()  # one thread packs
    found = block(items, rows, *given)
    if given[-1] is None or given[-1].any():  # else the doctor counts rows and lays out none
        seen.append([rows, sorted(own)])
    return found

def counted(*given):
    if distributed.index() == wanted[0] and len(calls) == wanted[1]:
        os.kill(os.getpid(), wanted[2])
    calls.append(None)
    return put(*given)

packing.lay_out, packing._block, where.put = noted, packed, counted
if "COMPARE" not in os.environ:
    huggingface.logits_match = lambda *_: None
code = importlib.import_module(f"saro_jax.{stage}").main(arguments)
Path(notes).write_text(json.dumps(seen))
sys.exit(code)
"""


class Ended(NamedTuple):
    """One process: how it ended, and what it printed."""

    code: int
    output: str


def free_port() -> int:
    """A port that is free, and so is the next one."""
    while True:
        with socket.create_server(("", 0)) as one:
            port = one.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except OSError:
                continue
            return port


def run(
    code: str,
    count: int,
    *arguments: str,
    notes: Path,
    devices: int = 1,
    seconds: float = 240,
    extra: dict[int, tuple[str, ...]] | None = None,
    **environment: str,
) -> list[Ended]:
    """How `count` processes of one run with `devices` devices each end; -9 where they do not.

    Each gets notes/I.json, a file for what it wants to say, the arguments, those that `extra` has
    for it, and the flags that join it with the others.
    """
    return wait(
        start(code, count, *arguments, notes=notes, devices=devices, extra=extra, **environment),
        seconds,
    )


class Run(NamedTuple):
    """Processes that run, and their logs."""

    started: list[subprocess.Popen]
    logs: list[Path]


def start(
    code: str,
    count: int,
    *arguments: str,
    notes: Path,
    devices: int = 1,
    extra: dict[int, tuple[str, ...]] | None = None,
    **environment: str,
) -> Run:
    """As `run` does, without waiting for them."""
    notes.mkdir(parents=True, exist_ok=True)
    port = free_port()
    given = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    found = Run([], [])
    for i in range(count):
        joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"]
        own = (extra or {}).get(i, ())
        command = [sys.executable, "-c", code, str(notes / f"{i}.json"), *arguments, *own]
        found.logs.append(notes / f"{i}.log")
        with open(found.logs[i], "w") as log:
            found.started.append(
                subprocess.Popen(
                    [*command, *joined] if count > 1 else command,
                    env=given | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return found


def wait(run: Run, seconds: float = 240) -> list[Ended]:
    """How they end; those that have not by then are killed."""
    end = time.monotonic() + seconds
    for process in run.started:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in run.started:
                other.kill()
            process.wait()
    return [
        Ended(process.returncode, log.read_text())
        for process, log in zip(run.started, run.logs, strict=True)
    ]
