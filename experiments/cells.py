"""Runs many arms: in worker processes of one core each, skipping what is done."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments import config as configs
from experiments.arm import (
    add_cost,
    finished,
    has_cost,
    lane_steps,
    make_program,
    run_arm,
    trial_configs,
)
from experiments.config import Config
from experiments.environment import command
from experiments.training.cost import measure
from experiments.training.loop import Diverged


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm with all its seeds.

    Attributes:
      name: as it stands in progress and tables; lists what differs between cells.
      config: the arm's config.
      workdir: where it is kept.

    """

    name: str
    config: Config
    workdir: pathlib.Path


def is_done(cell: Cell) -> bool:
    """True where the cell's workdir holds all its seeds."""
    return finished(cell.workdir, cell.config) is not None


def estimate_seconds(cells: Sequence[Cell]) -> float:
    """Seconds on one core to run the cells, from the timed steps of the first of them."""
    if not cells:
        return 0.0
    program, _ = make_program(trial_configs(cells[0].config)[0])
    speed = measure(program)
    per_step = speed["seconds_per_step"]
    return sum(per_step * lane_steps(cell.config) + speed["compile_seconds"] for cell in cells)


def run_cells(
    cells: Sequence[Cell], workers: int, report: Callable[[str, int, int], None]
) -> dict[str, str]:
    """Runs the cells that are not finished; returns the reason by name of those that stopped.

    A worker is a process of its own that is bound to one core: small models use one core well
    and two badly. With one worker everything runs in this process.
    """
    waiting = [cell for cell in cells if not is_done(cell)]
    done = len(cells) - len(waiting)
    report("arms", done, len(cells))
    stopped: dict[str, str] = {}
    jobs = {cell.name: (configs.to_json(cell.config), cell.workdir, command()) for cell in waiting}
    for index, (name, reason) in enumerate(_in_workers(run_cell, jobs, workers), 1):
        report("arms", done + index, len(cells))
        if reason:
            stopped[name] = reason
    return stopped


def measure_cells(
    cells: Sequence[Cell], workers: int, report: Callable[[str, int, int], None]
) -> None:
    """Measures speed and memory of the finished cells that have none, each worker on its core."""
    jobs = {cell.name: (cell.workdir,) for cell in cells if not has_cost(cell.workdir)}
    done = len(cells) - len(jobs)
    report("costs", done, len(cells))
    for index, _ in enumerate(_in_workers(measure_cell, jobs, workers), 1):
        report("costs", done + index, len(cells))


def _in_workers(
    function: Callable[..., Any], jobs: Mapping[str, Sequence[Any]], workers: int
) -> Iterator[tuple[str, Any]]:
    """Name and result of `function(*arguments)` of every job, as they come."""
    if workers <= 1 or not jobs:
        for name, arguments in jobs.items():
            yield name, function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_take_core, initargs=(counter,)
    )
    with pool:
        names = {pool.submit(function, *arguments): name for name, arguments in jobs.items()}
        try:
            for job in concurrent.futures.as_completed(names):
                yield names[job], job.result()
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            # The pool's own thread reaps them: waiting here as well would race with it.
            pool.shutdown(cancel_futures=True)
            raise


def _take_core(counter) -> None:
    """Binds this worker to one core, before JAX counts the cores it may use."""
    if not hasattr(os, "sched_setaffinity"):
        return
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})


def run_cell(config_json: str, workdir: pathlib.Path, made_by: str) -> str | None:
    """Runs one arm and measures its cost, silently; returns why it stopped, if it did."""
    try:
        run_arm(configs.from_json(config_json), workdir, lambda *_: None, made_by)
        add_cost(workdir)
    except Diverged as stop:
        return str(stop)
    finally:
        jax.clear_caches()
    return None


def measure_cell(workdir: pathlib.Path) -> None:
    """Adds speed and memory to the result of a finished arm."""
    try:
        add_cost(workdir)
    finally:
        jax.clear_caches()
