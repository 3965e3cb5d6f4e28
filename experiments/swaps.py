"""Heads of a trained model replaced by kernels, without retraining, and the score after each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from attn_jax.analysis import (
    Fit,
    Head,
    Replacement,
    all_heads,
    choose,
    greedy_order,
    shuffled,
    swapping,
)
from attn_jax.nn import RecurrentDecoder
from experiments.options import UserError
from experiments.tasks.base import Task
from experiments.tasks.synthetic import stream

CONTROLS = ("fitted kernels", "shuffled kernels", "uniform", "zero")
"""What stands in for heads: their own kernels, those of other heads, the mean, nothing."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Heads made fixed, one after the other, and the score after each.

    Attributes:
      order: the heads, the cheapest first, by the score on validation.
      whole: the test score of the model as it is.
      scores: test scores after each head, for every kind of replacement.

    """

    order: Sequence[Head]
    whole: float
    scores: Mapping[str, Sequence[float]]


class Swapper:
    """Scores of a model with heads replaced, by one compiled program a kind of replacement.

    Args:
      task: of the model.
      model: trained.
      batches: so many of each split are scored at most.

    Attributes:
      metric: what models are selected by. It is the headline, unless that asks for decoding.

    """

    def __init__(self, task: Task, model: nnx.Module, batches: int):
        self.task, self.metric = task, task.selecting
        self.state: Any
        self.graph, self.state = nnx.split(model)
        splits = ("validation", "test")
        self._splits: dict[str, list[Any]] = {
            split: [dict(batch) for batch in task.evaluation(split)[:batches]] for split in splits
        }
        self._beyond = {split: task.items(split).beyond for split in splits}
        self._outputs = jax.jit(self._outputs_of_batch)

    def _outputs_of_batch(self, state: Any, replacements: Any, batch: Any) -> Any:
        model: Any = nnx.merge(self.graph, state)
        with swapping(model, replacements):
            return model(batch)

    def outputs(self, replacements: Mapping[str, Replacement], split: str) -> list[Any]:
        """What the model gives for each batch of a split."""
        return [
            self._outputs(self.state, dict(replacements), batch) for batch in self._splits[split]
        ]

    def score(self, replacements: Mapping[str, Replacement], split: str) -> float:
        """On the batches of a split."""
        batches = self._splits[split]
        outputs = self.outputs(replacements, split)
        parts = [self.task.scores(o, batch) for o, batch in zip(outputs, batches, strict=True)]
        values, weights = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in (0, 1))
        beyond = self._beyond[split]
        if beyond is not None:
            place = np.flatnonzero(weights > 0)
            weights = weights.copy()
            weights[place[beyond[: len(place)]]] = 0
        return float(self.metric.mean(values.astype(np.float64), weights))

    def larger_is_better(self, replacements: Mapping[str, Replacement], split: str) -> float:
        """The score, or less it where a smaller one is better."""
        value = self.score(replacements, split)
        return value if self.metric.higher_is_better else -value


def are_replaceable(model: nnx.Module) -> bool:
    """False where a recurrent decoder attends: its queries come of what it has mixed before."""
    return not any(isinstance(module, RecurrentDecoder) for _, module in nnx.iter_modules(model))


def swap_curve(
    swapper: Swapper,
    fits: Mapping[str, Sequence[Fit]],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Curve:
    """Heads replaced by their kernels in greedy order, and the same heads by the controls.

    The order is that of the validation split, every score that of the test split.

    Args:
      swapper: scores the model.
      fits: of each head, by the path of its attention.
      progress: called with a word, the heads done and their number.

    Raises:
      UserError: there is no head.

    """
    kinds = replacements(fits)
    heads = all_heads(kinds["fitted kernels"])
    if not heads:
        raise UserError("the model has no heads to replace")
    done = iter(range(1, len(heads) + 1))
    order = greedy_order(
        lambda chosen: swapper.larger_is_better(
            choose(kinds["fitted kernels"], chosen), "validation"
        ),
        heads,
        lambda *_: progress("heads replaced", next(done), len(heads)),
    )
    chosen = [head for head, _ in order]
    scores = {
        name: [
            swapper.score(choose(some, chosen[: count + 1]), "test") for count in range(len(heads))
        ]
        for name, some in kinds.items()
    }
    return Curve(chosen, swapper.score(choose(kinds["uniform"], []), "test"), scores)


def replacements(fits: Mapping[str, Sequence[Fit]]) -> dict[str, dict[str, Replacement]]:
    """Of all heads, by what stands in for them and by path, see `CONTROLS`."""
    mixed = shuffled(fits, stream("swaps", "shuffled"))
    number = {path: len(some) for path, some in fits.items()}
    own = {path: Replacement.of(some) for path, some in fits.items()}
    others = {path: Replacement.of(some) for path, some in mixed.items()}
    uniform = {path: Replacement.uniform(heads) for path, heads in number.items()}
    zero = {path: Replacement.zero(heads) for path, heads in number.items()}
    return dict(zip(CONTROLS, (own, others, uniform, zero), strict=True))
