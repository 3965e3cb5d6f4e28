r"""How much of a head is distance: the kernel that explains its weights best.

With w the head's weights, u the mean over the allowed keys and

.. math::
  \hat w_{ij} = (1 - a) \frac{k(r_{ij})}{\sum_{j'} k(r_{ij'})} + a \, [j \text{ is first}], \quad
  \text{share} = 1 - \frac{\sum (w - \hat w)^2}{\sum (w - u)^2}

over rows (queries), all of which count alike, and keys that the mask allows. a is the part of the
first key that the query sees, which sinks take; it is 0 unless asked for. A kernel, its offset and
a are those of least squares on one set of rows; share and divergence are of another.

Letters: R rows, N heads, S keys, L entries of a table.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attn_jax import ops
from attn_jax.analysis.kernels import FAMILIES, of_family, table
from attn_jax.analysis.rows import Rows
from attn_jax.ops.proximity import log_weights

LEAST_DENOMINATOR = 1e-6
"""Below this, weights are the mean of the allowed keys, and a share of nothing is undefined."""
TABLE_MUST_ADD = 0.01
"""A table describes a head only if it explains this much more than the best family does, beyond
what it would of noise."""
LEAST_LOG = -1e30
TABLE_REACH = 128
"""Steps of a table to each side, beyond which it has its last entry. A step is one position, or,
where relative positions are no whole numbers, such that a table covers all of them."""
_NEAR = (0.0, 0.5, 1.0, 2.0)
_FAR = (3.0, 4.5, 7.0, 10.0, 15.0, 22.0, 33.0, 50.0, 75.0, 110.0)
"""Offsets, to either side, around which a kernel is looked for."""
_TOGETHER = 1 << 18
"""Weights that are predicted at a time, by one kernel or by several."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A kernel that stands for a head.

    Attributes:
      family: a name of `FAMILIES`, or "table".
      scale: the family's parameter: width, length, radius or exponent; NaN for a table.
      offset: where its peak is, in positions; NaN for a table.
      first: a, the part of the first token.
      log_weights: of a table, for relative positions around 0; None for a family.
      share: explained by position, on held-out rows; NaN where it is undefined.
      divergence: mean over held-out rows of sum_j w log(w / w_hat), in nats; infinite where the
        kernel gives nothing to a key that has weight.
      step: between the entries of a table, in positions.

    """

    family: str
    scale: float
    offset: float
    first: float
    log_weights: np.ndarray | None
    share: float
    divergence: float
    step: float = 1.0

    @property
    def kernel(self) -> ops.Proximity:
        """The kernel, for `attention`; `first` stands beside it."""
        if self.log_weights is not None:
            return table(self.log_weights, self.step)
        return of_family(self.family, self.scale, self.offset)

    def over(
        self, r: Int[np.ndarray, "L"], weight: Float[np.ndarray, "L"]
    ) -> Float[np.ndarray, "L"]:
        """The kernel at relative positions, for a drawing over a head's profile there.

        Its sum is the profile's less the part of the first token; NaN where the profile is.
        """
        logs = np.asarray(log_weights(self.kernel, r.reshape(1, 1, 1, -1)), float)[0, 0, 0]
        kernel, seen = np.exp(logs - max(logs.max(), LEAST_LOG)), np.isfinite(weight)
        share = kernel / (kernel[seen].sum() or 1)
        return np.where(seen, share * weight[seen].sum() * (1 - self.first), np.nan)

    def __str__(self) -> str:
        text = "table"
        if self.log_weights is None:
            text = f"{self.family}({FAMILIES[self.family][0]}={self.scale:.3g}"
            text += f", offset={self.offset:.2f})"
        return f"{text} + {self.first:.2f} first" if self.first else text


@dataclasses.dataclass(frozen=True)
class Explained:
    """How far position explains one head.

    Attributes:
      plain: the best kernel.
      with_first: the best kernel beside a part for the first token.
      families: the held-out share of every family, and of "table", without the first token.

    """

    plain: Fit
    with_first: Fit
    families: Mapping[str, float]


def explain_by_position(fitted_on: Rows, held_out: Rows) -> list[Explained]:
    """The kernels that describe every head of an attention, and how well.

    Args:
      fitted_on: rows that kernels are fitted to.
      held_out: rows of other sequences, for share and divergence.

    Raises:
      ValueError: there are no rows.

    """
    for name, some in (("fitted_on", fitted_on), ("held_out", held_out)):
        if not len(some.relative):
            raise ValueError(
                f"{name} must hold rows, got none: record sequences of two tokens or more"
            )
    return [
        _explain(fitted_on.head(head), held_out.head(head))
        for head in range(fitted_on.weights.shape[1])
    ]


def _explain(fitted_on: Rows, held_out: Rows) -> Explained:
    plain, with_first = (_fits(fitted_on, first) for first in (False, True))
    shares, with_first_shares = (
        {name: _judged(fit, fitted_on).share for name, fit in fits.items()}
        for fits in (plain, with_first)
    )
    best = _best(shares, plain["table"], fitted_on)
    best_with_first = _best(with_first_shares, with_first["table"], fitted_on)
    if not with_first_shares[best_with_first] >= shares[best]:
        # the part only adds: no family takes the place of a table that says more without it
        best_with_first = best
    judged = {name: _judged(fit, held_out) for name, fit in plain.items()}
    return Explained(
        plain=judged[best],
        with_first=_judged(with_first[best_with_first], held_out),
        families={name: fit.share for name, fit in judged.items()},
    )


def _best(shares: Mapping[str, float], table: Fit, rows: Rows) -> str:
    """The name of the fit that describes these rows best, a family unless the table adds to it."""
    family = max(FAMILIES, key=lambda name: shares[name])
    buckets = _buckets(rows, table.step)
    entries = (_by_bucket(rows.allowed.astype(jnp.float32), buckets) > 0).sum()
    # of noise alone, so many free numbers explain their share of all weights
    of_noise = float(entries / rows.allowed.sum())
    added = shares["table"] - shares[family]
    return "table" if added >= TABLE_MUST_ADD + 2 * of_noise else family


def _fits(rows: Rows, first: bool) -> dict[str, Fit]:
    """Each family's kernel and the table of least squares, not judged yet."""
    found = {}
    for number, family in enumerate(FAMILIES):
        scale, offset, part = (float(x) for x in _fit_family(rows, number, first))
        found[family] = Fit(family, scale, offset, part, None, np.nan, np.nan)
    step = _step(rows)
    log_weights, part = _fit_table(rows, _buckets(rows, step), first)
    logs = np.asarray(log_weights)
    found["table"] = Fit("table", np.nan, np.nan, float(part), logs, np.nan, np.nan, step)
    return found


