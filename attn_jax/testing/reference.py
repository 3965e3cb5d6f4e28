"""Attention in float64 by NumPy: values, derivatives, and how large rounding errors may be.

It is written from the contract, and shares no code with what it judges: kernels and masks are
formulas of their own here.

Rounding errors follow the sums that they arise in. `Precision` holds the relative error of one
rounding; every result comes with the sum of the absolute values of its terms, each times the
errors that its factors have. A result is right if it differs from the reference by no more than
`FACTOR` times that.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H key width, D value width;
b, n: B or 1, N or 1; r = key position - query position.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Shaped

from attn_jax.ops import dropout, masks, proximity
from attn_jax.testing.example import Example

Pairs = Float[np.ndarray, "#B #N #T #S"]
Array = Float[np.ndarray, "..."]

# Several roundings a term: product, exponential, division, the result.
FACTOR = 4.0


class Precision(NamedTuple):
    """The relative error of one rounding.

    Attributes:
      value: of weights, values and results: eps of the dtype.
      logit: of logits: eps of float32 for half precision, else of the dtype.

    """

    value: float
    logit: float


class Bounded(NamedTuple):
    """A result and how far from it a right one may be."""

    value: Array
    error: Array


class Reference:
    """What an example must give.

    Attributes:
      allowed: [B, N, T, S] which keys each query may attend to.
      weights: [B, N, T, S] after dropout.
      output: [B, T, N, D].
      log_normalizer: [B, T, N]; None where the normaliser has none.

    """

    def __init__(self, example: Example, precision: Precision):
        self._example, self._precision = example, precision
        self._arguments = example.arguments
        self._normalizer = self._arguments.get("normalizer", "softmax")
        self._shape = example.shape
        _, _, queries, keys = self._shape
        self._query, self._key = (
            None if x is None else np.asarray(x, np.float64) for x in (example.query, example.key)
        )
        self._value = np.asarray(example.value, np.float64)
        self._r, self._key_positions = _relative(self._arguments, queries, keys)
        logits, size = self._logits()
        mask = _allowed(self._arguments.get("mask"), self._r, self._key_positions, self._shape)
        self.allowed: Bool[np.ndarray, "B N T S"] = np.broadcast_to(
            mask & np.greater(logits, -math.inf), self._shape
        )
        logits, size, self._score_slope = self._scored(logits, size)
        self.allowed = self.allowed & np.greater(logits, -math.inf)
        logits = np.where(self.allowed, logits, -math.inf)
        self.weights = normalized(self._normalizer, logits)
        self._slope = _slope(self._normalizer, self.weights, self.allowed)
        self._spread = self._relative_errors(np.where(self.allowed, size, 0))
        self._keep = self._kept()
        self.log_normalizer = self._log_normalizer(logits)
        errors = precision.value * abs(self.weights) + self._spread * self._slope
        self._weight_errors = errors * self._keep
        self.weights = self.weights * self._keep
        self.output = self._output()

    @property
    def seen(self) -> Bool[np.ndarray, "B T N 1"]:
        """Which queries have a key. What the others give is the question of check 1 alone."""
        return np.swapaxes(np.any(self.allowed, -1), 1, 2)[..., None]

    def _output(self) -> Bounded:
        peak = np.repeat(self._peak_value(), self._group, axis=1)
        mixed = np.einsum("bnts,bsnd->btnd", self.weights, self._wide(self._value))
        error = np.einsum("bnts,bnd->btnd", self._weight_errors, peak)
        return Bounded(mixed, error)

    @property
    def _group(self) -> int:
        return self._shape[1] // self._value.shape[2]

    def _wide(self, array: Array) -> Array:
        """Key/value heads repeated for the query heads that share them."""
        return np.repeat(array, self._group, axis=2)

    def _narrow(self, array: Array) -> Array:
        """The sum over the query heads that share a key/value head."""
        batch, keys, _, width = array.shape
        shape = (batch, keys, self._value.shape[2], self._group, width)
        return array.reshape(shape).sum(3)

    def _peak_value(self) -> Float[np.ndarray, "B K D"]:
        """The largest value of a channel: a Fourier transform rounds relative to it."""
        return abs(self._value).max(1, initial=0.0)

    @property
    def _scale(self) -> Float[np.ndarray, "N 1 1"]:
        scale = self._arguments.get("scale")
        if scale is None and self._query is not None:
            scale = self._query.shape[3] ** -0.5 if self._query.shape[3] else 1.0
        full = np.broadcast_to(np.asarray(1.0 if scale is None else scale), self._shape[1])
        return full.astype(np.float64)[:, None, None]

    def _product(self, query: Array, key: Array) -> Float[np.ndarray, "B N T S"]:
        return np.einsum("btnh,bsnh->bnts", query, self._wide(key))

    def _logits(self) -> tuple[Pairs, Pairs]:
        """All terms of the logits, and the sum of their absolute values."""
        terms: list[Array] = [np.zeros((1, 1, 1, self._shape[3]))]
        sizes: list[Array] = [np.zeros((1, 1, 1, self._shape[3]))]
        if self._query is not None and self._key is not None:
            terms.append(self._scale * self._product(self._query, self._key))
            sizes.append(abs(self._scale) * self._product(abs(self._query), abs(self._key)))
        kernel, bias = self._arguments.get("proximity"), self._arguments.get("bias")
        if kernel is not None:
            terms.append(log_weight(kernel, self._r))
            sizes.append(abs(terms[-1]))
        if bias is not None:
            terms.append(np.asarray(bias, np.float64))
            sizes.append(abs(terms[-1]))
        full = functools.partial(np.broadcast_to, shape=self._shape)
        return sum(map(full, terms)), sum(map(full, sizes))  # pyright: ignore[reportReturnType]

    def _scored(self, logits: Pairs, size: Pairs) -> tuple[Pairs, Pairs, Pairs]:
        """Logits after `score`, their size, and its slope by a central difference."""
        score = self._arguments.get("score")
        if score is None:
            return logits, size, np.ones(self._shape)
        _, heads, queries, keys = self._shape
        index = np.arange(queries)[:, None], np.arange(keys), np.arange(heads)[:, None, None]
        index = tuple(i.reshape((1,) * (4 - i.ndim) + i.shape) for i in index)
        logits = np.where(self.allowed, logits, 0)
        scored, above, below = (
            np.asarray(score(z, *index), np.float64) for z in (logits, logits + 1e-6, logits - 1e-6)
        )
        with np.errstate(invalid="ignore"):
            slope = np.where(scored > -math.inf, (above - below) / 2e-6, 0)
        finite = np.where(scored > -math.inf, abs(scored), 0)
        return scored, abs(slope) * np.where(self.allowed, size, 0) + finite, slope

    def _relative_errors(self, size: Pairs) -> Pairs:
        """Of weights, for the errors of their own logit and, by the normaliser, of the others.

        And of the sums over keys or queries that they go into: n terms, added one after the other,
        have an error of about the root of n roundings.
        """
        size = np.where(np.isfinite(size), size, 0)
        share = self._shares()
        row = (share * size).sum(-1, keepdims=True)
        terms = max(self._shape[2:]) ** 0.5 / FACTOR
        return self._precision.value + self._precision.logit * (size + row + terms)

    def _shares(self) -> Pairs:
        total = self._slope.sum(-1, keepdims=True)
        return self._slope / np.where(total == 0, 1, total)

    def _kept(self) -> Pairs:
        """What dropout multiplies the weights by."""
        rate = self._arguments.get("dropout_rate", 0.0)
        if not rate:
            return np.ones(self._shape)
        keep = jax.jit(dropout.keep, static_argnums=(1, 2))
        return np.asarray(keep(self._arguments["dropout_key"], rate, self._shape)) / (1 - rate)

    def _log_normalizer(self, logits: Pairs) -> Bounded | None:
        if self._normalizer not in ("softmax", "softmax_one"):
            return None
        zero = 0.0 if self._normalizer == "softmax_one" else -math.inf
        peak = np.maximum(logits.max(-1, initial=-math.inf), zero)
        safe = np.where(peak == -math.inf, 0, peak)
        total = np.exp(logits - safe[..., None]).sum(-1) + np.exp(zero - safe)
        with np.errstate(divide="ignore"):
            log = safe + np.log(total)
        error = (self._shares() * self._spread).sum(-1) + self._precision.logit * abs(safe)
        return Bounded(np.swapaxes(log, 1, 2), np.swapaxes(error, 1, 2))

    def pull(
        self, cotangent: Any, wrt: tuple[str, ...], log_cotangent: Any = None
    ) -> dict[str, Any]:
        """Gradients of sum(cotangent * output), and of the log-normaliser likewise.

        Returns:
          A `Bounded` for each name in `wrt`; for "proximity" a list with one for each leaf.

        """
        rows = np.swapaxes(np.asarray(cotangent, np.float64), 1, 2)
        value = np.swapaxes(self._wide(self._value), 1, 2)
        slopes = Bounded(
            np.einsum("bntd,bnsd->bnts", rows, value) * self._keep,
            np.einsum("bntd,bnsd->bnts", abs(rows), abs(value)) * self._keep,
        )
        logits = self._pulled(slopes, log_cotangent)
        logits = Bounded(logits.value * self._score_slope, logits.error * abs(self._score_slope))
        gradients: dict[str, Any] = {}
        for name in wrt:
            gradients[name] = getattr(self, f"_pull_{name}")(logits, rows)
        return gradients

    def _pulled(self, slopes: Bounded, log_cotangent: Any) -> Bounded:
        """From cotangents of weights, whose error field holds absolute sums, to those of logits."""
        gradient = _jacobian(self._normalizer, self._slope, slopes.value)
        share = self._shares()
        spread, size = self._spread, slopes.error
        if log_cotangent is not None:
            rows = np.swapaxes(np.asarray(log_cotangent, np.float64), 1, 2)[..., None]
            gradient = gradient + self._slope * rows
            size = size + abs(rows)
        mean = (share * size).sum(-1, keepdims=True)
        error = spread * (size + mean) + (share * spread * size).sum(-1, keepdims=True)
        return Bounded(gradient, self._slope * error)

    def _pull_query(self, logits: Bounded, rows: Array) -> Bounded:
        del rows
        assert self._key is not None
        key = self._wide(self._key)
        value = np.einsum("bnts,bsnh->btnh", self._scale * logits.value, key)
        return Bounded(
            value, np.einsum("bnts,bsnh->btnh", abs(self._scale) * logits.error, abs(key))
        )

    def _pull_key(self, logits: Bounded, rows: Array) -> Bounded:
        del rows
        assert self._query is not None
        value = np.einsum("bnts,btnh->bsnh", self._scale * logits.value, self._query)
        error = np.einsum("bnts,btnh->bsnh", abs(self._scale) * logits.error, abs(self._query))
        return Bounded(self._narrow(value), self._narrow(error))

    def _pull_value(self, logits: Bounded, rows: Array) -> Bounded:
        del logits
        value = np.einsum("bnts,bntd->bsnd", self.weights, rows)
        # relative to the largest cotangent, as the output is to the largest value
        peak = abs(rows).max(2, initial=0.0)
        error = np.einsum("bnts,bnd->bsnd", self._weight_errors, peak)
        return Bounded(self._narrow(value), self._narrow(error))

    def _pull_bias(self, logits: Bounded, rows: Array) -> Bounded:
        del rows
        shape = np.shape(self._arguments["bias"])
        axes = tuple(axis for axis, length in enumerate(shape) if length == 1)
        return Bounded(*(x.sum(axes, keepdims=True) for x in logits))

    def _pull_scale(self, logits: Bounded, rows: Array) -> Bounded:
        del rows
        assert self._query is not None
        assert self._key is not None
        value = logits.value * self._product(self._query, self._key)
        error = logits.error * self._product(abs(self._query), abs(self._key))
        axes = (0, 2, 3) if np.ndim(self._arguments["scale"]) else (0, 1, 2, 3)
        return Bounded(value.sum(axes), error.sum(axes))

    def _pull_proximity(self, logits: Bounded, rows: Array) -> list[Bounded]:
        del rows
        slopes = _kernel_slopes(self._arguments["proximity"], self._r)
        return [
            Bounded(
                np.asarray([(logits.value * s).sum() for s in leaf]).reshape(shape),
                np.asarray([(logits.error * abs(s)).sum() for s in leaf]).reshape(shape),
            )
            for shape, leaf in slopes
        ]

    def push(self, tangents: Mapping[str, Any]) -> Bounded:
        """The tangent of the output for tangents of query, key, value and bias, as given."""
        given = {name: np.asarray(x, np.float64) for name, x in tangents.items()}
        logits, size = np.zeros(self._shape), np.zeros(self._shape)
        for name, other in (("query", self._key), ("key", self._query)):
            if name in given and other is not None:
                pair = (given[name], other) if name == "query" else (other, given[name])
                logits = logits + self._scale * self._product(*pair)
                size = size + abs(self._scale) * self._product(*map(abs, pair))
        if "bias" in given:
            logits, size = logits + given["bias"], size + abs(given["bias"])
        logits = np.where(self.allowed, logits * self._score_slope, 0)
        size = np.where(self.allowed, size * abs(self._score_slope), 0)
        change = _jacobian(self._normalizer, self._slope, logits) * self._keep
        mean = (self._shares() * size).sum(-1, keepdims=True)
        error = 2 * self._spread * self._slope * (size + mean) * self._keep
        value = self._wide(self._value)
        tangent = np.einsum("bnts,bsnd->btnd", change, value)
        errors = np.einsum("bnts,bsnd->btnd", error, abs(value))
        if "value" in given:
            moved = self._wide(given["value"])
            tangent = tangent + np.einsum("bnts,bsnd->btnd", self.weights, moved)
            peak = abs(moved).max(1, initial=0.0)
            errors = errors + np.einsum("bnts,bnd->btnd", self._weight_errors, peak)
        return Bounded(tangent, errors)


# Positions, masks, kernels


def _relative(
    arguments: Mapping[str, Any], queries: int, keys: int
) -> tuple[Float[np.ndarray, "#b 1 T S"], Float[np.ndarray, "#b 1 1 S"]]:
    """Key position - query position, and the keys' positions."""
    query, key = (
        _positions(arguments.get(name), length)
        for name, length in (("query_positions", queries), ("key_positions", keys))
    )
    relative = np.asarray(key[:, None, None, :] - query[:, None, :, None], np.float64)
    return relative, np.asarray(key[:, None, None, :], np.float64)


