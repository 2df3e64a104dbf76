"""Every architecture on every mesh: loss and gradients of one device, and nothing replicated."""

from itertools import product

import pytest
import sharded
import tiny
from sharded import FAMILIES, MESHES

LOSSES = (("rw", "shared"), ("sigmoid", "shared"), ("sigmoid", "separate"))
# Each axis and stage, what divides and what does not, adapters, windows, caps;
# Llama's whole training on data x fsdp x tensor is in test_equalities.
QUICK = [
    ("gemma2", "fsdp-sequence-tensor", "rw", "shared", 0),
    ("uneven", "fsdp-tensor", "sigmoid", "shared", 2),
]
ALL = [
    *((family, mesh, *loss, 0) for family, loss, mesh in product(FAMILIES, LOSSES, MESHES)),
    *(("llama", mesh, *loss, 2) for loss, mesh in product(LOSSES, MESHES)),
]


def check(cases):
    tiny.folder()  # the cache of compiled programs
    found = sharded.run([("difference", *case) for case in cases])
    wrong = [(case, value) for case, value in zip(cases, found, strict=True) if not value <= 1e-4]
    assert not wrong


def test_eight_devices_equal_one():
    check(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_on_every_mesh_equals_one_device(family):
    check([case for case in ALL if case[0] == family])


def test_the_compiled_step_replicates_nothing():
    tiny.folder()
    assert sharded.run([("misplaced", "llama", "fsdp-sequence-tensor", "sigmoid")]) == [[]]


@pytest.mark.slow
def test_the_compiled_step_replicates_nothing_on_any_mesh():
    tiny.folder()
    cases = list(product(("misplaced",), ("mistral", "uneven"), MESHES, ("rw", "sigmoid")))
    found = sharded.run(cases)
    assert found == [[]] * len(found)


def sampled_as_one(cases):
    tiny.folder()
    for case, (same, worst, whole) in zip(cases, sharded.run(cases), strict=True):
        assert same and worst < 1e-4 and not whole, (case, same, worst, whole)


def test_samples_of_eight_devices_are_those_of_one():
    sampled_as_one([("sampled", "llama", "data-fsdp-tensor"), ("sampled", "gemma2", "fsdp")])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_samples_on_every_mesh(mesh):
    sampled_as_one([("sampled", family, mesh) for family in ("llama", "uneven", "gemma3")])
