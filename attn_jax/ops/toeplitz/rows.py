"""From sums over a line to attention: divide, and say which rows the sums are too coarse for.

Letters: B batch, P positions, N query heads, K key/value heads, W channels, R distances; b, n: B or
1, N or 1; k: K, or N where weights differ between heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.varying import varying_as

# Weights of exp(-60) next to the largest are still summed without underflow.
LEAST = 1e-26
# [b, P, k, W] to the same: the same weights for every channel.
Function = Callable[[Float[Array, "#b P k W"]], Float[Array, "#b P k W"]]


class Sums(NamedTuple):
    """What a method gives, over exp(shift).

    Attributes:
      mixed: sums of the weighted values.
      total: sums of the weights, which divide them; ones where nothing is divided.

    """

    mixed: Float[Array, "B P k W"]
    total: Float[Array, "#b P #n 1"]


class Trust(NamedTuple):
    """What is known of a method's sums.

    Attributes:
      shift: the logarithm taken out of the weights.
      floor: a total below this can't be trusted.
      radius: beyond which the kernel has no weight, as in `Line.interval`; decides emptiness.
      reach: beyond which labels don't matter; None for no such distance.

    """

    shift: Float[Array, "n"]
    floor: Float[Array, "n"]
    radius: Any = None
    reach: Any = None


class Rows(NamedTuple):
    """Attention at every position of a line.

    Attributes:
      mixed: the output; zero in weak rows and where a query has no key.
      total: the denominator over exp(shift); one where nothing is divided, and in such rows.
      shift: see `Trust`.
      weak: rows whose sums can't be trusted.

    """

    mixed: Float[Array, "B P k W"]
    total: Float[Array, "B P #n 1"]
    shift: Float[Array, "n"]
    weak: Bool[Array, "B P #n 1"]


class Weights(NamedTuple):
    """Weights before the division, and how far sums of them are to be trusted."""

    weights: Float[Array, "n R"]
    trust: Trust


def weighed(line: Line, log_weights: Float[Array, "n R"], share: float) -> Weights:
    """Weights of log-weights; a row is trusted with `share` of their sum or more."""
    if line.normalizer not in WITH_LOG_NORMALIZER:
        zeros = jnp.zeros(log_weights.shape[:1], log_weights.dtype)
        return Weights(normalize(line.normalizer, log_weights).weights, Trust(zeros, zeros))
    shift = lax.stop_gradient(log_weights).max(-1)
    shift = jnp.where(shift == -jnp.inf, 0, shift)
    if line.normalizer == "softmax_one":
        shift = jnp.maximum(shift, 0)
    weights = jnp.exp(log_weights - shift[:, None])
    return Weights(weights, Trust(shift, lax.stop_gradient(share * weights.sum(-1))))


def summed(line: Line, function: Function, heads: int) -> Sums:
    """Sums of the values, and of ones for the keys.

    Args:
      line: the call.
      function: the sums over the line.
      heads: for how many heads it has weights; 1 serves any number.

    """
    value = for_heads(line.value, heads)
    if line.normalizer not in WITH_LOG_NORMALIZER:
        return Sums(function(value), jnp.ones((1, line.length, 1, 1), line.dtype))
    return Sums(function(value), function(for_heads(line.present, heads)))


def divided(line: Line, sums: Sums, trust: Trust) -> Rows:
    """Attention from its sums."""
    unfit = line.empty(trust.radius)
    weak = jnp.zeros((1, 1, 1, 1), bool)
    divides = line.normalizer in WITH_LOG_NORMALIZER
    total = sums.total
    if divides:
        total = total + zero_logit(line, trust.shift)
        weak = total <= trust.floor.reshape(1, 1, -1, 1)
    if line.labels is not None and trust.reach is not ANYWHERE:
        weak = weak | line.crossed(trust.reach)
    shape = (line.batch, line.length, len(trust.shift), 1)
    unfit, weak = jnp.broadcast_to(unfit | weak, shape), jnp.broadcast_to(weak, shape)
    total = jnp.where(unfit, 1, total)
    mixed = jnp.where(unfit, 0, sums.mixed / total if divides else sums.mixed)
    # Inside `shard_map` all methods' rows must vary over the same axes.
    return Rows(mixed, *(varying_as(z, mixed) for z in (total, trust.shift, weak)))


# The reach of a method that minds labels itself.
ANYWHERE = "anywhere"


def zero_logit(line: Line, shift: Float[Array, "n"]) -> Float[Array, "1 1 #n 1"]:
    """What softmax_one's extra logit adds to the denominator."""
    if line.normalizer != "softmax_one":
        return jnp.zeros((1, 1, 1, 1), shift.dtype)
    return jnp.exp(-shift.reshape(1, 1, -1, 1))


def for_heads(x: Float[Array, "#b P K W"], heads: int) -> Float[Array, "#b P k W"]:
    """Repeated for weights of each query head's own."""
    repeats = heads // x.shape[2] if heads > 1 else 1
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x
