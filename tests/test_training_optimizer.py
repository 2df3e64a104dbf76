"""The optimizer: schedules at known steps, and updates against the formulas written out."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from saro_jax.config import Config, OptimizerConfig
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.training import optimizer, step
from saro_jax.training.checkpoint import Checkpoints, abstract


def test_moments_on_the_host_give_the_same_numbers(tmp_path):
    mesh, found = meshes.make_mesh(), {}
    for offload in (False, True):
        settings = OptimizerConfig(offload=offload)
        config = Config.model_validate({"data": {"train": "x"}, "optimizer": settings.model_dump()})
        transform = optimizer.make(settings, 10)
        params = jax.device_put(tiny.params(), sharding.shardings(mesh, tiny.params()))
        programs = step.programs(tiny.ARCH, config, "rw", transform)
        state = step.init_state(transform, params, mesh, offload=offload)
        with jax.set_mesh(mesh):
            for _ in range(2):
                state, _ = programs.update(state, jax.tree.map(lambda x: x + 1, state.params))
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer) if x.ndim}
        assert kinds == {"pinned_host" if offload else "device"}
        found[offload] = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, found[False], found[True])
    saved = Checkpoints(tmp_path)
    saved.save(2, state, {})
    restored = step.owned(saved.restore(2, abstract(state))[0])
    saved.close()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_devices_without_memory_on_the_host_are_refused():
    device = SimpleNamespace(
        device_kind="Chip", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    mesh: Any = SimpleNamespace(local_mesh=SimpleNamespace(devices=np.array([device])))
    words = r"^optimizer\.offload=true: Chip has no pinned_host memory, only device; set it to"
    with pytest.raises(ValueError, match=words):
        sharding.check_offload(mesh)
    sharding.check_offload(meshes.make_mesh())


def rates(steps, **options):
    schedule = optimizer.learning_rate(OptimizerConfig(learning_rate=2.0, **options), steps)
    return np.array([np.asarray(schedule(k)) for k in range(steps)])


def test_warm_up_climbs_in_equal_steps_and_learns_from_the_first():
    found = rates(20, warmup_ratio=0.2, schedule="constant")
    np.testing.assert_allclose(found[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(found[4:], 2.0, rtol=1e-6)


def test_without_warm_up_the_first_step_has_the_peak():
    for schedule in ("cosine", "linear", "constant"):
        assert rates(10, warmup_ratio=0.0, schedule=schedule)[0] == pytest.approx(2.0)


def test_one_step_of_warm_up_is_at_the_peak():
    assert rates(10, warmup_ratio=0.1, schedule="constant")[0] == pytest.approx(2.0)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_cosine_and_linear_go_from_the_peak_to_the_floor(floor):
    k = np.arange(8) / 8
    cosine = rates(10, warmup_ratio=0.2, schedule="cosine", min_lr_ratio=floor)[2:]
    expected = 2 * (floor + (1 - floor) * (1 + np.cos(np.pi * k)) / 2)
    np.testing.assert_allclose(cosine, expected, rtol=1e-5)
    linear = rates(10, warmup_ratio=0.2, schedule="linear", min_lr_ratio=floor)[2:]
    np.testing.assert_allclose(linear, 2 * (1 - (1 - floor) * k), rtol=1e-5)


def test_a_run_of_warm_up_only_ends_at_the_peak():
    np.testing.assert_allclose(rates(4, warmup_ratio=1.0), [0.5, 1.0, 1.5, 2.0], rtol=1e-6)


def test_matrices_decay_and_norms_and_biases_do_not():
    tree = tiny.params()
    tree["model"]["layers"]["mlp"]["up_proj"]["bias"] = jnp.zeros((2, 96))
    mask = optimizer.decayed(tree)
    layers = mask["model"]["layers"]
    assert mask["model"]["embed_tokens"]["weight"] and layers["mlp"]["up_proj"]["weight"]
    assert layers["self_attn"]["o_proj"]["weight"]
    assert not layers["mlp"]["up_proj"]["bias"]
    assert not layers["input_layernorm"]["weight"] and not mask["model"]["norm"]["weight"]


PARAMS = {"w": {"weight": jnp.array([[1.0, -2.0], [0.5, 4.0]])}, "norm": {"weight": jnp.ones(2)}}
GRADIENTS = [jax.tree.map(lambda x, f=f: f * x + f, PARAMS) for f in (0.5, -0.2, 0.1)]


def updated(steps=3, **options):
    options = {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 0.1} | options
    transform = optimizer.make(OptimizerConfig(**options), 10)
    params: Any = PARAMS
    state = transform.init(PARAMS)
    for gradient in GRADIENTS[:steps]:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_follows_its_formula():
    b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.05
    found = updated(b1=b1, b2=b2, eps=eps, weight_decay=decay, max_grad_norm=0.0)
    for key, rate in (("w", decay), ("norm", 0.0)):
        x = np.asarray(PARAMS[key]["weight"], np.float64)
        mean = square = 0.0
        for k, gradient in enumerate(GRADIENTS, 1):
            g = np.asarray(gradient[key]["weight"], np.float64)
            mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
            step = (mean / (1 - b1**k)) / (np.sqrt(square / (1 - b2**k)) + eps)
            x = x - 0.1 * (step + rate * x)
        np.testing.assert_allclose(found[key]["weight"], x, rtol=1e-5)


def test_sgd_is_the_clipped_gradient_with_decoupled_decay():
    found = updated(steps=1, name="sgd", weight_decay=0.05, max_grad_norm=1.0)
    gradient = GRADIENTS[0]
    norm = float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient))))
    assert norm > 1
    for key, rate in (("w", 0.05), ("norm", 0.0)):
        x, g = np.asarray(PARAMS[key]["weight"]), np.asarray(gradient[key]["weight"])
        np.testing.assert_allclose(found[key]["weight"], x - 0.1 * (g / norm + rate * x), rtol=1e-5)


def test_a_limit_of_0_does_not_clip():
    found = updated(steps=1, name="sgd", weight_decay=0.0, max_grad_norm=0.0)
    x, g = np.asarray(PARAMS["w"]["weight"]), np.asarray(GRADIENTS[0]["w"]["weight"])
    np.testing.assert_allclose(found["w"]["weight"], x - 0.1 * g, rtol=1e-6)


def test_moments_are_float32_from_the_start_whatever_the_weights_are():
    transform = optimizer.make(OptimizerConfig(), 10)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = transform.init(params)
    after = transform.update(GRADIENTS[0], state, params)[1]
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}


def test_clipping_equals_that_of_optax():
    for most in (0.5, 100.0):
        ours, theirs = optimizer.clip_by_global_norm(most), optax.clip_by_global_norm(most)
        a, b = (t.update(GRADIENTS[0], t.init(PARAMS))[0] for t in (ours, theirs))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), a, b)
