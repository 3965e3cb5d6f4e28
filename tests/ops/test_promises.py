"""Promises that are easily broken: what is excluded stays so, and a subclass is its own rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import (
    Causal,
    Gaussian,
    Lengths,
    Local,
    Proximity,
    Window,
    attention,
    attention_weights,
    dot_product_attention,
    explain_dispatch,
)
from attn_jax.ops import cudnn
from attn_jax.ops.call import normalized_call
from tests.ops.arrays import qkv

SOME_KEYS = np.arange(9).reshape(1, 1, 1, 9) < 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "excluding",
    [
        {"mask": SOME_KEYS},
        {"proximity": Window(2)},
        {"bias": jnp.where(SOME_KEYS, 0.0, -jnp.inf)},
        {"mask": SOME_KEYS, "poison": True},
    ],
    ids=["mask", "window", "bias", "masked NaN"],
)
def test_a_score_neither_sees_nor_revives_what_is_excluded(excluding):
    query, key, value = qkv()
    if "poison" in excluding:
        key, excluding = key.at[:, 7].set(jnp.nan), {"mask": excluding["mask"]}

    def total(temperature):
        scored = lambda z, i, j, n: 3 * jnp.tanh(z * temperature / 3)  # noqa: E731
        return attention(query, key, value, score=scored, **excluding).sum()

    slope = jax.grad(total)(1.0)
    step = 1e-2
    # a central difference of a smooth function in float32: an error of step^2 and 1e-6 / step
    difference = float(total(1 + step) - total(1 - step)) / (2 * step)
    assert float(slope) == pytest.approx(difference, rel=2e-2)
    revived = attention_weights(
        query, key, value, score=lambda z, i, j, n: jnp.zeros_like(z), **excluding
    )
    plain = attention_weights(query, key, value, **excluding)
    np.testing.assert_array_equal(revived == 0, plain == 0)


class OfFirstBatch(Proximity):
    """A kernel that relies on r [1, 1, T, S]."""

    reach = 3

    def log_weight(self, r):
        return (-abs(r[0, 0]) / 2)[None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Twice(Window):
    """A window of its own meaning, twice as far."""

    def log_weight(self, r):
        return jnp.where(abs(r) <= 2 * self.radius, 0.0, -jnp.inf)


class Strict(Causal):
    def allowed(self, grid):
        return grid.relative < 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"proximity": OfFirstBatch()},
        {"proximity": Twice(1)},
        {"proximity": Window(3), "mask": Strict()},
        {"proximity": Window(3), "mask": Local(3, 0), "query_positions": np.arange(10)},
        {
            "proximity": Window(1),
            "query_positions": np.arange(600) + 10**18,
            "key_positions": np.arange(600) + 10**18 + 3,
        },
    ],
    ids=["rank of r", "kernel subclass", "mask subclass", "hidden NaN", "large integers"],
)
def test_the_chosen_implementation_is_dense_in_meaning(options):
    value = jax.random.normal(jax.random.key(1), (1, 600, 1, 2))
    if len(options.get("query_positions", ())) == 10:
        value = value.at[:, 10:].set(jnp.nan)
    chosen = attention(None, None, value, **options)
    dense = attention(None, None, value, implementation="dense", **options)
    # means of a handful of values of order one in float32
    np.testing.assert_allclose(chosen, dense, atol=1e-5)
    try:
        banded = attention(None, None, value, implementation="toeplitz", **options)
    except NotImplementedError:
        return
    np.testing.assert_allclose(banded, dense, atol=1e-5)


def test_a_band_is_still_chosen_where_it_is_known():
    value = jnp.ones((1, 600, 1, 2))
    assert explain_dispatch(None, None, value, proximity=Window(3)).chosen == "toeplitz"


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["none", "linear"])
@pytest.mark.parametrize("implementation", ["dense", "toeplitz"])
def test_large_weights_times_small_values_fit_half_precision(normalizer, implementation):
    class Large(Proximity):
        reach = 1

        def log_weight(self, r):
            return jnp.full(r.shape, 12.0 if normalizer == "none" else 1e5)

    value = jnp.full((1, 300, 1, 1), 1e-4, jnp.float16)
    mixed = attention(
        None,
        None,
        value,
        proximity=Large(),
        normalizer=normalizer,
        implementation=implementation,
    )
    weight = np.exp(12.0) if normalizer == "none" else 1e5
    # inner rows see three keys; float16 holds 1e-4 and the result within 0.1 %
    np.testing.assert_allclose(mixed[0, 1:-1], 3 * weight * 1e-4, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_query_without_keys_has_no_gradient_in_any_precision(implementation, dtype):
    """Not even if its cotangent, divided by next to nothing, would overflow."""
    query, key, value = (x.astype(dtype) for x in qkv())
    bias = jnp.where(np.arange(query.shape[1])[:, None] == 0, -jnp.inf, 0.0)[None, None]

    def total(query, key, value):
        output = attention(query, key, value, bias=bias, implementation=implementation)
        return 1000 * output.astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(query, key, value)
    assert all(np.isfinite(np.asarray(z, np.float32)).all() for z in gradients)
    np.testing.assert_array_equal(gradients[0][:, 0], 0)


def test_a_kernel_that_forgets_per_head_is_told_so():
    class Forgetful(Proximity):
        def log_weight(self, r):
            return -abs(r) * jnp.arange(1.0, 5.0)

    with pytest.raises(ValueError, match="per_head"):
        attention(None, None, jnp.ones((1, 4, 4, 2)), proximity=Forgetful())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": "a"}, "bias must be an array"),
        ({"scale": "a"}, "scale must be an array"),
        ({"proximity": Gaussian("4")}, "Gaussian's width must be a number"),
        ({"normalizer": ["softmax"]}, "normalizer must be one of"),
        ({"implementation": ["dense"]}, "implementation must be None or one of"),
        ({"dropout_rate": 0.5, "dropout_key": 0}, "dropout_key must be a jax.random.key"),
        ({"mask": Local(-2, 5)}, "Local's before must be 0 or more"),
    ],
)
def test_misuse_is_a_value_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(), **arguments)


def test_a_settled_name_without_an_implementation_says_so():
    with pytest.raises(NotImplementedError, match="'pallas_gpu' is not there yet"):
        attention(*qkv(), implementation="pallas_gpu")


@pytest.mark.slow
def test_window_sizes_as_in_jax_nn():
    query, key, value = qkv(2, keys=6)
    pair = dot_product_attention(query, key, value, local_window_size=(3, 1))
    listed = dot_product_attention(query, key, value, local_window_size=[3, 1])
    np.testing.assert_array_equal(pair, listed)
    with pytest.raises(ValueError, match="local_window_size must be a number or"):
        dot_product_attention(query, key, value, local_window_size=(1, 2, 3))


CUDNN_MASKS = {"none": None, "causal": Causal(), "lengths": Lengths(key=np.array([3, 0]))}


@pytest.mark.slow
@pytest.mark.parametrize("mask", CUDNN_MASKS.values(), ids=CUDNN_MASKS)
@pytest.mark.parametrize("poisoned", [None, "query", "key", "value"])
def test_cudnn_means_what_dense_means(mask, poisoned):
    """By jax.nn's own XLA backend, which stands in for cuDNN's kernels on a CPU."""
    query, key, value = qkv(3, value_width=8, dtype=jnp.bfloat16)
    arrays = {"query": query, "key": key, "value": value}
    if poisoned:
        arrays[poisoned] = arrays[poisoned].at[0, 2, 0, 1].set(jnp.nan)
    options = dict.fromkeys(
        ("proximity", "bias", "score", "scale", "query_positions", "key_positions")
    )
    call, _ = normalized_call(
        **arrays,
        **options,
        mask=mask,
        normalizer="softmax",
        dropout_rate=0.0,
        dropout_key=None,
        return_log_normalizer=False,
    )
    assert cudnn.mismatch(call) is None
    output, _ = cudnn.run(call, "xla")
    dense = attention(**arrays, mask=mask, implementation="dense")
    # weights and results are rounded to bfloat16, 8 bits, in different places
    np.testing.assert_allclose(
        output.astype(np.float32), dense.astype(np.float32), atol=0.03, rtol=0.03
    )
