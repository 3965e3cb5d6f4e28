"""Says what the heads of a trained model do, and how much of it is distance.

    python -m experiments.analyze --workdir=runs/tagging/learned-1a2b3c4d
    python -m experiments.analyze --workdir=runs/compare --task=text --rule=learned
    python -m experiments.analyze --workdir=runs/compare --task=text --seed=0 --seed=1 --seed=2

From the workdir of a run, or of a comparison (its arm `learned` unless --rule names others). For
every head: statistics, kinds, the kernel that explains it best with the share of its weights, and
the score after it is replaced by that kernel, in greedy order, beside controls. Prints the page
and writes it, with figures and analysis.json, into the folder analysis of the run's workdir.
Several seeds also have means and intervals over them. Heads of a translator are scored by the
nats of the references, told what comes before: nothing is decoded.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import analysing, cli
from experiments.comparison import trained_arms
from experiments.config import Config, write_atomically
from experiments.examples import has_attention
from experiments.options import UserError
from experiments.progress import Bar
from experiments.report import heads
from experiments.report.figures import to_svg
from experiments.swaps import Swapper, are_replaceable, swap_curve
from experiments.workdirs import load_model, read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "of a run or a comparison")
_TASK = flags.DEFINE_string("task", None, "of a comparison; default: its first")
_RULE = flags.DEFINE_multi_string("rule", [], "arms of a comparison; default: learned")
_SEED = flags.DEFINE_multi_integer("seed", [0], "which seeds of a run", lower_bound=0)
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
    found = {seed: _analyse_seed(workdir, config, seed) for seed in _SEED.value}
    if len(found) > 1:
        files: dict[str, Any] = {"seeds.md": heads.over_seeds(_title(config), found)}
        curves = [one.curve for one in found.values() if one.curve is not None]
        if curves:
            files["swaps.svg"] = heads.swaps(curves, next(iter(found.values())).metric)
        _write(workdir / analysing.FOLDER, files)


def _analyse_seed(workdir: pathlib.Path, config: Config, seed: int) -> analysing.Analysis:
    task, model = load_model(workdir, seed)
    if not has_attention(model):
        raise UserError(f"{config.label or config.rule} has no attention to analyse")
    layers = analysing.analyse(task, model, _BATCHES.value, _ROWS.value)
    curve = None
    if _SWAPS.value and not are_replaceable(model):
        print(f"{_title(config)}: heads of a recurrent decoder can be seen, not replaced: no swaps")
    elif _SWAPS.value:
        fits = {layer.path: [head.with_first for head in layer.explained] for layer in layers}
        with Bar() as bar:
            curve = swap_curve(Swapper(task, model, _BATCHES.value), fits, bar)
    # a metric that only selects is named by the split that it selects on
    name = task.selecting.name.removeprefix("validation ")
    found = analysing.Analysis(layers, curve, dataclasses.replace(task.selecting, name=name))
    files: dict[str, Any] = {
        "analysis.md": heads.page(f"{_title(config)}, seed {seed}", found, _BATCHES.value),
        "analysis.json": json.dumps(found.as_json(), indent=2, allow_nan=False) + "\n",
        "profiles.svg": heads.profiles(layers),
    }
    if curve is not None:
        files["swaps.svg"] = heads.swaps([curve], found.metric)
    _write(analysing.folder_of(workdir, seed), files)
    return found


def _title(config: Config) -> str:
    return f"{config.task.name} under {config.label or config.rule}"


def _write(folder: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Texts and figures by name; pages are printed too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else to_svg(content)
        write_atomically(folder / name, text)
        if name.endswith(".md"):
            print(text)
    print(f"wrote {', '.join(files)} in {folder}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
