"""The formulas of `flops` against XLA's count of the compiled program.

XLA counts two for a multiply-add, as the formulas do, and one for every elementwise operation,
which they leave out: some 30 for each of N T S weights and some 20 for each of T E features. At the
sizes here they are at most 4 percent of the total, less than any matrix product of one attention.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attn_jax.nn import Encoder, EncoderDecoder, MultiHeadAttention

FEATURES, HEADS, LENGTH, CONTEXT = 96, 2, 24, 16
ELEMENTWISE = 0.04


def attention(rule, **options):
    return MultiHeadAttention(HEADS, FEATURES, rule=rule, rngs=nnx.Rngs(0), **options)


def counted(module, *shapes):
    graph, state = nnx.split(module)
    arguments = [jax.ShapeDtypeStruct((1, length, width), jnp.float32) for length, width in shapes]
    program = jax.jit(lambda state, *xs: nnx.merge(graph, state)(*xs)).lower(state, *arguments)
    return program.compile().cost_analysis()["flops"]


def assert_close(formula, count):
    assert formula <= count <= (1 + ELEMENTWISE) * formula


@pytest.mark.parametrize(
    "rule",
    [
        "learned",
        "learned(key_width=24)",
        "raw",
        "gaussian(trainable=True)",
        "gaussian:1, learned:1",
        "mix(learned, alibi)",
    ],
)
def test_self_attention(rule):
    module = attention(rule, implementation="dense")
    assert_close(module.flops(LENGTH), counted(module, (LENGTH, FEATURES)))


def test_cross_attention():
    module = attention("learned", context_features=64, out_features=48, qkv_features=128)
    count = counted(module, (LENGTH, FEATURES), (CONTEXT, 64))
    assert_close(module.flops(LENGTH, CONTEXT), count)


@pytest.mark.slow
def test_stacks():
    encoder = Encoder(2, FEATURES, HEADS, activation="relu", rngs=nnx.Rngs(0))
    assert_close(encoder.flops(LENGTH), counted(encoder, (LENGTH, FEATURES)))
    both = EncoderDecoder(1, FEATURES, HEADS, activation="relu", rngs=nnx.Rngs(0))
    count = counted(both, (CONTEXT, FEATURES), (LENGTH, FEATURES))
    assert_close(both.flops(CONTEXT, LENGTH), count)


def test_a_known_band_counts_its_width():
    def flops(rule):
        return attention(rule).flops(LENGTH)

    rest = flops("uniform") - 2 * LENGTH * LENGTH * FEATURES
    assert flops("window(radius=2)") == rest + 2 * LENGTH * 5 * FEATURES
    assert flops("gaussian(reach=3.5)") == rest + 2 * LENGTH * 7 * FEATURES
    assert flops("gaussian * window(radius=2)") == flops("window(radius=2)")
    assert flops("self") == rest + 2 * LENGTH * FEATURES
    assert flops("window(radius=99)") == flops("gaussian") == flops("uniform")
