"""The state of all lanes of an arm and the pure step that advances them together.

A lane is one run: a seed and a peak learning rate. L lanes are one pytree whose leaves have a
leading axis L, and one step maps the step of one lane over that axis, in one compiled program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from experiments.tasks.base import Task
from experiments.training.optimizer import Optimizer

NEVER = -1


class Lane(NamedTuple):
    """Everything that changes in one run; in `Lanes` every leaf has a leading axis.

    Attributes:
      params: the model's parameters.
      moments: the optimiser's state.
      learning_rate: the peak rate.
      seed: folded into the keys of dropout.
      diverged: the step at which loss or gradient first was not finite, or -1; a diverged
        lane keeps the parameters it had before that step.

    """

    params: PyTree
    moments: PyTree
    learning_rate: Float[Array, ""]
    seed: Int[Array, ""]
    diverged: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is common to all lanes of an arm: the task, the model's graph, the optimiser.

    Attributes:
      build: makes the model from a seed.
      label_smoothing: of the training loss.

    """

    task: Task
    build: Callable[[nnx.Rngs], nnx.Module]
    optimizer: Optimizer
    label_smoothing: float

    def __post_init__(self):
        model = nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))
        object.__setattr__(self, "graph", nnx.split(model)[0])
        # Kept, so that the pilot and the main run share one compilation.
        init = jax.jit(lambda *lanes: over_lanes(self.init, *lanes))
        object.__setattr__(self, "compiled_init", init)

    def init(self, seed: Int[Array, ""], learning_rate: Float[Array, ""]) -> Lane:
        """A lane before its first step; the same seed gives the same lane in any company."""
        params = nnx.state(self.build(nnx.Rngs(jax.random.key(seed))))
        moments = self.optimizer.transform.init(params)
        return Lane(params, moments, learning_rate, seed, jnp.int32(NEVER))

    def init_lanes(self, seeds: Sequence[int], learning_rates: Sequence[float]) -> Lane:
        """One lane for each pair of seed and learning rate."""
        rates = np.asarray(learning_rates, np.float32)
        return self.compiled_init(np.asarray(seeds, np.int32), rates)  # pyright: ignore[reportAttributeAccessIssue]

    def model(self, params: PyTree) -> Any:
        """The model with these parameters."""
        return nnx.merge(self.graph, params)  # pyright: ignore[reportAttributeAccessIssue]

    def loss(self, params: PyTree, batch: Mapping[str, Array], key: Array | None) -> Array:
        """The training loss of one lane on one batch."""
        outputs = self.model(params)(batch, dropout_key=key)
        return self.task.loss(outputs, batch, label_smoothing=self.label_smoothing)

    def step(
        self, lane: Lane, batch: Mapping[str, Array], step: Int[Array, ""], total: Float[Array, ""]
    ) -> tuple[Lane, Float[Array, ""]]:
        """One step of one lane; returns the lane and its loss before the step."""
        key = jax.random.fold_in(jax.random.key(lane.seed), step)
        loss, gradient = jax.value_and_grad(self.loss)(lane.params, batch, key)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        direction, moments = self.optimizer.transform.update(gradient, lane.moments, lane.params)
        size = -lane.learning_rate * self.optimizer.rate(step, total)
        params = optax.apply_updates(lane.params, jax.tree.map(lambda d: size * d, direction))
        alive = finite & (lane.diverged == NEVER)
        diverged = jnp.where(finite | (lane.diverged != NEVER), lane.diverged, step)
        params, moments = _where(alive, (params, moments), (lane.params, lane.moments))
        return Lane(params, moments, lane.learning_rate, lane.seed, diverged), loss

    def step_lanes(
        self, lanes: Lane, batch: Mapping[str, Array], step: Int[Array, ""], total: Float[Array, ""]
    ) -> tuple[Lane, Float[Array, " lanes"]]:
        """One step of every lane; every batch array has a leading lane axis."""
        return over_lanes(lambda lane, data: self.step(lane, data, step, total), lanes, batch)

    def scores(
        self, params: PyTree, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """Per-item scores and weights of one batch under one lane's parameters."""
        return self.task.scores(self.model(params)(batch), batch)

    def score_lanes(
        self, params: PyTree, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, "lanes items"], Float[Array, " items"]]:
        """Per-item scores of every lane on the same batch."""
        values, weights = over_lanes(lambda lane: self.scores(lane, batch), params)
        return values, weights[0]


def over_lanes(function: Callable[..., Any], *lanes: PyTree) -> Any:
    """`function` of every lane, with results stacked: `jax.vmap` on an accelerator.

    On a CPU, which has no idle units for more lanes to fill, the lanes follow each other inside
    the program (`jax.lax.map`): what one lane works on stays in the caches, and batched products
    do not fall behind plain ones. `python -m experiments.benchmark --suite=lanes` has the ratio.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda lane: function(*lane), lanes)
    return jax.vmap(function)(*lanes)


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def stack(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins one batch a lane along a new leading axis."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
