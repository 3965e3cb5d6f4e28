"""Intervals that cover, tests of their size, and the words of the protocol.

Scores are x_si = seed_s + cluster_c(i) + interaction_sc + noise, scaled so that the headline has
variance 1 and clusters of unequal size and weight carry `share` of it.
"""

import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments.report import statistics as st
from experiments.tasks.metric import IDENTITY, ROOT

SEED = 20240607
REPLICATES = 2000
CLUSTER = np.repeat(np.arange(80), np.random.default_rng(SEED).integers(2, 8, 80))
WEIGHT = np.random.default_rng(SEED + 1).uniform(0.5, 1.5, len(CLUSTER))
CLUSTER_WEIGHT = np.bincount(CLUSTER, WEIGHT) / WEIGHT.sum()
UNIT = np.sqrt(np.sum(CLUSTER_WEIGHT**2))  # deviation of a mean of clusters of deviation 1


def effects(rng, n, share, interaction=0.0):
    """Scores of n seeds whose headline has mean 0 and variance 1."""
    seed = rng.normal(size=(n, 1)) * math.sqrt((1 - share - interaction) * n)
    shared = rng.normal(size=80) * math.sqrt(share) / UNIT
    crossed = rng.normal(size=(n, 80)) * math.sqrt(interaction * n) / UNIT
    return seed + (shared + crossed)[:, CLUSTER]


def estimate_of(mean, error, seeds=5):
    half = stats.t.isf(0.025, seeds - 1) * error
    return st.Estimate(mean, error, mean - half, mean + half, seeds, seeds - 1)


