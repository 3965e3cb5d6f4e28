"""The suite `lanes`: what training four seeds in one vmapped step costs beside training one.

Compilation is included; the arms are those of configs/text.py and configs/recall.py.
"""

import time

import jax

from experiments.arm import make_program, read_recipe
from experiments.benchmark.case import Case, Contender, Prepared, Target
from experiments.comparison import task_config
from experiments.training.loop import Compiled, Data

LANES = 4


def cases() -> list[Case]:
    """One case a task."""
    return [_case(task) for task in ("text", "recall")]


def _case(task: str) -> Case:
    one, several = "1 seed", f"{LANES} seeds"
    contenders = [
        Contender(name, lambda lanes=lanes: Prepared(_seconds(task, lanes), list))
        for name, lanes in ((one, 1), (several, LANES))
    ]
    targets = (Target("time", several, one),)
    inputs = f"configs/{task}.py, all training steps, compilation included"
    return Case(task, inputs, lambda: contenders, targets, calls=1)


def _seconds(task: str, lanes: int):
    return lambda calls: sum(training_seconds(task, lanes) for _ in range(calls))


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
