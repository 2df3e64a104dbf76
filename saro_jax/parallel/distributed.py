"""Several processes as one run: `start` joins them, the rest is what they do together.

Every function here may be called in a run of one process, where it costs nothing. In a run of
several, all of them run the same program and call the same functions in the same order.
"""

import atexit
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding

import saro_jax
from saro_jax.config import Flag
from saro_jax.parallel import hub, launchers
from saro_jax.parallel.hub import Member

T = TypeVar("T")

FLAGS = (
    Flag("coordinator", "HOST:PORT of process 0, where the launcher does not say it"),
    Flag("processes", "number of processes, where the launcher does not say it", parse=int),
    Flag("process", "number of this process, from 0, the same", parse=int),
    Flag("join-timeout", "seconds to wait for the other processes", 300.0, parse=float),
)
# How an error begins that the runtime raises in a collective operation whose partner has gone.
_RUNTIME = re.compile(r"[A-Z_]{5,}: ")


class Agreed(ValueError):
    """An error that every process raises at the same place; the first prints it."""


class Stopped(Exception):
    """A signal ended the run before its first step; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number


class Seen:
    """The signal that asked this process to stop, 0 = none, and whether it has been spoken of."""

    number = 0
    told = False


_hub: hub.Hub | None = None
_connection: hub.Connection | None = None
seen = Seen()


def start(flags: Namespace) -> None:
    """Join the processes of this run, before anything uses a device; nothing where there is one.

    `flags` has the values of `FLAGS`. What the launcher is, see launchers.py. A second call does
    nothing. Raises a one-line ValueError that names the address that does not answer, or the
    processes that did not come, or whose versions differ. From here on output goes to process 0's
    terminal only, SIGINT and SIGTERM are noted for `stopping`, and an error that ends one process
    ends all of them.
    """
    launch = launchers.find(flags.coordinator, flags.processes, flags.process)
    if launch is None or _connection is not None:
        return
    join(launch, flags.join_timeout)
    same("version of saro_jax", saro_jax.__version__)
    same("version of jax", jax.__version__)
    initialize(launch, flags.join_timeout)
    if index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note)
    sys.excepthook = _crash


def join(launch: launchers.Launch, timeout: float) -> None:
    """Meet the other processes, with no word to JAX yet."""
    global _hub, _connection
    host, port = launch.coordinator
    # jax's service has the port itself.
    address = (host, port + 1)
    if launch.process == 0:
        _free(port)
        _hub = hub.Hub(address, launch.processes, timeout)
        address = ("127.0.0.1", port + 1)
    me = Member(launch.process, socket.gethostname())
    _connection = hub.Connection(address, me, launch.processes, timeout)
    atexit.register(_finish)


def initialize(launch: launchers.Launch, timeout: float) -> None:
    """`jax.distributed` among the processes that have met."""
    # Orbax polls jax's own sync point with step numbers, scoring has none: the hub's serves all.
    jax.config.update("jax_enable_preemption_service", False)
    host, port = launch.coordinator
    try:
        jax.distributed.initialize(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            launch.processes,
            launch.process,
            local_device_ids=launch.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
        )
    except RuntimeError as error:
        raise ValueError(f"{name(launch.process)}: jax.distributed: {error}") from None


def _free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"process 0: port {port} is not free ({error.strerror}): another run on this machine? "
            "give another port in --coordinator"
        ) from None


# ---- what every process may ask ------------------------------------------------------------------


def several() -> bool:
    """Whether the run has more than one process."""
    return _connection is not None


def index() -> int:
    """Number of this process, 0 in a run of one."""
    return 0 if _connection is None else _connection.me.process


def count() -> int:
    """Number of processes."""
    return 1 if _connection is None else _connection.processes


def name(process: int) -> str:
    """'process 2 (its host)', for messages."""
    hosts = [socket.gethostname()] if _connection is None else _connection.hosts
    return str(Member(process, hosts[process]))


def writes() -> bool:
    """Whether this process writes what the run writes once: process 0."""
    return index() == 0


def gather(what: str, text: str) -> list[str]:
    """The texts of all processes, in their order."""
    return [text] if _connection is None else _connection.gather(what, text)


def barrier(what: str) -> None:
    """Return when every process is here."""
    gather(what, "")


def same(what: str, value: str) -> None:
    """Refuse, on all processes, what is not the same on all; names who differs."""
    if wrong := differing(what, gather(what, value)):
        raise Agreed(wrong)


def differing(what: str, values: list[str]) -> str:
    """Which processes have another value than process 0, in one line; "" where none has."""
    others = [i for i, value in enumerate(values) if value != values[0]]
    if not others:
        return ""
    found = "; ".join(f"{name(i)}: {values[i]}" for i in others)
    return f"{what} differs: {found}; {name(0)}: {values[0]}"


def first(what: str, make: Callable[[], T]) -> T:
    """What `make` returns on process 0, plain JSON data, for all; so with its ValueError."""
    if _connection is None:
        return make()
    text = ""
    if index() == 0:
        try:
            text = json.dumps([make()])
        except ValueError as error:
            text = json.dumps({"error": str(error)})
    found = json.loads(gather(what, text)[0])
    if isinstance(found, dict):
        raise Agreed(found["error"])
    return found[0]


def shared_folder(folder: Path) -> None:
    """Refuse an output folder that is not one and the same for all processes."""
    if _connection is None:
        return
    file = folder / ".shared"
    token = first("folder", lambda: _mark(file))
    try:
        found = file.read_text()
    except OSError:
        found = "not there"
    sees = gather("sees the folder", "yes" if found == token else "no")
    if writes():
        file.unlink(missing_ok=True)
    blind = [name(i) for i, answer in enumerate(sees) if answer != "yes"]
    if blind:
        raise Agreed(
            f"{folder}: not the folder that process 0 has on {', '.join(blind)}; the output folder "
            "has to be on a file system that all hosts share"
        )


def _mark(file: Path) -> str:
    token = f"{time.time_ns()} {os.getpid()}"
    file.write_text(token)
    return token


# ---- arrays --------------------------------------------------------------------------------------


def place(array: np.ndarray, where: Sharding) -> jax.Array:
    """A host array on the devices; of several processes each gives the part of its own devices."""
    if not several():
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda part: array[part])


def own_rows(where: Sharding, number: int) -> np.ndarray | None:
    """Which of `number` rows lie on this process's devices, bool [number]; None = all of them."""
    if not several():
        return None
    own = np.zeros(number, np.bool_)
    for part in where.addressable_devices_indices_map((number,)).values():
        own[part] = True
    return own


