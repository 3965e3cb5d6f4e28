"""`attention`: score, normalise, mix. Checks its arguments and picks an implementation.

Letters: B batch, T queries, S keys, N query heads, K key/value heads (N % K == 0), H key width,
D value width; r = key position - query position.
"""

import dataclasses
import difflib
import inspect
from types import ModuleType
from typing import Any, no_type_check

from jaxtyping import Array, ArrayLike, Float

from attn_jax.ops import blockwise, cudnn, dense, toeplitz
from attn_jax.ops.call import Call, normalized_call

# One module each, fastest first. `available()` says whether this machine can run it,
# `unsupported(call)` why it can't run a call, `unwise(call)` why it should be left to another one
# (both None if there is no reason), `plan(call)` how it would go about it, and `run(call)` gives
# output and log-normaliser.
_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "cudnn": cudnn,
    "toeplitz": toeplitz,
    "blockwise": blockwise,
    "dense": dense,
}

# Names that are settled, for implementations to come.
_NOT_YET = ("pallas_gpu", "pallas_tpu")


@no_type_check
def attention(
    query: Float[ArrayLike, "*B T N H"] | None,
    key: Float[ArrayLike, "*B S K H"] | None,
    value: Float[ArrayLike, "*B S K D"],
    *,
    proximity=None,
    bias=None,
    mask=None,
    score=None,
    scale=None,
    normalizer: str = "softmax",
    query_positions=None,
    key_positions=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
    return_log_normalizer: bool = False,
    implementation: str | None = None,
):
    r"""Attention: score, normalise, mix.

    .. math::
      z_{ij} = \text{scale} \; q_i \cdot k_j + \log w(r_{ij}) + \text{bias}_{ij}, \quad
      y_i = \sum_j \text{normalise}_j(z_{ij}) \, v_j

    Terms that are not given are left out: with query and key there is content, with a proximity
    kernel distance, with neither every key counts alike. In order: sum the terms, apply `score`,
    `mask`, the normaliser, dropout, and mix the values. A key is allowed if the mask is true and
    its logit exceeds -inf. A query with no allowed key gives exactly zero, and zero gradients.
    NaN and inf in a key or value reach only queries whose mask lets them attend to it.

    Args:
      query: [B, T, N, H] or [T, N, H]; None (with key) for attention without content. Then T is
        the length of `query_positions` if that is an array, else S; N is the number of heads of
        the kernel if it has parameters per head, else K.
      key: [B, S, K, H] or [S, K, H]; query head n reads key/value head n // (N / K).
      value: [B, S, K, D] or [S, K, D].
      proximity: a kernel such as `Gaussian(4.0)`, the log-weight of a key by its distance.
      bias: floating [B, N, T, S] ([N, T, S] unbatched), each axis full or 1; added to the logits.
      mask: a `Mask` such as `Causal() & Lengths(key=lengths)`, or a boolean array shaped like
        bias; true where the query may attend to the key.
      score: function (logits, query_index, key_index, head) -> logits; four arrays of rank 4 that
        broadcast. Indices, not positions. At pairs that mask, kernel or bias exclude it is given 0,
        and what it returns there does not count.
      scale: scalar or [N], multiplies the query-key product; by default H^-0.5.
      normalizer: "softmax"; "softmax_one" (softmax with one more logit of zero); "sigmoid";
        "none" (exp of the logit); "linear" (the logit); "sparsemax"; "entmax15".
      query_positions: None (0, 1, ...), a scalar offset o (o, o + 1, ...), [T] or [B, T]; integer
        or floating. `query_positions=S - T` aligns the last query with the last key.
      key_positions: likewise, [S] or [B, S].
      dropout_rate: the chance that a weight is set to zero, a Python float in [0, 1); the others
        are divided by 1 - dropout_rate. Which are kept depends only on `dropout_key` and on the
        indices of batch, head, query and key.
      dropout_key: a `jax.random.key`, required if the rate is positive.
      return_log_normalizer: whether to return the logarithm of the normaliser's denominator too.
      implementation: a name from `implementations()`; None picks the fastest that can. All give
        the same result.

    Returns:
      [B, T, N, D] ([T, N, D] unbatched) in value's dtype. With `return_log_normalizer` a pair of
      it and [B, T, N] ([T, N]) in float32 (float64 for float64), before dropout: -inf for a query
      without an allowed key under "softmax", 0 under "softmax_one".

    Raises:
      ValueError: for arguments that are wrong for every implementation.
      NotImplementedError: if the implementation named can't do what is asked; names one that can.

    References:
      Bahdanau, Cho, Bengio 2015; Vaswani et al. 2017; Nadaraya 1964 and Watson 1964 (kernel
      regression); You, Sun, Iyyer 2020 (Gaussian heads); Ainslie et al. 2023 (grouped heads).

    """
    call, unbatched = normalized_call(
        query,
        key,
        value,
        proximity=proximity,
        bias=bias,
        mask=mask,
        score=score,
        scale=scale,
        normalizer=normalizer,
        query_positions=query_positions,
        key_positions=key_positions,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_log_normalizer=return_log_normalizer,
    )
    output, log_normalizer = _IMPLEMENTATIONS[_dispatch(call, implementation).chosen].run(call)
    if unbatched:
        output = output[0]
        log_normalizer = None if log_normalizer is None else log_normalizer[0]
    return (output, log_normalizer) if return_log_normalizer else output


