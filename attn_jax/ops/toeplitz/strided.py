"""Sums of shifted slices, the fastest short convolution on a CPU, as a primitive of JAX.

A slice for every tap, multiplied and added in one fused loop. JAX would transpose each slice to a
padded array and so lose the loop (ten times slower); but the transposed sum is a sum of shifted
slices again. A primitive can say so for derivatives of every order and in both modes.

Letters: A sequences, P inputs, Q outputs, K heads, W channels, L taps, m stride;
a, q, k: A, Q, K or 1.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# Outputs a block of the products that give the weights' cotangent.
_BLOCK = 32


def strided_sum(
    x: Float[Array, "A P K W"],
    weights: Float[Array, "a L q k"],
    stride: int,
    length: int,
    start: int,
) -> Float[Array, "A Q K W"]:
    """y[c] = sum over taps t of weights[t, c] x[stride c + t - start], for c < length.

    x is zero outside; start is a multiple of the stride. Linear in x and in the weights.
    """
    return _bind(x, weights, stride=stride, length=length, start=start, spread=False)


def spread_sum(
    x: Float[Array, "A P K W"],
    weights: Float[Array, "a L p k"],
    stride: int,
    length: int,
    start: int,
) -> Float[Array, "A Q K W"]:
    """y[i] = sum of weights[t, c] x[c] over stride c + t - start = i, for i < length.

    The transposed sum. Start is a multiple of the stride; weights that differ between inputs take a
    stride of 1.
    """
    return _bind(x, weights, stride=stride, length=length, start=start, spread=True)


def padded(x: Array, axis: int, ahead: int, behind: int) -> Array:
    """Zeros ahead and behind along an axis; entries less where a number is negative."""
    sides = [(ahead, behind, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), sides)


def _bind(x: Array, weights: Array, **how: int | bool) -> Array:
    """Inside `shard_map` both operands vary over the axes over which one does."""
    x, weights = _varying_alike(x, weights), _varying_alike(weights, x)
    return _sum_p.bind(x, weights, **how)


def _varying_alike(array: Array, other: Array) -> Array:
    missing = _manual_axes(other) - _manual_axes(array)
    return lax.pcast(array, tuple(missing), to="varying") if missing else array


def _manual_axes(array: Array) -> frozenset[str]:
    """The axes of `shard_map` over which an array varies; jax 0.10 moved them into `mat`."""
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def _sum(x: Array, weights: Array, *, stride: int, length: int, start: int, spread: bool) -> Array:
    return (_spread if spread else _gathered)(x, weights, stride, length, start)


def _gathered(x: Array, weights: Array, stride: int, length: int, start: int) -> Array:
    span = stride * (length - 1) + 1
    x = _stored(x, start, span - 1 + weights.shape[1] - start - x.shape[1])
    total = jnp.zeros((), x.dtype)
    for t in range(weights.shape[1]):
        total = total + weights[:, t, :, :, None] * x[:, t : t + span : stride]
    return total


def _spread(x: Array, weights: Array, stride: int, length: int, start: int) -> Array:
    """Outputs in rows of `stride`: output m q + p - start takes input q - d with tap m d + p."""
    sequences, inputs, heads, width = x.shape
    steps, rows = -(-weights.shape[1] // stride), -(-length // stride)
    ahead = steps - 1 - start // stride
    around = ahead, rows + steps - 1 - ahead - inputs
    x = _stored(x, *around)
    weights = padded(weights, 1, 0, steps * stride - weights.shape[1])
    if weights.shape[2] > 1:
        weights = padded(weights, 2, *around)
    total = jnp.zeros((), x.dtype)
    for d in range(steps):
        first = steps - 1 - d
        taps = weights[:, stride * d : stride * (d + 1)]
        if taps.shape[2] > 1:
            taps = taps[:, :, first : first + rows]
        taps = jnp.swapaxes(taps, 1, 2)[..., None]
        total = total + taps * x[:, first : first + rows, None]
    return total.reshape(sequences, rows * stride, heads, width)[:, :length]


def _stored(x: Array, ahead: int, behind: int) -> Array:
    """Inputs among zeros, one at least: XLA stores a padded array that is read by many slices.

    What is not padded it would compute again for every slice.
    """
    return padded(x, 1, ahead, max(behind, 1))


def _lags(x: Array, y: Array, stride: int, shape: tuple[int, ...]) -> Array:
    """The weights' cotangent: [t, c] holds the sum over channels of x[stride c + t] y[c].

    By products of a block of y and the stretch of x that it meets, of which the wanted entries are
    the diagonals: laid out with one more stride a row, a diagonal is a column. One block after the
    other, so that a stretch is read from the cache.
    """
    if shape[3] == 1:
        x, y = (z.reshape(*z.shape[:2], 1, -1) for z in (x, y))
    sequences, length, heads, _ = y.shape
    taps, size = shape[1], min(_BLOCK, length)
    blocks, stretch = -(-length // size), stride * size + taps
    y = padded(y, 1, 0, blocks * size - length)
    x = padded(x, 1, 0, stride * blocks * size + taps - x.shape[1])

    def product(block: Array) -> Array:
        here = lax.dynamic_slice_in_dim(y, block * size, size, 1)
        there = lax.dynamic_slice_in_dim(x, block * stride * size, stretch, 1)
        return jnp.einsum("ackw,afkw->akcf", here, there)

    if shape[2] == 1:
        add = lambda total, block: (total + product(block), None)  # noqa: E731
        products = lax.scan(add, product(jnp.asarray(0)), jnp.arange(1, blocks))[0][None]
    else:
        products = lax.map(product, jnp.arange(blocks))
    flat = padded(products.reshape(*products.shape[:3], -1), 3, 0, stride * size)
    diagonals = flat.reshape(*products.shape[:3], size, -1)[..., :taps]
    lags = jnp.transpose(diagonals, (1, 4, 0, 3, 2)).reshape(sequences, taps, -1, heads)
    lags = lags[:, :, :length] if shape[2] > 1 else lags.sum(2, keepdims=True)
    return lags if shape[0] > 1 else lags.sum(0, keepdims=True)


def _transposed_in_x(cotangent, x, weights, *, stride, length, start, spread):
    del length
    transposed = strided_sum if spread else spread_sum
    return transposed(cotangent, weights, stride, x.aval.shape[1], start)


def _transposed_in_weights(cotangent, x, weights, *, stride, length, start, spread):
    del length
    one, other = (cotangent, x) if spread else (x, cotangent)
    return _lags(padded(one, 1, start, 0), other, stride, weights.aval.shape)


def _batched(arguments, axes, **how):
    """A mapped axis joins the sequences."""
    lanes = next(z.shape[a] for z, a in zip(arguments, axes, strict=True) if a is not None)
    x, weights = (
        jnp.broadcast_to(z[None], (lanes, *z.shape)) if a is None else jnp.moveaxis(z, a, 0)
        for z, a in zip(arguments, axes, strict=True)
    )
    sequences = x.shape[1]
    weights = jnp.broadcast_to(weights, (lanes, sequences, *weights.shape[2:]))
    x, weights = (z.reshape(lanes * sequences, *z.shape[2:]) for z in (x, weights))
    y = _bind(x, weights, **how)
    return y.reshape(lanes, sequences, *y.shape[1:]), 0


def _abstract(x, weights, *, stride, length, start, spread):
    del weights, stride, start, spread
    return x.update(shape=(x.shape[0], length, *x.shape[2:]), weak_type=False)


_sum_p = Primitive("attn_jax_strided_sum")
_sum_p.def_impl(jax.jit(_sum, static_argnames=("stride", "length", "start", "spread")))
_sum_p.def_abstract_eval(_abstract)
ad.defbilinear(_sum_p, _transposed_in_x, _transposed_in_weights)
batching.primitive_batchers[_sum_p] = _batched
mlir.register_lowering(_sum_p, mlir.lower_fun(_sum, multiple_results=False))
