"""The implementations that tests run through, and marks that do so."""

import jax
import pytest

import attn_jax

EVERY = attn_jax.implementations()
WITH_CONTENT = tuple(name for name in EVERY if name != "toeplitz")

every = pytest.mark.parametrize("implementation", EVERY)
with_content = pytest.mark.parametrize("implementation", WITH_CONTENT)


def attend(query, key, value, **arguments):
    """`attn_jax.attention`, compiled as a whole: sooner done than one operation after another."""
    return jax.jit(lambda *qkv: attn_jax.attention(*qkv, **arguments))(query, key, value)


def weigh(query, key, value, **arguments):
    """`attn_jax.attention_weights`, compiled as a whole."""
    return jax.jit(lambda *qkv: attn_jax.attention_weights(*qkv, **arguments))(query, key, value)
