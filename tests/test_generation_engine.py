"""Generation: greedy equals transformers, log-probs equal a full forward, samples are their own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_huggingface import FAMILIES, SIZES, make_folder

from saro_jax.generation import engine, programs
from saro_jax.generation.engine import Completion, generate
from saro_jax.models import decoder, huggingface
from saro_jax.models.architecture import from_hf
from saro_jax.models.attention import Tokens

LENGTHS = (5, 71, 1, 64, 30)  # within a chunk, beyond one, exactly one
NEW = 32


def prompts_of(arch, lengths=LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, arch.vocab_size, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def tiny():
    """(arch, params, prompts) of a random model whose greedy text does not settle at once."""
    arch = from_hf(SIZES | {"num_hidden_layers": 2} | FAMILIES["llama"])
    params = jax.tree.map(lambda x: x * 5, decoder.init_params(arch, jax.random.key(0)))
    return arch, params, prompts_of(arch)


@partial(jax.jit, static_argnums=(0, 3))
def log_probs(arch, params, tokens, dtype):
    """Log-probs [B, T - 1] of right-padded rows' tokens after the first, by one forward pass."""
    ones = jnp.ones_like(tokens)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = decoder.forward(arch, params, tokens, Tokens(ones, 0 * ones, position), dtype=dtype)
    logp = jax.nn.log_softmax(decoder.logits(arch, params, hidden)[:, :-1])
    return jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0]


def check_scores(arch, params, prompts, completions, dtype=jnp.float32, atol=1e-4) -> None:
    rows = np.zeros((len(prompts), max(LENGTHS) + NEW), np.int32)
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        whole = np.concatenate([prompt, completion.ids])
        row[: len(whole)] = whole
    for logp, prompt, completion in zip(
        np.asarray(log_probs(arch, params, rows, dtype)), prompts, completions, strict=True
    ):
        want = logp[len(prompt) - 1 : len(prompt) - 1 + len(completion.ids)]
        np.testing.assert_allclose(completion.logps, want, atol=atol)


def same(a: list[Completion], b: list[Completion]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.ids, y.ids)
        np.testing.assert_allclose(x.logps, y.logps, atol=1e-4)
        assert x.finish == y.finish


@pytest.mark.parametrize(
    "family",
    [
        "llama3-tied",
        "gemma2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3", "mistral", "qwen2", "gemma3")
        ),
    ],
)
def test_greedy_equals_transformers_and_a_full_forward(family: str, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    make_folder(tmp_path, FAMILIES[family], scale=0.3)
    arch = huggingface.load_architecture(tmp_path)
    params = huggingface.load_params(tmp_path, arch, jnp.float32)
    prompts = prompts_of(arch)
    ours = generate(arch, params, prompts, max_new_tokens=NEW, batch_size=8, stop_ids=[2])
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor(prompt[None].astype(np.int64)),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=2,
            pad_token_id=0,
        )[0, len(prompt) :].numpy()
        np.testing.assert_array_equal(completion.ids, theirs)
    check_scores(arch, params, prompts, ours)


