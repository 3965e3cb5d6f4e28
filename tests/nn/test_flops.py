"""The formulas of `flops` against XLA's count of the compiled program.

XLA counts two for a multiply-add, as the formulas do, and one for every elementwise operation,
which they leave out: softmax, masks and dropout on N T S weights, norms, biases and activations on
T E features. Up to 25 of them for every weight and feature are allowed for; at the sizes here they
are less than 6 percent of the total, so that no matrix product could be left out unnoticed.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attn_jax.nn import Encoder, EncoderDecoder, MultiHeadAttention

FEATURES, HEADS, LENGTH, CONTEXT = 96, 2, 24, 16
ELEMENTWISE = 25


def counted(module, *shapes):
    graph, state = nnx.split(module)
    arguments = [jax.ShapeDtypeStruct((1, length, width), jnp.float32) for length, width in shapes]
    program = jax.jit(lambda state, *xs: nnx.merge(graph, state)(*xs)).lower(state, *arguments)
    return program.compile().cost_analysis()["flops"]


def assert_close(formula, count, *, weights, features):
    allowed = ELEMENTWISE * (weights + features)
    assert formula <= count <= formula + allowed
    assert allowed < 0.06 * formula


@pytest.mark.parametrize(
    "rule",
    ["learned", "learned(key_width=24)", "raw", "uniform", "gaussian:1, learned:1", "mix(raw, alibi)"],
)
def test_self_attention(rule):
    module = MultiHeadAttention(
        HEADS, FEATURES, rule=rule, implementation="dense", rngs=nnx.Rngs(0)
    )
    count = counted(module, (LENGTH, FEATURES))
    assert_close(
        module.flops(LENGTH),
        count,
        weights=HEADS * LENGTH**2 / 3,
        features=LENGTH * FEATURES,
    )


def test_cross_attention():
    module = MultiHeadAttention(
        HEADS,
        FEATURES,
        context_features=64,
        out_features=48,
        qkv_features=128,
        rngs=nnx.Rngs(0),
    )
    count = counted(module, (LENGTH, FEATURES), (CONTEXT, 64))
    assert_close(
        module.flops(LENGTH, CONTEXT), count, weights=HEADS * LENGTH * CONTEXT, features=0
    )


def test_stacks():
    encoder = Encoder(2, FEATURES, HEADS, activation="relu", rngs=nnx.Rngs(0))
    both = EncoderDecoder(1, FEATURES, HEADS, activation="relu", rngs=nnx.Rngs(0))
    features, weights = LENGTH * FEATURES, HEADS * LENGTH**2
    count = counted(encoder, (LENGTH, FEATURES))
    assert_close(encoder.flops(LENGTH), count, weights=2 * weights, features=4 * features)
    count = counted(both, (CONTEXT, FEATURES), (LENGTH, FEATURES))
    assert_close(both.flops(CONTEXT, LENGTH), count, weights=3 * weights, features=5 * features)


def test_a_known_band_counts_its_width():
    def flops(rule):
        return MultiHeadAttention(HEADS, FEATURES, rule=rule, rngs=nnx.Rngs(0)).flops(LENGTH)

    rest = flops("uniform") - 2 * LENGTH * LENGTH * FEATURES
    assert flops("window(radius=2)") == rest + 2 * LENGTH * 5 * FEATURES
    assert flops("gaussian(reach=3.5)") == rest + 2 * LENGTH * 7 * FEATURES
    assert flops("gaussian * window(radius=2)") == flops("window(radius=2)")
    assert flops("self") == rest + 2 * LENGTH * FEATURES
    assert flops("window(radius=99)") == flops("gaussian") == flops("uniform")
