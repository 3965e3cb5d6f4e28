"""What a trained model's heads do: statistics, and the part that is distance."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attn_jax.analysis import (
    Explained,
    Fit,
    Profile,
    Rows,
    Statistics,
    attentions,
    explain_by_position,
    kinds,
    profile,
    rare,
    rows,
    sample,
    statistics,
)
from experiments.examples import recorder
from experiments.options import UserError
from experiments.swaps import Curve
from experiments.tasks.base import Batch, Metric, Task
from experiments.tasks.synthetic import stream

COUNTED = 50
"""Training batches in which tokens are counted, for rare ones."""
FOLDER = "analysis"
"""Of a run's workdir."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention of a model.

    Attributes:
      path: see `attn_jax.analysis.attentions`.
      statistics: of its heads, on held-out text.
      kinds: of each head, in the field's terms.
      rarest: of each head, see `attn_jax.analysis.rare`; None where keys are no tokens.
      profile: mean weight by relative position, on held-out text.
      explained: by position, a head each.
      learned: what is trained of its rule beside projections: gates, widths, tables.

    """

    path: str
    statistics: Statistics
    kinds: Sequence[Sequence[str]]
    rarest: Float[Array, "N"] | None
    profile: Profile
    explained: Sequence[Explained]
    learned: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Of one seed of a run.

    Attributes:
      layers: its attentions.
      curve: heads replaced; None where that was not asked for.
      metric: of the curve's scores.

    """

    layers: Sequence[Layer]
    curve: Curve | None
    metric: Metric

    def as_json(self) -> dict[str, Any]:
        """All figures, for other programs."""
        return {
            "metric": dataclasses.asdict(self.metric),
            "layers": [_layer_as_json(layer) for layer in self.layers],
            "swaps": None if self.curve is None else _curve_as_json(self.curve),
        }


def _layer_as_json(layer: Layer) -> dict[str, Any]:
    return {
        "path": layer.path,
        "learned": list(layer.learned),
        "statistics": {
            name: np.asarray(value).tolist() for name, value in vars(layer.statistics).items()
        },
        "kinds": [list(some) for some in layer.kinds],
        "rarest": None if layer.rarest is None else np.asarray(layer.rarest).tolist(),
        "profile": {
            "relative": np.asarray(layer.profile.relative).tolist(),
            "weight": [list(map(_finite, row)) for row in np.asarray(layer.profile.weight)],
            "rows": np.asarray(layer.profile.rows).tolist(),
        },
        "explained": [
            {
                "plain": _fit(one.plain),
                "with_first": _fit(one.with_first),
                "families": {name: _finite(x) for name, x in one.families.items()},
            }
            for one in layer.explained
        ],
    }


def _curve_as_json(curve: Curve) -> dict[str, Any]:
    return {
        "whole": _finite(curve.whole),
        "order": [list(head) for head in curve.order],
        "scores": {name: list(map(_finite, values)) for name, values in curve.scores.items()},
    }


def analyse(task: Task, model: nnx.Module, batches: int, count: int) -> list[Layer]:
    """Statistics and kernels of every attention; kernels are fitted on validation text.

    Args:
      task: of the model.
      model: trained.
      batches: so many of each split are read at most.
      count: rows (queries) of each attention that kernels see, and that judge them.

    """
    drawn = {split: rows_of(task, model, split, batches, count) for split in ("validation", "test")}
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
        rarest,
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


def rows_of(task: Task, model: Any, split: str, batches: int, count: int) -> dict[str, Rows]:
    """Rows of every attention, drawn from the first batches of a split."""
    recorded, generator = recorder(model), stream("analysis", split)
    counted = list(itertools.islice(task.train(0), COUNTED))
    counts = {path: _counts(task, counted, path) for path in attentions(model)}
    found: dict[str, list[Rows]] = {}
    for batch in task.evaluation(split)[:batches]:
        for path, attention in recorded(dict(batch)).items():
            queries = _queries(task, batch, path, attention.weights.shape[2])
            some = rows(attention, queries, _frequency(task, batch, path, counts[path]))
            found.setdefault(path, []).append(sample([some], 4 * count, generator))
    return {path: sample(some, count, generator) for path, some in found.items()}


def _queries(task: Task, batch: Batch, path: str, length: int) -> np.ndarray:
    """Which positions look: no padding, and no rows that only fill up the last batch."""
    filled = np.asarray(batch["weight"]).reshape(len(batch["weight"]), -1).max(-1) > 0
    present = task.present(batch, path)
    kept = np.ones((len(filled), length), bool) if present is None else present
    return kept & filled[:, None]


def _counts(task: Task, batches: Sequence[Batch], path: str) -> np.ndarray | None:
    """How often training has each token that the keys of an attention may be of."""
    tokens = [task.key_tokens(batch, path) for batch in batches]
    ids = [some.ravel() for some in tokens if some is not None]
    return np.bincount(np.concatenate(ids)) if ids else None


def _frequency(task: Task, batch: Batch, path: str, counts: np.ndarray | None) -> np.ndarray | None:
    """Of the token of each key in training; what training has not counts nothing."""
    tokens = task.key_tokens(batch, path)
    if counts is None or tokens is None:
        return None
    return np.append(counts, 0)[np.minimum(tokens, len(counts))]


def _fit(fit: Fit) -> dict[str, Any]:
    values = {name: getattr(fit, name) for name in ("scale", "offset", "first", "share")}
    numbers: dict[str, Any] = {name: _finite(value) for name, value in values.items()}
    numbers["divergence"] = "infinite" if np.isinf(fit.divergence) else _finite(fit.divergence)
    table = None if fit.log_weights is None else fit.log_weights.tolist()
    return {
        "kernel": str(fit),
        "family": fit.family,
        **numbers,
        "log_weights": table,
        "step": fit.step,
    }


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(value) if np.isfinite(value) else None


def folder_of(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Where the analysis of one seed of a run is kept."""
    return workdir / FOLDER / f"seed_{seed}"
