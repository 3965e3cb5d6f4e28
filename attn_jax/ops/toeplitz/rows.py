"""From sums over a line to attention: divide, and say which rows the sums are too coarse for.

Letters: B batch, P positions, N query heads, K key/value heads, W channels, R distances; b, n: B or
1, N or 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize
from attn_jax.ops.toeplitz.line import Line

# [b, P, K, W] to [b, P, n, W]: the same weights for every channel.
Sums = Callable[[Float[Array, "b P K W"]], Float[Array, "b P n W"]]


class Rows(NamedTuple):
    """Attention at every position of a line.

    Attributes:
      mixed: the output; zero in weak rows and where a query has no key.
      total: the denominator over exp(shift); ones where nothing is divided.
      shift: the logarithm that was taken out of the weights.
      weak: rows whose weights, next to the largest, are too small to be trusted.

    """

    mixed: Float[Array, "B P n W"]
    total: Float[Array, "b P n 1"]
    shift: Float[Array, "n"]
    weak: Bool[Array, "b P n 1"]


class Weights(NamedTuple):
    """Weights before the division.

    Attributes:
      weights: by head and distance.
      shift: the logarithm taken out of them.
      floor: a denominator (over exp(shift)) below this can't be trusted.

    """

    weights: Float[Array, "n R"]
    shift: Float[Array, "n"]
    floor: Float[Array, "n"]


def weighed(line: Line, log_weights: Float[Array, "n R"], share: float) -> Weights:
    """Weights of sampled log-weights; a row is trusted with `share` of their sum or more."""
    normalizer = line.call.normalizer
    if normalizer not in WITH_LOG_NORMALIZER:
        zeros = jnp.zeros(log_weights.shape[:1], log_weights.dtype)
        return Weights(normalize(normalizer, log_weights).weights, zeros, zeros)
    shift = lax.stop_gradient(log_weights).max(-1)
    shift = jnp.where(shift == -jnp.inf, 0, shift)
    if normalizer == "softmax_one":
        shift = jnp.maximum(shift, 0)
    weights = jnp.exp(log_weights - shift[:, None])
    return Weights(weights, shift, lax.stop_gradient(share * weights.sum(-1)))


def reweighed(
    line: Line,
    sums: Sums,
    shift: Float[Array, "n"],
    floor: Float[Array, "n"],
    *,
    radius: object = None,
    total: Float[Array, "b P n 1"] | None = None,
    about_mean: bool = False,
) -> Rows:
    """Divide the sums of the values by the sums of ones.

    Args:
      line: the call.
      sums: with the weights over exp(shift).
      shift: see `Rows`.
      floor: see `Weights`.
      radius: beyond which the kernel has no weight, as in `Line.interval`.
      total: the sums of ones, where they are known otherwise.
      about_mean: whether to take a channel's mean out of the values before the sum and add it
        after, so that the noise of sums that are not of positive terms is of the deviations.

    """
    value = for_heads(line.value, len(shift))
    divides = line.call.normalizer in WITH_LOG_NORMALIZER
    empty = line.empty(radius)
    mean = None
    if about_mean and divides:
        # It cancels, so that no gradient passes.
        count = jnp.maximum(line.present.sum(1, keepdims=True), 1)
        mean = lax.stop_gradient(value.sum(1, keepdims=True) / count)
        value = line.present * (value - mean)
    mixed = sums(value)
    if not divides:
        ones = jnp.ones((1, 1, 1, 1), mixed.dtype)
        none = jnp.zeros((1, 1, 1, 1), bool)
        return Rows(jnp.where(empty, 0, mixed), ones, shift, none)
    present = sums(for_heads(line.present, len(shift))) if total is None else total
    if mean is not None:
        mixed = mixed + mean * present
    total = present + _zero_logit(line, shift)
    weak = total <= _by_head(floor)
    usable = ~(weak | empty)
    mixed = jnp.where(usable, mixed / jnp.where(usable, total, 1), 0)
    return Rows(mixed, jnp.where(usable, total, 1), shift, weak)


def _zero_logit(line: Line, shift: Float[Array, "n"]) -> Float[Array, "1 1 n 1"]:
    """What softmax_one's extra logit adds to the denominator."""
    if line.call.normalizer != "softmax_one":
        return jnp.zeros((1, 1, 1, 1), shift.dtype)
    return jnp.exp(-_by_head(shift))


def _by_head(x: Float[Array, "n"]) -> Float[Array, "1 1 n 1"]:
    return x.reshape(1, 1, -1, 1)


def for_heads(x: Float[Array, "b P K W"], heads: int) -> Float[Array, "b P k W"]:
    """Repeated for weights of each query head's own."""
    repeats = heads // x.shape[2] if heads > 1 else 1
    return jnp.repeat(x, repeats, axis=2) if repeats > 1 else x
