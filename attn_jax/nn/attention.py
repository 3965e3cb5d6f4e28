"""Multi-head attention with a rule per head: parameters here, all mathematics in ops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Num

from attn_jax import ops
from attn_jax.nn.initialization import named
from attn_jax.nn.kernels import Kernel, combine, known_radius
from attn_jax.nn.positions import rotate
from attn_jax.rules import HeadGroup, Product, parse

Cache = dict[str, Any]
"""value [B, L, N, D], keys (one entry a group and product), index [B]: a plain pytree."""


class Branch(nnx.Module):
    """The heads of one product of a rule: its projections and kernels.

    Args:
      product: the rule.
      num_heads: n.
      in_features: width of the queries' input.
      context_features: width of the keys' input.
      head_width: default width of a head's query and key.
      rotary: rotate queries and keys by their positions.
      use_bias: of the projections.
      rngs: the source of initial values.

    """

    def __init__(
        self,
        product: Product,
        num_heads: int,
        in_features: int,
        context_features: int,
        *,
        head_width: int,
        rotary: bool,
        use_bias: bool,
        rngs: nnx.Rngs,
    ):
        self.product, self.num_heads, self.rotary = product, num_heads, rotary
        self.kernels = nnx.List([Kernel(factor, num_heads) for factor in product.kernels])
        content = product.content
        self.head_width = head_width
        if content is None or content.name == "raw":
            return
        self.head_width = content["key_width"] or head_width
        width = num_heads * self.head_width
        self.query = nnx.Linear(in_features, width, use_bias=use_bias, rngs=named(rngs, "query"))
        self.key = nnx.Linear(context_features, width, use_bias=use_bias, rngs=named(rngs, "key"))
        if content.name == "additive":
            scale = self.head_width**-0.5
            shape = (num_heads, self.head_width)
            self.score = nnx.Param(scale * named(rngs, "score").params.normal(shape))

    def queries(
        self, x: Float[Array, "B T E"], first_head: int, positions: Num[Array, "#B T"]
    ) -> Float[Array, "B T n H"] | None:
        """What the heads look for; None without content."""
        return self._project("query", x, first_head, positions)

    def keys(
        self, context: Float[Array, "B S C"], first_head: int, positions: Num[Array, "#B S"]
    ) -> Float[Array, "B S n H"] | None:
        """What the heads compare it with; None without content."""
        return self._project("key", context, first_head, positions)

    def _project(
        self, name: str, x: Float[Array, "B T E"], first_head: int, positions: Num[Array, "#B T"]
    ) -> Float[Array, "B T n H"] | None:
        content = self.product.content
        if content is None:
            return None
        if content.name == "raw":
            width = self.num_heads * self.head_width
            first = first_head * self.head_width
            projected = _normalise(x)[..., first : first + width]
        else:
            projected = getattr(self, name)(x)
        heads = projected.reshape(*x.shape[:2], self.num_heads, self.head_width)
        return rotate(heads, positions) if self.rotary and content.name != "additive" else heads

    def attend(
        self,
        query: Float[Array, "B T n H"] | None,
        key: Float[Array, "B S n H"] | None,
        value: Float[Array, "B S n D"],
        *,
        mask: Any,
        **options: Any,
    ) -> Float[Array, "B T n D"]:
        """Mixes the values by the rule; `options` are those of `attn_jax.attention`."""
        if self.product.sees_itself_only:
            itself = ops.Local(0, 0)
            mask = itself if mask is None else itself & mask
        bias = None
        content = self.product.content
        if query is not None and content is not None and content.name == "additive":
            assert key is not None
            bias, query, key = self._additive_scores(query, key), None, None
        kernel = combine([kernel() for kernel in self.kernels])
        arguments = {"proximity": kernel, "bias": bias, "mask": mask, **options}
        output: Any = ops.attention(query, key, value, **arguments)
        return output

    def _additive_scores(
        self, query: Float[Array, "B T n H"], key: Float[Array, "B S n H"]
    ) -> Float[Array, "B n T S"]:
        hidden = jnp.tanh(query[:, :, None] + key[:, None])
        return jnp.einsum("btsnh,nh->bnts", hidden, self.score[...])

    def flops(self, queries: int, keys: int, value_width: int, in_widths: tuple[int, int]) -> int:
        """Forward FLOPs of one example: projections, scores and mix; see MultiHeadAttention."""
        content, heads, width = self.product.content, self.num_heads, self.head_width
        radius = known_radius(self.product)
        pairs = queries * keys
        if content is None and radius is not None:
            pairs = queries * min(keys, 2 * int(radius) + 1)
        total = 2 * heads * pairs * value_width
        if content is None:
            return total
        total += 2 * heads * pairs * width
        if content.name != "raw":
            total += 2 * heads * width * (queries * in_widths[0] + keys * in_widths[1])
        return total


class Group(nnx.Module):
    """The heads of one head group: one branch, or two and a gate a head.

    With a gate g = sigmoid(logit), 0.5 at first, the output is g * first + (1 - g) * second.
    """

    def __init__(self, group: HeadGroup, first_head: int, *, rngs: nnx.Rngs, **widths: Any):
        self.num_heads, self.first_head = group.num_heads, first_head
        self.branches = nnx.List(
            [
                Branch(product, group.num_heads, rngs=named(named(rngs, "branches"), i), **widths)
                for i, product in enumerate(group.products)
            ]
        )
        if group.is_mix:
            self.gate = nnx.Param(jnp.zeros(group.num_heads))

    def keys(
        self, context: Float[Array, "B S C"], positions: Num[Array, "#B S"]
    ) -> tuple[Float[Array, "B S n H"] | None, ...]:
        """The keys of every branch."""
        return tuple(branch.keys(context, self.first_head, positions) for branch in self.branches)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        keys: tuple[Any, ...],
        value: Float[Array, "B S N D"],
        rotary_positions: Num[Array, "#B T"],
        **options: Any,
    ) -> Float[Array, "B T n D"]:
        """The mixed values of the group's heads."""
        value = value[:, :, self.first_head : self.first_head + self.num_heads]
        outputs = [
            branch.attend(
                branch.queries(x, self.first_head, rotary_positions), key, value, **options
            )
            for branch, key in zip(self.branches, keys, strict=True)
        ]
        if len(outputs) == 1:
            return outputs[0]
        gate = jax.nn.sigmoid(self.gate[...])[None, None, :, None].astype(value.dtype)
        return gate * outputs[0] + (1 - gate) * outputs[1]


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
        _check_raw(groups, width, in_features, context_features)
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.in_features, self.context_features = in_features, context_features
        self.out_features = out_features or in_features
        self.attention_dropout_rate = attention_dropout_rate
        self.normalizer, self.implementation = normalizer, implementation
        widths = {
            "in_features": in_features,
            "context_features": context_features,
            "head_width": self.head_width,
            "rotary": rotary,
            "use_bias": use_bias,
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

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache of `length` positions for decoding; batch is every leaf's first axis."""
        context = jnp.zeros((batch, length, self.context_features), dtype)
        positions = jnp.arange(length)[None]
        keys = [jax.eval_shape(group.keys, context, positions) for group in self.groups]
        return {
            "index": jnp.zeros(batch, jnp.int32),
            "value": jnp.zeros((batch, length, self.num_heads, self.head_width), dtype),
            "keys": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), keys),
        }

    def __call__(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S C"] | None = None,
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
          context: [B, S, C]; None for self-attention.
          mask: a `Mask` or boolean array, see `attn_jax.attention`.
          query_positions: see `attn_jax.attention`.
          key_positions: likewise; of self-attention, None means as query_positions.
          cache: keys and values of the positions before x, which count from zero. Attention is
            causal then, on top of `mask`, and positions are those of the cache.
          dropout_key: a key turns dropout on.

        Returns:
          [B, T, out_features]; with a cache a pair of it and the cache with x added.

        Raises:
          ValueError: a cache with a context or with positions, or with less room than x needs
            (inside of jit, where that is not known, the output is NaN); `self` with a context.

        """
        if cache is not None:
            _check_cached(context, query_positions, key_positions)
            return self._decode(x, mask, cache, dropout_key)
        if context is None:
            context = x
            key_positions = query_positions if key_positions is None else key_positions
        elif any(b.product.sees_itself_only for g in self.groups for b in g.branches):
            raise ValueError("the rule 'self' has no meaning in cross-attention: use another rule")
        grid = _grid(key_positions, context.shape[1])
        keys = [group.keys(context, grid) for group in self.groups]
        return self._mix(
            x,
            keys,
            self._values(context),
            dropout_key,
            mask=mask,
            query_positions=query_positions,
            key_positions=key_positions,
        )

    def _decode(
        self, x: Float[Array, "B T E"], mask: Any, cache: Cache, dropout_key: Any
    ) -> tuple[Float[Array, "B T F"], Cache]:
        overrun = _overrun(cache, x.shape[1])
        positions = cache["index"][:, None] + jnp.arange(x.shape[1])[None]
        new = [group.keys(x, positions) for group in self.groups]
        cache = {
            "index": cache["index"] + x.shape[1],
            "value": _write(cache["value"], self._values(x), cache["index"]),
            "keys": jax.tree.map(lambda old, k: _write(old, k, cache["index"]), cache["keys"], new),
        }
        causal = ops.Causal() if mask is None else ops.Causal() & mask
        output = self._mix(
            x, cache["keys"], cache["value"], dropout_key, mask=causal, query_positions=positions
        )
        return jnp.where(overrun[:, None, None], jnp.nan, output), cache

    def _values(self, context: Float[Array, "B S C"]) -> Float[Array, "B S N D"]:
        return self.value(context).reshape(*context.shape[:2], self.num_heads, self.head_width)

    def _mix(
        self,
        x: Float[Array, "B T E"],
        keys: list[Any],
        value: Float[Array, "B S N D"],
        dropout_key: Any,
        **where: Any,
    ) -> Float[Array, "B T F"]:
        positions = _grid(where.get("query_positions"), x.shape[1])
        options = where | {"normalizer": self.normalizer, "implementation": self.implementation}
        if dropout_key is not None:
            options |= {"dropout_rate": self.attention_dropout_rate}
        first = 0 if where["query_positions"] is None else where["query_positions"]
        if x.shape[1] != value.shape[1] and jnp.ndim(first) == 0:
            # without content, attention counts its queries by their positions
            options |= {"query_positions": first + np.arange(x.shape[1])}
        outputs = [
            group(x, key, value, positions, dropout_key=_fold(dropout_key, i), **options)
            for i, (group, key) in enumerate(zip(self.groups, keys, strict=True))
        ]
        mixed = jnp.concatenate(outputs, 2) if len(outputs) > 1 else outputs[0]
        return self.output(mixed.reshape(*x.shape[:2], self.num_heads * self.head_width))

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


def _normalise(x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Zero mean and unit variance over the features, without parameters."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)


def _grid(positions: Any, length: int) -> Num[Array, "#B T"]:
    """Positions as an array with a batch axis."""
    if positions is None or jnp.ndim(positions) == 0:
        positions = (0 if positions is None else positions) + jnp.arange(length)
    return jnp.atleast_2d(jnp.asarray(positions))


def _fold(key: Any, index: int) -> Any:
    return None if key is None else jax.random.fold_in(key, index)


def _write(
    old: Float[Array, "B L N D"], new: Float[Array, "B T N D"], index: Num[Array, " B"]
) -> Float[Array, "B L N D"]:
    """Puts new entries at each row's index."""
    update = lambda row, part, at: jax.lax.dynamic_update_slice_in_dim(row, part, at, 0)  # noqa: E731
    return jax.vmap(update)(old, new.astype(old.dtype), index)


def _overrun(cache: Cache, steps: int) -> Bool[Array, " B"]:
    """Where a cache has no room for so many positions more."""
    length = cache["value"].shape[1]
    overrun = cache["index"] + steps > length
    if steps > length or (not isinstance(overrun, Tracer) and overrun.any()):
        raise ValueError(
            f"the cache has {length} positions and no room for {steps} more: make it longer with "
            "init_cache(batch, length)"
        )
    return overrun


def _check_raw(
    groups: tuple[HeadGroup, ...], width: int, in_features: int, context_features: int
) -> None:
    contents = [product.content for group in groups for product in group.products]
    uses_raw = any(content is not None and content.name == "raw" for content in contents)
    if uses_raw and not width == in_features == context_features:
        raise ValueError(
            "the rule 'raw' splits the input itself into heads: in_features, context_features and "
            f"qkv_features must be equal, got {in_features}, {context_features} and {width}"
        )


def _check_cached(context: Any, query_positions: Any, key_positions: Any) -> None:
    if context is not None:
        raise ValueError("a cache is for self-attention: leave out the context")
    if query_positions is not None or key_positions is not None:
        raise ValueError("positions follow from the cache: leave out query and key positions")