def _positions(given: Any, length: int) -> Shaped[np.ndarray, "b length"]:
    given = np.asarray(0 if given is None else given)
    return np.atleast_2d(given + np.arange(length) if given.ndim == 0 else given)


def _per_sequence(number: Any) -> Shaped[np.ndarray, "..."]:
    number = np.asarray(number)
    return number if number.ndim == 0 else number.reshape(-1, 1, 1, 1)


def _allowed(
    mask: Any, r: Array, key_positions: Array, shape: tuple[int, int, int, int]
) -> Bool[np.ndarray, "#B #N #T #S"]:
    """Which keys a mask lets each query attend to."""
    if mask is None:
        return np.ones((1, 1, 1, 1), bool)
    if isinstance(mask, masks.Both | masks.OneOf):
        first, second = (
            _allowed(part, r, key_positions, shape) for part in (mask.first, mask.second)
        )
        return first & second if isinstance(mask, masks.Both) else first | second
    if isinstance(mask, masks.Causal):
        return r <= 0
    if isinstance(mask, masks.Local):
        return (r >= -_per_sequence(mask.before)) & (r <= _per_sequence(mask.after))
    if isinstance(mask, masks.Prefix):
        return np.broadcast_to(key_positions < _per_sequence(mask.length), (*r.shape[:3], shape[3]))
    if isinstance(mask, masks.Lengths):
        return _inside(mask, shape)
    if isinstance(mask, masks.Segments):
        query = np.atleast_2d(np.asarray(mask.query))
        key = query if mask.key is None else np.atleast_2d(np.asarray(mask.key))
        return query[:, None, :, None] == key[:, None, None, :]
    return np.asarray(mask.array if isinstance(mask, masks.Array) else mask)


