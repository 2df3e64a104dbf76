"""Owns the section `mesh`: how the devices are laid out."""

from pydantic import Field

from saro_jax.config.section import Section


class MeshConfig(Section):
    """How the devices are laid out; the axes' product is their number."""

    data: int = Field(
        default=1, ge=-1, description="devices that hold copies of the weights; -1 = the rest"
    )
    fsdp: int = Field(
        default=-1, ge=-1, description="devices that share out weights and batch; -1 = the rest"
    )
    tensor: int = Field(
        default=1, ge=-1, description="devices that share out each matrix product; -1 = the rest"
    )
    sequence: int = Field(
        default=1,
        ge=-1,
        description="devices that share out the tokens of each row, and weights; -1 = the rest",
    )
    slice: int = Field(
        default=1, ge=-1, description="slices of a multi-slice TPU: copies; -1 = the rest"
    )
