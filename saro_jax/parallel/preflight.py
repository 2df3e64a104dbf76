"""Preflight: `python -m saro_jax.parallel.preflight [--config=RECIPE --stage=rw|srpo] [--out=DIR]`.

Run it on every host as the training will be run. It joins the processes and looks at what would go
wrong later: versions, the resolved config, clocks, the output folder (each host writes and reads a
probe in it; a bucket as gs://...), devices, the mesh, and a sum over all devices. Process 0 prints
one line a check, one for each process that differs, and every process ends with 0, or with 2 where
something differs.
"""

import importlib.metadata
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import saro_jax
from saro_jax import config as configuration
from saro_jax.config import Config, Flag
from saro_jax.parallel import distributed, launchers
from saro_jax.parallel import mesh as meshes

SKEW = 5.0  # seconds that a clock may be off
REDUCE = 300.0  # seconds that the sum over all devices may take, compilation included


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        configuration.CONFIG,
        Flag("stage", "which stage's config", "rw", choices=("rw", "srpo")),
        Flag("out", "output folder that is going to be used, or gs://BUCKET/FOLDER"),
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line(
            "python -m saro_jax.parallel.preflight", __doc__, argv, flags
        )
        launch = launchers.find(args.coordinator, args.processes, args.process)
        if launch is not None:
            distributed.join(launch, args.join_timeout)
        by = launch.by if launch is not None else "nothing launched it, a run of one process"
        hosts = ", ".join(distributed.name(i) for i in range(distributed.count()))
        _say(f"ok    processes: {distributed.count()} ({by}): {hosts}")
        config = _config(args.config, args.overrides, args.stage)
        wrong = before_jax(config, args.out)
        if not wrong:  # other versions might not even speak with each other
            if launch is not None:
                distributed.initialize(launch, args.join_timeout)
            wrong = with_jax(config)
    except ValueError as error:
        return distributed.refuse(error)
    if wrong:
        _say(f"{wrong} of the checks failed")
    return 2 if wrong else 0


def before_jax(config: Config | str, out: str | None) -> int:
    """The checks that use no device; how many of them failed."""
    wrong = _same("versions", ", ".join(f"{name} {version}" for name, version in _versions()))
    wrong += _same(
        "config", config if isinstance(config, str) else f"hash {configuration.digest(config)}"
    )
    if isinstance(config, str) and not wrong:
        raise distributed.Agreed(config)  # wrong in the same way everywhere
    wrong += _same("output folder", str(out))
    if wrong:
        return wrong
    distributed.barrier("clock")
    wrong += _clocks(distributed.gather("time", repr(time.time())))
    if out is not None:
        wrong += folder(out)
    return wrong


def with_jax(config: Config | str) -> int:
    """The checks of devices; how many failed."""
    local = jax.local_devices()
    wrong = _same("devices", f"{len(local)} x {local[0].device_kind} on each host")
    everyone = f"{jax.device_count()} in {jax.process_count()} processes"
    wrong += _same("devices in all", everyone)
    if jax.process_count() != distributed.count():
        wrong += _each("devices in all", f"JAX sees {jax.process_count()} processes")
    if wrong or isinstance(config, str):
        return wrong
    try:
        mesh = meshes.make_mesh(**dict(config.mesh))
    except ValueError as error:
        return _each("mesh", str(error))
    wrong = _each("mesh", "", ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    return wrong + all_reduce(mesh)


def folder(out: str) -> int:
    """Each process writes a probe into `out`, and reads those of all; how many checks failed."""
    place = epath.Path(out)
    probes = [place / f".preflight.{i}" for i in range(distributed.count())]

    def write() -> None:
        place.mkdir(parents=True, exist_ok=True)
        probes[distributed.index()].write_text(str(distributed.index()))

    def read() -> None:
        for i, probe in enumerate(probes):
            if not probe.exists() or probe.read_text() != str(i):
                raise OSError(f"what process {i} wrote is not there: not the same folder")

    wrong = _each(f"{out}: write", _tried(write))
    if not wrong:
        wrong += _each(f"{out}: read", _tried(read))
    distributed.barrier("probes")
    _tried(lambda: probes[distributed.index()].unlink())
    return wrong


def all_reduce(mesh: Mesh) -> int:
    """A sum in which every device has a part of its own; 1 where it is wrong, else 0."""
    number = mesh.devices.size
    timer = threading.Timer(REDUCE, _hangs)
    timer.daemon = True
    timer.start()
    start = time.monotonic()
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    parts = distributed.place(np.arange(number, dtype=np.float32), where)
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(parts)
    found, wanted = float(total), number * (number - 1) / 2
    timer.cancel()
    seconds = time.monotonic() - start
    problem = "" if found == wanted else f"{found} instead of {wanted}"
    return _each("sum over all devices", problem, f"{found:.0f} in {seconds:.1f} s")


def _hangs() -> None:
    distributed.leave(f"waited {REDUCE:.0f} s for a sum over all devices: do their links work?", 2)


def _config(recipe: str, overrides: list[str], stage: str) -> Config | str:
    """The resolved config; the error as text, for another host may have it right."""
    try:
        return configuration.load(recipe, overrides, stage)
    except ValueError as error:
        return str(error)


def _versions() -> list[tuple[str, str]]:
    found = [("python", platform.python_version()), ("saro_jax", saro_jax.__version__)]
    commit = configuration.provenance()["git_commit"]
    if commit is not None:
        found.append(("commit", str(commit)[:10]))
    for package in ("jax", "jaxlib", "libtpu", "orbax-checkpoint", "transformers"):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _clocks(texts: list[str]) -> int:
    times = [float(text) for text in texts]
    middle = float(np.median(times)) if len(times) > 2 else times[0]
    off = [i for i, at in enumerate(times) if abs(at - middle) > SKEW]
    for i in off:
        _say(f"wrong clock: {distributed.name(i)}: {times[i] - middle:+.1f} s off the others")
    if not off:
        _say(f"ok    clock: {max(times) - min(times):.2f} s apart")
    return len(off)


def _same(what: str, value: str) -> int:
    """Whether all have the value of most of them; one line for each that differs."""
    values = distributed.gather(what, value)
    usual = max(values, key=values.count)
    others = [i for i, other in enumerate(values) if other != usual]
    for i in others:
        _say(f"wrong {what}: {distributed.name(i)}: {values[i]}; the others: {usual}")
    if not others:
        _say(f"ok    {what}: {usual}")
    return len(others)


def _each(what: str, problem: str, fine: str = "") -> int:
    """Whether any process has a problem ("" = none); one line for each that has."""
    problems = distributed.gather(what, problem)
    bad = [i for i, text in enumerate(problems) if text]
    for i in bad:
        _say(f"wrong {what}: {distributed.name(i)}: {problems[i]}")
    if not bad:
        _say(f"ok    {what}{': ' if fine else ''}{fine}")
    return len(bad)


def _tried(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:  # whatever a file system or a bucket's client raises
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def _say(line: str) -> None:
    if distributed.writes():
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
