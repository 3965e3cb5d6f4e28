"""The reference: all weights at once, in ordinary JAX operations.

Time and memory grow as B N T S; every derivative of every order in both modes is JAX's own. Axes
on which nothing depends stay 1 until the product with the values: the weights of a kernel alone
are [1, N, T, S] for any batch.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H key width,
D value width; b, n, t: B, N, T or 1.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_jax.ops import dropout, proximity
from attn_jax.ops.call import Call
from attn_jax.ops.lanes import any_in_all_lanes
from attn_jax.ops.normalizers import Normalized, normalize
from attn_jax.ops.positions import Either

Logits = Float[Array, "b n t S"]
Allowed = Bool[Either, "#B #N #T #S"]


def available() -> bool:
    """Whether this machine can run it."""
    return True


def unsupported(call: Call) -> str | None:
    """Why this implementation can't run the call: it takes every one."""
    del call
    return None


def unwise(call: Call) -> str | None:
    """Why another implementation is faster: it is what remains."""
    del call
    return None


def plan(call: Call) -> str:
    """What it would do with the call, in a few words."""
    del call
    return "all weights at once"


def run(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Output and log-normaliser (None unless asked for)."""
    allowed = call.allowed()
    parts = normalized(call, allowed)
    output = _mix(parts.weights, wide_value(call), allowed, call.heads)
    if parts.denominator is not None:
        output = _divided(output, parts.denominator, masked=allowed is not None)
    batch, heads, queries, _ = call.shape
    output = jnp.broadcast_to(output, (batch, heads, queries, output.shape[-1]))
    log_normalizer = None
    if call.return_log_normalizer and parts.log_normalizer is not None:
        rows = jnp.broadcast_to(parts.log_normalizer[..., 0], (batch, heads, queries))
        log_normalizer = jnp.swapaxes(rows, 1, 2)
    return jnp.swapaxes(output, 1, 2).astype(call.value.dtype), log_normalizer


def _divided(
    output: Float[Array, "B N t D"], denominator: Float[Array, "#B #N #t 1"], masked: bool
) -> Float[Array, "B N t D"]:
    if not masked:
        return output / denominator
    # Dividing by NaN would spread NaN over the cotangents of values masked in that row.
    bad = jnp.isnan(denominator)
    return jnp.where(bad, jnp.nan, output / jnp.where(bad, 1, denominator))


def wide_value(call: Call) -> Float[Array, "B S K D"]:
    """The values in a dtype that holds the weights, which take the values' dtype in a product.

    Unnormalised weights may exceed what float16 can hold, though the result does not.
    """
    large = call.normalizer in ("none", "linear") and call.value.dtype == jnp.float16
    return call.value.astype(jnp.float32) if large else call.value


def weights(call: Call) -> Float[Array, "B N T S"]:
    """The attention weights, after dropout."""
    parts = normalized(call, call.allowed())
    divided = parts.weights
    if parts.denominator is not None:
        divided = divided / parts.denominator
    return jnp.broadcast_to(divided, call.shape)


def normalized(call: Call, allowed: Allowed | None) -> Normalized:
    """The weights, after dropout, and what divides them."""
    parts = normalize(call.normalizer, _logits(call, allowed))
    if allowed is not None:
        # A NaN logit makes its whole row NaN, which must not reach the values masked in that row.
        parts = parts._replace(weights=jnp.where(allowed, parts.weights, 0))
    if not call.dropout_rate:
        return parts
    keep = dropout.keep(call.dropout_key, call.dropout_rate, call.shape)
    kept = jnp.where(keep, parts.weights / (1 - call.dropout_rate), 0)
    return parts._replace(weights=kept)


def _logits(call: Call, allowed: Allowed | None) -> Logits:
    """All terms of the logits, -inf at keys that are not allowed."""
    logits = jnp.zeros((1, 1, 1, call.shape[3]), call.dtype)
    if call.query is not None and call.key is not None:
        logits = _content(call.query, call.key, call, masked=allowed is not None)
    if call.proximity is not None:
        kernel = proximity.log_weights(call.proximity, call.grid.relative)
        logits = logits + kernel.astype(call.dtype)
    if call.bias is not None:
        logits = logits + call.bias.astype(call.dtype)
    if call.score is not None:
        logits = jnp.broadcast_to(logits, call.shape)
        logits = call.scored(logits, allowed, jnp.arange(call.heads), call.grid)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)


def _content(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], call: Call, masked: bool
) -> Float[Array, "B N T S"]:
    """The query-key product, scaled.

    A masked pair has a cotangent of zero, but 0 * NaN is NaN. So under a mask the product sees 0
    instead of NaN and inf, and the logits they belong to are made NaN after it.
    """
    if not masked:
        return _scaled_product(query, key, call)
    query_finite, key_finite = jnp.isfinite(query), jnp.isfinite(key)
    clean = jnp.where(query_finite, query, 0), jnp.where(key_finite, key, 0)
    key_good = jnp.repeat(key_finite.all(-1), call.heads // key.shape[2], axis=2)
    good = (
        jnp.swapaxes(query_finite.all(-1), 1, 2)[:, :, :, None]
        & jnp.swapaxes(key_good, 1, 2)[:, :, None, :]
    )
    return jnp.where(good, _scaled_product(*clean, call), jnp.nan)


def _scaled_product(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], call: Call
) -> Float[Array, "B N T S"]:
    """Multiply in the logits' dtype, with the heads in front: twice as fast on a CPU."""
    batch, queries, _, width = query.shape
    group = call.heads // key.shape[2]
    query = jnp.swapaxes(query, 1, 2).reshape(batch, key.shape[2], group, queries, width)
    key = jnp.swapaxes(key, 1, 2)
    logits = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=call.dtype)
    scale = jnp.asarray(call.scale, call.dtype)
    return logits.reshape(call.shape) * (scale if scale.ndim == 0 else scale.reshape(1, -1, 1, 1))


