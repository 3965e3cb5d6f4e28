"""Check 16: reweighing by distance alone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.ops import proximity
from attn_jax.ops.masks import Causal, Lengths, Local, Segments
from attn_jax.ops.proximity import Epanechnikov, Exponential, Gaussian, PowerLaw, Table, Window
from attn_jax.testing.check import Case, case, check
from attn_jax.testing.example import Sizes
from attn_jax.testing.trial import Trial

LONG = {"batch": 1, "queries": 260, "keys": 260, "heads": 2, "key_heads": 2, "value_width": 3}
SHORT = {**LONG, "queries": 140, "keys": 140}

RULES: Mapping[str, Callable[[Sizes], Mapping[str, Any]]] = {
    "gaussian": lambda s: {"proximity": Gaussian(2.0)},
    "gaussian per head": lambda s: {
        "proximity": Gaussian(
            tuple(0.5 + 5.5 * n for n in range(s.key_heads)),
            tuple(4.0 * n - 1 for n in range(s.key_heads)),
        )
    },
    "wide gaussian": lambda s: {"proximity": Gaussian(40.0)},
    "exponential": lambda s: {"proximity": Exponential(1.5)},
    "long exponential": lambda s: {"proximity": Exponential(60.0), "mask": Causal()},
    "window wider than a block": lambda s: {"proximity": Window(140.0)},
    "triangular, causal": lambda s: {"proximity": proximity.Triangular(20.0), "mask": Causal()},
    "epanechnikov": lambda s: {"proximity": Epanechnikov(33.5)},
    "power law": lambda s: {"proximity": PowerLaw(1.0)},
    "power law with a reach": lambda s: {"proximity": PowerLaw(1.0, reach=7)},
    "table": lambda s: {"proximity": Table(np.linspace(-1, 1, 9).astype(np.float32) ** 2)},
    "lengths": lambda s: {
        "proximity": Gaussian(2.0),
        "mask": Lengths(np.asarray([s.queries - 10]), np.asarray([s.keys // 3])),
    },
    "local and causal": lambda s: {"mask": Local(5, 2) & Causal()},
    "offset": lambda s: {"proximity": Gaussian(3.0), "query_positions": -20},
    "not normalised": lambda s: {"proximity": Gaussian(3.0), "normalizer": "none"},
    "softmax_one": lambda s: {"proximity": Window(3.0), "normalizer": "softmax_one"},
    "segments": lambda s: {
        "proximity": Gaussian(4.0),
        "mask": Segments(np.arange(s.keys) // max(1, s.keys // 3)),
    },
    "uniform": lambda s: {"mask": Causal()},
}
# Parameters as arrays: an implementation can't see how far they reach.
TRACED = ("gaussian per head", "long exponential", "power law", "window wider than a block")


def _rule(trial: Trial, sizes: Sizes, name: str) -> None:
    trial.holds(trial.example(sizes, content=False, **RULES[name](sizes)))


def _traced(trial: Trial, sizes: Sizes, name: str) -> None:
    rule = dict(RULES[name](sizes))
    rule["proximity"] = jax.tree.map(lambda x: jnp.asarray(x, trial.wide), rule["proximity"])
    trial.holds(trial.example(sizes, content=False, **rule))


@check(16, "distance alone", "Content-free attention is its matrix of weights times the values.")
def _distance() -> Iterator[Case]:
    for name in RULES:
        yield case(name, _rule, name, **LONG)
    for name in TRACED:
        yield case(f"{name}, traced", _traced, name, **LONG)


# Closed forms


def _constant(trial: Trial, sizes: Sizes, name: str, level: float) -> None:
    example = trial.example(sizes, content=False, **RULES[name](sizes))
    trial.output_holds(example.changed(value=np.full_like(example.value, level)))


def _raised(trial: Trial, sizes: Sizes, name: str) -> None:
    """Values of mean 1e4 (100 in float16, which holds 65504) and deviations that remain."""
    example = trial.example(sizes, content=False, **RULES[name](sizes))
    mean = 100 if trial.dtype == "float16" else 1e4
    value = (np.asarray(example.value, np.float64) + mean).astype(trial.dtype)
    trial.output_holds(example.changed(value=value))


@check(16, "constants", "Constant values stay constant, and a mean of 1e4 costs no precision.")
def _constants() -> Iterator[Case]:
    for name in ("gaussian", "long exponential", "triangular, causal", "window wider than a block"):
        yield case(f"{name}, ones", _constant, name, 1.0, **SHORT)
        yield case(f"{name}, 1e4", _constant, name, 1e4, **SHORT)
        yield case(f"{name}, mean 1e4", _raised, name, **SHORT)


def _width(trial: Trial, sizes: Sizes, width: float, traced: bool) -> None:
    given = jnp.asarray(width, trial.wide) if traced else width
    trial.holds(trial.example(sizes, content=False, proximity=Gaussian(given)))


def _at_zero(trial: Trial, sizes: Sizes) -> None:
    """The key itself has weight (1 + 0)^-p = 1, and no derivative there is NaN."""
    kernel = PowerLaw(np.asarray(2.0, trial.wide), reach=0)
    trial.holds(trial.example(sizes, content=False, proximity=kernel), ("proximity", "value"), 1e-8)


def _far(trial: Trial, sizes: Sizes, traced: bool) -> None:
    """The nearest key is a hundred widths away from the last queries: weights underflow."""
    width = jnp.asarray(2.0, trial.wide) if traced else 2.0
    mask = Lengths(key=jnp.asarray([sizes.keys // 3] * sizes.batch))
    trial.holds(trial.example(sizes, content=False, proximity=Gaussian(width), mask=mask))


def _reciprocal(trial: Trial, sizes: Sizes) -> None:
    """softmax(-log(1 + d)) is 1 / (1 + d), normalised: a zero query with that bias."""
    distance = abs(np.arange(sizes.keys) - np.arange(sizes.queries)[:, None])
    example = trial.example(sizes, bias=-np.log1p(distance)[None, None].astype(trial.dtype))
    trial.output_holds(example.changed(query=np.zeros_like(example.query)))


@check(16, "limits", "Width to 0 is the identity, far above S the mean; far rows stay exact.")
def _limits() -> Iterator[Case]:
    for width in (1e-3, 1e5):
        yield case(f"width {width:g}", _width, width, False, **SHORT)
        yield case(f"width {width:g}, traced", _width, width, True, **SHORT)
    yield case("power law at 0", _at_zero, queries=9)
    yield case("far from every key", _far, False, **LONG)
    yield case("far from every key, traced", _far, True, **LONG)
    yield case("reciprocal distance by a bias", _reciprocal)


def _segments(trial: Trial, sizes: Sizes, content: bool) -> None:
    """Packed sequences give what each gives alone, NaN in one of them or not."""
    half = sizes.keys // 2
    segments = (np.arange(sizes.keys) >= half).astype(np.int32)
    rule = {"proximity": Gaussian(2.0), "mask": Segments(segments)}
    example = trial.example(sizes, content=content, **rule)
    packed = trial.output(example)
    for part in (slice(0, half), slice(half, None)):
        arrays = {
            name: None if getattr(example, name) is None else getattr(example, name)[:, part]
            for name in ("query", "key", "value")
        }
        alone = example.changed(**arrays, mask=None)
        expected = trial.reference(alone).output
        trial.close("packed segment", packed[:, part], expected, example)


@check(16, "segments", "Packed segments never bleed: each gives what it gives alone.")
def _packed() -> Iterator[Case]:
    yield case("content", _segments, True, queries=9, least=Sizes(1, 9, 9, 1, 1, 1, 1))
    yield case("without content", _segments, False, queries=9)
