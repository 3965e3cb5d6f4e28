"""Kernels of any shape and reach, by fast Fourier transforms.

The transforms' noise is a unit of rounding of the sum of all weights, in every row: rows that hold
little of that sum are not to be trusted.

Letters: B batch, P positions, N heads, W channels; k: K, or N where weights differ.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER
from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.rows import Sums, Trust, Weights, for_heads, weighed
from attn_jax.ops.toeplitz.shifted import padded

# Numbers that are transformed at a time: transforms take several times their room, which is kept
# for them in every program that may choose them.
_TOGETHER = 1 << 18
# A row with this share of all weights has an error of some 16 units of rounding.
_SHARE = 1 / 16


def sums(line: Line) -> Sums:
    """With the kernel as it is."""
    lowest, highest = _ends(line)
    weights = _weighed(line).weights
    size = smooth_length(line.length + max(highest, -lowest))
    # y[p] = sum of w[r] x[p + r]: the convolution with the kernel turned round, r at index -r.
    turned = jnp.flip(weights, 1)
    turned = jnp.roll(jnp.pad(turned, ((0, 0), (0, size - turned.shape[1]))), -highest, 1)
    spectrum = jnp.fft.rfft(turned, axis=1)

    def convolved(x: Float[Array, "#b P c"], head: Int[Array, "c"]) -> Float[Array, "#b P c"]:
        product = jnp.fft.rfft(x, size, axis=1) * spectrum[head].T[None]
        return jnp.fft.irfft(product, size, axis=1)[:, : line.length].astype(x.dtype)

    count = len(weights)
    value, present = for_heads(line.value, count), line.present[..., 0]
    if line.normalizer not in WITH_LOG_NORMALIZER:
        mixed = _each_channel(convolved, value, count)
        return Sums(mixed, jnp.ones((1, line.length, 1, 1), line.dtype))
    heads, keys = jnp.arange(count), jnp.maximum(present.sum(1, keepdims=True), 1)
    total = convolved(jnp.repeat(present, count, axis=2), heads)
    # One head's NaN must not reach the others by a product with zero.
    unknown = jnp.isnan(total).any((0, 1))
    known = jnp.where(unknown, 0, total)

    def about_mean(x: Float[Array, "b P c"], head: Int[Array, "c"]) -> Float[Array, "b P c"]:
        """So that the noise is of the deviations; the mean cancels: no gradient passes."""
        mean = lax.stop_gradient(x.sum(1, keepdims=True) / keys)
        # A product, since its transpose is one: a sum over channels takes XLA:CPU far longer.
        spread = jnp.einsum("bpn,nc->bpc", known, (heads[:, None] == head[None]).astype(x.dtype))
        spread = jnp.where(unknown[head], jnp.nan, spread)
        return convolved(present * (x - mean), head) + mean * spread

    return Sums(_each_channel(about_mean, value, count), total[..., None])


def _each_channel(
    function: Callable[[Float[Array, "b P c"], Int[Array, "c"]], Float[Array, "b P c"]],
    x: Float[Array, "b P k W"],
    weights: int,
) -> Float[Array, "b P k W"]:
    """function(channels, of which weights each), of some at a time."""
    batch, length, heads, width = x.shape
    few = max(1, min(heads * width, _TOGETHER // (batch * length)))
    count = -(-heads * width // few)
    channels = padded(x.reshape(batch, length, -1), 2, 0, few * count - heads * width)

    def some(index: Int[Array, ""]) -> Float[Array, "b P c"]:
        there = lax.dynamic_slice_in_dim(channels, index * few, few, 2)
        head = (index * few + jnp.arange(few)) // width
        return function(there, jnp.minimum(head, weights - 1))

    # No spectra are kept for a backward pass.
    y = lax.map(jax.checkpoint(some, prevent_cse=False), jnp.arange(count))
    y = jnp.moveaxis(y, 0, 2).reshape(batch, length, -1)
    return y[..., : heads * width].reshape(x.shape)


def trust(line: Line) -> Trust:
    """How far `sums` are to be trusted."""
    return _weighed(line).trust


def _weighed(line: Line) -> Weights:
    return weighed(line, line.log_weights(*_ends(line)), _SHARE)


def _ends(line: Line) -> tuple[int, int]:
    """Lowest and highest distance on the line that the masks' known limits leave."""
    farthest = line.length - 1
    before = line.before if isinstance(line.before, int) else farthest
    after = line.after if isinstance(line.after, int) else farthest
    lowest = min(max(-before, -farthest), farthest)
    return lowest, max(lowest, min(after, farthest))


def smooth_length(length: int) -> int:
    """The least number from `length` on whose prime factors are 2, 3 and 5."""
    for candidate in itertools.count(max(length, 1)):
        rest = candidate
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return candidate
    raise AssertionError
