"""Checks: what an attention function must do, each with its cases."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from attn_jax.testing.example import Sizes
from attn_jax.testing.subject import NotSupported
from attn_jax.testing.trial import Trial

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Where the reference of a derivative is a finite difference, or errors of several layers add up.
FULL = ("float32", "float64")

_ONE = Sizes(1, 1, 1, 1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, or a few, with one question.

    Attributes:
      name: what sets it apart from the check's other cases.
      body: raises AssertionError if the subject is wrong, NotSupported if it can't say.
      sizes: of the arrays; a failing case is tried again with smaller ones.
      least: the smallest with which the case still asks its question.

    """

    name: str
    body: Callable[[Trial, Sizes], None]
    sizes: Sizes = Sizes()  # noqa: RUF009 (frozen)
    least: Sizes = _ONE

    def __call__(self, trial: Trial, sizes: Sizes | None = None) -> None:
        """Run it. float64 is enabled just for trials in float64."""
        try:
            with jax.enable_x64(trial.dtype == "float64"):
                self.body(trial, self.sizes if sizes is None else sizes)
        except (TypeError, ValueError) as error:
            missing = _missing_derivative(str(error))
            if missing is None:
                raise
            raise NotSupported(missing) from error


@dataclasses.dataclass(frozen=True)
class Check:
    """A demand.

    Attributes:
      number: in the list of docs/conformance.md.
      name: a few words.
      demand: one sentence.
      make: yields the cases, the smallest first.
      dtypes: in which it is asked.

    """

    number: int
    name: str
    demand: str
    make: Callable[[], Iterator[Case]]
    dtypes: tuple[str, ...] = DTYPES

    def cases(self) -> tuple[Case, ...]:
        """Its cases."""
        return tuple(self.make())


def _missing_derivative(message: str) -> str | None:
    """What JAX says of a derivative rule that is not there, which is no wrong result."""
    if "forward-mode" in message and "custom_vjp" in message:
        return "it has no forward mode: its derivative rule is for reverse mode only"
    if "does not support reverse-mode" in message:
        return "its derivative has no reverse mode"
    return None


CHECKS: list[Check] = []


def check(
    number: int, name: str, demand: str, dtypes: tuple[str, ...] = DTYPES
) -> Callable[[Callable[..., Iterator[Case]]], Callable[..., Iterator[Case]]]:
    """Enter a generator of cases into CHECKS."""

    def enter(make: Callable[..., Iterator[Case]]) -> Callable[..., Iterator[Case]]:
        CHECKS.append(Check(number, name, demand, make, dtypes))
        return make

    return enter


def case(name: str, body: Callable[..., None], *arguments: Any, **sizes: Any) -> Case:
    """A case of a body that takes trial, sizes and further arguments.

    `sizes` are those that differ from the default; `least` is a `Sizes` or None.
    """
    least = sizes.pop("least", None) or _ONE
    bound = functools.partial(_bound, body, arguments)
    return Case(name, bound, Sizes(**sizes), least)


def _bound(body: Callable[..., None], arguments: tuple[Any, ...], trial: Trial, sizes: Sizes):
    return body(trial, sizes, *arguments)


def need(condition: bool, reason: str) -> None:
    """Leave a case that asks nothing here.

    Raises:
      NotSupported: with the reason.

    """
    if not condition:
        raise NotSupported(reason)
