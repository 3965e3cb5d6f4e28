"""Position encodings: sinusoids, learned vectors, rotation of queries and keys."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Num

ENCODINGS: Sequence[str] = ("none", "sinusoidal", "learned", "rotary")
_BASE = 10_000.0


def sinusoidal(positions: Num[Array, "*B T"], features: int) -> Float[Array, "*B T {features}"]:
    """sin(p w_k) in the first half of the features and cos(p w_k) in the second.

    w_k = 10000^(-k / ceil(features / 2)) for k = 0, 1, ...; one column is cut off where
    `features` is odd.

    Args:
      positions: p, integer or floating.
      features: width of the encoding.

    References: Vaswani et al. 2017, section 3.5 (there sine and cosine alternate, a permutation
      of the columns).

    """
    half = (features + 1) // 2
    frequencies = np.float32(_BASE) ** (-np.arange(half, dtype=np.float32) / max(half, 1))
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)[..., :features]


def rotate(x: Float[Array, "B T N H"], positions: Num[Array, "#B T"]) -> Float[Array, "B T N H"]:
    """Rotates each pair (x_k, x_{k + H/2}) by the angle p * 10000^(-2k / H).

    The product of a rotated query and a rotated key depends on the difference of their positions
    only. An odd last feature stays as it is.

    Args:
      x: queries or keys.
      positions: p of each, integer or floating.

    References: Su et al. 2021, "RoFormer".

    """
    half = x.shape[-1] // 2
    frequencies = np.float32(_BASE) ** (-np.arange(half, dtype=np.float32) / max(half, 1))
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    sine, cosine = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = (first * cosine - second * sine, second * cosine + first * sine, rest)
    return jnp.concatenate(rotated, -1)


class LearnedPositions(nnx.Module):
    """A free vector for each position 0..max_length-1.

    Args:
      max_length: number of positions.
      features: width of the encoding.
      rngs: the source of initial values.

    Raises:
      ValueError: when called with positions that are not integers or have no vector (inside of
        jit, where that is not known, the encoding is NaN).

    """

    def __init__(self, max_length: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * rngs.params.normal((max_length, features)))

    def __call__(self, positions: Num[Array, "*B T"]) -> Float[Array, "*B T E"]:
        """The vectors at integer positions."""
        length = self.embedding.shape[0]
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ValueError(f"learned positions must be integers, got {positions.dtype}")
        outside = (positions < 0) | (positions >= length)
        if positions.shape[-1] > length or (not isinstance(outside, Tracer) and outside.any()):
            raise ValueError(
                f"learned positions end at {length}, got {positions.shape[-1]} positions, some of "
                "them beyond: raise max_length"
            )
        vectors = self.embedding[...][jnp.where(outside, 0, positions)]
        return jnp.where(outside[..., None], jnp.nan, vectors)


def check_encoding(name: str, max_length: int | None) -> None:
    """Raises ValueError for an unknown encoding or learned positions without a length."""
    if name not in ENCODINGS:
        raise ValueError(f"position_encoding must be one of {', '.join(ENCODINGS)}, got {name!r}")
    if name == "learned" and max_length is None:
        raise ValueError("position_encoding='learned' needs max_length, the number of positions")