def _inside(mask: masks.Lengths, shape: tuple[int, int, int, int]) -> Bool[np.ndarray, "#B 1 T S"]:
    _, _, queries, keys = shape
    inside = np.ones((1, 1, queries, keys), bool)
    if mask.query is not None:
        inside = inside & (np.arange(queries).reshape(1, 1, -1, 1) < _per_sequence(mask.query))
    if mask.key is not None:
        inside = inside & (np.arange(keys).reshape(1, 1, 1, -1) < _per_sequence(mask.key))
    return inside


def log_weight(kernel: proximity.Proximity, r: Array) -> Pairs:
    """The log-weight of a kernel by its formula; -inf for keys that get no weight."""
    leaves = {
        name: _per_head(value)
        for name, value in vars(kernel).items()
        if name not in ("reach", "bucket", "log_weights")
    }
    if isinstance(kernel, proximity.Table):
        weights = _table(kernel, r)
    else:
        with np.errstate(divide="ignore"):
            weights = _FORMULAS[type(kernel)](r, **leaves)
    if kernel.reach is not None:
        weights = np.where(abs(r) <= kernel.reach, weights, -math.inf)
    return weights


def _per_head(parameter: Any) -> Float[np.ndarray, "..."]:
    parameter = np.asarray(parameter, np.float64)
    return parameter.reshape(1, -1, 1, 1) if parameter.ndim else parameter


