"""The training loop of one phase: all lanes, from the first step or a checkpoint to the last."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.options import UserError
from experiments.training.checkpoints import KEPT, Checkpoints, warm_started
from experiments.training.lanes import NEVER, Lane, Program, stack
from experiments.training.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Phase:
    """A set of lanes trained together.

    Attributes:
      name: of its folder of checkpoints and of its lines of metrics.
      seeds: one for each lane.
      learning_rates: one for each lane.
      steps: the length of the run, which is also the schedule's.
      log_every: steps between two lines of training metrics.
      evaluate_every: steps between two validation scores; there is always one at the end.
      checkpoint_every: steps between two checkpoints, a multiple of log_every.
      checkpoints: how many are kept, the newest.
      patience: validation scores in a row, without a better one in any lane, that end the run
        early; 0: none.
      warm_start: workdir of a run whose parameters the lanes begin with; "": none.

    """

    name: str
    seeds: Sequence[int]
    learning_rates: Sequence[float]
    steps: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    checkpoints: int = KEPT
    patience: int = 0
    warm_start: str = ""

    def __post_init__(self):
        if self.steps < 1 or self.log_every < 1 or self.evaluate_every < 1:
            raise UserError("training.steps, log_every and evaluate_every must be 1 or more")
        if self.checkpoint_every < 1 or self.checkpoint_every % self.log_every:
            raise UserError(
                "training.checkpoint_every must be a multiple of training.log_every "
                f"({self.log_every}), got {self.checkpoint_every}"
            )

    def lane(self, index: int) -> dict[str, float]:
        """What names a lane in metrics and reports."""
        return {"seed": self.seeds[index], "learning_rate": self.learning_rates[index]}


_UNTRACED = 2
"""Steps before a profile: the first compiles, the second may still allocate."""
LOWER = "lower training.learning_rate or training.clip_norm"


class Diverged(Exception):
    """Every lane has met a loss or gradient that is not finite.

    Attributes:
      lanes: where it is one phase, its lanes, frozen before their first bad step; else None.

    """

    def __init__(self, message: str, lanes: Any = None):
        super().__init__(message)
        self.lanes = lanes


class Compiled:
    """The step and the scores of a program, compiled once for each set of shapes."""

    def __init__(self, program: Program):
        self.program = program
        self._step = jax.jit(program.step_lanes, donate_argnums=0)
        self._scores = jax.jit(program.score_lanes)

    def step(
        self, lanes: Lane, batch: Mapping[str, np.ndarray], step: int, total: int
    ) -> tuple[Lane, jax.Array]:
        """One step of every lane; the lanes given are consumed."""
        return self._step(lanes, batch, np.int32(step), np.float32(total))

    def evaluate(self, params: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Per-item scores [lanes, items, ...] and weights [items] of a split, padding left out."""
        if split == "test":
            decoded = [self._decoded(params, lane, split) for lane in range(_lanes(params))]
            if decoded[0] is not None:
                return np.stack(decoded), np.ones(len(decoded[0]))
        batches = self.program.task.evaluation(split)
        parts = [self._scores(params, dict(batch)) for batch in batches]
        weights = np.concatenate([np.asarray(weight, np.float64) for _, weight in parts])
        values = np.concatenate([np.asarray(value, np.float64) for value, _ in parts], axis=1)
        return values[:, weights > 0], weights[weights > 0]

    def _decoded(self, params: Any, lane: int, split: str) -> Any:
        model = self.program.model(jax.tree.map(lambda leaf: leaf[lane], params))
        return self.program.task.decoded_scores(model, split)


def _lanes(params: Any) -> int:
    return len(jax.tree.leaves(params)[0])


