"""Checkpoints of one phase: lanes, data iterators and the whole config, by Orbax."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2


class Checkpoints:
    """The checkpoints of a phase; a kill at any moment leaves the last complete one."""

    def __init__(self, folder: pathlib.Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The number of steps behind the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, lanes: Any, run: Mapping[str, Any]) -> None:
        """Writes the lanes' arrays by name and `run` (iterator states, config) as JSON."""
        arguments = ocp.args.Composite(
            lanes=ocp.args.StandardSave(_by_name(lanes)), run=ocp.args.JsonSave(dict(run))
        )
        if not self._manager.save(step, args=arguments, force=True):
            raise RuntimeError(f"no checkpoint was written at step {step}")

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, with the structure of `template`."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _by_name(template))
        restored = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                lanes=ocp.args.StandardRestore(shapes), run=ocp.args.JsonRestore()
            ),
        )
        leaves = [restored["lanes"][name] for name in _by_name(template)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), restored["run"]


def _by_name(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
