"""JAX's transformations: each gives what plain calls give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import attn_jax
from attn_jax import Causal, Gaussian, Lengths, Window
from tests.ops.arrays import qkv, values
from tests.ops.implementations import attend, every, with_content

LANES = 3


def attention(implementation):
    return functools.partial(
        attn_jax.attention,
        mask=Causal(),
        proximity=Gaussian(2.0),
        implementation=implementation,
    )


def loss(implementation):
    return lambda *qkv: jnp.sin(attention(implementation)(*qkv)).sum()


def lanes(**sizes):
    """Query, key and value of several lanes, stacked in front."""
    several = [qkv(seed, **sizes) for seed in range(LANES)]
    return tuple(jnp.stack(arrays) for arrays in zip(*several, strict=True))


def assert_close(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-6), got, expected)


@with_content
def test_jit_gives_the_same(implementation):
    function = attention(implementation)
    assert_close(jax.jit(function)(*qkv()), function(*qkv()))


@every
def test_jit_gives_the_same_without_content(implementation):
    function = functools.partial(
        attn_jax.attention, None, None, proximity=Window(2), implementation=implementation
    )
    assert_close(jax.jit(function)(values()), function(values()))


@with_content
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0)])
def test_vmap_over_any_arguments(implementation, in_axes):
    stacked = lanes()
    arguments = [x if axis == 0 else x[0] for x, axis in zip(stacked, in_axes, strict=True)]
    got = jax.jit(jax.vmap(attention(implementation), in_axes))(*arguments)
    lane = jax.jit(attention(implementation))
    for n in range(LANES):
        expected = lane(
            *(x[n] if axis == 0 else x[0] for x, axis in zip(stacked, in_axes, strict=True))
        )
        assert_close(got[n], expected)


@with_content
def test_vmap_over_an_inner_and_the_last_axis(implementation):
    query, key, value = lanes()
    moved = jnp.moveaxis(query, 0, 2), jnp.moveaxis(key, 0, -1), jnp.moveaxis(value, 0, 1)
    got = jax.jit(jax.vmap(attention(implementation), (2, -1, 1), out_axes=1))(*moved)
    expected = jax.jit(jax.vmap(attention(implementation)))(query, key, value)
    assert_close(jnp.moveaxis(got, 1, 0), expected)


@with_content
def test_vmap_over_masks_kernels_and_positions(implementation):
    query, key, value = qkv()
    widths, lengths, offsets = jnp.asarray([1.0, 3.0]), jnp.asarray([[9, 2], [4, 5]]), [0, 3]

    def lane(width, length, offset):
        return attn_jax.attention(
            query,
            key,
            value,
            proximity=Gaussian(width),
            mask=Lengths(key=length),
            query_positions=offset,
            implementation=implementation,
        )

    got = jax.jit(jax.vmap(lane))(widths, lengths, jnp.asarray(offsets))
    for n in range(2):
        assert_close(got[n], jax.jit(lane)(widths[n], lengths[n], jnp.asarray(offsets[n])))


@every
def test_vmap_over_lengths_without_content(implementation):
    """A lane that needs another path than its neighbours."""
    value, lengths = values(), jnp.asarray([[9, 2], [0, 5]])

    def lane(length):
        return attn_jax.attention(
            None,
            None,
            value,
            proximity=Gaussian(1.0, reach=6),
            mask=Lengths(key=length),
            implementation=implementation,
        )

    got = jax.jit(jax.vmap(lane))(lengths)
    for n in range(2):
        assert_close(got[n], jax.jit(lane)(lengths[n]))


@with_content
def test_vmap_of_grad(implementation):
    gradient = jax.grad(loss(implementation), (0, 1, 2))
    got, lane = jax.jit(jax.vmap(gradient))(*lanes()), jax.jit(gradient)
    for n in range(LANES):
        assert_close([g[n] for g in got], list(lane(*qkv(n))))


@with_content
def test_remat_gives_the_same_gradients(implementation):
    gradient = jax.jit(jax.grad(loss(implementation), (0, 1, 2)))
    again = jax.jit(jax.grad(jax.checkpoint(loss(implementation)), (0, 1, 2)))
    assert_close(again(*qkv()), gradient(*qkv()))


@with_content
def test_scan_over_layers_and_its_gradient(implementation):
    """Three layers that mix the sequence with itself."""
    x = values(keys=6, key_heads=2, value_width=4)
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def layer(x, scale):
        return x + attention(implementation)(scale * x, x, x), None

    def scanned(x, scales):
        return jnp.sin(jax.lax.scan(layer, x, scales)[0]).sum()

    def unrolled(x, scales):
        for n in range(3):
            x, _ = layer(x, scales[n])
        return jnp.sin(x).sum()

    got = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x, scales)
    expected = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(x, scales)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


@with_content
def test_shard_map_over_the_batch(implementation):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("batch",))
    spec = PartitionSpec("batch")
    sharded = jax.shard_map(
        attention(implementation), mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec
    )
    gradient = jax.grad(lambda *arrays: jnp.sin(sharded(*arrays)).sum(), (0, 1, 2))
    assert_close(jax.jit(sharded)(*qkv()), attend(*qkv(), mask=Causal(), proximity=Gaussian(2.0)))
    expected = jax.grad(loss(implementation), (0, 1, 2))
    assert_close(jax.jit(gradient)(*qkv()), jax.jit(expected)(*qkv()))


@with_content
def test_export(implementation):
    function = jax.jit(attention(implementation))
    exported = jax.export.export(function)(*qkv())
    assert_close(exported.call(*qkv()), function(*qkv()))


@every
def test_export_without_content(implementation):
    function = jax.jit(
        functools.partial(
            attn_jax.attention, None, None, proximity=Window(2), implementation=implementation
        )
    )
    exported = jax.export.export(function)(values())
    assert_close(exported.call(values()), function(values()))


@with_content
def test_a_donated_query_becomes_the_output(implementation):
    query, key, value = qkv(queries=9, heads=2, value_width=8)
    expected = attend(query, key, value, mask=Causal(), proximity=Gaussian(2.0))
    got = jax.jit(attention(implementation), donate_argnums=0)(query, key, value)
    assert query.is_deleted()
    assert_close(got, expected)


@with_content
def test_repeated_runs_are_bit_identical(implementation):
    function = jax.jit(jax.value_and_grad(loss(implementation), (0, 1, 2)))
    jax.tree.map(np.testing.assert_array_equal, function(*qkv()), function(*qkv()))


# Nothing is traced again when numbers change


def traces(function, *arguments):
    """How often a function is traced when it is called with each of some arguments."""
    count = 0

    def counted(argument):
        nonlocal count
        count += 1
        return function(argument)

    compiled = jax.jit(counted)
    for argument in arguments:
        compiled(argument)
    return count


CHANGES = {
    "width": lambda x: {"proximity": Gaussian(x)},
    "offset of a kernel": lambda x: {"proximity": Gaussian(2.0, x)},
    "kernel": lambda x: {"proximity": attn_jax.Exponential(x, reach=3)},
    "lengths": lambda x: {"mask": Lengths(key=x)},
    "window": lambda x: {"mask": attn_jax.Local(x, 0)},
    "query positions": lambda x: {"query_positions": x},
    "scale": lambda x: {"scale": x},
}


@with_content
@pytest.mark.parametrize("change", CHANGES)
def test_changed_numbers_trace_nothing_again(implementation, change):
    def output(number):
        arguments = CHANGES[change](number)
        return attn_jax.attention(*qkv(), **arguments, implementation=implementation)

    assert traces(output, jnp.asarray(1.0), jnp.asarray(4.0)) == 1


def test_rules_and_masks_as_arguments_trace_nothing_again():
    def output(rule):
        kernel, mask = rule
        return attn_jax.attention(*qkv(), proximity=kernel, mask=mask)

    def rule(x):
        return Gaussian(jnp.asarray(x)), Causal() & Lengths(key=jnp.asarray([int(x), 9]))

    assert traces(output, rule(2.0), rule(5.0)) == 1
    assert traces(output, rule(2.0), (Gaussian(2.0), Causal())) == 2
