"""Checkpoints: training state, data iterator and config, written by Orbax as training goes on.

Every process of a run calls every function here: each writes and reads the shards of its own
devices, and the first the rest. A checkpoint does not know how many processes or what mesh wrote
it; `restore` puts it where the shardings of the state it is given say.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from saro_jax.parallel import distributed

STATE, DATA = "state", "data"
# Bytes that are being encoded and written at one time. Without a bound Orbax holds a second copy of
# the state; on a CPU, where the encoder shares the cores, the bounded one is the faster too.
WRITING = 2.5e8


class Checkpoints:
    """The checkpoints of one output folder; a resource: `close` waits for what is being written.

    A checkpoint appears under its step number only when it is complete (Orbax renames it), so a run
    killed at any moment leaves none that is half-written.
    """

    def __init__(self, folder: Path, keep: int = 2, state: Any = None):
        """state: what will be saved (arrays or their shapes and shardings), to bound the memory."""
        self._folder = folder.absolute()
        # Orbax refuses an array larger than the bound.
        largest = max((_shard_bytes(leaf) for leaf in jax.tree.leaves(state)), default=0)
        bound = max(WRITING, 1.01 * largest)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                STATE: ocp.StandardCheckpointHandler(save_concurrent_gb=bound / 1e9),  # type: ignore[arg-type]  # any number works
                DATA: ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        # One listing of the folder for all: another host's may be older.
        return distributed.first("newest checkpoint", self._manager.latest_step)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Start writing; returns once the arrays are copied. A step that is there already stays.

        On a CPU returns when all is written: there is no other memory to copy to, so a step beside
        it would keep the old state and the new one, and writing takes its cores from it anyway.
        """
        if step in self._manager.all_steps():
            return
        items = {STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave(data)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if jax.default_backend() == "cpu":
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """State in the shapes, dtypes and shardings of `abstract_state`, and the data beside it."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    STATE: ocp.args.StandardRestore(abstract_state),
                    DATA: ocp.args.JsonRestore(),
                }
            ),
        )
        return restored[STATE], restored[DATA]

    def rewind(self, step: int) -> int | None:
        """Remove the checkpoints after `step`; the newest that is left, None where none is."""
        self._manager.wait_until_finished()
        kept = [at for at in self.steps() if at <= step]
        if not kept:
            return None
        for at in self.steps():
            if at > step:
                self._manager.delete(at)
        return kept[-1]

    def restore_params(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The parameters of a checkpoint alone, without the optimizer state beside them."""
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            shardings,
        )
        folder = self._folder / str(step) / STATE
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item={"params": wanted},
                    restore_args=ocp.checkpoint_utils.construct_restore_args({"params": wanted}),
                    partial_restore=True,
                ),
            )
        return restored["params"]

    def read_data(self, step: int) -> dict[str, Any]:
        """The data beside the state of a checkpoint."""
        items = {DATA: ocp.args.JsonRestore()}
        return self._manager.restore(step, args=ocp.args.Composite(**items))[DATA]

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def abstract(state: Any) -> Any:
    """The state's shapes, dtypes and shardings, without its arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def iterator_state(iterator: Any) -> dict[str, Any]:
    """A Grain iterator's state as JSON data."""
    state = iterator.get_state()
    return json.loads(state) if isinstance(state, bytes) else state
