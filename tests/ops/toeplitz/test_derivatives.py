"""Derivatives of `toeplitz` by values and kernel parameters, held to those of `dense`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

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
from tests.ops.arrays import values
from tests.ops.implementations import quick_jit

KEYS = 150
PACKED = np.sort(np.random.default_rng(3).integers(0, 4, KEYS))
# A kernel's class, its parameters, and the other arguments.
CALLS = {
    "Gaussian narrow": (Gaussian, (1.2,), {}),
    "Gaussian by blocks": (Gaussian, (8.5, -0.7), {}),
    "Gaussian wide": (Gaussian, (60.0, 3.0), {}),
    "Gaussian per head": (Gaussian, ([8.2, 9.0], [-1.0, 1.0]), {}),
    "Gaussian lengths": (Gaussian, (2.0, 0.4), {"mask": Lengths(key=np.asarray([60, 150]))}),
    "Gaussian segments": (Gaussian, (2.0, 0.4), {"mask": Segments(PACKED)}),
    "Gaussian within data": (
        Gaussian,
        (2.0, 0.4),
        lambda: {"mask": Local(*jnp.asarray([4, 3]))},
    ),
    "Gaussian causal softmax_one": (
        Gaussian,
        (20.0, -0.7),
        {"normalizer": "softmax_one", "mask": Causal()},
    ),
    "Exponential": (Exponential, ([3.0, 40.0],), {}),
    "Exponential segments": (Exponential, (9.0,), {"mask": Segments(PACKED)}),
    "Triangular": (Triangular, (60.5,), {}),
    "Epanechnikov": (Epanechnikov, (60.5,), {"normalizer": "sigmoid"}),
    "PowerLaw causal": (PowerLaw, ([0.5, 1.5],), {"mask": Causal()}),
    "Table": (Table, ([0.3, 1.0, -0.5],), {"normalizer": "linear"}),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def attention(name, implementation, log_normalizer=False):
    """A function of the kernel's parameters and the values, and its arguments."""
    kernel, parameters, arguments = CALLS[name]
    arguments = arguments() if callable(arguments) else arguments
    value = values(keys=KEYS, key_heads=2, value_width=2, dtype=np.float64)

    def output(parameters, value):
        return attn_jax.attention(
            None,
            None,
            value,
            proximity=kernel(*parameters),
            **arguments,
            return_log_normalizer=log_normalizer,
            implementation=implementation,
        )

    return output, (tuple(jnp.asarray(p) for p in parameters), value)


def loss(name, implementation):
    output, arguments = attention(name, implementation)
    weights = values(1, keys=KEYS, key_heads=2, value_width=2, dtype=np.float64)
    return lambda *some: (jnp.sin(output(*some)) * weights).sum(), arguments


def assert_close(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9), got, expected)


# Not those whose gradients other tests ask for.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"Gaussian narrow", "Gaussian lengths"}))
def test_gradients_are_those_of_dense(name):
    """Reverse mode, and forward mode along one direction."""

    def derivatives(implementation):
        function, arguments = loss(name, implementation)
        tangents = jax.tree.map(lambda x: jnp.cos(7 * x), arguments)

        def both(*arguments):
            pushed = jax.jvp(function, arguments, tangents)
            return pushed, jax.grad(function, (0, 1))(*arguments)

        return quick_jit(both)(*arguments)

    assert_close(derivatives("toeplitz"), derivatives("dense"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Gaussian by blocks",
        "Gaussian segments",
        "Gaussian within data",
        "Exponential",
        "PowerLaw causal",
    ],
)
def test_second_derivatives_are_those_of_dense(name):
    """A Hessian-vector product, forward over reverse and reverse over reverse."""

    def products(implementation):
        function, arguments = loss(name, implementation)
        direction = jax.tree.map(lambda x: jnp.cos(7 * x), arguments)
        gradient = jax.grad(function, (0, 1))

        def along(*arguments):
            pairs = zip(
                jax.tree.leaves(gradient(*arguments)), jax.tree.leaves(direction), strict=True
            )
            return sum((g * d).sum() for g, d in pairs)

        def forward(*arguments):
            return jax.jvp(gradient, arguments, direction)[1]

        # All methods of a Gaussian take long to compile twice over.
        twice = forward if name.startswith("Gaussian") else jax.grad(along, (0, 1))
        return [quick_jit(function)(*arguments) for function in dict.fromkeys((forward, twice))]

    for product in products("toeplitz"):
        assert_close(product, products("dense")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gaussian by blocks", "Gaussian lengths", "Exponential"])
def test_gradients_of_the_log_normalizer(name):
    def gradient(implementation):
        output, arguments = attention(name, implementation, log_normalizer=True)

        def total(*arguments):
            log = output(*arguments)[1]
            return jnp.where(jnp.isfinite(log), jnp.sin(log), 0).sum()

        return quick_jit(jax.grad(total))(*arguments)

    assert_close(gradient("toeplitz"), gradient("dense"))


def test_gradients_through_a_kernel_of_a_users_own():
    """It closes over what is differentiated."""

    def total(center, implementation):
        class Bump(attn_jax.Proximity):
            def log_weight(self, r):
                return -(jnp.abs(r - center) ** 1.5) / 40

        output = attn_jax.attention(
            None, None, value, proximity=Bump(), implementation=implementation
        )
        return jnp.sin(output).sum()

    value = values(keys=KEYS, dtype=np.float64)
    gradient = quick_jit(jax.grad(total), static_argnums=1)
    assert_close(gradient(0.4, "toeplitz"), gradient(0.4, "dense"))


@pytest.mark.slow
def test_a_vmapped_gradient_is_that_of_each_lane():
    """Widths that take different methods one by one, and so a common one."""
    function, (_, value) = loss("Gaussian narrow", "toeplitz")
    widths = jnp.asarray([1.0, 5.0, 30.0])
    gradient = jax.grad(lambda width: function((width,), value))
    together, one = quick_jit(jax.vmap(gradient))(widths), quick_jit(gradient)
    assert_close(together, jnp.stack([one(width) for width in widths]))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Gaussian, Exponential])