@pytest.mark.parametrize("unroll", [True, False], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_equal_a_full_forward(tiny, unroll: bool, temperature: float):
    arch, params, prompts = tiny
    found = generate(
        arch,
        params,
        prompts,
        max_new_tokens=NEW,
        batch_size=8,
        temperature=temperature,
        top_k=20,
        stop_ids=[2],
        unroll=unroll,
    )
    check_scores(arch, params, prompts, found)
    for completion in found:
        assert completion.ids.dtype == np.int32
        assert completion.logps.dtype == np.float32


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_depends_on_its_own_request_alone(tiny, temperature: float):
    arch, params, prompts = tiny

    def run(prompts: list[np.ndarray], **changed: Any) -> list[Completion]:
        options: dict[str, Any] = {"batch_size": 8, "temperature": temperature, "top_p": 0.95}
        return generate(
            arch, params, prompts, max_new_tokens=NEW, stop_ids=[2, 7], **options | changed
        )

    whole = run(prompts)
    same(run(prompts, batch_size=2), whole)
    # Request i keeps its place while every other prompt is another one.
    others = [prompts[2] if i != 3 else prompt for i, prompt in enumerate(prompts)]
    same([run(others)[3]], [whole[3]])
    again, other = run(prompts, seed=0), run(prompts, seed=1)
    same(again, whole)
    differs = any(not np.array_equal(a.ids, b.ids) for a, b in zip(whole, other, strict=True))
    assert differs == (temperature > 0)


def test_equal_requests_draw_different_samples(tiny):
    arch, params, prompts = tiny
    found = generate(
        arch,
        params,
        [prompts[1]] * 5,
        max_new_tokens=NEW,
        batch_size=8,
        temperature=1.0,
        stop_ids=[],
    )
    assert len({completion.ids.tobytes() for completion in found}) == 5


def test_stop_ends_a_row_and_no_other(tiny):
    arch, params, prompts = tiny

    def run(stop_ids: list[int]) -> list[Completion]:
        return generate(arch, params, prompts, max_new_tokens=NEW, batch_size=8, stop_ids=stop_ids)

    free = run([])
    assert all(c.finish == "length" and len(c.ids) == len(c.logps) == NEW for c in free)
    stop = int(free[0].ids[4])
    for before, after in zip(free, run([stop, 2]), strict=True):
        where = np.flatnonzero(np.isin(before.ids, [stop, 2]))
        n = where[0] + 1 if len(where) else NEW
        assert after.finish == ("stop" if len(where) else "length")
        np.testing.assert_array_equal(after.ids, before.ids[:n])
        np.testing.assert_allclose(after.logps, before.logps[:n], atol=1e-5)


def test_a_stop_at_the_first_and_at_the_last_token(tiny):
    arch, params, prompts = tiny

    def run(new: int, stop_ids: list[int]) -> Completion:
        options: dict[str, Any] = {"max_new_tokens": new, "batch_size": 1, "stop_ids": stop_ids}
        return generate(arch, params, prompts[:1], **options)[0]

    free = run(2, [])
    assert free.ids[0] != free.ids[1]
    for at in (0, 1):
        found = run(2, [int(free.ids[at])])
        assert found.finish == "stop"
        np.testing.assert_array_equal(found.ids, free.ids[: at + 1])


def test_one_token_and_no_prompt(tiny):
    arch, params, prompts = tiny
    one = generate(arch, params, prompts, max_new_tokens=1, batch_size=2, stop_ids=[])
    assert [len(c.ids) for c in one] == [1] * len(prompts)
    assert generate(arch, params, [], max_new_tokens=1, batch_size=2, stop_ids=[]) == []


def test_bfloat16_scores_its_own_tokens(tiny):
    arch, params, prompts = tiny
    found = generate(
        arch, params, prompts, max_new_tokens=NEW, batch_size=8, stop_ids=[], dtype=jnp.bfloat16
    )
    # Against the forward pass in bfloat16 too; the rest is rounding in another order.
    check_scores(arch, params, prompts, found, dtype=jnp.bfloat16, atol=0.2)


def test_cast_leaves_norms_alone(tiny):
    _, params, _ = tiny
    cast = engine.cast_matrices(params, jnp.bfloat16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        norm = "norm" in jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if norm else jnp.bfloat16)
    assert (
        engine.cast_matrices(params, jnp.float32)["model"]["embed_tokens"]["weight"]
        is (params["model"]["embed_tokens"]["weight"])
    )


def test_batches_are_even_and_sorted():
    lengths = [3, 9, 1, 7, 7, 2, 8]
    found = engine.batches(lengths, 3)
    assert found == [[1, 6, 3], [4, 0, 5], [2]]
    assert [len(batch) for batch in engine.batches(list(range(60)), 32)] == [30, 30]
    assert engine.batches([], 3) == []


def test_few_cache_sizes():
    sizes = {engine.cache_slots(n) for n in range(1, 8193)}
    assert all(engine.cache_slots(n) >= n for n in range(1, 8193))
    assert all(size % programs.CHUNK == 0 for size in sizes)
    assert len(sizes) == 24
    assert engine.cache_slots(200) == 256


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0; allowed: >= 1"),
        ({"batch_size": 0}, "batch_size: 0; allowed: >= 1"),
        ({"temperature": -1.0}, "temperature: -1.0; allowed: >= 0"),
        ({"top_p": 0.0}, "top_p: 0.0; allowed: above 0, up to 1"),
        ({"top_k": -1}, "top_k: -1; allowed: >= 0"),
        ({"prompts": [np.array([], np.int32)]}, "prompt 0: int32 of shape (0,)"),
        ({"prompts": [np.array([3, 96])]}, "prompt 0: id 96; allowed: 0 to 95"),
        ({"prompts": [np.array([-1])]}, "prompt 0: id -1; allowed: 0 to 95"),
        (
            {"max_new_tokens": 125},
            "prompt 0: 5 tokens and max_new_tokens=125 exceed the model's 128",
        ),
    ],
)
def test_errors(tiny, changed: dict, message: str):
    arch, params, prompts = tiny
    options = {"prompts": prompts, "max_new_tokens": 4, "batch_size": 2, "stop_ids": []}
    with pytest.raises(ValueError) as error:
        generate(arch, params, **options | changed)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
