"""Kernels come back from weights that they made, from rows that no fit saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Exponential, Gaussian, Lengths, PowerLaw, Triangular, Window
from attn_jax.analysis import Attention, explain_by_position, rows
from attn_jax.analysis.kernels import Shifted, table
from attn_jax.ops.proximity import log_weights

LENGTH = 40
WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
OFFSETS = (0.0, -1.0, 1.0, -0.5, 0.0)


def attention_of(kernel, heads, mask=None, weights=None):
    """Two sequences of `LENGTH`, the second one shorter."""
    value = jnp.ones((2, LENGTH, heads, 1))
    lengths = Lengths(key=np.asarray([LENGTH, 25]))
    mask = lengths if mask is None else lengths & mask
    allowed = attn_jax.attention_weights(None, None, value, mask=mask) > 0
    if weights is None:
        weights = attn_jax.attention_weights(None, None, value, proximity=kernel, mask=mask)
    r = np.arange(LENGTH)[None, None] - np.arange(LENGTH)[None, :, None]
    return Attention(weights, allowed, jnp.asarray(r))


def explained(attention):
    """Fitted on the first sequence, judged by the second."""
    first = np.broadcast_to(np.asarray([[True], [False]]), (2, LENGTH))
    return explain_by_position(rows(attention, first), rows(attention, ~first))


@pytest.mark.slow
def test_a_gaussian_comes_back():
    """Family, and within 2 % width and offset."""
    kernel = Gaussian(jnp.asarray(WIDTHS), jnp.asarray(OFFSETS))
    for one, width, offset in zip(explained(attention_of(kernel, 5)), WIDTHS, OFFSETS, strict=True):
        assert one.plain.family == one.with_first.family == "gaussian"
        assert one.plain.scale == pytest.approx(width, rel=0.02)
        assert one.plain.offset == pytest.approx(offset, abs=0.02)
        assert one.plain.share > 0.999
        assert one.plain.divergence < 1e-4
        assert one.with_first.first == pytest.approx(0, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kernel", "scale", "mask"),
    [
        ("exponential", Exponential(3.0), 3.0, None),
        ("exponential", Exponential(3.0), 3.0, Causal()),
        ("powerlaw", PowerLaw(1.5), 1.5, Causal()),
        ("triangular", Triangular(6.3), 6.3, None),
        ("window", Window(3.0), None, None),
    ],
)
def test_other_families_come_back(family, kernel, scale, mask):
    (one,) = explained(attention_of(Shifted(kernel, -2.0) if mask is None else kernel, 1, mask))
    assert one.plain.family == family
    assert one.plain.share > 0.999
    if scale is not None:
        assert one.plain.scale == pytest.approx(scale, rel=0.02)
    if mask is None:
        assert one.plain.offset == pytest.approx(-2, abs=0.5 if family == "window" else 0.04)


@pytest.mark.slow
def test_a_peak_far_back_is_found_under_a_causal_mask():
    """Near the start, most of the weight lies on the first tokens, and not at the peak."""
    widths, offsets = (8.0, 3.0, 2.0), (-15.0, -12.0, -25.0)
    kernel = Gaussian(jnp.asarray(widths), jnp.asarray(offsets))
    found = explained(attention_of(kernel, 3, Causal()))
    for one, width, offset in zip(found, widths, offsets, strict=True):
        assert one.plain.family == "gaussian"
        assert one.plain.scale == pytest.approx(width, rel=0.02)
        assert one.plain.offset == pytest.approx(offset, abs=0.02 * width)


@pytest.mark.slow
def test_a_table_of_times_has_steps_between_whole_numbers():
    """Weights by a table of step 0.25, on irregular times."""
    generator = np.random.default_rng(3)
    times = np.sort(generator.uniform(0, 10, (2, LENGTH)), 1)
    r = jnp.asarray(times[:, None] - times[..., None], jnp.float32)
    kernel = table(generator.normal(size=65), 0.25)
    logs = log_weights(kernel, r[:, None])
    weights = jnp.exp(logs) / jnp.exp(logs).sum(-1, keepdims=True)
    (one,) = explained(Attention(weights, jnp.ones_like(weights, bool), r))
    assert one.families["table"] > 0.5


@pytest.mark.slow
def test_the_part_of_the_first_token_never_takes_away():
    """A table whose part for a sink is small: it stays a table."""
    entries = np.random.default_rng(4).normal(size=9)
    kernel = attention_of(attn_jax.Table(jnp.asarray(entries)), 1, Causal())
    first = np.zeros((2, 1, LENGTH, LENGTH))
    first[..., 0] = 1
    weights = jnp.asarray(0.97 * kernel.weights + 0.03 * first, jnp.float32)
    (one,) = explained(Attention(weights, kernel.allowed, kernel.relative))
    assert one.with_first.share >= one.plain.share - 1e-3


@pytest.mark.slow
def test_what_no_family_is_is_a_table():
    log_weights = np.full(9, -2.0)
    log_weights[[0, 4, 7]] = 0.5, 1.0, 1.5
    kernel = attn_jax.Table(jnp.asarray(log_weights))
    (one,) = explained(attention_of(kernel, 1))
    assert one.plain.family == "table"
    assert one.plain.share > 0.995
    assert one.families["table"] == one.plain.share
    assert max(share for name, share in one.families.items() if name != "table") < 0.9
    again = attention_of(one.plain.kernel, 1).weights
    np.testing.assert_allclose(again, attention_of(kernel, 1).weights, atol=0.02)


def test_divergence_is_finite_where_weights_underflow():
    """A tenth of the weight is spread over keys that a narrow kernel gives e^-800."""
    kernel = attention_of(Gaussian(0.5), 1)
    weights = 0.9 * kernel.weights + 0.1 * attention_of(None, 1).weights
    (one,) = explained(Attention(weights, kernel.allowed, kernel.relative))
    assert 0.9 < one.families["gaussian"] < 1
    assert np.isfinite(one.plain.divergence)


@pytest.mark.slow
def test_a_table_is_carried_on_beyond_what_it_saw():
    """Fitted on 25 positions, its ends stand for the rest, not a level out of nowhere."""
    kernel = Exponential(3.0)
    attention = attention_of(kernel, 1)
    short = np.broadcast_to(np.asarray([[False], [True]]), (2, LENGTH)) & (np.arange(LENGTH) < 25)
    (one,) = explain_by_position(rows(attention, short), rows(attention, ~short))
    assert one.families["table"] > 0.95


@pytest.mark.slow
def test_random_content_is_not_explained_by_position():
    query, key = (
        jax.random.normal(jax.random.key(seed), (2, LENGTH, 2, 8)) * 1.5 for seed in (0, 1)
    )
    weights = attn_jax.attention_weights(query, key, mask=Lengths(key=np.asarray([LENGTH, 25])))
    for one in explained(attention_of(None, 2, weights=weights)):
        assert abs(one.plain.share) < 0.05
        assert abs(one.with_first.share) < 0.05


def test_a_sink_is_told_from_distance():
    """0.6 on the first token and the rest by a kernel."""
    kernel = attention_of(Gaussian(1.5, -1.0), 1, Causal())
    first = np.zeros((2, 1, LENGTH, LENGTH))
    first[..., 0] = 1
    weights = jnp.asarray(0.4 * kernel.weights + 0.6 * first, jnp.float32)
    (one,) = explained(Attention(weights, kernel.allowed, kernel.relative))
    assert one.plain.share < 0.8
    assert one.with_first.share > 0.999
    assert one.with_first.first == pytest.approx(0.6, abs=0.01)
    assert one.with_first.scale == pytest.approx(1.5, rel=0.02)
    assert "first" in str(one.with_first)


def test_the_share_of_a_mean_is_undefined():
    (one,) = explained(attention_of(None, 1))
    assert np.isnan(one.plain.share)


def test_no_rows_are_refused():
    attention = attention_of(None, 1)
    none = rows(attention, np.zeros((2, LENGTH), bool))
    with pytest.raises(ValueError, match="held_out must hold rows, got none"):
        explain_by_position(rows(attention), none)
