"""Numbers as text, tables and sentences: what pages and the terminal show of a report."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import tabular
from experiments.report.build import FLOOR, REFERENCE, Report, Row
from experiments.report.load import Arm
from experiments.report.statistics import Estimate

NONE = "-"
PERCENT = "%"
CONTENT = ("learned", "raw")
"""Words in the name of a rule that looks at content, of which "retains" would mislead."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
      header: names of columns; the first column holds names, the others values.
      rows: cells.
      references: how many of the last rows are chance and baselines.

    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    references: int = 0


def text_table(table: Table) -> str:
    """A table for the terminal."""
    return tabular.text([table.header, *table.rows])


def score(value: float | None, unit: str) -> str:
    """A score without its unit: one decimal of a percentage, three of anything else."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}" if unit == PERCENT else f"{value:.3f}"


def interval_text(ends: Sequence[float] | None, unit: str) -> str:
    """An interval without its unit."""
    return f"{score(ends[0], unit)} to {score(ends[1], unit)}" if ends else NONE


def column(metric: str, unit: str) -> str:
    """A metric's name with its unit."""
    return metric if unit in ("", metric) else f"{metric} ({unit})"


def count(value: float | None, digits: int = 3) -> str:
    """A number of things with a prefix: 23.5 k, 2.56 M."""
    if value is None:
        return NONE
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{_significant(value / size, digits)}{prefix}"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    """A few digits, and no exponent."""
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, places)}f}"


def megabytes(value: float | None) -> str:
    """Bytes as MB."""
    return NONE if value is None else _significant(value / 1e6, 3)


def rate(value: float | None, at_edge: bool) -> str:
    """A learning rate, marked where a wider grid might have had a better one."""
    return NONE if value is None else f"{value:g}{' (edge of grid)' if at_edge else ''}"


def overview(report: Report) -> Table:
    """Scores of every arm on every task."""
    tasks = {task["task"]: column(task["name"], task["unit"]) for task in report.tasks}
    found = {(row["name"], row["task"]): row for row in report.rows}
    names = dict.fromkeys(row["name"] for row in report.rows)
    rows = [[name, *(cell(found.get((name, task))) for task in tasks)] for name in names]
    return Table(["rule", *(f"{task}: {label}" for task, label in tasks.items())], rows)


def cell(row: Row | None) -> str:
    """A score with its interval."""
    if row is None or row["mean"] is None:
        return NONE
    ends = f" ({interval_text(row['ci95'], row['unit'])})" if row["ci95"] else ""
    return score(row["mean"], row["unit"]) + ends


HEADLINE = (
    "95 % interval",
    "seeds",
    "diverged",
    "parameters",
    "FLOPs / example",
    "examples / s",
    "peak MB",
    "learning rate",
)


def headline(report: Report, task: str) -> Table:
    """Rules, then chance and baselines: score, cost and tuning of each."""
    rows, _ = report.of(task)
    references = _references(rows)
    blank = [NONE] * len(HEADLINE)
    return Table(
        ["rule", column(rows[0]["metric"], rows[0]["unit"]), *HEADLINE],
        [_arm_cells(row) for row in rows] + [[*cells, *blank] for cells in references],
        len(references),
    )


def _arm_cells(row: Row) -> list[str]:
    unit = row["unit"]
    return [
        row["name"],
        score(row["mean"], unit),
        interval_text(row["ci95"], unit),
        str(len(row["seeds"])),
        str(len(row["diverged"])) if not row["stopped"] else "all",
        count(row["params"]),
        count(row["flops_per_example"]),
        count(row["examples_per_second"]),
        megabytes(row["peak_bytes"]),
        rate(row["learning_rate"], row["tuning"]["at_edge"]),
    ]


def _references(rows: Sequence[Row]) -> list[list[str]]:
    """Chance and baselines, with the share of items where one does not exist on all."""
    first = next((row for row in rows if row["baselines"]), rows[0])
    cells = []
    if first["chance"] is not None:
        cells.append(["chance", score(first["chance"], first["unit"])])
    for one in first["baselines"]:
        part = "" if one["n"] == one["of"] else f" (on {one['n']:,} of {one['of']:,} items)"
        cells.append([one["name"] + part, score(one["mean"], first["unit"])])
    return cells


def details(report: Report, task: str) -> Table:
    """How every arm was made, for who wants to make it again."""
    header = ["rule", "as written", "positions", "match", "setting", "grid of rates"]
    header += ["steps", "batch", "compile s", "train s", "by seed"]
    return Table(header, [_details(row) for row in report.of(task)[0]])


def _details(row: Row) -> list[str]:
    seeds = zip(row["seeds"], row["per_seed"], strict=True)
    return [
        row["name"],
        row["rule_spec"],
        row["position_encoding"] or NONE,
        row["match"] or NONE,
        row["tuning"]["setting"] or NONE,
        ", ".join(f"{one:g}" for one in row["tuning"]["grid"]) or NONE,
        str(row["steps"]),
        str(row["batch_size"] or NONE),
        NONE if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
        NONE if row["train_seconds"] is None else f"{row['train_seconds']:.1f}",
        ", ".join(f"{seed}: {score(value, row['unit'])}" for seed, value in seeds) or NONE,
    ]


def by_group(report: Report, task: str) -> Table | None:
    """Scores by group, where there are several."""
    rows, _ = report.of(task)
    first = next((row for row in rows if len(row["by_group"]) > 1), None)
    if first is None:
        return None
    names = [f"{one['group']} (n = {one['n']:,})" for one in first["by_group"]]
    groups = [one["group"] for one in first["by_group"]]
    cells = [[row["name"], *_group_cells(row["by_group"], groups, row["unit"])] for row in rows]
    references = [
        [one["name"], *_group_cells(one["by_group"], groups, first["unit"])]
        for one in first["baselines"]
    ]
    return Table(["rule", *names], cells + references, len(references))


def _group_cells(found: Iterable[Row], groups: Sequence[str], unit: str) -> list[str]:
    by_name = {one["group"]: {"ci95": None, "unit": unit, **one} for one in found}
    return [cell(by_name.get(group)) for group in groups]


def by_distance(report: Report, task: str) -> Table | None:
    """Scores by distance."""
    rows, _ = report.of(task)
    facts = next(one for one in report.tasks if one["task"] == task)
    first = next((row for row in rows if row["by_distance"]), None)
    if first is None:
        return None
    names = [
        f"{bucket(one, facts['whole_distances'])} (n = {one['n']:,})"
        for one in first["by_distance"]
    ]
    cells = [
        [row["name"], *(cell({**one, "unit": row["unit"]}) for one in row["by_distance"])]
        for row in rows
        if row["by_distance"]
    ]
    return Table(["rule", *names], cells)


def bucket(row: Row, whole: bool) -> str:
    """A bucket's name: "4 to 7" of whole distances, "0.25 to 0.5" of others, and "never"."""
    lo, hi = row["lo"], row["hi"]
    if lo is None and hi is None:
        return "never"
    if lo is None:
        return f"< {hi:g}"
    if hi is None:
        return f"≥ {lo:g}"
    if whole:
        first, last = math.ceil(lo), math.ceil(hi) - 1
        return f"{first}" if first == last else f"{first} to {last}"
    return f"{lo:g} to {hi:g}"


