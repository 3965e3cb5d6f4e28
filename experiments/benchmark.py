"""Benchmarks: programs that repeat a claim about speed as a ratio measured in one run.

    python -m experiments.benchmark --suite=lanes

lanes: what training four seeds in one vmapped step costs, in units of training one seed,
compilation included, on the arms of configs/text.py and configs/recall.py.
"""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import jax
from absl import flags

from experiments import cli
from experiments.arm import make_program, read_recipe
from experiments.comparison import task_config
from experiments.config import table_text, write_atomically
from experiments.environment import command, versions
from experiments.training.loop import Compiled, Data

_SUITE = flags.DEFINE_enum("suite", "lanes", ["lanes"], "what is measured")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "interleaved rounds; the median counts", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "runs/benchmark", "folder of the JSON file")
_LANES = 4


def main() -> None:
    """Runs one suite, prints its table and writes it as JSON."""
    rows = SUITES[_SUITE.value](_ROUNDS.value)
    print(table_text([tuple(rows[0])] + [tuple(map(str, row.values())) for row in rows]))
    report = {"rows": rows, "environment": versions(), "command": command()}
    path = pathlib.Path(_OUTPUT.value) / f"{_SUITE.value}.json"
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    print(f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}; wrote {path}")


def lanes_suite(rounds: int) -> list[Mapping[str, object]]:
    """Seconds to compile and train one seed and four, in turn, for text and recall."""
    return [_lanes_row(task, rounds) for task in ("text", "recall")]


def _lanes_row(task: str, rounds: int) -> Mapping[str, object]:
    times: dict[int, list[float]] = {1: [], _LANES: []}
    for _ in range(rounds):
        for lanes in times:
            times[lanes].append(training_seconds(task, lanes))
    one, four = (statistics.median(times[lanes]) for lanes in times)
    ratios = [b / a for a, b in zip(times[1], times[_LANES], strict=True)]
    return {
        "task": task,
        "seconds, 1 seed": round(one, 2),
        f"seconds, {_LANES} seeds": round(four, 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio, least": round(min(ratios), 2),
        "ratio, most": round(max(ratios), 2),
    }


def training_seconds(task: str, lanes: int) -> float:
    """Wall seconds to compile and run all training steps of a task's config with n seeds."""
    jax.clear_caches()
    config = task_config(task, "")
    program, _ = make_program(config)
    recipe = read_recipe(config.training)
    rates = recipe.learning_rates[:1] * lanes
    start = time.perf_counter()
    state = program.init_lanes(range(lanes), rates)
    compiled, data = Compiled(program), Data(program, range(lanes))
    for step in range(recipe.steps):
        state, _ = compiled.step(state, data.next(), step, recipe.steps)
    jax.block_until_ready(state)
    return time.perf_counter() - start


SUITES: Mapping[str, Callable[[int], list[Mapping[str, object]]]] = {"lanes": lanes_suite}


if __name__ == "__main__":
    cli.run(main)
