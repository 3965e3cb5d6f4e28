"""The page of dated tables, written from the JSON files of runs: no figure is typed by hand."""

import itertools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experiments import tabular
from experiments.benchmark import plot, tables
from experiments.benchmark.suites import SUITES
from experiments.config import write_atomically
from experiments.options import UserError

_HEAD = """\
# Performance

Written by `python -m experiments.benchmark --write=docs/performance.md` from the JSON files of the
runs below; nothing here is typed by hand. Peers are the extra `peers` (`pip install '.[peers]'`),
and those that are absent are skipped by name.

How to read it: every contender of a case answers the same question on the same inputs. Each round
times all of them once, in an order that moves on by one a round; a sample is as many calls as take
a tenth of a second, after one call that is not timed (whole trainings are timed at once). Times are
medians over rounds. A ratio is formed within each round, so that a machine that slows down slows
both sides; its median counts, and the least and most are shown. Memory is what the compiler states:
temporaries beside arguments and results (torch and scipy state none). The error is the largest
difference from dense attention in float64 on the same inputs, and a contender that is off by more
than its case allows is marked WRONG. Ratios are worth more than times: compare times only within a
table. "Goal" is the number of the project's goal that a target belongs to; a row without a target
is there for information.
"""
_CONFORMANCE = """
What each function computes right and wrong, ours and others': [conformance.md](conformance.md).
"""
_QUIET = 1.0
"""The load before a run up to which the machine counts as free."""
_ALONE = 0.05
"""The share of the cores that others may take during a run that counts as undisturbed."""
_WORDS = ("goal", "case", "contender", "quantity", "remark", "verdict")


def write(path: pathlib.Path, runs: pathlib.Path) -> list[pathlib.Path]:
    """Writes the page and its figures from the JSON files in a folder; returns what was written.

    Suites without a file keep the section they have on the page: it may be from another machine.
    Sections of suites that are no more go.

    Raises:
      UserError: the folder holds no report of a whole suite.

    """
    files = {name: runs / f"{name}.json" for name in SUITES}
    reports = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    if not reports:
        raise UserError(
            f"{runs} holds none of {', '.join(f.name for f in files.values())}: run a suite first, "
            "or name the folder of its report with --output"
        )
    written = [path]
    sections = _sections(path)
    for name, report in reports.items():
        figure = path.parent / "figures" / f"{path.stem}_{name}.svg"
        write_atomically(figure, plot.svg(report))
        sections[name] = section(report, f"figures/{figure.name}")
        written.append(figure)
    head = [_HEAD, *[_CONFORMANCE] * (path.parent / "conformance.md").exists()]
    write_atomically(path, "\n".join([*head, *(sections[n] for n in SUITES if n in sections)]))
    return written


def _sections(path: pathlib.Path) -> dict[str, str]:
    """The sections of a page by suite."""
    text = path.read_text() if path.exists() else ""
    heads = [*re.finditer(r"^## ([^:\n]+): ", text, re.MULTILINE)]
    # Sections are joined by a line end.
    places = itertools.pairwise([*(head.start() for head in heads), len(text) + 1])
    return {head[1]: text[a : b - 1] for head, (a, b) in zip(heads, places, strict=True)}


def section(report: Mapping[str, Any], figure: str) -> str:
    """One suite in markdown: how it was made, the targets, the figure, the measurements."""
    suite = report["suite"]
    return "\n".join(
        [
            f"## {suite}: {report['meaning']}",
            "",
            f"`{report['command']}`",
            "",
            made(report),
            "",
            tabular.markdown(tables.reached(report), _WORDS),
            "",
            f"![Ratios of the suite {suite}]({figure})",
            "",
            tabular.markdown(tables.measured(report), _WORDS),
            "",
            "Inputs: " + "; ".join(f"*{c['name']}*: {c['inputs']}" for c in report["cases"]) + ".",
            "",
        ]
    )


def made(report: Mapping[str, Any]) -> str:
    """When, on what and with which versions a report was made, in one paragraph."""
    there = report["environment"]
    names = ("python", "jax", "jaxlib", "numpy", "scipy", "torch", "tokamax")
    versions = ", ".join(f"{n} {there[n]}" for n in names if there.get(n))
    cores = f"{there['cores']} of {there['cores of the machine']} cores"
    busy = [f"load {there['load']} before the run"] if there["load"] is not None else []
    if there.get("others") is not None:
        busy.append(f"{100 * there['others']:.0f} % of the machine taken by others during it")
    load = f" ({', '.join(busy)})" if busy else ""
    device = "" if there["device"] == "cpu" else f", {there['device']}"
    flags = f"`{there['xla_flags']}`" if there["xla_flags"] else "not set"
    tunables = there.get("glibc_tunables")
    memory = f"; GLIBC_TUNABLES `{tunables}`" if tunables else ""
    return (
        f"{there['date']}; {there['processor']}, {cores}{load}{device}; {versions}; "
        f"XLA_FLAGS {flags}{memory}; rounds: {report['rounds']}.{_warning(there)}"
    )


def _warning(there: Mapping[str, Any]) -> str:
    """Says that others were at work: a peer with threads of its own may suffer most from it."""
    if (there["load"] or 0) <= _QUIET and (there.get("others") or 0) <= _ALONE:
        return ""
    return " **The machine was busy with other work: quote no time and no ratio of this run.**"
