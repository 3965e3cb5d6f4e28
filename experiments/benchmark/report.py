"""Runs the cases of a suite into a report, the JSON that tables, figures and pages read."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmark import machine, plot
from experiments.benchmark.case import Case, Suite
from experiments.benchmark.measure import measure
from experiments.config import write_atomically

Report = Mapping[str, Any]


def run(
    name: str,
    suite: Suite,
    cases: Sequence[Case],
    rounds: int,
    made_by: str,
    progress: Callable[[str, int, int], None],
) -> Report:
    """Measures the cases one after the other."""
    environment = machine.environment()  # before our own load is part of it
    others = machine.Others()
    records = [measure(case, rounds, machine.available_bytes(), progress) for case in cases]
    environment["others"] = others.share()
    return {
        "suite": name,
        "meaning": suite.meaning,
        "command": made_by,
        "environment": environment,
        "rounds": rounds,
        "cases": records,
    }


def write(report: Report, folder: pathlib.Path, only: str) -> list[pathlib.Path]:
    """Writes JSON and figure of a report; a part of a suite gets a name of its own."""
    part = re.sub(r"[^a-z0-9]+", "_", only.lower()).strip("_")
    stem = f"{report['suite']}-{part or 'part'}" if only else report["suite"]
    contents = {
        folder / f"{stem}.json": json.dumps(report, indent=1) + "\n",
        folder / f"{stem}.svg": plot.svg(report),
    }
    for path, content in contents.items():
        write_atomically(path, content)
    return list(contents)


def wrong(report: Report) -> list[str]:
    """Contenders whose answer was wrong, or that failed, each with its case."""
    return [
        f"{record['name']} ({case['name']})"
        for case in report["cases"]
        for record in case["contenders"]
        if record["wrong"] or record.get("failed")
    ]