def test_a_gradient_over_lanes_of_one_sequence_each(kernel):
    """As of examples under `vmap`, whose kernel is one for all."""
    value = values(batch=3, keys=KEYS, key_heads=1, dtype=np.float64)

    def total(parameter, implementation):
        def of_one(value):
            return attn_jax.attention(
                None,
                None,
                value[None],
                proximity=kernel(parameter),
                implementation=implementation,
            )

        return jnp.sin(jax.vmap(of_one)(value)).sum()

    gradient = quick_jit(jax.grad(total), static_argnums=1)
    assert_close(gradient(8.0, "toeplitz"), gradient(8.0, "dense"))


@pytest.mark.slow
def test_gradients_at_extremes_are_finite():
    value = values(keys=KEYS, dtype=np.float64)

    def total(kernel):
        output = attn_jax.attention(None, None, value, proximity=kernel, implementation="toeplitz")
        return jnp.sin(output).sum()

    extremes = {Gaussian: (1e-12, 1e12), Exponential: (1e-12, 1e12)}
    extremes |= {PowerLaw: (0.0,), Triangular: (1.0,)}
    for kernel, parameters in extremes.items():
        gradient = quick_jit(jax.grad(lambda x, kernel=kernel: total(kernel(x))))
        assert np.all(np.isfinite([gradient(x) for x in parameters]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1e-12, 1e-15, 1e-18])
def test_the_gradient_of_a_width_that_keeps_each_place_is_zero(width):
    """In float32 the slope of log-weights overflows there."""
    value = values(keys=KEYS)

    def total(width):
        output = attn_jax.attention(
            None,
            None,
            value,
            proximity=Gaussian(width),
            mask=Local(3, 3),
            implementation="toeplitz",
        )
        return jnp.sin(output).sum()

    assert quick_jit(jax.grad(total))(jnp.float32(width)) == 0


SHARDED = {
    "Gaussian segments": (Gaussian, lambda labels: {"mask": Segments(labels)}),
    "Gaussian lengths": (Gaussian, lambda labels: {"mask": Lengths(key=130 + labels[:, 0])}),
    "Window segments": (Window, lambda labels: {"mask": Segments(labels)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_gradients_where_masks_are_sharded(name):
    """Some methods vary over the devices then, and others don't."""
    kernel, arguments = SHARDED[name]
    value = values(2, keys=KEYS, dtype=np.float64)
    labels = jnp.asarray(np.stack([PACKED] * len(value)))

    def output(value, labels, width):
        return attn_jax.attention(
            None,
            None,
            value,
            proximity=kernel(width),
            **arguments(labels),
            implementation="toeplitz",
        )

    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")
    specs = {"in_specs": (spec, spec, PartitionSpec()), "out_specs": spec}
    sharded = jax.shard_map(output, mesh=mesh, **specs)
    got, expected = (
        quick_jit(jax.grad(lambda value, width, f=f: jnp.sin(f(value, labels, width)).sum(), 0))(
            value, jnp.asarray(9.0)
        )
        for f in (sharded, output)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [Gaussian, Exponential, Window])
def test_gradients_where_the_width_is_sharded(kernel):
    """Together with the values, and alone."""
    value = values(1, keys=KEYS, dtype=np.float64)

    def output(value, width):
        return attn_jax.attention(
            None, None, value, proximity=kernel(width), implementation="toeplitz"
        )

    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("lanes",)), PartitionSpec("lanes")
    width = jnp.asarray([9.0])
    for of_value in (spec, PartitionSpec()):
        sharded = jax.shard_map(output, mesh=mesh, in_specs=(of_value, spec), out_specs=spec)
        got, expected = (
            quick_jit(jax.grad(lambda value, f=f: jnp.sin(f(value, width)).sum()))(value)
            for f in (sharded, output)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_in_labels_alone_are_zero():
    value = values(keys=40)

    def loss(shift):
        mask = Segments(jnp.floor(jnp.arange(40) / 10)[None] + shift)
        output = attn_jax.attention(None, None, value, mask=mask, implementation="toeplitz")
        return output.sum()

    assert quick_jit(jax.grad(loss))(20.0) == 0
