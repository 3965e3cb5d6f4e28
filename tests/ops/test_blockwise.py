"""Blockwise attention over several blocks of queries and keys, held to the dense reference."""

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
    Prefix,
    Segments,
    Table,
    Window,
    t5_bucket,
)
from attn_jax.ops.blockwise import partition
from tests.ops.arrays import qkv
from tests.ops.implementations import attend, quick_jit

# Blocks of 8 x 8 pairs, so that a few dozen queries and keys fill several.
QUERIES, KEYS = 21, 30
SHAPE = {"queries": QUERIES, "keys": KEYS, "key_width": 4, "value_width": 3}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(partition, "_SIDE", 8)
    monkeypatch.setattr(partition, "_ENTRIES", 128)
    monkeypatch.setattr(partition, "_BAND_SIDES", ((3, 2), (12, 4)))
    monkeypatch.setattr(partition, "_BAND_ROWS", 32)


def random(*shape, seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def segments(length):
    return jnp.asarray(np.stack([np.arange(length) // 7, np.arange(length) // 11]))


LENGTHS = jnp.asarray([30, 12])
# Each holds several features that meet in no other.
CASES = {
    "causal": {"mask": Causal()},
    "local, dropout": {
        "mask": Local(2, 1),
        "dropout_rate": 0.4,
        "dropout_key": jax.random.key(3),
    },
    "prefix, bias of keys": {
        "mask": Causal() | Prefix(13),
        "bias": random(2, 4, 1, KEYS),
    },
    "causal and lengths, no key for some, softmax_one": {
        "mask": Causal() & Lengths(query=jnp.asarray([21, 5]), key=LENGTHS),
        "query_positions": -9,
        "normalizer": "softmax_one",
    },
    "segments, sigmoid": {
        "mask": Segments(segments(QUERIES), segments(KEYS)),
        "normalizer": "sigmoid",
    },
    "local of data, linear": {
        "mask": Local(jnp.asarray([1, 20]), 2),
        "normalizer": "linear",
    },
    "pairs, full bias": {
        "mask": random(2, 4, QUERIES, KEYS) > 1,
        "bias": random(2, 4, QUERIES, KEYS),
    },
    "kernel a head": {"proximity": Gaussian(jnp.asarray([1.0, 2.0, 4.0, 8.0]), -2.0)},
    "kernel that ends, bias of queries, scale a head": {
        "proximity": Window(2),
        "bias": random(1, 4, QUERIES, 1),
        "scale": jnp.asarray([0.1, 0.5, 1.0, 2.0]),
    },
    "reach, offset of the program": {
        "proximity": PowerLaw(1.0, reach=3),
        "mask": Causal(),
        "query_positions": jnp.asarray(9),
    },
    "table": {"proximity": Table(random(4, 11), bucket=t5_bucket(10, 20))},
    "any positions": {
        "proximity": Exponential(jnp.asarray([1.0, 2.0, 4.0, 8.0])),
        "mask": Causal(),
        "query_positions": random(2, QUERIES) * 10,
        "key_positions": random(KEYS, seed=6) * 10,
    },
    "none": {"normalizer": "none", "proximity": Gaussian(3.0), "scale": 0.1},
    "score that hides": {
        "score": lambda z, i, j, n: jnp.where(
            i < 9, -jnp.inf, jnp.tanh(z) * (1 + n) + jnp.sin(i - 2.0 * j)
        )
    },
    "first blocks hidden": {"mask": (np.arange(KEYS) > 20).reshape(1, 1, 1, KEYS)},
}


def compiled_derivatives(implementation, arguments, arrays, tangents, with_log=True):
    """Output (and log-normaliser), their tangents and the cotangents of query, key, value."""
    with_log &= arguments.get("normalizer", "softmax") in ("softmax", "softmax_one")

    def output(*arrays):
        result = attn_jax.attention(
            *arrays, **arguments, return_log_normalizer=with_log, implementation=implementation
        )
        return result if with_log else (result,)

    @quick_jit
    def derivatives(arrays, tangents):
        results, pull = jax.vjp(output, *arrays)
        pushed = jax.jvp(output, arrays, tangents)[1]
        finite = [jnp.where(jnp.isfinite(x), jnp.cos(jnp.nan_to_num(x)), 0) for x in results]
        return results, pushed, pull(tuple(finite))

    return derivatives(arrays, tangents)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_those_of_dense(case):
    arrays, tangents = qkv(0, **SHAPE), qkv(1, **SHAPE)
    got, expected = (
        compiled_derivatives(name, CASES[case], arrays, tangents) for name in ("blockwise", "dense")
    )
    # sums of 30 products of order one, in another order
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


BANDS = {
    "local": {"mask": Local(2, 1)},
    "local and lengths, no key for some": {
        "mask": Local(1, 2) & Lengths(query=jnp.asarray([21, 5]), key=LENGTHS)
    },
    "local, kernel a head, softmax_one": {
        "mask": Local(3, 0),
        "proximity": Gaussian(jnp.asarray([1.0, 2.0, 4.0, 8.0])),
        "normalizer": "softmax_one",
    },
    "local of other positions": {"mask": Local(1, 1), "query_positions": 9},
    "kernel that ends": {"proximity": Window(2), "bias": random(1, 4, QUERIES, 1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("case", BANDS)
def test_rows_along_a_band_are_those_of_dense(case, key_heads):
    """Without a log-normaliser: rows together, whose derivatives are of each row alone."""
    shape = SHAPE | {"key_heads": key_heads}
    arrays, tangents = qkv(0, **shape), qkv(1, **shape)
    got, expected = (
        compiled_derivatives(name, BANDS[case], arrays, tangents, with_log=False)
        for name in ("blockwise", "dense")
    )
    # sums of at most 6 products of order one, in another order
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_queries_far_behind_the_last_key_have_none_within_a_kernels_reach():
    arrays = qkv(0, batch=1, queries=90, keys=30)
    got, expected = (
        attend(*arrays, proximity=Window(2), implementation=name) for name in ("blockwise", "dense")
    )
    assert not np.any(expected[:, 40:])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_what_overflows_behind_a_mask_reaches_no_row_along_a_band():
    """Their products are inf - inf, which no arithmetic hides."""
    query, key, value = qkv(0, **SHAPE)
    hidden = jnp.arange(KEYS).reshape(1, -1, 1, 1) >= 12
    key = jnp.where(hidden, jnp.asarray([3e38, -3e38, 3e38, -3e38]), key)
    mask = Local(2, 2) & Lengths(query=jnp.asarray([21, 21]), key=jnp.asarray([12, 12]))

    def derivatives(implementation):
        def loss(*arrays):
            output = attn_jax.attention(*arrays, mask=mask, implementation=implementation)
            return jnp.sin(output).sum()

        return quick_jit(jax.value_and_grad(loss, (0, 1, 2)))(4 * query, key, value)

    got, expected = map(derivatives, ("blockwise", "dense"))
    assert np.isfinite(got[0])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["local, dropout", "kernel a head", "kernel that ends"])
def test_second_derivatives_are_those_of_dense(case):
    """Forward over reverse and reverse over reverse."""
    arrays, tangents = qkv(0, **SHAPE), qkv(1, **SHAPE)

    def second(implementation):
        def loss(*arrays):
            arguments = (CASES | BANDS)[case]
            output = attn_jax.attention(*arrays, **arguments, implementation=implementation)
            return jnp.sin(output).sum()

        gradient = jax.grad(loss, (0, 1, 2))

        def along(*arrays):
            return sum(jnp.vdot(g, t) for g, t in zip(gradient(*arrays), tangents, strict=True))

        return quick_jit(
            lambda *arrays: (jax.jvp(gradient, arrays, tangents)[1], jax.grad(along)(*arrays))
        )(*arrays)

    for got, expected in zip(
        *map(jax.tree.leaves, map(second, ("blockwise", "dense"))), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


PARAMETERS = {
    "width": lambda x: {"proximity": Gaussian(1 + x**2)},
    "length": lambda x: {"proximity": Exponential(1 + x**2), "mask": Causal()},
    "table": lambda x: {"proximity": Table(x[:, None] * jnp.arange(9.0)[None])},
    "any positions": lambda x: {"proximity": Gaussian(1 + x**2), "key_positions": jnp.arange(30.0)},
    "positions": lambda x: {"proximity": Gaussian(3.0), "query_positions": x[0] + jnp.arange(21.0)},
    "bias": lambda x: {
        "bias": x.reshape(1, 4, 1, 1) * jnp.sin(jnp.arange(30.0)).reshape(1, 1, 1, 30)
    },
    "scale": lambda x: {"scale": x},
    "what score closes over": lambda x: {"score": lambda z, i, j, n: z * x[n] + x[0] * (i - j)},
}


@pytest.mark.slow
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_gradients_reach_every_parameter(parameter):
    arrays, x = qkv(0, **SHAPE), jnp.asarray([0.3, 0.5, 1.0, 1.5])

    def gradient(implementation):
        def loss(x):
            arguments = PARAMETERS[parameter](x)
            output = attn_jax.attention(*arrays, **arguments, implementation=implementation)
            return jnp.sin(3 * output).sum()

        return quick_jit(jax.grad(loss))(x)

    got, expected = map(gradient, ("blockwise", "dense"))
    assert np.any(expected)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "computed"),
    [
        (None, 3 * 4),
        # rows of 8 queries see 1, 2 and 3 blocks of 8 keys; four heads in chunks of one
        (Causal(), 1 + 2 + 3),
        # keys -10 to 10, -2 to 18 and 6 to 26
        (Local(10, 3), 2 + 3 + 4),
        (Lengths(key=jnp.asarray([9])), 3 * 2),
        (Segments(jnp.zeros((1, 24), int), jnp.asarray(np.arange(32)[None] // 20)), 3 * 3),
    ],
    ids=["none", "causal", "local", "lengths", "segments"],
)
def test_blocks_that_a_mask_excludes_are_not_computed(mask, computed):
    assert _visits(mask=mask) == computed


def test_blocks_beyond_a_kernels_reach_are_not_computed():
    """Keys -10 to 17, -2 to 25 and 6 to 33."""
    assert _visits(proximity=Window(10.0)) == 3 + 4 + 4


def _visits(**arguments):
    visits = []

    def score(logits, *indices):
        del indices
        jax.debug.callback(lambda: visits.append(1))
        return logits

    arrays = qkv(batch=1, queries=24, keys=32, heads=1, key_heads=1)
    output = attn_jax.attention(*arrays, **arguments, score=score, implementation="blockwise")
    jax.block_until_ready(output)
    jax.effects_barrier()
    return len(visits)


def test_a_bands_cost_is_that_of_its_width():
    """Rows see one block each, of their own queries and the band."""
    arrays = qkv(batch=1, queries=64, keys=64)
    dispatch = attn_jax.explain_dispatch(*arrays, mask=Local(2, 1), implementation="blockwise")
    assert "blocks of 4 queries and 7 keys" in str(dispatch)
    assert "along a band" in str(dispatch)


@pytest.mark.parametrize("derivative", ["value", "gradient", "Hessian-vector product"])
def test_memory_grows_with_the_length_not_with_its_square(derivative, monkeypatch):
    monkeypatch.setattr(partition, "_SIDE", 64)
    monkeypatch.setattr(partition, "_ENTRIES", 64 * 64)

    def loss(*arrays):
        return jnp.square(attn_jax.attention(*arrays, implementation="blockwise")).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    function = {
        "value": loss,
        "gradient": gradient,
        "Hessian-vector product": lambda *arrays: jax.jvp(gradient, arrays, arrays)[1],
    }[derivative]

    def temporary(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
        return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    # half of a square's factor of 4 would be 4 / 2; a line's factor is 2
    assert temporary(2048) < 2.5 * temporary(1024)


def test_explain_dispatch_tells_the_blocks():
    arrays = qkv(batch=1, queries=600, keys=600)
    dispatch = attn_jax.explain_dispatch(*arrays)
    assert dispatch.chosen == "blockwise"
    assert "blocks of" in str(dispatch)
