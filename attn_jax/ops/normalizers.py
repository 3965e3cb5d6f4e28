"""From logits to weights.

Logits [..., S] hold -inf where a key is not allowed. The exponential normalisers return weights
and a denominator apart, so that a caller may divide after the product with the values, which is
D numbers a query instead of S.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Logits = Float[Array, "*rows S"]
Row = Float[Array, "*rows 1"]


class Normalized(NamedTuple):
    """weights / denominator are the attention weights; a denominator of None is 1.

    Attributes:
      weights: [..., S], zero where logits are -inf.
      denominator: [..., 1], positive, also for rows without an allowed key.
      log_normalizer: [..., 1], or None where the normaliser has none.

    """

    weights: Logits
    denominator: Row | None = None
    log_normalizer: Row | None = None


def _softmax(logits: Logits) -> Normalized:
    peak = finite_peak(logits)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    denominator = positive(total)
    log_normalizer = jnp.where(total == 0, -jnp.inf, peak + jnp.log(denominator))
    return Normalized(weights, denominator, log_normalizer)


@jax.custom_jvp
def positive(total: Row) -> Row:
    """A sum of weights whose largest is one, unchanged, or one for no weights at all.

    Not a small number for those: float16 could not hold a cotangent divided by it.
    """
    return jnp.maximum(total, 1)


@positive.defjvp
def _change_of_positive(totals: tuple[Row], changes: tuple[Row]) -> tuple[Row, Row]:
    """Of a sum of one too, at which a maximum has a kink."""
    return positive(*totals), *changes


def _softmax_one(logits: Logits) -> Normalized:
    peak = jnp.maximum(finite_peak(logits), 0)
    weights = jnp.exp(logits - peak)
    denominator = weights.sum(-1, keepdims=True) + jnp.exp(-peak)
    return Normalized(weights, denominator, peak + jnp.log(denominator))


def finite_peak(logits: Logits) -> Row:
    """The largest logit, finite for a row without an allowed key too: it cancels.

    No gradient passes. Products, a peak and a sum with nothing but arithmetic between them are one
    call of XLA:CPU's library; a `where` would cut it in pieces.
    """
    lowest = jnp.asarray(jnp.finfo(logits.dtype).min, logits.dtype)
    return lax.reduce(lax.stop_gradient(logits), lowest, lax.max, (logits.ndim - 1,))[..., None]


def _sigmoid(logits: Logits) -> Normalized:
    return Normalized(jax.nn.sigmoid(logits))


def _none(logits: Logits) -> Normalized:
    return Normalized(jnp.exp(logits))


def _linear(logits: Logits) -> Normalized:
    return Normalized(jnp.where(logits == -jnp.inf, 0, logits))


def _sparsemax(logits: Logits) -> Normalized:
    """max(z - tau, 0) with tau such that it sums to one (Martins, Astudillo, ICML 2016)."""
    logits = logits - finite_peak(logits)
    ordered, rank, finite = _descending(logits)
    total = jnp.cumsum(ordered, -1)
    size = (finite & (1 + rank * ordered > total)).sum(-1, keepdims=True)
    tau = (jnp.take_along_axis(total, jnp.maximum(size - 1, 0), -1) - 1) / jnp.maximum(size, 1)

    supported, size = _above(tau, logits)
    tau = (jnp.where(supported, logits, 0).sum(-1, keepdims=True) - 1) / size
    return Normalized(jnp.where(supported, logits - tau, 0))


def _entmax15(logits: Logits) -> Normalized:
    """max(z / 2 - tau, 0)^2, tau such that it sums to one (Peters, Niculae, Martins, ACL 2019)."""
    logits = (logits - finite_peak(logits)) / 2
    ordered, rank, finite = _descending(logits)
    mean = jnp.cumsum(ordered, -1) / rank
    spread = jnp.cumsum(jnp.square(ordered), -1) / rank - jnp.square(mean)
    taus = mean - jnp.sqrt(jnp.maximum(1 / rank - spread, 0))
    size = (finite & (taus <= ordered)).sum(-1, keepdims=True)
    tau = jnp.take_along_axis(taus, jnp.maximum(size - 1, 0), -1)

    supported, size = _above(tau, logits)
    mean = jnp.where(supported, logits, 0).sum(-1, keepdims=True) / size
    spread = jnp.square(jnp.where(supported, logits - mean, 0)).sum(-1, keepdims=True)
    room = 1 - spread
    tau = mean - jnp.where(room > 0, jnp.sqrt(jnp.where(room > 0, room, 1) / size), 0)
    return Normalized(jnp.square(jnp.where(supported, logits - tau, 0)))


def _descending(logits: Logits) -> tuple[Logits, Float[Array, "*ones S"], Bool[Array, "*rows S"]]:
    """Logits from the largest down (0 instead of -inf), their rank, which are finite.

    They only find the set of keys that get weight, through which no gradient passes.
    """
    ordered = -jnp.sort(-lax.stop_gradient(logits), axis=-1)
    finite = ordered != -jnp.inf
    rank = jnp.arange(1, logits.shape[-1] + 1, dtype=logits.dtype)
    rank = rank.reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.where(finite, ordered, 0), rank, finite


def _above(tau: Row, logits: Logits) -> tuple[Bool[Array, "*rows S"], Int[Array, "*rows 1"]]:
    """Which allowed logits are not below tau (NaN counts as above), and how many (at least 1)."""
    supported = ~(logits <= tau) & (logits != -jnp.inf)
    return supported, jnp.maximum(supported.sum(-1, keepdims=True), 1)


NORMALIZERS = {
    "softmax": _softmax,
    "softmax_one": _softmax_one,
    "sigmoid": _sigmoid,
    "none": _none,
    "linear": _linear,
    "sparsemax": _sparsemax,
    "entmax15": _entmax15,
}

# Those whose log-normaliser exists, so that partial results over disjoint keys can be merged.
WITH_LOG_NORMALIZER = ("softmax", "softmax_one")


def normalize(name: str, logits: Logits) -> Normalized:
    """Apply the normaliser called `name` (a key of NORMALIZERS) along the last axis."""
    return NORMALIZERS[name](logits)
