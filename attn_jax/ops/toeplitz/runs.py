"""Runs of positions with one label, laid so far apart on a longer line that none reaches another.

Letters: A sequences, P positions, Q places of the longer line.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


class Runs(NamedTuple):
    """Where labels change.

    Attributes:
      run: number of the run that a position is in, from 0 on.
      most: most changes of label in a sequence; where a label may come back, the largest integer,
        for which no gap has room.

    """

    run: Int[Array, "A P"]
    most: Int[Array, ""]


class Places(NamedTuple):
    """Where positions lie on a longer line.

    Attributes:
      place: of every position.
      position: at every place, -1 where there is none.

    """

    place: Int[Array, "A P"]
    position: Int[Array, "A Q"]


def runs_of(labels: Shaped[Array, "A P"]) -> Runs:
    """The runs of labels.

    It is certain that none comes back where labels rise, and fall at most once, to one below the
    first, as the label of padding does.
    """
    before, after = labels[:, :-1], labels[:, 1:]
    changed = after != before
    changes, rises, falls = (
        x.sum(1, dtype=jnp.int32) for x in (changed, after > before, after < before)
    )
    once = (falls == 0) | ((falls == 1) & (labels[:, -1] < labels[:, 0]))
    # NaN neither rises nor falls.
    once &= rises + falls == changes
    most = jnp.where(once, changes, jnp.iinfo(jnp.int32).max).max(initial=0)
    run = jnp.cumsum(jnp.pad(changed, ((0, 0), (1, 0))), 1, dtype=jnp.int32)
    return Runs(run, most)


def gap_between(runs: Runs, longer: int, multiple: int) -> Int[Array, ""]:
    """The widest gap between runs for which there is room; 0 if labels come back.

    Then keys of other runs carry a run's label too.

    Args:
      runs: of one label each.
      longer: by how many places the line is lengthened.
      multiple: of which the gap is one, so that blocks of as many positions stay together.

    """
    gap = longer // jnp.maximum(runs.most, 1)
    return gap - gap % multiple


def places(runs: Runs, gap: Int[Array, ""], longer: int) -> Places:
    """With a gap before every run but the first, for which there must be room."""
    sequences, length = runs.run.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    place = index + gap * runs.run
    position = jnp.full((sequences, length + longer), -1, jnp.int32)
    rows = jnp.arange(sequences)[:, None]
    position = position.at[rows, place].set(index, mode="promise_in_bounds", unique_indices=True)
    return Places(place, position)
