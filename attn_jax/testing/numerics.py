"""Check 4: large, narrow and wide numbers."""

from collections.abc import Iterator

import numpy as np

from attn_jax.ops.proximity import Gaussian, Window
from attn_jax.testing.check import Case, case, check, need
from attn_jax.testing.example import Example, Sizes
from attn_jax.testing.reference import FACTOR
from attn_jax.testing.trial import Trial


def _huge(trial: Trial, sizes: Sizes, level: float) -> None:
    """Queries of whole numbers times `level`: logits are its multiples, without rounding."""
    example = trial.example(sizes)
    assert example.query is not None
    assert example.key is not None
    width = sizes.key_width**0.5
    query = (np.round(example.query.astype(np.float64)) * level * width).astype(trial.dtype)
    key = np.round(example.key.astype(np.float64)).astype(trial.dtype)
    trial.holds(example.changed(query=query, key=key))


def _outlier(trial: Trial, sizes: Sizes) -> None:
    example = trial.example(sizes)
    assert example.key is not None
    key = example.key.copy()
    key[:, sizes.keys // 3] = 1e4
    trial.holds(example.changed(query=np.ones_like(example.query), key=key))


def _constant(trial: Trial, sizes: Sizes, level: float) -> None:
    example = trial.example(sizes)
    bias = np.full((1, 1, 1, 1), level, trial.dtype)
    trial.holds(example.changed(query=np.zeros_like(example.query), bias=bias))


@check(4, "extreme logits", "Logits of +-1e4, one huge outlier and constant rows are exact.")
def _extreme() -> Iterator[Case]:
    for level in (1e4, -1e4):
        # width 4: in float16 no product exceeds what it holds
        yield case(f"logits of {level:g}", _huge, level, key_width=4, value_width=4)
    yield case("one outlier", _outlier)
    for level in (0.0, 1e4, -1e4):
        yield case(f"a constant row of {level:g}", _constant, level)


def _many_values(trial: Trial, sizes: Sizes, content: bool) -> None:
    """Ones, of which each gets the weight 1 / S: a narrow sum stalls far from one.

    Equal terms are all rounded alike: a wide sum, too, may be off by half an eps a term.
    """
    rule = {"proximity": Window(3e3), "query_positions": np.arange(sizes.queries)}
    example = trial.example(sizes, content=content, **({} if content else rule))
    query = None if example.query is None else np.zeros_like(example.query)
    least = sizes.keys * trial.precision.logit / (2 * FACTOR)
    trial.output_holds(example.changed(query=query, value=np.ones_like(example.value)), least)


def _many_channels(trial: Trial, sizes: Sizes) -> None:
    """A product of ones stalls at 2 / eps, and then two different keys look alike."""
    width = sizes.key_width
    # a dtype that does not stall within this width sees the second key half as long
    stalled = min(int(2 / trial.precision.value) + width // 60, width // 2 + width % 2)
    example = trial.example(sizes)
    key = np.ones_like(example.key)
    key[:, 1:, :, stalled:] = 0
    trial.output_holds(example.changed(query=np.ones_like(example.query), key=key))


def _many_queries(trial: Trial, sizes: Sizes) -> None:
    """The gradient of a value sums over all queries."""
    trial.holds(trial.example(sizes, mask=np.ones((1, 1, 1, sizes.keys), bool)), ("value",))


@check(4, "wide sums", "Half precision is summed in float32: thousands of terms do not stall.")
def _wide_sums() -> Iterator[Case]:
    one = {"batch": 1, "heads": 1, "key_heads": 1}
    few = {**one, "queries": 2, "key_width": 1, "value_width": 1}
    yield case("values", _many_values, True, **few, keys=3000)
    yield case("values without content", _many_values, False, **few, keys=3000)
    least = Sizes(1, 1, 2, 1, 1, 3000, 1)
    yield case(
        "channels",
        _many_channels,
        **one,
        queries=1,
        keys=2,
        key_width=3000,
        value_width=3000,
        least=least,
    )
    yield case("queries", _many_queries, **{**few, "queries": 3000}, keys=2)


def _rounded(trial: Trial, sizes: Sizes) -> None:
    trial.holds(trial.example(sizes))


def _smooth(trial: Trial, sizes: Sizes) -> None:
    trial.holds(trial.example(sizes, content=False, proximity=Gaussian(2.0, reach=4)))


def _mixed(trial: Trial, sizes: Sizes) -> None:
    """Content in the wide dtype, values in this one: the result is of the values' dtype."""
    need(trial.subject.ours, "it takes arrays of one dtype")
    example = trial.example(sizes)
    wide = Example(
        np.asarray(example.query, trial.wide),
        np.asarray(example.key, trial.wide),
        example.value,
        {},
    )
    trial.output_holds(wide)


@check(4, "dtype", "Results have the values' dtype and its precision: float64 stays float64.")
def _dtypes() -> Iterator[Case]:
    yield case("content", _rounded, keys=200)
    yield case("without content", _smooth, queries=60, keys=60)
    yield case("content in a wider dtype", _mixed)
