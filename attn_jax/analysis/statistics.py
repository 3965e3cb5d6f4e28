"""What heads look at, in the field's terms: profiles by distance, entropy, kinds of heads.

Letters: R rows, N heads, S keys, L relative positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from attn_jax.analysis.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Means over rows, one entry a head.

    Attributes:
      entropy: -sum_j w_j log w_j, in nats.
      uniform_entropy: the same of the mean over the allowed keys: what entropy is at most.
      distance: sum_j w_j |r_j|, in positions.
      window: sum of w over |r| at most the radius that was asked for.
      itself: w of r = 0.
      previous: w of r = -1.
      next: w of r = 1.
      first: w of the first key that the query may see (a sink, where it is large).
      positional: share of rows whose largest weight lies at the head's most frequent place.
      place: that place, a relative position.

    """

    entropy: Float[Array, "N"]
    uniform_entropy: Float[Array, "N"]
    distance: Float[Array, "N"]
    window: Float[Array, "N"]
    itself: Float[Array, "N"]
    previous: Float[Array, "N"]
    next: Float[Array, "N"]
    first: Float[Array, "N"]
    positional: Float[Array, "N"]
    place: Int[Array, "N"]


def statistics(rows: Rows, radius: float = 2.0) -> Statistics:
    """Statistics of every head.

    Args:
      rows: see `rows`; relative positions are rounded to integers.
      radius: of the window.

    """
    w, r = rows.weights, jnp.round(rows.relative)[:, None, :]

    def mass(where: Array) -> Array:
        return jnp.where(where, w, 0).sum(-1).mean(0)

    largest = jnp.take_along_axis(
        jnp.broadcast_to(r, w.shape), jnp.argmax(jnp.where(rows.allowed, w, -1), -1)[..., None], -1
    )[..., 0]
    share, place = _most_frequent(jnp.round(largest).astype(jnp.int32), w.shape[-1])
    return Statistics(
        entropy=_entropy(w).mean(0),
        uniform_entropy=_entropy(rows.uniform).mean(0),
        distance=(w * abs(r)).sum(-1).mean(0),
        window=mass(abs(r) <= radius),
        itself=mass(r == 0),
        previous=mass(r == -1),
        next=mass(r == 1),
        first=mass(rows.first),
        positional=share,
        place=place,
    )


def _entropy(w: Float[Array, "R N S"]) -> Float[Array, "R N"]:
    return -jnp.where(w > 0, w * jnp.log(jnp.where(w > 0, w, 1)), 0).sum(-1)


def _most_frequent(
    places: Int[Array, "R N"], length: int
) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """The share and the value of each column's most frequent entry, within +-length."""
    count = jax.vmap(lambda column: jnp.bincount(column + length, length=2 * length + 1))
    counts = count(jnp.clip(places, -length, length).T)
    return counts.max(-1) / len(places), jnp.argmax(counts, -1) - length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Profile:
    """The weight of keys by relative position, a curve a head.

    Attributes:
      relative: r, ascending.
      weight: mean of w over the rows that may see a key at r; NaN where none may.
      rows: how many may.

    """

    relative: Int[Array, "L"]
    weight: Float[Array, "N L"]
    rows: Int[Array, "N L"]


def profile(rows: Rows, reach: int | None = None) -> Profile:
    """Mean weight by relative position.

    Args:
      rows: see `rows`; relative positions are rounded to integers.
      reach: |r| up to which; None: as far as there are keys.

    """
    r = jnp.round(rows.relative).astype(jnp.int32)
    reach = int(abs(r).max()) if reach is None else reach
    bins, near = jnp.clip(r, -reach, reach) + reach, abs(r) <= reach

    def by_bin(x: Num[Array, "R S"]) -> Num[Array, "L"]:
        return jax.ops.segment_sum(jnp.where(near, x, 0).ravel(), bins.ravel(), 2 * reach + 1)

    heads = jnp.moveaxis(rows.weights, 1, 0), jnp.moveaxis(rows.allowed, 1, 0)
    total = jax.vmap(by_bin)(heads[0])
    count = jax.vmap(by_bin)(heads[1].astype(jnp.int32))
    weight = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
    return Profile(jnp.arange(-reach, reach + 1), weight, count)


def rare(rows: Rows) -> Float[Array, "N"]:
    """The share of rows whose largest weight is on the rarest key, by head.

    Of several rarest ones any counts.

    Args:
      rows: with `frequency`, see `rows`.

    Raises:
      ValueError: they have none.

    """
    if rows.frequency is None:
        raise ValueError("rare tokens are told by frequency: give rows(..., frequency=...)")
    given = jnp.broadcast_to(rows.frequency[:, None, :], rows.weights.shape)
    least = jnp.where(rows.allowed, given, jnp.inf).min(-1, keepdims=True)
    largest = jnp.argmax(jnp.where(rows.allowed, rows.weights, -1), -1)[..., None]
    return (jnp.take_along_axis(given, largest, -1) == least)[..., 0].mean(0)


KINDS = {
    "positional": "its largest weight lies at one relative position in at least 90 % of rows",
    "previous token": "at least half of its weight lies on the token before",
    "next token": "at least half of its weight lies on the token after",
    "first token": "at least half of its weight lies on the first token",
    "rare tokens": "its largest weight lies on the rarest token in at least 66 % of rows",
}
"""Kinds of heads: positional and rare as in Voita et al. 2019, others as in Clark et al. 2019."""


def kinds(one: Statistics, rarest: Float[Array, "N"] | None = None) -> list[list[str]]:
    """The kinds that each head is of, see `KINDS`.

    Args:
      one: of every head.
      rarest: from `rare`; None: nothing is said of rare tokens.

    """
    holds = {
        "positional": one.positional >= 0.9,
        "previous token": one.previous >= 0.5,
        "next token": one.next >= 0.5,
        "first token": one.first >= 0.5,
    }
    if rarest is not None:
        holds["rare tokens"] = rarest >= 0.66
    return [[kind for kind, of in holds.items() if of[head]] for head in range(len(one.entropy))]
