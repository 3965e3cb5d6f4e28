"""Multi-head attention with a rule per head: parameters here, all mathematics in ops."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from attn_jax.nn import caches, watching
from attn_jax.nn.distances import Distance, lying
from attn_jax.nn.heads import UNPROJECTED, Group
from attn_jax.nn.initialization import named
from attn_jax.rules import HeadGroup, parse

Cache = dict[str, Any]
"""index [B] and groups, one of `caches` each: a plain pytree."""


class Projected(NamedTuple):
    """A context's keys and values, projected once for many calls.

    Attributes:
      keys: of every group of heads and of every branch of it; None without content.
      value: of all heads.

    """

    keys: tuple[tuple[Float[Array, "B S n H"] | None, ...], ...]
    value: Float[Array, "B S N D"]


class MultiHeadAttention(nnx.Module):
    """Attention with several heads, each group of heads under a rule of its own.

    y_i = sum over heads of W_out (sum_j w_ij W_value x_j), with weights w by the rule; every rule
    has the projections of values and output, `learned` and `additive` those of queries and keys.

    Args:
      num_heads: N.
      in_features: E, the width of x.
      rule: by name, see `attn_jax.rules`: "learned", "gaussian(offset=-1):2, learned:6", ...
      context_features: C, the width of the context of cross-attention; None: E.
      qkv_features: N times the width of a head; None: E.
      out_features: width of the output; None: E.
      use_bias: of all projections.
      attention_dropout_rate: chance that a weight is dropped while a dropout_key is given.
      normalizer: see `attn_jax.attention`.
      rotary: rotate queries and keys of content heads by their positions.
      distance: what kernels see of two positions, such as `Plane(columns=28)` where x is an image
        row by row; None: key less query. Positions are indices then, and masks of positions see
        places: `Causal` is the same, `Local` counts places.
      implementation: see `attn_jax.attention`.
      rngs: the source of initial values, which depend on seed and parameter path only.

    Raises:
      ValueError: the rule does not fit, or widths that must be divisible are not.

    References: Vaswani et al. 2017, section 3.2.2; for the rules see `attn_jax.rules`.

    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        rule: str = "learned",
        context_features: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        attention_dropout_rate: float = 0.0,
        normalizer: str = "softmax",
        rotary: bool = False,
        distance: Distance | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        width = qkv_features or in_features
        context_features = context_features or in_features
        groups = parse(rule, num_heads)
        if width % num_heads:
            raise ValueError(
                f"the width of all heads must be a multiple of num_heads={num_heads}, got {width}"
            )
        _check_unprojected(groups, width, in_features, context_features)
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.in_features, self.context_features = in_features, context_features
        self.out_features = out_features or in_features
        self.attention_dropout_rate = attention_dropout_rate
        self.normalizer, self.implementation = normalizer, implementation
        self.distance = distance
        widths = {
            "in_features": in_features,
            "context_features": context_features,
            "head_width": self.head_width,
            "rotary": rotary,
            "use_bias": use_bias,
            "distance": distance,
        }
        self.groups = nnx.List([])
        first_head = 0
        for index, group in enumerate(groups):
            child = named(named(rngs, "groups"), index)
            self.groups.append(Group(group, first_head, rngs=child, **widths))
            first_head += group.num_heads
        self.value = nnx.Linear(
            context_features, width, use_bias=use_bias, rngs=named(rngs, "value")
        )
        self.output = nnx.Linear(
            width, self.out_features, use_bias=use_bias, rngs=named(rngs, "output")
        )

    def init_cache(
        self, batch: int, length: int, dtype: Any = jnp.float32, *, compact: bool = True
    ) -> Cache:
        """An empty cache of `length` positions for decoding; batch is every leaf's first axis.

        Args:
          batch: B.
          length: how many positions it must hold.
          dtype: of keys and values.
          compact: heads that look at distance only keep what their kernel reaches, or the O(1)
            state of an exponential, whatever the length; they take no mask of data then. False:
            all heads keep everything.

        Raises:
          ValueError: the module has a `distance` of its own.

        """
        if self.distance is not None:
            raise ValueError(
                f"a cache counts distance by index, got distance={self.distance}: call the module "
                "on whole sequences with mask=Causal()"
            )
        groups = [
            caches.empty(
                group,
                batch,
                length,
                self.context_features,
                self.head_width,
                dtype,
                compact=compact,
                normalizer=self.normalizer,
            )
            for group in self.groups
        ]
        return {"index": jnp.zeros(batch, jnp.int32), "groups": groups}

    def __call__(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S C"] | Projected | None = None,
        *,
        mask: Any = None,
        query_positions: Any = None,
        key_positions: Any = None,
        cache: Cache | None = None,
        dropout_key: Any = None,
    ) -> Any:
        """Self-attention over x, or cross-attention from x to the context.

        Args:
          x: [B, T, E].
          context: [B, S, C], or what `project` made of it; None for self-attention.
          mask: a `Mask` or boolean array, see `attn_jax.attention`.
          query_positions: see `attn_jax.attention`.
          key_positions: likewise; of self-attention, None means as query_positions.
          cache: keys and values of the positions before x, which count from zero. Attention is
            causal then, on top of `mask`, and positions are those of the cache.
          dropout_key: a key turns dropout on.

        Returns:
          [B, T, out_features]; with a cache a pair of it and the cache with x added.

        Raises:
          ValueError: a cache with a context or with positions, with less room than x needs (inside
            of jit, where that is not known, the output is NaN), or while someone is watching;
            `self` with a context.

        """
        if cache is not None:
            _check_cached(context, query_positions, key_positions)
            return self._decode(x, mask, cache, dropout_key)
        context, key_positions = self._context(x, context, query_positions, key_positions)
        where = {"mask": mask, "query_positions": query_positions, "key_positions": key_positions}
        return self._mix(x, context, dropout_key, where)

    def weights(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S C"] | Projected | None = None,
        *,
        mask: Any = None,
        query_positions: Any = None,
        key_positions: Any = None,
    ) -> Float[Array, "B N T S"]:
        """The weight of every key in a call with the same arguments, without dropout.

        Of the modules inside of a model, `attn_jax.analysis.record` gives them.

        Raises:
          ValueError: as a call.

        """
        context, key_positions = self._context(x, context, query_positions, key_positions)
        where = {"mask": mask, "query_positions": query_positions, "key_positions": key_positions}
        return self._weights(x, context, where)

    def _context(
        self, x: Array, context: Any, query_positions: Any, key_positions: Any
    ) -> tuple[Projected, Any]:
        """Keys and values, and the keys' positions."""
        if context is None:
            context = x
            key_positions = query_positions if key_positions is None else key_positions
        elif any(b.product.sees_itself_only for g in self.groups for b in g.branches):
            raise ValueError("the rule 'self' has no meaning in cross-attention: use another rule")
        if not isinstance(context, Projected):
            context = self.project(context, key_positions)
        return context, key_positions

    def project(self, context: Float[Array, "B S C"], key_positions: Any = None) -> Projected:
        """Keys and values of a context, for `module(x, projected)`: decoding asks it many times.

        Args:
          context: [B, S, C].
          key_positions: by which keys are rotated; those of the call that it serves.

        """
        grid = _grid(key_positions, context.shape[1])
        keys = tuple(group.keys(context, grid) for group in self.groups)
        return Projected(keys, self._values(context))

    def _decode(
        self, x: Float[Array, "B T E"], mask: Any, cache: Cache, dropout_key: Any
    ) -> tuple[Float[Array, "B T F"], Cache]:
        if watching.is_watched():
            raise ValueError("weights are seen on whole sequences, got a cache: leave it out")
        value = self._values(x)
        options = {"mask": mask, **self._options(dropout_key)}
        outputs, groups = [], []
        for i, (group, kept) in enumerate(zip(self.groups, cache["groups"], strict=True)):
            output, kept = caches.decode(
                group,
                x,
                group.own(value),
                kept,
                cache["index"],
                dropout_key=_fold(dropout_key, i),
                **options,
            )
            outputs.append(output)
            groups.append(kept)
        return self._joined(outputs), {"index": cache["index"] + x.shape[1], "groups": groups}

    def _values(self, context: Float[Array, "B S C"]) -> Float[Array, "B S N D"]:
        return self.value(context).reshape(*context.shape[:2], self.num_heads, self.head_width)

    def _mix(
        self,
        x: Float[Array, "B T E"],
        context: Projected,
        dropout_key: Any,
        where: dict[str, Any],
    ) -> Float[Array, "B T F"]:
        outputs = [
            group(*given, dropout_key=_fold(dropout_key, i), **self._options(dropout_key), **placed)
            for i, (group, given, placed) in enumerate(self._by_group(x, context, where))
        ]
        if not watching.is_watched():
            return self._joined(outputs)
        return self._joined([self._shown(jnp.concatenate(outputs, 2), x, context, where)])

    def _weights(
        self, x: Float[Array, "B T E"], context: Projected, where: dict[str, Any]
    ) -> Float[Array, "B N T S"]:
        weights = [
            group.weights(*given, normalizer=self.normalizer, **placed)
            for group, given, placed in self._by_group(x, context, where)
        ]
        return jnp.concatenate(weights, 1)

    def _by_group(
        self, x: Float[Array, "B T E"], context: Projected, where: dict[str, Any]
    ) -> Iterator[tuple[Group, tuple[Any, ...], dict[str, Any]]]:
        """Each group, its arrays, and mask and positions as kernels see them."""
        positions = _grid(where["query_positions"], x.shape[1])
        placed = self._placed(x.shape[1], context.value.shape[1], where)
        for group, keys in zip(self.groups, context.keys, strict=True):
            yield group, (x, keys, group.own(context.value), positions), placed

    def _placed(self, queries: int, keys: int, where: dict[str, Any]) -> dict[str, Any]:
        first = 0 if where["query_positions"] is None else where["query_positions"]
        if self.distance is not None:
            lengths = {"query_positions": queries, "key_positions": keys}
            places = {n: lying(self.distance, where[n], length) for n, length in lengths.items()}
            return where | places
        if queries != keys and jnp.ndim(first) == 0:
            # without content, attention counts its queries by their positions
            return where | {"query_positions": first + np.arange(queries)}
        return where

    def _shown(
        self,
        mixed: Float[Array, "B T N D"],
        x: Float[Array, "B T E"],
        context: Projected,
        where: dict[str, Any],
    ) -> Float[Array, "B T N D"]:
        """What those who watch make of what the heads give."""
        placed = self._placed(x.shape[1], context.value.shape[1], where)
        weights = functools.partial(self._weights, x, context, where)
        rotary = _grid(where["query_positions"], x.shape[1])
        seen = watching.Seen(self, x, context, weights, **placed, rotary_positions=rotary)
        return watching.show(seen, mixed)

    def _options(self, dropout_key: Any) -> dict[str, Any]:
        options = {"normalizer": self.normalizer, "implementation": self.implementation}
        if dropout_key is not None:
            options |= {"dropout_rate": self.attention_dropout_rate}
        return options

    def _joined(self, outputs: Iterable[Any]) -> Float[Array, "B T F"]:
        """The output projection of all heads."""
        mixed = jnp.concatenate(list(outputs), 2)
        return self.output(mixed.reshape(*mixed.shape[:2], self.num_heads * self.head_width))

    def flops(self, queries: int, keys: int | None = None) -> int:
        """Forward FLOPs for one example; a multiply-add counts 2, norms and softmax count 0.

        Value and output projections 2 S C W + 2 T W F, and for each head: scores 2 T S H and
        their projections 2 H (T E + S C) where it looks at content, mix 2 T S D. A rule without
        content and of known reach R is a band: 2 T min(S, 2R + 1) D.

        Args:
          queries: T.
          keys: S; None: T.

        """
        keys = queries if keys is None else keys
        width = self.num_heads * self.head_width
        total = 2 * keys * self.context_features * width + 2 * queries * width * self.out_features
        in_widths = (self.in_features, self.context_features)
        return total + sum(
            branch.flops(queries, keys, self.head_width, in_widths)
            for group in self.groups
            for branch in group.branches
        )


