"""Checks 5, 6, 7 and 15: lengths, positions, heads and widths, windows."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from attn_jax.ops.masks import Causal, Local
from attn_jax.ops.proximity import Gaussian, Window
from attn_jax.testing.check import Case, case, check
from attn_jax.testing.example import Sizes
from attn_jax.testing.trial import Trial

# Every length of the list on both axes, in every order of size.
LENGTHS = [(0, 0), (0, 7), (7, 0), (1, 1), (2, 7), (7, 2), (63, 65), (64, 64), (65, 127)]
LENGTHS += [(127, 63), (128, 129), (129, 64), (1000, 2), (1, 1000), (1000, 1000)]
WIDTHS = (1, 8, 24, 48, 64, 80, 96, 112, 128, 192, 256)


def _holds(trial: Trial, sizes: Sizes) -> None:
    """Without any key the result is zero."""
    trial.holds(trial.example(sizes), empty=sizes.keys == 0)


def _output(trial: Trial, sizes: Sizes) -> None:
    trial.output_holds(trial.example(sizes))


def _smooth(trial: Trial, sizes: Sizes) -> None:
    trial.holds(
        trial.example(
            sizes, content=False, proximity=Window(2.0), query_positions=np.arange(sizes.queries)
        )
    )


@check(
    5,
    "any lengths",
    "T and S of 0, 1, 2, 7, 63 to 65, 127, 129 and 1000, equal or not; S = 0: zeros.",
)
def _lengths() -> Iterator[Case]:
    few = {"batch": 1, "heads": 1, "key_heads": 1, "key_width": 3, "value_width": 3}
    for queries, keys in LENGTHS:
        yield case(f"T={queries}, S={keys}", _holds, queries=queries, keys=keys, **few)
    for queries, keys in LENGTHS[::3]:
        yield case(f"T={queries}, S={keys}, no content", _smooth, queries=queries, keys=keys, **few)


# Positions

OFFSETS: Mapping[str, Callable[[Sizes], Any]] = {
    "top left": lambda s: None,
    "bottom right": lambda s: s.keys - s.queries,
    "before all keys": lambda s: -s.queries + 2,
    "after all keys": lambda s: s.keys + 11,
    "an offset of data": lambda s: jnp.asarray(2),
}
POSITIONS: Mapping[str, Callable[[Sizes], Any]] = {
    **OFFSETS,
    "any order": lambda s: np.random.default_rng(0).permutation(2 * s.queries)[: s.queries] - 2,
    "between keys": lambda s: jnp.linspace(-1.5, 1.5 * s.keys, s.queries),
    "of each sequence": lambda s: jnp.asarray(
        np.arange(s.queries) * np.arange(1, s.batch + 1)[:, None]
    ),
}


def _placed(
    trial: Trial, sizes: Sizes, positions: Callable[[Sizes], Any], content: bool = True
) -> None:
    """Queries after all keys leave a Gaussian far from its peak, but exact."""
    trial.holds(
        trial.example(
            sizes,
            content=content,
            proximity=Gaussian(2.0, -1.0) if content else Window(2.0),
            mask=Causal(),
            query_positions=positions(sizes),
            key_positions=None if content else 1,
        )
    )


def _empty_rows(trial: Trial, sizes: Sizes) -> None:
    offset = sizes.keys - sizes.queries
    trial.holds(trial.example(sizes, mask=Causal(), query_positions=offset))


@check(
    6, "positions", "Positions align queries and keys: top left, bottom right, any offset or order."
)
def _positions() -> Iterator[Case]:
    yield case("more queries than keys", _empty_rows, queries=9, keys=4)
    for name, positions in POSITIONS.items():
        yield case(name, _placed, positions)
    for name, positions in OFFSETS.items():
        if name != "an offset of data":
            yield case(f"{name}, without content", _placed, positions, False, queries=9)


# Heads and widths


@check(
    7, "shared heads", "Query heads share key/value heads in groups, whose gradients are summed."
)
def _groups() -> Iterator[Case]:
    for heads, key_heads in ((4, 4), (4, 2), (4, 1), (6, 3)):
        yield case(f"N={heads}, K={key_heads}", _holds, heads=heads, key_heads=key_heads)


@check(7, "any width", "Key widths of 1 to 256 give exact results.")
def _widths() -> Iterator[Case]:
    for width in WIDTHS:
        yield case(
            f"H=D={width}",
            _output,
            queries=3,
            keys=4,
            key_width=width,
            value_width=width,
            heads=1,
            key_heads=1,
        )


@check(7, "two widths", "Values may be wider or narrower than keys.")
def _two_widths() -> Iterator[Case]:
    for key_width, value_width in ((8, 5), (1, 64), (128, 24)):
        yield case(
            f"H={key_width}, D={value_width}", _holds, key_width=key_width, value_width=value_width
        )


# Windows

ENDS = ((0, 0), (2, 1), (0, 3), (8, 8), (50, 0), (99, 99))


def _window(trial: Trial, sizes: Sizes, mask: Callable[[Sizes], Local], content: bool) -> None:
    trial.output_holds(trial.example(sizes, content=content, mask=mask(sizes)))


def _radius(trial: Trial, sizes: Sizes, radius: Any) -> None:
    trial.output_holds(trial.example(sizes, content=False, proximity=Window(radius)))


def _fixed(before: int, after: int) -> Callable[[Sizes], Local]:
    return lambda sizes: Local(before, after)


@check(
    15, "windows", "A window is [i - before, i + after], cut off at the ends; also 0 and beyond S."
)
def _windows() -> Iterator[Case]:
    for before, after in ENDS:
        if (before, after) in ENDS[::2]:
            yield case(f"({before}, {after})", _window, _fixed(before, after), True, queries=9)
        yield case(
            f"({before}, {after}), without content",
            _window,
            _fixed(before, after),
            False,
            queries=9,
        )
    yield case(
        "of each sequence",
        _window,
        lambda s: Local(jnp.arange(1, s.batch + 1), jnp.asarray(0)),
        True,
    )
    for radius in (0.0, 2.0, 50.0):
        yield case(f"kernel of radius {radius:g}", _radius, radius, queries=9)
    long = {"batch": 1, "queries": 600, "keys": 600, "heads": 1, "key_heads": 1}
    long |= {"key_width": 4, "value_width": 4}
    yield case("(64, 3) of 600", _long_window, True, **long)
    yield case("(64, 3) of 600, without content", _long_window, False, **long)


def _long_window(trial: Trial, sizes: Sizes, content: bool) -> None:
    trial.holds(trial.example(sizes, content=content, mask=Local(64, 3)))
