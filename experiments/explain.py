r"""Explains one computation of attention step by step, and writes pictures of all weights.

    python -m experiments.explain --workdir=runs/compare --text="Tommy can be annoying"
    python -m experiments.explain --workdir=runs/compare --task=recall --rule=learned --rule=table
    python -m experiments.explain --workdir=runs/de-en --text="Tommy kann lästig sein."
    python -m experiments.explain --rule=learned --rule=gaussian --workdir=runs/explain \
        --text="Tommy can be annoying but he is a good dog."

From the workdir of a run, of a comparison (two arms side by side) or from rules alone, untrained.
Prints scores, scaling, mask, weights, weighted sum, context vector and heads joined for one query
of one head, and writes viewer.html, a page of all weights, and pictures into the workdir.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from rich.console import Console

from attn_jax import viz
from experiments import cli, explaining
from experiments.cells import Cell
from experiments.comparison import trained_arms
from experiments.config import Config, write_atomically
from experiments.explaining import Side
from experiments.options import UserError
from experiments.report.figures import to_svg
from experiments.workdirs import read_config

TEXT = "Tommy can be annoying but he is a good dog"
READS_TEXT = ("text", "tagging", "translation", "pronouns")

_WORKDIR = flags.DEFINE_string("workdir", None, "of a run or a comparison, or for the pictures")
_TEXT = flags.DEFINE_string("text", None, "what is read; default: the task's own first example")
_RULE = flags.DEFINE_multi_string("rule", [], "rules alone, or arms of a comparison; one or two")
_TASK = flags.DEFINE_string("task", None, "of a comparison; default: one that reads the text")
_SEED = flags.DEFINE_integer("seed", 0, "which seed of a run", lower_bound=0)
_ATTENTION = flags.DEFINE_string("attention", None, "path of the attention; default: the first")
_HEAD = flags.DEFINE_integer("head", 0, "which head", lower_bound=0)
_QUERY = flags.DEFINE_string("query", "", "the word that looks, or its index; default: the last")
_HEADS = flags.DEFINE_integer("num_heads", 4, "of a rule alone", lower_bound=1)
_FEATURES = flags.DEFINE_integer("features", 32, "width of a rule alone", lower_bound=2)


def main() -> None:
    """Prints the steps and writes the pictures."""
    if not _WORKDIR.value:
        raise UserError(
            "--workdir=DIR is needed: of a run or a comparison, or with --rule=RULE a folder for "
            "the pictures"
        )
    workdir = pathlib.Path(_WORKDIR.value)
    if len(_RULE.value) > 2:
        raise UserError(f"two rules fit side by side, got {len(_RULE.value)}: {_RULE.value}")
    if len(set(_RULE.value)) < len(_RULE.value):
        raise UserError(f"two rules side by side must differ, got {_RULE.value[0]!r} twice")
    sides = _sides(workdir)
    path = _path(sides)
    queries = sides[0].shown[path].queries
    query = explaining.place(queries, _QUERY.value)
    heads = min(len(side.shown[path].weights) for side in sides)
    if _HEAD.value >= heads:
        raise UserError(f"--head must be below {heads}, the heads of {path or 'the rule'}")
    _print(sides, path, query)
    _write(workdir, sides, path, query)


def _sides(workdir: pathlib.Path) -> list[Side]:
    """What is to be compared: two arms, one run, or rules."""
    if not (workdir / "config.json").exists():
        if not _RULE.value:
            raise UserError(
                f"{workdir} holds no run (no config.json): name the workdir of one, or rules alone "
                "by --rule"
            )
        text = TEXT if _TEXT.value is None else _TEXT.value
        _refuse("task", "seed")
        return [
            explaining.side_of_rule(rule, text, num_heads=_HEADS.value, features=_FEATURES.value)
            for rule in _RULE.value
        ]
    _refuse("num_heads", "features")
    config = read_config(workdir)
    if "tasks" in config:
        cells = trained_arms(config, workdir, _TASK.value, _RULE.value, READS_TEXT)
        # of arms that nobody named, those without attention have nothing to show
        named = bool(_RULE.value)
        sides = [_side(cell.workdir, cell.config) for cell in cells if named or _attends(cell)]
        if not sides:
            raise UserError("no arm of this comparison has attention to explain")
        return sides
    _refuse("rule", "task")
    return [_side(workdir, config)]


def _refuse(*names: str) -> None:
    """Raises UserError for flags that would do nothing."""
    given = [name for name in names if flags.FLAGS[name].present]
    if given:
        flagged = ", ".join(f"--{name}" for name in given)
        raise UserError(f"{flagged} would do nothing for {_WORKDIR.value}: leave it out")


def _attends(cell: Cell) -> bool:
    return cell.config.rule != "none"


def _side(workdir: pathlib.Path, config: Config) -> Side:
    name = config.label or config.rule
    if config.task.name != "translation":
        return explaining.side_of_run(name, workdir, _TEXT.value, _SEED.value)
    if not _TEXT.value:
        raise UserError("--text=SENTENCE is needed: what the translator is to translate")
    side, translation = explaining.side_of_translator(name, workdir, _TEXT.value, _SEED.value)
    print(f"{name} translates: {translation}")
    return side


def _path(sides: Sequence[Side]) -> str:
    """The attention that is explained, which all sides have."""
    common = [
        path for path in sides[0].shown if all(_alike(side, sides[0], path) for side in sides)
    ]
    if not common:
        raise UserError(
            "the two have no attention of the same path over the same words: explain one at a "
            "time, named by --rule"
        )
    if _ATTENTION.value is None:
        return common[0]
    if _ATTENTION.value not in common:
        raise UserError(f"--attention must be one of {', '.join(common)}, got {_ATTENTION.value!r}")
    return _ATTENTION.value


def _alike(side: Side, other: Side, path: str) -> bool:
    """Whether both have this attention, over the same words: translators write their own."""
    if path not in side.shown:
        return False
    one, two = side.shown[path], other.shown[path]
    return list(one.queries) == list(two.queries) and list(one.keys) == list(two.keys)


def _print(sides: Sequence[Side], path: str, query: int) -> None:
    shown = sides[0].shown[path]
    print(f"words: {' '.join(shown.queries)}")
    where = f"{path}, " if path else ""
    print(f"{where}head {_HEAD.value}: what {shown.queries[query]!r} (position {query}) looks at\n")
    # as wide as it takes: a pipe has no width, and a number cut short is a wrong number
    console = Console(
        width=None if sys.stdout.isatty() else 400, highlight=False, markup=False, emoji=False
    )
    console.print(explaining.table(sides, path, _HEAD.value, query))
    for side in sides:
        print(f"\n{side.name}\n{explaining.summary(side, path, _HEAD.value, query)}")


def _write(workdir: pathlib.Path, sides: Sequence[Side], path: str, query: int) -> None:
    """The page of all weights, and a picture of the steps of every side."""
    workdir.mkdir(parents=True, exist_ok=True)
    title = " ".join(sides[0].shown[path].queries)
    page = viz.viewer({side.name: side.shown for side in sides}, title=title)
    written = [page.save(workdir / "viewer.html")]
    for number, side in enumerate(sides):
        shown = side.shown[path]
        figure = viz.computation(
            side.take(path), shown.queries, query, head=_HEAD.value, keys=shown.keys
        )
        written.append(workdir / f"steps_{number}.svg")
        write_atomically(written[-1], to_svg(figure))
        for name, cross in side.shown.items():
            if name.endswith("cross") or name.endswith("decoder/attention"):
                drawn = viz.alignment(cross.weights.mean(0), cross.keys, cross.queries, title=name)
                written.append(workdir / f"alignment_{number}_{name.replace('/', '_')}.svg")
                write_atomically(written[-1], to_svg(drawn))
    print("\nwrote " + "\n      ".join(map(str, written)))


if __name__ == "__main__":
    cli.run(main)
