"""Adapters: their formula, gradients, dropout, scale, the merged and the PEFT export.

Legend: B rows, T tokens, S scored positions, D hidden, V vocabulary, r rank.
"""

import importlib.util
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from saro_jax.config import LAYER_PROJECTIONS, PROJECTIONS, Config, LoRAConfig
from saro_jax.data.packing import pack
from saro_jax.models import decoder, huggingface, lora
from saro_jax.models.architecture import from_hf
from saro_jax.models.attention import Tokens
from saro_jax.objectives.logprobs import token_scores
from saro_jax.training import trainable
from saro_jax.training.scoring import score_tokens

ALL = LoRAConfig(rank=4, alpha=6.0, targets="all")
UNTIED = from_hf(tiny.CONFIG | {"tie_word_embeddings": False})
IDS = jnp.asarray(np.random.default_rng(5).integers(3, 300, (2, 20)), jnp.int32)
WHERE = Tokens(jnp.ones_like(IDS), 0 * IDS, jnp.arange(20, dtype=jnp.int32)[None].repeat(2, 0))


@cache
def base(arch=UNTIED):
    tiny.folder()
    return tiny.params(arch=arch)


@cache
def tree(arch=UNTIED, config=None, filled=True):
    """Adapters with a B that is not 0, unless `filled` is False."""
    config = ALL if config is None else config
    shapes = lora.abstract(config, arch, base(arch), jnp.float32)
    found = lora.init(shapes, seed=3)
    if not filled:
        return found
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), found
    )


def logits(arch, params, adapters=None, dtype=jnp.float32):
    hidden = decoder.forward(arch, params, IDS, WHERE, dtype=dtype, adapters=adapters)
    head = None if adapters is None else adapters.of_head()
    return decoder.logits(arch, params, hidden, head)


def merged(params, adapters, scale):
    """W + scale A B, the plain formula, for every matrix that has an adapter."""
    out = jax.tree.map(lambda x: x, params)
    for name, leaves in lora.matrices(adapters):
        *where, last = name.split(".")
        parent = out
        for step in where:
            parent = parent[step]
        delta = scale * leaves["lora_A"] @ leaves["lora_B"]
        if last == "lm_head":
            delta = delta.T
        parent[last] = parent[last] | {"weight": parent[last]["weight"] + delta}
    return out


def bound(config, leaves, key=None) -> lora.Adapters:
    found = lora.bind(config, leaves, key)
    assert found is not None
    return found