def _log(weight: Array) -> Array:
    return np.log(np.maximum(weight, 0.0))


_FORMULAS = {
    proximity.Gaussian: lambda r, width, offset=0.0: -(((r - offset) / width) ** 2) / 2,
    proximity.Exponential: lambda r, length: -abs(r) / length,
    proximity.Window: lambda r, radius: np.where(abs(r) <= radius, 0.0, -math.inf),
    proximity.Triangular: lambda r, radius: _log(1 - abs(r) / radius),
    proximity.Epanechnikov: lambda r, radius: _log(1 - (r / radius) ** 2),
    proximity.PowerLaw: lambda r, exponent: -exponent * np.log(1 + abs(r)),
}


def _table(kernel: proximity.Table, r: Array) -> Pairs:
    table = np.atleast_2d(np.asarray(kernel.log_weights, np.float64))
    if kernel.bucket is None:
        size = table.shape[1]
        index = np.clip(r + (size - 1) // 2, 0, size - 1).astype(int)
    else:
        index = np.asarray(kernel.bucket(jax.numpy.asarray(r, np.int32)))
    return np.moveaxis(table[:, index[:, 0]], 0, 1)


def _kernel_slopes(
    kernel: proximity.Proximity, r: Array
) -> list[tuple[tuple[int, ...], list[Pairs]]]:
    """Shape of every leaf, and the central difference of the log-weight in each of its entries."""
    leaves, structure = jax.tree.flatten(kernel)
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    slopes = []
    for place, leaf in enumerate(leaves):
        entries = []
        for index in np.ndindex(leaf.shape):
            step = np.zeros(leaf.shape)
            step[index] = 1e-6
            above, below = (
                log_weight(
                    jax.tree.unflatten(structure, [*leaves[:place], moved, *leaves[place + 1 :]]), r
                )
                for moved in (leaf + step, leaf - step)
            )
            with np.errstate(invalid="ignore"):
                slope = (above - below) / 2e-6
            entries.append(np.where(np.isfinite(slope), slope, 0))
        slopes.append((leaf.shape, entries))
    return slopes


# Normalisers


def normalized(normalizer: str, logits: Float[np.ndarray, "... S"]) -> Float[np.ndarray, "... S"]:
    """Weights of rows of logits, which are -inf where a key is not allowed."""
    if normalizer == "sigmoid":
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-logits))
    if normalizer == "none":
        return np.exp(logits)
    if normalizer == "linear":
        return np.where(logits == -math.inf, 0, logits)
    peak = logits.max(-1, keepdims=True, initial=-math.inf)
    peak = np.where(peak == -math.inf, 0, peak)
    if normalizer in ("sparsemax", "entmax15"):
        return _by_bisection(normalizer, logits - peak)
    zero = np.maximum(peak, 0) if normalizer == "softmax_one" else peak
    weights = np.exp(logits - zero)
    total = weights.sum(-1, keepdims=True)
    if normalizer == "softmax_one":
        total = total + np.exp(-zero)
    return weights / np.where(total == 0, 1, total)


