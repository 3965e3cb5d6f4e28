"""One example of a task as a trained model sees it: its weights, kept beside the run's scores."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from attn_jax.analysis import Attention, attentions, record
from attn_jax.nn import MultiHeadAttention
from attn_jax.viz import Shown
from experiments.tasks.base import Task
from experiments.training.checkpoints import trained_parameters
from experiments.training.lanes import Program

FILE = "example.npz"
MOST_NUMBERS = 2_000_000
"""Weights of longer examples are not kept."""
Words = Callable[[str], tuple[Sequence[str], Sequence[str]]]
"""From an attention's path to the words of its queries and keys."""


def recorder(model: Any) -> Callable[[Any], Mapping[str, Attention]]:
    """The weights of all attentions of a model by path, of what it is called on; compiled."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: Any, given: Any) -> Any:
        return record(nnx.merge(graph, state), given)[1]

    return lambda given: run(state, given)


def recorded(model: Any, given: Any, words: Words) -> dict[str, Shown]:
    """The weights of all attentions of a model that is called on one example, with its words."""
    found = recorder(model)(given)
    return {path: Shown.of(attention, *words(path)) for path, attention in found.items()}


def has_attention(model: nnx.Module) -> bool:
    """Whether a model has an attention whose weights can be seen."""
    return any(isinstance(module, MultiHeadAttention) for _, module in nnx.iter_modules(model))


def keep(program: Program, workdir: pathlib.Path, diverged: Sequence[Mapping[str, int]]) -> None:
    """The weights of one example, by the first seed that did not diverge."""
    lost = {lane["seed"] for lane in diverged}
    seed = next(index for index in range(len(lost) + 1) if index not in lost)
    template = jax.eval_shape(program.init, np.int32(0), np.float32(0)).params
    params, _ = trained_parameters(workdir, seed, template)
    save(program.task, program.model(params), workdir)


def save(task: Task, model: Any, workdir: pathlib.Path) -> None:
    """Keeps the weights of the task's own example, where it has one and the model has weights."""
    if not has_attention(model):
        return
    reading = task.reading(None)
    if reading is None:
        return
    heads = sum(module.num_heads for module in attentions(model).values())
    if heads * len(reading.queries) * len(reading.keys) > MOST_NUMBERS:
        return
    found = recorded(model, reading.batch, lambda path: (reading.queries, reading.keys))
    arrays: dict[str, Any] = {}
    for index, one in enumerate(found.values()):
        arrays |= {
            f"weights_{index}": one.weights,
            f"allowed_{index}": one.allowed,
            f"relative_{index}": one.relative,
        }
    words = {"paths": list(found), "queries": reading.queries, "keys": reading.keys}
    path = workdir / FILE
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, words=json.dumps(words), **arrays)
    temporary.replace(path)


def load(workdir: pathlib.Path) -> Mapping[str, Shown]:
    """What `save` kept, by path; empty where there is none."""
    if not (workdir / FILE).exists():
        return {}
    with np.load(workdir / FILE) as file:
        words = json.loads(str(file["words"]))
        names = ("weights", "allowed", "relative")
        arrays = [[file[f"{n}_{i}"] for n in names] for i in range(len(words["paths"]))]
    return {
        path: Shown(weights, words["queries"], words["keys"], allowed, relative)
        for path, (weights, allowed, relative) in zip(words["paths"], arrays, strict=True)
    }
