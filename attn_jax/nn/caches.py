"""What a group of heads keeps of past positions while decoding.

Content needs all keys and values. A kernel of known reach needs the values within it, whatever the
length: a window, whose oldest values drop out. An exponential needs one sum of decayed values and
one of decays: its state has the size of one position. A plain mean is an exponential without end.

Every leaf has the batch in front: `jax.tree.map(lambda leaf: leaf[beams], cache)` reorders beams.

Letters: B batch, L positions of a full cache, R of a window, T new positions, n heads of the
group, D value width, E width of x, H key width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Num

from attn_jax import ops
from attn_jax.nn.heads import Group
from attn_jax.nn.kernels import combine
from attn_jax.ops.proximity import exact_reach, known_support

GroupCache = dict[str, Any]
"""One of: value [B, L, n, D] and keys, one entry a branch; window [B, R, n, D]; state."""

_PLAIN = "init_cache(..., compact=False) keeps all keys and values and takes every mask and dropout"


def empty(
    group: Group,
    batch: int,
    length: int,
    context_features: int,
    value_width: int,
    dtype: Any,
    *,
    compact: bool,
    normalizer: str,
) -> GroupCache:
    """The cache before any position, as small as the group's rule allows if `compact`."""
    if compact and _decay(group) is not None and normalizer == "softmax":
        sums = jnp.promote_types(dtype, jnp.float32)
        return {"state": ops.exponential_state(batch, group.num_heads, value_width, sums)}
    reach = _reach(group, length, normalizer) if compact else math.inf
    if reach < length:
        return {"window": jnp.zeros((batch, int(reach), group.num_heads, value_width), dtype)}
    context = jnp.zeros((batch, length, context_features), dtype)
    keys = jax.eval_shape(group.keys, context, jnp.arange(length)[None])
    return {
        "value": jnp.zeros((batch, length, group.num_heads, value_width), dtype),
        "keys": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), keys),
    }


def _decay(group: Group) -> Any:
    """The length of the exponential that is all of the group's rule; None if it is another rule."""
    branch = group.branches[0]
    if len(group.branches) > 1 or branch.product.content is not None:
        return None
    if branch.product.sees_itself_only:
        return None
    kernel = combine([kernel() for kernel in branch.kernels])
    if kernel is None:
        return math.inf
    return kernel.length if type(kernel) is ops.Exponential and kernel.reach is None else None


def _reach(group: Group, length: int, normalizer: str) -> float:
    """How many positions back any branch looks; infinity where that is not known."""
    return max(_branch_reach(branch, length, normalizer) for branch in group.branches)


def _branch_reach(branch: Any, length: int, normalizer: str) -> float:
    if branch.product.content is not None:
        return math.inf
    if branch.product.sees_itself_only:
        return 0
    kernel = combine([kernel() for kernel in branch.kernels])
    if kernel is None:
        return math.inf
    reach = exact_reach(kernel)
    if normalizer == "softmax":
        # Beyond the support all keys together weigh less than rounding does. The nearest key, the
        # query's own, is always there to weigh against.
        negligible = math.log(length + 1) - math.log(float(jnp.finfo(jnp.float32).eps) / 2)
        support = known_support(kernel, negligible)
        reach = reach if support is None else min(reach, support)
    return math.floor(reach) if math.isfinite(reach) else reach


def decode(
    group: Group,
    x: Float[Array, "B T E"],
    value: Float[Array, "B T n D"],
    cache: GroupCache,
    index: Int[Array, "B"],
    **options: Any,
) -> tuple[Float[Array, "B T n D"], GroupCache]:
    """The outputs at new positions, and the cache with them added.

    Args:
      group: the heads.
      x: input at the new positions.
      value: the values there.
      cache: what was kept so far.
      index: how many positions were before.
      **options: mask, normalizer, implementation and dropout, see `attn_jax.attention`.

    Raises:
      ValueError: a full cache has no room; a window or a state with a mask or dropout that it has
        no place for.

    """
    if "state" in cache:
        _check_compact(options, (ops.Causal,))
        state = cache["state"]
        length = jnp.asarray(_decay(group), state.weight.dtype)
        output, state = ops.exponential_step(state, value, length)
        return output, {"state": state}
    if "window" in cache:
        return _decode_window(group, x, value, cache["window"], index, options)
    return _decode_full(group, x, value, cache, index, options)


def _decode_full(
    group: Group, x: Array, value: Array, cache: GroupCache, index: Array, options: dict[str, Any]
) -> tuple[Array, GroupCache]:
    overrun = _overrun(cache, index, x.shape[1])
    positions = _positions(index, x.shape[1])
    new = group.keys(x, positions)
    cache = {
        "value": _write(cache["value"], value, index),
        "keys": jax.tree.map(lambda old, k: _write(old, k, index), cache["keys"], new),
    }
    mask = options["mask"]
    options |= {"mask": ops.Causal() if mask is None else ops.Causal() & mask}
    options |= {"query_positions": positions}
    output = group(x, cache["keys"], cache["value"], positions, **options)
    return jnp.where(overrun[:, None, None, None], jnp.nan, output), cache


def _decode_window(
    group: Group, x: Array, value: Array, window: Array, index: Array, options: dict[str, Any]
) -> tuple[Array, GroupCache]:
    _check_compact(options, (ops.Causal, ops.Local))
    kept, new = window.shape[1], x.shape[1]
    seen = jnp.concatenate([window, value.astype(window.dtype)], 1)
    mask = ops.Causal() if options["mask"] is None else ops.Causal() & options["mask"]
    # Positions count from the window's first, so that they are known while tracing.
    place = index[:, None] - kept + jnp.arange(kept + new)[None]
    options |= {"mask": mask & (place >= 0)[:, None, None, :]}
    where = {"query_positions": kept + np.arange(new), "key_positions": np.arange(kept + new)}
    positions = _positions(index, new)
    output = group(x, (None,) * len(group.branches), seen, positions, **where, **options)
    return output, {"window": seen[:, new:]}


def _check_compact(options: dict[str, Any], masks: tuple[type[ops.Mask], ...]) -> None:
    mask = options["mask"]
    if mask is not None and type(mask) not in masks:
        allowed = " or ".join(mask.__name__ for mask in masks) or "none"
        raise ValueError(
            f"this cache keeps no more of the past than the rule looks at, and takes no mask but "
            f"{allowed}; got {type(mask).__name__}. {_PLAIN}."
        )
    if options.get("dropout_rate"):
        raise ValueError(f"this cache has no dropout; got a dropout_key. {_PLAIN}.")


def _positions(index: Int[Array, "B"], new: int) -> Num[Array, "B T"]:
    return index[:, None] + jnp.arange(new)[None]


def _write(
    old: Float[Array, "B L n D"], new: Float[Array, "B T n D"], index: Int[Array, "B"]
) -> Float[Array, "B L n D"]:
    """Puts new entries at each row's index."""
    write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    return write(old, new.astype(old.dtype), index)


def _overrun(cache: GroupCache, index: Int[Array, "B"], steps: int) -> Bool[Array, "B"]:
    """Where a cache has no room for so many positions more."""
    length = cache["value"].shape[1]
    overrun = index + steps > length
    if steps > length or (not isinstance(overrun, Tracer) and overrun.any()):
        raise ValueError(
            f"the cache has {length} positions and no room for {steps} more: make it longer with "
            "init_cache(batch, length)"
        )
    return overrun
