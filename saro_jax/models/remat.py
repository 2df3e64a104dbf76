"""What the backward pass of a layer finds stored, and what it computes again.

A loop over layers stores what is named here for all layers. XLA's CPU backend turns a bfloat16
buffer that a loop writes or reads by index into float32, whole, so there bfloat16 is stored as the
integers of its bits, which it leaves alone: half the memory, and no conversion.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = ("attention", "logsumexp")  # what attention's backward pass needs of its forward one
# By policy; the input of the layer is always stored.
STORED = {
    "full": ("input",),
    "attention": ("input", *ATTENTION),
    "dots": ("input", "q", "k", "v", *ATTENTION, "gate", "up"),
}


def store(x: jax.Array, name: str) -> jax.Array:
    """x, from what is stored under `name` where the policy in use lists it."""
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint16)
    return _read(checkpoint_name(bits, name), x)


def recompute(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The loop's body that stores what the policy lists and computes the rest again."""
    if policy == "none":
        return body
    save = jax.checkpoint_policies.save_only_these_names(*STORED[policy])
    return jax.checkpoint(body, policy=save, prevent_cse=False)


@jax.custom_vjp
def _read(bits: jax.Array, x: jax.Array) -> jax.Array:
    """The stored value of x; its gradient is that of x, which itself need not be there."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def _read_fwd(bits, x):
    return _read(bits, x), None


def _read_bwd(_, dx):
    return None, dx


_read.defvjp(_read_fwd, _read_bwd)
