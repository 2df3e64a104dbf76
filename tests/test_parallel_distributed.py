"""Several real processes: what they do together, how they stop, and how they learn of an end."""

import json
import os
import signal
from argparse import Namespace

import jax
import numpy as np
import processes
from jax.sharding import NamedSharding, PartitionSpec

from saro_jax.parallel import distributed
from saro_jax.parallel.hub import LOST

BEGIN = """
import json, os, sys
from argparse import Namespace
from pathlib import Path
import numpy as np
from saro_jax.parallel import distributed as d

flags = dict(argument[2:].split("=") for argument in sys.argv[-3:])
d.start(Namespace(coordinator=flags["coordinator"], processes=int(flags["processes"]),
                  process=int(flags["process"]), join_timeout=100.0))
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
notes, folder, *_ = sys.argv[1:]
me, said = d.index(), {}

def refused(call):
    try:
        call()
    except d.Agreed as error:
        return str(error)

mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
where, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
total = jax.jit(jnp.sum, out_shardings=everywhere)
numbers = np.arange(4 * len(mesh.devices), dtype=np.float32)
"""
TOGETHER = (
    BEGIN
    + """
said["gather"] = d.gather("who", f"I am {me}")
said["first"] = d.first("count", lambda: {"of": me})
said["no"] = refused(lambda: d.first("no", lambda: int("seven")))
d.same("colour", "red")
said["differ"] = refused(lambda: d.same("colour", "red" if me != 1 else "blue"))
d.shared_folder(Path(folder))
said["folder"] = refused(lambda: d.shared_folder(Path(folder) / ("x" if me == 1 else "")))
own = d.own_rows(where, len(numbers))
said["own"] = own.tolist()
said["sum"] = float(total(d.place(np.where(own, numbers, np.nan), where)))
said["broadcast"] = d.broadcast(np.array([me + 0.5, np.nan], np.float32)).tolist()
print("only the first says this")
for call in range(1, 200):
    if call == 7 and me == 1:
        os.kill(os.getpid(), 15)
    total(d.place(numbers, where)).block_until_ready()
    if number := d.stopping():
        break
said["stopped"] = [call, number]
Path(notes).write_text(json.dumps(said))
sys.exit(128 + number)
"""
)
# Passes over the devices until process PROCESS does what HOW says.
UNTIL = (
    BEGIN
    + """
process, how = int(os.environ["PROCESS"]), os.environ["HOW"]
try:
    for call in range(2000):
        if call == 5 and me == process:
            if how == "raise":
                raise ValueError("row 7 is no row")
            if how == "crash":
                [][7]
            os.kill(os.getpid(), 9)
        total(d.place(numbers, where)).block_until_ready()
        d.stopping()
except ValueError as error:
    sys.exit(d.refuse(error))
"""
)


def test_what_processes_do_together(tmp_path):
    ended = processes.run(TOGETHER, 3, str(tmp_path), notes=tmp_path, devices=2, seconds=120)
    assert [one.code for one in ended] == [143] * 3, ended
    said = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)]
    hosts = [f"process {i} ({os.uname().nodename})" for i in range(3)]
    for i, one in enumerate(said):
        assert one["gather"] == ["I am 0", "I am 1", "I am 2"]
        assert one["first"] == {"of": 0}
        assert "seven" in one["no"]
        assert one["differ"] == f"colour differs: {hosts[1]}: blue; {hosts[0]}: red"
        assert f"not the folder that process 0 has on {hosts[1]};" in one["folder"]
        # Its own rows are enough to make the array, and nobody else has them.
        assert one["own"] == [i == row // 8 for row in range(24)]
        assert one["sum"] == sum(range(24))
        assert one["broadcast"][0] == 0.5 and np.isnan(one["broadcast"][1])
    (stopped,) = {tuple(one["stopped"]) for one in said}
    assert stopped[0] >= 7 and stopped[1] == signal.SIGTERM
    assert "only the first says this" in ended[0].output
    assert f"{hosts[1]} got signal 15: all stop" in ended[0].output
    assert "says this" not in ended[1].output + ended[2].output


def test_the_others_end_with_a_line_that_names_the_one(tmp_path):
    host = os.uname().nodename
    cases = {
        ("1", "kill"): (LOST, f"error: process 1 ({host}) died;"),
        ("0", "kill"): (LOST, f"error: process 0 ({host}) died;"),
        ("1", "raise"): (2, f"error: process 1 ({host}) ended: row 7 is no row;"),
        ("0", "crash"): (1, f"error: process 0 ({host}) ended: IndexError: list index out of"),
    }
    runs = {
        case: processes.start(
            UNTIL, 2, notes=tmp_path / "".join(case), PROCESS=case[0], HOW=case[1]
        )
        for case in cases
    }
    for (process, how), (code, line) in cases.items():
        ended = processes.wait(runs[process, how], 60)
        other = ended[1 - int(process)]
        assert other.code == code and line in other.output, (process, how, ended)
        assert ended[int(process)].code == (-9 if how == "kill" else code), (process, how, ended)


def test_a_run_of_one_is_left_alone(tmp_path, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    distributed.start(Namespace(coordinator=None, processes=None, process=None, join_timeout=1.0))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not distributed.several() and distributed.writes()
    assert (distributed.index(), distributed.count()) == (0, 1)
    assert distributed.gather("x", "mine") == ["mine"]
    assert distributed.first("x", lambda: (1, 2)) == (1, 2)
    distributed.same("x", "y")
    distributed.shared_folder(tmp_path / "not there")
    distributed.check_stop()
    assert [distributed.stopping(n) for n in (0, 15)] == [0, 15]
    where = NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), PartitionSpec())
    assert distributed.own_rows(where, 3) is None
    rows = np.arange(3)
    assert distributed.broadcast(rows) is rows
    np.testing.assert_array_equal(distributed.place(rows, where), rows)


def test_errors_of_a_run_of_one(capsys):
    assert distributed.refuse(ValueError("no")) == 2
    assert capsys.readouterr().err == "error: no\n"
    assert distributed.leave("why", 130) == 130


def test_differing_names_all_that_differ():
    assert distributed.differing("x", ["a"]) == ""
