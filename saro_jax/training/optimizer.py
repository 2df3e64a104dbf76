"""The optimizer and its learning-rate schedule, from the config."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from saro_jax.config import LoRAConfig, OptimizerConfig
from saro_jax.parallel import sharding
from saro_jax.parallel.sharding import path_name


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then the schedule to `min_lr_ratio`."""
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = round(config.warmup_ratio * steps)
    rest = max(1, steps - warmup)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, config.min_lr_ratio)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, floor, rest)
    else:
        main = optax.constant_schedule(peak)
    if warmup == 0:
        return main
    # Step k of the warm-up uses (k + 1) / warmup of the peak: a step at rate 0 learns nothing.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup])


def decayed(params: Any) -> Any:
    """True for the matrices, which weight decay applies to; norms and biases are left alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in path_name(path) and not path_name(path).endswith("bias"),
        params,
    )


def adapter_ratio(config: OptimizerConfig, lora: LoRAConfig) -> float:
    """The adapters' learning rate over that of the rest: 1.0 where they share it."""
    return (lora.learning_rate or config.learning_rate) / config.learning_rate


def scale_adapters(ratio: float) -> optax.GradientTransformation:
    """Multiply the updates of adapters: the schedule of the rest at another peak."""

    def scaled(path, update):
        return ratio * update if path_name(path).startswith("lora/") else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, as one factor: its two operations a leaf make XLA on a CPU keep
    a clipped copy of all gradients, where a product is computed again by whoever reads it."""

    def clipped(gradients, _):
        norm = optax.tree.norm(gradients)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return optax.stateless(clipped)


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with float32 moments, as the gradients are, whatever the weights are.

    Made from bfloat16 weights they would begin as bfloat16 and be float32 after the first step.
    """
    inner = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)

    def init(params):
        return inner.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    return optax.GradientTransformation(init, inner.update)


def make(
    config: OptimizerConfig, steps: int, lora: LoRAConfig | None = None
) -> optax.GradientTransformation:
    """Clipping by the global norm (0 = off), then AdamW or plain SGD with decoupled decay.

    All of it over the trained leaves; those under "lora/" learn at `lora.learning_rate`.
    """
    schedule = learning_rate(config, steps)
    parts = []
    if config.max_grad_norm > 0:
        parts.append(clip_by_global_norm(config.max_grad_norm))
    if config.name == "adamw":
        parts.append(adam(config))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(schedule))
    if lora is not None and adapter_ratio(config, lora) != 1.0:
        parts.append(scale_adapters(adapter_ratio(config, lora)))
    whole = optax.chain(*parts)
    return offloaded(whole) if config.offload else whole


def offloaded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with its moments in the host's memory, moved to the devices for an update."""

    def init(params):
        return sharding.to_memory(inner.init(params), jax.memory.Space.Host)

    def update(updates, state, params=None):
        here = sharding.to_memory(state, jax.memory.Space.Device)
        updates, new = inner.update(updates, here, params)
        return updates, sharding.to_memory(new, jax.memory.Space.Host)

    return optax.GradientTransformation(init, update)
