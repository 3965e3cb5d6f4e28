"""Checks 1, 2, 3 and 9: queries without keys, NaN behind masks, late keys, masks together."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from attn_jax.ops.masks import Causal, Lengths, Local, Segments
from attn_jax.ops.proximity import Gaussian, Window
from attn_jax.testing.check import Case, case, check
from attn_jax.testing.example import Example, Sizes
from attn_jax.testing.reference import Bounded, Reference
from attn_jax.testing.trial import Failure, Trial, present

Rule = Callable[[Trial, Sizes], Mapping[str, Any]]

# Which arguments leave some queries, not all of them, without any key.


def _empty_row(sizes: Sizes) -> int:
    return sizes.queries // 3


def _but_one_row(sizes: Sizes) -> np.ndarray:
    return np.arange(sizes.queries).reshape(1, 1, -1, 1) != _empty_row(sizes)


def _bias(trial: Trial, sizes: Sizes) -> np.ndarray:
    return np.where(
        _but_one_row(sizes), trial.normal((sizes.heads, 1, sizes.keys)), -np.inf
    ).astype(trial.dtype)


def _segments(trial: Trial, sizes: Sizes) -> Mapping[str, Any]:
    del trial
    query = np.where(_but_one_row(sizes).ravel(), 1, 2)
    return {"mask": Segments(query, np.ones(sizes.keys, int))}


def _score(trial: Trial, sizes: Sizes) -> Mapping[str, Any]:
    del trial
    row = _empty_row(sizes)

    def without_a_row(logits: Any, query_index: Any, key_index: Any, head: Any) -> Any:
        del key_index, head
        xp = logits.__array_namespace__()
        return xp.where(query_index == row, -xp.inf, logits)

    return {"score": without_a_row}


def _lengths(trial: Trial, sizes: Sizes) -> Mapping[str, Any]:
    del trial
    return {"mask": Lengths(key=jnp.asarray([0, *[sizes.keys] * (sizes.batch - 1)]))}


MASKED: Mapping[str, Rule] = {
    "mask": lambda trial, s: {"mask": jnp.asarray(_but_one_row(s))},
    "mask known while tracing": lambda trial, s: {"mask": _but_one_row(s)},
    "causal": lambda trial, s: {"mask": Causal(), "query_positions": -((s.queries + 1) // 2)},
    "local": lambda trial, s: {"mask": Local(1, 1), "query_positions": s.keys - 1},
    "no key has any length": _lengths,
    "query lengths": lambda trial, s: {
        "mask": Lengths(query=np.full(s.batch, s.queries // 2, np.int32))
    },
    "segments": _segments,
}
EXCLUDED: Mapping[str, Rule] = {
    "bias of -inf": lambda trial, s: {"bias": _bias(trial, s)},
    "kernel": lambda trial, s: {"proximity": Window(1.0), "query_positions": s.keys - 1},
    "score of -inf": _score,
}


def _zero(trial: Trial, sizes: Sizes, rule: Rule, content: bool = True) -> None:
    trial.output_holds(trial.example(sizes, content=content, **rule(trial, sizes)), empty=True)


def _no_gradient(trial: Trial, sizes: Sizes, rule: Rule, content: bool = True) -> None:
    """Cotangents of ones reach the empty rows only: every gradient is exactly zero."""
    example = trial.example(sizes, content=content, **rule(trial, sizes))
    empty = np.logical_not(np.any(trial.reference(example).allowed, (1, 3)))
    bias = ("bias",) if "bias" in example.arguments else ()
    wrt = (*present(example), *bias)
    pull = trial.puller(example, wrt)
    cotangent = np.broadcast_to(empty[:, :, None, None], example.output_shape)
    _, gradients = pull(cotangent.astype(trial.dtype))
    for name in wrt:
        zero = np.zeros(np.shape(gradients[name]))
        trial.close(f"gradient of {name}", gradients[name], Bounded(zero, zero), example)
    # and what the other rows give is no NaN either
    cotangent = trial.normal(example.output_shape) * ~empty[:, :, None, None]
    cotangent = cotangent.astype(trial.dtype)
    _, gradients = pull(cotangent)
    # the reference differentiates a score by a central difference
    reference = trial.reference(example, 1e-8 if "score" in example.arguments else 0.0)
    trial.gradients_close(gradients, reference.pull(cotangent, wrt), example)


def _no_tangent(trial: Trial, sizes: Sizes, rule: Rule) -> None:
    """Whatever moves, the zero of an empty row stays."""
    example = trial.example(sizes, **rule(trial, sizes))
    names = present(example)
    moves = trial.example(sizes, seed=1)
    _, tangent = trial.pusher(example, names)({n: getattr(moves, n) for n in names})
    empty = ~trial.reference(example).seen
    zero = np.zeros(example.output_shape)
    got = np.where(empty, np.asarray(tangent, np.float64), 0)
    trial.close("tangent of a query without keys", got, Bounded(zero, zero), example)


def _empty_cases(body: Callable[..., None], rules: Mapping[str, Rule]) -> Iterator[Case]:
    least = Sizes(1, 2, 2, 1, 1, 1, 1)
    for name, rule in rules.items():
        # the batch axis must hold a second sequence where the first one is empty as a whole
        batch = 2 if name == "no key has any length" else 1
        yield case(name, body, rule, batch=2, least=_with(least, batch=batch))


def _with(sizes: Sizes, **changes: int) -> Sizes:
    return Sizes(**{**vars(sizes), **changes})


def _window_and_lengths(trial: Trial, sizes: Sizes) -> Mapping[str, Any]:
    return {"proximity": Window(2.0), **_lengths(trial, sizes)}


@check(1, "no keys: zero", "A query whose mask leaves it no key gives exactly zero.")
def _masked_rows() -> Iterator[Case]:
    yield from _empty_cases(_zero, MASKED)
    least = Sizes(2, 1, 1, 1, 1, 1, 1)
    yield case("without content", _zero, _window_and_lengths, False, queries=9, least=least)


@check(1, "no keys: no gradient", "Such a query sends exactly zero to query, key and value.")
def _masked_gradients() -> Iterator[Case]:
    yield from _empty_cases(_no_gradient, MASKED)
    least = Sizes(2, 1, 1, 1, 1, 1, 1)
    yield case("without content", _no_gradient, _window_and_lengths, False, queries=9, least=least)


@check(1, "no keys: no tangent", "In forward mode, too, what it gives stays zero.")
def _masked_tangents() -> Iterator[Case]:
    several = ("mask", "causal", "no key has any length")
    yield from _empty_cases(_no_tangent, {name: MASKED[name] for name in several})
    yield from _empty_cases(_no_tangent, {"bias of -inf": EXCLUDED["bias of -inf"]})


@check(1, "-inf: zero", "So does one whose keys a bias, a kernel or a score of -inf excludes.")
def _excluded_rows() -> Iterator[Case]:
    yield from _empty_cases(_zero, EXCLUDED)


@check(1, "-inf: no gradient", "And it sends zero, never NaN, also to the bias.")
def _excluded_gradients() -> Iterator[Case]:
    yield from _empty_cases(_no_gradient, EXCLUDED)


# NaN and inf behind masks

BAD = (np.nan, np.inf, -np.inf)


def _hidden(sizes: Sizes) -> int:
    """How many keys at the end no query sees."""
    return max(1, sizes.keys // 3)


def _first_keys(sizes: Sizes) -> np.ndarray:
    return np.arange(sizes.keys).reshape(1, 1, 1, -1) < sizes.keys - _hidden(sizes)


HIDDEN: Mapping[str, Rule] = {
    "lengths": lambda trial, s: {
        "mask": Lengths(key=jnp.full((s.batch,), s.keys - _hidden(s), jnp.int32))
    },
    "keys": lambda trial, s: {"mask": _first_keys(s)},
    "pairs": lambda trial, s: {
        "mask": jnp.asarray(_first_keys(s)) & np.ones((s.batch, 1, s.queries, 1), bool)
    },
    "causal and lengths": lambda trial, s: {"mask": Causal() & Lengths(key=s.keys - _hidden(s))},
}


def _halves(sizes: Sizes) -> Mapping[str, Any]:
    query, key = (
        (np.arange(length) >= length // 2).astype(np.int32)
        for length in (sizes.queries, sizes.keys)
    )
    return {"mask": Segments(query, key)}


PARTLY: Mapping[str, Rule] = {
    "segments": lambda trial, s: _halves(s),
    "causal": lambda trial, s: {"mask": Causal(), "query_positions": s.keys - s.queries},
    "local": lambda trial, s: {"mask": Local(1, 1)},
    "pairs": lambda trial, s: {
        "mask": jnp.asarray(np.tri(s.queries, s.keys, dtype=bool))[None, None]
    },
}


def _spoiled(example: Example, bad: float, keys: slice) -> Example:
    """Key and value with a bad entry in some keys, in the last channel."""
    changed = {}
    for name in present(example):
        array = getattr(example, name).copy()
        if name != "query":
            array[:, keys, :, -1] = bad
        changed[name] = array
    return example.changed(**changed)


class _Leak:
    """Which rows and keys a bad key may reach: rows that attend to it, and their other keys."""

    def __init__(self, reference: Reference, example: Example, keys: slice):
        group = example.shape[1] // example.value.shape[2]
        self.rows = np.swapaxes(np.any(reference.allowed[..., keys], -1), 1, 2)
        self.empty = ~reference.seen[..., 0]
        touched = (reference.allowed & np.swapaxes(self.rows, 1, 2)[..., None]).any(2)
        touched = touched.reshape(example.shape[0], -1, group, example.shape[3]).any(2)
        self.keys = np.swapaxes(touched, 1, 2)

    def of(self, name: str) -> np.ndarray:
        return self.rows | self.empty if name in ("query", "output") else self.keys


def _no_leak(
    trial: Trial, sizes: Sizes, rule: Rule, bad: float, last: bool, content: bool = True
) -> None:
    """Cotangents of the rows that see the bad key are zero, and what they touch is left out."""
    keys = slice(sizes.keys - _hidden(sizes), None) if last else slice(1)
    clean = trial.example(sizes, content=content, **rule(trial, sizes))
    dirty, reference = _spoiled(clean, bad, keys), trial.reference(clean)
    leak = _Leak(reference, clean, keys)
    cotangent = np.where(leak.rows[..., None], 0, trial.cotangent(reference)).astype(trial.dtype)
    output, gradients = trial.puller(dirty, present(dirty))(cotangent)
    _alike_elsewhere(trial, "output", output, reference.output, leak, dirty)
    for name, expected in reference.pull(cotangent, present(dirty)).items():
        _alike_elsewhere(trial, f"gradient of {name}", gradients[name], expected, leak, dirty)


def _alike_elsewhere(
    trial: Trial, what: str, got: Any, expected: Bounded, leak: _Leak, example: Example
) -> None:
    reached = leak.of(what.removeprefix("gradient of "))[..., None]
    got = np.where(reached, expected.value, np.asarray(got, np.float64))
    trial.close(f"{what}, with NaN or inf behind the mask,", got, expected, example)


def _no_leak_of_tangents(
    trial: Trial, sizes: Sizes, rule: Rule, bad: float, last: bool, content: bool = True
) -> None:
    keys = slice(sizes.keys - _hidden(sizes), None) if last else slice(1)
    clean = trial.example(sizes, content=content, **rule(trial, sizes))
    moves = trial.example(sizes, seed=1, content=content)
    names, reference = present(clean), trial.reference(clean)
    dirty, moved = _spoiled(clean, bad, keys), _spoiled(moves, bad, keys)
    _, tangent = trial.pusher(dirty, names)({n: getattr(moved, n) for n in names})
    expected = reference.push({n: getattr(moves, n) for n in names})
    leak = _Leak(reference, clean, keys)
    reached = leak.of("output")[..., None]
    got = np.where(reached, expected.value, np.asarray(tangent, np.float64))
    trial.close("tangent, with NaN or inf behind the mask,", got, expected, dirty)


def _reaches(trial: Trial, sizes: Sizes, rule: Rule, bad: float) -> None:
    example = trial.example(sizes, **rule(trial, sizes))
    keys = slice(1)
    leak = _Leak(trial.reference(example), example, keys)
    output = trial.output(_spoiled(example, bad, keys))
    hidden = leak.rows & np.isfinite(output[..., -1])
    if hidden.any():
        place = [int(axis) for axis in np.argwhere(hidden)[0]]
        raise Failure(
            "output of a query that may attend to a bad value",
            expected="NaN or inf",
            got=output[(*place, sizes.value_width - 1)],
            place=(*place, sizes.value_width - 1),
            example=example,
        )


def _smooth_lengths(trial: Trial, sizes: Sizes) -> Mapping[str, Any]:
    return {"proximity": Gaussian(2.0, reach=3), **HIDDEN["lengths"](trial, sizes)}


def _leak_cases(body: Callable[..., None]) -> Iterator[Case]:
    least = Sizes(1, 1, 2, 1, 1, 1, 1)
    bads = [*BAD, np.nan]
    for bad, (name, rule) in zip(bads, HIDDEN.items(), strict=True):
        yield case(f"{name}, {bad}", body, rule, bad, True, queries=9, least=least)
    yield case(
        "without content, nan",
        body,
        _smooth_lengths,
        np.nan,
        True,
        False,
        queries=9,
        least=least,
    )
    least = Sizes(1, 2, 2, 1, 1, 1, 1)
    yield case("shared heads, nan", body, PARTLY["causal"], np.nan, True, queries=9, heads=4)
    for bad, (name, rule) in zip(bads, PARTLY.items(), strict=True):
        last = name != "segments"
        yield case(f"{name}, {bad}", body, rule, bad, last, queries=9, least=least)


@check(
    2, "masked NaN", "NaN or inf in a key or value reaches no result or gradient behind the mask."
)
def _leaks() -> Iterator[Case]:
    yield from _leak_cases(_no_leak)


@check(2, "masked NaN: tangents", "Nor does it in forward mode, in primal or tangent.")
def _tangent_leaks() -> Iterator[Case]:
    yield from _leak_cases(_no_leak_of_tangents)


@check(2, "seen NaN", "It does reach the queries that may attend to it.")
def _reached() -> Iterator[Case]:
    for bad, name in zip(BAD, ("segments", "causal", "pairs"), strict=True):
        yield case(f"{name}, {bad}", _reaches, PARTLY[name], bad, queries=9)


# Late keys


def _holds(trial: Trial, sizes: Sizes, rule: Rule, content: bool = True) -> None:
    trial.holds(trial.example(sizes, content=content, **rule(trial, sizes)))


def _late(count: int) -> Rule:
    """A mask of the last keys."""
    return lambda trial, s: {
        "mask": np.arange(s.keys).reshape(1, 1, 1, -1) >= s.keys - min(count, s.keys)
    }


def _stripes(trial: Trial, sizes: Sizes) -> Mapping[str, Any]:
    """Blocks of 128 keys, seen and not seen in turn; which ones depends on the query."""
    del trial
    query, key = np.arange(sizes.queries)[:, None], np.arange(sizes.keys)[None]
    return {"mask": jnp.asarray((key // 128 + query) % 2 == 1)[None, None]}


@check(3, "late keys", "A row whose first block of keys is masked, and a later one not, is exact.")
def _late_keys() -> Iterator[Case]:
    few = {"batch": 1, "key_width": 4, "value_width": 4}
    yield case("the last 30 of 300", _holds, _late(30), queries=3, keys=300, **few)
    yield case("the last of 1000", _holds, _late(1), queries=3, keys=1000, **few)
    yield case("blocks in turn", _holds, _stripes, queries=5, keys=700, **few)
    yield case(
        "a window at the end, without content",
        _holds,
        lambda trial, s: {
            "mask": Local(1, 0),
            "query_positions": np.arange(s.queries) + s.keys - s.queries,
        },
        False,
        **few,
        queries=10,
        keys=300,
        least=Sizes(1, 1, 10, 1, 1, 1, 1),
    )


# Masks together


def _keep(trial: Trial, sizes: Sizes) -> np.ndarray:
    """[B, 1, 1, S], about half of the keys of each sequence."""
    return trial.normal((sizes.batch, 1, 1, sizes.keys), seed=2) < 0.2


TOGETHER: Mapping[str, Rule] = {
    "keys": lambda trial, s: {"mask": _keep(trial, s)},
    "keys and causal": lambda trial, s: {"mask": Causal() & _keep(trial, s)},
    "keys, causal and a window": lambda trial, s: {
        "mask": Causal() & _keep(trial, s) & Local(3, 1)
    },
    "keys or local": lambda trial, s: {"mask": jnp.asarray(_keep(trial, s)) | Local(1, 0)},
    "lengths and causal": lambda trial, s: {
        "mask": Causal() & Lengths(key=jnp.arange(2, 2 + s.batch, dtype=jnp.int32))
    },
    "heads": lambda trial, s: {
        "mask": trial.normal((1, s.heads, s.queries, 1), seed=3) < 0.5,
        "bias": trial.normal((1, s.heads, 1, s.keys)),
    },
}


@check(
    9,
    "masks together",
    "Masks [B, 1, 1, S], causal, windows and lengths apply together, with shared heads.",
)
def _together() -> Iterator[Case]:
    for name, rule in TOGETHER.items():
        yield case(name, _holds, rule)
        if "causal" in name:
            yield case(f"{name}, shared heads", _holds, rule, heads=4)


@check(9, "window alone", "A window that comes without another mask is applied.")
def _alone() -> Iterator[Case]:
    yield case("mask", _holds, lambda trial, s: {"mask": Local(2, 1)})
    yield case("kernel", _holds, lambda trial, s: {"proximity": Window(2.0)})
