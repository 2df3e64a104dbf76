"""Looking rows of a table up: on eight devices as on one, forward and backward."""

import os
import subprocess
import sys

CHILD = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from saro_jax.models import embedding
from saro_jax.parallel import mesh as meshes, sharding
rng = np.random.default_rng(0)
table = jnp.asarray(rng.normal(size=(48, 16)), jnp.float32)
tokens = jnp.asarray(rng.integers(0, 48, (8, 6)), jnp.int32)
weight = jnp.asarray(rng.normal(size=(8, 6, 16)), jnp.float32)
def total(table):
    x = embedding.lookup(table, tokens, jnp.float32)
    return jnp.sum(x * weight), x
(_, wanted), dwanted = jax.value_and_grad(total, has_aux=True)(table)
np.testing.assert_array_equal(wanted, table[tokens])
for sizes in (dict(fsdp=8), dict(fsdp=2, data=2, tensor=2), dict(fsdp=2, sequence=2, tensor=2)):
    mesh = meshes.make_mesh(**sizes)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(total, has_aux=True))
        place = NamedSharding(mesh, P("tensor", sharding.SHARDS))
        placed = jax.device_put(table, place)
        (_, x), gradient = run(placed)
        text = run.lower(placed).compile().as_text()
    np.testing.assert_array_equal(x, wanted)
    np.testing.assert_allclose(gradient, dwanted, rtol=1e-6, atol=1e-6)
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(sharding.ROWS, "sequence")), 3)
    assert gradient.sharding.is_equivalent_to(place, 2)
    assert "f32[48,16]" not in text, sizes  # the table itself is nowhere whole
"""


def test_rows_are_exchanged_and_the_table_stays_cut():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
