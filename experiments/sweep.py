"""Runs a grid of arms: a cell is one arm with all its seeds.

    python -m experiments.sweep --config=configs/recall.py --axis=rule='learned;gaussian(width=4)' \
        --axis=num_layers=1,2 --dry_run

An axis is KEY=VALUES; VALUES are separated by ';', or by ',' where there is no ';'. KEY is a
dotted config key or its last part where only one key ends in it. Without --axis the cells are
those of the config file's own `sweep()`, a list of dicts of dotted keys. The same command
resumes, and cells that are done are skipped.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import cli
from experiments.arm import make_program, trial_configs
from experiments.cells import Cell, estimate_seconds, is_done, run_cells
from experiments.config import Config, default_workdir, leaves, override, unknown_key
from experiments.options import UserError
from experiments.progress import Bar
from experiments.report.load import load_arm
from experiments.report.tables import sweep_table

_CONFIG = cli.define_config()
_AXIS = flags.DEFINE_multi_string("axis", [], "KEY=VALUES; may be repeated: the grid is a product")
_WORKDIR = flags.DEFINE_string("workdir", None, "where cells are kept; the default is runs/")
_WORKERS = flags.DEFINE_integer("workers", 2, "processes, each bound to one core", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "list and count the cells, estimate the time, stop")


def main() -> None:
    """Runs the cells of --axis or of the config's sweep()."""
    config = cli.read_config(_CONFIG)
    if cli.asked_for_help(config):
        return
    changes = grid(config, _AXIS.value) if _AXIS.value else own_sweep()
    cells = sweep_cells(config, changes, _WORKDIR.value or "runs")
    for cell in cells:
        for trial in trial_configs(cell.config):
            make_program(trial)
    waiting = [cell for cell in cells if not is_done(cell)]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} done, {len(waiting)} to run")
    for cell in cells:
        print(f"  {'done' if cell not in waiting else 'wait'}  {cell.name}  {cell.workdir}")
    if _DRY_RUN.value:
        seconds = estimate_seconds(waiting) / _WORKERS.value
        print(f"about {seconds / 60:.1f} minutes, from a few timed steps of the first cell to run")
        return
    with Bar() as bar:
        stopped = run_cells(cells, _WORKERS.value, bar)
    print(sweep_table({cell.name: load_arm(cell.workdir) for cell in cells}))
    for name, reason in stopped.items():
        print(f"stopped: {name}: {reason}")


def grid(config: Config, axes: Sequence[str]) -> list[dict[str, str]]:
    """The product of axes, each a text KEY=VALUES.

    Raises:
      UserError: an axis does not read KEY=VALUES, or its key is unknown or ambiguous.

    """
    values = []
    for axis in axes:
        key, separator, text = axis.partition("=")
        if not separator or not text:
            raise UserError(f"an --axis must read KEY=VALUES, got {axis!r}")
        name = full_key(config, key.strip())
        values.append([(name, value) for value in split_values(text)])
    return [dict(cell) for cell in itertools.product(*values)]


def full_key(config: Config, key: str) -> str:
    """The dotted key that `key` names, in full or by its last part."""
    known = [name for name, _ in leaves(config)]
    ending = [name for name in known if name == key or name.endswith("." + key)]
    if key in known or len(ending) == 1:
        return key if key in known else ending[0]
    if ending:
        raise UserError(f"the axis {key!r} may mean {' or '.join(ending)}: write it in full")
    raise UserError(unknown_key(key, known))


def split_values(text: str) -> list[str]:
    """Values separated by ';' or, where there is none, by ',' outside of brackets."""
    if ";" in text:
        return [value.strip() for value in text.split(";")]
    values, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def own_sweep() -> Sequence[Mapping[str, Any]]:
    """The cells of the config file's `sweep()`.

    Raises:
      UserError: the file has none.

    """
    flag: Any = flags.FLAGS["config"]
    path = pathlib.Path(flag.config_filename)
    module = cli.config_module(str(path))
    if not hasattr(module, "sweep"):
        raise UserError(f"{path} has no sweep(): give at least one --axis=KEY=VALUES")
    return module.sweep()


def sweep_cells(config: Config, changes: Sequence[Mapping[str, Any]], root: str) -> list[Cell]:
    """One cell for each set of changes; its name lists them.

    Raises:
      UserError: two cells are the same, or a change names no key or has a bad value.

    """
    cells: dict[pathlib.Path, Cell] = {}
    for change in changes:
        arm = config.copy_and_resolve_references()
        for key, value in change.items():
            override(arm, key, value)
        name = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in change.items())
        override(arm, "label", arm.label or name)
        cell = Cell(name, arm, default_workdir(arm, root))
        if cell.workdir in cells:
            raise UserError(f"the cells {cells[cell.workdir].name!r} and {name!r} are the same")
        cells[cell.workdir] = cell
    return list(cells.values())


if __name__ == "__main__":
    cli.run(main)
