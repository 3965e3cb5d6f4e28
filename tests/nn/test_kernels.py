"""Names of rules are held to their formulas, and a kernel of one's own joins them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import Proximity, attention_weights, kernels, per_head
from attn_jax.kernels import Parameter, register_kernel
from attn_jax.nn import MultiHeadAttention
from attn_jax.nn.kernels import Kernel, combine, known_radius
from attn_jax.rules import parse

HEADS = 2
FORMULAS = {
    "gaussian(width=2, offset=-1)": lambda n, r: -(((r + 1) / 2) ** 2) / 2,
    "gaussian(width=(1, 3), trainable=True)": lambda n, r: -((r / (1, 3)[n]) ** 2) / 2,
    "exponential(length=3)": lambda n, r: -abs(r) / 3,
    "window(radius=2)": lambda n, r: 0 if abs(r) <= 2 else -math.inf,
    "triangular(radius=3)": lambda n, r: math.log(1 - abs(r) / 3) if abs(r) < 3 else -math.inf,
    "epanechnikov(radius=(2, 4.5))": lambda n, r: (
        math.log(1 - (r / (2, 4.5)[n]) ** 2) if abs(r) < (2, 4.5)[n] else -math.inf
    ),
    "powerlaw(exponent=1.5, trainable=True)": lambda n, r: -1.5 * math.log(1 + abs(r)),
    "alibi": lambda n, r: -abs(r) * (2**-4, 2**-8)[n],
    "exponential(length=3, reach=2)": lambda n, r: -abs(r) / 3,
}


def kernel_of(rule):
    ((group,),) = (parse(rule, HEADS),)
    return Kernel(group.products[0].kernels[0], HEADS)


@pytest.mark.parametrize("rule", FORMULAS)
def test_a_name_is_its_formula(rule):
    r = np.arange(-5, 6)
    got = kernel_of(rule)().log_weight(jnp.asarray(r).reshape(1, 1, 1, -1))
    got = np.broadcast_to(got, (1, HEADS, 1, len(r)))[0, :, 0]
    expected = [[FORMULAS[rule](n, int(x)) for x in r] for n in range(HEADS)]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "r", "bucket"),
    [
        ("table(size=5)", [-9, -2, 0, 1, 9], [0, 0, 2, 3, 4]),
        ("table(size=5, step=0.5)", [-0.8, -0.3, 0.1, 0.3, 5.0], [0, 1, 2, 3, 4]),
        # T5's own table: 4 buckets a direction, 2 of them exact, log-spaced up to 16
        (
            "t5(buckets=8, max_distance=16)",
            [0, -1, -2, -6, -99, 1, 3, 99],
            [0, 1, 2, 3, 3, 5, 6, 7],
        ),
    ],
)
def test_free_log_weights_belong_to_buckets(rule, r, bucket):
    kernel = kernel_of(rule)
    size = kernel.log_weights.shape[1]
    kernel.log_weights[...] = jnp.arange(HEADS * size, dtype=float).reshape(HEADS, size)
    got = kernel().log_weight(jnp.asarray(r).reshape(1, 1, 1, -1))[0, :, 0]
    np.testing.assert_array_equal(got, [bucket, [size + b for b in bucket]])


def test_the_band_of_a_product_is_its_narrowest_kernel():
    (group,) = parse("gaussian(width=9) * window(radius=2) * exponential(reach=4)", HEADS)
    product = group.products[0]
    assert known_radius(product) == 2
    assert combine([Kernel(factor, HEADS)() for factor in product.kernels]).reach == 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cauchy(Proximity):
    scale: Any

    def log_weight(self, r):
        return -jnp.log1p(jnp.square(r / per_head(self.scale)))


@pytest.fixture
def _cauchy():
    scale = Parameter(1.0, "distance at which the weight is a half", per_head=True)
    register_kernel("cauchy", Cauchy, {"scale": scale}, meaning="a test", trained="scale")
    yield
    del kernels._KERNELS["cauchy"]


@pytest.mark.slow
@pytest.mark.usefixtures("_cauchy")
def test_a_kernel_of_ones_own_is_a_rule():
    module = MultiHeadAttention(
        HEADS, 4, rule="learned * cauchy(scale=(2, 3), trainable=True)", rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (1, 5, 4))
    gradient = nnx.grad(lambda m: m(x).sum())(module)
    assert (
        float(abs(gradient["groups"][0]["branches"][0]["kernels"][0]["log_scale"][...]).max()) > 0
    )
    with pytest.raises(ValueError, match="scale of cauchy must be a positive number"):
        parse("cauchy(scale=-1)")
    with pytest.raises(ValueError, match="an identifier that is not taken, got 'cauchy'"):
        register_kernel("cauchy", Cauchy, {}, meaning="again")


@pytest.mark.usefixtures("_cauchy")
def test_a_kernel_of_ones_own_has_a_reach():
    (group,) = parse("cauchy(scale=2, reach=1)", HEADS)
    kernel = Kernel(group.products[0].factors[0], HEADS)()
    weights = attention_weights(None, None, jnp.ones((1, 4, 1, 1)), proximity=kernel)
    assert (np.asarray(weights[0, 0]) > 0).sum() == 10
    assert known_radius(group.products[0]) == 1


@pytest.mark.parametrize(
    ("build", "names", "said"),
    [
        (Cauchy, ("width",), "those that Cauchy takes, got width: .*scale"),
        (Cauchy, (), "got none: missing a required argument: 'scale'"),
        (lambda num_heads, *, scale, reach: Cauchy(scale), ("size",), "got size: .*scale"),
    ],
)
def test_parameters_that_a_kernel_does_not_take_are_refused(build, names, said):
    parameters = {name: Parameter(1.0, "a test") for name in names}
    with pytest.raises(ValueError, match=said):
        register_kernel("mine", build, parameters, meaning="a test")
    assert "mine" not in kernels.KERNELS


@pytest.mark.parametrize(
    "rule", ["triangular(radius=0)", "powerlaw(exponent=0, trainable=True)", "gaussian(width={[]})"]
)
def test_what_cannot_be_built_is_refused_when_read(rule):
    with pytest.raises(ValueError, match=r"must be|is not a number"):
        parse(rule, HEADS)


@pytest.mark.slow
def test_a_cache_that_is_full_refuses_more():
    module = MultiHeadAttention(HEADS, 4, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 1, 4))
    cache = module.init_cache(1, 2)
    for _ in range(2):
        _, cache = module(x, cache=cache)
    with pytest.raises(ValueError, match="has 2 positions and no room for 1 more"):
        module(x, cache=cache)
    traced, _ = nnx.jit(lambda m, c: m(x, cache=c))(module, cache)
    assert np.isnan(traced).all()
