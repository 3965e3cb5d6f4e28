"""What smoothing must do: keep constants, end at segments, reach the identity and the mean."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import (
    Causal,
    Exponential,
    Gaussian,
    Lengths,
    Local,
    PowerLaw,
    Segments,
    Triangular,
    Window,
)
from tests.ops.arrays import values
from tests.ops.implementations import attend, quick_jit

KERNELS = {
    "narrow Gaussian": lambda: Gaussian(jnp.asarray(2.0)),
    "Gaussian": lambda: Gaussian(jnp.asarray(9.0)),
    "wide Gaussian": lambda: Gaussian(jnp.asarray(90.0)),
    "Exponential": lambda: Exponential(jnp.asarray(9.0)),
    "Window": lambda: Window(jnp.asarray(40)),
    "Triangular": lambda: Triangular(jnp.asarray(80.0)),
    "PowerLaw": lambda: PowerLaw(jnp.asarray(1.0)),
    "PowerLaw with a reach": lambda: PowerLaw(1.0, reach=7),
    "none": lambda: None,
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def smoothed(value, **arguments):
    return attend(None, None, value, **arguments, implementation="toeplitz")


def smoothed_by(kernel, value):
    return attn_jax.attention(None, None, value, proximity=kernel, implementation="toeplitz")


MASKS = (None, Causal() & Lengths(key=jnp.asarray([150])))


@pytest.mark.parametrize(("kernel", "mask"), [*zip(KERNELS, itertools.cycle(MASKS))])
def test_constant_values_stay_constant(kernel, mask):
    """Zero where a query has no key, behind the lengths and out of the kernel's reach."""
    level = np.asarray([1.0, 1e4, -30.0], np.float32)
    value = jnp.broadcast_to(level, (1, 200, 2, 3))
    arguments = {"proximity": KERNELS[kernel](), "mask": mask}
    exact = attend(None, None, value, **arguments, implementation="dense")
    assert np.all(np.isclose(exact, level) | (exact == 0))
    np.testing.assert_allclose(smoothed(value, **arguments), exact, rtol=1e-6)


@pytest.mark.slow
@every_kernel
def test_values_of_a_large_mean_keep_their_deviations(kernel):
    """float32 holds 1e4 to within 1e-3."""
    value = values(keys=200)
    raised = smoothed(value + 1e4, proximity=KERNELS[kernel]())
    np.testing.assert_allclose(
        raised - 1e4, smoothed(value, proximity=KERNELS[kernel]()), atol=5e-3
    )


@pytest.mark.slow
def test_a_window_loses_nothing_to_a_mean_of_a_hundred():
    """Relative error below 1e-6, where a running sum over 8,000 keys loses a thousandth."""
    value = values(batch=1, keys=8000, key_heads=1, value_width=2) + 100
    smooth = quick_jit(lambda radius: smoothed_by(Window(radius), value))
    for radius in (5, 20, 32, 64, 1000):
        output = smooth(radius)
        sums = np.cumsum(np.pad(np.asarray(value, np.float64), ((0, 0), (1, 0), (0, 0), (0, 0))), 1)
        last, first = (np.clip(np.arange(8000) + x, 0, 8000) for x in (radius + 1, -radius))
        expected = (sums[:, last] - sums[:, first]) / (last - first)[:, None, None]
        np.testing.assert_allclose(output, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Gaussian, Exponential])
def test_a_width_near_zero_is_the_identity(kernel):
    value = values(keys=140)
    for width in (1e-3, jnp.asarray(1e-3), jnp.asarray(1e-30)):
        np.testing.assert_array_equal(smoothed(value, proximity=kernel(width)), value)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Gaussian, Exponential, Window])
@pytest.mark.parametrize("width", [1e5, 1e8])
def test_a_width_far_above_the_length_is_the_mean(kernel, width):
    value = values(keys=140)
    mean = np.broadcast_to(np.mean(value, 1, keepdims=True), value.shape)
    output = smoothed(value, proximity=kernel(jnp.asarray(width)))
    # weights differ by 140 / 1e5 at most
    np.testing.assert_allclose(output, mean, atol=2e-6 + (140 / width if width < 1e8 else 0))


