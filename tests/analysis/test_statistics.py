"""Statistics of heads, counted by hand on a few rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.analysis import Attention, kinds, profile, rare, rows, sample, statistics

LENGTH = 5
CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))
R = np.arange(LENGTH)[None] - np.arange(LENGTH)[:, None]


def attention(*heads):
    """Causal heads [T, S] of one sequence."""
    weights = jnp.asarray(np.stack(heads)[None], jnp.float32)
    allowed = jnp.asarray(np.broadcast_to(CAUSAL, weights.shape))
    return Attention(weights, allowed, jnp.asarray(R[None]))


def previous():
    weights = np.eye(LENGTH, k=-1)
    weights[0, 0] = 1
    return weights


def first():
    weights = np.zeros((LENGTH, LENGTH))
    weights[:, 0] = 1
    return weights


def uniform():
    return CAUSAL / CAUSAL.sum(1, keepdims=True)


def test_rows_leave_out_padding_and_queries_without_a_choice():
    """The first query sees itself alone."""
    given = attention(previous(), uniform())
    assert rows(given).weights.shape == (4, 2, LENGTH)
    queries = np.asarray([[True, True, True, False, False]])
    some = rows(given, queries)
    np.testing.assert_array_equal(some.weights[1, 0], [0, 1, 0, 0, 0])
    assert len(some.relative) == 2


@pytest.mark.slow
def test_statistics_of_heads_that_are_known():
    found = statistics(rows(attention(previous(), first(), uniform())), radius=1)
    np.testing.assert_allclose(found.previous, [1, 0.25, np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5])])
    np.testing.assert_allclose(found.first, [0.25, 1, np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5])])
    entropy = np.mean(np.log([2, 3, 4, 5]))
    np.testing.assert_allclose(found.entropy, [0, 0, entropy], atol=1e-6)
    np.testing.assert_allclose(found.uniform_entropy, [entropy] * 3, rtol=1e-6)
    np.testing.assert_allclose(found.distance, [1, 2.5, np.mean([1 / 2, 1, 3 / 2, 2])])
    np.testing.assert_allclose(found.window, [1, 0.25, np.mean([1, 2 / 3, 2 / 4, 2 / 5])])
    np.testing.assert_allclose(found.positional[:2], [1, 0.25])
    assert found.place[0] == -1
    assert kinds(found) == [["positional", "previous token"], ["first token"], []]


@pytest.mark.slow
def test_rare_tokens():
    """The head looks at the rarest key in two of four rows."""
    given = rows(attention(previous()), frequency=np.asarray([[5, 1, 9, 9, 9]]))
    # keys seen most: 0, 1, 2, 3; the rarest that may be seen: 1 in every row
    np.testing.assert_allclose(rare(given), [0.25])
    found = kinds(statistics(given), jnp.asarray([0.7]))
    assert found == [["positional", "previous token", "rare tokens"]]


def test_rare_tokens_are_told_by_frequency():
    with pytest.raises(ValueError, match=r"give rows\(\.\.\., frequency=\.\.\.\)"):
        rare(rows(attention(previous())))


@pytest.mark.slow
def test_a_profile_is_the_mean_over_rows_that_may_see():
    found = profile(rows(attention(uniform())))
    np.testing.assert_array_equal(found.relative, np.arange(-4, 5))
    expected = [1 / 5, np.mean([1 / 4, 1 / 5]), np.mean([1 / 3, 1 / 4, 1 / 5])]
    np.testing.assert_allclose(found.weight[0, :3], expected, rtol=1e-6)
    np.testing.assert_array_equal(found.rows[0], [1, 2, 3, 4, 4, 0, 0, 0, 0])
    assert np.isnan(found.weight[0, 5:]).all()
    near = profile(rows(attention(uniform())), reach=1)
    np.testing.assert_array_equal(near.relative, [-1, 0, 1])
    np.testing.assert_allclose(near.weight[0, 0], found.weight[0, 3])


def test_a_sample_is_drawn_without_replacement():
    both = [rows(attention(previous())), rows(attention(uniform()))]
    drawn = sample(both, 5, np.random.default_rng(0))
    assert len(drawn.relative) == 5
    everything = sample(both, 100, np.random.default_rng(0))
    assert len(everything.relative) == 8
    whole = np.asarray(everything.weights).reshape(8, -1).tolist()
    some = np.asarray(drawn.weights).reshape(5, -1).tolist()
    assert all(row in whole for row in some)
    assert len({tuple(row) for row in some}) >= 4  # one row is the same in both


@pytest.mark.parametrize("head", [0, 1])
def test_one_head_of_rows(head):
    given = rows(attention(previous(), uniform()))
    one = given.head(head)
    np.testing.assert_array_equal(one.weights, given.weights[:, head])
    np.testing.assert_array_equal(one.first.argmax(-1), 0)
    np.testing.assert_allclose(one.uniform.sum(-1), 1)
