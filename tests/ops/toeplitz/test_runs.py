"""Runs of one label laid apart: where they lie, and when there is room."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.ops.toeplitz.runs import gap_between, places, runs_of

LABELS = np.asarray([[1, 1, 1, 2, 5, 5, 0], [3, 4, 4, 4, 4, 4, 4]])
LONGER = 29


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _gap(labels, longer=LONGER):
    return gap_between(runs_of(jnp.asarray(labels)), longer, 8)


@pytest.mark.slow
def test_the_gap_is_what_the_row_with_most_runs_has_room_for():
    """In multiples of eight."""
    assert _gap(LABELS) == 8 == _gap(LABELS, 24)
    assert _gap(LABELS, 23) == 0
    assert _gap(LABELS[1:]) == 24 == _gap(np.zeros((1, 4), int))


@pytest.mark.parametrize(
    "labels", [[1, 2, 1], [2, 0, 2], [2, 1, 0], [1, np.nan, 1], [1, 0, 1, 0], [1, 2, 0, 1]]
)
def test_no_room_where_a_label_may_come_back(labels):
    assert _gap([labels], 100) == 0


def test_places_keep_runs_together_and_others_a_gap_away():
    laid = places(runs_of(jnp.asarray(LABELS)), jnp.asarray(8), LONGER)
    expected = [[0, 1, 2, 11, 20, 21, 30], [0, 9, 10, 11, 12, 13, 14]]
    np.testing.assert_array_equal(laid.place, expected)
    for place, position in zip(laid.place, laid.position, strict=True):
        np.testing.assert_array_equal(position[place], np.arange(7))
        assert (np.asarray(position) >= 0).sum() == 7
