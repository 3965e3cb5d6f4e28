"""The arguments of one `attention` call, checked and in one form for every implementation.

Letters: B batch, T queries, S keys, N query heads, K key/value heads (N % K == 0), H key width,
D value width.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from attn_jax.ops import masks, positions, proximity
from attn_jax.ops.normalizers import NORMALIZERS, WITH_LOG_NORMALIZER
from attn_jax.ops.positions import Either, Grid


@dataclasses.dataclass(frozen=True)
class Call:
    """What every implementation receives.

    Attributes:
      query: None together with key when there is no content.
      key: likewise.
      value: the values to be mixed.
      proximity: kernel, or None.
      bias: each axis full or 1, or None.
      mask: or None.
      score: or None.
      scale: scalar or [N]; a Python float where that was given.
      normalizer: a key of NORMALIZERS.
      grid: positions and indices of all queries and keys.
      heads: N.
      dropout_rate: in [0, 1).
      dropout_key: None when the rate is 0.
      return_log_normalizer: whether the log-normaliser is asked for.

    """

    query: Float[Array, "B T N H"] | None
    key: Float[Array, "B S K H"] | None
    value: Float[Array, "B S K D"]
    proximity: proximity.Proximity | None
    bias: Float[Array, "#B #N #T #S"] | None
    mask: masks.Mask | None
    score: Callable[..., Array] | None
    scale: Any
    normalizer: str
    grid: Grid
    heads: int
    dropout_rate: float = 0.0
    dropout_key: Any = None
    return_log_normalizer: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, N, T, S)."""
        return self.value.shape[0], self.heads, len(self.grid.query_index), self.value.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Of logits, weights before the product, and sums: float32, or float64 for float64."""
        content = self.value.dtype if self.query is None else self.query.dtype
        return jnp.promote_types(content, jnp.float32)

    def allowed(self, grid: Grid | None = None) -> Bool[Either, "#B #N #t #s"] | None:
        """The mask on a grid; None where it is known while tracing to allow everything."""
        if self.mask is None:
            return None
        allowed = self.mask.allowed(self.grid if grid is None else grid)
        return None if isinstance(allowed, np.ndarray) and allowed.all() else allowed

    def scored(
        self,
        logits: Float[Array, "b n t s"],
        allowed: Bool[Either, "#b #n #t #s"] | None,
        head_index: Int[Either, "n"],
        grid: Grid,
    ) -> Float[Array, "b n t s"]:
        """Apply `score` to the logits of the pairs of a grid.

        It sees 0 at pairs that are excluded already, which stay so: no function of -inf or of a
        masked NaN can bring a pair back or make a gradient NaN.
        """
        assert self.score is not None
        excluded = logits == -jnp.inf
        if allowed is not None:
            excluded |= ~jnp.asarray(allowed)
        logits = jnp.where(excluded, 0, logits)
        indices = (
            jnp.asarray(grid.query_index).reshape(1, 1, -1, 1),
            jnp.asarray(grid.key_index).reshape(1, 1, 1, -1),
            jnp.asarray(head_index).reshape(1, -1, 1, 1),
        )
        scored = jnp.asarray(self.score(logits, *indices))
        if scored.shape != logits.shape or not jnp.issubdtype(scored.dtype, jnp.floating):
            raise ValueError(
                f"score must return floating logits of the shape it is given, {logits.shape}; got "
                f"{scored.dtype} of shape {scored.shape}."
            )
        return jnp.where(excluded, -jnp.inf, scored.astype(logits.dtype))


def normalized_call(
    query: Any,
    key: Any,
    value: Any,
    *,
    proximity: Any,
    bias: Any,
    mask: Any,
    score: Any,
    scale: Any,
    normalizer: Any,
    query_positions: Any,
    key_positions: Any,
    dropout_rate: Any,
    dropout_key: Any,
    return_log_normalizer: bool,
) -> tuple[Call, bool]:
    """Check the arguments of `attention` and bring them into one form.

    Returns:
      The call, and whether it was unbatched (then B = 1).

    Raises:
      ValueError: see `attention`.

    """
    _check_options(score, normalizer, dropout_rate, dropout_key, return_log_normalizer)
    query, key, value, unbatched = _content(query, key, value)
    _check_kernel(proximity)
    batch, keys, value_heads, _ = value.shape
    queries = _query_count(query, query_positions, keys)
    num_heads = _head_count(query, proximity, value_heads)
    if value_heads == 0 or num_heads % value_heads:
        raise ValueError(
            f"The query heads must be a multiple of the key/value heads; got {num_heads} query "
            f"heads and {value_heads} key/value heads."
        )
    shape = (batch, num_heads, queries, keys)
    _check_kernel_heads(proximity, num_heads)
    grid = positions.everywhere(queries, keys, query_positions, key_positions)
    _check_position_batch(grid, batch)
    call = Call(
        query=query,
        key=key,
        value=value,
        proximity=proximity,
        bias=_bias(bias, shape, unbatched),
        mask=_mask(mask, shape, unbatched),
        score=score,
        scale=_scale(scale, query, num_heads),
        normalizer=normalizer,
        grid=grid,
        heads=num_heads,
        dropout_rate=float(dropout_rate),
        dropout_key=dropout_key,
        return_log_normalizer=return_log_normalizer,
    )
    return call, unbatched


def _check_options(
    score: Any, normalizer: Any, rate: Any, dropout_key: Any, return_log_normalizer: Any
) -> None:
    if not isinstance(normalizer, str) or normalizer not in NORMALIZERS:
        near = difflib.get_close_matches(str(normalizer), NORMALIZERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"normalizer must be one of {', '.join(NORMALIZERS)}; got {normalizer!r}{hint}"
        )
    if return_log_normalizer and normalizer not in WITH_LOG_NORMALIZER:
        raise ValueError(
            f"return_log_normalizer needs a normaliser that has one "
            f"({', '.join(WITH_LOG_NORMALIZER)}); got {normalizer!r}."
        )
    if score is not None and not callable(score):
        raise ValueError(
            f"score must be a function (logits, query_index, key_index, head); got {score!r}."
        )
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be a Python float in [0, 1); got {rate!r}.")
    if rate > 0 and dropout_key is None:
        raise ValueError(
            f"dropout_rate={rate} needs dropout_key, a jax.random.key; set the rate to 0 to "
            "evaluate."
        )
    if rate > 0 and not _is_random_key(dropout_key):
        raise ValueError(f"dropout_key must be a jax.random.key; got {dropout_key!r}.")


def _is_random_key(key: Any) -> bool:
    """Whether this is a typed key, or a raw one: two uint32."""
    if not isinstance(key, jax.Array):
        return False
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or (
        key.dtype == jnp.uint32 and key.shape == (2,)
    )


def _as_array(name: str, value: Any) -> Array:
    if isinstance(value, str):
        raise ValueError(f"{name} must be an array; got {value!r}.")
    try:
        return jnp.asarray(value)
    except TypeError as error:
        raise ValueError(f"{name} must be an array; got {value!r}.") from error


def _content(query: Any, key: Any, value: Any) -> tuple[Array | None, Array | None, Array, bool]:
    """Query, key and value with a batch axis, query and key of one dtype."""
    if (query is None) != (key is None):
        missing, given = ("query", "key") if query is None else ("key", "query")
        raise ValueError(
            f"query and key must both be given, or both be None (no content); got {given} without "
            f"{missing}."
        )
    if value is None:
        raise ValueError("value must be an array [B, S, K, D]; got None.")
    value, unbatched = _with_batch("value", value, "S, K, D")
    if query is None:
        return None, None, value, unbatched
    query, query_unbatched = _with_batch("query", query, "T, N, H")
    key, key_unbatched = _with_batch("key", key, "S, K, H")
    _check_shapes(query, key, value, {unbatched, query_unbatched, key_unbatched})
    dtype = jnp.promote_types(query.dtype, key.dtype)
    return query.astype(dtype), key.astype(dtype), value, unbatched


def _with_batch(name: str, array: Any, axes: str) -> tuple[Array, bool]:
    array = _as_array(name, array)
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} must be [B, {axes}] or [{axes}]; got shape {array.shape}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating; got {array.dtype}. Cast it.")
    return (array[None], True) if array.ndim == 3 else (array, False)


def _check_shapes(query: Array, key: Array, value: Array, unbatched: set[bool]) -> None:
    got = f"got query {query.shape}, key {key.shape}, value {value.shape}."
    if len(unbatched) > 1:
        raise ValueError("query, key and value must all have a batch axis or none; " + got)
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError("query, key and value must share the batch axis; " + got)
    if query.shape[3] != key.shape[3]:
        raise ValueError("query and key must share the width H, the last axis; " + got)
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError("key and value must share the axes S (keys) and K (heads); " + got)


def _query_count(query: Array | None, query_positions: Any, keys: int) -> int:
    if query is not None:
        return query.shape[1]
    return keys if np.ndim(query_positions) == 0 else np.shape(query_positions)[-1]


def _head_count(query: Array | None, kernel: Any, value_heads: int) -> int:
    if query is not None:
        return query.shape[2]
    own = None if kernel is None else proximity.heads(kernel)
    return value_heads if own is None else own


def _check_kernel(kernel: Any) -> None:
    if kernel is None:
        return
    if not isinstance(kernel, proximity.Proximity):
        raise ValueError(
            f"proximity must be a kernel such as Gaussian(4.0), or None; got {kernel!r}."
        )
    proximity.check(kernel)


def _check_kernel_heads(kernel: Any, num_heads: int) -> None:
    own = None if kernel is None else proximity.heads(kernel)
    if own not in (None, num_heads):
        raise ValueError(
            f"A kernel's parameters must be scalars or one per query head; got "
            f"{type(kernel).__name__} with {own} for {num_heads} heads."
        )


def _check_position_batch(grid: Grid, batch: int) -> None:
    for name in ("query_positions", "key_positions"):
        rows = getattr(grid, name).shape[0]
        if rows not in (1, batch):
            raise ValueError(f"{name} must have 1 or {batch} rows, the batch; got {rows}.")


def _bias(
    bias: Any, shape: tuple[int, int, int, int], unbatched: bool
) -> Float[Array, "#B #N #T #S"] | None:
    if bias is None:
        return None
    bias = _as_array("bias", bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        hint = " Pass a boolean array as mask=." if bias.dtype == bool else " Cast it."
        raise ValueError(f"bias must be floating; got {bias.dtype}.{hint}")
    return _rank_four("bias", bias, shape, unbatched)


def _mask(mask: Any, shape: tuple[int, int, int, int], unbatched: bool) -> masks.Mask | None:
    if mask is None:
        return None
    batch, _, queries, keys = shape
    mask = _map_arrays(
        lambda array: _rank_four("A mask array", array, shape, unbatched), masks.as_mask(mask)
    )
    mask.check(batch, queries, keys)
    return mask


def _map_arrays(function: Callable[[Any], Any], mask: masks.Mask) -> masks.Mask:
    """Apply a function to the boolean arrays in a combination of masks."""
    if isinstance(mask, masks.Array):
        return masks.Array(function(mask.array))
    if isinstance(mask, masks.Both | masks.OneOf):
        return type(mask)(_map_arrays(function, mask.first), _map_arrays(function, mask.second))
    return mask


def _rank_four(
    name: str, array: Num[Either, "..."] | Bool[Either, "..."], shape: tuple, unbatched: bool
) -> Any:
    rank = 3 if unbatched else 4
    full = shape[4 - rank :]
    fits = array.ndim == rank and all(a in (1, b) for a, b in zip(array.shape, full, strict=True))
    if not fits:
        axes = "[N, T, S]" if unbatched else "[B, N, T, S]"
        raise ValueError(
            f"{name} must be {axes} = {list(full)}, each axis full or 1; got shape "
            f"{list(array.shape)}. Reshape it, for example keys [B, S] to [B, 1, 1, S]."
        )
    return array[None] if unbatched else array


def _scale(scale: Any, query: Array | None, num_heads: int) -> Any:
    if query is None:
        if scale is not None:
            raise ValueError(
                "scale multiplies query-key products; got scale without query and key. Leave it "
                "None."
            )
        return 1.0
    if scale is None:
        return query.shape[3] ** -0.5 if query.shape[3] else 1.0
    if isinstance(scale, int | float) and not isinstance(scale, bool):
        return float(scale)
    scale = _as_array("scale", scale)
    if scale.shape not in ((), (num_heads,)) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(
            f"scale must be a floating scalar or [{num_heads}], one a query head; got "
            f"{scale.dtype} of shape {scale.shape}."
        )
    return scale
