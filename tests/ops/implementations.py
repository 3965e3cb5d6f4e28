"""The implementations that tests run through, and marks that do so."""

import functools

import jax
import pytest

import attn_jax
from attn_jax.ops.call import Call, normalized_call

EVERY = attn_jax.implementations()
WITH_CONTENT = tuple(name for name in EVERY if name != "toeplitz")

every = pytest.mark.parametrize("implementation", EVERY)
with_content = pytest.mark.parametrize("implementation", WITH_CONTENT)


# Compiles several times faster, and what it gives is as right.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    },
)


def attend(query, key, value, **arguments):
    """`attn_jax.attention`, compiled as a whole: sooner done than one operation after another."""
    return quick_jit(lambda *qkv: attn_jax.attention(*qkv, **arguments))(query, key, value)


def content_free(**arguments) -> Call:
    """The call that implementations of distance alone get."""
    rule = dict.fromkeys(_NOTHING) | {"normalizer": "softmax", "dropout_rate": 0.0}
    call, _ = normalized_call(**(rule | {"return_log_normalizer": False} | arguments))
    return call


_NOTHING = (
    *("query", "key", "proximity", "bias", "mask", "score", "scale"),
    *("query_positions", "key_positions", "dropout_key"),
)


def weigh(query, key, value, **arguments):
    """`attn_jax.attention_weights`, compiled as a whole."""
    return quick_jit(lambda *qkv: attn_jax.attention_weights(*qkv, **arguments))(query, key, value)
