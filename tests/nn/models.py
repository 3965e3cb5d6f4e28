"""Inputs and modules that the tests of attn_jax.nn share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.nn import MultiHeadAttention

BATCH, LENGTH, FEATURES, HEADS = 2, 6, 8, 4
EVERY_RULE = (
    "learned",
    "learned(key_width=3)",
    "raw",
    "additive",
    "self",
    "uniform",
    "gaussian(width=(1, 2, 3, 4), offset=-1)",
    "gaussian(trainable=True, reach=3)",
    "exponential",
    "window",
    "triangular",
    "epanechnikov",
    "powerlaw",
    "table(size=5)",
    "alibi",
    "t5(buckets=4, max_distance=8)",
    "learned * gaussian(width=4)",
    "mix(learned, gaussian(offset=-1))",
    "gaussian(offset=-1):1, raw:2, additive:1",
)


def inputs(seed=0, length=LENGTH, features=FEATURES, batch=BATCH):
    return jax.random.normal(jax.random.key(seed), (batch, length, features))


def randomised(build, seed=100):
    """The module that `build` makes with random values for every parameter, made without JAX."""
    module = nnx.eval_shape(build)
    rng = np.random.default_rng(seed)
    random = lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    nnx.update(module, jax.tree.map(random, nnx.state(module)))
    return module


def attention_module(rule, **options):
    return randomised(
        lambda: MultiHeadAttention(HEADS, FEATURES, rule=rule, rngs=nnx.Rngs(0), **options)
    )


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, state, arguments, options):
    return nnx.merge(graph, state)(*arguments, **options)


def run(module, *arguments, **options):
    """module(*arguments, **options), compiled once for all modules that are built alike."""
    return _apply(*nnx.split(module), arguments, options)


def parameters(module):
    """Every parameter by its path, such as "mlp/up/kernel"."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def dense(linear, x):
    """What a linear layer gives, without Flax."""
    return jnp.einsum("...i,io->...o", x, linear.kernel[...]) + linear.bias[...].reshape(1, 1, -1)
