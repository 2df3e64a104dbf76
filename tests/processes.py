"""Owns the start of several real processes on one machine, and what comes back of them."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# A training process that skips the comparison with transformers and notes what it lays out.
TRAIN = """
import json, os, sys
from saro_jax import train
from saro_jax.data import packing

seen, lay_out = set(), packing.lay_out

def noted(item, index, layout):
    seen.add(item.id)
    return lay_out(item, index, layout)

packing.lay_out = noted
train.huggingface.logits_match = lambda *_: None
code = train.main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(sorted(seen)))
sys.exit(code)
"""


@dataclass
class Ended:
    """One process: how it ended, after how long, and what it printed."""

    code: int
    out: str


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


class Processes:
    """`count` processes of one run with `devices` devices each; a resource: all end with it."""

    def __init__(self, code: str, count: int, devices: int, *arguments: str, notes: Path):
        port = free_port()
        joined = (f"--coordinator=127.0.0.1:{port}", f"--processes={count}")
        self._started, self._files = [], []
        for i in range(count):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OMP_NUM_THREADS": "1",
            }
            notes.mkdir(parents=True, exist_ok=True)
            self._files.append(open(notes / f"{i}.log", "w+"))  # noqa: SIM115
            mine = (*joined, f"--process={i}", "--join-timeout=120") if count > 1 else ()
            command = [sys.executable, "-c", code, str(notes / f"{i}.json"), *arguments, *mine]
            self._started.append(
                subprocess.Popen(
                    command, env=environment, stdout=self._files[i], stderr=subprocess.STDOUT
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for file in self._files:
            file.close()

    def send(self, process: int, number: int) -> None:
        self._started[process].send_signal(number)

    def alive(self) -> list[bool]:
        return [process.poll() is None for process in self._started]

    def output(self, process: int) -> str:
        self._files[process].flush()
        return Path(self._files[process].name).read_text()

    def wait(self, seconds: float) -> list[Ended]:
        """How they ended; those that have not by then are killed and have code -9."""
        end = time.monotonic() + seconds
        for process in self._started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [
            Ended(process.returncode, self.output(i)) for i, process in enumerate(self._started)
        ]