def _by_bisection(
    normalizer: str, logits: Float[np.ndarray, "... S"]
) -> Float[np.ndarray, "... S"]:
    """The threshold at which the weights sum to one, found without sorting; the peak is zero."""
    share, power = (1.0, 1) if normalizer == "sparsemax" else (0.5, 2)
    scaled = share * logits
    low, high = np.full((*logits.shape[:-1], 1), -1.0), np.zeros((*logits.shape[:-1], 1))
    for _ in range(100):
        middle = (low + high) / 2
        above = (np.maximum(scaled - middle, 0) ** power).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(scaled - low, 0) ** power


def _slope(normalizer: str, weights: Pairs, allowed: Bool[np.ndarray, "B N T S"]) -> Pairs:
    """The diagonal of the normaliser's derivative, up to the part that keeps sums at one."""
    if normalizer == "linear":
        return allowed.astype(np.float64)
    if normalizer == "sigmoid":
        return weights * (1 - weights)
    if normalizer == "sparsemax":
        return (weights > 0).astype(np.float64)
    return np.sqrt(weights) if normalizer == "entmax15" else weights


def _jacobian(normalizer: str, slope: Pairs, vector: Pairs) -> Pairs:
    """The normaliser's derivative, which is symmetric, times a vector.

    Softmax and softmax_one: diag(w) - w w^T. Sparsemax and entmax15: diag(s) - s s^T / sum(s).
    The others act on each logit alone.
    """
    if normalizer in ("sigmoid", "none", "linear"):
        return slope * vector
    total = slope.sum(-1, keepdims=True)
    if normalizer in ("softmax", "softmax_one"):
        total = np.ones_like(total)
    mean = (slope * vector).sum(-1, keepdims=True) / np.where(total == 0, 1, total)
    return slope * (vector - mean)
