"""The entry points: closed forms, dropout, dispatch, jax.nn's signature, misuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Gaussian, Lengths, PowerLaw, Segments, Window
from tests.ops.arrays import qkv, values
from tests.ops.implementations import WITH_CONTENT, attend, quick_jit, weigh, with_content

DROPOUT_KEY = jax.random.key(7)


# Closed forms


@with_content
def test_zero_queries_and_a_logarithmic_bias_are_the_power_law(implementation):
    query, key, value = qkv(queries=9)
    distance = np.abs(np.arange(9)[None, :] - np.arange(9)[:, None])
    bias = -jnp.log1p(jnp.asarray(distance, jnp.float32))[None, None]
    by_bias = attend(0 * query, key, value, bias=bias, implementation=implementation)
    by_kernel = attend(
        None,
        None,
        jnp.repeat(value, 2, axis=2),
        proximity=PowerLaw(1.0),
        implementation=implementation,
    )
    weights = 1 / (1 + distance)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ts,bsnd->btnd", weights, np.repeat(value, 2, 2))
    np.testing.assert_allclose(by_bias, expected, atol=2e-6)
    np.testing.assert_allclose(by_kernel, expected, atol=2e-6)


def test_content_times_kernel_is_the_product_of_weights_normalised():
    query, key, value = qkv()
    kernel = Gaussian(2.0)
    content = weigh(query, key, value, normalizer="none")
    distance = weigh(
        None,
        None,
        value,
        proximity=kernel,
        normalizer="none",
        query_positions=np.arange(6),
    )
    product = np.asarray(content) * np.repeat(distance, 2, axis=1)
    got = weigh(query, key, value, proximity=kernel)
    np.testing.assert_allclose(got, product / product.sum(-1, keepdims=True), atol=1e-6)


def test_without_content_and_kernel_every_key_counts_alike():
    value = values()
    output = attend(None, None, value)
    np.testing.assert_allclose(
        output, np.broadcast_to(np.mean(value, 1, keepdims=True), value.shape), atol=1e-6
    )


# Without a batch axis


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, Causal(), np.eye(6, 9, dtype=bool)[None]])
def test_unbatched_is_a_batch_of_one(mask):
    arrays = tuple(x[0] for x in qkv())
    rule = {"bias": jnp.ones((4, 1, 9)), "return_log_normalizer": True}
    output, log = attend(*arrays, mask=mask, **rule)
    rule["bias"] = rule["bias"][None]
    batched_mask = mask[None] if isinstance(mask, np.ndarray) else mask
    batched, batched_log = attend(*(x[None] for x in arrays), mask=batched_mask, **rule)
    np.testing.assert_array_equal(output, batched[0])
    np.testing.assert_array_equal(log, batched_log[0])
    weights = weigh(*arrays, mask=mask)
    assert (output.shape, log.shape, weights.shape) == ((6, 4, 5), (6, 4), (4, 6, 9))


# Dropout


def dropped(key, value=None, rate=0.25, **arguments):
    value = jnp.ones((2, 40, 2, 1)) if value is None else value
    return weigh(None, None, value, dropout_rate=rate, dropout_key=key, **arguments)


@pytest.mark.slow
def test_dropout_depends_on_its_key_alone():
    first = dropped(DROPOUT_KEY)
    np.testing.assert_array_equal(first, dropped(DROPOUT_KEY))
    assert np.any(first != dropped(jax.random.key(8)))
    kept = dropped(DROPOUT_KEY, proximity=Gaussian(20.0)) > 0
    np.testing.assert_array_equal(kept, first > 0)


def test_dropout_of_a_pair_does_not_depend_on_how_many_there_are():
    larger = dropped(DROPOUT_KEY, jnp.ones((3, 150, 4, 1))) > 0
    np.testing.assert_array_equal(dropped(DROPOUT_KEY) > 0, larger[:2, :2, :40, :40])


def test_dropout_is_the_same_in_float64():
    first = dropped(DROPOUT_KEY) > 0
    with jax.enable_x64(True):
        np.testing.assert_array_equal(dropped(DROPOUT_KEY, jnp.ones((2, 40, 2, 1))) > 0, first)


def test_dropout_keeps_the_stated_share_and_scales_it_up():
    """150 x 150 weights of 1/150 for four heads: standard error of the share 0.0015."""
    weights = dropped(DROPOUT_KEY, jnp.ones((1, 150, 4, 1)))
    assert np.mean(weights > 0) == pytest.approx(0.75, abs=0.008)
    np.testing.assert_allclose(weights[weights > 0], 1 / 150 / 0.75, rtol=1e-5)


@pytest.mark.slow
@with_content
def test_the_mean_over_dropout_is_the_result_without(implementation):
    """The noise of 100 keys, at most 4.5 standard errors."""
    query, key, value = qkv()

    def lane(dropout_key):
        return attn_jax.attention(
            query,
            key,
            value,
            dropout_rate=0.5,
            dropout_key=dropout_key,
            implementation=implementation,
        )

    several = np.asarray(quick_jit(jax.vmap(lane))(jax.random.split(DROPOUT_KEY, 100)))
    error = np.abs(several.mean(0) - attend(query, key, value))
    assert np.all(error <= 4.5 * several.std(0) / 10)


@pytest.mark.slow
@with_content
def test_dropout_is_the_same_in_every_implementation(implementation):
    query, key, value = qkv(keys=140)
    rule = {"dropout_rate": 0.5, "dropout_key": DROPOUT_KEY, "return_log_normalizer": True}
    output, log = attend(query, key, value, **rule, implementation=implementation)
    rule.pop("return_log_normalizer")
    weights = weigh(query, key, value, **rule)
    expected = np.einsum("bnts,bsnd->btnd", weights, np.repeat(value, 2, 2))
    np.testing.assert_allclose(output, expected, atol=2e-6)
    _, without = attend(query, key, value, return_log_normalizer=True)
    np.testing.assert_allclose(log, without, atol=1e-6)


def test_dropout_without_content_runs_where_it_can():
    value = values()
    rule = {"proximity": Window(2), "dropout_rate": 0.5, "dropout_key": DROPOUT_KEY}
    with pytest.raises(NotImplementedError, match=r"'toeplitz'.*dropout.*implementation='"):
        attn_jax.attention(None, None, value, **rule, implementation="toeplitz")
    expected = np.einsum("bnts,bsnd->btnd", weigh(None, None, value, **rule), value)
    np.testing.assert_allclose(attend(None, None, value, **rule), expected, atol=2e-6)


# Dispatch


def test_dispatch_explains_every_implementation():
    dispatch = attn_jax.explain_dispatch(*qkv(), mask=Causal())
    assert dispatch.chosen in WITH_CONTENT
    assert dispatch.chosen not in dispatch.passed_over
    assert "query and key" in dispatch.passed_over["toeplitz"]
    assert str(dispatch).startswith(f"{dispatch.chosen} runs: {dispatch.plan}.\n")
    assert set(attn_jax.implementations()) <= {dispatch.chosen, *dispatch.passed_over}


def test_a_kernel_over_many_keys_runs_by_its_nature():
    long, short = jnp.zeros((1, 2000, 1, 1)), jnp.zeros((1, 20, 1, 1))

    def chosen(value, **arguments):
        return attn_jax.explain_dispatch(None, None, value, **arguments).chosen

    assert chosen(long, proximity=Gaussian(2.0)) == "toeplitz"
    assert chosen(short, proximity=Gaussian(2.0)) != "toeplitz"
    assert chosen(long, proximity=Gaussian(2000.0)) == "toeplitz"
    assert chosen(long, proximity=Gaussian(jnp.asarray(2.0))) == "toeplitz"
    assert chosen(short, proximity=Gaussian(2.0), implementation="toeplitz") == "toeplitz"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA:CPU's library")
def test_large_products_and_a_softmax_are_one_call_of_the_library():
    """Anything but arithmetic between them, a `where` say, would make several of it."""
    query = jnp.ones((8, 128, 8, 64))
    program = jax.jit(attn_jax.attention).lower(query, query, query).compile().as_text()
    assert program.count("kind=kCustom") == 1
    assert " dot(" not in program.split("ENTRY")[1]


# jax.nn's signature

JAX_NN = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bias": {"bias": np.linspace(-1, 1, 54, dtype=np.float32).reshape(1, 1, 6, 9)},
    "mask": {"mask": np.tri(6, 9, 2, dtype=bool)[None, None]},
    "mask and causal": {"mask": np.arange(9).reshape(1, 1, 1, 9) < 4, "is_causal": True},
    "key lengths": {"key_value_seq_lengths": jnp.asarray([3, 9])},
    "query lengths": {"query_seq_lengths": jnp.asarray([3, 6])},
    "window": {"local_window_size": 2},
    "uneven window": {"local_window_size": (3, 1), "is_causal": True},
}


@pytest.mark.parametrize("name", JAX_NN)
def test_dot_product_attention_is_that_of_jax_nn(name):
    """Where they agree: equal widths, and a key or more for every query that counts."""
    arrays, arguments = qkv(value_width=8), JAX_NN[name]
    got = jax.jit(lambda *qkv: attn_jax.dot_product_attention(*qkv, **arguments))(*arrays)
    if name == "window":
        # jax.nn leaves out a window that comes without a mask (jax issue 32300)
        arguments = {**arguments, "mask": np.ones((1, 1, 6, 9), bool)}
    expected = jax.nn.dot_product_attention(*arrays, **arguments, implementation="xla")
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_dot_product_attention_returns_the_residual():
    query, key, value = qkv()
    output, residual = attn_jax.dot_product_attention(
        query, key, value, implementation="xla", return_residual=True
    )
    logits = np.einsum("btnh,bsnh->btns", query, np.repeat(key, 2, 2)) * 8**-0.5
    np.testing.assert_allclose(residual, np.log(np.exp(logits).sum(-1)), atol=2e-6)
    assert output.shape == (2, 6, 4, 5)


@pytest.mark.slow
def test_dot_product_attention_without_a_batch_axis():
    arrays = tuple(x[0] for x in qkv(value_width=8))
    got = attn_jax.dot_product_attention(*arrays, is_causal=True)
    expected = jax.nn.dot_product_attention(*arrays, is_causal=True)
    np.testing.assert_allclose(got, expected, atol=5e-6)


# Misuse: the rule, what was given, the remedy

MISUSE = {
    "query without key": (lambda q, k, v: ((q, None, v), {}), "both.*got query without key"),
    "no value": (lambda q, k, v: ((q, k, None), {}), "value must be an array.*got None"),
    "integers": (lambda q, k, v: ((q, k, v.astype(int)), {}), "floating; got int32. Cast"),
    "rank": (lambda q, k, v: ((q[0, 0], k, v), {}), r"query must be .*got shape \(4, 8\)"),
    "batch": (lambda q, k, v: ((q[:1], k, v), {}), "share the batch axis; got query"),
    "width": (lambda q, k, v: ((q[..., :3], k, v), {}), "share the width H.*got query"),
    "keys": (lambda q, k, v: ((q, k, v[:, 1:]), {}), "key and value must share.*got query"),
    "heads": (lambda q, k, v: ((q[:, :, :3], k, v), {}), "multiple.*got 3 query heads and 2"),
    "bias of booleans": (
        lambda q, k, v: ((q, k, v), {"bias": np.ones((1, 1, 6, 9), bool)}),
        "bias must be floating; got bool.*mask=",
    ),
    "bias of rank 2": (
        lambda q, k, v: ((q, k, v), {"bias": np.ones((6, 9), np.float32)}),
        r"\[B, N, T, S\] = \[2, 4, 6, 9\].*got shape \[6, 9\]. Reshape",
    ),
    "mask of numbers": (
        lambda q, k, v: ((q, k, v), {"mask": np.zeros((1, 1, 6, 9))}),
        "mask must be boolean.*got float64.*bias=",
    ),
    "mask of another size": (
        lambda q, k, v: ((q, k, v), {"mask": np.ones((2, 1, 1, 6), bool)}),
        r"got shape \[2, 1, 1, 6\].*\[B, 1, 1, S\]",
    ),
    "lengths": (
        lambda q, k, v: ((q, k, v), {"mask": Causal() & Lengths(key=np.ones(3, int))}),
        r"Lengths' key must be a number or \[2\].*got shape \(3,\)",
    ),
    "segments": (
        lambda q, k, v: ((q, k, v), {"mask": Segments(np.ones((2, 6), int))}),
        r"Segments' key must be \[2, 9\].*got shape \(2, 6\).*Segments\(query, key\)",
    ),
    "kernel": (lambda q, k, v: ((q, k, v), {"proximity": 4.0}), r"Gaussian\(4.0\).*got 4.0"),
    "kernel's width": (
        lambda q, k, v: ((q, k, v), {"proximity": Gaussian(0.0)}),
        "Gaussian's width must be positive; got 0.0",
    ),
    "kernel's heads": (
        lambda q, k, v: ((q, k, v), {"proximity": Gaussian((1.0, 2.0, 3.0))}),
        "one per query head; got Gaussian with 3 for 4 heads",
    ),
    "positions": (
        lambda q, k, v: ((q, k, v), {"query_positions": np.arange(9)}),
        r"query_positions must be .*\[6\].*got shape \(9,\)",
    ),
    "scale": (lambda q, k, v: ((q, k, v), {"scale": np.ones(3)}), r"scale must be .*\(3,\)"),
    "scale without content": (
        lambda q, k, v: ((None, None, v), {"scale": 2.0}),
        "got scale without query and key. Leave it",
    ),
    "score": (lambda q, k, v: ((q, k, v), {"score": 3}), "score must be a function.*got 3"),
    "score's shape": (
        lambda q, k, v: ((q, k, v), {"score": lambda z, i, j, n: z[0]}),
        r"score must return .*got float32 of shape \(4, 6, 9\)",
    ),
    "normalizer": (
        lambda q, k, v: ((q, k, v), {"normalizer": "softmx"}),
        "normalizer must be one of.*got 'softmx'; did you mean 'softmax'",
    ),
    "log-normaliser": (
        lambda q, k, v: ((q, k, v), {"normalizer": "sigmoid", "return_log_normalizer": True}),
        "return_log_normalizer needs .*softmax.*got 'sigmoid'",
    ),
    "dropout without key": (
        lambda q, k, v: ((q, k, v), {"dropout_rate": 0.1}),
        "dropout_rate=0.1 needs dropout_key.*set the rate to 0",
    ),
    "dropout rate": (
        lambda q, k, v: ((q, k, v), {"dropout_rate": 1.0, "dropout_key": DROPOUT_KEY}),
        r"in \[0, 1\); got 1.0",
    ),
    "implementation": (
        lambda q, k, v: ((q, k, v), {"implementation": "dence"}),
        "one of .*got 'dence'; did you mean 'dense'",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_names_the_rule_what_it_got_and_the_remedy(name):
    wrong, message = MISUSE[name]
    arrays, arguments = wrong(*qkv())
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        attn_jax.attention(*arrays, **arguments)


def test_weights_of_nothing_are_misuse():
    with pytest.raises(ValueError, match=r"needs query and key, or a value.*got neither"):
        attn_jax.attention_weights(None, None)


def test_what_an_implementation_cannot_do_names_one_that_can():
    able = "|".join(WITH_CONTENT)
    with pytest.raises(NotImplementedError, match=f"no query and key.*implementation='({able})'"):
        attn_jax.attention(*qkv(), implementation="toeplitz")
