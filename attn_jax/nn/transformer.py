"""Encoder, decoder and encoder-decoder stacks with a rule in every attention slot.

Dropout is functional: a `dropout_key` turns it on, None turns it off.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from attn_jax.nn.attention import Cache, MultiHeadAttention, Projected
from attn_jax.nn.distances import Distance
from attn_jax.nn.initialization import named
from attn_jax.nn.positions import LearnedPositions, check_encoding, sinusoidal
from attn_jax.ops import Causal

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}
NORMS = ("pre", "post")


def dropout(x: Float[Array, "..."], rate: float, key: Any) -> Float[Array, "..."]:
    """Zeroes entries with chance `rate` and divides the others by 1 - rate; no key: x itself."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def _split(key: Any, count: int) -> Sequence[Any]:
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


class FeedForward(nnx.Module):
    """activation(x W_1 + b_1) W_2 + b_2 at every position."""

    def __init__(self, features: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {known}, got {activation!r}")
        self.features, self.hidden, self.activation = features, hidden, activation
        self.up = nnx.Linear(features, hidden, rngs=named(rngs, "up"))
        self.down = nnx.Linear(hidden, features, rngs=named(rngs, "down"))

    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The layer's output at every position."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))

    def flops(self, length: int) -> int:
        """4 T E M."""
        return 4 * length * self.features * self.hidden


class Residual(nnx.Module):
    """x + f(norm(x)) for "pre", norm(x + f(x)) for "post"; dropout on f's output."""

    def __init__(self, features: int, norm: str, dropout_rate: float, *, rngs: nnx.Rngs):
        if norm not in NORMS:
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        self.kind, self.dropout_rate = norm, dropout_rate
        self.norm = nnx.LayerNorm(features, rngs=named(rngs, "norm"))

    def __call__(
        self, x: Float[Array, "B T E"], branch: Callable[[Array], Array], key: Any
    ) -> Float[Array, "B T E"]:
        """The residual connection around `branch`."""
        if self.kind == "pre":
            return x + dropout(branch(self.norm(x)), self.dropout_rate, key)
        return self.norm(x + dropout(branch(x), self.dropout_rate, key))


class Layer(nnx.Module):
    """Self-attention, cross-attention where `cross_rule` is given, feed-forward."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        rule: str,
        cross_rule: str | None,
        mlp_features: int,
        norm: str,
        activation: str,
        dropout_rate: float,
        normalizer: str,
        cross_normalizer: str,
        distance: Distance | None,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        def residual(name: str) -> Residual:
            return Residual(features, norm, dropout_rate, rngs=named(rngs, name))

        self.attention = MultiHeadAttention(
            num_heads,
            features,
            rule=rule,
            normalizer=normalizer,
            distance=distance,
            rngs=named(rngs, "attention"),
            **attention,
        )
        self.attention_residual = residual("attention_residual")
        self.has_cross = cross_rule is not None
        if cross_rule is not None:
            self.cross = MultiHeadAttention(
                num_heads,
                features,
                rule=cross_rule,
                normalizer=cross_normalizer,
                rngs=named(rngs, "cross"),
                **attention,
            )
            self.cross_residual = residual("cross_residual")
        self.mlp = FeedForward(features, mlp_features, activation, rngs=named(rngs, "mlp"))
        self.mlp_residual = residual("mlp_residual")

    def __call__(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S E"] | Projected | None,
        *,
        mask: Any,
        context_mask: Any,
        positions: Any,
        context_positions: Any,
        cache: Cache | None,
        dropout_key: Any,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """The layer's output and, with a cache, the cache with x added."""
        keys = _split(dropout_key, 5)
        new_cache = None

        def attend(y: Array) -> Array:
            nonlocal new_cache
            if cache is None:
                return self.attention(y, mask=mask, query_positions=positions, dropout_key=keys[0])
            output, new_cache = self.attention(y, mask=mask, cache=cache, dropout_key=keys[0])
            return output

        def attend_context(y: Array) -> Array:
            return self.cross(
                y,
                context,
                mask=context_mask,
                query_positions=positions,
                key_positions=context_positions,
                dropout_key=keys[2],
            )

        x = self.attention_residual(x, attend, keys[1])
        if self.has_cross:
            x = self.cross_residual(x, attend_context, keys[3])
        return self.mlp_residual(x, self.mlp, keys[4]), new_cache

    def flops(self, length: int, context_length: int) -> int:
        """Attention, cross-attention and feed-forward of one example."""
        total = self.attention.flops(length) + self.mlp.flops(length)
        return total + (self.cross.flops(length, context_length) if self.has_cross else 0)


class Stack(nnx.Module):
    """Position encodings, layers and, with pre-norm, a last norm: what all stacks share.

    Args:
      num_layers: L.
      features: E.
      num_heads: N.
      rule: one for all layers, or a sequence with one a layer.
      cross_rule: the same for cross-attention; None: there is none.
      mlp_features: width of the feed-forward layers; None: 4 E.
      norm: "pre" or "post".
      activation: "gelu" or "relu".
      dropout_rate: on the encoded input and on every residual branch.
      attention_dropout_rate: on the weights of attention.
      normalizer: of self-attention, see `attn_jax.attention`.
      cross_normalizer: of cross-attention.
      position_encoding: "none", "sinusoidal", "learned" or "rotary".
      max_length: number of learned positions.
      distance: of self-attention, see `MultiHeadAttention`; encodings are of the index.
      rngs: the source of initial values.

    Raises:
      ValueError: an option is unknown or does not fit.

    References: Vaswani et al. 2017 (post-norm); Xiong et al. 2020 (pre-norm).

    """

    def __init__(
        self,
        num_layers: int,
        features: int,
        num_heads: int,
        *,
        rule: str | Sequence[str] = "learned",
        cross_rule: str | Sequence[str] | None = None,
        mlp_features: int | None = None,
        norm: str = "pre",
        activation: str = "gelu",
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        normalizer: str = "softmax",
        cross_normalizer: str = "softmax",
        position_encoding: str = "sinusoidal",
        max_length: int | None = None,
        distance: Distance | None = None,
        rngs: nnx.Rngs,
    ):
        check_encoding(position_encoding, max_length)
        self.features, self.norm, self.dropout_rate = features, norm, dropout_rate
        self.position_encoding = position_encoding
        if position_encoding == "learned":
            assert max_length is not None
            self.positions = LearnedPositions(max_length, features, rngs=named(rngs, "positions"))
        rules = _per_layer(rule, num_layers, "rule")
        cross_rules = _per_layer(cross_rule, num_layers, "cross_rule")
        options = {
            "mlp_features": mlp_features or 4 * features,
            "norm": norm,
            "activation": activation,
            "dropout_rate": dropout_rate,
            "attention_dropout_rate": attention_dropout_rate,
            "normalizer": normalizer,
            "cross_normalizer": cross_normalizer,
            "rotary": position_encoding == "rotary",
            "distance": distance,
        }
        self.layers = nnx.List(
            [
                Layer(
                    features,
                    num_heads,
                    rule=rules[index],
                    cross_rule=cross_rules[index],
                    rngs=named(named(rngs, "layers"), index),
                    **options,
                )
                for index in range(num_layers)
            ]
        )
        if norm == "pre":
            self.last_norm = nnx.LayerNorm(features, rngs=named(rngs, "last_norm"))

    def init_cache(self, batch: int, length: int, *, compact: bool = True) -> list[Cache]:
        """An empty cache for decoding `length` positions, one entry a layer.

        See `MultiHeadAttention.init_cache`.
        """
        return [layer.attention.init_cache(batch, length, compact=compact) for layer in self.layers]

    def encode_positions(self, x: Float[Array, "B T E"], positions: Any) -> Float[Array, "B T E"]:
        """Adds the encodings of absolute positions; rotation happens inside of attention."""
        if self.position_encoding in ("none", "rotary"):
            return x
        grid = jnp.arange(x.shape[1]) if positions is None else jnp.asarray(positions)
        if grid.ndim == 0:
            grid = grid + jnp.arange(x.shape[1])
        if self.position_encoding == "sinusoidal":
            encoding = sinusoidal(grid, self.features)
        else:
            encoding = self.positions(grid)
        encoding = encoding if encoding.ndim == 3 else encoding[None]
        return x + encoding.astype(x.dtype)

    def run(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S E"] | Sequence[Projected] | None = None,
        *,
        mask: Any = None,
        context_mask: Any = None,
        positions: Any = None,
        context_positions: Any = None,
        encoding_positions: Any = None,
        cache: list[Cache] | None = None,
        dropout_key: Any = None,
    ) -> Any:
        """All layers; see the stacks for the meaning of the arguments."""
        if cache is not None:
            if positions is not None:
                raise ValueError("positions follow from the cache: leave them out")
            positions = cache[0]["index"][:, None] + jnp.arange(x.shape[1])[None]
            encoding_positions = positions
        first, *keys = _split(dropout_key, len(self.layers) + 1)
        absolute = positions if encoding_positions is None else encoding_positions
        x = dropout(self.encode_positions(x, absolute), self.dropout_rate, first)
        new_cache = []
        for index, (layer, key) in enumerate(zip(self.layers, keys, strict=True)):
            x, layer_cache = layer(
                x,
                context[index] if isinstance(context, Sequence) else context,
                mask=mask,
                context_mask=context_mask,
                positions=positions,
                context_positions=context_positions,
                cache=None if cache is None else cache[index],
                dropout_key=key,
            )
            new_cache.append(layer_cache)
        x = self.last_norm(x) if self.norm == "pre" else x
        return x if cache is None else (x, new_cache)

    def flops(self, length: int, context_length: int = 0) -> int:
        """Forward FLOPs of one example; a multiply-add counts 2, norms and softmax count 0."""
        return sum(layer.flops(length, context_length) for layer in self.layers)


class Encoder(Stack):
    """Self-attention layers; with `mask=Causal()` a decoder-only language model's stack.

    Takes the arguments of `Stack` without `cross_rule`.
    """

    def __init__(self, num_layers: int, features: int, num_heads: int, **options: Any):
        if options.get("cross_rule") is not None:
            raise ValueError("an Encoder has no cross-attention: leave out cross_rule")
        super().__init__(num_layers, features, num_heads, **options)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        mask: Any = None,
        positions: Num[Array, "..."] | Any = None,
        encoding_positions: Any = None,
        cache: list[Cache] | None = None,
        dropout_key: Any = None,
    ) -> Any:
        """Encodes x.

        Args:
          x: [B, T, E], embeddings without positions.
          mask: see `attn_jax.attention`.
          positions: of x, for kernels, masks and encodings; see `attn_jax.attention`.
          encoding_positions: [T] or [B, T], for the encodings only: in packed rows distance
            counts by index, while absolute positions start again with every segment.
          cache: from `init_cache`, for causal decoding.
          dropout_key: a key turns dropout on.

        Returns:
          [B, T, E]; with a cache a pair of it and the new cache.

        """
        return self.run(
            x,
            mask=mask,
            positions=positions,
            encoding_positions=encoding_positions,
            cache=cache,
            dropout_key=dropout_key,
        )


