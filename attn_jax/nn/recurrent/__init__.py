"""Recurrent encoder and decoder, with attention from every step of the one to all of the other.

Sequences may stand side by side in a row, see `segments`. The state begins anew with every segment,
and padding touches nothing, also where it is not finite, in values and in gradients.
"""

from attn_jax.nn.recurrent.cells import Cell
from attn_jax.nn.recurrent.decoder import RecurrentDecoder
from attn_jax.nn.recurrent.encoder import Encoded, RecurrentEncoder
from attn_jax.nn.recurrent.encoder_decoder import RecurrentEncoderDecoder

__all__ = ["Cell", "Encoded", "RecurrentDecoder", "RecurrentEncoder", "RecurrentEncoderDecoder"]
