"""One call of attention as numbers, step by step: scores, scale, kernel, mask, weights, mix.

Letters: T queries, S keys, N heads, H key width, D value width, F features out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from attn_jax import ops
from attn_jax.analysis.recording import watch
from attn_jax.nn.watching import Seen
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
      allowed: keys that the call's mask, and the rule itself, let a query see.
      weights: of the keys that are allowed, by the normaliser.

    """

    query: Float[np.ndarray, "T H"] | None
    key: Float[np.ndarray, "S H"] | None
    products: Float[np.ndarray, "T S"] | None
    scale: float
    kernel: Float[np.ndarray, "T S"] | None
    bias: Float[np.ndarray, "T S"] | None
    logits: Float[np.ndarray, "T S"]
    allowed: Bool[np.ndarray, "T S"]
    weights: Float[np.ndarray, "T S"]

    def terms(self, query: int) -> Iterator[tuple[str, Float[np.ndarray, "S"]]]:
        """What leads to a query's weights, by name, in order; the last one is the logit."""
        if self.products is not None:
            yield "q k", self.products[query]
            yield f"x {self.scale:.4g}", self.scale * self.products[query]
        if self.kernel is not None:
            yield "log w(r)", self.kernel[query]
        if self.bias is not None:
            yield "v tanh(q+k)", self.bias[query]
        yield "logit", self.logits[query]


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
      normalizer: of all heads.
      heads: in order.
      joined: the contexts of all heads side by side.
      output: W_out joined + b.

    """

    normalizer: str
    heads: tuple[HeadSteps, ...]
    joined: Float[np.ndarray, "T W"]
    output: Float[np.ndarray, "T F"]


def steps(
    model: nnx.Module, *arguments: Any, only: str = "*", example: int = 0, **keywords: Any
) -> dict[str, Steps]:
    """Calls a model and takes the steps of its attentions for one example.

    Args:
      model: an `nn.MultiHeadAttention`, or any module that has some.
      *arguments: of the call.
      only: a pattern of paths, see `attentions`.
      example: which of the batch.
      **keywords: of the call.

    Returns:
      By path, see `attentions`; a module that is itself an attention has the path "".

    Raises:
      ValueError: no path fits the pattern, or an attention was called more than once.

    """
    _, seen = watch(model, *arguments, only=only, **keywords)
    return {path: _steps(one, example) for path, one in seen.items()}


def _steps(seen: Seen, example: int) -> Steps:
    module, one = seen.module, slice(example, example + 1)
    x, value, allowed = seen.x[one], seen.value[one], seen.allowed()[one]
    grid, rotary = seen.grid, seen.rotary_positions
    positions = [p[one] if len(p) > 1 else p for p in (grid.query_positions, grid.key_positions)]
    where = dict(zip(("query_positions", "key_positions"), (p[0] for p in positions), strict=True))
    relative = positions[1][:, None, None, :] - positions[0][:, None, :, None]
    heads: list[HeadSteps] = []
    for group, keys in zip(module.groups, seen.projected.keys, strict=True):
        mine = slice(group.first_head, group.first_head + group.num_heads)
        rules = [
            _reweighings(
                branch,
                branch.queries(x, group.first_head, rotary[one] if len(rotary) > 1 else rotary),
                None if key is None else key[one],
                group.own(value),
                {"mask": allowed[:, mine], "normalizer": module.normalizer, **where},
                relative,
            )
            for branch, key in zip(group.branches, keys, strict=True)
        ]
        gates = jax.nn.sigmoid(group.gate[...]) if len(rules) > 1 else [None] * group.num_heads
        values = np.moveaxis(np.asarray(value)[0, :, mine], 1, 0)
        each = zip(values, zip(*rules, strict=True), gates, strict=True)
        heads += [_head(*one_head) for one_head in each]
    joined = np.concatenate([head.context for head in heads], -1)
    output = np.asarray(module.output(jnp.asarray(joined)[None]))[0]
    return Steps(module.normalizer, tuple(heads), joined, output)


def _head(value: np.ndarray, rules: tuple[Reweighing, ...], gate: Any) -> HeadSteps:
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
    where = {name: given[name] for name in ("mask", "query_positions", "key_positions")}
    allowed = np.asarray(ops.attention_weights(None, None, value, **where))[0] > 0
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
            allowed[h],
            weights[h],
        )
        for h in range(shape[0])
    ]
