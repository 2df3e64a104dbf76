"""Tests analysis/states.py: packed states equal those of each text alone; positions end steps."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from saro_jax.analysis import states
from saro_jax.models import decoder
from saro_jax.models.attention import Tokens

RESPONSE = "<think>\nThe user wants a lock.\n\nThat is fine.\n</think>\n\nyes"
STEPS = ("The user wants a lock.\n\n", "That is fine.")


def test_states_are_those_of_each_text_alone():
    rng = np.random.default_rng(0)
    texts = [
        states.Marked(rng.integers(3, 300, n).astype(np.int32), (0, n // 2, n - 1))
        for n in (5, 60, 33, 64, 12)
    ]
    params = tiny.params()
    told: list[int] = []
    found = states.read(tiny.ARCH, params, texts, row_length=128, progress=told.append)
    assert sum(told) == 5 and len(told) == 2  # 174 tokens: two rows
    for text, got in zip(texts, found, strict=True):
        assert got.shape == (tiny.ARCH.num_layers + 1, 3, tiny.ARCH.hidden_size)
        n = len(text.ids)
        ids = np.zeros((1, 64), np.int32)
        ids[0, :n] = text.ids
        segment = (np.arange(64) < n).astype(np.int32)[None]
        position = np.arange(64, dtype=np.int32)[None]
        where = Tokens(*map(jnp.asarray, (segment, np.zeros_like(segment), position)))
        at = jnp.asarray([text.at])
        want = decoder.states(tiny.ARCH, params, jnp.asarray(ids), where, at)[:, 0]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_text_that_is_too_long_is_refused():
    text = states.Marked(np.zeros(70, np.int32), (0,))
    with pytest.raises(ValueError, match="does not fit"):
        states.read(tiny.ARCH, tiny.params(), [text], row_length=64)


def test_positions_are_the_ends_of_prompt_and_steps():
    tokenizer = tiny.tokenizer()
    marked = states.step_ends(tokenizer, "open it", RESPONSE, STEPS)
    ends = [str(tokenizer.decode(marked.ids[: at + 1])) for at in marked.at]
    assert ends[0].endswith("<|im_start|>assistant\n")
    assert ends[1].rstrip().endswith("wants a lock.")
    assert ends[2].endswith("That is fine.")
    assert len(marked.ids) == marked.at[-1] + 1
    alone = states.prompt_end(tokenizer, "open it")
    assert alone.at == (len(alone.ids) - 1,)
    np.testing.assert_array_equal(alone.ids, marked.ids[: marked.at[0] + 1])


def test_a_step_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="not in the response: 'nowhere'"):
        states.step_ends(tiny.tokenizer(), "open it", RESPONSE, ["nowhere"])