def interval_coverage(n, share, interaction=0.0):
    rng = np.random.default_rng([SEED, n, round(100 * share), round(100 * interaction)])
    draws = (effects(rng, n, share, interaction) for _ in range(REPLICATES))
    estimates = [st.interval(draw, WEIGHT, CLUSTER) for draw in draws]
    return np.mean([e.low <= 0 <= e.high for e in estimates])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "share"),
    [(3, 0.0), (3, 0.02), (3, 0.05), (5, 0.0), (5, 0.1), (5, 0.2)],
    ids=lambda value: str(value),
)
def test_intervals_cover_where_seeds_carry_most_of_the_variance(n, share):
    assert 0.93 <= interval_coverage(n, share) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize(("share", "interaction"), [(0.5, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_intervals_are_too_wide_never_too_narrow_where_clusters_do(n, share, interaction):
    assert interval_coverage(n, share, interaction) > 0.98


@pytest.mark.parametrize("n", [3, 5])
def test_a_standard_error_of_seeds_alone_would_not_cover(n):
    """Why there is a cluster term: without it seeds agree on the same lucky items."""
    rng = np.random.default_rng([SEED, n])
    covered = []
    for _ in range(REPLICATES):
        means = effects(rng, n, 0.8) @ WEIGHT / WEIGHT.sum()
        half = stats.t.isf(0.025, n - 1) * means.std(ddof=1) / math.sqrt(n)
        covered.append(abs(means.mean()) <= half)
    assert np.mean(covered) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("n", "share"), [(3, 0.05), (5, 0.15)])
def test_paired_intervals_cover_and_p_agrees_with_them(n, share):
    """What both arms share of seeds and clusters, however large, cancels."""
    rng = np.random.default_rng([SEED, n, 7])
    covered, agrees = [], []
    for _ in range(REPLICATES):
        common = 30 * effects(rng, n, 0.5)
        apart = effects(rng, n, share)
        difference = st.paired(common + apart + 2.0, common, WEIGHT, CLUSTER)
        e = difference.estimate
        covered.append(e.low <= 2.0 <= e.high)
        agrees.append((difference.p < 0.05) == (not e.low <= 0 <= e.high))
    assert 0.93 <= np.mean(covered) <= 0.98
    assert all(agrees)


def squared_errors(rng, n, seed_deviation=0.05, cluster_deviation=0.2):
    """Squared errors of n seeds; the RMSE of a seed is exp(seed) exp(cluster variance)."""
    seed = rng.normal(size=(n, 1)) * seed_deviation
    cluster = rng.normal(size=80)[CLUSTER] * cluster_deviation
    item = math.sqrt(0.95) * rng.normal(size=len(CLUSTER))
    own = math.sqrt(0.05) * rng.normal(size=(n, len(CLUSTER)))
    return (np.exp(seed + cluster) * (item + own)) ** 2


@pytest.mark.parametrize(("n", "seed_deviation"), [(3, 0.3), (5, 0.2)])
def test_intervals_of_the_root_cover(n, seed_deviation):
    rng = np.random.default_rng([SEED, n, 11])
    truth = math.exp(seed_deviation**2 / 2 + 0.2**2)
    covered = []
    for _ in range(REPLICATES):
        e = st.interval(squared_errors(rng, n, seed_deviation), WEIGHT, CLUSTER, ROOT)
        covered.append(e.low <= truth <= e.high)
    assert 0.93 <= np.mean(covered) <= 0.98


def test_the_root_has_the_cluster_term_of_a_jackknife():
    """The delta method against leaving out a cluster at a time."""
    errors = squared_errors(np.random.default_rng(SEED), 4)
    influences = st.parts(errors, WEIGHT, CLUSTER, ROOT).influences
    left_out = []
    for c in range(80):
        kept = c != CLUSTER
        left_out.append(np.sqrt(errors[:, kept] @ WEIGHT[kept] / WEIGHT[kept].sum()).mean())
    np.testing.assert_allclose(influences.sum(), 0, atol=1e-12)
    jackknife = 79 / 80 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)
    np.testing.assert_allclose(80 / 79 * np.sum(influences**2), jackknife, rtol=0.03)


def test_interval_of_a_case_done_by_hand():
    values = np.array([[1.0, 3.0, 9.0, 5.0], [3.0, 5.0, 9.0, 7.0]])
    weights, cluster = np.array([1.0, 1.0, 0.0, 2.0]), np.array([7, 7, 2, 4])
    # Means 3.5 and 5.5; influences of clusters 7 and 4: -+ 3/4 and -+ 3/4, averaged 0.75.
    e = st.interval(values, weights, cluster)
    assert e.mean == pytest.approx(4.5)
    assert e.standard_error == pytest.approx(math.sqrt(2 / 2 + 2 * 2 * 0.75**2))
    assert (e.high - e.mean) / e.standard_error == pytest.approx(12.7062, abs=1e-4)
    assert (e.seeds, e.df) == (2, 1)
    root = st.interval(values, weights, cluster, ROOT)
    assert root.mean == pytest.approx((math.sqrt(3.5) + math.sqrt(5.5)) / 2)


def test_equal_clusters_give_the_protocols_formula():
    rng = np.random.default_rng(SEED)
    values, cluster = rng.normal(size=(4, 60)), np.repeat(np.arange(20), 3)
    of_clusters = values.reshape(4, 20, 3).mean(axis=(0, 2))
    expected = values.mean(axis=1).var(ddof=1) / 4 + of_clusters.var(ddof=1) / 20
    e = st.interval(values, np.ones(60), cluster)
    assert e.standard_error**2 == pytest.approx(expected)


def test_one_seed_is_flagged_and_claims_nothing():
    rng = np.random.default_rng(SEED)
    values = rng.normal(size=(1, len(CLUSTER)))
    difference = st.paired(values + 100, values, WEIGHT, CLUSTER)
    assert (difference.estimate.seeds, difference.estimate.df) == (1, 79)
    assert st.verdict(difference.estimate, 0.0, 1e9, True) == "no difference at this n"
    assert not st.equivalent(difference.estimate, 1e9)
    assert st.interval(values, WEIGHT, CLUSTER).standard_error > 0


def test_one_cluster_leaves_the_interval_open():
    values = np.random.default_rng(SEED).normal(size=(3, 5))
    one = np.zeros(5, int)
    difference = st.paired(values + 1, values, np.ones(5), one)
    assert difference.estimate.high == math.inf
    assert difference.p == 1
    assert st.verdict(difference.estimate, difference.p, 1.0, True) == "no difference at this n"
    assert st.retention(values + 1, values, values + 2, np.ones(5), one) is None


def test_arms_that_agree_exactly_are_equivalent():
    values = np.zeros((3, len(CLUSTER)))
    for statistic in (IDENTITY, ROOT):
        difference = st.paired(values, values, WEIGHT, CLUSTER, statistic)
        assert difference.p == 1
        assert st.verdict(difference.estimate, 1.0, 0.01, True) == "equivalent"


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        (np.full((3, 4), np.nan), np.ones(4), "not finite"),
        (np.ones((3, 4)), np.zeros(4), "positive weight"),
        (np.ones((0, 4)), np.ones(4), "positive weight"),
        (np.ones((3, 4)), np.full(4, np.nan), "negative or not a number"),
        (np.ones((3, 5)), np.ones(4), "have shapes"),
    ],
)
def test_scores_that_have_no_interval(values, weights, message):
    with pytest.raises(ValueError, match=message):
        st.interval(values, weights, np.arange(4))


def test_arms_of_unlike_seeds_do_not_pair():
    with pytest.raises(ValueError, match="seeds must pair"):
        st.paired(np.ones((3, 4)), np.ones((1, 4)), np.ones(4), np.arange(4))