class Data:
    """The batches of all lanes of a phase: one iterator for each seed, stacked by lane."""

    def __init__(self, program: Program, seeds: Sequence[int]):
        self._seeds = seeds
        self._iterators = {seed: iter(program.task.train(seed)) for seed in dict.fromkeys(seeds)}

    def next(self) -> dict[str, np.ndarray]:
        """The next batch of every lane."""
        batches = {seed: next(iterator) for seed, iterator in self._iterators.items()}
        return stack([batches[seed] for seed in self._seeds])

    def state(self) -> dict[str, Any]:
        """Where the iterators are, as JSON."""
        return {str(seed): _as_json(it.get_state()) for seed, it in self._iterators.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        for seed, iterator in self._iterators.items():
            iterator.set_state(_from_json(state[str(seed)]))


def _as_json(state: Any) -> Any:
    return {"bytes": state.decode()} if isinstance(state, bytes) else json.loads(json.dumps(state))


def _from_json(state: Any) -> Any:
    return state["bytes"].encode() if isinstance(state, dict) and "bytes" in state else state


class Patience:
    """The best validation score of every lane so far, and how long none has been better."""

    def __init__(self, limit: int, higher_is_better: bool):
        self._limit, self._sign = limit, 1 if higher_is_better else -1
        self._best: list[float] = []
        self._waited = 0

    @property
    def is_over(self) -> bool:
        """Whether the run is to stop."""
        return 0 < self._limit <= self._waited

    def see(self, scores: Sequence[float]) -> None:
        """Takes the scores of one validation; those of diverged lanes are never better."""
        best = self._best or [-math.inf] * len(scores)
        signed = [self._sign * float(score) for score in scores]
        better = [new > old for new, old in zip(signed, best, strict=True)]
        self._best = [n if b else old for n, b, old in zip(signed, better, best, strict=True)]
        self._waited = 0 if any(better) else self._waited + 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        best = [x if math.isfinite(x) else None for x in self._best]
        return {"best": best, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken."""
        self._best = [-math.inf if x is None else x for x in state["best"]]
        self._waited = state["waited"]


def run_phase(
    compiled: Compiled,
    phase: Phase,
    workdir: pathlib.Path,
    config: dict[str, Any],
    progress: Callable[[str, int, int], None],
    profile: int = 0,
) -> tuple[Lane, float]:
    """Trains all lanes of a phase, resuming from its newest checkpoint.

    Args:
      compiled: the program.
      phase: what to train.
      workdir: where checkpoints and metrics are kept.
      config: of the run, kept with every checkpoint.
      progress: called with the phase's name, the steps done and their number.
      profile: steps that are traced by JAX's profiler, from the third on; 0: none.

    Returns:
      The lanes and the wall seconds of training, compiling and validating, resumed parts
      included.

    Raises:
      Diverged: no lane is left; names the step.

    """
    program = compiled.program
    lanes = program.init_lanes(phase.seeds, phase.learning_rates)
    data = Data(program, phase.seeds)
    patience = Patience(phase.patience, program.task.selecting.higher_is_better)
    first, before, start = 0, 0.0, time.perf_counter()
    with Checkpoints(workdir / "checkpoints" / phase.name, phase.checkpoints) as checkpoints:
        newest = checkpoints.newest(lanes)
        if newest is not None:
            first, lanes, run = newest
            data.restore(run["data"])
            patience.restore(run["patience"])
            before = run["seconds"]
        elif phase.warm_start:
            lanes = warm_started(lanes, phase.warm_start, phase.seeds)
        with Metrics(workdir, phase.name, first) as metrics:
            losses = []
            for step in range(first, phase.steps):
                if patience.is_over:
                    break
                with _traced(workdir, step - first, profile):
                    lanes, loss = compiled.step(lanes, data.next(), step, phase.steps)
                losses.append(loss)
                done = step + 1
                last = done == phase.steps
                if last or done % phase.log_every == 0:
                    _log_losses(metrics, phase, done, losses)
                    losses = []
                    progress(phase.name, done, phase.steps)
                    _stop_if_all_diverged(lanes, phase)
                if last or done % phase.evaluate_every == 0:
                    patience.see(_log_scores(metrics, phase, done, compiled, lanes.params))
                if last or patience.is_over or done % phase.checkpoint_every == 0:
                    seconds = before + time.perf_counter() - start
                    run = {"data": data.state(), "config": config, "seconds": seconds}
                    run |= {"patience": patience.state()}
                    checkpoints.save(done, lanes, run)
    return lanes, before + time.perf_counter() - start


def _log_losses(metrics: Metrics, phase: Phase, step: int, losses: list[jax.Array]) -> None:
    for index, loss in enumerate(np.mean(jax.device_get(losses), axis=0)):
        metrics.write(step, "train", phase.lane(index), {"loss": float(loss)})


def _log_scores(
    metrics: Metrics, phase: Phase, step: int, compiled: Compiled, params: Any
) -> Sequence[float]:
    values, weights = compiled.evaluate(params, "validation")
    metric = compiled.program.task.selecting
    scores = metric.mean(values, weights).tolist()
    for index, score in enumerate(scores):
        metrics.write(step, "validation", phase.lane(index), {metric.name: score})
    return scores


@contextlib.contextmanager
def _traced(workdir: pathlib.Path, step: int, profile: int) -> Iterator[None]:
    """Starts JAX's profiler before the third step of a process, and stops it `profile` later."""
    if profile and step == _UNTRACED:
        jax.profiler.start_trace(str(workdir / "profile"))
    yield
    if profile and step == _UNTRACED + profile - 1:
        jax.profiler.stop_trace()
        print(f"wrote a profile to {workdir / 'profile'}", file=sys.stderr, flush=True)


def _stop_if_all_diverged(lanes: Lane, phase: Phase) -> None:
    diverged = np.asarray(lanes.diverged)
    if (diverged != NEVER).all():
        raise Diverged(
            f"every lane of {phase.name} diverged, the last at step {diverged.max()}: {LOWER}",
            lanes,
        )