class Decoder(Stack):
    """Causal self-attention and cross-attention to a context.

    Takes the arguments of `Stack`; `cross_rule` is "learned" unless given.
    """

    def __init__(self, num_layers: int, features: int, num_heads: int, **options: Any):
        options = {"cross_rule": "learned"} | options
        super().__init__(num_layers, features, num_heads, **options)

    def project(
        self, context: Float[Array, "B S E"], context_positions: Any = None
    ) -> list[Projected]:
        """Keys and values of the context, a layer each, for decoding step by step.

        Args:
          context: [B, S, E].
          context_positions: as in the calls that they serve.

        """
        return [layer.cross.project(context, context_positions) for layer in self.layers]

    def __call__(
        self,
        x: Float[Array, "B T E"],
        context: Float[Array, "B S E"] | Sequence[Projected],
        *,
        mask: Any = None,
        context_mask: Any = None,
        positions: Any = None,
        context_positions: Any = None,
        cache: list[Cache] | None = None,
        dropout_key: Any = None,
    ) -> Any:
        """Decodes x in the light of the context.

        Args:
          x: [B, T, E], embeddings of what was written so far.
          context: [B, S, E], or what `project` made of it.
          mask: of self-attention, on top of the causal one.
          context_mask: of cross-attention.
          positions: of x.
          context_positions: of the context; kernels of the cross rule see their difference.
          cache: from `init_cache`, for decoding step by step.
          dropout_key: a key turns dropout on.

        Returns:
          [B, T, E]; with a cache a pair of it and the new cache.

        """
        causal = Causal() if mask is None else Causal() & mask
        return self.run(
            x,
            context,
            mask=causal,
            context_mask=context_mask,
            positions=positions,
            context_positions=context_positions,
            cache=cache,
            dropout_key=dropout_key,
        )