def sentence(verdict: Mapping[str, Any], row: Row) -> str:
    """A verdict in plain English; `row` is any row of its task."""
    a, b, task = verdict["a"], verdict["b"], verdict["task"]
    if verdict["seeds"] < 2:
        return (
            f"On {task}, one seed of {a} and {b} supports no claim: {row['metric']} of {a} minus "
            f"{b} is {amount(verdict['difference'], row['unit'])}."
        )
    told = {
        "a better": _better,
        "b better": _better,
        "equivalent": _equivalent,
        "no difference at this n": _no_difference,
    }
    return f"On {task}, {told[verdict['verdict']](verdict, row)}{_kept(verdict)}."


def _better(verdict: Mapping[str, Any], row: Row) -> str:
    a, b = verdict["a"], verdict["b"]
    winner, loser = (a, b) if verdict["verdict"] == "a better" else (b, a)
    ends, unit = verdict["ci95"], row["unit"]
    low, high = sorted(abs(end) for end in ends) if ends[0] * ends[1] > 0 else ends
    way = "higher" if row["higher_is_better"] else "lower"
    text = (
        f"{winner} is better than {loser}: {row['metric']} {way} by "
        f"{amount(abs(verdict['difference']), unit)}, 95 % interval {score(low, unit)} to "
        f"{score(high, unit)}, {_p(verdict['p_holm'])}"
    )
    if verdict["equivalent"]:
        text += f", a difference inside the margin of {amount(verdict['margin'], unit)}"
    return text


def _equivalent(verdict: Mapping[str, Any], row: Row) -> str:
    return (
        f"{verdict['a']} and {verdict['b']} are equivalent: {_signed(verdict, row)}, inside the "
        f"margin of {amount(verdict['margin'], row['unit'])}"
    )


def _no_difference(verdict: Mapping[str, Any], row: Row) -> str:
    return (
        f"no difference between {verdict['a']} and {verdict['b']} shows at this n, and they are "
        f"not shown to be equivalent: {_signed(verdict, row)}, {_p(verdict['p_holm'])}, margin "
        f"{amount(verdict['margin'], row['unit'])}"
    )