def broadcast(array: np.ndarray) -> np.ndarray:
    """Process 0's array, the shape and dtype of which all know."""
    if not several():
        return array
    from jax.experimental import multihost_utils

    return np.array(multihost_utils.broadcast_one_to_all(array))


# ---- how it ends ---------------------------------------------------------------------------------


def stopping(number: int = 0) -> int:
    """The signal that stops the run here, 0 = it goes on: a point where all processes agree.

    number: the signal that this process has seen, in a run of one; in a run of several it is noted
    from `start` on.
    """
    if _connection is None:
        return number
    if not _connection.stopping(seen.number):
        return 0
    if not seen.told:
        seen.told = True
        print(f"{_connection.stopped_by} got signal {_connection.stop_signal}: all stop")
    return _connection.stop_signal


def check_stop() -> None:
    """`stopping` where nothing has to be saved: raises `Stopped`. Nothing in a run of one."""
    if several() and (number := stopping()):
        raise Stopped(number)


@contextmanager
def unguarded() -> Iterator[None]:
    """A stretch without `stopping` in which a signal ends this process, and with it the others."""
    if not several():
        yield
        return
    before = {
        number: signal.signal(number, default)
        for number, default in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
        )
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse(error: ValueError) -> int:
    """Print a user's error, end every process with code 2; returns it in a run of one."""
    if _connection is None:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, Agreed):
        if writes():
            print(f"error: {error}", file=sys.stderr)
        _connection.bye()
        _exit(2)
    if _RUNTIME.match(str(error)):
        _await_news()
    print(f"error: {_connection.me}: {error}", file=sys.stderr)
    leave(f"ended: {error}", 2)
    return 2


def leave(why: str, code: int) -> int:
    """End every process, this one without a word; returns `code` in a run of one."""
    if _connection is not None:
        _connection.failed(why, code)
        _exit(code)
    return code


def _await_news() -> None:
    """Where a partner has gone, the hub says who it was, and ends this process."""
    time.sleep((hub.SILENT + 10) * hub.TICK)


def _note(number: int, _) -> None:
    seen.number = number
    if number == signal.SIGINT:  # a second one does not wait for the others
        signal.signal(number, signal.default_int_handler)


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _RUNTIME.match(str(error)):
        _await_news()
    traceback.print_exception(kind, error, trace)
    told = (str(error).splitlines() or [""])[0]
    leave(f"ended: {kind.__name__}: {told}", 1)


def _finish() -> None:
    if _connection is not None:
        _connection.bye()


def _exit(code: int) -> NoReturn:
    """Leave without jax's farewell, which waits for processes that will not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
