"""The suites by name, and the choice of cases by a part of theirs."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from experiments.benchmark import cpu, gpu, lanes, layers, proximity, training
from experiments.benchmark.case import Case, Suite
from experiments.options import UserError

SUITES: Mapping[str, Suite] = {
    "cpu": Suite("Attention with content, float32, on a CPU", cpu.cases, "cpu"),
    "proximity": Suite("Attention by distance alone, float32, on a CPU", proximity.cases, "cpu"),
    "gpu": Suite("Attention with content, bfloat16, on a GPU", gpu.cases, "gpu"),
    "training": Suite("A training step of a language model, float32", training.cases, None),
    "layers": Suite("A layer's cost by the length of the sequence", layers.cases, None),
    "lanes": Suite("Training several seeds in one vmapped step", lanes.cases, None, rounds=3),
}


def find(name: str) -> Suite:
    """The suite of that name.

    Raises:
      UserError: there is none; names the nearest.

    """
    if name not in SUITES:
        raise UserError(
            f"there is no suite {name!r}: did you mean {_nearest(name, SUITES)!r}? "
            f"Suites are {', '.join(SUITES)}"
        )
    return SUITES[name]


def chosen(cases: Sequence[Case], part: str) -> list[Case]:
    """The cases whose names contain `part`; all of them if it is empty.

    Raises:
      UserError: none does; names the nearest.

    """
    found = [case for case in cases if part in case.name]
    if not found:
        names = [case.name for case in cases]
        raise UserError(
            f"no case has {part!r} in its name: did you mean {_nearest(part, names)!r}? "
            f"Cases are: {'; '.join(names)}"
        )
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