class EncoderDecoder(nnx.Module):
    """An encoder and a decoder over its output.

    Args:
      num_layers: of each.
      features: E.
      num_heads: N.
      rule: of the encoder's self-attention.
      decoder_rule: of the decoder's; None: as the encoder's.
      cross_rule: of the attention from decoder to encoder.
      rngs: the source of initial values.
      **options: the other arguments of `Stack`, the same for both.

    """

    def __init__(
        self,
        num_layers: int,
        features: int,
        num_heads: int,
        *,
        rule: str | Sequence[str] = "learned",
        decoder_rule: str | Sequence[str] | None = None,
        cross_rule: str | Sequence[str] = "learned",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.encoder = Encoder(
            num_layers, features, num_heads, rule=rule, rngs=named(rngs, "encoder"), **options
        )
        self.decoder = Decoder(
            num_layers,
            features,
            num_heads,
            rule=rule if decoder_rule is None else decoder_rule,
            cross_rule=cross_rule,
            rngs=named(rngs, "decoder"),
            **options,
        )

    def __call__(
        self,
        source: Float[Array, "B S E"],
        target: Float[Array, "B T E"],
        *,
        source_mask: Any = None,
        target_mask: Any = None,
        context_mask: Any = None,
        dropout_key: Any = None,
    ) -> Float[Array, "B T E"]:
        """The decoder's output for embeddings of source and target."""
        keys = _split(dropout_key, 2)
        context = self.encoder(source, mask=source_mask, dropout_key=keys[0])
        return self.decoder(
            target, context, mask=target_mask, context_mask=context_mask, dropout_key=keys[1]
        )

    def flops(self, source_length: int, target_length: int) -> int:
        """Forward FLOPs of one example."""
        return self.encoder.flops(source_length) + self.decoder.flops(target_length, source_length)


def _per_layer(rule: Any, num_layers: int, name: str) -> Sequence[Any]:
    if rule is None or isinstance(rule, str):
        return [rule] * num_layers
    if len(rule) != num_layers:
        raise ValueError(f"{name} must be one rule or {num_layers}, one a layer, got {len(rule)}")
    return list(rule)
