"""Values of every implementation, held to loops over sequences, heads, queries and keys."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Gaussian, Lengths, Local, Segments, Window
from tests.ops import reference
from tests.ops.arrays import qkv, values
from tests.ops.implementations import attend, every, with_content

SIZES = [(0, 0), (0, 7), (7, 0), (1, 1), (1, 1000), (2, 7), (7, 2), (63, 65), (64, 64), (65, 127)]
SIZES += [(127, 63), (128, 129), (129, 64), (1000, 2)]
GROUPINGS = [(4, 4), (4, 2), (4, 1)]


def grid(rule, batch=2, heads=4, queries=6, keys=9):
    """A rule (b, n, i, j) as an array [B, N, T, S]."""
    pairs = np.ndindex(batch, heads, queries, keys)
    return np.array([rule(*pair) for pair in pairs]).reshape(batch, heads, queries, keys)


def near(radius):
    """The log-weight of `Window(radius)` for the loops."""
    return lambda n, r: 0.0 if abs(r) <= radius else -math.inf


# Sizes, widths and heads


@with_content
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_any_number_of_queries_and_keys(implementation, queries, keys):
    query, key, value = qkv(
        batch=1, queries=queries, keys=keys, heads=2, key_heads=1, key_width=3, value_width=2
    )
    output = attend(query, key, value, implementation=implementation)
    expected, _ = reference.attention(query, key, value)
    assert output.shape == (1, queries, 2, 2)
    np.testing.assert_allclose(output, expected, atol=2e-6)


@pytest.mark.parametrize(("queries", "keys"), SIZES[::3])
def test_any_number_of_queries_and_keys_without_content(queries, keys):
    value = values(batch=1, keys=keys, key_heads=1, value_width=2)
    output = attend(
        None,
        None,
        value,
        proximity=Window(2),
        query_positions=np.arange(queries),
        implementation="toeplitz",
    )
    expected = np.zeros((1, queries, 1, 2))
    for i in range(min(queries, keys + 2)):
        seen = value[:, max(i - 2, 0) : i + 3]
        expected[:, i] = np.asarray(seen).sum(1) / max(seen.shape[1], 1)
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected, atol=2e-6)


@with_content
@pytest.mark.parametrize("width", [1, 8, 24, 48, 64, 80, 96, 112, 128, 192, 256])
def test_any_width(implementation, width):
    query, key, value = qkv(queries=3, keys=4, key_width=width, value_width=257 - width)
    output = attend(query, key, value, implementation=implementation)
    expected, _ = reference.attention(query, key, value)
    np.testing.assert_allclose(output, expected, atol=5e-6)


@with_content
@pytest.mark.parametrize(("heads", "key_heads"), GROUPINGS)
def test_query_heads_share_key_heads(implementation, heads, key_heads):
    query, key, value = qkv(heads=heads, key_heads=key_heads)
    output = attend(query, key, value, mask=Causal(), implementation=implementation)
    causal = grid(lambda b, n, i, j: j <= i)
    expected, _ = reference.attention(query, key, value, allowed=causal)
    np.testing.assert_allclose(output, expected, atol=2e-6)


@with_content
def test_gradients_of_shared_heads_are_summed(implementation):
    query, key, value = qkv()

    def loss(key, value):
        output = attend(query, key, value, implementation=implementation)
        return jnp.square(output).sum()

    def loss_of_copies(key, value):
        return loss(jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2))

    shared = jax.grad(loss, (0, 1))(key, value)
    summed = jax.grad(loss_of_copies, (0, 1))(key, value)
    for gradient, expected in zip(shared, summed, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@with_content
def test_scale_per_head(implementation):
    query, key, value = qkv()
    scale = jnp.asarray([0.0, 0.5, 1.0, -2.0])
    output = attend(query, key, value, scale=scale, implementation=implementation)
    expected, _ = reference.attention(query, key, value, scale=np.asarray(scale))
    np.testing.assert_allclose(output, expected, atol=5e-6)


# Large, small and narrow numbers


@with_content
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(implementation, size):
    """Small whole numbers: logits are multiples of 10^4 without rounding."""
    query, key, value = (jnp.round(x) for x in qkv())
    scale = float(size)
    output = attend(query, key, value, scale=scale, implementation=implementation)
    expected, _ = reference.attention(query, key, value, scale=scale)
    np.testing.assert_allclose(output, expected, atol=1e-6)


@with_content
def test_one_huge_outlier_takes_its_row(implementation):
    query, key, value = qkv()
    query, key = jnp.ones_like(query), key.at[:, 3].set(1e4)
    output = attend(query, key, value, implementation=implementation)
    expected = jnp.repeat(value[:, 3:4], 6, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(output, expected, rtol=1e-6)


@with_content
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_constant_rows_give_the_mean(implementation, level):
    query, key, value = qkv(heads=2)
    bias = jnp.full((1, 1, 1, 1), level)
    output = attend(jnp.zeros_like(query), key, value, bias=bias, implementation=implementation)
    mean = np.broadcast_to(np.mean(value, 1, keepdims=True), output.shape)
    np.testing.assert_allclose(output, mean, atol=1e-6)


@with_content
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_the_rounded_result(implementation, dtype):
    query, key, value = qkv(keys=200, dtype=dtype)
    output = attend(query, key, value, implementation=implementation)
    expected, _ = reference.attention(query, key, value)
    assert output.dtype == dtype
    tolerance = 3 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, atol=tolerance)


@with_content
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_accumulated_in_float32(implementation, dtype):
    """A sum of 3,000 ones stalls at 256 in bfloat16, at 2,048 in float16."""
    query = jnp.ones((1, 1, 1, 3000), dtype)
    one = jnp.ones((1, 1, 1, 1), dtype)
    logit = attend(query, query, one, scale=1.0, normalizer="linear", implementation=implementation)
    many = jnp.ones((1, 3000, 1, 1), dtype)
    total = attend(one, 0 * many, many, normalizer="none", implementation=implementation)
    assert logit.item() == total.item() == jnp.asarray(3000, dtype)


def test_half_precision_is_accumulated_in_float32_by_toeplitz():
    value = jnp.ones((1, 3000, 1, 1), jnp.bfloat16)
    total = attend(
        None, None, value, proximity=Window(1500), normalizer="none", implementation="toeplitz"
    )
    assert total[0, 1500, 0, 0] == jnp.asarray(3000, jnp.bfloat16)


@every
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        value = values(dtype=np.float64)
        output, log = attend(
            None,
            None,
            value,
            proximity=Gaussian(2.0, reach=4),
            return_log_normalizer=True,
            implementation=implementation,
        )
    expected, _ = reference.attention(
        None, None, value, log_weight=lambda n, r: -(r**2) / 8 + near(4)(n, r)
    )
    assert output.dtype == log.dtype == np.float64
    np.testing.assert_allclose(output, expected, atol=1e-14)


@with_content
def test_float64_content_stays_float64(implementation):
    with jax.enable_x64(True):
        query, key, value = qkv(dtype=np.float64)
        output = attend(query, key, value, implementation=implementation)
    expected, _ = reference.attention(query, key, value)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, expected, atol=1e-14)


# Positions

QUERY_POSITIONS = {
    "top left": None,
    "bottom right": 3,
    "before all keys": -4,
    "after all keys": 20,
    "an offset of the program": jnp.asarray(2),
    "any order": np.asarray([5, 0, 3, 3, 8, -2]),
    "between keys": jnp.asarray([0.5, 1.5, 2.25, 3.0, 7.5, 30.0]),
    "of each sequence": jnp.asarray([[0, 1, 2, 3, 4, 5], [9, 7, 5, 3, 1, -1]]),
}


def relative(query_positions, key_positions, batch=2, queries=6, keys=9):
    """[B, T, S] key position - query position."""
    query, key = (
        np.arange(length) + (0 if given is None else given) if np.ndim(given) == 0 else given
        for given, length in ((query_positions, queries), (key_positions, keys))
    )
    return np.broadcast_to(
        np.atleast_2d(key)[:, None, :] - np.atleast_2d(query)[:, :, None], (batch, queries, keys)
    )


@with_content
@pytest.mark.parametrize("alignment", QUERY_POSITIONS)
def test_positions_place_kernels_and_masks(implementation, alignment):
    positions = QUERY_POSITIONS[alignment]
    query, key, value = qkv()
    output = attend(
        query,
        key,
        value,
        proximity=Gaussian(2.0, -1.0),
        mask=Causal(),
        query_positions=positions,
        implementation=implementation,
    )
    r = relative(positions, None)
    expected, _ = reference.attention(
        query,
        key,
        value,
        log_weight=lambda n, r: -(((r + 1) / 2) ** 2) / 2,
        allowed=np.repeat(r[:, None] <= 0, 4, axis=1),
        r=r,
    )
    np.testing.assert_allclose(output, expected, atol=5e-6)


@every
@pytest.mark.parametrize("alignment", [None, 3, -4, 20])
def test_offsets_without_content(implementation, alignment):
    value = values()
    output = attend(
        None,
        None,
        value,
        proximity=Window(2),
        mask=Causal(),
        query_positions=alignment,
        key_positions=1,
        implementation=implementation,
    )
    r = relative(alignment, 1, queries=9)
    allowed = np.repeat(r[:, None] <= 0, 2, axis=1)
    expected, _ = reference.attention(None, None, value, log_weight=near(2), allowed=allowed, r=r)
    np.testing.assert_allclose(output, expected, atol=2e-6)


@with_content
def test_more_queries_than_keys_leave_the_first_rows_empty(implementation):
    query, key, value = qkv(queries=9, keys=4)
    output = attend(
        query, key, value, mask=Causal(), query_positions=4 - 9, implementation=implementation
    )
    causal = grid(lambda b, n, i, j: j <= i - 5, queries=9, keys=4)
    expected, _ = reference.attention(query, key, value, allowed=causal)
    assert not np.any(output[:, :5])
    np.testing.assert_allclose(output, expected, atol=2e-6)


# Bias, masks and windows

BIAS_SHAPES = [(2, 1, 1, 1), (1, 4, 1, 1), (1, 1, 6, 1), (1, 1, 1, 9), (2, 1, 1, 9), (1, 4, 6, 9)]
BIAS_SHAPES += [(2, 4, 6, 9), (1, 1, 1, 1)]


@with_content
@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_broadcasts_and_its_gradient_is_summed(implementation, shape):
    query, key, value = qkv()
    bias = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def output(bias):
        return attend(
            query, key, value, bias=bias, normalizer="sigmoid", implementation=implementation
        )

    full = jnp.broadcast_to(bias, (2, 4, 6, 9))
    expected, _ = reference.attention(
        query, key, value, bias=np.asarray(full), normalizer="sigmoid"
    )
    np.testing.assert_allclose(output(bias), expected, atol=5e-6)
    gradient = jax.jit(jax.grad(lambda bias: jnp.square(output(bias)).sum()))
    axes = tuple(axis for axis, length in enumerate(shape) if length == 1)
    summed = gradient(full).sum(axes, keepdims=True)
    np.testing.assert_allclose(gradient(bias), summed, rtol=1e-5, atol=2e-5)


@with_content
def test_key_mask_with_causal_and_shared_heads(implementation):
    """[B, 1, 1, S], what flax and jax.nn got wrong."""
    query, key, value = qkv()
    keep = np.random.default_rng(2).random((2, 1, 1, 9)) < 0.6
    output = attend(query, key, value, mask=Causal() & keep, implementation=implementation)
    allowed = grid(lambda b, n, i, j: j <= i and keep[b, 0, 0, j])
    expected, _ = reference.attention(query, key, value, allowed=allowed)
    np.testing.assert_allclose(output, expected, atol=2e-6)


@with_content
def test_a_mask_whose_first_keys_are_all_masked(implementation):
    query, key, value = qkv(queries=3, keys=300)
    late = np.arange(300).reshape(1, 1, 1, 300) >= 270
    output = attend(query, key, value, mask=late, implementation=implementation)
    alone = attend(query, key[:, 270:], value[:, 270:], implementation="dense")
    np.testing.assert_allclose(output, alone, atol=2e-6)


@every
def test_windows_that_leave_the_first_blocks_out(implementation):
    value = values(batch=1, keys=300, key_heads=1)
    output = attend(
        None,
        None,
        value,
        mask=Local(1, 0),
        query_positions=np.arange(290, 300),
        implementation=implementation,
    )
    expected = (value[:, 289:299] + value[:, 290:300]) / 2
    np.testing.assert_allclose(output, expected, atol=2e-6)


@every
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 1), (0, 3), (8, 8), (50, 0), (99, 99)])
def test_local_windows_are_truncated_at_the_ends(implementation, before, after):
    value = values()
    output = attend(None, None, value, mask=Local(before, after), implementation=implementation)
    means = [np.mean(value[:, max(i - before, 0) : i + after + 1], 1) for i in range(9)]
    np.testing.assert_allclose(output, np.stack(means, 1), atol=2e-6)


@every
@pytest.mark.parametrize("radius", [0, 2, 8, 50])
def test_windows_as_kernels_are_truncated_at_the_ends(implementation, radius):
    value = values()
    output = attend(None, None, value, proximity=Window(radius), implementation=implementation)
    means = [np.mean(value[:, max(i - radius, 0) : i + radius + 1], 1) for i in range(9)]
    np.testing.assert_allclose(output, np.stack(means, 1), atol=2e-6)


@with_content
def test_a_window_with_content_and_no_mask_is_applied(implementation):
    query, key, value = qkv()
    output = attend(query, key, value, proximity=Window(2), implementation=implementation)
    expected, _ = reference.attention(query, key, value, log_weight=near(2))
    np.testing.assert_allclose(output, expected, atol=2e-6)


@with_content
@pytest.mark.parametrize("content", [False, True])
def test_segments_never_bleed(implementation, content):
    """Each packed segment gives what it gives alone."""
    query, key, value = qkv(queries=9)
    if not content:
        query = key = None
    output = attend(
        query,
        key,
        value,
        proximity=Gaussian(2.0),
        mask=Segments(np.asarray([1, 1, 1, 1, 2, 2, 2, 2, 2])),
        implementation=implementation,
    )
    for part in (slice(0, 4), slice(4, 9)):
        alone = attend(
            *(None if x is None else x[:, part] for x in (query, key, value)),
            proximity=Gaussian(2.0),
        )
        np.testing.assert_allclose(output[:, part], alone, atol=2e-6)


@with_content
def test_score_changes_logits_by_index(implementation):
    query, key, value = qkv()

    def score(logits, query_index, key_index, head):
        return jnp.tanh(logits) + jnp.where(key_index > query_index, head, 0.0)

    output = attend(query, key, value, score=score, implementation=implementation)
    logits = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, 2, 2)) * 8**-0.5
    bias = np.tanh(logits) + grid(lambda b, n, i, j: n if j > i else 0)
    expected, _ = reference.attention(0 * query, key, value, bias=bias)
    np.testing.assert_allclose(output, expected, atol=2e-6)


# Partial results


def parts(query, key, value, cuts, implementation):
    """Output and log-normaliser over each run of keys."""
    pairs = [
        attend(
            query,
            None if key is None else key[:, first:last],
            value[:, first:last],
            proximity=Gaussian(2.0, reach=5),
            query_positions=np.arange(6),
            key_positions=first,
            return_log_normalizer=True,
            implementation=implementation,
        )
        for first, last in itertools.pairwise(cuts)
    ]
    return tuple(zip(*pairs, strict=True))


@with_content
def test_merged_parts_are_the_whole(implementation):
    """One part is empty, one too far from most queries."""
    query, key, value = qkv(keys=12)
    outputs, logs = parts(query, key, value, (0, 4, 4, 9, 12), implementation)
    output, log = attn_jax.merge(outputs, logs)
    (whole,), (whole_log,) = parts(query, key, value, (0, 12), implementation)
    assert all(part.dtype == np.float32 for part in logs)
    np.testing.assert_allclose(output, whole, atol=2e-6)
    np.testing.assert_allclose(log, whole_log, atol=2e-6)


def test_merged_parts_are_the_whole_without_content():
    value = values(keys=12)
    output, log = attn_jax.merge(*parts(None, None, value, (0, 4, 9, 12), "toeplitz"))
    (whole,), (whole_log,) = parts(None, None, value, (0, 12), "dense")
    np.testing.assert_allclose(output, whole, atol=2e-6)
    np.testing.assert_allclose(log, whole_log, atol=2e-6)


@with_content
def test_gradients_of_merged_parts_are_those_of_the_whole(implementation):
    query, key, value = qkv(keys=12)

    def loss(query, key, value, cuts):
        output, log = attn_jax.merge(*parts(query, key, value, cuts, implementation))
        return jnp.square(output).sum() + jnp.sin(log).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    of_parts = gradient(query, key, value, (0, 4, 9, 12))
    for got, expected in zip(of_parts, gradient(query, key, value, (0, 12)), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_merge_of_parts_without_any_key_is_zero():
    output, log = attn_jax.merge(jnp.zeros((2, 3, 4, 5)), jnp.full((2, 3, 4), -jnp.inf))
    assert not np.any(output)
    assert np.all(log == -np.inf)


@every
def test_log_normalizer_of_empty_rows(implementation):
    value = values()
    for normalizer, expected in (("softmax", -np.inf), ("softmax_one", 0.0)):
        _, log = attend(
            None,
            None,
            value,
            mask=Local(2, 2) & Lengths(key=np.asarray([0, 2])),
            normalizer=normalizer,
            return_log_normalizer=True,
            implementation=implementation,
        )
        assert np.all(log[0] == expected)
        assert np.all(log[1, 4:] == expected)
        assert np.all(np.isfinite(log[1, :4]))
