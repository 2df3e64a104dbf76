"""The device mesh: its axes, their sizes, and which device stands where."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest: neighbours on the last axis are neighbours in the machine.
#   slice     whole slices, joined by the data-centre network; each holds the weights
#   data      copies of the weights within a slice
#   fsdp      shards of the weights, and of the batch
#   sequence  shards of each row's tokens; they share out the weights too
#   tensor    shards of each matrix product
AXES = ("slice", "data", "fsdp", "sequence", "tensor")


def axis_sizes(requested: dict[str, int], devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` with one -1 filled in; `ValueError` where they do not use all devices."""
    sizes = [requested[axis] for axis in AXES]
    wanted = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise ValueError(f"{wanted}: at most one axis may be -1 (the rest of the devices)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ValueError(f"{wanted}: the product must be the number of devices, {devices}")
    return tuple(sizes)


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    sequence: int = 1,
    slice: int = 1,  # named as the axis is
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Mesh over `devices`, by default all of all processes; -1 = the rest of the devices.

    devices: of `jax.devices()` or of an ahead-of-time topology. On TPUs the order follows the
    torus; devices of several slices need `slice` to be their number. ValueError in one line where
    the sizes do not use all devices.
    """
    found = list(jax.devices() if devices is None else devices)
    requested = {"slice": slice, "data": data, "fsdp": fsdp}
    sizes = axis_sizes(requested | {"sequence": sequence, "tensor": tensor}, len(found))
    # A mesh defaults to Explicit axes in recent versions; here the compiler propagates.
    return Mesh(_arranged(found, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of shape `sizes`."""
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1 and sizes[0] != slices:
        raise ValueError(
            f"mesh.slice={sizes[0]}: the devices are {slices} slices, joined by a slow network; "
            f"set it to {slices}"
        )
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)  # by process: an axis' neighbours share a host

    def arranged(split: bool) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
        inner, outer = (1, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=split
        )

    try:
        return arranged(False)
    except NotImplementedError:  # no set of torus dimensions has these sizes: cut one of them
        return arranged(True)


def row_shards(mesh: Mesh) -> int:
    """Number of shards a batch of rows is cut into."""
    return mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]


def weight_shards(mesh: Mesh) -> int:
    """Number of shards a matrix is cut into."""
    return mesh.shape["fsdp"] * mesh.shape["sequence"] * mesh.shape["tensor"]
