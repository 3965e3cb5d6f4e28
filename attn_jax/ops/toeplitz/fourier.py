"""Kernels of any shape and reach, by fast Fourier transforms.

The kernel is sampled once at every distance of the line. The transforms' noise is a unit of
rounding of the sum of all weights, in every row: rows that hold little of that sum are weak.

Letters: B batch, P positions, N heads, W channels, R distances.
"""

import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops.toeplitz.line import Line
from attn_jax.ops.toeplitz.rows import Rows, for_heads, reweighed, weighed

# A row with this share of all weights has an error of some 16 units of rounding.
_SHARE = 1 / 16


def rows(line: Line) -> Rows:
    """Attention by the kernel as it is."""
    lowest, highest = _ends(line)
    weights, shift, floor = weighed(line, line.log_weights(lowest, highest), _SHARE)
    size = smooth(line.length + max(highest, -lowest))
    # y[p] = sum of w[r] x[p + r]: the convolution with the kernel turned round, r at index -r.
    turned = jnp.flip(weights, -1)
    turned = jnp.roll(jnp.pad(turned, ((0, 0), (0, size - turned.shape[1]))), -highest, 1)
    spectrum = jnp.fft.rfft(turned, axis=1).T[None, :, :, None]

    def sums(x: Float[Array, "b P K W"]) -> Float[Array, "b P n W"]:
        product = jnp.fft.rfft(for_heads(x, len(shift)), size, axis=1) * spectrum
        return jnp.fft.irfft(product, size, axis=1)[:, : line.length].astype(x.dtype)

    return reweighed(line, sums, shift, floor, about_mean=True)


def _ends(line: Line) -> tuple[int, int]:
    """Lowest and highest distance on the line that the masks' known limits leave."""
    farthest = line.length - 1
    before = line.before if isinstance(line.before, int) else farthest
    after = line.after if isinstance(line.after, int) else farthest
    lowest = max(-before, -farthest)
    return lowest, max(lowest, min(after, farthest))


def smooth(length: int) -> int:
    """The least number from `length` on whose prime factors are 2, 3 and 5."""
    for candidate in itertools.count(max(length, 1)):
        rest = candidate
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return candidate
    raise AssertionError