def _mix(
    weights: Logits, value: Float[Array, "B S K D"], allowed: Allowed | None, heads: int
) -> Float[Array, "B N t D"]:
    """Mix the values; NaN and inf in one reach just the queries whose mask lets them see it.

    A value's weight is exactly zero where it is masked, but 0 * NaN is NaN: the product sees zeros
    instead, and a second product, done only if there is anything to do, finds the queries reached.
    """
    if allowed is None:
        return product(weights, value, heads)
    if allowed.shape[1:3] == (1, 1):
        hidden_from_all = ~jnp.moveaxis(jnp.asarray(allowed), 3, 1)
        return product(weights, jnp.where(hidden_from_all, 0, value), heads)
    bad = ~jnp.isfinite(value)
    mixed = product(weights, jnp.where(bad, 0, value), heads)
    # Made from `mixed`, so that under shard_map both branches vary over the same axes.
    none = jnp.isnan(mixed) & False
    pairs = jnp.broadcast_to(allowed, (*allowed.shape[:3], value.shape[1]))
    seen = lax.cond(
        any_in_all_lanes(bad),
        lambda: none | (product(pairs.astype(jnp.float32), bad.astype(jnp.float32), heads) > 0),
        lambda: none,
    )
    return jnp.where(seen, jnp.nan, mixed)


def product(weights: Logits, value: Float[Array, "B S K D"], heads: int) -> Float[Array, "B N t D"]:
    """Mix the values in the values' dtype, accumulated in float32 or wider."""
    batch, _, value_heads, width = value.shape
    group = heads // value_heads
    axes, shape = "", ()
    if weights.shape[0] > 1:
        axes, shape = "b", (batch,)
    if weights.shape[1] > 1:
        axes, shape = axes + "kg", (*shape, value_heads, group)
    queries, keys = weights.shape[2:]
    mixed = jnp.einsum(
        f"{axes}ts,bksd->bk{'g' if 'g' in axes else ''}td",
        weights.reshape(*shape, queries, keys).astype(value.dtype),
        jnp.swapaxes(value, 1, 2),
        preferred_element_type=jnp.promote_types(value.dtype, jnp.float32),
    )
    if "g" not in axes and group > 1:
        mixed = jnp.repeat(mixed, group, axis=1)
    return mixed.reshape(batch, heads, queries, width)
