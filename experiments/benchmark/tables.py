"""Tables of a report: what was measured, and what was to be reached. Text and markdown."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Rows = list[tuple[str, ...]]

MEASURED = ("case", "contender", "ms", "least to most", "temporary MB", "error", "remark")
REACHED = ("goal", "case", "quantity", "target", "value", "least to most", "verdict")


def measured(report: Report) -> Rows:
    """One row a contender: median and range of its times, memory, error, and remarks."""
    rows: Rows = [MEASURED]
    for case in report["cases"]:
        rows += [_measured_row(case, record) for record in case["contenders"]]
    return rows


def _measured_row(case: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, ...]:
    milliseconds = sorted(1e3 * seconds for seconds in record["seconds"])
    memory = record.get("memory")
    return (
        case["name"],
        record["name"],
        digits(statistics.median(milliseconds)) if milliseconds else "-",
        _range(milliseconds),
        digits(memory["temporary"] / 1e6) if memory else "-",
        f"{record['error']:.1e}" if record.get("error") is not None else "-",
        "; ".join(_remarks(case, record)),
    )


def _remarks(case: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    if record["wrong"]:
        yield f"WRONG: relative error above {case['tolerance']:g}"
    if record["skipped"]:
        yield record["skipped"]
    if case["flops"] and record["seconds"]:
        yield f"{digits(case['flops'] / statistics.median(record['seconds']) / 1e12)} TFLOP/s"


def reached(report: Report) -> Rows:
    """One row a target: what is compared, the target, the value and the verdict."""
    rows: Rows = [REACHED]
    for case in report["cases"]:
        rows += [_reached_row(case, target) for target in case["targets"]]
    return rows


def _reached_row(case: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[str, ...]:
    value = target["value"]
    return (
        target["goal"] or "-",
        case["name"],
        compared(target),
        limit(target) or "-",
        quantity(target, value["median"]) if value else "-",
        _range([value["least"], value["most"]] if value else []),
        target["verdict"] or "-",
    )


def compared(target: Mapping[str, Any]) -> str:
    """What a target compares: `jax.nn / attn_jax, time`."""
    names = target["of"] if target["to"] is None else f"{target['of']} / {target['to']}"
    return f"{names}, {target['quantity']}"


def limit(target: Mapping[str, Any]) -> str:
    """The limits of a target in words; empty where it has none."""
    limits = (("at least", target["at_least"]), ("at most", target["at_most"]))
    return ", ".join(f"{word} {quantity(target, x)}" for word, x in limits if x is not None)


def quantity(target: Mapping[str, Any], value: float) -> str:
    """A value of a target with its unit: ratios have none, memory is in MB."""
    if target["to"] is None and "memory" in target["quantity"]:
        return f"{digits(value / 1e6)} MB"
    return f"{value:.1e}" if target["quantity"] == "relative error" else digits(value)


def digits(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(ordered: Sequence[float]) -> str:
    """From the first to the last; nothing where there is one value only."""
    if not ordered or ordered[0] == ordered[-1]:
        return "-"
    return f"{digits(ordered[0])} to {digits(ordered[-1])}"
