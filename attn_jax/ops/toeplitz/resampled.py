"""Down to a coarse grid and up again by slices, as primitives of JAX, each the other's transpose.

A slice for every tap, as in `shifted`: products with a matrix of bells, which reaches a few rows
only, would be so small that XLA:CPU took three times as long.

Letters: A sequences, P positions, W channels, m step, K taps, I blocks of m positions, C grid
points, I + K - 1; a: A or 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops.positions import Either
from attn_jax.ops.primitives import Run, bilinear
from attn_jax.ops.toeplitz.shifted import padded, stored, sum_of


def points(length: int, bells: Float[Either, "m K"]) -> int:
    """Of the grid that bells make of a line: C."""
    step, taps = bells.shape
    return -(-length // step) + taps - 1


def down(
    x: Float[Array, "A P W"], bells: Float[Either, "m K"], outermost: bool
) -> Float[Array, "A C W"]:
    """y[c] = sum over taps k and j < m of bells[j, k] x[m (c - k) + j]; x is zero outside.

    `outermost`: x is of the line itself, not of another grid.
    """
    return _down(x, jnp.asarray(bells[None]), outermost=outermost)


def up(
    x: Float[Array, "A C W"], bells: Float[Either, "m K"], length: int, outermost: bool
) -> Float[Array, "A P W"]:
    """y[m i + j] = sum over taps k of bells[j, k] x[i + k], for the first `length` of them."""
    return _up(x, jnp.asarray(bells[None]), length=length, outermost=outermost)


def _to_grid(x: Array, bells: Array, *, run: Run, outermost: bool) -> Array:
    del outermost
    sequences, length, channels = x.shape
    _, step, taps = bells.shape
    count, ahead = points(length, bells[0]), step * (taps - 1)

    def of_slices(x: Array, bells: Array) -> Array:
        x = x.reshape(sequences, -1, step, x.shape[2])[..., :channels]
        terms = [
            bells[:, j, k, None, None] * x[:, taps - 1 - k : taps - 1 - k + count, j]
            for k in reversed(range(taps))
            for j in range(step)
        ]
        return sum_of(terms)

    return run(of_slices, stored(x, ahead, count * step - length), bells)


def _from_grid(x: Array, bells: Array, *, run: Run, length: int, outermost: bool) -> Array:
    del outermost
    sequences, count, channels = x.shape
    taps = bells.shape[2]
    blocks = count - taps + 1

    def of_slices(x: Array, bells: Array) -> Array:
        x = x[..., :channels]
        terms = [bells[:, None, :, k, None] * x[:, k : k + blocks, None] for k in range(taps)]
        return sum_of(terms)

    y = run(of_slices, stored(x, 0, 0), bells)
    return y.reshape(sequences, -1, channels)[:, :length]


def _bells_cotangent(x: Array, grid: Array, shape: tuple[int, ...]) -> Array:
    """[j, k] holds the sum over i and channels of x[m i + j] grid[i + k]."""
    sequences, step, taps = shape
    count = grid.shape[1] - taps + 1
    blocks = padded(x, 1, 0, count * step - x.shape[1]).reshape(len(x), count, step, -1)
    form = "aijw,aiw->aj" if sequences > 1 else "aijw,aiw->j"
    columns = [jnp.einsum(form, blocks, grid[:, k : k + count]) for k in range(taps)]
    return jnp.stack(columns, -1).reshape(shape)


# What is between the levels is stored: only the last step up is left to be fused with what follows.
_down = bilinear(
    "attn_jax_down",
    _to_grid,
    lambda x, bells, **_: (x[0], -(-x[1] // bells[1]) + bells[2] - 1, x[2]),
    lambda cotangent, bells, shape, **how: _up(cotangent, bells, length=shape[1], **how),
    lambda cotangent, x, shape, **_: _bells_cotangent(x, cotangent, shape),
    apart=lambda **_: True,
)
_up = bilinear(
    "attn_jax_up",
    _from_grid,
    lambda x, _, *, length, **__: (x[0], length, x[2]),
    lambda cotangent, bells, _, *, length, **how: _down(cotangent, bells, **how),
    lambda cotangent, x, shape, **_: _bells_cotangent(cotangent, x, shape),
    apart=lambda *, outermost, **_: not outermost,
)
