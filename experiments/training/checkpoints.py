"""Checkpoints of one phase: lanes, data iterators and the whole config, by Orbax."""

import hashlib
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.options import UserError

KEPT = 2


class Damaged(Exception):
    """A checkpoint that can't be read, or whose arrays are not those that were saved."""


class Checkpoints:
    """The checkpoints of a phase; a kill at any moment leaves the last complete one.

    Args:
      folder: where they lie, one folder a step.
      kept: how many are kept, the newest.

    """

    def __init__(self, folder: pathlib.Path, kept: int = KEPT):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept, enable_async_checkpointing=False, create=True
        )
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> Sequence[int]:
        """The number of steps behind each checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, lanes: Any, run: Mapping[str, Any]) -> None:
        """Writes the lanes' arrays by name and `run` (iterator states, config) as JSON."""
        arrays = by_name(lanes)
        arguments = ocp.args.Composite(
            lanes=ocp.args.StandardSave(arrays),
            run=ocp.args.JsonSave({**run, "sha256": _digest(arrays)}),
        )
        if not self._manager.save(step, args=arguments, force=True):
            raise RuntimeError(f"no checkpoint was written at step {step}")

    def newest(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole; damaged ones are named on stderr and removed.

        Returns:
          Its step, its lanes with the structure of `template`, and its run; None without any.

        """
        for step in reversed(self.steps):
            try:
                lanes, run = self.restore(step, template)
            except Damaged as damage:
                print(f"{damage}: going on from the one before", file=sys.stderr, flush=True)
                shutil.rmtree(self.folder / str(step))
                self._manager.reload()
                continue
            return step, lanes, run
        return None

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """The lanes of a step, with the structure of `template`, and its run.

        Raises:
          Damaged: it can't be read, or is not what was saved.

        """
        arrays, run = self.read(step)
        names = by_name(template)
        if set(names) != set(arrays):
            raise Damaged(f"the checkpoint {self.folder / str(step)} has arrays of another model")
        leaves = [arrays[name] for name in names]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), run

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All arrays of a step by name, and its run.

        Raises:
          Damaged: it can't be read, or is not what was saved.

        """
        arguments = ocp.args.Composite(lanes=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        place = self.folder / str(step)
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:  # Orbax, its stores and JSON fail in ways of their own
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise Damaged(f"the checkpoint {place} can't be read ({said[:200]})") from error
        arrays, run = restored["lanes"], restored["run"]
        if run.pop("sha256", None) != _digest(arrays):
            raise Damaged(f"the checkpoint {place} does not hold what was saved")
        return arrays, run


def trained_parameters(
    workdir: pathlib.Path, seed: int, template: Any, average: int = 1
) -> tuple[Any, Sequence[int]]:
    """The parameters of a seed after training: the last ones, or the mean of the last few.

    Args:
      workdir: of the run.
      seed: one of its seeds.
      template: parameters of the model, for names and structure.
      average: of how many checkpoints; 1 takes the last.

    Returns:
      The parameters, and the steps they were taken from.

    Raises:
      UserError: no checkpoint of the seed, or fewer than `average`.
      Damaged: see `Checkpoints.read`.

    """
    folder, lane = _folder_of(workdir, seed)
    with Checkpoints(folder, kept=sys.maxsize) as checkpoints:
        steps = checkpoints.steps[-average:]
        if not steps or len(steps) < average:
            raise UserError(
                f"{folder} holds {len(steps)} checkpoints, {average} were asked for: train with a "
                "larger --config.training.checkpoints"
            )
        return _mean([_lane(checkpoints, step, lane, template) for step in steps]), steps


def parameters_by_step(workdir: pathlib.Path, seed: int, template: Any) -> Mapping[int, Any]:
    """The parameters of a seed at each of its checkpoints."""
    folder, lane = _folder_of(workdir, seed)
    with Checkpoints(folder, kept=sys.maxsize) as checkpoints:
        return {step: _lane(checkpoints, step, lane, template) for step in checkpoints.steps}


def warm_started(lanes: Any, workdir: str, seeds: Sequence[int]) -> Any:
    """Lanes whose parameters are those of another run, by name; seed by seed, or its first seed.

    Parameters that the other run has not, or has in another shape, keep their initial values and
    are named on stderr.

    Raises:
      UserError: the other run has no checkpoint, or shares no parameter.

    """
    template = jax.tree.map(np.array, lanes.params)
    names = by_name(template)
    taken: set[str] = set()
    for lane, seed in enumerate(seeds):
        arrays = _last_arrays(pathlib.Path(workdir), seed)
        for name, leaf in names.items():
            array = arrays.get(name)
            if array is not None and array.shape == leaf.shape[1:]:
                leaf[lane] = array
                taken.add(name)
    if not taken:
        raise UserError(f"{workdir} shares no parameter with this model: choose another warm_start")
    kept = [name for name in names if name not in taken]
    told = f"; initial values for {', '.join(kept)}" if kept else ""
    print(f"{len(taken)} of {len(names)} parameters from {workdir}{told}", file=sys.stderr)
    return lanes._replace(params=template)


def _last_arrays(workdir: pathlib.Path, seed: int) -> dict[str, Any]:
    """The last parameters of a seed by name; of the first seed where there is no such one."""
    try:
        folder, lane = _folder_of(workdir, seed)
    except UserError:
        folder, lane = _folder_of(workdir, 0)
    with Checkpoints(folder, kept=sys.maxsize) as checkpoints:
        if not checkpoints.steps:
            raise UserError(f"{folder} holds no checkpoint: train the run first")
        arrays, _ = checkpoints.read(checkpoints.steps[-1])
    prefix = "params/"
    return {
        name.removeprefix(prefix): np.asarray(array)[lane]
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _folder_of(workdir: pathlib.Path, seed: int) -> tuple[pathlib.Path, int]:
    """The phase that trained a seed, and the seed's lane there."""
    for folder in sorted((workdir / "checkpoints").glob("main-*-*")):
        _, first, last = folder.name.split("-")
        if int(first) <= seed <= int(last):
            return folder, seed - int(first)
    raise UserError(f"{workdir} holds no checkpoint of seed {seed}: train it first")


def _lane(checkpoints: Checkpoints, step: int, lane: int, template: Any) -> Any:
    arrays, _ = checkpoints.read(step)
    leaves = [arrays[f"params/{name}"][lane] for name in by_name(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _mean(several: Sequence[Any]) -> Any:
    """In float64, rounded once."""

    def mean(*leaves: Any) -> Any:
        return np.mean(leaves, axis=0, dtype=np.float64).astype(leaves[0].dtype)

    return jax.tree.map(mean, *several)


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves by the names on their path, joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _digest(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
