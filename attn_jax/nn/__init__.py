"""Flax NNX modules: parameters only, all mathematics in `attn_jax.ops`."""

from attn_jax.nn.attention import MultiHeadAttention
from attn_jax.nn.initialization import named, no_weight_decay
from attn_jax.nn.interop import attention_fn
from attn_jax.nn.positions import rotate, sinusoidal
from attn_jax.nn.recurrent import RecurrentDecoder, RecurrentEncoder
from attn_jax.nn.transformer import Decoder, Encoder, EncoderDecoder, dropout

__all__ = [
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "MultiHeadAttention",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "attention_fn",
    "dropout",
    "named",
    "no_weight_decay",
    "rotate",
    "sinusoidal",
]
