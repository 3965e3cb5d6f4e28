"""Says what the heads of a trained model do, and how much of it is distance.

    python -m experiments.analyze --workdir=runs/tagging/learned-1a2b3c4d
    python -m experiments.analyze --workdir=runs/compare --task=text --rule=learned

From the workdir of a run, or of a comparison (its arm `learned` unless --rule names others). For
every head: statistics, kinds, the kernel that explains it best with the share of its weights, and
the score after it is replaced by that kernel, in greedy order, beside controls. Prints the page
and writes it, with figures and analysis.json, into the folder analysis of the run's workdir.
"""

import json
import pathlib
import sys

from absl import flags

from experiments import analysing, cli
from experiments.comparison import trained_arms
from experiments.config import Config, write_atomically
from experiments.examples import has_attention
from experiments.options import UserError
from experiments.progress import Bar
from experiments.report import heads
from experiments.report.figures import to_svg
from experiments.workdirs import load_model, read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "of a run or a comparison")
_TASK = flags.DEFINE_string("task", None, "of a comparison; default: its first")
_RULE = flags.DEFINE_multi_string("rule", [], "arms of a comparison; default: learned")
_SEED = flags.DEFINE_integer("seed", 0, "which seed of a run", lower_bound=0)
_BATCHES = flags.DEFINE_integer("batches", 16, "batches of a split that are read at most", 1)
_ROWS = flags.DEFINE_integer("rows", 1024, "queries of an attention that kernels are fitted to", 2)
_SWAPS = flags.DEFINE_bool("swaps", True, "replace heads by their kernels, and score the model")


def main() -> None:
    """Analyses every arm asked for."""
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is needed: of a run or a comparison")
    workdir = pathlib.Path(_WORKDIR.value)
    config = read_config(workdir)
    if "tasks" not in config:
        given = [name for name in ("task", "rule") if flags.FLAGS[name].present]
        if given:
            raise UserError(f"--{given[0]} would do nothing for the one run of {workdir}")
        _analyse(workdir, config)
        return
    for cell in trained_arms(config, workdir, _TASK.value, _RULE.value or ["learned"]):
        _analyse(cell.workdir, cell.config)


def _analyse(workdir: pathlib.Path, config: Config) -> None:
    if config.task.name == "translation":
        raise UserError(
            "translation has two sentences a row: experiments.explain shows its attention"
        )
    task, model = load_model(workdir, _SEED.value)
    if not has_attention(model):
        raise UserError(f"{config.label or config.rule} has no attention to analyse")
    folder = analysing.folder_of(workdir, _SEED.value)
    folder.mkdir(parents=True, exist_ok=True)
    layers = analysing.analyse(task, model, _BATCHES.value, _ROWS.value)
    curve = None
    if _SWAPS.value:
        with Bar() as bar:
            swapper = analysing.Swapper(task, model, _BATCHES.value)
            curve = analysing.swap_curve(swapper, layers, bar)
    metric = f"{task.metric.name} ({task.metric.unit})" if task.metric.unit else task.metric.name
    title = f"{config.task.name} under {config.label or config.rule}, seed {_SEED.value}"
    page = heads.page(title, layers, curve, task.metric.name, _BATCHES.value)
    figures = {"profiles.svg": heads.profiles(layers)}
    if curve is not None:
        figures["swaps.svg"] = heads.swaps(curve, metric)
    write_atomically(folder / "analysis.md", page)
    found = json.dumps(analysing.as_json(layers, curve), indent=2, allow_nan=False)
    write_atomically(folder / "analysis.json", found + "\n")
    for name, figure in figures.items():
        write_atomically(folder / name, to_svg(figure))
    print(page)
    names = ", ".join(["analysis.md", "analysis.json", *figures])
    print(f"wrote {names} in {folder}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
