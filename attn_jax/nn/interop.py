"""Rules for Flax's own attention modules, and weights of other libraries for ours."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from attn_jax import ops
from attn_jax.nn.imports import import_attention
from attn_jax.nn.kernels import fixed_kernel
from attn_jax.rules import HeadGroup, parse

__all__ = ["attention_fn", "import_attention"]

_HERE = "use attn_jax.nn.MultiHeadAttention"


@functools.cache
def attention_fn(
    rule: str,
    *,
    normalizer: str = "softmax",
    decode: bool | None = None,
    implementation: str | None = None,
) -> Callable[..., Array]:
    r"""A rule as `attention_fn` of Flax's attention modules.

    .. math::
      z_{ij} = H^{-1/2} q_i \cdot k_j + \log w(r_{ij}) + \text{bias}_{ij}, \quad
      y_i = \sum_j \text{normalise}_j(z_{ij}) \, v_j

    with r = key position - query position; a rule without content leaves out the product (Flax's
    module still has projections of queries and keys, which then get zero gradients). Usable in
    `flax.nnx.MultiHeadAttention`, `flax.linen.MultiHeadDotProductAttention` and
    `flax.linen.MultiHeadAttention`:

        nnx.MultiHeadAttention(..., attention_fn=attention_fn("gaussian(width=2):2, learned:2"))

    The function returned takes query [batch..., T, N, H], key [batch..., S, K, H] and value
    [batch..., S, K, D] with N a multiple of K, and every keyword that Flax passes:

    - bias: [batch..., N, T, S], floating, and mask: likewise, of any dtype, nonzero where the
      query may attend to the key; every axis full or 1. A query that may attend to nothing gives
      zero (Flax gives the mean of all values).
    - is_causal: the key's position may not exceed the query's.
    - dropout_rng, dropout_rate, deterministic: as in Flax. The weights kept differ for every
      batch entry and head, so dropout needs broadcast_dropout=False.
    - dtype: of query, key and value. Logits and weights are float32 in any case (float64 for
      float64), which is what force_fp32_for_softmax asks for.
    - input_positions: [batch..., T], of queries and keys alike; by default both count from zero.
    - module: with sow_weights=True, the weights [batch..., N, T, S] that the values are mixed by
      are sown where Flax sows its own, as `attention_weights`.

    It returns [batch..., T, N, D].

    Flax decodes with one query against a cache of S keys, which looks like cross-attention from
    one query. So where the rule depends on positions, `decode` must say which of the two it is.
    The query's position in the cache is that of the last key that the mask allows in any row.

    Args:
      rule: by name, see `attn_jax.rules`; without parameters to learn.
      normalizer: see `attn_jax.attention`.
      decode: whether one query against several keys is a step of decoding (True) or
        cross-attention, the query at position 0 (False). Nothing else depends on it.
      implementation: see `attn_jax.attention`.

    Returns:
      The function; the same one for equal arguments, so that `jit` knows it again.

    Raises:
      ValueError: here for a rule that does not read, and for one that a plain function cannot
        follow: `raw`, `additive`, `mix`, `learned(key_width=...)` and trainable ones, which
        `attn_jax.nn.MultiHeadAttention` has. When called for what cannot be honoured: precision,
        custom einsums, broadcast_dropout with dropout, dropout without a key, `self` in
        cross-attention, and one query against several keys while `decode` is not given.

    """
    for group in parse(rule):
        _check_plain(group, rule)

    def attend(
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch S K H"],
        value: Float[Array, "*batch S K D"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Float[Array, "*batch T N D"]:
        """Attention by the rule; see `attention_fn`."""
        del force_fp32_for_softmax  # logits and weights are float32 or wider in any case
        _check_absent(
            precision=precision,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        dropping = not deterministic and dropout_rate > 0
        _check_dropout(dropping, broadcast_dropout, dropout_rng)
        *batch, queries, heads, _ = query.shape
        keys = key.shape[-3]
        groups = parse(rule, heads)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (_one_batch_axis(x.astype(dtype), 3) for x in (query, key, value))
        mask, bias = (_pairs(x, batch) for x in (mask, bias))
        mask = None if mask is None else mask.astype(bool)
        products = [group.products[0] for group in groups]
        located = is_causal or any(p.kernels or p.sees_itself_only for p in products)
        query_positions, key_positions = _positions(
            input_positions,
            mask,
            queries,
            keys,
            decode=decode,
            located=located,
            itself_only=any(p.sees_itself_only for p in products),
            rule=rule,
        )
        key, value = (_for_every_query_head(x, heads) for x in (key, value))
        calls, first = [], 0
        for index, group in enumerate(groups):
            product, own = group.products[0], slice(first, first + group.num_heads)
            first += group.num_heads
            has_content = product.content is not None
            arrays = (
                query[:, :, own] if has_content else None,
                key[:, :, own] if has_content else None,
                value[:, :, own],
            )
            arguments = {
                "proximity": fixed_kernel(product, group.num_heads),
                "bias": _heads(bias, own),
                "mask": _all_of(_heads(mask, own), is_causal, product.sees_itself_only),
                "normalizer": normalizer,
                "query_positions": query_positions,
                "key_positions": key_positions,
                "dropout_rate": dropout_rate if dropping else 0.0,
                "dropout_key": jax.random.fold_in(dropout_rng, index) if dropping else None,
            }
            calls.append((arrays, arguments))
        if module is not None:
            weights = [ops.attention_weights(*arrays, **given) for arrays, given in calls]
            _sow(module, jnp.concatenate(weights, 1).reshape(*batch, heads, queries, keys))
        outputs: list[Any] = [
            ops.attention(*arrays, **given, implementation=implementation)
            for arrays, given in calls
        ]
        mixed = jnp.concatenate(outputs, 2)
        return mixed.reshape(*batch, *mixed.shape[1:])

    return attend


def _check_plain(group: HeadGroup, rule: str) -> None:
    """Raises ValueError for what needs more than projected queries, keys and values."""
    if group.is_mix:
        raise ValueError(f"'mix' in the rule {rule!r} has gates to train: {_HERE}")
    content = group.products[0].content
    if content is not None and content.name != "learned":
        raise ValueError(
            f"{content.name!r} in the rule {rule!r} does not compare Flax's projected queries and "
            f"keys: {_HERE}"
        )
    if content is not None and content["key_width"] is not None:
        raise ValueError(
            f"key_width in the rule {rule!r} is the width of projections, which are Flax's here: "
            f"leave it out, or {_HERE}"
        )
    fixed_kernel(group.products[0], group.num_heads)


def _sow(module: Any, weights: Float[Array, "*batch N T S"]) -> None:
    """Stores weights in a Flax module as Flax does: an NNX variable or a Linen collection."""
    kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(kind, "attention_weights", weights)


def _check_absent(**given: Any) -> None:
    remedies = {
        "precision": "precision=None, and jax.default_matmul_precision around the call",
    }
    for name, value in given.items():
        if value is not None:
            remedy = remedies.get(name, "leave it out")
            raise ValueError(f"attention by a rule cannot honour {name}, got {value!r}: {remedy}")


def _check_dropout(dropping: bool, broadcast_dropout: bool, dropout_rng: Any) -> None:
    if dropping and broadcast_dropout:
        raise ValueError(
            "attention by a rule drops weights of every batch entry and head on their own, got "
            "broadcast_dropout=True: set broadcast_dropout=False"
        )
    if dropping and dropout_rng is None:
        raise ValueError("dropout needs dropout_rng, got None: pass a key, or deterministic=True")


def _one_batch_axis(x: Shaped[Array, "..."], rank: int) -> Shaped[Array, "B ..."]:
    """All axes but the last `rank` as one."""
    return x.reshape(-1, *x.shape[x.ndim - rank :])


def _for_every_query_head(x: Float[Array, "B S K D"], heads: int) -> Float[Array, "B S N D"]:
    """Key/value heads repeated: query head n reads n // (N / K)."""
    if heads % x.shape[2]:
        raise ValueError(
            f"the query heads must be a multiple of the key/value heads, got {heads} and "
            f"{x.shape[2]}"
        )
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _pairs(x: Any, batch: list[int]) -> Shaped[Array, "B N T S"] | None:
    """A mask or bias with one batch axis, which stays 1 where it was 1 throughout."""
    if x is None:
        return None
    x = jnp.asarray(x)
    rank = len(batch) + 3
    if x.ndim > rank:
        raise ValueError(f"mask and bias have at most {rank} axes here, got shape {x.shape}")
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return _one_batch_axis(x, 3)


