"""One call of attention as numbers, step by step: scores, scale, kernel, mask, weights, mix.

Letters: T queries, S keys, N heads, H key width, D value width, F features out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from attn_jax import ops
from attn_jax.nn.attention import MultiHeadAttention
from attn_jax.ops.positions import everywhere
from attn_jax.ops.proximity import log_weights


@dataclasses.dataclass(frozen=True)
class Reweighing:
    r"""One rule of a head: what it makes of every pair.

    .. math::
      z_{ij} = \text{scale} \; q_i \cdot k_j + \log w(r_{ij}) + \text{bias}_{ij}

    Attributes:
      query: q; None without content, or where a layer joins query and key.
      key: k, likewise.
      products: q k; None without q.
      scale: what products are multiplied by.
      kernel: log w(r); None without one.
      bias: additive scores, v tanh(q + k); None without.
      logits: z, the sum.
      weights: of the keys that are allowed, by the normaliser.

    """

    query: Float[np.ndarray, "T H"] | None
    key: Float[np.ndarray, "S H"] | None
    products: Float[np.ndarray, "T S"] | None
    scale: float
    kernel: Float[np.ndarray, "T S"] | None
    bias: Float[np.ndarray, "T S"] | None
    logits: Float[np.ndarray, "T S"]
    weights: Float[np.ndarray, "T S"]


@dataclasses.dataclass(frozen=True)
class HeadSteps:
    """One head.

    Attributes:
      rules: one, or the two of a mix.
      gate: g of a mix, whose weights are g first + (1 - g) second; None of one rule.
      weights: w.
      value: v of every key.
      context: sum over j of w_ij v_j.

    """

    rules: tuple[Reweighing, ...]
    gate: float | None
    weights: Float[np.ndarray, "T S"]
    value: Float[np.ndarray, "S D"]
    context: Float[np.ndarray, "T D"]


@dataclasses.dataclass(frozen=True)
class Steps:
    """One call.

    Attributes:
      allowed: keys that the mask lets a query see.
      normalizer: of all heads.
      heads: in order.
      joined: the contexts of all heads side by side.
      output: W_out joined + b.

    """

    allowed: Bool[np.ndarray, "T S"]
    normalizer: str
    heads: tuple[HeadSteps, ...]
    joined: Float[np.ndarray, "T W"]
    output: Float[np.ndarray, "T F"]


def steps(
    module: MultiHeadAttention,
    x: Float[Any, "B T E"],
    context: Float[Any, "B S C"] | None = None,
    *,
    mask: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    example: int = 0,
) -> Steps:
    """The numbers of one example of a call with the same arguments.

    Raises:
      ValueError: as a call, and if the module has a `distance` of its own.

    """
    if module.distance is not None:
        raise ValueError(
            f"steps are of positions along a line, got distance={module.distance}: leave it out"
        )
    x = jnp.asarray(x)[example : example + 1]
    if context is None and key_positions is None:
        key_positions = query_positions
    seen = x if context is None else jnp.asarray(context)[example : example + 1]
    mask = _one(mask, example)
    grid = everywhere(x.shape[1], seen.shape[1], query_positions, key_positions)
    own = {"query_positions": grid.query_positions[0], "key_positions": grid.key_positions[0]}
    projected = module.project(seen, own["key_positions"])
    allowed = ops.attention_weights(None, None, projected.value[:, :, :1], mask=mask, **own) > 0
    heads: list[HeadSteps] = []
    for group, group_keys in zip(module.groups, projected.keys, strict=True):
        rules = [
            _reweighings(
                branch,
                branch.queries(x, group.first_head, jnp.asarray(grid.query_positions)),
                key,
                group.own(projected.value),
                {"mask": mask, "normalizer": module.normalizer, **own},
                grid.relative,
            )
            for branch, key in zip(group.branches, group_keys, strict=True)
        ]
        gates = jax.nn.sigmoid(group.gate[...]) if len(rules) > 1 else [None] * group.num_heads
        value = np.asarray(group.own(projected.value))[0]
        heads += [
            _head(tuple(rule[h] for rule in rules), gates[h], value[:, h])
            for h in range(group.num_heads)
        ]
    joined = np.concatenate([head.context for head in heads], -1)
    output = np.asarray(module.output(jnp.asarray(joined)[None]))[0]
    return Steps(np.asarray(allowed)[0, 0], module.normalizer, tuple(heads), joined, output)


def _one(mask: Any, example: int) -> Any:
    """The part of a mask that is of one example; masks of positions are of all."""
    return jax.tree.map(
        lambda leaf: leaf[example : example + 1] if np.ndim(leaf) and len(leaf) > example else leaf,
        mask,
    )


def _head(rules: tuple[Reweighing, ...], gate: Any, value: np.ndarray) -> HeadSteps:
    weights = rules[0].weights
    if gate is not None:
        gate = float(gate)
        weights = gate * rules[0].weights + (1 - gate) * rules[1].weights
    return HeadSteps(rules, gate, weights, value, weights @ value)


def _reweighings(
    branch: Any, query: Any, key: Any, value: Any, options: dict[str, Any], relative: Any
) -> list[Reweighing]:
    """What a branch makes of every pair, a head each."""
    query, key, given = branch.arguments(query, key, options.pop("mask"), options)
    weights = np.asarray(ops.attention_weights(query, key, value, **given))[0]
    shape = weights.shape
    products = scale = kernel = bias = None
    if query is not None:
        products = np.einsum("tnh,snh->nts", np.asarray(query)[0], np.asarray(key)[0])
        scale = float(given.get("scale", query.shape[-1] ** -0.5))
    if given["proximity"] is not None:
        logs = np.asarray(log_weights(given["proximity"], jnp.asarray(relative)))
        kernel = np.broadcast_to(logs[0], shape)
    if given["bias"] is not None:
        bias = np.broadcast_to(np.asarray(given["bias"])[0], shape)
    logits = np.zeros(shape, np.float32)
    for term in (None if products is None else scale * products, kernel, bias):
        logits = logits if term is None else logits + term

    def of(array: Any, head: int) -> Any:
        return None if array is None else array[head]

    def vectors(array: Any, head: int) -> Any:
        return None if array is None else np.asarray(array)[0, :, head]

    return [
        Reweighing(
            vectors(query, h),
            vectors(key, h),
            of(products, h),
            1.0 if scale is None else scale,
            of(kernel, h),
            of(bias, h),
            logits[h],
            weights[h],
        )
        for h in range(shape[0])
    ]
