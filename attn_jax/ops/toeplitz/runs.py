"""Runs of positions with one label laid so far apart on a longer line that none reaches another.

Letters: A sequences, P positions, Q places of the longer line.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


class Places(NamedTuple):
    """Where positions lie on a longer line.

    Attributes:
      place: of every position.
      position: at every place, -1 where there is none.

    """

    place: Int[Array, "A P"]
    position: Int[Array, "A Q"]


def gap_between(labels: Shaped[Array, "A P"], longer: int) -> Int[Array, ""]:
    """The widest gap between runs that a line so much longer has room for; 0 if labels come back.

    Then keys of other runs carry a run's label too. It is certain that none comes back where labels
    rise, and fall at most once, to one below the first, as the label of padding does.
    """
    before, after = labels[:, :-1], labels[:, 1:]
    changes, rises, falls = (
        x.sum(1, dtype=jnp.int32) for x in (after != before, after > before, after < before)
    )
    once = (falls == 0) | ((falls == 1) & (labels[:, -1] < labels[:, 0]))
    # NaN neither rises nor falls.
    once &= rises + falls == changes
    return jnp.where(once, longer // jnp.maximum(changes, 1), 0).min()


def places(labels: Shaped[Array, "A P"], gap: Int[Array, ""], longer: int) -> Places:
    """With a gap before every run but the first, for which there must be room."""
    sequences, length = labels.shape
    changes = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))
    index = jnp.arange(length, dtype=jnp.int32)[None]
    place = index + gap * jnp.cumsum(changes, 1, dtype=jnp.int32)
    position = jnp.full((sequences, length + longer), -1, jnp.int32)
    rows = jnp.arange(sequences)[:, None]
    position = position.at[rows, place].set(index, mode="promise_in_bounds", unique_indices=True)
    return Places(place, position)
