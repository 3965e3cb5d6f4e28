"""Functions that take dense biases and masks, called with `attn_jax.attention`'s arguments."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attn_jax.ops import masks, positions, proximity
from attn_jax.ops.positions import regular_offset
from attn_jax.testing.subject import Subject


@dataclasses.dataclass(frozen=True)
class DenseCall:
    """A call in terms that every attention function has.

    Attributes:
      query: [B, T, N, H]; zeros for attention without content.
      key: [B, S, K, H]; zeros likewise.
      value: [B, S, K, D].
      bias: the sum of bias and kernel, each axis full or 1; or None. Where the kernel gives no
        weight the mask says so: many functions can't take -inf.
      mask: boolean, each axis full or 1, without what follows; or None.
      scale: as given; None is H^-0.5.
      causal: whether query i sees keys 0..i only.
      window: (before, after), or None.
      query_lengths: [B] int32, or None.
      key_lengths: [B] int32, or None.
      return_log_normalizer: whether it is asked for.

    """

    query: Any
    key: Any
    value: Any
    bias: Float[Array, "#B #N #T #S"] | None
    mask: Bool[Array, "#B #N #T #S"] | None
    scale: Any
    causal: bool
    window: tuple[int, int] | None
    query_lengths: Any
    key_lengths: Any
    return_log_normalizer: bool


def dense_call(
    query: Any,
    key: Any,
    value: Any,
    *,
    native: Collection[str] = (),
    proximity: Any = None,
    bias: Any = None,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    normalizer: str = "softmax",
    query_positions: Any = None,
    key_positions: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    return_log_normalizer: bool = False,
) -> DenseCall:
    """Kernels and positions become a bias, masks a boolean array, no content zero queries.

    Args:
      query: see `attn_jax.attention`, as all that follow but `native`.
      key: see there.
      value: see there.
      native: masks that the function has words of its own for, and is given in them where they
        mean the same: "causal", "window", "lengths".
      proximity: see there.
      bias: see there.
      mask: see there.
      score: see there.
      scale: see there.
      normalizer: see there.
      query_positions: see there.
      key_positions: see there.
      dropout_rate: see there.
      dropout_key: see there.
      return_log_normalizer: see there.

    Raises:
      NotImplementedError: for score, dropout and normalisers other than softmax.

    """
    del dropout_key
    if score is not None:
        raise NotImplementedError("it takes no score function")
    if dropout_rate:
        raise NotImplementedError("its dropout has random bits of its own")
    if normalizer != "softmax":
        raise NotImplementedError("it has no normaliser but softmax")
    value = _array(value)
    query, key = _content(query, key, value, query_positions, proximity)
    queries, keys = query.shape[1], key.shape[1]
    grid = positions.everywhere(queries, keys, query_positions, key_positions)
    aligned = regular_offset(grid.query_positions, grid.key_positions) == 0
    rest, own = _split(mask, native if aligned else set(native) & {"lengths"})
    allowed = None if rest is None else jnp.asarray(rest.allowed(grid))
    bias, allowed = _with_kernel(bias, allowed, proximity, grid, query.dtype)
    return DenseCall(
        query,
        key,
        value,
        bias,
        allowed,
        scale,
        any(isinstance(part, masks.Causal) for part in own),
        _window(own),
        _lengths(own, "query", query.shape[0]),
        _lengths(own, "key", query.shape[0]),
        return_log_normalizer,
    )


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _content(query: Any, key: Any, value: Any, placed: Any, kernel: Any) -> tuple[Any, Any]:
    if query is not None:
        return _array(query), _array(key)
    batch, keys, key_heads, width = value.shape
    queries = keys if np.ndim(placed) == 0 else np.shape(placed)[-1]
    heads = None if kernel is None else proximity.heads(kernel)
    query = jnp.zeros((batch, queries, heads or key_heads, width), value.dtype)
    return query, jnp.zeros((batch, keys, key_heads, width), value.dtype)


def _with_kernel(
    bias: Any, allowed: Any, kernel: Any, grid: positions.Grid, dtype: Any
) -> tuple[Any, Any]:
    """Bias and mask with the kernel in them."""
    bias = None if bias is None else _array(bias)
    if kernel is None:
        return bias, allowed
    weights = proximity.log_weights(kernel, grid.relative)
    reached = weights > -jnp.inf
    weights = jnp.where(reached, weights, 0)
    total = (weights if bias is None else weights + bias).astype(
        jnp.promote_types(dtype, "float32")
    )
    return total, reached if allowed is None else allowed & reached


def _parts(mask: masks.Mask) -> list[masks.Mask]:
    """The masks that `&` joins."""
    if isinstance(mask, masks.Both):
        return _parts(mask.first) + _parts(mask.second)
    return [mask]


def _split(mask: Any, native: Collection[str]) -> tuple[masks.Mask | None, list[masks.Mask]]:
    """What is given as an array, and what in the function's own words."""
    rest, own = None, []
    for part in [] if mask is None else _parts(masks.as_mask(mask)):
        if _kind(part) in native:
            own.append(part)
        else:
            rest = part if rest is None else rest & part
    return rest, own


def _kind(mask: masks.Mask) -> str:
    if isinstance(mask, masks.Local) and not all(
        isinstance(side, int | float) for side in (mask.before, mask.after)
    ):
        return "window of data"
    names = {masks.Causal: "causal", masks.Local: "window", masks.Lengths: "lengths"}
    return names.get(type(mask), "")


def _window(own: list[masks.Mask]) -> tuple[int, int] | None:
    found = [part for part in own if isinstance(part, masks.Local)]
    return (int(found[0].before), int(found[0].after)) if found else None


def _lengths(own: list[masks.Mask], side: str, batch: int) -> Any:
    found = [getattr(part, side) for part in own if isinstance(part, masks.Lengths)]
    if not found or found[0] is None:
        return None
    return jnp.broadcast_to(jnp.asarray(found[0]).astype(jnp.int32), (batch,))


def from_dense(
    function: Callable[..., Any],
    name: str | None = None,
    native: Collection[str] = (),
    **about: Any,
) -> Subject:
    """A subject from function(query, key, value, bias=None, mask=None, scale=None).

    It is called with those of bias, mask and scale that a case needs, and, where `native` names
    them, with is_causal=True, local_window_size=(before, after), query_seq_lengths= and
    key_value_seq_lengths=, as `jax.nn.dot_product_attention` calls them; with return_residual=True
    if that is among them. A keyword that it has no parameter for is not supported.

    Args:
      function: the attention function; arrays are shaped as in `attn_jax.attention`.
      name: for tables; by default that of the function.
      native: "causal", "window", "lengths", "residual".
      **about: further fields of `Subject`.

    """
    subject = Subject(name or getattr(function, "__name__", "attention"), function)

    def attention(query: Any, key: Any, value: Any, **arguments: Any) -> Any:
        call = dense_call(query, key, value, native=native, **arguments)
        if call.return_log_normalizer and "residual" not in native:
            raise NotImplementedError("it returns no log-normaliser")
        if np.ndim(call.scale):
            raise NotImplementedError("its scale is one number")
        given = {
            "bias": call.bias,
            "mask": call.mask,
            "scale": call.scale,
            "is_causal": call.causal or None,
            "local_window_size": call.window,
            "query_seq_lengths": call.query_lengths,
            "key_value_seq_lengths": call.key_lengths,
            "return_residual": call.return_log_normalizer or None,
        }
        given = {name: argument for name, argument in given.items() if argument is not None}
        return subject(call.query, call.key, call.value, **given)

    return dataclasses.replace(subject, function=attention, **about)
