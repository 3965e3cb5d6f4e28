"""Attention as pure functions: one entry point, kernels and masks as data."""

from attn_jax.ops.attention import (
    attention,
    attention_weights,
    explain_dispatch,
    implementations,
)
from attn_jax.ops.compat import dot_product_attention
from attn_jax.ops.masks import Causal, Lengths, Local, Mask, Prefix, Segments
from attn_jax.ops.merging import merge
from attn_jax.ops.proximity import (
    Epanechnikov,
    Exponential,
    Gaussian,
    PowerLaw,
    Proximity,
    Table,
    Triangular,
    Window,
    alibi,
    per_head,
    t5_bucket,
)
from attn_jax.ops.toeplitz.exponential import State as ExponentialState
from attn_jax.ops.toeplitz.exponential import advance as exponential_step
from attn_jax.ops.toeplitz.exponential import empty_state as exponential_state

__all__ = [
    "Causal",
    "Epanechnikov",
    "Exponential",
    "ExponentialState",
    "Gaussian",
    "Lengths",
    "Local",
    "Mask",
    "PowerLaw",
    "Prefix",
    "Proximity",
    "Segments",
    "Table",
    "Triangular",
    "Window",
    "alibi",
    "attention",
    "attention_weights",
    "dot_product_attention",
    "explain_dispatch",
    "exponential_state",
    "exponential_step",
    "implementations",
    "merge",
    "per_head",
    "t5_bucket",
]
