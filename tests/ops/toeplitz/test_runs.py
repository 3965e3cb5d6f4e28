"""Runs of one label laid apart: where they lie, and when there is room."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.ops.toeplitz.runs import gap_between, places

LABELS = np.asarray([[1, 1, 1, 2, 5, 5, 0], [3, 4, 4, 4, 4, 4, 4]])
LONGER = 7


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
def test_the_gap_is_what_the_row_with_most_runs_has_room_for():
    assert gap_between(jnp.asarray(LABELS), LONGER) == LONGER // 3
    assert gap_between(jnp.asarray(LABELS[1:]), LONGER) == LONGER
    assert gap_between(jnp.zeros((1, 4), int), LONGER) == LONGER


@pytest.mark.parametrize(
    "labels", [[1, 2, 1], [2, 0, 2], [2, 1, 0], [1, np.nan, 1], [1, 0, 1, 0], [1, 2, 0, 1]]
)
def test_no_room_where_a_label_may_come_back(labels):
    assert gap_between(jnp.asarray([labels]), 100) == 0


def test_places_keep_runs_together_and_others_a_gap_away():
    laid = places(jnp.asarray(LABELS), jnp.asarray(2), LONGER)
    expected = [[0, 1, 2, 5, 8, 9, 12], [0, 3, 4, 5, 6, 7, 8]]
    np.testing.assert_array_equal(laid.place, expected)
    for place, position in zip(laid.place, laid.position, strict=True):
        np.testing.assert_array_equal(position[place], np.arange(7))
        assert (np.asarray(position) >= 0).sum() == 7
