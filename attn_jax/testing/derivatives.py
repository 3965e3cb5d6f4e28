"""Check 11: forward mode, and second derivatives in every order of modes."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from attn_jax.ops.masks import Causal
from attn_jax.ops.proximity import Gaussian
from attn_jax.testing.check import FULL, Case, case, check
from attn_jax.testing.example import Example, Sizes
from attn_jax.testing.reference import Bounded
from attn_jax.testing.trial import Trial, present

TINY = {"batch": 1, "queries": 3, "keys": 4, "heads": 2, "key_heads": 2, "key_width": 2}
TINY |= {"value_width": 2}
LONG = {**TINY, "queries": 300, "keys": 300, "key_heads": 1}


def _causal(trial: Trial, sizes: Sizes, content: bool = True) -> Example:
    """Aligned so that the first query has no key; its cotangent is zero."""
    return trial.example(
        sizes, content=content, mask=Causal(), query_positions=-1, proximity=Gaussian(2.0, reach=20)
    )


def _tangent(
    trial: Trial, sizes: Sizes, names: tuple[str, ...] | None = None, content: bool = True
) -> None:
    example = _causal(trial, sizes, content)
    names = present(example) if names is None else names
    moves = trial.example(sizes, seed=1, content=content)
    tangents = {name: getattr(moves, name) for name in names}
    output, tangent = trial.pusher(example, names)(tangents)
    reference = trial.reference(example)
    trial.output_close("output", output, reference, example)
    expected = reference.push(tangents)
    tangent = np.where(reference.seen, np.asarray(tangent, np.float64), expected.value)
    trial.close("tangent", tangent, expected, example)


@check(11, "jvp", "Forward mode is exact, in all arguments and in each alone.")
def _tangents() -> Iterator[Case]:
    for names in (None, ("query",), ("key",), ("value",)):
        yield case("all" if names is None else names[0], _tangent, names)
    yield case("without content", _tangent, None, False, queries=9)
    yield case("300 keys, shared heads", _tangent, None, **LONG)


# Second derivatives of sum(cotangent * output)


def _second(example: Example, trial: Trial, direction: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Hessian times direction, by a central difference of the reference's gradient."""
    names, step = tuple(direction), 1e-5
    cotangent = trial.cotangent(trial.reference(example))
    above, below = (
        trial.reference(
            example.changed(
                **{
                    n: np.asarray(getattr(example, n), np.float64) + sign * step * d
                    for n, d in direction.items()
                }
            )
        ).pull(cotangent, names)
        for sign in (1, -1)
    )
    result = {}
    for name in names:
        value = (above[name].value - below[name].value) / (2 * step)
        # A second derivative sums some tens of rounded terms, of order one like the inputs; a
        # difference has an error of step^2.
        relative = max(64 * trial.precision.value, 1e-8)
        size = max(abs(value).max(initial=0.0), 1.0)
        result[name] = Bounded(value, np.full(value.shape, relative * size / 4))
    return result


def _loss(trial: Trial, example: Example) -> Any:
    cotangent = trial.cotangent(trial.reference(example))
    return lambda arrays: (trial.apply(example.changed(**arrays)) * cotangent).sum()


def _forward_over_reverse(trial: Trial, sizes: Sizes, content: bool = True) -> None:
    trial.transformable()
    example = _causal(trial, sizes, content)
    moves = trial.example(sizes, seed=1, content=content)
    direction = {n: getattr(moves, n) for n in present(example)}
    gradient = jax.grad(_loss(trial, example))
    arrays = trial.arrays(example, present(example))
    tangents = {n: jnp.asarray(d) for n, d in direction.items()}
    _, got = trial.compiled(lambda a, t: jax.jvp(gradient, (a,), (t,)))(arrays, tangents)
    trial.gradients_close(got, _second(example, trial, direction), example)


def _reverse_over_reverse(trial: Trial, sizes: Sizes, content: bool = True) -> None:
    trial.transformable()
    example = _causal(trial, sizes, content)
    moves = trial.example(sizes, seed=1, content=content)
    direction = {n: getattr(moves, n) for n in present(example)}
    gradient = jax.grad(_loss(trial, example))

    def along(arrays: Any, direction: Any) -> Any:
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradient(arrays), direction)
        return sum(jax.tree.leaves(products))

    arrays = trial.arrays(example, present(example))
    tangents = {n: jnp.asarray(d) for n, d in direction.items()}
    got = trial.compiled(jax.grad(along))(arrays, tangents)
    trial.gradients_close(got, _second(example, trial, direction), example)


def _hessian(trial: Trial, sizes: Sizes) -> None:
    """Jacfwd of grad: the whole matrix in query, whose columns are products with unit vectors."""
    trial.transformable()
    example = _causal(trial, sizes)
    assert example.query is not None
    gradient = jax.grad(_loss(trial, example))
    arrays = trial.arrays(example, present(example))

    def of_query(query: Any, arrays: Any) -> Any:
        return gradient({**arrays, "query": query})["query"]

    matrix = trial.compiled(jax.jacfwd(of_query))(arrays["query"], arrays)
    for index in list(np.ndindex(example.query.shape))[:: max(1, example.query.size // 6)]:
        unit = np.zeros(example.query.shape)
        unit[index] = 1
        expected = _second(example, trial, {"query": unit})
        column = matrix[(..., *index)]
        trial.gradients_close({"query": column}, expected, example)


def _check_grads(trial: Trial, sizes: Sizes, mode: str) -> None:
    """JAX's own test against finite differences, to second order."""
    trial.transformable()
    example = _causal(trial, sizes)
    names = present(example)
    arrays = trial.arrays(example, names)
    function = jax.jit(
        lambda *given: trial.apply(example.changed(**dict(zip(names, given, strict=True))))
    )
    arguments = tuple(arrays[n] for n in names)
    check_grads(function, arguments, 2, modes=(mode,), rtol=1e-5, atol=1e-7, eps=1e-6)


@check(
    11, "jvp of grad", "Forward over reverse is exact: jacfwd(grad), Hessian times vector.", FULL
)
def _mixed_orders() -> Iterator[Case]:
    yield case("Hessian times vector", _forward_over_reverse, **TINY)
    yield case("without content", _forward_over_reverse, False, **{**TINY, "queries": 4})
    yield case("jacfwd(grad)", _hessian, **TINY)
    yield case("300 keys, shared heads", _forward_over_reverse, **LONG)


@check(11, "grad of grad", "Reverse over reverse is exact.", FULL)
def _reverse_orders() -> Iterator[Case]:
    yield case("content", _reverse_over_reverse, **TINY)
    yield case("without content", _reverse_over_reverse, False, **{**TINY, "queries": 4})


@check(11, "check_grads", "jax.test_util.check_grads to second order, in both modes.", ("float64",))
def _jax_checks() -> Iterator[Case]:
    for mode in ("fwd", "rev"):
        yield case(mode, _check_grads, mode, **TINY)
