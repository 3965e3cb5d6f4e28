"""Flax NNX modules: parameters only, all mathematics in `attn_jax.ops`."""

from attn_jax.nn.attention import MultiHeadAttention
from attn_jax.nn.distances import Distance, Plane
from attn_jax.nn.initialization import named, no_weight_decay
from attn_jax.nn.interop import attention_fn, import_attention
from attn_jax.nn.positions import rotate, sinusoidal
from attn_jax.nn.recurrent import (
    RecurrentDecoder,
    RecurrentEncoder,
    RecurrentEncoderDecoder,
)
from attn_jax.nn.transformer import Decoder, Encoder, EncoderDecoder, dropout

__all__ = [
    "Decoder",
    "Distance",
    "Encoder",
    "EncoderDecoder",
    "MultiHeadAttention",
    "Plane",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "RecurrentEncoderDecoder",
    "attention_fn",
    "dropout",
    "import_attention",
    "named",
    "no_weight_decay",
    "rotate",
    "sinusoidal",
]
