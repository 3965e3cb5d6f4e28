"""Sums of shifted slices, the fastest short convolution on a CPU, as a primitive of JAX.

A slice for every tap, multiplied and added in one fused loop. JAX would transpose each slice to a
padded array and so lose the loop (ten times slower); but the transposed sum is a sum of shifted
slices again. A primitive can say so for derivatives of every order and in both modes.

Letters: A sequences, P inputs, Q outputs, K heads, W channels, L taps; a, q, k: A, Q, K or 1.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# Outputs a block of the products that give the weights' cotangent.
_BLOCK = 64


def shifted_sum(
    x: Float[Array, "A P K W"], weights: Float[Array, "a L q k"], length: int, start: int
) -> Float[Array, "A Q K W"]:
    """y[c] = sum over taps t of weights[t, c] x[c + t - start], for c < length.

    x is zero outside. Linear in x and in the weights.
    """
    # Inside `shard_map` both operands must vary over the axes over which one does.
    x, weights = _varying_alike(x, weights), _varying_alike(weights, x)
    return _sum_p.bind(x, weights, length=length, start=start)


def padded(x: Array, axis: int, ahead: int, behind: int) -> Array:
    """Zeros ahead and behind along an axis; entries less where a number is negative."""
    sides = [(ahead, behind, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), sides)


def _varying_alike(array: Array, other: Array) -> Array:
    missing = _manual_axes(other) - _manual_axes(array)
    return lax.pcast(array, tuple(missing), to="varying") if missing else array


def _manual_axes(array: Array) -> frozenset[str]:
    """The axes of `shard_map` over which an array varies; jax 0.10 moved them into `mat`."""
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def _sum(x: Array, weights: Array, *, length: int, start: int) -> Array:
    taps = weights.shape[1]
    # One zero at least: XLA stores a padded array that is read by many slices. What is not padded
    # it would compute again for every slice.
    x = padded(x, 1, start, max(length - 1 + taps - start - x.shape[1], 1))
    total = jnp.zeros((), x.dtype)
    for t in range(taps):
        total = total + weights[:, t, :, :, None] * x[:, t : t + length]
    return total


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

    By products of a block of y and the stretch of x that it meets, of which the wanted entries are
    the diagonals: laid out with one more a row, a diagonal is a column. One block after the other,
    so that a stretch is read from the cache.
    """
    if shape[3] == 1:
        x, y = (z.reshape(*z.shape[:2], 1, -1) for z in (x, y))
    sequences, length, heads, _ = y.shape
    taps, size = shape[1], min(_BLOCK, length)
    blocks, stretch = -(-length // size), size + taps
    y = padded(y, 1, 0, blocks * size - length)
    x = padded(x, 1, 0, blocks * size + taps - x.shape[1])

    def product(block: Array) -> Array:
        here = lax.dynamic_slice_in_dim(y, block * size, size, 1)
        there = lax.dynamic_slice_in_dim(x, block * size, stretch, 1)
        return jnp.einsum("ackw,afkw->akcf", here, there)

    if shape[2] == 1:

        def add(total: Array, block: Array) -> tuple[Array, None]:
            return total + product(block), None

        products = lax.scan(add, product(jnp.asarray(0)), jnp.arange(1, blocks))[0][None]
    else:
        products = lax.map(product, jnp.arange(blocks))
    flat = padded(products.reshape(*products.shape[:3], -1), 3, 0, size)
    diagonals = flat.reshape(*products.shape[:3], size, -1)[..., :taps]
    lags = jnp.transpose(diagonals, (1, 4, 0, 3, 2)).reshape(sequences, taps, -1, heads)
    lags = lags[:, :, :length] if shape[2] > 1 else lags.sum(2, keepdims=True)
    return lags if shape[0] > 1 else lags.sum(0, keepdims=True)


def _transposed_in_x(cotangent, x, weights, *, length, start):
    del length
    inputs = x.aval.shape[1]
    turned = _turned(jnp.asarray(weights), inputs, start)
    return shifted_sum(jnp.asarray(cotangent), turned, inputs, weights.shape[1] - 1 - start)


def _transposed_in_weights(cotangent, x, weights, *, length, start):
    del length
    return _lags(padded(jnp.asarray(x), 1, start, 0), jnp.asarray(cotangent), weights.aval.shape)


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
    y = shifted_sum(x, weights, **how)
    return y.reshape(lanes, sequences, *y.shape[1:]), 0


def _abstract(x, weights, *, length, start):
    del weights, start
    return x.update(shape=(x.shape[0], length, *x.shape[2:]), weak_type=False)


_sum_p = Primitive("attn_jax_shifted_sum")
_sum_p.def_impl(jax.jit(_sum, static_argnames=("length", "start")))
_sum_p.def_abstract_eval(_abstract)
ad.defbilinear(_sum_p, _transposed_in_x, _transposed_in_weights)
batching.primitive_batchers[_sum_p] = _batched
mlir.register_lowering(_sum_p, mlir.lower_fun(_sum, multiple_results=False))
