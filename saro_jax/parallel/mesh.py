"""The device mesh: its axes and their sizes."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")  # copies of the model | shards of it | shards of each matrix


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
    data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh over `devices` (None: all devices of all processes); -1 = the rest of the devices."""
    count = jax.device_count() if devices is None else len(devices)
    sizes = axis_sizes({"data": data, "fsdp": fsdp, "tensor": tensor}, count)
    # make_mesh defaults to Explicit axes in recent versions; here the compiler propagates.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def row_shards(mesh: Mesh) -> int:
    """Number of shards a batch of rows is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