def _signed(verdict: Mapping[str, Any], row: Row) -> str:
    unit = row["unit"]
    return (
        f"{row['metric']} of {verdict['a']} minus {verdict['b']} is "
        f"{amount(verdict['difference'], unit)}, 95 % interval "
        f"{interval_text(verdict['ci95'], unit)}"
    )


def _kept(verdict: Mapping[str, Any]) -> str:
    """What a rule without learned content keeps; said once, beside its pair with `learned`."""
    name, value = verdict["a"], verdict["retention"]
    content = any(word in name for word in CONTENT)
    if value is None or content or name == FLOOR or verdict["b"] != REFERENCE:
        return ""
    low, high = verdict["retention_ci95"]
    return (
        f"; {name} retains {100 * value:.0f} % ({100 * low:.0f} to {100 * high:.0f}) of what "
        f"content ({verdict['retention_of']}) adds to self"
    )


def amount(value: float, unit: str) -> str:
    """A difference with its unit: percentages differ by points."""
    if unit == PERCENT:
        return f"{100 * value:.1f} points"
    return f"{_small(value)} {unit}".strip()


def _small(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1g}"


def _p(value: float) -> str:
    return "Holm's p < 0.001" if value < 0.001 else f"Holm's p = {value:.3f}"


def arm_summary(result: Mapping[str, Any], estimate: Estimate | None = None) -> str:
    """What a finished arm came to, for the terminal.

    Args:
      result: what result.json holds.
      estimate: `load_arm(workdir).estimate()`, for an interval; per-seed means alone have none.

    """
    metric, tuning = result["metric"], result.get("tuning") or {}
    unit, lost = metric["unit"], [lane["seed"] for lane in result["diverged"]]
    seeds = list(zip(result["seeds"], result["per_seed"], strict=True))
    kept = [value for seed, value in seeds if seed not in lost and value is not None]
    mean = sum(kept) / len(kept) if kept else None
    lines = [
        ("task", f"{result['task']} ({result['split']} split)"),
        ("rule", f"{result['rule']} = {result['rule_spec']}"),
        (column(metric["name"], unit), f"{score(mean, unit)} over {_seeds(len(kept))}"),
        ("by seed", ", ".join(f"{seed}: {score(value, unit)}" for seed, value in seeds)),
        ("95 % interval", _interval_line(estimate, unit)),
        ("learning rate", rate(result.get("learning_rate"), tuning.get("at_edge", False))),
        ("diverged", _diverged_line(result)),
        ("parameters", f"{result['params']:,}"),
        ("FLOPs", f"{count(result['flops_per_example'])} an example, forward"),
        ("speed", f"{count(result.get('examples_per_second'))} training examples a second"),
        ("memory", f"{megabytes(result.get('peak_bytes'))} MB at the peak of a step"),
    ]
    return tabular.text([line for line in lines if line[1]])


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _interval_line(estimate: Estimate | None, unit: str) -> str:
    if estimate is None or not math.isfinite(estimate.standard_error):
        return ""
    if estimate.seeds < 2:
        return "none: one seed does not say what seeds vary"
    return interval_text((estimate.low, estimate.high), unit)


def _diverged_line(result: Mapping[str, Any]) -> str:
    if result.get("stopped"):
        return f"all: {result['stopped']}"
    lanes = [f"seed {lane['seed']} at step {lane['step']}" for lane in result["diverged"]]
    return ", ".join(lanes) or "none"


def sweep_table(arms: Mapping[str, Arm]) -> str:
    """Cells of a sweep side by side, for the terminal."""
    header = ["cell", "metric", "mean", "95 % interval", "seeds", "diverged", "learning rate"]
    header += ["parameters", "FLOPs / example"]
    return text_table(Table(header, [_sweep_cells(name, arm) for name, arm in arms.items()]))


def _sweep_cells(name: str, arm: Arm) -> list[str]:
    estimate, metric, result = arm.estimate(), arm.metric, arm.result
    known = estimate and estimate.seeds > 1 and math.isfinite(estimate.standard_error)
    return [
        name,
        column(metric.name, metric.unit),
        score(estimate.mean if estimate else None, metric.unit),
        interval_text((estimate.low, estimate.high) if estimate and known else None, metric.unit),
        str(len(arm.seeds)),
        "all" if result.get("stopped") else str(len(result["diverged"])),
        rate(result.get("learning_rate"), (result.get("tuning") or {}).get("at_edge", False)),
        count(result["params"]),
        count(result["flops_per_example"]),
    ]
