"""A model of tokens for every task that labels positions: embed, encode, classify."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn_jax.nn import Encoder, dropout, named
from attn_jax.ops import Causal, Lengths, Segments

ONE_HOT_BELOW = 1024
"""Vocabularies below this are embedded by a product with one-hot rows.

The gradient of a lookup is a scatter, which XLA on a CPU runs row by row and, for several lanes,
lane by lane; the product's gradient is another product.
"""


class Embedding(nnx.Module):
    """Vectors of token ids: [B, T] or bags of ids [B, T, k], summed; id 0 of a bag is nothing."""

    def __init__(self, size: int, features: int, *, rngs: nnx.Rngs):
        self.size = size
        self.table = nnx.Param(rngs.params.normal((size, features)) * features**-0.5)

    def __call__(self, ids: Int[Array, "B T *k"]) -> Float[Array, "B T E"]:
        """The vector of every position."""
        table = self.table[...]
        bag = ids.ndim == 3
        if self.size < ONE_HOT_BELOW:
            counts = jax.nn.one_hot(ids, self.size)
            if bag:
                counts = counts.at[..., 0].set(0).sum(2)
            return counts @ table
        vectors = table[ids]
        return jnp.where((ids > 0)[..., None], vectors, 0).sum(2) if bag else vectors


def stack_options(options: Any) -> dict[str, Any]:
    """What the options of a config's model say of a stack of `attn_jax.nn`, beside its size."""
    return {
        "mlp_features": options.mlp_features or None,
        "norm": options.norm,
        "activation": options.activation,
        "dropout_rate": options.dropout_rate,
        "position_encoding": options.position_encoding,
    }


class TokenClassifier(nnx.Module):
    """Logits at every position: a sum of embeddings, an encoder under a rule, a linear head.

    Args:
      vocabularies: the size of each field of ids that a batch holds.
      num_classes: C.
      rule: of every layer's attention, by name.
      options: attributes num_layers, features, num_heads, mlp_features (0: 4 * features), norm,
        activation, dropout_rate and position_encoding.
      causal: whether a position sees only itself and what is before it.
      max_length: number of positions, for learned encodings.
      rngs: the source of initial values.

    Raises:
      ValueError: an option or the rule does not fit.

    """

    def __init__(
        self,
        *,
        vocabularies: Mapping[str, int],
        num_classes: int,
        rule: str,
        options: Any,
        causal: bool = False,
        max_length: int | None = None,
        rngs: nnx.Rngs,
    ):
        features = options.features
        self.fields, self.causal, self.features = tuple(vocabularies), causal, features
        self.dropout_rate = options.dropout_rate
        self.embeddings = nnx.List(
            [
                Embedding(size, features, rngs=named(named(rngs, "embeddings"), name))
                for name, size in vocabularies.items()
            ]
        )
        self.encoder = Encoder(
            options.num_layers,
            features,
            options.num_heads,
            rule=rule,
            max_length=max_length,
            rngs=named(rngs, "encoder"),
            **stack_options(options),
        )
        self.head = nnx.Linear(features, num_classes, rngs=named(rngs, "head"))

    def __call__(
        self, batch: Mapping[str, Any], *, dropout_key: Any = None
    ) -> Float[Array, "B T C"]:
        """Logits for a batch.

        Args:
          batch: a field of ids for each vocabulary; "segment" [B, T] (0 is padding) keeps packed
            sequences apart, "position" [B, T] counts positions within them, "length" [B] masks
            what is behind.
          dropout_key: a key turns dropout on.

        """
        x = sum(
            embedding(jnp.asarray(batch[name]))
            for name, embedding in zip(self.fields, self.embeddings, strict=True)
        )
        x = jnp.asarray(x) * self.features**0.5
        x = self.encoder(
            x,
            mask=self._mask(batch),
            encoding_positions=batch.get("position"),
            dropout_key=dropout_key,
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        return self.head(dropout(x, self.dropout_rate, key))

    def _mask(self, batch: Mapping[str, Any]) -> Any:
        masks: list[Any] = [Causal()] if self.causal else []
        if "segment" in batch:
            masks.append(Segments(batch["segment"]))
        if "length" in batch:
            masks.append(Lengths(key=batch["length"]))
        mask = masks[0] if masks else None
        for other in masks[1:]:
            mask = mask & other
        return mask

    def flops(self, batch: Mapping[str, Any]) -> int:
        """Forward FLOPs of one row: encoder and head; embedding by lookup counts nothing."""
        length = batch[self.fields[0]].shape[1]
        classes = self.head.out_features
        return self.encoder.flops(length) + 2 * length * self.features * classes


def cross_entropy(
    logits: Float[Array, "*B C"],
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Weighted mean of -sum_c t_c log softmax(logits)_c; zero where all weights are zero.

    Args:
      logits: [..., C].
      targets: the true class of each position.
      weights: of each position; 0 leaves it out.
      label_smoothing: s: t is 1 - s on the true class plus s / C on every class.

    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    likely = target_log_probability(log_probabilities, targets)
    loss = -(1 - label_smoothing) * likely
    if label_smoothing:
        loss = loss - label_smoothing * log_probabilities.mean(-1)
    return (loss * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def target_log_probability(
    log_probabilities: Float[Array, "*B C"], targets: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """The entry of each position's true class, by a product: its gradient needs no scatter."""
    one_hot = jax.nn.one_hot(targets, log_probabilities.shape[-1])
    return (log_probabilities * one_hot).sum(-1)