def _grid(positions: Any, length: int) -> Num[Array, "#B T"]:
    """Positions as an array with a batch axis."""
    if positions is None or jnp.ndim(positions) == 0:
        positions = (0 if positions is None else positions) + jnp.arange(length)
    return jnp.atleast_2d(jnp.asarray(positions))


def _fold(key: Any, index: int) -> Any:
    return None if key is None else jax.random.fold_in(key, index)


def _check_unprojected(
    groups: tuple[HeadGroup, ...], width: int, in_features: int, context_features: int
) -> None:
    contents = [product.content for group in groups for product in group.products]
    names = {content.name for content in contents if content is not None}
    for name in UNPROJECTED:
        if name in names and not width == in_features == context_features:
            raise ValueError(
                f"the rule {name!r} splits the input itself into heads: in_features, "
                "context_features and qkv_features must be equal, got "
                f"{in_features}, {context_features} and {width}"
            )
    if "general" in names and width != context_features:
        raise ValueError(
            "the rule 'general' splits the context itself into heads: context_features and "
            f"qkv_features must be equal, got {context_features} and {width}"
        )


def _check_cached(context: Any, query_positions: Any, key_positions: Any) -> None:
    if context is not None:
        raise ValueError("a cache is for self-attention: leave out the context")
    if query_positions is not None or key_positions is not None:
        raise ValueError("positions follow from the cache: leave out query and key positions")
