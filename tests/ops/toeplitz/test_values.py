"""Every method of `toeplitz` gives dense weights times the values, in every dtype."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import (
    Causal,
    Epanechnikov,
    Exponential,
    Gaussian,
    Lengths,
    Local,
    PowerLaw,
    Segments,
    Table,
    Triangular,
    Window,
)
from tests.ops import reference
from tests.ops.arrays import values
from tests.ops.implementations import attend, quick_jit

KEYS = 260
PACKED = np.sort(np.random.default_rng(3).integers(0, 5, (2, KEYS)), axis=1)
SHUFFLED = np.random.default_rng(4).integers(0, 3, (2, KEYS))
SOME = Lengths(np.asarray([250, 4]), [100, 260])


def data(*numbers):
    """Numbers that are not known while tracing."""
    return jnp.asarray(numbers[0] if len(numbers) == 1 else numbers, jnp.result_type(float))


# As functions, so that numbers become data in the dtype of the test.
CALLS = {
    "no kernel": lambda: {},
    "Gaussian": lambda: {"proximity": Gaussian(2.0)},
    "Gaussian per head": lambda: {"proximity": Gaussian((0.5, 6.0), (-1.0, 3.0))},
    "Gaussian none": lambda: {"proximity": Gaussian(9.0), "normalizer": "none"},
    "Gaussian causal": lambda: {"proximity": Gaussian(data(30.0)), "mask": Causal()},
    "Gaussian offset": lambda: {
        "proximity": Gaussian(data(9.0), data(40.0)),
        "normalizer": "softmax_one",
    },
    "Gaussian offsets": lambda: {"proximity": Gaussian(data(12.0), data(-1.0, 1.0))},
    "Gaussian widths": lambda: {"proximity": Gaussian(data(9.0, 12.0))},
    "Gaussian widths far apart": lambda: {"proximity": Gaussian(data(0.5, 40.0))},
    "Gaussian between keys": lambda: {"proximity": Gaussian(data(0.01), 0.5)},
    "Gaussian with a reach": lambda: {"proximity": Gaussian(data(9.0), reach=40)},
    "Gaussian far": lambda: {"proximity": Gaussian(data(3.0)), "query_positions": -20},
    "Gaussian lengths": lambda: {"proximity": Gaussian(data(9.0)), "mask": SOME},
    "Gaussian segments": lambda: {"proximity": Gaussian(data(2.0)), "mask": Segments(PACKED)},
    "Exponential": lambda: {"proximity": Exponential(data(5.0))},
    "Exponential causal": lambda: {"proximity": Exponential(data(5.0, 0.1)), "mask": Causal()},
    "Exponential mirrored": lambda: {"proximity": Exponential(70.0), "mask": Local(999, 0)},
    "Exponential lengths": lambda: {"proximity": Exponential(data(1.0)), "mask": SOME},
    "Exponential segments": lambda: {"proximity": Exponential(data(9.0)), "mask": Segments(PACKED)},
    "Exponential causal segments": lambda: {
        "proximity": Exponential(data(9.0, 90.0)),
        "mask": Segments(PACKED) & Causal(),
    },
    "Exponential shuffled segments": lambda: {
        "proximity": Exponential(data(9.0)),
        "mask": Segments(SHUFFLED),
    },
    "Window": lambda: {"proximity": Window(3), "normalizer": "softmax_one"},
    "Window data": lambda: {"proximity": Window(data(40.5))},
    "Window radii far apart": lambda: {"proximity": Window(data(2, 70))},
    "Window per head, causal": lambda: {"proximity": Window(data(20, 70)), "mask": Causal()},
    "Window segments": lambda: {"proximity": Window(data(30)), "mask": Segments(PACKED)},
    "Window few queries": lambda: {
        "proximity": Window(data(40)),
        "query_positions": np.arange(3, 99),
    },
    "running mean": lambda: {"mask": Causal()},
    "mean of what follows": lambda: {"mask": Local(0, 999)},
    "running mean of segments": lambda: {"mask": Causal() & Segments(PACKED)},
    "Local": lambda: {"mask": Local(5, 2) & Causal()},
    "Local data": lambda: {"mask": Local(data(90), data(0))},
    "Local data with a kernel": lambda: {
        "proximity": Gaussian(9.0),
        "mask": Local(data(90), data(5)),
    },
    "Triangular data": lambda: {"proximity": Triangular(data(50.0))},
    "Epanechnikov": lambda: {"proximity": Epanechnikov(data(12.0, 90.0))},
    "PowerLaw": lambda: {"proximity": PowerLaw(data(1.5))},
    "PowerLaw causal lengths": lambda: {"proximity": PowerLaw(data(1.5)), "mask": Causal() & SOME},
    "PowerLaw segments": lambda: {"proximity": PowerLaw(1.0), "mask": Segments(PACKED)},
    "Table": lambda: {"proximity": Table(data(0.3, 1.0, -0.5, 2.0, 0.1))},
    "labels of keys": lambda: {
        "proximity": Gaussian(data(2.0)),
        "mask": Segments(SHUFFLED, PACKED),
    },
}
# Those whose compiled program holds what the others leave out, in every dtype.
IN_EVERY_DTYPE = (
    "Gaussian",
    "Gaussian widths",
    "Exponential",
    "Exponential segments",
    "Window data",
    "running mean",
    "PowerLaw",
)


def check(name, value, tolerance):
    output = attend(None, None, value, **CALLS[name](), implementation="toeplitz")
    wide = jnp.asarray(value, jnp.result_type(float))
    expected = attend(None, None, wide, **CALLS[name](), implementation="dense")
    assert output.dtype == value.dtype
    np.testing.assert_allclose(
        np.asarray(output, np.float64), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("name", IN_EVERY_DTYPE)
def test_toeplitz_is_dense(name):
    """260 keys: several blocks of every method, the last one short. Sums of order one."""
    check(name, values(keys=KEYS, key_heads=2, value_width=3), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_toeplitz_is_dense_in_float64(name):
    with jax.enable_x64(True):
        check(name, values(keys=KEYS, key_heads=2, value_width=3, dtype=np.float64), 1e-13)


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(IN_EVERY_DTYPE, itertools.cycle([jnp.bfloat16, jnp.float16]))]
)
def test_half_precision_is_the_rounded_result(name, dtype):
    value = values(keys=KEYS, key_heads=2, value_width=3, dtype=dtype)
    check(name, value, 2 * float(jnp.finfo(dtype).eps))


@quick_jit
def of_any_width(value, width):
    return attn_jax.attention(
        None, None, value, proximity=Gaussian(width), implementation="toeplitz"
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.3, 1.4, 3.0, 4.1, 5.0, 7.5, 9.0, 20.0, 50.0, 3e2, 1e4, 1e6])
def test_a_gaussian_of_any_width_is_exact(width):
    """To 1e-6 of values of order one; the width is data, 1,000 positions."""
    value = values(batch=1, keys=1000, key_heads=1)
    output = of_any_width(value, data(width))
    r = np.arange(1000)[None] - np.arange(1000)[:, None]
    weights = np.exp(-np.square(r / np.float32(width)) / 2)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ts,bsnd->btnd", weights, np.asarray(value, np.float64))
    np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "offset"), [(1, -300), (7, 250), (300, 4)])
def test_queries_and_keys_may_lie_apart(queries, offset):
    """Far from all keys, log-weights are large: their rounding is that of the weights."""
    value = values(batch=1, keys=130, key_heads=1)
    apart = max(0, -offset, offset + queries - 130)
    rounding = np.finfo(np.float32).eps * (apart / 9) ** 2 / 2
    for kernel in (Gaussian(data(2.0)), Gaussian(data(9.0)), Exponential(3.0), Window(data(40))):
        arguments = {"proximity": kernel, "query_positions": np.arange(queries) + offset}
        output = attend(None, None, value, **arguments, implementation="toeplitz")
        expected = attend(None, None, value, **arguments, implementation="dense")
        np.testing.assert_allclose(output, expected, atol=5e-6 + 4 * rounding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Gaussian lengths", "Exponential lengths", "PowerLaw causal lengths"]
)
@pytest.mark.parametrize("normalizer", ["softmax", "softmax_one"])
def test_log_normalizers(name, normalizer):
    value = values(keys=KEYS, key_heads=2)
    arguments = CALLS[name]() | {"normalizer": normalizer, "return_log_normalizer": True}
    _, log = attend(None, None, value, **arguments, implementation="toeplitz")
    _, expected = attend(None, None, value, **arguments, implementation="dense")
    np.testing.assert_allclose(log, expected, rtol=1e-6, atol=1e-5)


def test_grouped_heads_share_values():
    """Four heads with a width each, two of values."""
    value = values(keys=70, key_heads=2)
    output = attend(
        None, None, value, proximity=Gaussian(data(1.0, 2.0, 3.0, 9.0)), implementation="toeplitz"
    )
    expected, _ = reference.attention(
        None,
        None,
        value,
        heads=4,
        log_weight=lambda n, r: -((r / (1.0, 2.0, 3.0, 9.0)[n]) ** 2) / 2,
    )
    np.testing.assert_allclose(output, expected, atol=5e-6)


def test_a_kernel_of_a_users_own_is_sampled():
    class Hat(attn_jax.Proximity):
        """Not a kernel that is known to fall: a peak 100 positions on."""

        def log_weight(self, r):
            return -abs(r - 100.0) / 10

    value = values(keys=KEYS)
    output = attend(None, None, value, proximity=Hat(), implementation="toeplitz")
    expected = attend(None, None, value, proximity=Hat(), implementation="dense")
    np.testing.assert_allclose(output, expected, atol=5e-6)


def test_nan_in_one_heads_kernel_stays_in_that_head_of_a_transform():
    value = values(keys=400, key_heads=2)
    kernel = PowerLaw(jnp.asarray([jnp.nan, 2.0]))
    output = attend(None, None, value, proximity=kernel, mask=Causal(), implementation="toeplitz")
    assert np.all(np.isnan(output[:, 1:, 0]))
    assert np.all(np.isfinite(output[:, :, 1]))
