"""A choice among linear functions: as `lax.switch`, in every mode, without its residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from attn_jax.ops.toeplitz.linear import linear_switch

FUNCTIONS = [
    lambda fixed, moved: {"y": jnp.sin(fixed["a"]) * moved[0] + moved[1]},
    lambda fixed, moved: {"y": (fixed["a"] * fixed["b"]) ** 2 * moved[0]},
]
FIXED = {"a": np.linspace(0.3, 1.1, 4), "b": np.asarray(0.7)}
MOVED = [np.linspace(-1.0, 2.0, 4), np.linspace(0.5, 0.2, 4)]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _arrays():
    return jax.tree.map(jnp.asarray, (FIXED, MOVED))


def _chosen(index):
    return lambda fixed, moved: linear_switch(jnp.asarray(index), FUNCTIONS, fixed, moved)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_values_and_derivatives_of_both_orders(index, wrap):
    """In what is fixed, in what moves, and in both at once."""
    fixed, moved = _arrays()
    function = wrap(_chosen(index))
    np.testing.assert_allclose(function(fixed, moved)["y"], FUNCTIONS[index](fixed, moved)["y"])
    check_grads(function, (fixed, moved), 2, rtol=1e-6)
    check_grads(lambda fixed: function(fixed, moved), (fixed,), 1, rtol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_its_transpose_is_exact(index):
    fixed, moved = _arrays()
    cotangent = {"y": jnp.arange(4.0)}
    got, expected = (
        jax.linear_transpose(lambda m, f=f: f(fixed, m), moved)(cotangent)
        for f in (_chosen(index), FUNCTIONS[index])
    )
    jax.tree.map(np.testing.assert_allclose, got, expected)


def test_lanes_may_choose_differently():
    fixed, moved = _arrays()
    index = jnp.asarray([0, 1, 0])
    lanes = jax.tree.map(lambda z: jnp.stack([z, 2 * z, 3 * z]), moved)

    def loss(index, moved):
        return jnp.cos(linear_switch(index, FUNCTIONS, fixed, moved)["y"]).sum()

    def plain(index, moved):
        return jnp.cos(lax.switch(index, FUNCTIONS, fixed, moved)["y"]).sum()

    got, expected = (jax.jit(jax.vmap(jax.grad(f, 1)))(index, lanes) for f in (loss, plain))
    jax.tree.map(np.testing.assert_allclose, got, expected)


def test_a_backward_pass_keeps_what_is_fixed_and_nothing_else():
    """A `switch` would hand sin(a) and (a b)^2 from one to the other."""
    fixed, moved = _arrays()

    def loss(moved):
        return _chosen(0)(fixed, moved)["y"].sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(moved))
    assert jaxpr.count("attn_jax_linear_switch") >= 1
    assert "cond[" not in jaxpr
