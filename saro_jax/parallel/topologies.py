"""TPU topologies by any of their names, and what one device of each has.

A Cloud name counts what Google counts: TensorCores for v4, v5p and TPU7x (v5p-32 has 16 chips),
chips for v5e and v6e (v5litepod-16 has 16). libtpu wants a shape (v5p:2x2x4) and, for what no whole
host makes up, how many chips a host has.
"""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

import jax

GB = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one JAX device of a generation has; rates a second.

    hbm: bytes that the compiler lets a program use, from the text of its out-of-memory error
    (libtpu 0.0.42). flops: peak of bfloat16 products, hbm_rate: bytes of main memory, ici_rate: one
    axis of the torus in both directions (the figure that Cloud gives is of all links of a chip),
    dcn_rate: of a chip's share of its host's network. All from the pages "TPU v4", "TPU v5e",
    "TPU v5p", "TPU v6e" and "TPU7x" of cloud.google.com/tpu/docs, system architecture; v4's
    dcn_rate is assumed to be v5e's. clock: Hz, with which the compiler's cycles for lone large
    products come to 96 % of `flops` (88 % on v6e).
    """

    name: str
    devices_per_chip: int
    hbm: float
    flops: float
    hbm_rate: float
    ici_rate: float
    dcn_rate: float
    clock: float


CHIPS = {
    "v4": Chip("TPU v4", 1, 30.75 * GIB, 275e12, 1228 * GB, 90 * GB, 3.125 * GB, 1.05e9),
    "v5e": Chip("TPU v5e", 1, 15.75 * GIB, 197e12, 819 * GB, 90 * GB, 3.125 * GB, 1.5e9),
    "v5p": Chip("TPU v5p", 1, 95.74 * GIB, 459e12, 2765 * GB, 180 * GB, 6.25 * GB, 1.75e9),
    "v6e": Chip("TPU v6e", 1, 31.25 * GIB, 918e12, 1638 * GB, 180 * GB, 12.5 * GB, 1.75e9),
    # A chip is two devices; the figures are of one of them.
    "tpu7x": Chip("TPU7x", 2, 94.75 * GIB, 1153e12, 3690 * GB, 90 * GB, 6.25 * GB, 2.2e9),
}
CORES = {"v4", "v5p", "tpu7x"}  # their Cloud names count TensorCores, two a chip
FLAT = {"v5e", "v6e"}  # a torus of two axes
HOST = {"v4": (2, 2, 1), "v5e": (2, 2, 1), "v5p": (2, 2, 1), "v6e": (2, 2, 1), "tpu7x": (2, 2, 1)}
# Chips -> shape, those that Cloud offers.
SHAPES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
SHAPES_3D = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
}
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v5": "v5p",
    "v7x": "tpu7x",
    "ironwood": "tpu7x",
    "trillium": "v6e",
}


@dataclass(frozen=True)
class Topology:
    """One slice, or several alike, as libtpu is asked for it."""

    name: str  # as it was given
    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices_per_chip * self.slices

    @property
    def libtpu_name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_host_bounds(self) -> tuple[int, int, int]:
        """Chips of a host: one host of 8 for v5e and v6e 2x4, a single chip alone, else 2x2."""
        if self.chips == 1:
            return (1, 1, 1)
        if self.generation in FLAT and self.shape == (2, 4):
            return (2, 4, 1)
        return HOST[self.generation]

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Axes that close to a ring: all where the slice is large enough for it, else none."""
        if self.generation in FLAT:
            whole = self.shape == (16, 16)
            return (whole, whole, False)
        whole = all(size % 4 == 0 for size in self.shape)
        return (whole, whole, whole)

    @property
    def options(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` takes beside the name."""
        options: dict[str, Any] = {
            "chips_per_host_bounds": self.chips_per_host_bounds,
            "wrap": self.wrap,
        }
        if self.generation == "v4":  # real v4 runs both cores of a chip as one device
            options["chip_config_name"] = "megacore"
        if self.slices > 1:
            options["num_slices"] = self.slices
        return options

    def description(self) -> str:
        """'16 x TPU v5p (2x2x4, 4 hosts)'."""
        hosts = max(1, self.chips // math.prod(self.chips_per_host_bounds))
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        shape = "x".join(map(str, self.shape))
        return f"{slices}{self.chips} x {self.chip.name} ({shape}, {hosts} host{'s' * (hosts > 1)})"


def find(name: str) -> Topology:
    """The topology of a Cloud name, a libtpu name, or several slices of one: `2xv5e-16`.

    Unknown names are a ValueError with the nearest known ones.
    """
    text = name.strip().lower()
    slices, rest = 1, text
    if found := re.fullmatch(r"(\d+)x(v\d.*|tpu.*|trillium.*|ironwood.*)", text):
        slices, rest = int(found.group(1)), found.group(2)
    found = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|:([\dx]+))", rest)
    if found is None or slices < 1:
        raise _unknown(name, rest)
    given, number, shape = found.groups()
    generation = ALIASES.get(given, given)
    if generation not in CHIPS:
        raise _unknown(name, rest)
    shapes = SHAPES_2D if generation in FLAT else SHAPES_3D | {1: "1x1x1"}
    if number:
        chips = int(number) // 2 if generation in CORES else int(number)
        odd = generation in CORES and int(number) % 2
        shape = None if odd else shapes.get(chips)
    if not shape or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise _unknown(name, rest)
    sizes = tuple(map(int, shape.split("x")))
    if len(sizes) != (2 if generation in FLAT else 3) or 0 in sizes:
        raise _unknown(name, rest)
    return Topology(name, generation, sizes, slices)


def names() -> list[str]:
    """The Cloud names that `find` knows, and the libtpu names of the same."""
    found = []
    for generation in CHIPS:
        cloud = "v5litepod" if generation == "v5e" else generation
        for chips, shape in (SHAPES_2D if generation in FLAT else SHAPES_3D).items():
            count = chips * 2 if generation in CORES else chips
            found += [f"{cloud}-{count}", f"{generation}:{shape}"]
            found += [f"v5e-{count}"] if generation == "v5e" else []
    return found


def _unknown(name: str, text: str) -> ValueError:
    near = difflib.get_close_matches(text, names(), n=4, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else "; such as v5p-32, v5e-16, v6e-8"
    return ValueError(f"topology {name!r}: unknown{hint}")


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology that this machine need not have; they only compile.

    A ValueError where libtpu is not installed or refuses the shape.
    """
    import importlib.util
    import os

    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install -e '.[tpu]'")
    if jax.default_backend() != "tpu":
        # Nothing runs, so that several processes may load the library; and it need not ask for
        # the machine's accelerator, whatever valid name it is told.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        told = {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}
        for key, value in told.items():  # JAX leaves a warning in place of what it did not find
            if os.environ.get(key, "WARNING").startswith("WARNING"):
                os.environ[key] = value
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            topology.libtpu_name, platform="tpu", **topology.options
        )
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"topology {topology.name!r} ({topology.libtpu_name}): {reason}") from None
    return list(found.devices)
