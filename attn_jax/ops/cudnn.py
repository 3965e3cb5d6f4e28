"""cuDNN's fused attention by way of `jax.nn.dot_product_attention`, where the meaning is the same.

cuDNN returns means for rows without keys and lets NaN in masked keys through. So it sees zeros
instead of NaN and inf, and the queries they reach are made NaN, rows without keys zero, after it.
Its derivatives are of first order in reverse mode only: it runs when asked for by name.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, H key and value width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attn_jax.ops import masks
from attn_jax.ops.call import Call
from attn_jax.ops.positions import regular_offset


def available() -> bool:
    """Whether this machine can run it."""
    return jax.default_backend() == "gpu"


def unsupported(call: Call) -> str | None:
    """Why it can't run the call, or None."""
    if not available():
        return "it needs an NVIDIA GPU"
    return mismatch(call)


def unwise(call: Call) -> str | None:
    """Why it is not picked unless asked for."""
    del call
    return "it has no forward mode and no second derivatives; ask for it by name"


def plan(call: Call) -> str:
    """What it would do with the call, in a few words."""
    del call
    return "the fused kernel of jax.nn"


def mismatch(call: Call) -> str | None:
    """What in the call has no equal in cuDNN's kernels, on any machine; or None."""
    if call.query is None or call.key is None:
        return "it needs query and key"
    extras = (call.proximity, call.bias, call.score)
    if any(extra is not None for extra in extras) or call.dropout_rate:
        return "it takes no proximity, bias, score function or dropout here"
    if call.normalizer != "softmax" or call.return_log_normalizer:
        return "it is softmax only, without the log-normaliser"
    if not isinstance(call.scale, float):
        return "its scale is a Python float"
    if call.query.dtype not in (jnp.bfloat16, jnp.float16) or call.value.dtype != call.query.dtype:
        return "query, key and value must be all bfloat16 or all float16"
    width = call.query.shape[3]
    if call.value.shape[3] != width or width % 8 or not 0 < width <= 128:
        return "key and value widths must be equal, a multiple of 8, and at most 128"
    if 0 in call.shape:
        return "it needs one query and key or more"
    return _mask_mismatch(call)


def _mask_mismatch(call: Call) -> str | None:
    if call.mask is None:
        return None
    # A subclass may allow something else: only the classes themselves are known.
    if type(call.mask) is masks.Lengths and call.mask.query is None:
        whole = jnp.issubdtype(jnp.asarray(call.mask.key).dtype, jnp.integer)
        return None if whole else "its lengths are integers"
    if type(call.mask) is masks.Causal:
        offset = regular_offset(call.grid.query_positions, call.grid.key_positions)
        return None if offset == 0 else "its causal mask starts at the first query and key"
    return "its masks are Causal() and Lengths(key=...)"


def run(
    call: Call, backend: Literal["cudnn", "xla"] = "cudnn"
) -> tuple[Float[Array, "B T N H"], None]:
    """The output; `backend` is the implementation that jax.nn uses."""
    assert call.query is not None
    assert call.key is not None
    causal = isinstance(call.mask, masks.Causal)
    lengths = _key_lengths(call)
    inside = jnp.arange(call.shape[3])[None, :] < lengths[:, None]
    query_bad = ~jnp.isfinite(call.query).all(-1)
    key_bad = ~jnp.isfinite(call.key).all(-1) & inside[:, :, None]
    value_bad = ~jnp.isfinite(call.value) & inside[:, :, None, None]
    output = jax.nn.dot_product_attention(
        _finite(call.query),
        _finite(call.key),
        _finite(call.value),
        scale=call.scale,
        is_causal=causal,
        key_value_seq_lengths=None if call.mask is None or causal else lengths,
        implementation=backend,
    )
    reached = _reached(key_bad[..., None] | value_bad, causal, call) | query_bad[..., None]
    output = jnp.where(reached, jnp.nan, output)
    return jnp.where((lengths == 0)[:, None, None, None], 0, output), None


def _key_lengths(call: Call) -> Int[Array, "B"]:
    """How many keys of each sequence count."""
    batch, _, _, keys = call.shape
    lengths = call.mask.key if isinstance(call.mask, masks.Lengths) else keys
    lengths = jnp.clip(jnp.asarray(keys if lengths is None else lengths), 0, keys)
    return jnp.broadcast_to(lengths.astype(jnp.int32), (batch,))


def _finite(array: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isfinite(array), array, 0)


def _reached(bad: Bool[Array, "B S K H"], causal: bool, call: Call) -> Bool[Array, "B #T N H"]:
    """Which results a NaN or inf in a key or value must reach."""
    bad = jnp.repeat(bad, call.heads // bad.shape[2], axis=2)
    if not causal:
        return bad.any(1, keepdims=True)
    so_far = jax.lax.cummax(bad.astype(jnp.int32), axis=1) > 0
    return so_far[:, jnp.minimum(jnp.arange(call.shape[2]), call.shape[3] - 1)]
