"""Windows of any radius by blocked sums: plain means of the keys around a query.

Letters: B batch, P positions, N heads, K value heads, W channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn_jax.ops.normalizers import WITH_LOG_NORMALIZER, normalize
from attn_jax.ops.toeplitz.line import Limit, Line
from attn_jax.ops.toeplitz.rows import Sums, Trust, for_heads
from attn_jax.ops.toeplitz.windows import window_sum


def sums(line: Line, farthest: int) -> Sums:
    """Over the keys of a window.

    Args:
      line: the call; its kernel is a `Window` or none.
      farthest: no end of the window is farther, as far as it has an end.

    """
    before, after = limits(line)
    unit = normalize(line.normalizer, jnp.zeros((1, 1), line.dtype)).weights[0, 0]

    def function(x: Float[Array, "#b P k W"]) -> Float[Array, "#b P k W"]:
        return unit * _windowed(x, before, after, farthest)

    mixed = function(for_heads(line.value, _heads(line)))
    if line.normalizer not in WITH_LOG_NORMALIZER:
        return Sums(mixed, jnp.ones((1, line.length, 1, 1), line.dtype))
    first, last = line.interval(line.radius)
    return Sums(mixed, jnp.maximum(last - first + 1, 0)[..., None].astype(line.dtype))


def trust(line: Line) -> Trust:
    """Sums of ones are exact."""
    zeros = jnp.zeros(_heads(line), line.dtype)
    return Trust(zeros, zeros, line.radius, line.radius)


def _heads(line: Line) -> int:
    return 1 if line.radius is None else len(line.radius)


def limits(line: Line) -> tuple[Limit, Limit]:
    """How far the window extends before and after a query."""
    return _nearer(line.before, line.radius), _nearer(line.after, line.radius)


def _nearer(limit: Limit, radius: Limit) -> Limit:
    if limit is None or radius is None:
        return radius if limit is None else limit
    if isinstance(limit, int) and isinstance(radius, np.ndarray):
        return np.minimum(limit, radius)
    return jnp.minimum(limit, radius)


def _windowed(
    x: Float[Array, "#b P K W"], before: Limit, after: Limit, farthest: int
) -> Float[Array, "#b P K W"]:
    """y[p] = sum of x from p - before to p + after, for all heads at once if they share both."""
    before, after = (None if z is None else jnp.asarray(z).reshape(-1) for z in (before, after))
    if all(z is None or len(z) == 1 for z in (before, after)):
        return window_sum(x.reshape(*x.shape[:2], -1), before, after, farthest).reshape(x.shape)

    def of_head(x: Float[Array, "#b P W"], *limits: Limit) -> Float[Array, "#b P W"]:
        before, after = (None if z is None else z[None] for z in limits)
        return window_sum(x, before, after, farthest)

    each = [None if z is None else jnp.broadcast_to(z, x.shape[2]) for z in (before, after)]
    return jax.vmap(of_head, (2, 0, 0), 2)(x, *each)
