"""What a trained model's heads do: statistics, the part that is distance, swaps for kernels."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.analysis import (
    Explained,
    Fit,
    Head,
    Profile,
    Replacement,
    Rows,
    Statistics,
    all_heads,
    attentions,
    choose,
    explain_by_position,
    greedy_order,
    kinds,
    profile,
    rare,
    record,
    rows,
    sample,
    shuffled,
    statistics,
    swapping,
)
from experiments.options import UserError
from experiments.tasks.base import Batch, Task
from experiments.tasks.synthetic import stream

COUNTED = 50
"""Training batches in which tokens are counted, for rare ones."""
CONTROLS = ("fitted kernels", "shuffled kernels", "uniform", "zero")
"""What stands in for heads: their own kernels, those of other heads, the mean, nothing."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention of a model.

    Attributes:
      path: see `attn_jax.analysis.attentions`.
      statistics: of its heads, on held-out text.
      kinds: of each head, in the field's terms.
      profile: mean weight by relative position, on held-out text.
      explained: by position, a head each.
      learned: what is trained of its rule beside projections: gates, widths, tables.

    """

    path: str
    statistics: Statistics
    kinds: Sequence[Sequence[str]]
    profile: Profile
    explained: Sequence[Explained]
    learned: Sequence[str]


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


def analyse(task: Task, model: nnx.Module, batches: int, count: int) -> list[Layer]:
    """Statistics and kernels of every attention; kernels are fitted on validation text.

    Args:
      task: of the model.
      model: trained.
      batches: so many of each split are read at most.
      count: rows (queries) of each attention that kernels see, and that judge them.

    """
    drawn = {split: _rows(task, model, split, batches, count) for split in ("validation", "test")}
    modules = attentions(model)
    return [
        _layer(path, modules[path], drawn["validation"][path], drawn["test"][path])
        for path in drawn["test"]
    ]


def _layer(path: str, module: Any, fitted_on: Rows, held_out: Rows) -> Layer:
    if not len(fitted_on.relative) or not len(held_out.relative):
        raise UserError(f"{path} has no query that sees two keys or more: nothing to analyse")
    found = statistics(held_out)
    # kinds are of tokens on a line: times and pixels have no next one
    on_a_line = module.distance is None and jnp.issubdtype(held_out.relative.dtype, jnp.integer)
    rarest = None if held_out.frequency is None else rare(held_out)
    return Layer(
        path,
        found,
        kinds(found, rarest) if on_a_line else [[] for _ in found.entropy],
        profile(held_out),
        explain_by_position(fitted_on, held_out),
        list(_learned(module)),
    )


def _learned(module: Any) -> Iterator[str]:
    """Gates of mixes, and the parameters of kernels that are trained, a line each."""
    for group in module.groups:
        heads = f"heads {group.first_head} to {group.first_head + group.num_heads - 1}"
        if len(group.branches) > 1:
            gate = np.asarray(jax.nn.sigmoid(group.gate[...]))
            yield f"{heads}: gate of the first rule {_list(gate)}"
        for branch in group.branches:
            for kernel in branch.kernels:
                if kernel.factor.trainable:
                    name = next(n for n in vars(kernel) if n.startswith("log_"))
                    value = np.asarray(getattr(kernel, name)[...])
                    if value.ndim > 1:
                        free = (
                            f"{value.shape[1]} log-weights, {value.min():.3g} to {value.max():.3g}"
                        )
                        yield f"{heads}: {kernel.factor.name} {free}"
                    else:
                        yield f"{heads}: {kernel.factor.name} {name[4:]} {_list(np.exp(value))}"


def _list(values: np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in np.atleast_1d(values))


def _rows(task: Task, model: Any, split: str, batches: int, count: int) -> dict[str, Rows]:
    """Rows of every attention, drawn from the first batches of a split."""
    graph, state = nnx.split(model)

    @jax.jit
    def recorded(state: Any, batch: Any) -> Any:
        return record(nnx.merge(graph, state), batch)[1]

    found: dict[str, list[Rows]] = {}
    counts = _frequency(task)
    for index, batch in enumerate(task.evaluation(split)[:batches]):
        key = jax.random.fold_in(jax.random.key(0), index)
        for path, attention in recorded(state, dict(batch)).items():
            frequency = None
            if counts is not None:
                tokens = _first_of_bag(np.asarray(batch[counts[0]]))
                frequency = np.append(counts[1], 0)[np.minimum(tokens, len(counts[1]))]
            queries = _queries(task, batch, attention.weights.shape[2])
            some = rows(attention, queries, frequency)
            found.setdefault(path, []).append(sample([some], 4 * count, key))
    return {path: sample(some, count, jax.random.key(1)) for path, some in found.items()}


def _queries(task: Task, batch: Batch, length: int) -> np.ndarray:
    """Which positions look: no padding, and no rows that only fill up the last batch."""
    filled = np.asarray(batch["weight"]).reshape(len(batch["weight"]), -1).max(-1) > 0
    present = task.present(batch)
    kept = np.ones((len(filled), length), bool) if present is None else present
    return kept & filled[:, None]


def _frequency(task: Task) -> tuple[str, np.ndarray] | None:
    """The field of a batch that holds tokens, and how often training has each of them."""
    batches = list(itertools.islice(task.train(0), COUNTED))
    field = next((name for name in ("word", "token") if name in batches[0]), None)
    if field is None:
        return None
    ids = np.concatenate([_first_of_bag(batch[field]).ravel() for batch in batches])
    return field, np.bincount(ids)


def _first_of_bag(ids: np.ndarray) -> np.ndarray:
    """The token itself, where a position is seen with others."""
    return ids if ids.ndim == 2 else ids[..., 0]


# Swaps


class Swapper:
    """Scores of a model with heads replaced, by one compiled program a kind of replacement.

    Args:
      task: of the model.
      model: trained.
      batches: so many of each split are scored at most.

    """

    def __init__(self, task: Task, model: nnx.Module, batches: int):
        self.task = task
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
        """The task's headline on the batches of a split."""
        batches = self._splits[split]
        outputs = self.outputs(replacements, split)
        parts = [self.task.scores(o, batch) for o, batch in zip(outputs, batches, strict=True)]
        values, weights = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in (0, 1))
        beyond = self._beyond[split]
        if beyond is not None:
            place = np.flatnonzero(weights > 0)
            weights = weights.copy()
            weights[place[beyond[: len(place)]]] = 0
        return float(self.task.metric.mean(values.astype(np.float64), weights))

    def larger_is_better(self, replacements: Mapping[str, Replacement], split: str) -> float:
        """The score, or less it where a smaller one is better."""
        value = self.score(replacements, split)
        return value if self.task.metric.higher_is_better else -value


