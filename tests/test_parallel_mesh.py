"""The device mesh: its axes use all devices, or the error says what does not fit."""

import jax
import pytest
from jax.sharding import AxisType

from saro_jax.parallel.mesh import AXES, axis_sizes, make_mesh, row_shards


def sizes(data, fsdp, tensor, devices=8):
    return axis_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


def test_one_axis_takes_the_rest():
    assert sizes(1, -1, 1) == (1, 8, 1)
    assert sizes(2, 2, -1) == (2, 2, 2)
    assert sizes(-1, 8, 1) == (1, 8, 1)
    assert sizes(2, 2, 2) == (2, 2, 2)


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
    for axis, size in zip(AXES, requested, strict=True):
        assert f"mesh.{axis}={size}" in message


def test_the_mesh_has_all_devices_and_lets_the_compiler_propagate():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert mesh.shape == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert row_shards(mesh) == jax.device_count()


def test_a_mesh_for_other_devices_is_refused():
    with pytest.raises(ValueError, match=rf"the number of devices, {jax.device_count()}$"):
        make_mesh(data=jax.device_count() + 1, fsdp=1)
