"""What a benchmark is made of: cases, the contenders in each, and targets for their ratios."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Quantity = Literal["time", "temporary memory", "memory", "relative error"]


class Absent(Exception):
    """A contender can't take part here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled program, as the compiler states them.

    Attributes:
      temporary: beside arguments and results.
      total: arguments + results + temporaries - what these share.

    """

    temporary: int
    total: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A contender that is ready to run.

    Attributes:
      seconds: wall seconds of that many calls, one after the other.
      outputs: the results of one call.
      memory: None where nothing states it.

    """

    seconds: Callable[[int], float]
    outputs: Callable[[], Sequence[np.ndarray]]
    memory: Memory | None = None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to answer a case.

    Attributes:
      name: as tables show it.
      prepare: makes inputs and compiles; raises Absent where it can't take part.
      expected: the exact results; None if there is nothing to check.
      stride: which rows (axis 1 of every result) `expected` holds: each stride-th.
      run: False only compiles, for the memory that a run would need.

    """

    name: str
    prepare: Callable[[], Prepared]
    expected: Callable[[], Sequence[np.ndarray]] | None = None
    stride: int = 1
    run: bool = True


@dataclasses.dataclass(frozen=True)
class Target:
    """What a ratio of two contenders, or a quantity of one, should be.

    Attributes:
      quantity: what is compared.
      of: name of the contender above the line of the ratio.
      to: name of the one below it; None for the quantity of `of` itself, in bytes or as it is.
      at_least: the target; with neither limit the ratio is shown for information.
      at_most: likewise.
      goal: the number of the goal that this is part of.

    """

    quantity: Quantity
    of: str
    to: str | None = None
    at_least: float = -math.inf
    at_most: float = math.inf
    goal: str = ""

    @property
    def is_open(self) -> bool:
        """Whether no value could miss it."""
        return self.at_least == -math.inf and self.at_most == math.inf


@dataclasses.dataclass(frozen=True)
class Case:
    """One question, put to all its contenders.

    Attributes:
      name: unique in its suite; `--only` looks for a part of it.
      inputs: shapes, dtype and what else defines the question, in words.
      contenders: makes them, together with their inputs.
      targets: of their ratios.
      tolerance: the largest error of a right answer, relative to the largest entry of a result.
      rounds_factor: how many times the rounds of other cases this one gets.
      calls: in a sample, all of them timed; None: as many as make it long enough to time, after one
        that is not timed.
      flops: of one call, from which tables state TFLOP/s; None where nobody counts them.

    """

    name: str
    inputs: str
    contenders: Callable[[], Sequence[Contender]]
    targets: Sequence[Target] = ()
    tolerance: float = 0.0
    rounds_factor: int = 1
    calls: int | None = None
    flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases that are measured by one command.

    Attributes:
      meaning: what they are about, in a sentence.
      cases: makes them.
      platform: the JAX platform they need; None: any.
      rounds: unless the command says otherwise.

    """

    meaning: str
    cases: Callable[[], Sequence[Case]]
    platform: Literal["cpu", "gpu"] | None
    rounds: int = 5