def _judged(fit: Fit, rows: Rows) -> Fit:
    """With share and divergence on these rows."""
    share, divergence = _judge(rows, log_weights(fit.kernel, _grid(rows))[0, 0], fit.first)
    return dataclasses.replace(fit, share=float(share), divergence=float(divergence))


@jax.jit
def _judge(
    rows: Rows, log_weight: Float[Array, "R S"], part: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    log_kernel = _log_by_kernel(rows, log_weight)
    predicted = _with_first(rows, jnp.exp(log_kernel), part)
    total = jnp.square(rows.weights - rows.uniform).sum()
    left = jnp.square(rows.weights - predicted).sum()
    defined = total >= LEAST_DENOMINATOR
    share = jnp.where(defined, 1 - left / jnp.where(defined, total, 1), jnp.nan)
    seen = rows.weights > 0
    w = jnp.where(seen, rows.weights, 1)
    # in logarithms: a narrow kernel's weights underflow where its logarithms do not
    log_first = jnp.where(rows.first, jnp.log(part), -jnp.inf)
    log_predicted = jnp.logaddexp(jnp.log1p(-part) + log_kernel, log_first)
    lost = jnp.where(seen, w * (jnp.log(w) - log_predicted), 0)
    return share, lost.sum(-1).mean()


# Predictions


def _grid(rows: Rows) -> Any:
    """Relative positions in the shape that kernels take."""
    return rows.relative[None, None]


def _log_by_kernel(rows: Rows, log_weight: Float[Array, "R S"]) -> Float[Array, "R S"]:
    """Of the kernel's weights, which sum to one over the allowed keys within its reach."""
    logits = jnp.where(rows.allowed, log_weight, -jnp.inf)
    peak = logits.max(-1, keepdims=True)
    logits = logits - jnp.where(jnp.isfinite(peak), peak, 0)
    total = jnp.exp(logits).sum(-1, keepdims=True)
    return logits - jnp.log(jnp.where(total > 0, total, 1))


def _by_kernel(rows: Rows, log_weight: Float[Array, "R S"]) -> Float[Array, "R S"]:
    return jnp.exp(_log_by_kernel(rows, log_weight))


def _first_part(rows: Rows, by_kernel: Float[Array, "R S"]) -> Float[Array, ""]:
    """The part of the first token beside a kernel, from 0 to 1, by least squares."""
    along = rows.first - by_kernel
    length = jnp.square(along).sum()
    part = ((rows.weights - by_kernel) * along).sum() / jnp.where(length > 0, length, 1)
    return jnp.clip(part, 0, 1)


def _with_first(rows: Rows, by_kernel: Float[Array, "R S"], part: Any) -> Float[Array, "R S"]:
    return (1 - part) * by_kernel + part * rows.first


def _error(
    rows: Rows, log_weight: Float[Array, "R S"], first: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean squared error a row, and a."""
    by_kernel = _by_kernel(rows, log_weight)
    part = jnp.where(first, _first_part(rows, by_kernel), 0)
    error = jnp.square(rows.weights - _with_first(rows, by_kernel, part)).sum(-1).mean()
    return error, part


# Least squares


@jax.jit
def _fit_family(
    rows: Rows, family: Any, first: Any
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Scale, offset and a, by a grid around the best so far that halves its spacing.

    Errors of windows have steps and those of others have kinks, so that no gradient is asked.

    Args:
      rows: of one head.
      family: its number in `FAMILIES`; data, so that one compiled program serves all.
      first: whether there is a part for the first token.

    """
    kernels = [functools.partial(_of_family, rows, name) for name in FAMILIES]

    def evaluate(point: Float[Array, "2"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return _error(rows, lax.switch(family, kernels, jnp.exp(point[0]), point[1]), first)

    def best(points: Float[Array, "G 2"]) -> tuple[Float[Array, "2"], Float[Array, ""]]:
        together = max(1, _TOGETHER // rows.weights.size)
        errors, parts = lax.map(evaluate, points, batch_size=together)
        least = jnp.argmin(errors)
        return points[least], parts[least]

    near = jnp.asarray([*(-x for x in _NEAR[1:]), *_NEAR])
    around = jnp.concatenate([near, jnp.asarray(_FAR), -jnp.asarray(_FAR), _place(rows) + near])
    scales = jnp.linspace(jnp.log(0.2), jnp.log(rows.weights.shape[-1]), 12)
    start = best(_pairs(scales, around))
    steps = jnp.arange(-2.0, 3.0)
    # as wide as the offsets beside the start are apart
    widths = jnp.stack([(scales[1] - scales[0]) / 2, jnp.maximum(0.5, abs(start[0][1]) / 8)])

    def finer(found: Any, halving: Float[Array, ""]) -> tuple[Any, None]:
        return best(found[0][None] + halving * widths[None] * _pairs(steps, steps)), None

    (point, part), _ = lax.scan(finer, start, 0.5 ** jnp.arange(11))
    return jnp.exp(point[0]), point[1], part


def _of_family(
    rows: Rows, family: str, scale: Float[Array, ""], offset: Float[Array, ""]
) -> Float[Array, "R S"]:
    return log_weights(of_family(family, scale, offset), _grid(rows))[0, 0]


def _pairs(first: Float[Array, "P"], second: Float[Array, "Q"]) -> Float[Array, "G 2"]:
    return jnp.stack(jnp.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)


def _step(rows: Rows) -> float:
    """Of a table: one position, or a part of the farthest where positions are no whole numbers."""
    relative = np.asarray(rows.relative)
    if (relative == np.round(relative)).all():
        return 1.0
    return float(abs(relative).max()) / TABLE_REACH


def _buckets(rows: Rows, step: float = 1.0) -> Int[Array, "R S"]:
    r = jnp.round(rows.relative / step).astype(jnp.int32)
    return jnp.clip(r, -TABLE_REACH, TABLE_REACH) + TABLE_REACH


def _by_bucket(x: Float[Array, "R S"], buckets: Int[Array, "R S"]) -> Float[Array, "L"]:
    return jax.ops.segment_sum(x.ravel(), buckets.ravel(), 2 * TABLE_REACH + 1)


def _place(rows: Rows) -> Float[Array, ""]:
    """The relative position that has most of the weight."""
    mass = _by_bucket(rows.weights, _buckets(rows))
    return (jnp.argmax(mass) - TABLE_REACH).astype(rows.weights.dtype)


@jax.jit
def _fit_table(
    rows: Rows, buckets: Int[Array, "R S"], first: Any
) -> tuple[Float[Array, "L"], Float[Array, ""]]:
    """Log-weights and a: by iterative scaling, then downhill in the squared error.

    Scaling makes each entry's total that of the head, which is the table of least divergence; the
    one of least squares is near.
    """
    observed = _by_bucket(rows.weights, buckets)
    nearest = _nearest_seen(_by_bucket(rows.allowed.astype(rows.weights.dtype), buckets) > 0)

    def scale(table: Float[Array, "L"], _: None) -> tuple[Float[Array, "L"], None]:
        predicted = _by_bucket(_by_kernel(rows, table[buckets]), buckets)
        there = (predicted > 0) & (observed > 0)
        ratio = jnp.where(there, observed, 1) / jnp.where(there, predicted, 1)
        step = jnp.where(there, jnp.log(ratio), jnp.where(predicted > 0, -1.0, 0.0))
        return table + step, None

    def error(table: Float[Array, "L"]) -> Float[Array, ""]:
        return _error(rows, table[buckets], first)[0]

    def descend(carry: Any, _: None) -> tuple[Any, None]:
        table, length, value, slope = carry
        moved = table - length * slope
        other, other_slope = jax.value_and_grad(error)(moved)
        lower = other < value
        kept = (moved, 1.5 * length, other, other_slope), (table, length / 2, value, slope)
        return jax.tree.map(lambda a, b: jnp.where(lower, a, b), *kept), None

    table, _ = lax.scan(scale, jnp.zeros(2 * TABLE_REACH + 1), None, 60)
    (table, *_), _ = lax.scan(
        descend, (table, jnp.asarray(10.0), *jax.value_and_grad(error)(table)), None, 100
    )
    return table[nearest], _error(rows, table[buckets], first)[1]


def _nearest_seen(seen: Bool[Array, "L"]) -> Int[Array, "L"]:
    """For every entry the nearest that some row may see: what rows say of the others."""
    place = jnp.arange(len(seen))
    apart = abs(place[:, None] - place[None])
    return jnp.argmin(jnp.where(seen[None], apart, 2 * len(seen)), -1)
