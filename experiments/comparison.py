"""The cells of a comparison: every arm on every task, from one config."""

import importlib
import pathlib

from experiments import tasks
from experiments.arms import arm_rule, arm_trials
from experiments.cells import Cell
from experiments.config import Config, default_workdir, override
from experiments.options import UserError


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
        owner, _, key = key.strip().partition(".")
        _check_override(config, assignment, owner, key if separator else "")
        if owner == task:
            override(arm, key, value)
    kind = tasks.get(task)
    place = {"num_heads": arm.model.num_heads, "causal": kind.causal, "cross": kind.cross}
    override(arm, "label", label)
    override(arm, "rule", arm_rule(label, **place))
    if config.own_settings:
        override(arm, "training.trials", arm_trials(label, **place))
    return arm


def _check_override(config: Config, assignment: str, task: str, key: str) -> None:
    if not key:
        raise UserError(f"an override must read TASK.key=value, got {assignment!r}")
    known = sorted({name.partition(":")[0] for name in config.tasks})
    if task not in known:
        raise UserError(
            f"the override {assignment!r} is for no task of this comparison: {', '.join(known)}"
        )
    own = ("rule", "label", *(("training.trials",) if config.own_settings else ()))
    if key in own:
        raise UserError(f"the arms of a comparison set {key} themselves, got {assignment!r}")


def task_config(task: str, argument: str) -> Config:
    """The config of configs/TASK.py:argument."""
    try:
        module = importlib.import_module(f"configs.{task}")
    except ModuleNotFoundError as error:
        raise UserError(f"there is no configs/{task}.py for the task {task!r}") from error
    return module.get_config(argument)