def test_a_power_law_is_finite_at_distance_zero():
    """Weight (1 + 0)^-p = 1 for the key itself, and so no gradient is NaN."""
    value = values(keys=5)

    def output(exponent, value):
        kernel = PowerLaw(exponent, reach=0)
        return attn_jax.attention(None, None, value, proximity=kernel, implementation="toeplitz")

    def gradient(exponent):
        return jax.value_and_grad(lambda *some: output(*some).sum())(exponent, value)

    np.testing.assert_array_equal(quick_jit(output)(2.0, value), value)
    np.testing.assert_allclose(quick_jit(gradient)(2.0), (value.sum(), 0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "causal"), [*zip(KERNELS, itertools.cycle([False, True]))])
def test_packed_segments_never_bleed(kernel, causal):
    """Each gives what it gives alone, beside values of 1e6 in the next."""
    value = values(batch=1, keys=200)
    ends = [0, 60, 63, 130, 200]
    labels = np.repeat(np.arange(4), np.diff(ends))
    value = value * jnp.where(labels % 2 == 0, 1e6, 1.0)[None, :, None, None]
    packed = Segments(labels) & Causal() if causal else Segments(labels)
    output = smoothed(value, proximity=KERNELS[kernel](), mask=packed)
    for first, last in itertools.pairwise(ends):
        alone = attend(
            None,
            None,
            value[:, first:last],
            proximity=KERNELS[kernel](),
            mask=Causal() if causal else None,
            implementation="dense",
        )
        size = 1e6 if labels[first] % 2 == 0 else 1
        np.testing.assert_allclose(output[:, first:last] / size, alone / size, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Gaussian(2.0), Exponential(1.5), Gaussian(9.0)])
def test_rows_far_from_every_key_are_still_right(kernel):
    """Their nearest key is 200 positions away, where weights underflow."""
    value = values(keys=300)
    arguments = {"proximity": kernel, "mask": Lengths(key=jnp.asarray([100, 300]))}
    expected = attend(None, None, value, **arguments, implementation="dense")
    np.testing.assert_allclose(smoothed(value, **arguments), expected, atol=5e-6)


@pytest.mark.slow
@every_kernel
def test_what_no_query_may_see_reaches_nothing_and_a_query_without_keys_is_zero(kernel):
    """NaN and inf behind the lengths, in values, tangents and cotangents."""
    value, tangent = values(0, keys=140), values(1, keys=140)
    mask = Lengths(query=jnp.asarray([96, 140]), key=jnp.asarray([90, 0])) & Local(50, 50)
    hidden = np.arange(140)[None] >= np.asarray([[90], [0]])
    empty = np.stack([np.arange(140) >= 96, np.ones(140, bool)])

    @quick_jit
    def derivatives(value, tangent, cotangent):
        def output(value):
            return attn_jax.attention(
                None,
                None,
                value,
                proximity=KERNELS[kernel](),
                mask=mask,
                implementation="toeplitz",
            )

        result, pull = jax.vjp(output, value)
        return result, jax.jvp(output, (value,), (tangent,))[1], pull(cotangent)

    def spoiled(x, where, bad):
        return jnp.where(where[:, :, None, None], bad, x)

    ones = jnp.ones_like(value)
    clean = derivatives(value, tangent, ones)
    np.testing.assert_array_equal(np.asarray(clean[0]).any((2, 3)), ~empty)
    for bad in (np.nan, np.inf):
        dirty = derivatives(*(spoiled(x, hidden, bad) for x in (value, tangent)), ones)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    _, _, (gradient,) = derivatives(value, tangent, spoiled(0 * ones, empty, 1))
    assert not np.any(gradient)


@pytest.mark.slow
def test_repeated_runs_are_bit_identical():
    value = values(keys=300)
    function = quick_jit(
        jax.value_and_grad(
            lambda width: jnp.sin(
                attn_jax.attention(
                    None, None, value, proximity=Gaussian(width), implementation="toeplitz"
                )
            ).sum()
        )
    )
    for width in (2.0, 9.0):
        jax.tree.map(np.testing.assert_array_equal, function(width), function(width))
