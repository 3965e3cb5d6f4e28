"""The heads of a rule: their projections, kernels and gates."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from attn_jax import ops
from attn_jax.nn.distances import Distance, Placed
from attn_jax.nn.initialization import named
from attn_jax.nn.kernels import Kernel, combine, known_radius
from attn_jax.nn.positions import rotate
from attn_jax.rules import HeadGroup, Product

UNPROJECTED = ("raw", "dot")
"""Rules whose queries and keys are the inputs, split into heads."""
HIDDEN_LAYER = ("additive", "concat")
"""v tanh(W q + U k): the same, whether query and key are projected apart or joined."""
UNSCALED = ("dot", "general")
"""Luong's products, which no H^-0.5 scales."""


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
      distance: what kernels see of the difference of two positions; None: the difference.
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
        distance: Distance | None = None,
        rngs: nnx.Rngs,
    ):
        self.product, self.num_heads, self.rotary = product, num_heads, rotary
        self.distance = distance
        self.kernels = nnx.List([Kernel(factor, num_heads) for factor in product.kernels])
        content = product.content
        self.head_width = head_width
        if content is None or content.name in UNPROJECTED:
            return
        self.head_width = (
            int(content["key_width"] or head_width)
            if "key_width" in content.parameters
            else head_width
        )
        width = num_heads * self.head_width
        if content.name == "general":
            self.query = nnx.Linear(in_features, width, use_bias=False, rngs=named(rngs, "query"))
            return
        self.query = nnx.Linear(in_features, width, use_bias=use_bias, rngs=named(rngs, "query"))
        self.key = nnx.Linear(context_features, width, use_bias=use_bias, rngs=named(rngs, "key"))
        if content.name in HIDDEN_LAYER:
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
        if content.name in UNPROJECTED or (content.name == "general" and name == "key"):
            width = self.num_heads * self.head_width
            first = first_head * self.head_width
            projected = (_normalise(x) if content.name == "raw" else x)[..., first : first + width]
        else:
            projected = getattr(self, name)(x)
        heads = projected.reshape(*x.shape[:2], self.num_heads, self.head_width)
        rotates = self.rotary and content.name not in HIDDEN_LAYER
        return rotate(heads, positions) if rotates else heads

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
        query, key, arguments = self.arguments(query, key, mask, options)
        output: Any = ops.attention(query, key, value, **arguments)
        return output

    def weights(
        self,
        query: Float[Array, "B T n H"] | None,
        key: Float[Array, "B S n H"] | None,
        value: Float[Array, "B S n D"],
        *,
        mask: Any,
        **options: Any,
    ) -> Float[Array, "B n T S"]:
        """What `attend` with the same arguments gives every value."""
        query, key, arguments = self.arguments(query, key, mask, options)
        return ops.attention_weights(query, key, value, **arguments)

    def arguments(
        self, query: Any, key: Any, mask: Any, options: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Query, key and keywords of `attn_jax.attention`: the rule in its terms."""
        if self.product.sees_itself_only:
            itself = ops.Local(0, 0)
            mask = itself if mask is None else itself & mask
        bias = None
        content = self.product.content
        if query is not None and content is not None and content.name in HIDDEN_LAYER:
            assert key is not None
            bias, query, key = self._additive_scores(query, key), None, None
        elif content is not None and content.name in UNSCALED:
            options |= {"scale": 1.0}
        kernel = combine([kernel() for kernel in self.kernels])
        if kernel is not None and self.distance is not None:
            kernel = Placed(kernel, self.distance)
        return query, key, {"proximity": kernel, "bias": bias, "mask": mask, **options}

    def _additive_scores(
        self, query: Float[Array, "B T n H"], key: Float[Array, "B S n H"]
    ) -> Float[Array, "B n T S"]:
        hidden = jnp.tanh(query[:, :, None] + key[:, None])
        return jnp.einsum("btsnh,nh->bnts", hidden, self.score[...])

    def flops(self, queries: int, keys: int, value_width: int, in_widths: tuple[int, int]) -> int:
        """Forward FLOPs of one example: projections, scores and mix; see MultiHeadAttention."""
        content, heads, width = self.product.content, self.num_heads, self.head_width
        radius = known_radius(self.product)
        if self.distance is not None and not self.product.sees_itself_only:
            radius = None  # keys within it are no band
        pairs = queries * keys
        if content is None and radius is not None:
            pairs = queries * min(keys, 2 * int(radius) + 1)
        total = 2 * heads * pairs * value_width
        if content is None:
            return total
        total += 2 * heads * pairs * width
        if content.name not in UNPROJECTED:
            total += 2 * heads * width * queries * in_widths[0]
        if content.name not in (*UNPROJECTED, "general"):
            total += 2 * heads * width * keys * in_widths[1]
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

    def own(self, value: Float[Array, "B S N D"]) -> Float[Array, "B S n D"]:
        """The part of all heads' values that is this group's."""
        return value[:, :, self.first_head : self.first_head + self.num_heads]

    def keys(
        self, context: Float[Array, "B S C"], positions: Num[Array, "#B S"]
    ) -> tuple[Float[Array, "B S n H"] | None, ...]:
        """The keys of every branch."""
        return tuple(branch.keys(context, self.first_head, positions) for branch in self.branches)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        keys: tuple[Any, ...],
        value: Float[Array, "B S n D"],
        rotary_positions: Num[Array, "#B T"],
        **options: Any,
    ) -> Float[Array, "B T n D"]:
        """The mixed values of the group's heads."""
        outputs = [
            branch.attend(
                branch.queries(x, self.first_head, rotary_positions), key, value, **options
            )
            for branch, key in zip(self.branches, keys, strict=True)
        ]
        return self._gated(outputs, 2)

    def weights(
        self,
        x: Float[Array, "B T E"],
        keys: tuple[Any, ...],
        value: Float[Array, "B S n D"],
        rotary_positions: Num[Array, "#B T"],
        **options: Any,
    ) -> Float[Array, "B n T S"]:
        """What a call with the same arguments gives every value."""
        weights = [
            branch.weights(
                branch.queries(x, self.first_head, rotary_positions), key, value, **options
            )
            for branch, key in zip(self.branches, keys, strict=True)
        ]
        return self._gated(weights, 1)

    def _gated(self, outputs: list[Float[Array, "..."]], head_axis: int) -> Float[Array, "..."]:
        if len(outputs) == 1:
            return outputs[0]
        shape = [1] * outputs[0].ndim
        shape[head_axis] = self.num_heads
        gate = jax.nn.sigmoid(self.gate[...]).reshape(shape).astype(outputs[0].dtype)
        return gate * outputs[0] + (1 - gate) * outputs[1]


def _normalise(x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Zero mean and unit variance over the features, without parameters."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
