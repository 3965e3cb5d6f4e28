"""Rows of weights: one query's weights of all keys, of every head, from any number of calls."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from attn_jax.analysis.recording import Attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Queries of one attention, with the weights that heads give their keys.

    Attributes:
      weights: w of every head; `head` takes one.
      allowed: keys that the mask lets a query see.
      relative: r, key less query position.
      frequency: of each key's token; None where it is not known.

    """

    weights: Float[Array, "R *N S"]
    allowed: Bool[Array, "R *N S"]
    relative: Num[Array, "R S"]
    frequency: Float[Array, "R S"] | None = None

    def head(self, head: int) -> "Rows":
        """The rows of one head, without an axis of heads."""
        weights, allowed = self.weights[:, head], self.allowed[:, head]
        return Rows(weights, allowed, self.relative, self.frequency)

    @property
    def first(self) -> Bool[Array, "R *N S"]:
        """Where the first key stands that each query may see: the first token."""
        return self.allowed & (jnp.cumsum(self.allowed, -1) == 1)

    @property
    def uniform(self) -> Float[Array, "R *N S"]:
        """u: the mean over the allowed keys."""
        count = self.allowed.sum(-1, keepdims=True)
        return jnp.where(self.allowed, 1 / jnp.maximum(count, 1), 0)


def rows(attention: Attention, queries: Any = None, frequency: Any = None) -> Rows:
    """The rows of one call.

    Args:
      attention: what `record` kept of it.
      queries: [B, T], true where a query counts; None: all. Leave out padding.
      frequency: [B, S], of each key's token in the training data, for `rare`.

    Returns:
      The rows that count and that have a choice: two keys to see or more, for every head. How
      many these are depends on the data, so this can't be traced.

    """
    weights, allowed = (
        np.moveaxis(np.asarray(x), 1, 2) for x in (attention.weights, attention.allowed)
    )
    batch, length, _, keys = weights.shape
    kept = allowed.sum(-1).min(-1) > 1
    if queries is not None:
        kept &= np.asarray(queries, bool)

    def of_keys(x: Any) -> Array:
        return jnp.asarray(np.broadcast_to(np.asarray(x), (batch, length, keys))[kept])

    if frequency is not None:
        frequency = of_keys(np.asarray(frequency, np.float32)[:, None])
    relative = of_keys(attention.relative)
    return Rows(jnp.asarray(weights[kept]), jnp.asarray(allowed[kept]), relative, frequency)


def sample(several: Sequence[Rows], count: int, generator: np.random.Generator) -> Rows:
    """Up to `count` rows of several calls, drawn without replacement, all with equal chance."""
    total = sum(len(some.relative) for some in several)
    chosen = np.arange(total)
    if total > count:
        chosen = np.sort(generator.choice(total, count, replace=False))

    def of_all(*parts: Array) -> Array:
        return jnp.asarray(np.concatenate([np.asarray(part) for part in parts])[chosen])

    return jax.tree.map(of_all, *several)
