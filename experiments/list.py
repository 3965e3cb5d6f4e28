"""Lists what there is: tasks, rules, arms, options of models and configs with their cost.

    python -m experiments.list                     everything, in a few seconds
    python -m experiments.list --rules             one kind, with all its parameters
    python -m experiments.list tagging             what a word occurs in; more words narrow it

A module of your own is listed as well with --import=my_module.
"""

import difflib
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from attn_jax.rules import describe_rules
from experiments import cli, tabular, tasks
from experiments.arm import make_program
from experiments.arms import ARMS, arm_rule
from experiments.config import Config, Reader, leaves
from experiments.imports import classes, import_module
from experiments.options import UserError
from experiments.tasks.base import Task
from experiments.training.cost import flops_per_example, parameters

KINDS = {
    "tasks": "tasks: --config=configs/TASK.py",
    "rules": "rules: --config.rule=NAME, products by *, lists by commas",
    "arms": "arms of a comparison: a rule for four heads",
    "models": "models: --config.model.KEY=VALUE",
    "configs": "configs: --config=FILE, with :size or :variant; -: where the data is not at hand",
    "results": "results on the test split, as README.md states them with intervals",
}
_ASKED = {
    kind: flags.DEFINE_bool(kind, False, f"list {kind}; without such a flag everything is listed")
    for kind in KINDS
}
ROOT = pathlib.Path(__file__).parent.parent
NEXT = """\
Next:  python -m experiments.train --config=configs/recall.py:quick --config.rule='gaussian'
       python -m experiments.train --config=configs/recall.py --help_config"""

Row = tuple[str, ...]


def main(*words: str) -> None:
    """Prints the tables that flags and words ask for."""
    kinds = [kind for kind, flag in _ASKED.items() if flag.value] or list(KINDS)
    found = False
    for kind in kinds:
        rows = table(kind, words, in_full=len(kinds) == 1 or bool(words))
        if len(rows) > 1:
            print(f"{KINDS[kind]}\n\n{_indented(rows)}\n", flush=True)
            found = True
    if not found:
        raise UserError(_nothing(kinds, words))
    print(NEXT)


def table(kind: str, words: Sequence[str] = (), *, in_full: bool = True) -> list[Row]:
    """The rows of a kind in which all words occur, below a row of titles.

    Args:
      kind: one of `KINDS`.
      words: in any letters.
      in_full: rules with the meaning of every parameter.

    """
    if kind == "configs":
        return [CONFIG_TITLES, *_with_costs(list(_matching(_configs(), words)))]
    titles, *rows = {
        "tasks": _tasks,
        "rules": _rules_in_full if in_full else _rules,
        "arms": _arms,
        "models": _models,
        "results": _results,
    }[kind]()
    return [titles, *_matching(rows, words)]


def _matching(rows: Iterator[Row] | Sequence[Row], words: Sequence[str]) -> Iterator[Row]:
    for row in rows:
        text = " ".join(map(str, row)).lower()
        if all(word.lower() in text for word in words):
            yield row


def _indented(rows: list[Row]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in tabular.text(rows).splitlines())


def _nothing(kinds: Sequence[str], words: Sequence[str]) -> str:
    cells = [cell for kind in kinds for row in table(kind)[1:] for cell in row]
    known = {word for cell in cells for word in re.findall(r"\w+", cell)}
    near = difflib.get_close_matches(words[-1], sorted(known), n=1, cutoff=0.0)
    return f"nothing here has {' and '.join(map(repr, words))}: did you mean {near[0]!r}?"


def _tasks() -> Iterator[Row]:
    yield "task", "metric", "options", "what it asks"
    for name in tasks.names():
        kind = tasks.get(name)
        yield name, _metric(kind), str(len(kind.options)), _about(sys.modules[kind.__module__])
    for name in (flags.FLAGS["import"].value or ()) if flags.FLAGS.is_parsed() else ():
        for kind in classes(import_module(name), Task):
            about = (kind.__doc__ or "").partition("\n")[0]
            yield f"{name}:{kind.__name__}", _metric(kind), str(len(kind.options)), about


def _metric(kind: type[Task]) -> str:
    metric = getattr(kind, "metric", None)
    if metric is None:
        return "-"
    return metric.name + (f" ({metric.unit})" if metric.unit else "")


def _about(module: Any) -> str:
    """The first line of a module's docstring, without the name that it begins with."""
    return str(module.__doc__).partition("\n")[0].partition(": ")[2].removesuffix(".")


