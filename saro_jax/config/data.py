"""Owns the section `data`: the rows a stage trains on, and how they become arrays."""

from typing import Literal

from pydantic import Field

from saro_jax.config.section import Section


class DataConfig(Section):
    """The rows a stage trains on, and how they become arrays."""

    train: str | list[str] = Field(
        description="training rows: file, folder or Hub id, or several of them; "
        "'quickstart:ritd' and 'quickstart:preferences' are packaged",
    )
    eval: str | None = Field(
        default=None, description="held-out rows: file, folder or Hub id; null = no evaluation"
    )
    split: str = Field(default="train", description="split that is read from a Hub id")
    max_length: int = Field(
        default=1024, ge=2, description="tokens of one sequence, prompt and completion together"
    )
    too_long: Literal["truncate", "reject"] = Field(
        default="truncate",
        description="what happens to a row of more than data.max_length tokens",
    )
    row_length: int | None = Field(
        default=None,
        ge=2,
        description="tokens of one packed row; null = 2 x data.max_length for rw, 4 x for srpo",
    )
    pack_window: int = Field(
        default=8,
        ge=1,
        description="optimizer steps whose rows are packed together and then dealt out to them: "
        "more fill rows better; has no effect without data.shuffle",
    )
    row_buckets: int = Field(
        default=8,
        ge=1,
        description="lengths that rows come in, equal parts of row_length: more lengths, less "
        "padding, more programs to compile; 1 = every row has row_length",
    )
    shuffle: bool = Field(
        default=True, description="new order of the rows in every epoch, drawn from seed"
    )
    workers: int = Field(
        default=0, ge=0, description="processes that prepare rows; 0 = the training process"
    )
    prefetch: int = Field(default=2, ge=0, description="batches prepared ahead of the step")
    max_reject_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="largest rejected share of the rows (0 to 1) before the run is refused",
    )
