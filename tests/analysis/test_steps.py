"""Steps of a computation recompute from each other, and give what the module gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import Causal, Lengths
from attn_jax.analysis import record, steps
from attn_jax.nn import MultiHeadAttention, Plane, RecurrentEncoderDecoder

RULES = (
    "learned",
    "learned * gaussian(width=2)",
    "gaussian(offset=-1):2, learned(key_width=3):2",
    "additive",
    "dot",
    "self",
    "mix(learned, exponential(length=3))",
)


def inputs(seed=0, length=6):
    return jax.random.normal(jax.random.key(seed), (2, length, 8))


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_each_step_follows_from_the_one_before(rule):
    module = MultiHeadAttention(4, 8, rule=rule, rngs=nnx.Rngs(0))
    mask = Causal() & Lengths(key=np.asarray([6, 4]))
    taken = steps(module, inputs(), mask=mask, example=1)[""]
    for head in taken.heads:
        for one in head.rules:
            total = np.zeros((6, 6))
            if one.products is not None:
                np.testing.assert_allclose(one.query @ one.key.T, one.products, atol=1e-5)
                total = total + one.scale * one.products
            total = total + sum(term for term in (one.kernel, one.bias) if term is not None)
            np.testing.assert_allclose(one.logits, total, atol=1e-5)
            seen = [0, 0, 0, 0, 0, 0] if rule == "self" else [1, 1, 1, 1, 0, 0]
            np.testing.assert_array_equal(one.allowed[5], seen)
            logits = np.where(one.allowed, total, -np.inf)[:4]
            np.testing.assert_allclose(one.weights[:4], softmax(logits), atol=1e-6)
        np.testing.assert_allclose(head.context, head.weights @ head.value, atol=1e-6)
    joined = np.concatenate([head.context for head in taken.heads], 1)
    np.testing.assert_array_equal(taken.joined, joined)
    np.testing.assert_allclose(taken.output, module(inputs(), mask=mask)[1], atol=1e-5)
    assert (taken.heads[0].gate is not None) == rule.startswith("mix")


@pytest.mark.slow
def test_cross_attention_and_positions():
    module = MultiHeadAttention(2, 8, rule="learned * gaussian(width=3)", rngs=nnx.Rngs(0))
    x, context = inputs(0, 4), inputs(1, 6)
    taken = steps(module, x, context, query_positions=2, example=0)[""]
    expected = module(x, context, query_positions=2)[0]
    np.testing.assert_allclose(taken.output, expected, atol=1e-5)
    assert taken.heads[0].rules[0].kernel[0, 2] == 0


@pytest.mark.slow
def test_steps_inside_of_a_model():
    """Of a recurrent decoder's attention, at every step of it."""
    model = RecurrentEncoderDecoder(8, 8, rule="additive", rngs=nnx.Rngs(0))
    x, y, lengths = inputs(0, 4), inputs(1, 6), np.asarray([4, 3])
    taken = steps(model, x, y, source_length=jnp.asarray(lengths), example=1)["decoder/attention"]
    _, found = record(model, x, y, source_length=jnp.asarray(lengths))
    weights = found["decoder/attention"].weights[1, 0]
    np.testing.assert_allclose(taken.heads[0].weights, weights, atol=1e-6)
    assert not taken.heads[0].rules[0].allowed[:, 3].any()


@pytest.mark.slow
def test_positions_in_a_plane():
    """Kernels see its distance, rotations the index."""
    for options in ({"rule": "learned * gaussian(width=2)"}, {"rotary": True}):
        module = MultiHeadAttention(2, 8, distance=Plane(3), rngs=nnx.Rngs(0), **options)
        taken = steps(module, inputs())[""]
        np.testing.assert_allclose(taken.output, module(inputs())[0], atol=1e-5)
    kernel = steps(
        MultiHeadAttention(2, 8, rule="gaussian", distance=Plane(3), rngs=nnx.Rngs(0)), inputs()
    )
    np.testing.assert_allclose(kernel[""].heads[0].rules[0].kernel[0, 4], -(1 + 1) / 2, atol=1e-5)
