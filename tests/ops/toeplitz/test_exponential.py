"""Decoding with the state of an exponential."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Exponential
from attn_jax.ops.toeplitz import exponential
from tests.ops.arrays import values
from tests.ops.implementations import attend, quick_jit


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[1] * 9, [5, 1, 0, 3], [150], [70, 1, 79]])
@pytest.mark.parametrize("length", [4.0, (0.3, 50.0), 1e-30, 1e30])
def test_decoding_in_pieces_is_the_whole(steps, length):
    value = values(keys=sum(steps), key_heads=2)
    kernel = Exponential(jnp.asarray(length))
    expected = attend(None, None, value, proximity=kernel, mask=Causal(), implementation="dense")
    state, outputs, first = exponential.empty_state(2, 2, value.shape[3]), [], 0
    advance = quick_jit(exponential.advance)
    for size in steps:
        output, state = advance(state, value[:, first : first + size], jnp.asarray(length))
        outputs.append(output)
        first += size
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, atol=5e-6)


def test_half_precision_keeps_its_dtype_and_a_wide_state():
    value = values(keys=3, key_heads=2, dtype=jnp.bfloat16)
    output, state = exponential.advance(
        exponential.empty_state(2, 2, value.shape[3]), value, jnp.asarray(2.0)
    )
    assert output.dtype == jnp.bfloat16
    assert state.total.dtype == state.weight.dtype == np.float32


def test_gradients_through_a_decoding_loop_are_those_of_the_whole():
    value = values(keys=6, key_heads=2)

    def stepwise(length, value):
        def step(state, x):
            output, state = exponential.advance(state, x[:, None], length)
            return state, output[:, 0]

        state = exponential.empty_state(2, 2, value.shape[3])
        outputs = jax.lax.scan(step, state, jnp.moveaxis(value, 1, 0))[1]
        return jnp.sin(outputs).sum()

    def whole(length, value):
        output = attn_jax.attention(
            None, None, value, proximity=Exponential(length), mask=Causal(), implementation="dense"
        )
        return jnp.sin(output).sum()

    got = quick_jit(jax.grad(stepwise, (0, 1)))(jnp.asarray(2.0), value)
    expected = quick_jit(jax.grad(whole, (0, 1)))(jnp.asarray(2.0), value)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, expected)
