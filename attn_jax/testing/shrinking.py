"""A failing case with smaller arrays."""

import dataclasses
from collections.abc import Iterator

from attn_jax.testing.check import Case
from attn_jax.testing.example import Sizes
from attn_jax.testing.subject import NotSupported
from attn_jax.testing.trial import Failure, Trial

# Every attempt is compiled: a few seconds in all.
ATTEMPTS = 25


def smallest(case: Case, trial: Trial, found: AssertionError) -> AssertionError:
    """The failure at the smallest sizes that still fail, one axis after the other."""
    sizes, left = case.sizes, ATTEMPTS
    improved = isinstance(found, Failure)
    while improved and left > 0:
        improved = False
        for smaller in _smaller(sizes, case.least):
            if left <= 0:
                break
            left -= 1
            failure = _fails(case, trial, smaller)
            if failure is not None and failure.what == getattr(found, "what", None):
                sizes, found, improved = smaller, failure, True
                break
    return found


def _fails(case: Case, trial: Trial, sizes: Sizes) -> Failure | None:
    """The failure at these sizes. Sizes that the case can't have are no failure."""
    try:
        case(trial, sizes)
    except Failure as failure:
        return failure
    except (NotSupported, ValueError, IndexError, ZeroDivisionError, AssertionError):
        return None
    return None


def _smaller(sizes: Sizes, least: Sizes) -> Iterator[Sizes]:
    """Sizes with one axis at its least, at half or one less; heads and lengths also in pairs."""
    pairs = (("heads", "key_heads"), ("queries", "keys"), ("key_width", "value_width"))
    axes = [(field.name,) for field in dataclasses.fields(Sizes)]
    for group in (*pairs, *axes):
        for shrink in (lambda n, low: low, lambda n, low: n // 2, lambda n, low: n - 1):
            changes = {
                axis: max(shrink(getattr(sizes, axis), getattr(least, axis)), getattr(least, axis))
                for axis in group
            }
            smaller = dataclasses.replace(sizes, **changes)
            if smaller.total < sizes.total and _possible(smaller):
                yield smaller


def _possible(sizes: Sizes) -> bool:
    return sizes.key_heads > 0 and sizes.heads % sizes.key_heads == 0