def test_holm_by_hand():
    np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(st.holm([0.6, 0.2, 0.7]), [1, 0.6, 1])
    assert st.holm([]).shape == (0,)


def equivalence_rate(n, shift, margin, tag):
    rng = np.random.default_rng([SEED, n, tag])
    zero = np.zeros((n, len(CLUSTER)))
    return np.mean(
        [
            st.equivalent(
                st.paired(effects(rng, n, 0.05) + shift, zero, WEIGHT, CLUSTER).estimate, margin
            )
            for _ in range(REPLICATES)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5])
def test_equivalence_at_the_margin_is_claimed_at_most_one_time_in_twenty(n):
    assert 0.02 <= equivalence_rate(n, 8.0, 8.0, 13) <= 0.06


@pytest.mark.slow
def test_equivalence_has_power():
    assert equivalence_rate(5, 0.0, 4.0, 17) > 0.85
    assert equivalence_rate(5, 0.0, 1.0, 17) < 0.05


def retention_draws(n, share, gain, kept=0.6):
    rng = np.random.default_rng([SEED, n, 19, round(gain)])
    for _ in range(REPLICATES):
        self_, rule, best = (effects(rng, n, share) for _ in range(3))
        yield st.retention(rule + kept * gain, self_, best + gain, WEIGHT, CLUSTER)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "share"), [(3, 0.05), (5, 0.15)])
def test_fiellers_interval_covers(n, share):
    found = [r for r in retention_draws(n, share, gain=30) if r is not None]
    assert len(found) > 0.99 * REPLICATES
    assert all(r.low <= r.value <= r.high for r in found)
    assert 0.93 <= np.mean([r.low <= 0.6 <= r.high for r in found]) <= 0.98


@pytest.mark.slow
def test_retention_is_undefined_without_a_gain():
    assert np.mean([r is None for r in retention_draws(5, 0.15, gain=0)]) > 0.93


def test_retention_of_the_best_arm_and_of_self():
    rng = np.random.default_rng(SEED)
    self_, best = effects(rng, 5, 0.2), effects(rng, 5, 0.2) + 50
    whole = st.retention(best, self_, best, WEIGHT, CLUSTER)
    none = st.retention(self_, self_, best, WEIGHT, CLUSTER)
    assert whole is not None
    assert none is not None
    np.testing.assert_allclose([whole.value, whole.low, whole.high], 1, atol=1e-6)
    np.testing.assert_allclose([none.value, none.low, none.high], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "error", "p_holm", "higher_is_better", "word"),
    [
        (0.3, 0.01, 0.01, True, "a better"),
        (0.3, 0.01, 0.01, False, "b better"),
        (-0.3, 0.01, 0.01, True, "b better"),
        (-0.3, 0.01, 0.01, False, "a better"),
        (0.001, 0.0001, 0.01, True, "a better"),
        (0.001, 0.01, 0.9, True, "equivalent"),
        (0.08, 0.01, 0.06, True, "no difference at this n"),
        (0.001, 0.1, 0.9, True, "no difference at this n"),
    ],
)
def test_verdict_words(mean, error, p_holm, higher_is_better, word):
    assert st.verdict(estimate_of(mean, error), p_holm, 0.1, higher_is_better) == word


def test_buckets_of_distance():
    values = np.random.default_rng(SEED).normal(size=(3, 9))
    distance = np.array([1, 1, 2, 3, 3, 9, np.nan, np.nan, 8])
    weights, cluster = np.r_[np.ones(8), 0.0], np.arange(9)
    edges = (1.0, 2.0, 3.0, 5.0, 7.0, 8.0, math.inf)
    rows = st.by_bucket(values, weights, cluster, distance, edges, never=True)
    spans = [(row["lo"], row["hi"], row["n"]) for row in rows]
    assert spans == [(1, 2, 2), (2, 3, 1), (3, 5, 2), (8, None, 1), (None, None, 2)]
    expected = st.interval(values[:, 3:5], np.ones(2), cluster[3:5])
    assert rows[2]["mean"] == pytest.approx(values[:, 3:5].mean())
    assert rows[2]["ci95"] == [expected.low, expected.high]
    assert rows[1]["ci95"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert st.by_bucket(values, weights, cluster, distance, edges) == rows[:-1]


def test_a_distance_outside_of_the_edges_is_refused():
    values, cluster = np.ones((3, 2)), np.arange(2)
    with pytest.raises(ValueError, match="outside of"):
        st.by_bucket(values, np.ones(2), cluster, np.array([1.0, 4.0]), (1.0, 4.0))
    with pytest.raises(ValueError, match="must ascend"):
        st.by_bucket(values, np.ones(2), cluster, np.array([1.0, 4.0]), (4.0, 1.0))
