"""The main job: every arm on every task, and a report that says which is better at what cost.

    python -m experiments.compare --config=configs/compare.py --workdir=runs/compare

`configs/compare.py:quick` takes a minute, `configs/compare.py:full` makes the README's figures.
The same command resumes; arms that are done are not trained again.
"""

import importlib
import json
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import cli, tasks
from experiments.arm import add_cost, make_program, trial_configs
from experiments.arms import arm_rule, arm_trials
from experiments.cells import Cell, run_cells
from experiments.config import Config, claim_workdir, default_workdir, override
from experiments.environment import command, versions
from experiments.matching import matched_in_parameters
from experiments.options import UserError
from experiments.progress import Bar
from experiments.report import build, load_arm, write

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "where report and runs are kept")


def main() -> None:
    """Runs the comparison of --config and writes its report into --workdir."""
    config = cli.read_config(_CONFIG)
    if cli.asked_for_help(config):
        return
    workdir = pathlib.Path(_WORKDIR.value)
    print(f"workdir: {workdir}", flush=True)
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
        _measure_costs(cells, bar)
    _report(cells, workdir)


def comparison_cells(config: Config, workdir: pathlib.Path) -> list[Cell]:
    """One cell for each task and arm.

    Raises:
      UserError: an unknown task or arm, or an override that names no key.

    """
    cells = []
    for task in config.tasks:
        for label in config.arms:
            arm = arm_config_of(config, task, label)
            name = f"{task} / {label}"
            cells.append(Cell(name, arm, default_workdir(arm, str(workdir))))
    return cells


def arm_config_of(config: Config, task: str, label: str) -> Config:
    """The config of one arm: the task's own, the arm's rule, the comparison's budget."""
    task, _, variant = task.partition(":")
    arm = task_config(task, ",".join(filter(None, (config.size, variant))))
    override(arm, "training.seeds", config.seeds)
    if config.learning_rate:
        override(arm, "training.learning_rate", config.learning_rate)
    override(arm, "training.steps", max(1, round(arm.training.steps * config.budget)))
    for assignment in config.overrides:
        key, separator, value = assignment.partition("=")
        if not separator or "." not in key:
            raise UserError(f"an override must read TASK.key=value, got {assignment!r}")
        if key.split(".")[0] == task:
            override(arm, key.partition(".")[2], value)
    kind = tasks.get(task)
    place = {"num_heads": arm.model.num_heads, "causal": kind.causal, "cross": kind.cross}
    override(arm, "label", label)
    override(arm, "rule", arm_rule(label, **place))
    if config.own_settings:
        override(arm, "training.trials", arm_trials(label, **place))
    return arm


def task_config(task: str, argument: str) -> Config:
    """The config of configs/TASK.py:argument."""
    try:
        module = importlib.import_module(f"configs.{task}")
    except ModuleNotFoundError as error:
        raise UserError(f"there is no configs/{task}.py for the task {task!r}") from error
    return module.get_config(argument)


def _measure_costs(cells: Sequence[Cell], bar: Bar) -> None:
    """Speed and memory of every arm, one after the other on the quiet machine."""
    for index, cell in enumerate(cells):
        result = json.loads((cell.workdir / "result.json").read_text())
        if "peak_bytes" not in result:
            add_cost(cell.workdir)
        bar("costs", index + 1, len(cells))


def _report(cells: Sequence[Cell], workdir: pathlib.Path) -> None:
    arms, baselines = {}, {}
    for cell in cells:
        task = cell.config.task.name
        arms.setdefault(task, []).append(load_arm(cell.workdir))
        if task not in baselines:
            baselines[task] = save_baselines(cell.config, workdir)
    report = build(arms, baselines, command=command(), environment=versions())
    for path in write(report, arms, workdir):
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
