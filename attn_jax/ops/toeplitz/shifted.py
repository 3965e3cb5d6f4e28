"""Sums of shifted slices, the fastest short convolution on a CPU, as a primitive of JAX.

A slice for every tap, multiplied and added in one fused loop. JAX would transpose each slice to a
padded array and so lose the loop (ten times slower); but the transposed sum is a sum of shifted
slices again.

Letters: A sequences, P inputs, Q outputs, K heads, W channels, L taps; a, q, k: A, Q, K or 1.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_jax.ops.primitives import Run, bilinear, kept_apart

# Sums that add up side by side: one alone waits for each addition before the next.
_PARTS = 4
# Outputs a block of the products that give the weights' cotangent.
_BLOCK = 64
# Bytes of a cache line. Rows a multiple of sixteen lines apart share few places of the first cache,
# and slices of more rows than it holds push each other out of it.
_LINE = 64
_ALIKE = 16 * _LINE
_CACHE = 512 * _LINE


def padded(x: Array, axis: int, ahead: int, behind: int) -> Array:
    """Zeros ahead and behind along an axis; entries less where a number is negative."""
    sides = [(ahead, behind, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), sides)


def _sum(x: Array, weights: Array, *, run: Run, length: int, start: int, apart: bool) -> Array:
    del apart
    sequences, _, heads, channels = x.shape
    taps = weights.shape[1]
    if weights.shape[3] == 1:
        # No axis of one: XLA would choose among layouts that are the same, and copy between them.
        x = x.reshape(*x.shape[:2], -1)
    else:
        weights = weights[..., None]
    inner = x.shape[2:]
    behind = length - 1 + taps - start - x.shape[1]
    # What is kept apart is stored as it is, and any rows too many are not read.
    if run is not kept_apart or start or behind > 0 or _is_spaced(x, taps):
        x = stored(x, start, behind, taps)

    def of_slices(x: Array, weights: Array) -> Array:
        x = x[:, :, *map(slice, inner)]
        return sum_of([weights[:, t] * x[:, t : t + length] for t in range(taps)])

    return run(of_slices, x, weights).reshape(sequences, length, heads, channels)


def stored(x: Array, ahead: int, behind: int, together: int) -> Array:
    """Zeros ahead and behind, and rows set apart where so many together need it.

    One zero at least: XLA stores a padded array that is read by many slices. What is not padded it
    would compute again for every slice. In one pad: of a second one, which sets rows apart and
    whose zeros are not read, XLA would make nothing.
    """
    spacing = _spacing(x.shape[2:], x.dtype.itemsize, together)
    sides = [(0, 0), (ahead, max(behind, 1)), *spacing]
    return lax.pad(x, jnp.zeros((), x.dtype), [(*side, 0) for side in sides])


def sum_of(terms: Sequence[Array]) -> Array:
    """The sum, added up in a few parts side by side."""
    parts = [terms[part::_PARTS] for part in range(min(_PARTS, len(terms)))]
    return functools.reduce(operator.add, [functools.reduce(operator.add, z) for z in parts])


def _spacing(inner: tuple[int, ...], itemsize: int, together: int) -> list[tuple[int, int]]:
    """Zeros behind each of a row's axes, so that rows do not lie alike in the cache.

    Only where they must: to pad a row's end, XLA:CPU copies number by number.
    """
    sides = [(0, 0)] * len(inner)
    row = math.prod(inner) * itemsize
    if row % _ALIKE == 0 and together * row > _CACHE:
        if len(inner) > 1 and inner[0] % (_ALIKE // _LINE) == 0:
            sides[0] = (0, 1)  # a line for each head would be as many bytes as rows are alike by
        else:
            sides[-1] = (0, _LINE // itemsize)
    return sides


def _is_spaced(x: Array, together: int) -> bool:
    return any(behind for _, behind in _spacing(x.shape[2:], x.dtype.itemsize, together))


def _turned(weights: Array, inputs: int, start: int) -> Array:
    """The transposed sum's weights, by which it starts at L - 1 - start.

    Its tap t of input i is tap L - 1 - t of output i + t - (L - 1 - start).
    """
    taps, outputs = weights.shape[1:3]
    weights = jnp.flip(weights, 1)
    if outputs == 1:
        return weights
    first = taps - 1 - start
    weights = padded(weights, 2, first, inputs + start - outputs)
    return jnp.stack([weights[:, t, t : t + inputs] for t in range(taps)], 1)


def _lags(x: Array, y: Array, shape: tuple[int, ...]) -> Array:
    """The weights' cotangent: [t, c] holds the sum over channels of x[c + t] y[c].

    By products of a block of y and the blocks of x that it meets, of which the wanted entries are
    the diagonals: laid out with one more a row, a diagonal is a column.
    """
    sequences, taps, rows, heads = shape
    apart = "k" if heads > 1 else ""
    length, size = y.shape[1], min(_BLOCK, y.shape[1])
    blocks, met = -(-length // size), -(-(size + taps) // size)
    y = padded(y, 1, 0, blocks * size - length)
    x = padded(x, 1, 0, (blocks + met - 1) * size - x.shape[1])
    inner = y.shape[2:] if apart else (math.prod(y.shape[2:]),)
    y, x = (z.reshape(len(z), -1, size, *inner) for z in (y, x))
    sum_of = f"aic{apart}w,aif{apart}w->ai{apart}cf"
    products = [jnp.einsum(sum_of, y, x[:, m : m + blocks]) for m in range(met)]
    if rows == 1:
        products = [z.sum(1, keepdims=True) for z in products]
    products = jnp.concatenate(products, -1)[..., : size + taps]
    products = products.reshape(*products.shape[:2], heads, size, -1)
    flat = padded(products.reshape(*products.shape[:3], -1), 3, 0, size)
    diagonals = flat.reshape(*products.shape[:3], size, -1)[..., :taps]
    lags = jnp.transpose(diagonals, (0, 4, 1, 3, 2)).reshape(len(y), taps, -1, heads)
    lags = lags[:, :, :length] if rows > 1 else lags.sum(2, keepdims=True)
    return lags if sequences > 1 else lags.sum(0, keepdims=True)


def _shape(x: tuple[int, ...], _: tuple[int, ...], *, length: int, **__: Any) -> tuple[int, ...]:
    return (x[0], length, *x[2:])


def _in_x(
    cotangent: Array,
    weights: Array,
    shape: tuple[int, ...],
    *,
    length: int,
    start: int,
    apart: bool,
) -> Array:
    del length
    turned = _turned(weights, shape[1], start)
    return shifted_sum(cotangent, turned, shape[1], weights.shape[1] - 1 - start, apart)


def _in_weights(
    cotangent: Array, x: Array, shape: tuple[int, ...], *, start: int, **_: Any
) -> Array:
    return _lags(padded(x, 1, start, 0), cotangent, shape)


_shifted_sum = bilinear(
    "attn_jax_shifted_sum", _sum, _shape, _in_x, _in_weights, lambda *, apart, **_: apart
)


def shifted_sum(
    x: Float[Array, "A P K W"],
    weights: Float[Array, "a L q k"],
    length: int,
    start: int,
    apart: bool = False,
) -> Float[Array, "A Q K W"]:
    """y[c] = sum over taps t of weights[t, c] x[c + t - start], for c < length.

    x is zero outside. Linear in x and in the weights. `apart`: another sum of slices reads it.
    """
    return _shifted_sum(x, weights, length=length, start=start, apart=apart)
