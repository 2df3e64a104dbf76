"""Owns what every section of the tree is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
