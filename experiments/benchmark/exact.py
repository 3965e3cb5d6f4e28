"""Dense attention in float64, a block of queries at a time: what every answer is compared with.

It shares no code with attn_jax. Letters: B batch, T queries, S keys, N heads, H key width, D value
width, t queries of a block; r = key index - query index.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 128

LogWeight = Callable[[Float[Array, "1 t S"]], Float[Array, "#N t S"]]
Allowed = Callable[[Int[Array, "t 1"], Int[Array, "1 S"]], Bool[Array, "t S"]]


def attention(
    query: Float[Array, "B T N H"] | None,
    key: Float[Array, "B S N H"] | None,
    value: Float[Array, "B S N D"],
    *,
    log_weight: LogWeight | None = None,
    allowed: Allowed | None = None,
    bias: Float[Array, "N T S"] | None = None,
    stride: int = 1,
) -> Float[Array, "B rows N D"]:
    """Softmax attention with scale H^-0.5, zero for a query without keys.

    Args:
      query: None (with key) for attention without content; then T = S.
      key: likewise.
      value: the values.
      log_weight: function of r, added to the logits.
      allowed: function of query index and key index, true where the query sees the key.
      bias: added to the logits.
      stride: only the queries 0, stride, 2 stride, ... are answered.

    """
    queries = value.shape[1] if query is None else query.shape[1]
    rows = jnp.arange(0, queries, stride)
    block = math.gcd(len(rows), _BLOCK)
    columns = jnp.arange(value.shape[1])[None]

    def logits(index: Int[Array, "t"]) -> Float[Array, "B N t S"]:
        total = jnp.zeros((1, 1, block, value.shape[1]), value.dtype)
        if query is not None and key is not None:
            scale = query.shape[3] ** -0.5
            total = scale * jnp.einsum("btnh,bsnh->bnts", query[:, index], key)
        if log_weight is not None:
            total += log_weight((columns - index[:, None])[None].astype(value.dtype))[None]
        return total if bias is None else total + bias[:, index][None]

    def answers(index: Int[Array, "t"]) -> Float[Array, "B t N D"]:
        all_logits = logits(index)
        if allowed is not None:
            seen = allowed(index[:, None], columns)[None, None]
            all_logits = jnp.where(seen, all_logits, -jnp.inf)
        weights = _softmax(all_logits)
        weights = jnp.broadcast_to(weights, (value.shape[0], value.shape[2], block, value.shape[1]))
        return jnp.einsum("bnts,bsnd->btnd", weights, value)

    # The checkpoint keeps the weights of one block in the backward pass, instead of all T x S.
    blocks = lax.map(jax.checkpoint(answers), rows.reshape(-1, block))
    return jnp.moveaxis(blocks, 0, 1).reshape(value.shape[0], len(rows), *value.shape[2:])


def _softmax(logits: Float[Array, "B N t S"]) -> Float[Array, "B N t S"]:
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0, peak))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def answer(function: Callable[..., Any], *arguments: Any) -> Callable[[], Sequence[np.ndarray]]:
    """Computes the results of a function in float64 when they are first asked for."""

    @functools.cache
    def compute() -> list[np.ndarray]:
        with jax.enable_x64(True):
            results = jax.jit(function)(*jax.tree.map(_widened, arguments))
            return [np.asarray(leaf) for leaf in jax.tree.leaves(results)]

    return compute


def _widened(argument: Any) -> jax.Array:
    array = np.asarray(argument)
    return jnp.asarray(array if array.dtype.kind in "iub" else array.astype(np.float64))
