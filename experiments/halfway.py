"""Says how far answers reach, of arms that see so many positions in so many layers.

    python -m experiments.compare --config=configs/compare.py:reach --workdir=runs/reach
    python -m experiments.halfway --workdir=runs/reach

From a comparison: its arms whose rule has a known reach, which is cut off by a window or `reach=`.
d50 is the distance at which the score has fallen halfway from 100 % to chance. Prints it for every
arm and how it goes with layers and reach, and writes halfway.md and halfway.svg into the workdir.
"""

import pathlib
import sys

from absl import flags

from attn_jax.nn.kernels import known_radius
from attn_jax.rules import parse
from experiments import cli
from experiments.arm import finished
from experiments.cells import Cell
from experiments.comparison import comparison_cells
from experiments.config import write_atomically
from experiments.options import UserError
from experiments.report import halfway
from experiments.report.figures import to_svg
from experiments.report.load import load_arm
from experiments.workdirs import read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "of a comparison")


def main() -> None:
    """Reads the arms of the comparison, and writes what they say."""
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is needed: of a comparison")
    workdir = pathlib.Path(_WORKDIR.value)
    config = read_config(workdir)
    if "tasks" not in config:
        raise UserError(f"{workdir} must hold a comparison, got one run")
    done = [
        cell
        for cell in comparison_cells(config, workdir)
        if finished(cell.workdir, cell.config) is not None
    ]
    arms = [local for cell in done if (local := _local(cell)) is not None]
    tasks = sorted({one.arm.result["task"] for one in arms})
    if len(tasks) > 1:
        raise UserError(f"{workdir} has arms of known reach of several tasks: {', '.join(tasks)}")
    try:
        found = halfway.find(arms)
    except ValueError as error:
        raise UserError(f"{workdir}: {error}") from error
    page = halfway.page("How far answers reach", found)
    write_atomically(workdir / "halfway.md", page)
    write_atomically(workdir / "halfway.svg", to_svg(halfway.figure(found)))
    print(page)
    print(f"wrote halfway.md, halfway.svg in {workdir}", file=sys.stderr)


def _local(cell: Cell) -> halfway.Local | None:
    """The arm, if all its heads have a known reach above 0 and its scores have chance."""
    model = cell.config.model
    groups = parse(cell.config.rule, model.num_heads)
    radii = [known_radius(product) for group in groups for product in group.products]
    arm = load_arm(cell.workdir)
    if not arm.seeds or arm.metric.chance is None or None in radii:
        return None
    reach = max(radius for radius in radii if radius is not None)
    return halfway.Local(arm, reach, model.num_layers) if reach > 0 else None


if __name__ == "__main__":
    cli.run(main)
