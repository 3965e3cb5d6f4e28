"""The distance at which scores fall halfway, and lines through several."""

import dataclasses

import numpy as np
import pytest

from experiments.report import halfway
from experiments.report.load import Arm

METRIC = {
    "name": "accuracy",
    "unit": "%",
    "higher_is_better": True,
    "margin": 0.005,
    "chance": 1 / 3,
}
DISTANCE = np.repeat(np.arange(6.0, 65.0), 20)


def local(reach, layers, at):
    """An arm that is right up to the distance `at` and guesses beyond."""
    generator = np.random.default_rng([reach, layers])
    guesses = generator.random((3, len(DISTANCE))) < 1 / 3
    values = np.where(at >= DISTANCE, 1.0, guesses)
    ones = np.ones(len(DISTANCE))
    cluster = np.arange(len(DISTANCE))
    result = {"rule": "r", "metric": METRIC, "diverged": [], "seeds": [0, 1, 2]}
    arm = Arm(result, values, ones, ones, cluster, DISTANCE, np.zeros_like(cluster), {})
    return halfway.Local(arm, reach, layers)


def test_a_score_that_falls_at_once_is_halfway_there():
    score = np.where(DISTANCE <= 20, 1.0, 1 / 3)
    weights = np.ones(len(DISTANCE))
    found = halfway.halfway(DISTANCE, score, weights, 1 / 3)
    assert found == pytest.approx(np.sqrt(20 * 21))
    assert halfway.halfway(DISTANCE, score, np.where(DISTANCE > 20, 1, 0), 1 / 3) == -np.inf
    assert halfway.halfway(DISTANCE, score, np.where(DISTANCE <= 20, 1, 0), 1 / 3) == np.inf


def test_items_without_a_distance_are_left_out():
    score = np.where(DISTANCE <= 20, 1.0, 1 / 3)
    more = np.append(DISTANCE, np.nan), np.append(score, 1.0), np.append(np.ones(len(score)), 20)
    assert halfway.halfway(*more, 1 / 3) == pytest.approx(np.sqrt(20 * 21))


def test_a_gradual_fall_is_halfway_in_the_middle_whatever_the_noise():
    """4,000 draws at each distance: a noise of 0.007, which is 0.7 positions; three times that."""
    generator = np.random.default_rng(7)
    right = 1 - (DISTANCE - 6) / 58 * 2 / 3
    score = (generator.random((200, len(DISTANCE))) < right).mean(0)
    middle = halfway.halfway(DISTANCE, score, np.ones(len(DISTANCE)), 1 / 3)
    assert middle == pytest.approx(6 + 58 / 2, abs=2)


def test_lines_come_back_from_arms_that_lie_on_one():
    """d50 = 0.7 layers x reach: slope 0.7, both powers 1, to the width of a position."""
    shapes = [(reach, layers) for layers in (1, 2, 3) for reach in (12, 18, 24)]
    arms = [local(reach, layers, 0.7 * reach * layers) for reach, layers in shapes]
    found = halfway.find(arms)
    assert found.slope.mean == pytest.approx(0.7, abs=0.03)
    assert found.of_reach.mean == pytest.approx(1, abs=0.06)
    assert found.of_layers.mean == pytest.approx(1, abs=0.06)
    assert found.slope.low <= found.slope.mean <= found.slope.high
    assert [one.whole for one in found.arms] == sorted(one.whole for one in found.arms)
    page = halfway.page("title", found)
    assert "| 3 | 24 | 72 | 50." in page
    assert len(found.halfway) == 3
    assert "layers x reach" in page


def test_arms_beyond_the_items_are_said_so_and_left_out_of_lines():
    known = [local(12, 1, 10), local(24, 1, 20), local(12, 2, 20), local(24, 2, 40)]
    arms = [*known, local(6, 1, 3), local(40, 3, 90)]
    found = halfway.find(arms)
    page = halfway.page("title", found)
    assert "| 1 | 6 | 6 | below 6, below 6, below 6 | - |" in page
    assert "| 3 | 40 | 120 | beyond 64, beyond 64, beyond 64 | - |" in page
    alone = halfway.find(known)
    assert found.slope.mean == alone.slope.mean
    assert "6 of 18 d50 lie outside" in page
    with pytest.raises(ValueError, match="three arms or more"):
        halfway.find(arms[4:])


def test_arms_of_other_seeds_are_refused():
    arms = [local(12, 1, 10), local(24, 1, 20), local(12, 2, 20)]
    other = dataclasses.replace(arms[0].arm, result=arms[0].arm.result | {"seeds": [0, 1]})
    with pytest.raises(ValueError, match="must have the same seeds"):
        halfway.find([*arms, dataclasses.replace(arms[0], arm=other)])
