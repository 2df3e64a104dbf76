"""The input pipeline: step k is a function of (seed, k), whatever is read ahead or restarted."""

from typing import Any

import numpy as np
import pytest
import tiny

from saro_jax.config import DataConfig
from saro_jax.data import packing, pipeline

ITEMS = tiny.items("preference")
SHAPE = pipeline.Shape(96, 2, "shared", 2)


def test_row_lengths_divide_by_the_shards_of_a_row():
    short = DataConfig(train="x", max_length=33)
    assert pipeline.row_length(short, "sft") == 66
    assert pipeline.row_length(short, "sft", 4) == 68
    given = DataConfig(train="x", max_length=33, row_length=100)
    assert pipeline.row_length(given, "sft", 4) == 100
    words = r"^data\.row_length=100: must be a multiple of mesh\.sequence=8, .*; 104 is the next$"
    with pytest.raises(ValueError, match=words):
        pipeline.row_length(given, "sft", 8)


def plan(items=ITEMS, batch_rows=3, window=1, shape=SHAPE, **options):
    given: Any = {"seed": 0} | options
    return pipeline.plan(items, batch_rows=batch_rows, shape=shape, window=window, **given)


def steps(prefetch=2, window=1):
    return pipeline.steps(ITEMS, plan(window=window), SHAPE, prefetch)


def order(count=8, batch_rows=3, steps=8, **options):
    options = {"seed": 0, "shuffle": True} | options
    dataset = pipeline.order(count, batch_rows, **options)
    return [np.asarray(dataset[k]).tolist() for k in range(steps)]


def same(a, b):
    assert len(a) == len(b)
    for step_a, step_b in zip(a, b, strict=True):
        assert len(step_a) == len(step_b)
        for x, y in zip(step_a, step_b, strict=True):
            for left, right in zip(x, y, strict=True):
                np.testing.assert_array_equal(left, right)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def test_every_epoch_is_a_new_shuffle_of_all_items():
    flat = [i for step in order() for i in step]
    epochs = [flat[0:8], flat[8:16], flat[16:24]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(8))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(8))


def test_without_shuffle_items_come_in_order():
    flat = [i for step in order(shuffle=False) for i in step]
    assert flat == list(range(8)) * 3


def test_seed_decides_the_order():
    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)


def test_steps_hold_the_items_of_the_order():
    iterator = steps()
    for indices, blocks in zip(order(), take(iterator, 8), strict=True):
        found = [int(i) for block in blocks for i in block.item[block.item >= 0]]
        assert sorted(found) == sorted(indices)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("window", [1, 2])
def test_what_is_read_ahead_changes_nothing(prefetch, window):
    straight = take(steps(2, window), 6)
    same(take(steps(prefetch, window), 6), straight)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("window", [1, 2])
def test_a_restored_iterator_goes_on_where_it_was_saved(prefetch, window):
    iterator = steps(prefetch, window)
    take(iterator, 4)
    state = iterator.get_state()
    after = take(iterator, 4)
    fresh = steps(prefetch, window)
    fresh.set_state(state)
    same(take(fresh, 4), after)
    iterator.set_state(state)
    same(take(iterator, 4), after)


@pytest.mark.parametrize(("count", "batch_rows", "window"), [(8, 3, 2), (60, 4, 8), (61, 7, 3)])
def test_an_epoch_of_windows_has_every_item_once_and_full_steps(count, batch_rows, window):
    items = [tiny.item(i, 4 + i % 5, 3 + 7 * i % 23, 2 + i % 11) for i in range(count)]
    rows_of = plan(items, batch_rows, window)
    whole = count // batch_rows  # steps that lie in the first epoch
    drawn = [[i for row in rows_of(k) for i in row] for k in range(whole)]
    assert all(len(step) == batch_rows for step in drawn)
    flat = [i for step in drawn for i in step]
    assert len(set(flat)) == len(flat)
    plain = [i for step in order(count, batch_rows, whole) for i in step]
    assert sorted(flat) == sorted(plain)
    # No item leaves its window.
    for start in range(0, whole, window):
        size = slice(start * batch_rows, min(start + window, whole) * batch_rows)
        assert sorted(flat[size]) == sorted(plain[size])


@pytest.mark.parametrize(("count", "batch_rows", "window"), [(10, 3, 4), (7, 7, 3), (30, 4, 5)])
def test_windows_tile_the_steps_and_end_with_the_epoch(count, batch_rows, window):
    step = 0
    while step < 40:
        start, number = pipeline.window_of(step, count, batch_rows, window)
        assert start == step and 1 <= number <= window
        for inside in range(start, start + number):
            assert pipeline.window_of(inside, count, batch_rows, window) == (start, number)
        first, last = start * batch_rows // count, ((start + number) * batch_rows - 1) // count
        assert number == 1 or first == last
        step += number


def test_without_shuffle_the_window_moves_nothing():
    plain, windowed = plan(shuffle=False), plan(shuffle=False, window=4)
    assert [plain(k) for k in range(8)] == [windowed(k) for k in range(8)]


def test_a_process_lays_out_its_own_rows_of_the_same_steps(monkeypatch):
    """The parts of two processes make the whole; what the plan says of all rows is in both."""
    whole = [list(packing.blocks(ITEMS, plan()(k), SHAPE)) for k in range(6)]
    laid_out = []
    lay_out = packing.lay_out
    monkeypatch.setattr(packing, "lay_out", lambda *a: laid_out.append(a[1]) or lay_out(*a))
    parts = []
    for own in ([True, False], [False, True]):
        laid_out.clear()
        parts.append(
            [list(packing.blocks(ITEMS, plan()(k), SHAPE, np.array(own))) for k in range(6)]
        )
        mine = [block.item[own] for step in parts[-1] for block in step]
        assert sorted(laid_out) == sorted(i for item in mine for i in item[item >= 0])
        assert laid_out
    for own, part in zip(([True, False], [False, True]), parts, strict=True):
        same(take(pipeline.steps(ITEMS, plan(), SHAPE, 2, np.array(own)), 6), part)
    for both, step in zip(zip(*parts, strict=True), whole, strict=True):
        for blocks_of in zip(*both, step, strict=True):
            for name in packing.Rows._fields:
                one, two, all_rows = (getattr(block, name) for block in blocks_of)
                if name in ("item", "weight", "noise", "label"):
                    np.testing.assert_array_equal(one, all_rows)
                    np.testing.assert_array_equal(two, all_rows)
                else:
                    np.testing.assert_array_equal(one[0], all_rows[0])
                    np.testing.assert_array_equal(two[1], all_rows[1])
                    assert not one[1].any() and not two[0].any()
