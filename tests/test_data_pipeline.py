"""The input pipeline: step k is a function of (seed, k), whatever is read ahead or restarted."""

import numpy as np
import pytest
import tiny

from saro_jax.data import pipeline

ITEMS = tiny.items("preference")
SHAPE = {"batch_rows": 3, "shape": pipeline.Shape(96, 2, "shared", 2), "seed": 0}


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
    iterator = pipeline.steps(ITEMS, **SHAPE)
    for indices, blocks in zip(order(), take(iterator, 8), strict=True):
        found = [int(i) for block in blocks for i in block.item[block.item >= 0]]
        assert sorted(found) == sorted(indices)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_what_is_read_ahead_changes_nothing(prefetch):
    straight = take(pipeline.steps(ITEMS, **SHAPE), 6)
    same(take(pipeline.steps(ITEMS, **SHAPE, prefetch=prefetch), 6), straight)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restored_iterator_goes_on_where_it_was_saved(prefetch):
    iterator = pipeline.steps(ITEMS, **SHAPE, prefetch=prefetch)
    take(iterator, 4)
    state = iterator.get_state()
    after = take(iterator, 4)
    fresh = pipeline.steps(ITEMS, **SHAPE, prefetch=prefetch)
    fresh.set_state(state)
    same(take(fresh, 4), after)
    iterator.set_state(state)
    same(take(iterator, 4), after)
