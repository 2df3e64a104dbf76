"""Preflight: a line for each check, and for each process that differs."""

import os

import processes
import pytest

from saro_jax.parallel import distributed, preflight

CODE = """
import sys
from saro_jax.parallel import preflight
sys.exit(preflight.main(sys.argv[2:]))
"""


def lines(output):
    return [line for line in output.splitlines() if line.startswith(("ok", "wrong", "error"))]


def test_one_process(tmp_path, capsys):
    assert preflight.main([f"--out={tmp_path}/new"]) == 0
    found = lines(capsys.readouterr().out)
    assert [line.split(":")[0] for line in found] == [
        "ok    processes",
        "ok    versions",
        "ok    config",
        "ok    output folder",
        "ok    clock",
        f"ok    {tmp_path}/new",
        f"ok    {tmp_path}/new",
        "ok    devices",
        "ok    devices in all",
        "ok    mesh",
        "ok    sum over all devices",
    ]
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "--mesh.tensor=3",
            "wrong mesh: process 0 ({}): mesh.slice=1, mesh.data=1, mesh.fsdp=-1, ",
        ),
        ("--out=/proc/none", "wrong /proc/none: write: process 0 ({}): FileNotFoundError"),
    ],
)
def test_what_is_wrong(capsys, argument, line):
    assert preflight.main([argument]) == 2
    wanted = line.format(os.uname().nodename)
    assert any(found.startswith(wanted) for found in capsys.readouterr().out.splitlines())


def test_a_wrong_config_is_refused(capsys):
    assert preflight.main(["--train.stepz=3"]) == 2
    assert "error: --train.stepz: unknown option" in capsys.readouterr().err


def test_two_processes(tmp_path):
    extra = {1: ("--seed=4",)}
    both = [
        processes.start(CODE, 2, f"--out={tmp_path}/out", notes=tmp_path / name, extra=more)
        for name, more in (("well", None), ("ill", extra))
    ]
    well, ill = (processes.wait(run, 120) for run in both)
    assert [one.code for one in well] == [0, 0], well
    found = lines(well[0].output)
    assert all(line.startswith("ok") for line in found)
    assert found[-1].startswith("ok    sum over all devices: 1 in ")
    assert [one.code for one in ill] == [2, 2], ill
    (wrong,) = [line for line in lines(ill[0].output) if not line.startswith("ok")]
    assert wrong.startswith(f"wrong config: process 1 ({os.uname().nodename}): hash ")
    assert not any(lines(one.output) for one in (*well[1:], *ill[1:]))


def test_each_that_differs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "gather", lambda what, _: ["a", "b", "a", "c"])
    monkeypatch.setattr(distributed, "name", lambda i: f"process {i} (h{i})")
    assert preflight._same("versions", "") == 2
    assert capsys.readouterr().out.splitlines() == [
        "wrong versions: process 1 (h1): b; the others: a",
        "wrong versions: process 3 (h3): c; the others: a",
    ]


@pytest.mark.parametrize(
    ("times", "off"),
    [([1.0, 2.0, 3.0], []), ([100.0, 100.5, 90.0, 100.1], [2]), ([100.0, 92.0], [1])],
)
def test_clocks(monkeypatch, capsys, times, off):
    monkeypatch.setattr(distributed, "name", lambda i: f"process {i} (h{i})")
    assert preflight._clocks([repr(time) for time in times]) == len(off)
    said = capsys.readouterr().out
    assert all(f"wrong clock: process {i} (h{i}): " in said for i in off)
