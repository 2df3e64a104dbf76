"""What trains: patterns, the split of the tree and back, and what a run may not freeze."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from saro_jax.config import Config
from saro_jax.data.packing import pack
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel.sharding import path_name
from saro_jax.training import loop, optimizer, step, trainable


def config(freeze=None, **parts):
    base = {"data": {"train": "x"}, "model": {"dtype": "float32", "remat": "none"}}
    return Config.model_validate(base | {"train": {"freeze": freeze}} | parts)


def trained(freeze=None, **parts):
    return trainable.trained_names(tiny.ARCH, config(freeze, **parts))


def every():
    return {path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tiny.params())[0]}


def test_what_trains_by_default():
    assert trained() == trained("none") == every()
    assert trained(lora={"rank": 2}) == set()
    assert trained("none", lora={"rank": 2}) == every()


def test_patterns_are_searched_in_names():
    assert every() - trained("mlp") == {name for name in every() if "/mlp/" in name}
    assert trained(["^model/(?!norm)"]) == {"model/norm/weight"}
    both = trained(["embed_tokens", r"layers/.*_proj"])
    assert both == {n for n in every() if "norm" in n}
    assert trained(["embed", "norm"], lora={"rank": 2}) == {n for n in every() if "_proj" in n}


def test_the_head_trains_where_its_table_does():
    def head(freeze, **parts):
        return trainable.trains_head(tiny.ARCH, config(freeze, **parts))

    assert head("mlp") and not head("embed_tokens") and not head(None, lora={"rank": 1})


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            ["model/layers/mlp/up_prj"],
            r"^train.freeze: 'model/layers/mlp/up_prj' matches no parameter; the nearest is "
            "model/layers/mlp/up_proj/weight$",
        ),
        (["mlp", "lm_head"], r"'lm_head' matches no parameter; the nearest is "),
        ("model", r"^train.freeze=model: every parameter is frozen and lora.rank=0, so nothing"),
    ],
)
def test_what_is_refused(freeze, message):
    with pytest.raises(ValueError, match=message):
        trained(freeze)


def test_the_split_copies_nothing_and_joins_again():
    params = tiny.params()
    for freeze in ("none", "mlp", ["embed", "norm"], "^(?!model/norm)"):
        names = trained(freeze)
        mine, frozen = trainable.split(params, names)
        found = {path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(mine)[0]}
        assert found == names
        again = trainable.join(mine, frozen)
        assert jax.tree.structure(again) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
            assert a is b
    assert frozen["model"]["embed_tokens"]["weight"] is params["model"]["embed_tokens"]["weight"]


def test_dtypes():
    parts = {"model": {"frozen_dtype": "bfloat16"}}
    mine, frozen = trainable.abstract(tiny.ARCH, config("mlp", **parts, lora={"rank": 2}))
    assert {leaf.dtype for leaf in jax.tree.leaves(mine)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert set(mine) == {"model", "lora"} and set(frozen["model"]["layers"]) == {"mlp"}


def steps(freeze, count=2, **parts):
    """(params at the start, trained and frozen after `count` steps, optimizer state)."""
    chosen = config(freeze, **parts)
    mesh, params = meshes.make_mesh(), tiny.params()
    transform = optimizer.make(chosen.optimizer, 10, chosen.lora)
    programs = step.programs(tiny.ARCH, chosen, "rw", transform)
    mine, frozen = trainable.start(tiny.ARCH, chosen, params, mesh)
    # Copies: the update donates its state, and the parameters of the start are still wanted.
    mine = jax.tree.map(jnp.copy, mine)
    state = step.init_state(transform, mine, mesh)
    with jax.set_mesh(mesh):
        for k in range(count):
            blocks = list(pack(tiny.items("sft"), range(8), row_length=96, rows=2, layout="shared"))
            gradients = loop.Gradients(programs, state.params, frozen, k)
            loop.run_blocks(mesh, "rw", blocks, None, gradients.add)
            state, _ = programs.update(state, gradients.sum)
    return params, state.params, frozen, state.optimizer


def test_frozen_leaves_stay_and_have_no_moments():
    tiny.folder()
    params, mine, frozen, moments = steps("mlp")
    whole = trainable.join(mine, frozen)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(whole)[0], jax.tree.leaves(params), strict=True
    ):
        same = np.array_equal(np.asarray(a), np.asarray(b))
        assert same == ("/mlp/" in path_name(path)), path_name(path)
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(moments)[0]]
    assert names and not any("/mlp/" in name for name in names)


def test_frozen_or_not_the_rest_takes_the_same_first_step():
    tiny.folder()
    options = {"optimizer": {"max_grad_norm": 0.0, "eps": 1e-3}}
    _, some, _, _ = steps("mlp", 1, **options)
    _, whole, _, _ = steps("none", 1, **options)
    wanted = dict(jax.tree_util.tree_flatten_with_path(whole)[0])
    for path, leaf in jax.tree_util.tree_flatten_with_path(some)[0]:
        np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=1e-6, err_msg=path_name(path))


@pytest.mark.slow
def test_adapters_beside_a_model_that_trains_too():
    tiny.folder()
    params, mine, frozen, _ = steps("mlp", 2, lora={"rank": 2, "dropout": 0.2})
    assert set(frozen["model"]["layers"]) == {"mlp"}
    norm = np.asarray(mine["model"]["norm"]["weight"])
    assert (norm != np.asarray(params["model"]["norm"]["weight"])).any()
    for leaf in jax.tree.leaves(mine["lora"]):
        assert np.asarray(leaf).any()


def test_the_base_of_a_checkpoint_must_be_the_same(tmp_path):
    trainable.check_base(None, None, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"^.*: the weights are not those that the run in "):
        trainable.check_base("a", "b", tmp_path, tmp_path)


def test_adapters_alone_are_exported_only_where_they_are_all_that_was_learnt():
    assert trainable.why_no_peft(tiny.ARCH, config(lora={"rank": 2})) is None
    assert "lora.rank=0" in str(trainable.why_no_peft(tiny.ARCH, config()))
    reason = str(trainable.why_no_peft(tiny.ARCH, config("mlp", lora={"rank": 2})))
    assert reason.startswith("8 weights of the model were trained too (train.freeze), such as ")


def test_adapters_learn_at_their_own_rate():
    tree: Any = {"model": {"w": jnp.ones(3)}, "lora": {"model": {"a": jnp.ones(3)}}}
    chosen = config(
        "none",
        lora={"rank": 1, "learning_rate": 0.5},
        optimizer={"learning_rate": 0.1, "warmup_ratio": 0.5, "max_grad_norm": 0.0},
    )
    transform = optimizer.make(chosen.optimizer, 4, chosen.lora)
    same = optimizer.make(chosen.optimizer, 4)
    state, plain = transform.init(tree), same.init(tree)
    found: Any = None
    wanted: Any = None
    for _ in range(4):
        found, state = transform.update(tree, state, tree)
        wanted, plain = same.update(tree, plain, tree)
        np.testing.assert_array_equal(found["model"]["w"], wanted["model"]["w"])
        np.testing.assert_allclose(found["lora"]["model"]["a"], 5 * wanted["model"]["w"], rtol=1e-6)
    assert optimizer.adapter_ratio(chosen.optimizer, chosen.lora) == 5.0
    assert optax.tree.norm(found) > 0
