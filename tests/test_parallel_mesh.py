"""The device mesh: its axes use all devices, or the error says what does not fit."""

from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from saro_jax.parallel.mesh import AXES, axis_sizes, make_mesh, row_shards, weight_shards


def sizes(data, fsdp, tensor, devices=8, sequence=1, slice=1):
    requested = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return axis_sizes(requested | {"sequence": sequence, "slice": slice}, devices)


def test_one_axis_takes_the_rest():
    assert AXES == ("slice", "data", "fsdp", "sequence", "tensor")
    assert sizes(1, -1, 1) == (1, 1, 8, 1, 1)
    assert sizes(2, 2, -1) == (1, 2, 2, 1, 2)
    assert sizes(-1, 8, 1) == (1, 1, 8, 1, 1)
    assert sizes(2, 2, 2) == (1, 2, 2, 1, 2)
    assert sizes(1, 2, 1, sequence=-1, slice=2) == (2, 1, 2, 2, 1)


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ((-1, -1, 1), "at most one axis may be -1"),
        ((3, -1, 1), "the product must be the number of devices, 8"),
        ((2, 2, 1), "the product must be the number of devices, 8"),
        ((16, -1, 1), "the product must be the number of devices, 8"),
        ((4, 4, 1), "the product must be the number of devices, 8"),
    ],
)
def test_sizes_that_do_not_use_all_devices_are_refused(requested, words):
    with pytest.raises(ValueError, match=words) as caught:
        sizes(*requested)
    message = str(caught.value)
    assert "\n" not in message
    for axis, size in zip(("data", "fsdp", "tensor"), requested, strict=True):
        assert f"mesh.{axis}={size}" in message


def test_the_mesh_has_all_devices_and_lets_the_compiler_propagate():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert mesh.shape == dict.fromkeys(AXES, 1) | {"fsdp": jax.device_count()}
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
    assert row_shards(mesh) == weight_shards(mesh) == jax.device_count()


def test_a_mesh_for_other_devices_is_refused():
    with pytest.raises(ValueError, match=rf"the number of devices, {jax.device_count()}$"):
        make_mesh(data=jax.device_count() + 1, fsdp=1)


class Chip:
    def __init__(self, **known: Any):
        self.__dict__ |= known


def chips(*shape, slices=1):
    """Fake TPU chips on a torus of `shape`."""
    found = []
    for s in range(slices):
        for z in range(shape[2]):
            for y in range(shape[1]):
                for x in range(shape[0]):
                    place = {"coords": (x, y, z), "core_on_chip": 0, "slice_index": s}
                    kind = {"platform": "tpu", "device_kind": "TPU v5", "process_index": 0}
                    found.append(Chip(id=len(found), **place, **kind))
    return found


def neighbours(a, b):
    return sum(p != q for p, q in zip(a.coords, b.coords, strict=True)) == 1


def test_devices_of_a_torus_stand_beside_their_neighbours():
    mesh = make_mesh(fsdp=4, tensor=4, devices=chips(4, 4, 1))  # pyright: ignore
    assert mesh.shape == dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 4}
    grid = mesh.devices.reshape(4, 4)
    for i in range(4):
        for j in range(3):
            assert neighbours(grid[i, j], grid[i, j + 1]) and neighbours(grid[j, i], grid[j + 1, i])
    # A size that no torus dimension has cuts one of them.
    mesh = make_mesh(fsdp=8, sequence=2, devices=chips(4, 4, 1))  # pyright: ignore
    assert len({device.id for device in mesh.devices.flat}) == 16
    assert all(neighbours(a, b) for a, b in mesh.devices.reshape(8, 2))


def test_slices_are_one_axis():
    devices = chips(2, 2, 1, slices=2)
    mesh = make_mesh(fsdp=2, tensor=2, slice=2, devices=devices)  # pyright: ignore
    for s in range(2):
        assert {device.slice_index for device in mesh.devices[s].flat} == {s}
    with pytest.raises(ValueError, match=r"^mesh\.slice=1: the devices are 2 slices.* set it to 2"):
        make_mesh(devices=devices)  # pyright: ignore
    # Other machines have no slices; there the first devices are the first slice.
    plain = [Chip(id=i, platform="cpu") for i in range(4)]
    mesh = make_mesh(slice=2, devices=plain)  # pyright: ignore
    assert [[d.id for d in part.flat] for part in mesh.devices] == [[0, 1], [2, 3]]
