"""A recurrent encoder and a decoder over its states."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from attn_jax.nn.initialization import named
from attn_jax.nn.recurrent.decoder import RecurrentDecoder
from attn_jax.nn.recurrent.encoder import RecurrentEncoder


class RecurrentEncoderDecoder(nnx.Module):
    """A recurrent encoder and a decoder over its states.

    Args:
      features: E of source and target.
      hidden: H of the decoder, and C of the source: either direction of the encoder has half of it.
      num_layers: of each.
      cell: "gru" or "lstm".
      dropout_rate: of each.
      rngs: the source of initial values.
      **options: the other arguments of `RecurrentDecoder`.

    Raises:
      ValueError: hidden is odd, or an option or the rule does not fit.

    References: Bahdanau et al. 2015; Luong et al. 2015.

    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        num_layers: int = 1,
        cell: str = "gru",
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if hidden % 2:
            raise ValueError(
                f"hidden must be even, half for each of the encoder's directions, got {hidden}"
            )
        shared = {"num_layers": num_layers, "cell": cell, "dropout_rate": dropout_rate}
        self.encoder = RecurrentEncoder(
            features, hidden // 2, rngs=named(rngs, "encoder"), **shared
        )
        self.decoder = RecurrentDecoder(
            features, hidden, hidden, rngs=named(rngs, "decoder"), **shared, **options
        )

    def __call__(
        self,
        source: Float[Array, "B S E"],
        target: Float[Array, "B T E"],
        *,
        source_segment: Int[Array, "B S"] | None = None,
        source_length: Int[Array, "B"] | None = None,
        target_segment: Int[Array, "B T"] | None = None,
        positions: Num[Array, "#B T"] | None = None,
        context_positions: Num[Array, "#B S"] | None = None,
        dropout_key: Any = None,
    ) -> Float[Array, "B T F"]:
        """The decoder's output for embeddings of source and target; see both for the arguments."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        encoded = self.encoder(
            source, segment=source_segment, length=source_length, dropout_key=keys[0]
        )
        return self.decoder(
            target,
            encoded,
            segment=target_segment,
            positions=positions,
            context_positions=context_positions,
            dropout_key=keys[1],
        )

    def flops(self, source_length: int, target_length: int) -> int:
        """Forward FLOPs of one example; a multiply-add counts 2, the cells' gates count 0."""
        return self.encoder.flops(source_length) + self.decoder.flops(target_length, source_length)
