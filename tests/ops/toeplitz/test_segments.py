"""Segments under a Gaussian: laid apart where there is room, and right where there is none."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Gaussian, Segments
from attn_jax.ops.toeplitz import gaussian, line, methods
from tests.ops.arrays import values
from tests.ops.implementations import content_free, quick_jit

KEYS, WIDTH = 960, 6.5


def _runs(labels, counts):
    return np.repeat(labels, counts)


# Two sequences each, and whether there is room for all runs on the longer line.
LABELS = {
    "rising": ([_runs([1, 2, 7], [400, 1, 559]), _runs([0, 3], [100, 860])], True),
    "padded behind": ([_runs([1, 2, 0], [500, 300, 160]), _runs([4], [960])], True),
    "falling twice": ([_runs([3, 2, 1], [320] * 3), _runs([4], [960])], False),
    "coming back": ([_runs([1, 2, 1], [470, 20, 470]), _runs([4], [960])], False),
    "many": ([_runs(range(8), [120] * 8), _runs([4], [960])], False),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _call(value, width, query, key=None, implementation="toeplitz") -> Any:
    return attn_jax.attention(
        None,
        None,
        value,
        proximity=Gaussian(width),
        mask=Segments(query, key),
        implementation=implementation,
    )


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", LABELS)
def test_values_and_gradients_are_those_of_dense(name, twice):
    """Labels are data, given once or for queries and keys apart; so is whether there is room."""
    labels = jnp.asarray(LABELS[name][0])
    value = values(keys=KEYS, key_heads=1, value_width=2, dtype=np.float64)
    got, expected = (
        _output_and_gradients(implementation, twice)(value, jnp.asarray(WIDTH), labels)
        for implementation in ("toeplitz", "dense")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("counts", "room"), [([1350, 1350], 32), ([1300, 800, 600], 6)])
def test_little_room_is_enough_for_few_runs(counts, room):
    """Of a kernel as narrow as this; others take more of it. Rows here are long."""
    labels = _runs(range(len(counts)), counts)[None]
    chosen = next(m for m in methods.choices(_content_free(labels), _line(labels)) if m.fits)
    assert chosen.sums.keywords["longer"] == labels.shape[1] // room  # pyright: ignore[reportFunctionMemberAccess]
    value = values(batch=1, keys=labels.shape[1], key_heads=1, value_width=16, dtype=np.float64)
    value = value * np.where(labels == 1, 1e6, 1)[..., None, None]
    output = quick_jit(lambda labels: _call(value, WIDTH, labels))(jnp.asarray(labels))
    expected = _call(value, WIDTH, labels, implementation="dense")
    np.testing.assert_allclose(output, expected, rtol=1e-8, atol=1e-8)


@functools.cache
def _output_and_gradients(implementation, twice):
    """Compiled once for all labels, as those are data."""

    def loss(value, width, labels):
        size = jnp.where(labels % 2 == 0, 1e6, 1.0)[:, :, None, None]
        key = labels + 0 if twice else None
        output = _call(value * size, width, labels, key, implementation) / size
        return (jnp.sin(output) * value).sum(), output

    return quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("name", LABELS)
def test_runs_are_laid_apart_where_there_is_room(name):
    labels, room = LABELS[name]
    assert gaussian.has_room(_line(np.asarray(labels)), KEYS // 6) == room


def test_keys_of_other_labels_are_not_laid_apart_with_their_queries():
    labels = np.asarray(LABELS["rising"][0])
    assert gaussian.has_room(_line(labels, labels + 0), KEYS // 6)
    assert not gaussian.has_room(_line(labels, np.roll(labels, 1, axis=1)), KEYS // 6)


def _line(query, key=None):
    return line.of(_content_free(query, key))


def _content_free(query, key=None):
    batch, keys = query.shape
    mask = Segments(jnp.asarray(query), None if key is None else jnp.asarray(key))
    value = values(batch=batch, keys=keys, key_heads=1, dtype=np.float64)
    return content_free(value=value, proximity=Gaussian(WIDTH), mask=mask)
