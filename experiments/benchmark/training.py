"""The suite `training`: a step of a small language model with our attention and with Flax's.

4 layers of width 128 with 4 heads, 256 bytes, causal, float32: everything but the attention layer
is one code, and the weights are Flax's, imported, so that both have the same loss.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax import Causal
from attn_jax.nn import import_attention
from attn_jax.nn.transformer import FeedForward
from experiments.benchmark.case import Case, Contender, Target
from experiments.benchmark.compiled import contender

OURS, FLAX = "attn_jax", "flax.nnx.MultiHeadAttention"
LAYERS, WIDTH, HEADS, BYTES = 4, 128, 4, 256
LENGTHS = (256, 1024)
TOKENS = 4096
"""Tokens a batch, whatever the length."""


def cases(lengths: Sequence[int] = LENGTHS) -> list[Case]:
    """One case a length; the target is for 1,024."""
    return [_case(length) for length in lengths]


class Block(nnx.Module):
    """x + attention(norm(x)), then the same with a feed-forward layer."""

    def __init__(self, attention: nnx.Module, rngs: nnx.Rngs):
        self.attention = attention
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.feed_forward = FeedForward(WIDTH, 4 * WIDTH, "gelu", rngs=rngs)

    def __call__(self, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """The block's output; `attend` calls the attention layer."""
        x = x + attend(self.attention, self.norms[0](x))
        return x + self.feed_forward(self.norms[1](x))


class LanguageModel(nnx.Module):
    """Embeddings, blocks, logits."""

    def __init__(self, attention: Callable[[int], nnx.Module]):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(BYTES, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(attention(i), rngs) for i in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def loss(self, ids: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """Cross-entropy of each byte given those before it."""
        x = self.embedding(ids[:, :-1])
        for block in self.blocks:
            x = block(x, attend)
        logits = self.embedding.attend(self.norm(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def _flax_layer(index: int) -> nnx.Module:
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(index))


def _attend_flax(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x, mask=nnx.make_causal_mask(x[..., 0]))


def _attend_ours(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x, mask=Causal())


def _step(model: LanguageModel, attend: Callable[..., jax.Array]) -> tuple[Any, Any]:
    """A step (state, ids) -> (loss, norm of the new parameters), and its first state."""
    graph, params = nnx.split(model)
    optimizer = optax.adam(1e-3)

    def step(state: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, moments = state
        loss, gradient = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(ids, attend))(params)
        updates, _ = optimizer.update(gradient, moments)
        # No part of a step can be left out of the norm of what it gives.
        norm = optax.tree.norm(optax.apply_updates(params, updates))
        return loss[None, None], norm[None, None]

    return step, (params, optimizer.init(params))


def _case(length: int) -> Case:
    def contenders() -> list[Contender]:
        rows = TOKENS // length
        ids = np.random.default_rng(0).integers(0, BYTES, (rows, length + 1)).astype(np.int32)
        models = {
            FLAX: (LanguageModel(_flax_layer), _attend_flax),
            OURS: (LanguageModel(lambda i: import_attention(_flax_layer(i))), _attend_ours),
        }
        made = []
        for name in (OURS, FLAX):
            step, state = _step(*models[name])
            made.append(contender(name, step, [state, jnp.asarray(ids)], _expected(ids)))
        return made

    least = 1.3 if length == LENGTHS[-1] else -math.inf
    targets = (
        Target("time", FLAX, OURS, at_least=least),
        Target("temporary memory", FLAX, OURS),
    )
    inputs = f"{TOKENS // length} rows of {length} tokens, forward, backward and Adam"
    return Case(f"language model, length {length}", inputs, contenders, targets, tolerance=1e-4)


def _expected(ids: np.ndarray) -> Callable[[], Sequence[np.ndarray]]:
    """The same in float64, by Flax's layer."""

    def answer() -> Sequence[np.ndarray]:
        with jax.enable_x64(True):
            model = LanguageModel(_flax_layer)
            graph, params = nnx.split(model)
            wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
            step, state = _step(nnx.merge(graph, wide), _attend_flax)
            return [np.asarray(x) for x in jax.jit(step)(state, jnp.asarray(ids))]

    return answer
