"""Which method runs, and that changed numbers compile nothing."""

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
from attn_jax.ops import toeplitz
from tests.ops.arrays import values
from tests.ops.implementations import attend, content_free, quick_jit


def plan(keys=2000, **arguments):
    return toeplitz.plan(content_free(**({"value": jnp.zeros((1, keys, 1, 1))} | arguments)))


def test_the_plan_names_the_method():
    assert plan(proximity=Gaussian(2.0)) == "shifted slices"
    assert plan(proximity=Gaussian(30.0)) == "a Gaussian by way of a grid"
    assert plan(proximity=Gaussian(30.0), mask=Causal()) == "fast Fourier transforms"
    assert plan(proximity=Exponential(jnp.asarray(3.0))) == "states of an exponential"
    assert plan(proximity=Window(100)) == plan(mask=Causal()) == "blocked sums of a window"
    assert plan(proximity=PowerLaw(1.0)) == "fast Fourier transforms"
    assert plan(keys=0) == "nothing to compute"


def test_the_plan_of_a_width_that_is_data_names_all():
    assert plan(proximity=Gaussian(jnp.asarray(3.0))) == (
        "shifted slices or a Gaussian by way of a grid or fast Fourier transforms, "
        "by the parameters"
    )


def test_what_it_cannot_do_names_dense():
    value = values()
    for arguments in (
        {"proximity": Gaussian(2.0), "bias": jnp.zeros((1, 1, 1, 9))},
        {"proximity": Gaussian(2.0), "query_positions": jnp.arange(9)},
        {"proximity": Gaussian(2.0), "query_positions": np.arange(9) / 2},
        {"proximity": Gaussian(2.0), "query_positions": 10**6},
        {"proximity": Gaussian(2.0), "normalizer": "sparsemax"},
        {"mask": Local(jnp.asarray([1, 2]), 0)},
        {"mask": Causal() | Local(1, 1)},
    ):
        with pytest.raises(NotImplementedError, match="dense"):
            attn_jax.attention(None, None, value, **arguments, implementation="toeplitz")


def test_segments_that_transforms_cannot_end_are_left_to_others():
    labels = np.repeat([0, 1], 1000)
    chosen = attn_jax.explain_dispatch(
        None, None, jnp.zeros((1, 2000, 1, 1)), proximity=PowerLaw(1.0), mask=Segments(labels)
    )
    assert "segments" in chosen.passed_over["toeplitz"]


CHANGES = {
    "width": lambda x: {"proximity": Gaussian(x)},
    "widths": lambda x: {"proximity": Gaussian(jnp.stack([x, 2 * x]), x)},
    "length": lambda x: {"proximity": Exponential(x), "mask": Causal()},
    "radius": lambda x: {"proximity": Window(x)},
    "radius of a triangle": lambda x: {"proximity": Triangular(x)},
    "exponent": lambda x: {"proximity": PowerLaw(x)},
    "lengths": lambda x: {"proximity": Gaussian(2.0), "mask": Lengths(key=jnp.stack([x, 9 * x]))},
    "window": lambda x: {"mask": Local(x, 0)},
    "segments": lambda x: {
        "proximity": Gaussian(2.0),
        "mask": Segments((jnp.arange(300) > x).astype(jnp.int32)),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changed_numbers_trace_nothing_again_and_are_right(change):
    """Numbers that take different methods."""
    value, count = values(keys=300, key_heads=2), 0

    @quick_jit
    def output(number):
        nonlocal count
        count += 1
        return attn_jax.attention(
            None, None, value, **CHANGES[change](number), implementation="toeplitz"
        )

    for number in (1.5, 6.0, 33.0, 500.0):
        number = jnp.asarray(number)
        expected = attend(None, None, value, **CHANGES[change](number), implementation="dense")
        np.testing.assert_allclose(output(number), expected, atol=1e-5)
    assert count == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", ["width", "radius", "lengths"])
def test_vmapped_numbers_run_one_method_that_fits_all(change):
    value = values(keys=300, key_heads=2)

    def lane(number):
        return attn_jax.attention(
            None, None, value, **CHANGES[change](number), implementation="toeplitz"
        )

    numbers = jnp.asarray([1.5, 6.0, 33.0])
    together = quick_jit(jax.vmap(lane))(numbers)
    for number, got in zip(numbers, together, strict=True):
        expected = attend(None, None, value, **CHANGES[change](number), implementation="dense")
        np.testing.assert_allclose(got, expected, atol=1e-5)
    # A branch for each lane would show as a selection between all branches.
    jaxpr = str(jax.make_jaxpr(jax.vmap(lane))(numbers))
    assert "branches" in jaxpr
