"""Checks 13 and 14: log-normalisers and parts that merge; decoding and prefill."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.ops.masks import Causal, Lengths
from attn_jax.ops.merging import merge
from attn_jax.ops.proximity import Exponential, Gaussian, Window
from attn_jax.testing.check import Case, case, check, need
from attn_jax.testing.example import Example, Sizes
from attn_jax.testing.trial import Failure, Trial, present


def _with_log(trial: Trial, sizes: Sizes, content: bool, normalizer: str) -> Example:
    """With rows that have no key: some of the second sequence, or all of the first."""
    length = jnp.asarray([0, *[sizes.keys - 2] * (sizes.batch - 1)])
    return trial.example(
        sizes,
        content=content,
        proximity=Gaussian(2.0, reach=5),
        mask=Lengths(key=length),
        normalizer=normalizer,
        return_log_normalizer=True,
    )


def _log_normalizer(trial: Trial, sizes: Sizes, content: bool, normalizer: str) -> None:
    example = _with_log(trial, sizes, content, normalizer)
    output, log = trial.run(example)
    reference = trial.reference(example)
    trial.checked(output, example)
    if log.dtype != trial.wide:
        raise Failure(
            "dtype of the log-normaliser", expected=trial.wide, got=log.dtype, example=example
        )
    assert reference.log_normalizer is not None
    trial.close("log-normaliser", log, reference.log_normalizer, example)
    trial.close("output", output, reference.output, example)


def _log_gradient(trial: Trial, sizes: Sizes, normalizer: str) -> None:
    trial.transformable()
    example = _with_log(trial, sizes, True, normalizer)
    reference = trial.reference(example)
    cotangent = trial.normal((*example.output_shape[:3],)).astype(trial.wide)
    cotangent = np.where(np.swapaxes(reference.allowed.any(-1), 1, 2), cotangent, 0)
    names = ("query", "key")
    arrays = trial.arrays(example, names)

    @trial.compiled
    def pull(arrays: Any, cotangent: Any) -> Any:
        _, transpose = jax.vjp(lambda arrays: trial.apply(example.changed(**arrays))[1], arrays)
        return transpose(cotangent)[0]

    expected = reference.pull(np.zeros(example.output_shape), names, cotangent)
    trial.gradients_close(pull(arrays, cotangent), expected, example)


@check(
    13, "log-normaliser", "It is float32 or wider and exact; -inf, or 0 for softmax_one, if empty."
)
def _logs() -> Iterator[Case]:
    for normalizer in ("softmax", "softmax_one"):
        yield case(normalizer, _log_normalizer, True, normalizer)
        yield case(f"{normalizer} without content", _log_normalizer, False, normalizer, queries=9)


@check(13, "log-normaliser: gradient", "It is differentiable.")
def _log_gradients() -> Iterator[Case]:
    for normalizer in ("softmax", "softmax_one"):
        yield case(normalizer, _log_gradient, normalizer)


def _parts(
    trial: Trial, example: Example, arrays: dict[str, Any], cuts: tuple[int, ...]
) -> tuple[Any, Any]:
    """The merged results over each run of keys."""
    pairs = [
        trial.apply(
            example.changed(
                query=arrays.get("query"),
                key=arrays["key"][:, first:last] if "key" in arrays else None,
                value=arrays["value"][:, first:last],
                query_positions=np.arange(example.shape[2]),
                key_positions=first,
                return_log_normalizer=True,
            )
        )
        for first, last in itertools.pairwise(cuts)
    ]
    return merge(*(list(parts) for parts in zip(*pairs, strict=True)))


def _merged(trial: Trial, sizes: Sizes, content: bool) -> None:
    """One part is empty, one too far from most queries."""
    trial.transformable()
    cuts = (0, sizes.keys // 3, sizes.keys // 3, sizes.keys * 3 // 4, sizes.keys)
    example = trial.example(sizes, content=content, proximity=Gaussian(2.0, reach=5))
    names = present(example)
    arrays = trial.arrays(example, names)
    cotangent = trial.normal(example.output_shape)

    @trial.compiled
    def pull(arrays: Any, cotangent: Any) -> Any:
        (output, log), transpose = jax.vjp(
            lambda arrays: _parts(trial, example, arrays, cuts), arrays
        )
        return output, log, transpose((cotangent, jnp.zeros_like(log)))[0]

    output, log, gradients = pull(arrays, cotangent)
    reference = trial.reference(example)
    assert reference.log_normalizer is not None
    trial.close("merged output", output, reference.output, example)
    trial.close("merged log-normaliser", log, reference.log_normalizer, example)
    trial.gradients_close(gradients, reference.pull(cotangent, names), example)


@check(13, "merge", "Partial results over disjoint keys merge into the whole, gradients included.")
def _merges() -> Iterator[Case]:
    yield case("content", _merged, True, keys=12)
    yield case("without content", _merged, False, queries=12, keys=12)


# Decoding

Rule = Callable[[], dict[str, Any]]


def _stepwise(trial: Trial, sizes: Sizes, rule: Rule, content: bool) -> None:
    """One query at a time against a buffer whose later keys hold large numbers still."""
    whole = trial.example(sizes, content=content, mask=Causal(), **rule())
    expected = trial.reference(whole).output
    arrays = trial.arrays(whole, present(whole))

    def step(arrays: Any, position: Any) -> Any:
        query = arrays.get("query")
        written = jnp.arange(sizes.keys).reshape(1, -1, 1, 1) <= position
        buffers = {n: jnp.where(written, arrays[n], 1e3) for n in arrays if n != "query"}
        buffers = {n: buffer.astype(trial.dtype) for n, buffer in buffers.items()}
        if query is None:
            placed = jnp.reshape(position, (1,))
        else:
            placed = position
            buffers["query"] = jax.lax.dynamic_slice_in_dim(query, position, 1, 1)
        return trial.apply(whole.changed(**buffers, query_positions=placed))

    step = trial.compiled(step)
    for position in range(sizes.queries):
        got = step(arrays, position if not trial.subject.traceable else jnp.asarray(position))
        row = type(expected)(*(x[:, position : position + 1] for x in expected))
        trial.close(f"output of step {position}", got, row, whole)


def _chunked(trial: Trial, sizes: Sizes, rule: Rule, content: bool) -> None:
    """Queries in chunks of one, two, three, ... against the keys so far."""
    whole = trial.example(sizes, content=content, mask=Causal(), **rule())
    expected = trial.reference(whole).output
    ends = [n * (n + 1) // 2 for n in range(sizes.keys) if n * (n + 1) // 2 < sizes.keys]
    for start, stop in itertools.pairwise([*ends, sizes.keys]):
        arrays: dict[str, Any] = {"value": whole.value[:, :stop]}
        if whole.query is not None and whole.key is not None:
            arrays |= {"query": whole.query[:, start:stop], "key": whole.key[:, :stop]}
        positions = start if content else np.arange(start, stop)
        part = whole.changed(**arrays, query_positions=positions)
        got = trial.output(part)
        rows = type(expected)(*(x[:, start:stop] for x in expected))
        trial.close(f"output of queries {start} to {stop - 1}", got, rows, part)


SAME = {"queries": 9, "keys": 9}
RULES: dict[str, tuple[Rule, bool]] = {
    "content": (dict, True),
    "content and a kernel": (lambda: {"proximity": Exponential(3.0)}, True),
    "window without content": (lambda: {"proximity": Window(2.0)}, False),
    "gaussian without content": (lambda: {"proximity": Gaussian(2.0, reach=4)}, False),
}


@check(14, "decoding", "One query at a time, with a buffer of keys, gives the full computation.")
def _decoding() -> Iterator[Case]:
    for name, (rule, content) in RULES.items():
        yield case(name, _square(_stepwise), rule, content, **SAME)


@check(14, "prefill", "So do queries in chunks against the keys so far.")
def _prefill() -> Iterator[Case]:
    for name, (rule, content) in RULES.items():
        yield case(name, _square(_chunked), rule, content, **SAME)


def _square(body: Callable[..., None]) -> Callable[..., None]:
    """Leave sizes where queries and keys differ: a sequence attends to itself."""

    def square(trial: Trial, sizes: Sizes, *arguments: Any) -> None:
        need(sizes.queries == sizes.keys, "decoding is self-attention")
        body(trial, sizes, *arguments)

    return square
