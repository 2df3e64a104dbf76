"""Sharding rules: every parameter and moment of every family has one, unknown names have none."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from saro_jax.config import LoRAConfig, OptimizerConfig
from saro_jax.models import decoder, lora
from saro_jax.models.architecture import from_hf
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel import sharding
from saro_jax.parallel.sharding import SHARDS, WIDE
from saro_jax.training import optimizer


def mesh_of(**sizes) -> Any:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in meshes.AXES), meshes.AXES)


MESH = mesh_of(data=2, fsdp=2, tensor=2)
FAMILIES = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "gemma2": {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {"model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh"},
}


def shapes(family="llama"):
    return decoder.abstract_params(from_hf(tiny.CONFIG | FAMILIES[family]))


def specs(tree):
    found = {}
    for path, place in jax.tree_util.tree_flatten_with_path(sharding.shardings(MESH, tree))[0]:
        found[sharding.path_name(path)] = place.spec
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_cut_along_both_axes_and_the_rest_whole(family):
    for name, spec in specs(shapes(family)).items():
        if "norm" in name:
            assert spec == P(), name
        elif name.endswith("bias"):
            assert spec in (P(), P(None, "tensor")), name
        else:
            axes = [(part,) if isinstance(part, str) else part or () for part in spec]
            assert {axis for part in axes for axis in part} == {*SHARDS, "tensor"}, name


def test_the_table():
    found = specs(shapes("biases"))
    assert found["model/embed_tokens/weight"] == P("tensor", SHARDS)
    for name in ("self_attn/q_proj", "self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj"):
        cut = P(None, SHARDS, "tensor") if "attn" in name else P(None, None, WIDE)
        assert found[f"model/layers/{name}/weight"] == cut
        assert found[f"model/layers/{name}/bias"] == P(None, "tensor")
    for name in ("self_attn/o_proj", "mlp/down_proj"):
        cut = P(None, "tensor", SHARDS) if "attn" in name else P(None, WIDE, None)
        assert found[f"model/layers/{name}/weight"] == cut
        assert found[f"model/layers/{name}/bias"] == P()


def test_adapters_are_cut_like_their_matrix_and_never_along_their_rank():
    arch = from_hf(tiny.CONFIG | FAMILIES["untied"])
    config = LoRAConfig(rank=3, targets="all")  # no axis divides 3
    adapters = lora.abstract(config, arch, shapes("untied"), jnp.float32)
    found = specs({"lora": adapters})
    matrices = specs(shapes("untied"))
    assert len(found) == 16
    for name, spec in found.items():
        matrix = matrices[name.removeprefix("lora/").rpartition("/")[0] + "/weight"]
        rows, columns = matrix[-2:] if "layers" in name else matrix[::-1]
        wanted = (rows, None) if name.endswith("lora_A") else (None, columns)
        assert tuple(spec)[-2:] == wanted, name


def test_layers_are_never_cut():
    for name, spec in specs(shapes("biases")).items():
        if name.startswith("model/layers") and spec != P():
            assert spec[0] is None, name


def test_a_parameter_without_a_rule_is_an_error():
    tree = shapes() | {"adapter": {"weight": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    with pytest.raises(ValueError, match=r"^no sharding rule for parameter 'adapter/weight'"):
        sharding.shardings(MESH, tree)
    # A name that only contains a known one has no rule either.
    with pytest.raises(ValueError, match="no sharding rule"):
        sharding.spec("model/layers/mlp/gate_proj/weight_scale", (2, 4), MESH.shape)


def test_scalars_are_replicated():
    assert sharding.spec("anything", (), MESH.shape) == P()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizer_moments_lie_where_their_parameters_do(name):
    params = shapes("untied")
    state = jax.eval_shape(optimizer.make(OptimizerConfig(name=name), 10).init, params)
    found, expected = specs(state), specs(params)
    moments = {key: spec for key, spec in found.items() if not key.endswith("count")}
    assert len(moments) == (2 * len(expected) if name == "adamw" else 0)
    for key, spec in moments.items():
        owner = next(param for param in expected if key.endswith(param))
        assert spec == expected[owner], key


def test_an_axis_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"64 does not divide by mesh\.fsdp=7$"):
        sharding.shardings(mesh_of(fsdp=7), shapes())
    with pytest.raises(ValueError, match=r"does not divide by mesh\.fsdp=4 x mesh\.sequence=32$"):
        sharding.shardings(mesh_of(fsdp=4, sequence=32), shapes())


def test_sequence_shards_cut_the_weights_too():
    name, shape = "model/layers/self_attn/q_proj/weight", (2, 64, 96)
    place = jax.sharding.NamedSharding(mesh_of(fsdp=2, sequence=4, tensor=2), P(None, SHARDS))
    assert place.shard_shape(shape) == (2, 8, 96)
    assert sharding.spec(name, shape, place.mesh.shape) == P(None, SHARDS, "tensor")


def test_a_vocabulary_that_does_not_divide_leaves_the_tables_cut_along_their_width():
    sizes = mesh_of(fsdp=2, tensor=8).shape  # 300 tokens
    for name in ("model/embed_tokens/weight", "lm_head/weight"):
        assert sharding.spec(name, (300, 64), sizes) == P(None, (*SHARDS, "tensor"))
    assert sharding.spec("lora/lm_head/lora_B", (4, 300), sizes) == P()
    assert sharding.spec("lora/lm_head/lora_B", (4, 304), sizes) == P(None, "tensor")
    with pytest.raises(ValueError, match=r"96 does not divide by mesh\.tensor=64$"):
        sharding.shardings(mesh_of(tensor=64), shapes())


def test_heads_that_do_not_divide_are_refused():
    sharding.check_heads(12, mesh_of(fsdp=8, tensor=2, sequence=3).shape)
    words = r"^mesh\.tensor=2 x mesh\.sequence=4: the model's 12 attention heads .* divide by 8$"
    with pytest.raises(ValueError, match=words):
        sharding.check_heads(12, mesh_of(fsdp=8, tensor=2, sequence=4).shape)


def test_rows_are_cut_over_data_and_fsdp():
    assert sharding.rows(meshes.make_mesh()).spec == P(("slice", "data", "fsdp"))


def test_activations_are_constrained_only_where_a_mesh_is_set():
    def program():
        return jax.jit(sharding.constrain_rows).lower(jnp.zeros((8, 4, 2))).as_text()

    assert "sharding_constraint" not in program()
    with jax.set_mesh(meshes.make_mesh()):
        assert "sharding_constraint" in program()
