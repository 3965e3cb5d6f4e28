"""Down to a coarse grid and up again by slices, as primitives of JAX, each the other's transpose.

A slice for every tap, as in `shifted`: products with a matrix of bells, which reaches a few rows
only, would be so small that XLA:CPU took three times as long.

The line may be a longer one, on which runs of positions are laid apart by multiples of the step:
rows are read from where they are, and zeros from a row of them, so that no choice is in the loop.

Letters: A sequences, P positions, Q places of the longer line, W channels, m step, K taps, I blocks
of m positions, C grid points, I + K - 1 and those of both margins; a: A or 1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attn_jax.ops.primitives import Run, linear
from attn_jax.ops.toeplitz.runs import Places
from attn_jax.ops.toeplitz.shifted import padded, stored, sum_of

# From so many channels on it is worth while to look up where a row is, for every tap.
_LONG = 16
# [j][k]: of place j in a block and of tap k.
Bells = tuple[tuple[float, ...], ...]


def points(length: int, bells: Bells) -> int:
    """Of the grid that bells make of a line: C."""
    return -(-length // len(bells)) + len(bells[0]) - 1


def down(
    x: Float[Array, "A P W"],
    bells: Bells,
    outermost: bool,
    laid: Places | None = None,
    margin: int = 0,
) -> Float[Array, "A C W"]:
    """y[c + margin] = sum over taps k and j < m of bells[j][k] x[m (c - k) + j].

    x is zero outside.

    Args:
      x: linear in it.
      bells: the weights.
      outermost: x is of the line itself, not of another grid.
      laid: where the positions of x lie.
      margin: zeros on either side, so many; they are computed like any other points.

    """
    return _down(x, *(laid or ()), bells=bells, outermost=outermost, margin=margin)


def up(
    x: Float[Array, "A C W"],
    bells: Bells,
    length: int,
    outermost: bool,
    laid: Places | None = None,
    margin: int = 0,
) -> Float[Array, "A P W"]:
    """y[m i + j] = sum over taps k of bells[j][k] x[i + k + margin], for the first `length`.

    Args:
      x: linear in it.
      bells: the weights.
      length: of the line.
      outermost: y is of the line itself, not of another grid.
      laid: where the positions of y lie on the line.
      margin: points of x on either side that are not read.

    """
    how = {"bells": bells, "length": length, "outermost": outermost, "margin": margin}
    return _up(x, *(laid or ()), **how)


def _to_grid(x: Array, *laid: Array, run: Run, bells: Bells, outermost: bool, margin: int) -> Array:
    del outermost
    places, (sequences, length, channels) = _places(laid), x.shape
    length = length if places is None else places.position.shape[1]
    step, taps = len(bells), len(bells[0])
    count = points(length, bells) + 2 * margin
    ahead = step * (taps - 1 + margin)
    behind = step * (count - margin) - length

    def of_slices(rows: Array) -> Array:
        rows = rows.reshape(sequences, -1, step, rows.shape[2])[..., :channels]
        terms = [
            bells[j][k] * rows[:, taps - 1 - k : taps - 1 - k + count, j]
            for k in reversed(range(taps))
            for j in range(step)
            if bells[j][k]
        ]
        return sum_of(terms)

    if places is None:
        return run(of_slices, stored(x, ahead, behind, step * taps))
    laid_out = functools.partial(_laid_out, ahead=ahead, behind=behind, together=step * taps)
    return run(of_slices, run(laid_out, x, places.position))


def _laid_out(
    x: Float[Array, "A P W"], position: Int[Array, "a Q"], ahead: int, behind: int, together: int
) -> Float[Array, "A R V"]:
    """As `stored`, with every position at its place: no choice is in the loop over a row."""
    zeros = x.shape[1]
    index = jnp.where(position < 0, zeros, position)
    index = jnp.pad(index, ((0, 0), (ahead, behind)), constant_values=zeros)
    return _taken(stored(x, 0, 1, together), index)


def _from_grid(
    x: Array, *laid: Array, run: Run, bells: Bells, length: int, outermost: bool, margin: int
) -> Array:
    places, (sequences, count, channels) = _places(laid), x.shape
    weights, taps = jnp.asarray(bells, x.dtype)[None, None], len(bells[0])
    blocks = count - 2 * margin - taps + 1
    if places is not None and channels >= _LONG:
        # Where they are read: a sum that is stored and read once more takes twice as long.
        block = _blocks(places.place, len(bells))
        rows = [_taken(x[:, k : k + blocks], block) for k in range(margin, margin + taps)]
        y = sum_of([weights[..., k, None] * z for k, z in enumerate(rows)])
        return y.reshape(sequences, -1, channels)[:, : places.place.shape[1]]

    def of_slices(rows: Array) -> Array:
        rows = rows[..., :channels]
        terms = [weights[..., k, None] * rows[:, k : k + blocks, None] for k in range(taps)]
        return sum_of(terms)

    rows = stored(x[:, margin : margin + blocks + taps - 1], 0, 0, taps)
    y = of_slices(rows) if outermost and places is None else run(of_slices, rows)
    y = y.reshape(sequences, -1, channels)[:, :length]
    return y if places is None else _taken(y, places.place)


def _blocks(place: Int[Array, "a P"], step: int) -> Int[Array, "a I m"]:
    """The block of every place, which lies in it as its position does: gaps are whole blocks."""
    blocks = -(-place.shape[1] // step)
    return padded(place // step, 1, 0, blocks * step - place.shape[1]).reshape(-1, blocks, step)


def _places(laid: Sequence[Array]) -> Places | None:
    return Places(*laid) if laid else None


def _taken(x: Float[Array, "A P W"], index: Int[Array, "a *q"]) -> Float[Array, "A *q W"]:
    index = jnp.broadcast_to(index, (len(x), *index.shape[1:]))
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)


def _down_transposed(
    cotangent: Array, *laid: Array, shape: tuple[int, ...], **how: Any
) -> Float[Array, "A P W"]:
    places = _places(laid)
    length = shape[1] if places is None else places.position.shape[1]
    return up(cotangent, length=length, laid=places, **how)


def _up_transposed(
    cotangent: Array, *laid: Array, bells: Bells, outermost: bool, margin: int, **_: Any
) -> Float[Array, "A C W"]:
    return down(cotangent, bells, outermost, _places(laid), margin)


def _shape_of_grid(
    x: tuple[int, ...], *laid: tuple[int, ...], bells: Bells, margin: int, **_: Any
) -> tuple[int, ...]:
    length = laid[1][1] if laid else x[1]
    return (x[0], points(length, bells) + 2 * margin, x[2])


# What is between the levels is stored: only the last step up is left to be fused with what follows.
_down = linear(
    "attn_jax_down",
    _to_grid,
    _shape_of_grid,
    _down_transposed,
    apart=True,
)
_up = linear(
    "attn_jax_up",
    _from_grid,
    lambda x, *laid, length, **_: (x[0], laid[0][1] if laid else length, x[2]),
    _up_transposed,
    apart=True,
)
