"""Kernels of fixed patterns: what the papers that they come from say of their weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import attention_weights
from attn_jax.ops import Segments
from experiments import patterns

VALUE = jnp.zeros((1, 12, 1, 1))


def weights(kernel, normalizer="softmax", mask=None):
    shown = attention_weights(None, None, VALUE, proximity=kernel, normalizer=normalizer, mask=mask)
    return np.asarray(shown)[0, 0]


@pytest.mark.parametrize(("offset", "first"), [(0, 0.699), (-1, 0.301)])
def test_what_a_mask_takes_away_is_lost_without_renormalisation(offset, first):
    """The masses that the first token keeps of a normal distribution of width one."""
    shown = weights(patterns.Normal(1.0, offset), "none")
    assert shown[0].sum() == pytest.approx(first, abs=5e-4)
    assert shown[6].sum() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(shown[6, 6 + offset], 1 / np.sqrt(2 * np.pi), rtol=1e-6)


def test_renormalised_it_is_the_gaussian():
    shown, expected = (
        weights(kernel) for kernel in (patterns.Normal(2.0, 1.0), patterns.Gaussian(2.0, 1.0))
    )
    np.testing.assert_allclose(shown, expected, rtol=2e-6)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_context_is_on_one_side_and_its_nearest_word_weighs_most(side):
    shown = weights(patterns.Slope(3.0, side, beyond=2))[5][::side]
    place = 5 if side == 1 else 6
    assert not shown[: place + 2].any()
    np.testing.assert_allclose(
        shown[place + 3 :] / shown[place + 2 : -1], np.exp(-1 / 3), rtol=1e-5
    )


def test_a_context_that_is_empty_weighs_nothing():
    assert not weights(patterns.Slope(3.0, -1, beyond=2))[:2].any()


@pytest.mark.parametrize(("side", "end"), [(-1, [0, 4]), (1, [3, 11])])
def test_an_end_is_that_of_the_sentence_for_every_word(side, end):
    segments = jnp.array([[1] * 4 + [2] * 8])
    shown = weights(patterns.Slope(3.0, side), mask=Segments(segments))
    for rows, last in zip((slice(0, 4), slice(4, 12)), end, strict=True):
        assert (shown[rows].argmax(1) == last).all()
        np.testing.assert_allclose(
            shown[rows], shown[rows][:1].repeat(len(shown[rows]), 0), rtol=1e-5
        )
