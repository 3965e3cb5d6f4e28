"""The suite `layers`: what a layer costs as a sequence grows, after Vaswani et al. 2017, table 1.

Recurrent, restricted, full and content-free, all of the same width; forward and backward.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax import Local
from attn_jax.nn import MultiHeadAttention, RecurrentEncoder
from experiments.benchmark.case import Case, Contender, Target
from experiments.benchmark.compiled import contender
from experiments.benchmark.inputs import normal

WIDTH, HEADS, REACH = 256, 8, 64
LENGTHS = (256, 1024, 4096)
RECURRENT, RESTRICTED, FULL, FREE = (
    "recurrent",
    "restricted self-attention",
    "full self-attention",
    "content-free",
)


def cases() -> list[Case]:
    """One case a length."""
    return [_case(length) for length in LENGTHS]


def _layers() -> dict[str, tuple[nnx.Module, Callable[[Any, jax.Array], jax.Array]]]:
    """Modules, and how they are called."""
    learned = MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0))
    free = MultiHeadAttention(
        HEADS, WIDTH, rule="gaussian(width=8, trainable=True)", rngs=nnx.Rngs(0)
    )
    return {
        RECURRENT: (
            RecurrentEncoder(WIDTH, WIDTH // 2, rngs=nnx.Rngs(0)),
            lambda layer, x: layer(x).states,
        ),
        RESTRICTED: (learned, lambda layer, x: layer(x, mask=Local(REACH, REACH))),
        FULL: (learned, lambda layer, x: layer(x)),
        FREE: (free, lambda layer, x: layer(x)),
    }


def _case(length: int) -> Case:
    def contenders() -> list[Contender]:
        x = jnp.asarray(normal((1, length, WIDTH), 0))
        made = []
        for name, (layer, call) in _layers().items():
            graph, params = nnx.split(layer)

            def loss(params: Any, x: jax.Array, graph: Any = graph, call: Any = call) -> jax.Array:
                return jnp.square(call(nnx.merge(graph, params), x)).mean()

            made.append(contender(name, jax.grad(loss, (0, 1)), [params, x], None))
        return made

    targets = tuple(
        Target(quantity, name, FREE)
        for name in (RECURRENT, RESTRICTED, FULL)
        for quantity in ("time", "temporary memory")
    )
    inputs = f"1 x {length} x {WIDTH}, {HEADS} heads, reach {REACH}, forward and backward"
    return Case(f"length {length}", inputs, contenders, targets)
