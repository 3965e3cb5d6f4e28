"""A choice among linear functions: as `lax.switch`, in every mode, without its residuals."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
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


@pytest.mark.slow
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


@pytest.mark.parametrize("lanes", [False, True])
def test_a_backward_pass_keeps_what_is_fixed_and_nothing_else(lanes):
    """A `switch` would hand sin(a) and (a b)^2 from one to the other, and so would its lanes."""
    fixed, moved = _arrays()
    index = jnp.asarray(0)

    def function(fixed, moved):
        return linear_switch(index, FUNCTIONS, fixed, moved)["y"]

    if lanes:
        fixed, moved = jax.tree.map(lambda z: jnp.stack([z, 2 * z]), (fixed, moved))
        function = jax.vmap(function)
    _, pull = jax.vjp(lambda moved: function(fixed, moved), moved)
    kept = [z.shape for z in jax.tree.leaves(pull) if getattr(z, "size", 0) > 1]
    assert sorted(kept) == sorted(z.shape for z in fixed.values() if z.size > 1)


def test_lanes_that_choose_alike_differentiate_as_one():
    fixed, moved = _arrays()
    lanes = jax.tree.map(lambda z: jnp.stack([z, 2 * z, 3 * z]), moved)

    def loss(fixed, moved):
        return jnp.cos(jax.vmap(_chosen(1), (None, 0))(fixed, moved)["y"]).sum()

    def plain(fixed, moved):
        return sum(
            jnp.cos(FUNCTIONS[1](fixed, jax.tree.map(lambda z, i=i: z[i], moved))["y"]).sum()
            for i in range(3)
        )

    got, expected = (jax.grad(f, (0, 1))(fixed, lanes) for f in (loss, plain))
    jax.tree.map(np.testing.assert_allclose, got, expected)


def test_an_eager_call_of_new_functions_compiles_nothing(caplog):
    """As each call of `attention` makes them."""
    fixed, moved = _arrays()

    def call(wrap=lambda f: f):
        functions = [lambda fixed, moved, f=f: f(fixed, moved) for f in FUNCTIONS]
        wrap(lambda index: linear_switch(index, functions, fixed, moved))(jnp.asarray(1))

    def compiled(*wrap):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            call(*wrap)
        return [message for message in caplog.messages if "XLA compilation" in message]

    call()
    assert not compiled()
    assert compiled(jax.jit), "messages of compiling have changed"


def test_export_and_shard_map():
    fixed, moved = _arrays()
    function = jax.jit(jax.grad(lambda moved: jnp.sin(_chosen(1)(fixed, moved)["y"]).sum()))
    expected = function(moved)
    exported = jax.export.export(function)(moved)
    jax.tree.map(np.testing.assert_array_equal, exported.call(moved), expected)
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")
    sharded = jax.shard_map(_chosen(1), mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
    got = jax.jit(jax.grad(lambda moved: jnp.sin(sharded(fixed, moved)["y"]).sum()))(moved)
    jax.tree.map(np.testing.assert_allclose, got, expected)