def _rules() -> Iterator[Row]:
    """A line each, parameters with their defaults."""
    yield "rule", "parameters", "weight of a key, or what it looks at"
    for name, meaning, lines in _described():
        yield name, ", ".join(line.partition(":")[0] for line in lines), meaning


def _rules_in_full() -> Iterator[Row]:
    yield "rule", "parameter", "meaning"
    for name, meaning, lines in _described():
        yield name, "", meaning
        for line in lines:
            parameter, _, about = line.partition(": ")
            yield name, parameter, about


def _described() -> Iterator[tuple[str, str, list[str]]]:
    """Name, meaning and lines of parameters of every rule."""
    for block in re.split(r"\n(?! )", describe_rules()):
        first, *lines = block.splitlines()
        name, _, meaning = first.partition(": ")
        yield name, meaning, [line.strip() for line in lines]


def _arms() -> Iterator[Row]:
    yield "arm", "rule"
    for label in ARMS:
        yield label, arm_rule(label, num_heads=4, causal=False, cross=False)


def _models() -> Iterator[Row]:
    """Every option of every task's model, and which tasks have it."""
    yield "key", "default", "tasks", "meaning"
    owners: dict[tuple[str, str, str], list[str]] = {}
    for name in tasks.names():
        for key, option in tasks.get(name).model_options.items():
            owners.setdefault((key, repr(option.default), option.meaning), []).append(name)
    for (key, default, meaning), names in sorted(owners.items()):
        everywhere = len(names) == len(tasks.names())
        yield key, default, "all" if everywhere else ", ".join(names), meaning


CONFIG_TITLES = ("config", "runs", "parameters", "FLOPs / example", "what it is")


def _configs() -> Iterator[Row]:
    """Every file of configs/ and every size and variant of it; the two costs are left empty."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = cli.config_module(str(path))
        about = _about(module)
        for size in ("", *module.SIZES):
            config = module.get_config(size)
            name = f"configs/{path.name}" + (f":{size}" if size else "")
            yield name, _runs(config), "", "", "" if size else about


def _runs(config: Config) -> str:
    if "tasks" in config:
        return f"{len(config.tasks)} tasks x {len(config.arms)} arms x {config.seeds} seeds"
    return f"{config.training.seeds} seeds x {config.training.steps} steps"


def _with_costs(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows of configs with parameters and FLOPs, "-" where the data is not at hand."""
    known: dict[str, tuple[str, str]] = {}
    for name, runs, _, _, about in rows:
        path, _, size = name.partition(":")
        config = cli.config_module(str(ROOT / path)).get_config(size)
        key = repr([pair for pair in leaves(config) if not pair[0].startswith("training.")])
        if key not in known:
            known[key] = _cost(config)
        yield name, runs, *known[key], about


def _cost(config: Config) -> tuple[str, str]:
    """Parameters and forward FLOPs of the config's own rule."""
    unknown = "-", "-"
    if "tasks" in config:
        return unknown
    kind = tasks.get(config.task.name)
    if kind.needs_data(Reader(config).task):
        return unknown
    program, _ = make_program(config)
    batch = next(iter(program.task.train(0)))
    return f"{parameters(program):,}", f"{flops_per_example(program, batch) / 1e6:.3g} M"


def _results() -> Iterator[Row]:
    """The means of README.md's tables of tasks by rules, one row a task."""
    shown = ("self", "gaussian", "table", "learned", "learned * gaussian")
    yield "task", "metric", *shown
    for (task, metric), scores in readme_results().items():
        yield task, metric, *(scores.get(rule, "-") for rule in shown)


def readme_results(
    path: pathlib.Path = ROOT / "README.md",
) -> Mapping[tuple[str, str], Mapping[str, str]]:
    """Mean by rule for every column of README.md that is headed TASK: METRIC."""
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for table_, rows in itertools.groupby(lines, lambda line: line.startswith("| ")):
        if not table_:
            continue
        titles, _, *body = [
            [_plain(cell) for cell in re.split(r"(?<!\\)\|", r)[1:-1]] for r in rows
        ]
        columns = {
            index: (task, metric)
            for index, (task, separator, metric) in enumerate(t.partition(": ") for t in titles)
            if separator and task in tasks.names()
        }
        for index, column in columns.items():
            found[column] = {row[0]: row[index].partition(" (")[0] for row in body if row[index]}
    return found


def _plain(cell: str) -> str:
    """A cell of Markdown as text."""
    return cell.strip().strip("*").replace("\\*", "*").replace("\\|", "|")


if __name__ == "__main__":
    cli.run(main, takes_words=True)
