"""Checkpoints: what is saved comes back bit for bit, the newest stay, none is half-written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from saro_jax.data import pipeline
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.training import step
from saro_jax.training.checkpoint import Checkpoints, abstract, iterator_state

DATA = {"iterator": {"next": 3}, "num_tokens": 7}


def state(seed=0):
    params = tiny.params(seed)
    start = step.init_state(optax.scale_by_adam(), params, meshes.make_mesh())
    return start._replace(step=jnp.asarray(seed, jnp.int32))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1, 2 and 3 of which two are kept."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2)
    for k in (1, 2, 3):
        checkpoints.save(k, state(k), DATA | {"num_tokens": k})
    checkpoints.close()
    return folder


def test_the_newest_are_kept(saved):
    checkpoints = Checkpoints(saved)
    assert (checkpoints.steps(), checkpoints.latest()) == ([2, 3], 3)
    checkpoints.close()


def test_state_and_data_come_back(saved):
    checkpoints = Checkpoints(saved)
    for k in (2, 3):
        restored, data = checkpoints.restore(k, abstract(state()))
        equal(restored, state(k))
        assert data == DATA | {"num_tokens": k}
    checkpoints.close()


def test_parameters_come_back_alone(saved):
    checkpoints = Checkpoints(saved)
    shapes = step.abstract_params(tiny.ARCH, jnp.float32)
    places = sharding.shardings(meshes.make_mesh(), shapes)
    params = checkpoints.restore_params(2, shapes, places)
    equal(params, state(2).params)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    checkpoints.close()


def test_a_step_that_is_there_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(1, state(1), DATA)
    checkpoints.save(1, state(2), DATA)
    restored, _ = checkpoints.restore(1, abstract(state()))
    equal(restored, state(1))
    checkpoints.close()


def test_what_was_not_finished_is_not_a_checkpoint(saved, tmp_path):
    (tmp_path / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None and checkpoints.steps() == []
    checkpoints.close()


def test_donating_after_the_save_does_not_change_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved_state = step.owned(state(1))
    checkpoints.save(1, saved_state, DATA)
    jax.block_until_ready(
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(saved_state)
    )
    restored, _ = checkpoints.restore(1, abstract(state()))
    equal(restored, state(1))
    checkpoints.close()


def test_the_state_of_an_iterator_is_json():
    items, shape = tiny.items("sft"), pipeline.Shape(64, 1, "shared")
    iterator = pipeline.steps(items, pipeline.plan(items, batch_rows=2, shape=shape, seed=0), shape)
    next(iterator)
    found = iterator_state(iterator)
    assert json.loads(json.dumps(found)) == found