def swap_curve(
    swapper: Swapper,
    layers: Sequence[Layer],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Curve:
    """Heads replaced by their kernels in greedy order, and the same heads by the controls.

    The order is that of the validation split, every score that of the test split.

    Raises:
      UserError: there is no head.

    """
    kinds = replacements(layers)
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


def replacements(layers: Sequence[Layer]) -> dict[str, dict[str, Replacement]]:
    """Of all heads, by what stands in for them and by path, see `CONTROLS`."""
    fits = {layer.path: [one.with_first for one in layer.explained] for layer in layers}
    mixed = shuffled(fits, stream("swaps", "shuffled"))
    number = {path: len(some) for path, some in fits.items()}
    own = {path: Replacement.of(some) for path, some in fits.items()}
    others = {path: Replacement.of(some) for path, some in mixed.items()}
    uniform = {path: Replacement.uniform(heads) for path, heads in number.items()}
    zero = {path: Replacement.zero(heads) for path, heads in number.items()}
    return dict(zip(CONTROLS, (own, others, uniform, zero), strict=True))


def as_json(layers: Sequence[Layer], curve: Curve | None) -> dict[str, Any]:
    """All figures, for other programs."""
    return {
        "layers": [
            {
                "path": layer.path,
                "learned": list(layer.learned),
                "statistics": {
                    name: np.asarray(value).tolist()
                    for name, value in vars(layer.statistics).items()
                },
                "kinds": [list(some) for some in layer.kinds],
                "explained": [
                    {
                        "plain": _fit(one.plain),
                        "with_first": _fit(one.with_first),
                        "families": {name: _finite(x) for name, x in one.families.items()},
                    }
                    for one in layer.explained
                ],
            }
            for layer in layers
        ],
        "swaps": None
        if curve is None
        else {
            "whole": _finite(curve.whole),
            "order": [list(head) for head in curve.order],
            "scores": {name: list(map(_finite, values)) for name, values in curve.scores.items()},
        },
    }


def _fit(fit: Fit) -> dict[str, Any]:
    values = {name: getattr(fit, name) for name in ("scale", "offset", "first", "share")}
    values["divergence"] = fit.divergence
    finite = {name: _finite(value) for name, value in values.items()}
    table = None if fit.log_weights is None else fit.log_weights.tolist()
    return {"kernel": str(fit), "family": fit.family, **finite, "log_weights": table}


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(value) if np.isfinite(value) else None


def folder_of(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Where an analysis of a run is kept."""
    return workdir / "analysis" / f"seed_{seed}"
