"""Attention a block of queries and keys at a time: memory grows with T + S, not with T S.

The weights of a block exist only while it is visited; sums over its keys are carried to the next,
rescaled when a larger logit comes (Milakov and Gimelshein 2018; Rabe and Staats 2021). Blocks that
a mask excludes are skipped, those that it allows as a whole are not masked. Derivatives visit the
same blocks again, see `rule`. All of it is XLA: it runs on CPU, GPU and TPU.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, D value width.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_jax.ops import dense
from attn_jax.ops.blockwise import operands, rule
from attn_jax.ops.blockwise.partition import Plan
from attn_jax.ops.call import Call
from attn_jax.ops.lanes import any_in_all_lanes

# Up to so many query-key pairs a head, all weights at once are faster.
_DENSE_PAIRS = 256 * 256


def available() -> bool:
    """Whether this machine can run it."""
    return True


def unsupported(call: Call) -> str | None:
    """Why it can't run the call, or None."""
    if call.normalizer in ("sparsemax", "entmax15"):
        return f"{call.normalizer} needs all logits of a query at once"
    return None


def unwise(call: Call) -> str | None:
    """Why another implementation is probably faster, or None."""
    if call.shape[2] * call.shape[3] <= _DENSE_PAIRS:
        return f"all weights at once are faster up to {_DENSE_PAIRS} query-key pairs a head"
    return None


def plan(call: Call) -> str:
    """What it would do with the call, in a few words."""
    return str(Plan.of(call)) if 0 not in call.shape else "nothing to visit"


def run(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Output and log-normaliser (None unless asked for)."""
    if 0 in (*call.shape, call.value.shape[3]):
        return dense.run(call)
    if call.mask is None:
        output, log_normalizer = _mixed(call)
    else:
        output, log_normalizer = _mixed_apart(call)
    log_normalizer = log_normalizer if call.return_log_normalizer else None
    return output.astype(call.value.dtype), log_normalizer


def _mixed(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    plan = Plan.of(call)
    arrays = operands.of(call, plan)
    if plan.masked_at_once and not call.return_log_normalizer:
        return rule.attend_quickly(plan, arrays), None
    return rule.attend(plan, arrays)


def _mixed_apart(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """With NaN and inf kept from the products, where 0 * NaN would bring them past the mask.

    Under a mask the products see zeros instead. Then the results that they must reach are made
    NaN; which these are is only found out if there is any.
    """
    bad = [_any_bad(x) for x in (call.query, call.key, call.value) if x is not None]

    def spoilt(output: Array, log_normalizer: Array | None) -> tuple[Array, Array | None]:
        row, entry = _reached(call)
        output = jnp.where(row | entry, jnp.nan, output)
        if log_normalizer is not None:
            log_normalizer = jnp.where(row[..., 0], jnp.nan, log_normalizer)
        return output, log_normalizer

    def clean(*results: Array | None) -> tuple[Array | None, ...]:
        return results

    return lax.cond(any_in_all_lanes(jnp.stack(bad)), spoilt, clean, *_mixed(call))


def _any_bad(x: Float[Array, "B T N W"]) -> Bool[Array, ""]:
    """Whether there is NaN or inf: 0 * x is NaN then, and so is any sum with it.

    A product with zeros is the fastest pass over an array on a CPU.
    """
    rows = lax.stop_gradient(x).reshape(*x.shape[:2], -1)
    return jnp.isnan(rows @ jnp.zeros(rows.shape[2], x.dtype)).any()


def _reached(call: Call) -> tuple[Bool[Array, "B T N 1"], Bool[Array, "B T N D"]]:
    """Which rows and which of their entries see NaN or inf, by the mask alone."""
    value = ~jnp.isfinite(call.value)
    keys = jnp.zeros_like(value[..., :1])
    if call.key is not None:
        keys = ~jnp.isfinite(call.key).all(-1, keepdims=True)
    flags = jnp.concatenate([value, keys, jnp.ones_like(keys)], -1).astype(jnp.float32)
    sums, _ = _mixed(
        Call(
            query=None,
            key=None,
            value=flags,
            proximity=None,
            bias=None,
            mask=call.mask,
            score=None,
            scale=1.0,
            normalizer="none",
            grid=call.grid,
            heads=call.heads,
        )
    )
    seen = lax.stop_gradient(sums) > 0
    row = seen[..., -2:-1]
    if call.query is not None:
        row |= ~jnp.isfinite(call.query).all(-1, keepdims=True) & seen[..., -1:]
    return row, seen[..., :-2]
