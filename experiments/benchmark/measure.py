"""Measures cases: answers are checked, then timed in interleaved rounds, then compared."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmark.case import Absent, Case, Contender, Prepared, Target
from experiments.benchmark.machine import place_threads

LEAST_SECONDS = 0.1
"""Of a sample: calls are repeated until it is that long."""

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


def measure(case: Case, rounds: int, available_bytes: float, progress: Progress) -> Record:
    """Runs a case; returns what goes into the report's JSON.

    A contender that is absent, would not fit into memory, or fails is skipped with its reason; one
    whose answer is off is marked wrong.
    """
    contenders = case.contenders()
    records: dict[str, Record] = {}
    samples: dict[str, Callable[[], float]] = {}
    for number, contender in enumerate(contenders):
        progress(f"{case.name}: compile and check", number, len(contenders))
        record, prepared = _prepared(contender, case, available_bytes)
        records[contender.name] = record
        if prepared is not None:
            record["calls"] = case.calls or _enough_calls(prepared)
            samples[contender.name] = _sampler(
                prepared, record["calls"], warm_up=case.calls is None
            )
    progress(f"{case.name}: compile and check", len(contenders), len(contenders))
    place_threads()
    times = interleaved(
        samples,
        rounds * case.rounds_factor,
        lambda done, total: progress(f"{case.name}: rounds", done, total),
    )
    for name, seconds in times.items():
        records[name]["seconds"] = seconds
    return {
        "name": case.name,
        "inputs": case.inputs,
        "tolerance": case.tolerance,
        "flops": case.flops,
        "contenders": list(records.values()),
        "targets": [judged(target, records) for target in case.targets],
    }


def _prepared(
    contender: Contender, case: Case, available_bytes: float
) -> tuple[Record, Prepared | None]:
    """A contender's record and, if it is to be timed, the contender."""
    record: Record = {"name": contender.name, "skipped": None, "wrong": False, "seconds": []}
    try:
        prepared = contender.prepare()
        if prepared.memory is not None:
            record["memory"] = dataclasses.asdict(prepared.memory)
        if not contender.run:
            return record | {"skipped": "only compiled"}, None
        if prepared.memory is not None and prepared.memory.total > available_bytes:
            need, there = prepared.memory.total / 1e9, available_bytes / 1e9
            return record | {"skipped": f"needs {need:.3g} GB, {there:.3g} GB may be taken"}, None
        if contender.expected is not None:
            record |= compared(
                _rows(prepared.outputs(), contender.stride), contender.expected(), case.tolerance
            )
        return record, prepared
    except Absent as reason:
        return record | {"skipped": str(reason)}, None
    except Exception as error:  # a peer may fail in any way: that ends its row, not the run
        return record | {"skipped": f"failed: {first_line(error)}", "failed": True}, None


def _rows(results: Sequence[np.ndarray], stride: int) -> Sequence[np.ndarray]:
    return results if stride == 1 else [array[:, ::stride] for array in results]


def first_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]


def compared(
    got: Sequence[np.ndarray], exact: Sequence[np.ndarray], tolerance: float
) -> dict[str, Any]:
    """The largest error of any result, absolute and relative to that result's largest entry."""
    if [array.shape for array in got] != [array.shape for array in exact]:
        return {"wrong": True, "error": None, "relative_error": None}
    errors = [float(np.max(abs(a - b))) for a, b in zip(got, exact, strict=True)]
    sizes = [float(np.max(abs(array))) for array in exact]
    relative = [e / size if size else e for e, size in zip(errors, sizes, strict=True)]
    # Python's max would lose a NaN.
    error, worst = float(np.max(errors)), float(np.max(relative))
    finite = math.isfinite(worst)
    return {
        "wrong": not worst <= tolerance,
        "error": error if finite else None,
        "relative_error": worst if finite else None,
    }


def _enough_calls(prepared: Prepared) -> int:
    """How many calls make a sample long enough; the first of several may be a slow one."""
    calls = 1
    for _ in range(2):
        each = prepared.seconds(calls) / calls
        calls = max(1, math.ceil(LEAST_SECONDS / max(each, 1e-9)))
        if calls == 1:
            break
    return calls


def _sampler(prepared: Prepared, calls: int, *, warm_up: bool) -> Callable[[], float]:
    def sample() -> float:
        if warm_up:  # a first call starts with the caches and the heap of another contender
            prepared.seconds(1)
        return prepared.seconds(calls) / calls

    return sample


def interleaved(
    samples: Mapping[str, Callable[[], float]],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round.

    Each round times every contender once, so that a machine that slows down slows all of them; the
    order moves on by one a round, so that none always follows the same other.
    """
    names = list(samples)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds if names else 0):
        progress(number, rounds)
        start = number % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(samples[name]())
    if names:
        progress(rounds, rounds)
    return times


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the ratios of the rounds."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def judged(target: Target, records: Mapping[str, Record]) -> Record:
    """A target with its value and verdict: met, missed, or why there is none.

    Raises:
      KeyError: it names a contender that the case has not.

    """
    involved = [records[name] for name in (target.of, target.to) if name is not None]
    result: Record = {
        "goal": target.goal,
        "quantity": target.quantity,
        "of": target.of,
        "to": target.to,
        "at_least": target.at_least if math.isfinite(target.at_least) else None,
        "at_most": target.at_most if math.isfinite(target.at_most) else None,
        "value": None,
    }
    values = [_values(record, target.quantity) for record in involved]
    unknown = [r["name"] for r, value in zip(involved, values, strict=True) if not value]
    if unknown:
        return result | {"verdict": f"none: {' and '.join(unknown)} not measured"}
    if target.to is None:
        result["value"] = dict.fromkeys(("median", "least", "most"), statistics.median(values[0]))
    else:
        result["value"] = ratio(*values)
    wrong = [record["name"] for record in involved if record["wrong"]]
    if wrong:
        return result | {"verdict": f"none: {' and '.join(wrong)} wrong"}
    if target.is_open:
        return result | {"verdict": ""}
    met = target.at_least <= result["value"]["median"] <= target.at_most
    return result | {"verdict": "met" if met else "missed"}


def _values(record: Record, quantity: str) -> list[float]:
    """What a record holds of a quantity: one number a round, or one; none if it is not known."""
    if quantity == "time":
        return record["seconds"]
    if quantity == "relative error":
        known = record.get("relative_error")
    else:
        key = "temporary" if quantity == "temporary memory" else "total"
        known = record.get("memory", {}).get(key)
    if known is None:
        return []
    return [known if quantity == "relative error" else max(known, 1)]  # 0 bytes divide nothing
