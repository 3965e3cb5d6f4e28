"""The main job: every arm on every task, and a report that says which is better at what cost.

    python -m experiments.compare --config=configs/compare.py --workdir=runs/compare

`configs/compare.py:quick` takes some three minutes, `configs/compare.py:full` makes the README's
figures. The same command resumes; arms that are done are not trained again.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from attn_jax.viz import viewer
from experiments import cli, examples
from experiments.arm import make_program, trial_configs
from experiments.cells import Cell, measure_cells, run_cells
from experiments.comparison import comparison_cells
from experiments.config import check_ranges, claim_workdir
from experiments.environment import command, versions
from experiments.matching import matched_in_parameters
from experiments.progress import Bar
from experiments.report.build import build
from experiments.report.load import Arm, References, load_arm, save_baselines
from experiments.report.pages import write

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "where report and runs are kept")


def main() -> None:
    """Runs the comparison of --config and writes its report into --workdir."""
    config = cli.read_config(_CONFIG, "tasks")
    if cli.asked_for_help(config):
        return
    workdir = pathlib.Path(_WORKDIR.value)
    print(f"workdir: {workdir}", flush=True)
    check_ranges(config)
    cells = comparison_cells(config, workdir)
    for cell in cells:
        for trial in trial_configs(cell.config):
            make_program(trial)
    claim_workdir(workdir, config)
    with Bar() as bar:
        run_cells(cells, config.workers, bar)
        if config.match_params:
            cells = cells + matched_in_parameters(cells)
            run_cells(cells, config.workers, bar)
        measure_cells(cells, config.workers, bar)
    _report(cells, workdir)


def _report(cells: Sequence[Cell], workdir: pathlib.Path) -> None:
    """Writes the report; a task's key is its result's, which tells variants apart."""
    arms: dict[str, list[Arm]] = {}
    baselines: dict[str, References] = {}
    for cell in cells:
        arm = load_arm(cell.workdir)
        task = arm.result["task"]
        arms.setdefault(task, []).append(arm)
        if task not in baselines:
            data = arm.result["data_sha256"]
            baselines[task] = save_baselines(cell.config, workdir, data)
    report = build(arms, baselines, command=command(), environment=versions())
    shown = _examples(cells)
    files = {task: f"weights_{re.sub(r'[^A-Za-z0-9]+', '_', task)}.html" for task in shown}
    for path in write(report, arms, workdir, files):
        print(f"wrote {path}")
    for task, weights in shown.items():
        page = viewer(weights, title=f"{task}: weights of one example")
        print(f"wrote {page.save(workdir / files[task])}")


def _examples(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """By task and arm, the weights of one example."""
    shown: dict[str, dict[str, Any]] = {}
    for cell in cells:
        example = examples.load(cell.workdir)
        arm = load_arm(cell.workdir)
        if example:
            shown.setdefault(arm.result["task"], {})[arm.name] = example
    return shown


if __name__ == "__main__":
    cli.run(main)
