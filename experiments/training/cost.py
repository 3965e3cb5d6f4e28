"""What an arm costs: parameters, FLOPs, memory and speed of one lane on its own."""

import time
from typing import Any

import jax
import numpy as np

from experiments.training.lanes import Lane, Program

WARM_UP_STEPS = 3
TIMED_STEPS = 11


def parameters(program: Program) -> int:
    """The number of parameters of the model."""
    lane = jax.eval_shape(program.init, np.int32(0), np.float32(0))
    return sum(leaf.size for leaf in jax.tree.leaves(lane.params))


def flops_per_example(program: Program, batch: Any) -> int:
    """Forward FLOPs of one example by the model's formula."""
    lane = jax.eval_shape(program.init, np.int32(0), np.float32(0))
    return int(program.model(lane.params).flops(batch))


def measure(program: Program, seed: int = 0) -> dict[str, float]:
    """Speed and memory of the training step of one lane that is not vmapped.

    Returns:
      seconds_per_step: the median step.
      compile_seconds: to trace and compile that step.
      examples_per_second: training examples (rows of a batch) by the median step.
      peak_bytes: arguments + outputs + temporaries - aliases of the compiled step.

    """
    batches = iter(program.task.train(seed))
    batch = dict(next(batches))
    lane = jax.jit(program.init)(np.int32(seed), np.float32(1e-4))
    arguments = lane, batch, np.int32(0), np.float32(TIMED_STEPS)
    start = time.perf_counter()
    step = jax.jit(program.step, donate_argnums=0).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    memory: Any = step.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    seconds = _step_seconds(step, lane, batch)
    examples = len(next(iter(batch.values())))
    return {
        "seconds_per_step": seconds,
        "compile_seconds": compile_seconds,
        "examples_per_second": examples / seconds,
        "peak_bytes": int(peak),
    }


def _step_seconds(step: Any, lane: Lane, batch: Any) -> float:
    seconds = []
    for index in range(WARM_UP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        lane, loss = step(lane, batch, np.int32(index), np.float32(TIMED_STEPS))
        jax.block_until_ready((lane, loss))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[WARM_UP_STEPS:]))
