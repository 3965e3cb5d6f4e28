"""Distance in a plane: what kernels of modules see of pixels read row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.nn import Encoder, MultiHeadAttention, Plane
from attn_jax.nn.kernels import combine
from attn_jax.ops.proximity import log_weights
from tests.nn.models import attention_module, dense, inputs, run

ROWS, COLUMNS = 3, 4
PIXELS = ROWS * COLUMNS
# Rows and columns of every pixel, and for every pair how far the key lies from the query.
AT = np.stack(np.divmod(np.arange(PIXELS), COLUMNS), -1)
SIGN = np.sign(np.arange(PIXELS)[None] - np.arange(PIXELS)[:, None])
APART = SIGN * np.linalg.norm(AT[None].astype(float) - AT[:, None], axis=-1)
OF_DISTANCE = (
    "gaussian(width=(1, 2, 3, 4), offset=-1)",
    "gaussian(trainable=True, reach=3)",
    "exponential * window(radius=2)",
    "epanechnikov(radius=3)",
    "table(size=5)",
    "t5(buckets=4, max_distance=8)",
)


def split_heads(x):
    return x.reshape(*x.shape[:2], 4, -1)


@pytest.mark.slow
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("columns", [1, 2, 7])
def test_places_tell_every_pair_of_pixels_apart(columns, array):
    plane, index = Plane(columns), np.arange(4 * columns)
    at = np.stack(np.divmod(index, columns), -1).astype(float)
    expected = np.linalg.norm(at[None] - at[:, None], axis=-1)
    expected *= np.sign(index[None] - index[:, None])
    places = array(plane.places(index))
    found = plane.between(places[None] - places[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert isinstance(found, np.ndarray) == (array is np.asarray)
    assert np.all(np.diff(plane.places(index)) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", OF_DISTANCE)
def test_every_rule_of_distance_sees_the_plane(rule):
    module = attention_module(rule, distance=Plane(COLUMNS))
    x = inputs(1, length=PIXELS)
    (branch,) = module.groups[0].branches
    kernel = combine([kernel() for kernel in branch.kernels])
    bias = log_weights(kernel, APART[None, None].astype(np.float32))
    value = split_heads(dense(module.value, x))
    value = jnp.broadcast_to(value, (*value.shape[:2], 4, value.shape[3]))
    mixed = attn_jax.attention(
        None, None, value, bias=jnp.broadcast_to(bias, (1, 4, PIXELS, PIXELS))
    )
    expected = dense(module.output, mixed.reshape(*x.shape))
    np.testing.assert_allclose(run(module, x), expected, atol=2e-5)


def test_a_gaussian_is_the_product_of_its_rows_and_columns():
    plane = MultiHeadAttention(1, 2, rule="gaussian(width=2)", distance=Plane(4), rngs=nnx.Rngs(0))
    weight = lambda n: np.exp(-((np.arange(n)[None] - np.arange(n)[:, None]) ** 2) / 8)  # noqa: E731
    both = np.kron(weight(ROWS), weight(COLUMNS))
    x = inputs(2, length=PIXELS, features=2)
    value = dense(plane.value, x)
    expected = dense(plane.output, jnp.asarray(both / both.sum(-1, keepdims=True)) @ value)
    np.testing.assert_allclose(run(plane, x), expected, atol=1e-5)


def test_content_and_rotation_count_along_the_sequence():
    x = inputs(3, length=PIXELS)
    along, plane = (
        attention_module("learned", rotary=True, distance=d) for d in (None, Plane(COLUMNS))
    )
    np.testing.assert_allclose(run(along, x), run(plane, x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "dense"])
def test_masks_widths_and_batches_of_positions_do_as_without_a_plane(implementation):
    """One row of pixels is a sequence: a plane of one row changes nothing."""
    rule = "learned * gaussian(width=(1, 2), offset=-1, trainable=True)"
    x = inputs(4, length=PIXELS)
    positions = np.stack([np.arange(PIXELS), np.arange(PIXELS) + 1])
    results = []
    for distance in (None, Plane(100)):
        module = attention_module(rule, distance=distance, implementation=implementation)
        graph, state = nnx.split(module)

        def mean(state, graph=graph):
            y = nnx.merge(graph, state)(x, mask=attn_jax.Causal(), query_positions=positions)
            return jnp.square(y).mean()

        results.append(jax.jit(jax.value_and_grad(mean))(state))
    (value, gradient), (other, plane_gradient) = results
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plane_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_context_has_the_places_of_its_own_indices():
    module = attention_module("gaussian(reach=1)", distance=Plane(COLUMNS))
    x, context = inputs(5, length=2), inputs(6, length=PIXELS)
    y = run(module, x, context, query_positions=np.array([5, 11]))
    value = dense(module.value, context)
    for row, pixel in enumerate((5, 11)):
        near = np.abs(APART[pixel]) <= 1
        weight = np.where(near, np.exp(-(APART[pixel] ** 2) / 2), 0)
        mixed = jnp.asarray(weight / weight.sum(), jnp.float32) @ value
        expected = dense(module.output, mixed[:, None])[:, 0]
        np.testing.assert_allclose(y[:, row], expected, atol=1e-5)
    assert near.sum() == 3  # the last pixel has one to the left and one above


def test_a_stack_sees_the_plane_and_encodes_the_index():
    options = {"rule": "gaussian", "mlp_features": 8}
    along, plane = (
        Encoder(1, 8, 4, distance=distance, rngs=nnx.Rngs(0), **options)
        for distance in (None, Plane(COLUMNS))
    )
    x = inputs(7, length=PIXELS)
    encoded = [stack.encode_positions(x, None) for stack in (along, plane)]
    np.testing.assert_array_equal(*encoded)
    assert np.abs(np.asarray(run(along, x)) - run(plane, x)).max() > 1e-3


def test_flops_of_a_plane_count_all_pairs_except_for_self():
    flops = {
        rule: [attention_module(rule, distance=d).flops(PIXELS) for d in (None, Plane(COLUMNS))]
        for rule in ("window", "self", "uniform")
    }
    assert flops["self"][0] == flops["self"][1]
    assert flops["window"][0] < flops["window"][1] == flops["uniform"][1]


def test_misuse_is_refused():
    module = attention_module("gaussian", distance=Plane(COLUMNS))
    with pytest.raises(ValueError, match="a cache counts distance by index"):
        module.init_cache(1, PIXELS)
    with pytest.raises(ValueError, match="must be indices of pixels, got float32"):
        module(inputs(), query_positions=np.arange(6, dtype=np.float32))
    with pytest.raises(ValueError, match="columns must be a positive integer, got 0"):
        Plane(0)
