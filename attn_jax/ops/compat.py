"""`jax.nn.dot_product_attention`'s signature on top of `attention`."""

from typing import Any, no_type_check

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from attn_jax.ops.attention import attention
from attn_jax.ops.masks import Causal, Lengths, Local, Mask


@no_type_check
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K D"],
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Float[Array, "*B T N D"] | tuple[Float[Array, "*B T N D"], Float[Array, "*B T N"]]:
    """Scaled dot-product attention with the signature of `jax.nn.dot_product_attention`.

    It differs from that function in these points:

    - a query with no allowed key gives zero and zero gradients, not the mean of all values;
    - NaN and inf in masked keys and values reach no result and no gradient;
    - key and value may differ in width;
    - the residual is float32 or wider, and differentiable;
    - `implementation` takes the names of `attn_jax.implementations()`; "xla" means "dense".

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H].
      value: [B, S, K, D] or [S, K, D].
      bias: [B, N, T, S] or [N, T, S], each axis full or 1.
      mask: boolean, likewise; true where the query may attend to the key.
      scale: multiplies the query-key product; by default H^-0.5.
      is_causal: whether query i sees keys 0..i only.
      query_seq_lengths: [B]; queries beyond give zero.
      key_value_seq_lengths: [B]; keys beyond are not seen.
      local_window_size: (before, after) or one number for both: query i sees i - before..i + after.
      implementation: see `attn_jax.attention`.
      return_residual: whether to return the log-normaliser [B, T, N] too.

    Returns:
      As query, with width D; with `return_residual` a pair of it and the log-normaliser.

    Raises:
      ValueError, NotImplementedError: see `attn_jax.attention`.

    """
    masks: list[Any] = [] if mask is None else [jnp.asarray(mask)]
    if is_causal:
        masks.append(Causal())
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        masks.append(Lengths(query=query_seq_lengths, key=key_value_seq_lengths))
    if local_window_size is not None:
        masks.append(_window(local_window_size))
    return attention(
        query,
        key,
        value,
        bias=bias,
        mask=_all_of(masks),
        scale=scale,
        return_log_normalizer=return_residual,
        implementation="dense" if implementation == "xla" else implementation,
    )


def _window(size: Any) -> Local:
    sides = (size, size) if isinstance(size, int | np.integer) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"local_window_size must be a number or (before, after); got {size!r}.")
    return Local(*sides)


def _all_of(masks: list[Any]) -> Mask | Any | None:
    if not masks:
        return None
    combined = masks[0]
    for mask in masks[1:]:
        combined = combined & mask
    return combined
