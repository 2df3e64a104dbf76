"""KTO's mismatched responses: each prompt of a step with the response to another of its prompts.

Their mean log-ratio is the loss's baseline. The rows of a step are taken in the order of their
item numbers, so which two meet depends on the step alone, not on how it is packed or cut up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from saro_jax.data.packing import Rows, Shape, arrange, pack
from saro_jax.data.tokenise import Item
from saro_jax.training import reference
from saro_jax.training.source import Source

Match = tuple[int, int]  # item whose prompt it is, item whose response it is


class Mismatches(NamedTuple):
    """What gives the mismatched rows of any step."""

    items: Sequence[Item]
    shape: Shape
    longest: int  # tokens of a prompt and a response together, the response is cut to it
    reference: dict[Match, np.ndarray] | None  # float32 [1, G]; None = a resident reference


def matches(indices: Iterable[int]) -> list[Match]:
    """The mismatched pairs of a step: each row's prompt, the next row's response, cyclic."""
    order = sorted({int(i) for i in indices})
    return list(zip(order, order[1:] + order[:1], strict=True))


def join(items: Sequence[Item], match: Match, longest: int) -> Item:
    """The prompt of one item with the response of another."""
    asked, said = (items[i] for i in match)
    (branch,) = said.branches
    room = longest - len(asked.prefix)
    cut = replace(branch, ids=branch.ids[:room], scored=branch.scored[:room], reasoning=None)
    return replace(asked, id=f"{asked.id} + {said.id}", branches=(cut,))


def of_step(
    mismatches: Mismatches, blocks: Sequence[Rows], own: np.ndarray | None = None
) -> tuple[list[Rows], np.ndarray | None]:
    """The packed mismatched rows of a step's blocks, and their reference log-probs [n, 1, G].

    own: as `packing.blocks` has it.
    """
    items, shape, longest, reference = mismatches
    step = matches(i for block in blocks for i in block.item[block.item >= 0])
    joined = [join(items, match, longest) for match in step]
    packed = list(pack(joined, range(len(joined)), **shape._asdict(), own=own))
    return packed, None if reference is None else np.stack([reference[match] for match in step])


def of_run(
    source: Source,
    params: Any,
    items: Sequence[Item],
    groups: list[list[int]],
    shape: Shape,
) -> Mismatches:
    """The mismatched rows of a run, with their stored reference log-probs where none is resident.

    Which rows meet is a function of the step, so those of all steps are scored before the first.
    """
    longest = source.config.data.max_length
    if source.config.srpo.reference == "resident":
        return Mismatches(items, shape, longest, None)
    number: dict[Match, int] = {}
    numbered = [
        [number.setdefault(match, len(number)) for match in matches(group)] for group in groups
    ]
    joined = [join(items, match, longest) for match in number]
    groups_of_rows = [arrange(joined, group, shape) for group in numbered]
    logps = reference.of_items(source, params, joined, groups_of_rows, shape)
    return Mismatches(items, shape, longest, dict(zip(number, logps, strict=True)))