def test_a_new_adapter_has_pefts_start():
    found = dict(lora.matrices(tree(filled=False)))
    assert len(found) == 8
    for name, leaves in found.items():
        a = np.asarray(leaves["lora_A"])
        bound = 1 / np.sqrt(a.shape[-2])
        assert 0.8 * bound < np.abs(a).max() <= bound and abs(a.mean()) < 0.2 * bound, name
        assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.15), name
        assert not np.asarray(leaves["lora_B"]).any()
    one, other = (lora.init(lora.abstract(ALL, UNTIED, base(), jnp.float32), s) for s in (3, 9))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(tree(filled=False)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one["lm_head"]["lora_A"] != other["lm_head"]["lora_A"]).all()
    up = lora.init(
        lora.abstract(LoRAConfig(rank=4, targets="up_proj"), UNTIED, base(), "float32"), 3
    )
    np.testing.assert_array_equal(
        up["model"]["layers"]["mlp"]["up_proj"]["lora_A"],
        one["model"]["layers"]["mlp"]["up_proj"]["lora_A"],
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_of_zero_are_the_base_bit_by_bit(dtype):
    zero = bound(ALL, tree(filled=False))
    plain, adapted = logits(UNTIED, base(), dtype=dtype), logits(UNTIED, base(), zero, dtype)
    np.testing.assert_array_equal(plain, adapted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_adapters_equal_the_merged_weights(family):
    extra = {} if family == "llama" else {"model_type": family}
    if family == "gemma2":
        extra |= {"hidden_act": "gelu_pytorch_tanh"}
    arch = from_hf(tiny.CONFIG | {"tie_word_embeddings": False} | extra)
    adapted = logits(arch, base(arch), bound(ALL, tree(arch)))
    whole = logits(arch, merged(base(arch), tree(arch), 1.5))
    assert np.abs(logits(arch, base(arch)) - whole).max() > 0.1
    np.testing.assert_allclose(adapted, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_those_of_the_merged_weights(remat):
    (block,) = pack(tiny.items("preference"), range(8), row_length=300, rows=8, layout="shared")
    factors = jnp.asarray(np.random.default_rng(1).normal(size=block.valid.shape), jnp.float32)

    def value(params, adapters, **options):
        scores = score_tokens(
            UNTIED, params, block, dtype=jnp.float32, adapters=adapters, **options
        )
        return jnp.sum(jnp.where(block.valid, scores.logp * factors, 0.0))

    def beside(low):
        adapters = bound(ALL, low)
        return value(base(), adapters, remat=remat, train_head=False)

    def inside(low):
        return value(merged(base(), low, 1.5), None, remat="none")

    found, expected = (jax.jit(jax.value_and_grad(f))(tree()) for f in (beside, inside))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    wanted = dict(jax.tree_util.tree_flatten_with_path(expected[1])[0])
    for path, g in jax.tree_util.tree_flatten_with_path(found[1])[0]:
        limit = 1e-5 * np.abs(wanted[path]).max()
        assert limit > 0
        np.testing.assert_allclose(g, wanted[path], rtol=0, atol=limit, err_msg=str(path))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_head_adapter_and_a_frozen_head_in_chunks(softcap):
    rng = np.random.default_rng(0)
    hidden, head, u, b = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((3, 37, 16), (211, 16), (3, 37, 4), (4, 211))
    )
    target = jnp.asarray(rng.integers(0, 200, (3, 37)), jnp.int32)
    valid = jnp.arange(37)[None] < jnp.asarray([37, 0, 21])[:, None]

    def chunked(hidden, head, u, b, train_head=True):
        found = token_scores(
            hidden, head, target, valid, softcap=softcap, chunk=15, low_rank=(u, b),
            train_head=train_head,
        )  # fmt: skip
        return jnp.sum(found.logp * jnp.sin(jnp.arange(37.0)))

    def plain(hidden, head, u, b):
        x = decoder.soft_cap(hidden @ head.T + u @ b, softcap)
        logp = jnp.take_along_axis(jax.nn.log_softmax(x), target[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(valid, logp, 0.0) * jnp.sin(jnp.arange(37.0)))

    every = jax.value_and_grad(plain, (0, 1, 2, 3))(hidden, head, u, b)
    found = jax.value_and_grad(chunked, (0, 1, 2, 3))(hidden, head, u, b)
    for a, c in zip(jax.tree.leaves(found), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5 * np.abs(c).max())
    frozen = jax.grad(lambda *x: chunked(*x, train_head=False), (0, 1, 2, 3))(hidden, head, u, b)
    assert not frozen[1].any()
    for k in (0, 2, 3):
        np.testing.assert_array_equal(frozen[k], found[1][k])


def flops(low, **options):
    """Products of one gradient with respect to `low` alone, from the compiled program."""
    (block,) = pack(tiny.items("sft"), range(8), row_length=300, rows=4, layout="shared")

    def value(low):
        trained, adapters = low.get("base", base()), bound(ALL, low["lora"])
        return score_tokens(
            UNTIED, trained, block, dtype=jnp.float32, remat="none", adapters=adapters, **options
        ).logp.sum()

    compiled = jax.jit(jax.grad(value)).lower(low).compile()
    return compiled.as_text()


def test_no_gradient_of_a_frozen_matrix_is_computed():
    frozen = flops({"lora": tree()}, train_head=False)
    whole = flops({"base": base(), "lora": tree()})
    # [D, F], [F, D] and [V, D] as results of products: weight gradients of the MLP and the head.
    for shape in ("f32[64,96]{1,0} dot(", "f32[96,64]{1,0} dot(", "f32[300,64]{1,0} dot("):
        assert shape in whole, shape
        assert shape not in frozen, shape


@pytest.mark.parametrize(("rslora", "expected"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_scale(rslora, expected):
    assert lora.scale(LoRAConfig(rank=4, alpha=6.0, rslora=rslora)) == expected


def test_targets():
    assert lora.targets(LoRAConfig(rank=1)) == LAYER_PROJECTIONS
    assert lora.targets(LoRAConfig(rank=1, targets="all")) == PROJECTIONS
    assert lora.targets(LoRAConfig(rank=1, targets=["v_proj", "q_proj"])) == ("q_proj", "v_proj")
    one = lora.abstract(LoRAConfig(rank=2, targets="o_proj"), UNTIED, base(), jnp.float32)
    assert [name for name, _ in lora.matrices(one)] == ["model.layers.self_attn.o_proj"]
    assert lora.abstract(LoRAConfig(), UNTIED, base(), jnp.float32) == {}


def test_dropout_hides_a_share_of_the_input_and_keeps_the_mean():
    x = jnp.ones((64, 64, 8))
    low = lora.LowRank(jnp.eye(8), jnp.eye(8), 2.0, 0.25, jax.random.key(0))
    found = np.asarray(low.down(x))
    assert set(np.unique(found.round(5))) == {0.0, np.float32(2.66667)}
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert found.mean() == pytest.approx(2.0, abs=0.03)
    np.testing.assert_array_equal(low._replace(key=None).down(x), 2.0)


def test_dropout_differs_between_layers_matrices_and_keys_and_is_off_without_one():
    config = ALL.model_copy(update={"dropout": 0.5})
    adapters = bound(config, tree(), jax.random.key(1))
    layers = [jax.tree.map(lambda x, i=i: x[i], adapters.layers()) for i in (0, 1)]
    low = [adapters.of_layer(layer, jnp.asarray(i)) for i, layer in enumerate(layers)]
    keys = [one.key for layer in low for block in layer.values() for one in block.values()]
    head = adapters.of_head()
    assert head is not None
    keys.append(head.key)
    assert (
        len({tuple(np.asarray(jax.random.key_data(key))) for key in keys if key is not None}) == 15
    )
    first, again = logits(UNTIED, base(), adapters), logits(UNTIED, base(), adapters)
    np.testing.assert_array_equal(first, again)
    other = logits(UNTIED, base(), bound(config, tree(), jax.random.key(2)))
    assert (np.abs(first - other) > 0).mean() > 0.9
    off = logits(UNTIED, base(), bound(config, tree()))
    np.testing.assert_array_equal(off, logits(UNTIED, base(), bound(ALL, tree())))
    # A key without dropout is never read.
    assert bound(ALL, tree(), jax.random.key(1)).key is None


# ---- exports -------------------------------------------------------------------------------------


@cache
def source(tied):
    return tiny.write_model(tiny.folder() / f"lora_{tied}", config={"tie_word_embeddings": tied})


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_folder_has_the_logits_of_the_adapters(tied, tmp_path):
    arch = huggingface.load_architecture(source(tied))
    params = huggingface.load_params(source(tied), arch, jnp.float32)
    adapters = bound(ALL, tree(arch))
    huggingface.save(params, arch, source(tied), tmp_path / "out", adapters=adapters)
    again = huggingface.load_architecture(tmp_path / "out")
    assert not again.tie_word_embeddings, "an adapter of the output unties it"
    loaded = huggingface.load_params(tmp_path / "out", again, jnp.float32)
    ours, theirs = logits(arch, params, adapters), logits(again, loaded)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5)
    files = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(source(tied) / "model.safetensors")
    up = adapters.tree["model"]["layers"]["mlp"]["up_proj"]
    delta = 1.5 * np.asarray(up["lora_A"])[1] @ np.asarray(up["lora_B"])[1]
    key = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(files[key], before[key] + delta.T, rtol=0, atol=1e-6)
    for name, value in before.items():
        if "norm" in name or "embed" in name:
            np.testing.assert_array_equal(files[name], value)


# What peft calls in transformers, on the way to the logits compared here.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (True, {"targets": "all", "rslora": True, "alpha": 3.0}),
        (False, {"targets": ["q_proj", "down_proj", "lm_head"], "alpha": 2.5}),
    ],
)
def test_peft_loads_the_adapters_with_equal_logits(tied, options, tmp_path):
    for package in ("torch", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: nothing reads the PEFT folder")
    import torch
    from peft import PeftModel  # pyright: ignore[reportMissingImports]  (may be missing)
    from transformers import AutoModelForCausalLM

    parts = {"rank": 4} | options
    config = Config.model_validate(
        {"data": {"train": "x"}, "model": {"path": str(source(tied))}, "lora": parts}
    )
    arch = huggingface.load_architecture(source(tied))
    params = huggingface.load_params(source(tied), arch, jnp.float32)
    low = jax.tree.map(lambda x: x, tree(arch))
    wanted = lora.abstract(config.lora, arch, params, jnp.float32)
    low = jax.tree_util.tree_map_with_path(
        lambda path, _: dict(jax.tree_util.tree_flatten_with_path(low)[0])[path], wanted
    )
    adapters = bound(config.lora, low)
    settings = trainable.peft_settings(config, source(tied))
    huggingface.save_peft(adapters, settings, tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        named["base_model_name_or_path"], dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        before = model(torch.tensor(np.asarray(IDS))).logits.numpy()
        adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
        theirs = adapted(torch.tensor(np.asarray(IDS))).logits.numpy()
    ours = logits(arch, params, adapters)
    assert np.abs(before - ours).max() > 0.1
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