@no_type_check
def attention_weights(
    query: Float[ArrayLike, "*B T N H"] | None,
    key: Float[ArrayLike, "*B S K H"] | None,
    value: Float[ArrayLike, "*B S K D"] | None = None,
    *,
    proximity=None,
    bias=None,
    mask=None,
    score=None,
    scale=None,
    normalizer: str = "softmax",
    query_positions=None,
    key_positions=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
) -> Float[Array, "*B N T S"]:
    """The weights that `attention` with the same arguments gives every value, after dropout.

    Args:
      query: see `attention`, as all that follow.
      key: if this and query are None, the shape is taken from value.
      value: only its shape and dtype are used; None takes one value head per key head.
      proximity: see `attention`.
      bias: see `attention`.
      mask: see `attention`.
      score: see `attention`.
      scale: see `attention`.
      normalizer: see `attention`.
      query_positions: see `attention`.
      key_positions: see `attention`.
      dropout_rate: see `attention`.
      dropout_key: see `attention`.

    Returns:
      [B, N, T, S] ([N, T, S] unbatched) in float32, or float64 for float64.

    Raises:
      ValueError: see `attention`.

    """
    if value is None and key is None:
        raise ValueError(
            "attention_weights needs query and key, or a value to take the shape from; got neither."
        )
    call, unbatched = normalized_call(
        query,
        key,
        key if value is None else value,
        proximity=proximity,
        bias=bias,
        mask=mask,
        score=score,
        scale=scale,
        normalizer=normalizer,
        query_positions=query_positions,
        key_positions=key_positions,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_log_normalizer=False,
    )
    weights = dense.weights(call)
    return weights[0] if unbatched else weights


def implementations() -> tuple[str, ...]:
    """Names of the implementations that this machine can run, for `attention(implementation=)`."""
    return tuple(sorted(n for n, module in _IMPLEMENTATIONS.items() if module.available()))


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Which implementation runs, and why not the others.

    Attributes:
      chosen: its name.
      passed_over: name of every other implementation and why it is not the one.
      plan: how the chosen one goes about the call, in a few words.

    """

    chosen: str
    passed_over: dict[str, str]
    plan: str = ""

    def __str__(self) -> str:
        first = f"{self.chosen} runs: {self.plan}." if self.plan else f"{self.chosen} runs."
        return "\n".join([first, *(f"{name}: {why}" for name, why in self.passed_over.items())])


@no_type_check
def explain_dispatch(query, key, value, *, implementation: str | None = None, **arguments):
    """What `attention` with the same arguments would run, and why.

    Args:
      query: see `attention`.
      key: see `attention`.
      value: see `attention`.
      implementation: see `attention`.
      **arguments: the other keyword arguments of `attention`.

    Returns:
      A `Dispatch`: `chosen`, its `plan`, and `passed_over` with the reason for every other one.

    Raises:
      ValueError: see `attention`.
      NotImplementedError: see `attention`.

    """
    call, _ = normalized_call(query, key, value, **{**_DEFAULTS, **arguments})
    dispatch = _dispatch(call, implementation)
    return dataclasses.replace(dispatch, plan=_IMPLEMENTATIONS[dispatch.chosen].plan(call))


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "implementation"
}


def _dispatch(call: Call, name: Any) -> Dispatch:
    """The implementation called `name`, or the first that can and would not be slower."""
    if isinstance(name, str) and name in _NOT_YET:
        raise NotImplementedError(f"{name!r} is not there yet. Use implementation='dense'.")
    if name is not None and not (isinstance(name, str) and name in _IMPLEMENTATIONS):
        near = difflib.get_close_matches(str(name), _IMPLEMENTATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"implementation must be None or one of {', '.join(_IMPLEMENTATIONS)}; got "
            f"{name!r}{hint}"
        )
    reasons = {n: module.unsupported(call) for n, module in _IMPLEMENTATIONS.items()}
    if name is not None and reasons[name] is not None:
        able = next(n for n in reversed(reasons) if reasons[n] is None)
        raise NotImplementedError(
            f"{name!r} can't run this call: {reasons[name]}. Use implementation={able!r}."
        )
    for n, module in _IMPLEMENTATIONS.items():
        reasons[n] = reasons[n] or module.unwise(call)
    chosen = name or next(n for n, reason in reasons.items() if reason is None)
    others = {
        n: reason or (f"{name!r} was asked for" if name else f"{chosen!r} comes first")
        for n, reason in reasons.items()
        if n != chosen
    }
    return Dispatch(chosen, others)
