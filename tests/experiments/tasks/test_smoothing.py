"""smoothing: baselines and floor against formulas, real series held out in whole gaps."""

import gzip

import numpy as np
import pytest

from experiments.options import UserError
from experiments.tasks import curves, series
from tests.experiments.tasks.variants import baseline, make


@pytest.fixture(scope="module")
def task():
    return make("smoothing")


@pytest.mark.parametrize("group", [0, 1, 2])
def test_the_mean_scores_one(task, group):
    # the mean of 64 correlated observations is not the curve's own mean: a few percent above 1
    assert baseline(task, "mean of the observations", group) == pytest.approx(1.0, abs=0.06)


def test_the_floor_is_below_the_best_fixed_width(task):
    floor = baseline(task, "Gaussian-process posterior (floor)", 0)
    assert floor < baseline(task, "Nadaraya-Watson, best fixed width", 0) < 0.5


def test_nadaraya_watson_is_the_weighted_mean():
    drawn = curves.synthetic(np.random.default_rng(0), 4)
    estimate = curves.nadaraya_watson(drawn, 1.5)
    for row, column in ((0, 0), (1, 7), (3, 31)):
        scaled = [(drawn.asked[row, column] - time) / 1.5 for time in drawn.times[row]]
        weights = [np.exp(-(x**2) / 2) for x in scaled]
        terms = [w * y for w, y in zip(weights, drawn.values[row], strict=True)]
        expected = sum(terms) / sum(weights)
        assert estimate[row, column] == pytest.approx(expected, rel=1e-9)


def test_no_linear_estimate_beats_the_posterior_mean():
    drawn = curves.synthetic(np.random.default_rng(1), 300, with_floor=True)
    smooth = drawn.family == 0
    floor = ((drawn.floor - drawn.truth)[smooth] ** 2).mean()
    errors = [
        ((curves.nadaraya_watson(drawn, width) - drawn.truth)[smooth] ** 2).mean()
        for width in (0.3, 0.6, 1.0, 2.0)
    ]
    assert floor < min(errors)


def test_a_gap_of_the_periodic_family_holds_no_observation():
    drawn = curves.synthetic(np.random.default_rng(2), 30)
    for row in np.flatnonzero(drawn.family == 1):
        ends = np.concatenate([[0], drawn.times[row], [curves.SPAN]])
        assert np.diff(ends).max() >= curves.GAP


def test_series_hide_whole_gaps():
    values = np.sin(np.arange(2000) / 9)
    drawn = series.windows(np.random.default_rng(3), [values], 20)
    step = curves.OBSERVED / series.WINDOW
    for row in range(20):
        asked = np.sort(np.round(drawn.asked[row] / step).astype(int))
        runs = np.split(asked, np.flatnonzero(np.diff(asked) > 1) + 1)
        assert sorted(map(len, runs)) == sorted(series.GAPS)


def test_a_broken_line_of_a_series_is_named(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"date,value\n2020-01-01,1.0\n2020-01-02,one\n"))
    with pytest.raises(UserError, match=r"a\.csv\.gz, line 3: a line needs a number"):
        series.read(path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"task\.path or the environment variable ATTN_JAX_DATA"):
        make("smoothing", "nab", path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["co2_daily", "nab"])
def test_real_series(data_folder, name):
    task = make("smoothing", name, path=str(data_folder / name))
    batch = next(iter(task.train(0)))
    assert np.isfinite(batch["truth"]).all()
    assert len(task.items("test").cluster) >= 20 * curves.ASKED