def _positions(
    given: Any,
    mask: Bool[Array, "#B #N #T #S"] | None,
    queries: int,
    keys: int,
    *,
    decode: bool | None,
    located: bool,
    itself_only: bool,
    rule: str,
) -> tuple[Any, Any]:
    """Positions of queries and keys, as `attention` takes them."""
    if given is not None:
        if queries != keys:
            raise ValueError(
                f"input_positions are those of queries and keys alike, got {queries} queries and "
                f"{keys} keys: leave input_positions out"
            )
        given = jnp.asarray(given)
        given = given.reshape(-1, queries)
        return given, given
    if queries == keys:
        return None, None
    cross = queries > 1 or not located or decode is False
    if cross and itself_only:
        raise ValueError("the rule 'self' has no meaning in cross-attention: use another rule")
    if cross:
        # an array, because attention without content counts its queries by their positions
        return np.arange(queries), None
    if decode is None:
        raise ValueError(
            f"one query against {keys} keys is a step of decoding or cross-attention, and the rule "
            f"{rule!r} depends on positions: say attention_fn(..., decode=True) or decode=False"
        )
    if mask is None:
        raise ValueError("decode=True finds the query's position by the mask, got None")
    seen = jnp.broadcast_to(mask, (*mask.shape[:-1], keys)).any((0, 1, 2))
    return jnp.max(jnp.where(seen, jnp.arange(keys), 0))[None], None


def _heads(x: Any, own: slice) -> Any:
    """The heads of a mask or bias that belong to a group."""
    return x if x is None or x.shape[1] == 1 else x[:, own]


def _all_of(mask: Any, is_causal: bool, itself_only: bool) -> Any:
    """The mask, causality and `self` together; None where there is nothing."""
    masks = [ops.Causal()] if is_causal else []
    masks += [ops.Local(0, 0)] if itself_only else []
    masks += [] if mask is None else [mask]
    return functools.reduce(operator.and_, masks) if masks else None
