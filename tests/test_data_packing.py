"""Packed rows: every item once, laid out so that each scored token is predicted by its context."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

from saro_jax.data import packing
from saro_jax.data.packing import first_fit, laid_out_length, lay_out, pack, slots

LAYOUTS = ("shared", "separate")


def packed(items, layout="shared", row_length=128, rows=2, indices=None, **more):
    indices = range(len(items)) if indices is None else indices
    return list(pack(items, indices, row_length=row_length, rows=rows, layout=layout, **more))


def sequences(block, b, slot, branches):
    """What a slot of a row holds, read back from the row: [(ids, positions)] of each branch."""
    # Segments of a row are numbered in the order of the slots, one or K of them an item.
    segments = sorted({int(s) for s in block.segment[b] if s})
    items = [i for i in block.item[b] if i >= 0]
    each = len(segments) // len(items)
    own = segments[slot * each : (slot + 1) * each]
    found = []
    for k in range(branches):
        if each == 1:
            mask = (block.segment[b] == own[0]) & np.isin(block.branch[b], (0, k + 1))
        else:
            mask = block.segment[b] == own[k]
        found.append((block.tokens[b][mask], block.position[b][mask], np.flatnonzero(mask)))
    return found


@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_item_is_there_once_whole_and_in_order(kind, layout):
    items = tiny.items(kind)
    seen = []
    for block in packed(items, layout):
        for b, slot in zip(*np.nonzero(block.item >= 0), strict=True):
            item = items[block.item[b, slot]]
            seen.append(int(block.item[b, slot]))
            assert block.weight[b, slot] == item.weight
            read = sequences(block, b, slot, len(item.branches))
            for k, (branch, (ids, positions, where)) in enumerate(
                zip(item.branches, read, strict=True)
            ):
                whole = np.concatenate([item.prefix, branch.ids])
                np.testing.assert_array_equal(ids, whole)
                # Positions restart with the item and continue from the prefix into each branch.
                np.testing.assert_array_equal(positions, np.arange(len(whole)))
                # A scored token is predicted by the token before it in its own sequence.
                counts = np.concatenate([np.zeros(len(item.prefix), bool), branch.scored])
                counts[0] = False
                mine = block.valid[b] & (block.sequence[b] == slot * len(item.branches) + k)
                np.testing.assert_array_equal(block.target[b][mine], whole[counts])
                before = np.flatnonzero(counts) - 1
                np.testing.assert_array_equal(block.source[b][mine], where[before])
    assert sorted(seen) == list(range(len(items)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_blocks_have_one_shape_and_empty_places_are_zero(layout):
    blocks = packed(tiny.items("preference"), layout, rows=2)
    shapes = [(2, 128)] * 8 + [(2, slots(128))] * 2 + [(2, 128)] + [(2, slots(128))] * 2
    assert len(blocks) > 1
    for block in blocks:
        assert [x.shape for x in block] == shapes
        assert [x.dtype for x in block] == [np.int32] * 6 + [
            np.bool_,
            np.int32,
            np.int32,
            np.float32,
            np.int32,
            np.float32,
            np.float32,
        ]
        empty = block.segment == 0
        for x in (block.tokens, block.branch, block.position):
            assert (x[empty] == 0).all()
        assert (block.weight[block.item < 0] == 0).all()
        for x in (block.source, block.target, block.sequence):
            assert (x[~block.valid] == 0).all()
        # Scored positions come first: chunks past the longest row are skipped.
        assert (np.diff(block.valid.astype(int), axis=1) <= 0).all()


def test_first_token_of_each_branch_is_predicted_by_the_end_of_the_prefix():
    item = tiny.item(0, 5, 3, 4)
    shared = lay_out(item, 0, "shared")
    assert shared.source.tolist() == [4, 5, 6, 4, 8, 9, 10]
    assert shared.branch.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert shared.position.tolist() == [*range(5), 5, 6, 7, 5, 6, 7, 8]
    assert set(shared.segment) == {0}
    separate = lay_out(item, 0, "separate")
    assert separate.source.tolist() == [4, 5, 6, 12, 13, 14, 15]
    assert set(separate.branch) == {0}
    assert separate.segment.tolist() == [0] * 8 + [1] * 9
    for piece in (shared, separate):
        assert piece.sequence.tolist() == [0] * 3 + [1] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_completion_of_one_token_is_scored_from_the_last_prompt_token(layout):
    item = tiny.item(0, 4, 1, 1)
    piece = lay_out(item, 0, layout)
    second = 3 if layout == "shared" else 8
    assert piece.source.tolist() == [3, second]
    assert piece.target.tolist() == [branch.ids[0] for branch in item.branches]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_at_position_zero_does_not_count(layout):
    item = tiny.item(0, 0, 3, 2)
    piece = lay_out(item, 0, layout)
    assert piece.source.tolist() == [0, 1, 3]
    assert piece.target.tolist() == [*item.branches[0].ids[1:], item.branches[1].ids[1]]
    assert piece.sequence.tolist() == [0, 0, 1]
    assert item.branches[0].scored[0], "the item itself is left alone"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_laid_out_length_is_the_length(kind, layout):
    for item in tiny.items(kind):
        assert laid_out_length(item, layout) == len(lay_out(item, 0, layout).tokens)


def test_prefix_is_laid_out_once_or_once_a_branch():
    item = tiny.item(0, 10, 3, 4)
    assert laid_out_length(item, "shared") == 17
    assert laid_out_length(item, "separate") == 27


def test_laid_out_lengths_count_what_is_not_padding():
    items = tiny.items("preference")
    for layout in LAYOUTS:
        tokens = sum(int((block.segment > 0).sum()) for block in packed(items, layout))
        assert tokens == sum(laid_out_length(item, layout) for item in items)


def test_first_fit_decreasing():
    assert first_fit([3, 7, 5, 2, 3], 10, 9) == [[1, 0], [2, 4, 3]]
    assert first_fit([4, 4, 4], 10, 9) == [[0, 1], [2]]
    assert first_fit([1] * 5, 10, 2) == [[0, 1], [2, 3], [4]], "at most two in a bin"
    assert first_fit([10], 10, 1) == [[0]]
    with pytest.raises(ValueError, match=r"^item 1 of 11 tokens does not fit a row of 10$"):
        first_fit([2, 11], 10, 9)


def test_first_fit_never_overfills_and_needs_few_bins():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 60, 40).tolist()
        bins = first_fit(lengths, 64, 99)
        assert sorted(i for members in bins for i in members) == list(range(40))
        loads = [sum(lengths[i] for i in members) for members in bins]
        assert max(loads) <= 64
        # First-fit-decreasing needs at most 11/9 of the optimum and 6/9 of a bin more.
        assert len(bins) <= 11 / 9 * np.ceil(sum(lengths) / 64) + 1


def test_very_short_items_stop_at_the_slots():
    items = [tiny.item(i, 1, 1, 1) for i in range(9)]
    blocks = packed(items, row_length=64, rows=1)
    assert slots(64) == 4 and slots(5) == 1
    assert [(block.item >= 0).sum() for block in blocks] == [4, 4, 1]


def test_packing_is_deterministic_and_takes_its_indices_as_given():
    items = tiny.items("preference")
    one, two = (packed(items, indices=[6, 1, 3, 1]) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    found = sorted(int(i) for block in one for i in block.item[block.item >= 0])
    assert found == [1, 1, 3, 6]


def test_blocks_have_the_smallest_length_that_holds_their_rows():
    # One item a row, of 5 to 95 tokens, in parts of 25 of which the last is cut to 98.
    items = [tiny.item(i, 1, 1 + i, 3) for i in (0, 40, 50, 60, 80, 90)]
    blocks = packed(items, row_length=98, rows=1, buckets=4)
    lengths = [block.tokens.shape[1] for block in blocks]
    assert lengths == sorted(lengths, reverse=True) == [98, 98, 75, 75, 50]
    blocks = packed(items, row_length=98, rows=2, buckets=4)
    assert [block.tokens.shape[1] for block in blocks] == [98, 75, 50]
    for block in blocks:
        assert block.item.shape == (2, slots(98)), "the number of slots is that of a whole row"
    found = sorted(int(i) for block in blocks for i in block.item[block.item >= 0])
    assert found == list(range(6))


def test_row_lengths_are_multiples_of_the_unit():
    items = [tiny.item(i, 1, 1 + i, 3) for i in (0, 40, 50, 60, 80, 90)]
    shape = packing.Shape(96, 2, "shared", 4, unit=16)  # parts of 24 would not be
    assert [block.tokens.shape[1] for block in packed(items, **shape._asdict())] == [96, 96, 64]
    assert {packing.round_up(n, 16) for n in (17, 31, 32)} == {32} and packing.round_up(7, 1) == 7


def test_one_bucket_gives_rows_of_the_whole_length():
    for block in packed(tiny.items("preference")):
        assert block.tokens.shape == (2, 128)


# Tokens of pairs as long reasoning data has them: most near the median, a tail to the limit.
LENGTHS = np.clip(np.random.default_rng(0).lognormal(6.4, 0.25, 512), 300, 1500).astype(int)
LONG = [tiny.item(i, n // 2, n // 4, n - n // 2 - n // 4) for i, n in enumerate(LENGTHS)]


def fill(rows, shape):
    used = [sum(packing.laid_out_length(LONG[i], "shared") for i in row) for row in rows]
    return sum(used), packing.computed_tokens(used, shape)


# Rows that go through the model together have one length: eight of them need finer lengths.
@pytest.mark.parametrize(
    ("rows", "batch", "buckets"), [(1, 8, 8), (1, 16, 8), (1, 64, 8), (8, 64, 32)]
)
def test_a_window_of_steps_fills_rows_to_95_percent(rows, batch, buckets):
    shape = packing.Shape(2048, rows, "shared", buckets)
    real = computed = 0
    for start in range(0, len(LONG), 8 * batch):
        window = list(range(start, start + 8 * batch))
        steps = packing.deal(LONG, window, 8, shape)
        assert sorted(i for step in steps for row in step for i in row) == window
        for step in steps:
            assert sum(map(len, step)) == batch
            for row in step:
                assert fill([row], shape)[0] <= 2048
            tokens = fill(step, shape)
            found = list(packing.blocks(LONG, step, shape))
            assert tokens == (
                sum(int((block.segment > 0).sum()) for block in found),
                sum(block.tokens.size for block in found),
            )
            real, computed = real + tokens[0], computed + tokens[1]
    assert real >= 0.95 * computed, real / computed


def test_of_several_arrangements_the_one_that_computes_least():
    shape = packing.Shape(2048, 1, "shared", 8)
    indices = list(range(16))
    best = packing.arrange(LONG, indices, shape)
    lengths = [packing.laid_out_length(LONG[i], "shared") for i in indices]
    plain = [list(row) for row in first_fit(lengths, 2048, 128)]
    assert fill(best, shape)[1] <= fill(plain, shape)[1]
    # Rows that came from elsewhere are taken where nothing beats them.
    assert packing.arrange(LONG, indices, shape, best) == best


def test_segments_tell_part_and_length():
    one = tiny.item(0, 3, 4, 2)
    reasoning = (np.array([1, 1, 0, 0], bool), np.array([1, 0], bool))
    branches = [replace(b, reasoning=r) for b, r in zip(one.branches, reasoning, strict=True)]
    one = replace(one, branches=tuple(branches), noise=0.25, label=False)
    (block,) = pack([one, tiny.item(1, 3, 4, 2)], [0, 1], row_length=64, rows=1, layout="shared")
    slot = int(np.flatnonzero(block.item[0] == 0)[0])
    found = {k: block.part[0][block.valid[0] & (block.sequence[0] == 2 * slot + k)] for k in (0, 1)}
    # Two tokens are within the shorter branch; 2 = answer, + 1 beyond.
    assert (found[0].tolist(), found[1].tolist()) == ([0, 0, 3, 3], [0, 2])
    other = 1 - slot
    assert (block.noise[0, slot], block.noise[0, other]) == (0.25, -1)
    assert (block.label[0, slot], block.label[0, other]) == (0, 1)
