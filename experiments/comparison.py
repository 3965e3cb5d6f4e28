"""The cells of a comparison: every arm on every task, from one config."""

import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import tasks
from experiments.arm import finished
from experiments.arms import arm_rule, arm_trials
from experiments.cells import Cell
from experiments.config import Config, arm_config, default_workdir, override, sized
from experiments.imports import import_module, is_import_path
from experiments.options import UserError

OWN_SIZES = {"quick": {"training__steps": 40}, "full": {}}
"""Of a task of a user's own whose module has no `get_config`."""


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


def trained_arms(
    config: Config,
    workdir: pathlib.Path,
    task: str | None,
    asked: Sequence[str],
    tasks: Sequence[str] = (),
) -> list[Cell]:
    """Arms of a comparison that are trained, for those who look at models.

    Args:
      config: of the comparison.
      workdir: of the comparison.
      task: its name; None: the first of `tasks` that is there, or the comparison's first.
      asked: labels of arms; none: learned and gaussian where they are there, else two others.
      tasks: see `task`.

    Raises:
      UserError: nothing is trained, or not what was asked for.

    """
    cells = comparison_cells(config, workdir)
    done = [cell for cell in cells if finished(cell.workdir, cell.config) is not None]
    if not done:
        raise UserError(f"{workdir} holds no arm that is trained: run experiments.compare first")
    names = list(dict.fromkeys(_task_name(cell) for cell in done))
    if task is not None and task not in names:
        raise UserError(f"--task must be one of {', '.join(names)}, got {task!r}")
    task = task or next((name for name in tasks if name in names), names[0])
    there = {
        cell.config.label or cell.config.rule: cell for cell in done if _task_name(cell) == task
    }
    chosen = asked or [name for name in ("learned", "gaussian") if name in there]
    chosen = chosen or list(there)[:2]
    unknown = [name for name in chosen if name not in there]
    if unknown:
        raise UserError(
            f"{workdir} has no trained arm {unknown[0]!r} of {task}: it has {', '.join(there)}"
        )
    return [there[name] for name in chosen]


def _task_name(cell: Cell) -> str:
    """As it stands in the report."""
    name, variant = cell.config.task.name, cell.config.variant
    return f"{name} ({variant})" if variant else name


def arm_config_of(config: Config, task: str, label: str) -> Config:
    """The config of one arm: the task's own, the arm's rule, the comparison's budget."""
    task, variant = split_variant(task)
    arm = task_config(task, ",".join(filter(None, (config.size, variant))))
    own = task_arms(task)
    # first what the arm sets, so that the comparison's budget and overrides change it too
    for key, value in own.get(label, {}).items():
        override(arm, key, value)
    override(arm, "imports", tuple(dict.fromkeys((*arm.imports, *config.imports))))
    override(arm, "training.seeds", config.seeds)
    if config.learning_rate:
        override(arm, "training.learning_rate", config.learning_rate)
    override(arm, "training.steps", max(1, round(arm.training.steps * config.budget)))
    for assignment in config.overrides:
        name, separator, value = assignment.partition("=")
        owner, key = _owner(config, name.strip())
        _check_override(config, assignment, owner, key if separator else "")
        if owner == task:
            override(arm, key, value)
    kind = tasks.get(task)
    place = {"num_heads": arm.model.num_heads, "causal": kind.causal, "cross": kind.cross}
    override(arm, "label", label)
    if label not in own:
        override(arm, "rule", arm_rule(label, **place))
    if config.own_settings and label not in own:
        override(arm, "training.trials", arm_trials(label, **place))
    return arm


def task_arms(task: str) -> Mapping[str, Mapping[str, Any]]:
    """Arms of a task's own, which set more than the rule: keys and values by label."""
    return getattr(_config_module(task), "ARMS", {})


def split_variant(name: str) -> tuple[str, str]:
    """The task and the variant of TASK:VARIANT, where a user's own task reads module:Class."""
    task, _, variant = name.partition(":")
    if variant and task not in tasks.names():
        kind, _, variant = variant.partition(":")
        task = f"{task}:{kind}"
    return task, variant


def _owner(config: Config, key: str) -> tuple[str, str]:
    """The task of TASK.key, whose name may have dots of its own, and the key."""
    for name in (split_variant(task)[0] for task in config.tasks):
        if key.startswith(f"{name}."):
            return name, key.removeprefix(f"{name}.")
    owner, _, key = key.partition(".")
    return owner, key


def _check_override(config: Config, assignment: str, task: str, key: str) -> None:
    if not key:
        raise UserError(f"an override must read TASK.key=value, got {assignment!r}")
    known = sorted({split_variant(name)[0] for name in config.tasks})
    if task not in known:
        raise UserError(
            f"the override {assignment!r} is for no task of this comparison: {', '.join(known)}"
        )
    own = ("rule", "label", *(("training.trials",) if config.own_settings else ()))
    if key in own:
        raise UserError(f"the arms of a comparison set {key} themselves, got {assignment!r}")


def task_config(task: str, argument: str) -> Config:
    """The config of configs/TASK.py:argument.

    A task module:Class has that of its module's own `get_config`, or the defaults.

    Raises:
      UserError: there is no such config.

    """
    module = _config_module(task)
    if is_import_path(task) and not hasattr(module, "get_config"):
        return arm_config(task, **sized(OWN_SIZES, argument))
    return module.get_config(argument)


def _config_module(task: str) -> Any:
    if is_import_path(task):
        return import_module(task.partition(":")[0])
    try:
        return importlib.import_module(f"configs.{task}")
    except ModuleNotFoundError as error:
        raise UserError(f"there is no configs/{task}.py for the task {task!r}") from error
