"""Partial results over disjoint sets of keys, combined."""

from typing import no_type_check

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float


@no_type_check
def merge(
    outputs: Float[ArrayLike, "P *B T N D"], log_normalizers: Float[ArrayLike, "P *B T N"]
) -> tuple[Float[Array, "*B T N D"], Float[Array, "*B T N"]]:
    r"""Combine what `attention` gives for P disjoint sets of keys into what it gives for all.

    .. math:: y = \sum_p e^{l_p - l} \, y_p, \quad l = \log \sum_p e^{l_p}

    Exact for "softmax". Under "softmax_one" every part counts its own zero logit: use "softmax"
    for the parts, and append log-normaliser 0 with output 0 as one more part.

    Args:
      outputs: the results, stacked or a sequence.
      log_normalizers: what `return_log_normalizer` gave with them; -inf for empty parts.

    Returns:
      Output and log-normaliser over all keys; zero and -inf where all parts are empty.

    Raises:
      ValueError: if the shapes don't match.

    References: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021.

    """
    outputs, logs = _stacked(outputs), _stacked(log_normalizers)
    if outputs.shape[:-1] != logs.shape or not outputs.shape[0]:
        raise ValueError(
            "merge needs one log-normaliser [..., T, N] for every output [..., T, N, D], and one "
            f"part or more; got outputs {outputs.shape} and log-normalisers {logs.shape}."
        )
    peak = lax.stop_gradient(logs).max(0, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.exp(logs - peak)
    total = weights.sum(0)
    denominator = jnp.where(total == 0, 1, total)
    mixed = (weights[..., None] * outputs.astype(weights.dtype)).sum(0) / denominator[..., None]
    log_normalizer = jnp.where(total == 0, -jnp.inf, peak[0] + jnp.log(denominator))
    return mixed.astype(outputs.dtype), log_normalizer


def _stacked(parts):
    return jnp.stack([*map(jnp.asarray, parts)]) if isinstance(parts, list | tuple) else parts
